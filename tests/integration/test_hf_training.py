# SPDX-License-Identifier: Apache-2.0
"""Tests of a model after pretraining: latent export, the Hugging Face Trainer, ``qat_convert.py``, stock Transformers.

The training scripts are run as users run them, as separate processes.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_hf
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from bitcpm_megatron.checkpoint_tools import qat_convert
from bitcpm_megatron.checkpoint_tools.hf_model.modeling_bitcpm import BitCPMForCausalLM
from bitcpm_megatron.checkpoint_tools.hf_model.remote_code import read_record
from bitcpm_megatron.quantization import dequantize, quantize
from bitcpm_megatron.quantization.record import QuantizerRecord

EXAMPLES = Path(__file__).parents[2] / "examples" / "hf"
SENTENCES = ["the quick brown fox jumps over the lazy dog. ", "ternary weights are minus one, zero or one. "]
STEPS = 12


def run(script: str, model: Path, output: Path, data: list[Path], *more: str) -> subprocess.CompletedProcess:
    flags = f"""
        --model_name_or_path {model} --train_files {" ".join(map(str, data))} --output_dir {output}
        --use_cpu --report_to none --disable_tqdm true --seed 1 --logging_steps 1 --save_strategy no
        --max_steps {STEPS} --learning_rate 4e-3 --lr_scheduler_type constant --per_device_train_batch_size 4
    """.split()
    command = [sys.executable, str(EXAMPLES / script), *flags, *more, "--trust_remote_code"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def losses(directory: Path) -> list[float]:
    history = json.loads((directory / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def load_latent(directory: Path) -> BitCPMForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": sentence * 20}) for sentence in SENTENCES]
    (directory / "text.jsonl").write_text("\n".join(lines) + "\n\n")
    (directory / "text.txt").write_text(SENTENCES[0] * 40)
    chats = [
        {"messages": [{"role": "user", "content": "what jumps?"}, {"role": "assistant", "content": "the quick fox."}]},
        {"instruction": "what are weights?", "input": "ternary ones", "output": "minus one, zero or one."},
    ]
    (directory / "chats.jsonl").write_text("\n".join(json.dumps(chat) for chat in chats * 8))
    return directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data: Path) -> tuple[Path, Path]:
    """Makes a latent export with LongRoPE and bf16 latent weights, and trains it further, with fp32 master weights."""
    directory = tmp_path_factory.mktemp("models")
    record = tiny_hf.record(latent_dtype="bfloat16")
    a = tiny_hf.llama(longrope=tiny_hf.longrope(64))
    tiny_hf.latent_export(directory / "latent", a, record, bos_token_id=1, eos_token_id=2)
    tiny_hf.write_tokenizer(directory / "latent")
    files = [data / "text.jsonl", data / "text.txt"]
    more = ("--block_size", "48", "--gradient_checkpointing")
    done = run("train.py", directory / "latent", directory / "trained", files, *more)
    assert done.returncode == 0, done.stderr
    return directory / "latent", directory / "trained"


def assert_convertible(latent: Path, fused: Path) -> None:
    """Asserts that ``qat_convert.py`` makes a stock model that computes the same as the trained one."""
    assert qat_convert.main(["--input_bin", str(latent), "--output", str(fused), "--group_size", "-1"]) == 0
    record = read_record(latent)
    before, after = load_file(latent / "model.safetensors"), load_file(fused / "model.safetensors")
    assert set(before) == set(after)
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if module in record.modules:
            config = record.config_of(module)
            weight = dequantize(*quantize(weight.bfloat16(), config), config, weight.dtype)
        assert torch.equal(after[name], weight), name
    assert QuantizerRecord.read(fused).state == "fused"

    stock = AutoModelForCausalLM.from_pretrained(fused, trust_remote_code=False, dtype=torch.float32).eval()
    assert type(stock) is LlamaForCausalLM
    trained = load_latent(latent)
    for length in (20, 100):  # within the original length of LongRoPE, and beyond it
        ids = torch.randint(3, 259, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            theirs, ours = stock(ids).logits, trained(ids).logits
        assert (theirs - ours).abs().max() <= 1e-5 * (ours.max() - ours.min())
    tokenizer = AutoTokenizer.from_pretrained(fused)
    prompt = tokenizer("the quick", return_tensors="pt").input_ids
    texts = [
        tokenizer.decode(m.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0])
        for m in (stock, trained)
    ]
    assert texts[0] == texts[1] and texts[0].startswith("the quick") and len(texts[0]) > len("the quick")


@pytest.mark.verifies(
    "checkpoints",
    "latent exports can be trained with Hugging Face's Trainer and then fused",
    cpu="yes²",
)
def test_continued_pretraining_then_fusing(trained, tmp_path: Path) -> None:
    latent, output = trained
    curve = losses(output)
    assert len(curve) == STEPS and curve[-1] < 0.8 * curve[0]
    written = json.loads((output / "config.json").read_text())
    assert written["model_type"] == "bitcpm" and "AutoModelForCausalLM" in written["auto_map"]
    assert (output / "modeling_bitcpm.py").read_text() == (latent / "modeling_bitcpm.py").read_text()
    assert read_record(output) == read_record(latent)
    before, after = load_file(latent / "model.safetensors"), load_file(output / "model.safetensors")
    assert set(before) == set(after)
    for module in read_record(latent).modules:
        name = f"{module}.weight"
        assert after[name].dtype == torch.float32
        assert (after[name] - before[name].float()).abs().max() > 1e-3, f"{module} did not learn"
    assert_convertible(output, tmp_path / "fused")


def test_fine_tuning_then_fusing(trained, data: Path, tmp_path: Path) -> None:
    done = run("train_sft.py", trained[1], tmp_path / "sft", [data / "chats.jsonl"], "--bf16")
    assert done.returncode == 0, done.stderr
    curve = losses(tmp_path / "sft")
    assert len(curve) == STEPS and curve[-1] < 0.7 * curve[0]
    assert_convertible(tmp_path / "sft", tmp_path / "fused")

    # The fused model has the chat template that it was trained with.
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "fused")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<s>Human: hi\nAssistant:"


# ------------------------------------------------------------------------------- the functions of the scripts


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    found = {}
    sys.path.insert(0, str(EXAMPLES))
    try:
        for name in ("latent_model", "distilling", "train", "train_sft"):
            spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
            found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[name])
    finally:
        sys.path.remove(str(EXAMPLES))
    return found


@pytest.fixture(scope="module")
def teacher(trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a stock teacher that has learned more of the text than the latent export."""
    directory = tmp_path_factory.mktemp("teacher") / "fused"
    qat_convert.main(["--input_bin", str(trained[1]), "--output", str(directory)])
    return directory


def test_a_teacher_is_asked_about_the_tokens_that_are_learned(trained, teacher: Path, scripts, tmp_path: Path) -> None:
    """Loss and gradients equal plain float64 ones; the step has more learned tokens than this micro-batch."""
    distilling = scripts["distilling"]
    arguments = distilling.DistillationArguments(str(teacher), 0.5, 2.0)
    model, tokenizer = scripts["latent_model"].load(
        scripts["latent_model"].ModelArguments(str(trained[0]), trust_remote_code=True)
    )
    taught = distilling.load_teacher(arguments, tokenizer)
    options = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
    trainer = distilling.DistillingTrainer(taught, arguments, len(tokenizer), model=model, args=options)
    ids = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(4))
    labels = ids.clone()
    labels[0, :5] = labels[1, 9:] = -100
    counted = labels[:, 1:] != -100
    found = trainer.compute_loss(model.train(), {"input_ids": ids, "labels": labels.clone()}, num_items_in_batch=40)
    found.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    z, t = (m(ids).logits[:, :-1][counted].double() for m in (model, taught))
    q, p = ((x[:, : len(tokenizer)] / 2).log_softmax(-1) for x in (z, t))
    entropy = torch.nn.functional.cross_entropy(z, labels[:, 1:][counted], reduction="sum")
    expected = (0.5 * entropy + 0.5 * 4 * (p.exp() * (p - q)).sum()) / 40
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() <= 1e-5 * parameter.grad.norm(), name
    assert all(parameter.grad is None for parameter in taught.parameters())
    evaluated = trainer.compute_loss(model.eval(), {"input_ids": ids, "labels": labels.clone()})
    assert evaluated.item() == pytest.approx(entropy.item() / int(counted.sum()), rel=1e-5)


def test_both_scripts_learn_from_a_teacher(trained, teacher: Path, data: Path, tmp_path: Path) -> None:
    asked = ("--teacher", str(teacher), "--distill_temperature", "2", "--max_steps", "4")
    for script, file in (("train.py", "text.jsonl"), ("train_sft.py", "chats.jsonl")):
        more = ("--block_size", "48") if script == "train.py" else ()
        done = run(script, trained[0], tmp_path / script, [data / file], *asked, *more)
        assert done.returncode == 0, done.stderr
        curve = losses(tmp_path / script)
        assert len(curve) == 4 and curve[-1] < curve[0]


def test_who_cannot_teach_is_refused(trained, teacher: Path, scripts, tmp_path: Path) -> None:
    distilling = scripts["distilling"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained[0])
    with pytest.raises(ValueError, match="need --teacher"):
        distilling.load_teacher(distilling.DistillationArguments(None, 0.5), tokenizer)
    with pytest.raises(ValueError, match="--teacher .*nowhere: Transformers cannot load it"):
        distilling.load_teacher(distilling.DistillationArguments(str(tmp_path / "nowhere")), tokenizer)
    tokenizer.add_tokens(["<more>"])
    with pytest.raises(ValueError, match="its tokens are others"):
        distilling.load_teacher(distilling.DistillationArguments(str(teacher)), tokenizer)


def test_what_is_no_latent_export_is_refused(trained, scripts, tmp_path: Path, capsys) -> None:
    def refused(directory: Path, trust: bool = True) -> str:
        arguments = scripts["latent_model"].ModelArguments(str(directory), trust_remote_code=trust)
        with pytest.raises(ValueError) as caught:
            scripts["latent_model"].load(arguments)
        return str(caught.value)

    latent = trained[0]
    assert "pass --trust_remote_code" in refused(latent, trust=False)
    copy = tmp_path / "copy"
    qat_convert.main(["--input_bin", str(latent), "--output", str(copy)])
    assert "holds fused weights" in refused(copy)
    flags = ["--train_files", "x", "--output_dir", str(tmp_path / "no"), "--use_cpu", "--report_to", "none"]
    for script in ("train", "train_sft"):
        assert scripts[script].main(["--model_name_or_path", str(copy), *flags]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    (copy / "DIGESTS.json").unlink()
    (copy / "ternary_quantizer.json").unlink()
    assert "no latent export" in refused(copy)
    # The weights are fused, but the record says that they are latent.
    for name in ("config.json", "ternary_quantizer.json", "modeling_bitcpm.py"):
        (copy / name).write_text((latent / name).read_text())
    assert "is quantized already" in refused(copy)


def test_only_answers_count_in_the_loss(trained, scripts) -> None:
    sft = scripts["train_sft"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained[0])
    tokenizer.chat_template = sft.PLAIN_TEMPLATE
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": "never answered"},
    ]
    ids, labels = sft.encode(messages, tokenizer)
    assert tokenizer.decode(ids) == "<s>be brief\nHuman: one?\nAssistant:two</s>\nHuman: three?\nAssistant:four</s>"
    assert tokenizer.decode([i for i in labels if i != sft.IGNORED]) == "two</s>four</s>"
    assert all(label in (i, sft.IGNORED) for i, label in zip(ids, labels, strict=True))
    batch = sft.pad([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]

    tokenizer.chat_template = "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        sft.encode(messages, tokenizer)


@pytest.mark.parametrize("line", ["{}", "[]", "{", '{"messages": []}', '{"messages": [{"role": "user"}]}', '"text"'])
def test_a_bad_line_is_named(trained, scripts, tmp_path: Path, line) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained[0])
    tokenizer.chat_template = scripts["train_sft"].PLAIN_TEMPLATE
    (tmp_path / "bad.jsonl").write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match="bad.jsonl, line 2"):
        scripts["train_sft"].read([tmp_path / "bad.jsonl"], tokenizer, 100)
    with pytest.raises(ValueError, match="bad.jsonl, line 2"):
        list(scripts["train"].documents(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("script", ["train", "train_sft"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--no_such_flag 1", "unknown arguments: --no_such_flag"),
        ("--per_device_train_batch_size 0", "'0': must be 1 to"),
        ("--learning_rate nan", "'nan': expected a finite number"),
        ("--seed 1.5", "'1.5': expected a whole number"),
        ("--max_steps two", "'two': expected a whole number"),
        ("--lr_scheduler_type sometimes", "invalid choice"),
    ],
)
def test_a_bad_flag_is_one_line(scripts, script: str, flags: str, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as leaving:
        scripts[script].main(["--model_name_or_path", "x", "--train_files", "x", "--output_dir", "x", *flags.split()])
    error = capsys.readouterr().err
    assert leaving.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("script", ["train", "train_sft"])
def test_files_that_cannot_be_read_are_named(trained, scripts, script: str, tmp_path: Path, capsys) -> None:
    files = {"pipe.jsonl": "no regular file", "none.jsonl": "No such file", "latin.jsonl": "not UTF-8"}
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    flags = ["--trust_remote_code", "--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none"]
    for name, message in files.items():
        argv = ["--model_name_or_path", str(trained[0]), "--train_files", str(tmp_path / name), *flags]
        assert scripts[script].main(argv) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert name in line and message in line


@pytest.mark.parametrize("damage", ["cut", "tokenizer", "rows"])
def test_a_damaged_export_is_one_line(trained, scripts, damage: str, tmp_path: Path, capsys) -> None:
    copy = Path(shutil.copytree(trained[0], tmp_path / "copy"))
    if damage == "cut":
        weights = copy / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "tokenizer":
        (copy / "tokenizer.json").write_text("{")
    else:
        tokenizer = AutoTokenizer.from_pretrained(copy, trust_remote_code=True)
        tokenizer.add_tokens([f"word{i}" for i in range(200)])
        tokenizer.save_pretrained(copy)
    flags = "--trust_remote_code --train_files x.txt --use_cpu --report_to none".split()
    argv = ["--model_name_or_path", str(copy), *flags, "--output_dir", str(tmp_path / "out")]
    assert scripts["train"].main(argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and str(copy) in errors[0]
    assert ("it is not this model's" in errors[0]) == (damage == "rows")


@pytest.mark.parametrize("script", ["run.sh", "run_sft.sh"])
def test_the_scripts_say_what_is_missing(script: str, tmp_path: Path) -> None:
    def refused(*arguments: str, **environment: str) -> str:
        # The rest of the environment is not passed on, because it may have DeepSpeed.
        command = ["bash", str(EXAMPLES / script), *arguments]
        done = subprocess.run(command, env={"PATH": os.defpath, **environment}, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        return done.stderr

    assert "takes a latent export" in refused("latent", "out")
    assert "DEVICES holds '0'" in refused("latent", "out", "a.txt", DEVICES="0")
    assert "no /nowhere/python" in refused("latent", "out", "a.txt", PYTHON="/nowhere/python")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$2" in *deepspeed*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert f"{python} has no deepspeed" in refused("latent", "out", "a.txt", PYTHON=str(python))


def test_text_is_packed_without_loss(trained, scripts, data: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(trained[0])
    tokens = scripts["train"].tokenize([data / "text.jsonl", data / "text.txt"], tokenizer)
    expected = f"{SENTENCES[0] * 20}</s>{SENTENCES[1] * 20}</s>{SENTENCES[0] * 40}</s>"
    assert tokenizer.decode(tokens) == expected
    blocks = scripts["train"].Blocks(tokens, 100)
    assert len(blocks) == len(tokens) // 100
    assert torch.equal(torch.cat([b["input_ids"] for b in blocks]), tokens[: len(blocks) * 100].long())
    with pytest.raises(ValueError, match="do not fill one block"):
        scripts["train"].Blocks(tokens[:99], 100)

# SPDX-License-Identifier: Apache-2.0
"""Tests of opening models for questions: caches do not change logits, and refused models get a remedy."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from support import tiny_hf  # noqa: E402 - needs Transformers
from support.chat import CHATML, chat_tokenizer  # noqa: E402

from bitcpm_megatron import QuantizerConfig, fake_quantize  # noqa: E402
from bitcpm_megatron.checkpoint_tools.hf_model.config import GRANITE, LLAMA, config_for  # noqa: E402
from bitcpm_megatron.inference import transformers_model  # noqa: E402
from bitcpm_megatron.inference.conversation import Conversation  # noqa: E402
from bitcpm_megatron.inference.generate import NextToken  # noqa: E402
from bitcpm_megatron.inference.text_model import open_questioner, open_text_model  # noqa: E402

# There are some 40 sums in sequence, each of at most 320 terms, in different orders.
ROUNDING = 1e-5
TOKENS = torch.randint(3, 259, (30,), generator=torch.Generator().manual_seed(1)).tolist()
LONGROPE = tiny_hf.longrope(original=16)
ARCHITECTURES = {
    "llama": (LLAMA, tiny_hf.llama(longrope=LONGROPE)),
    "granite": (GRANITE, tiny_hf.architecture()),
    "granite, LongRoPE": (GRANITE, tiny_hf.architecture(longrope=LONGROPE)),
    "small vocabulary": (GRANITE, tiny_hf.architecture(vocab_size=260)),
}


def dense(directory: Path, name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Writes an ordinary model, and returns it."""
    kind, architecture = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(**config_for(kind, architecture, {}, "float32"))
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    tiny_hf.write_tokenizer(directory)
    return model


def agrees(tokens: NextToken, model: torch.nn.Module) -> None:
    """Asserts equal logits for a text of growing length, one that differs from the middle on, and one cut short."""
    turned = [*TOKENS[:12], *reversed(TOKENS[12:])]
    texts = [TOKENS[:end] for end in range(10, len(TOKENS) + 1)] + [turned, turned[:14], TOKENS]
    for text in texts:
        with torch.no_grad():
            expected = model(torch.tensor([text]), use_cache=False).logits[0, -1]
        found = tokens.logits(text)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < ROUNDING * expected.abs().max(), len(text)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_dense_model_says_what_it_says_without_a_cache(name: str, tmp_path: Path) -> None:
    model = dense(tmp_path / "model", name)
    opened = open_text_model(tmp_path / "model")
    assert (opened.context, opened.ends, opened.tokenizer.vocab_size) == (128, {2}, 259)
    agrees(opened.tokens, model)


def test_only_new_tokens_are_computed(tmp_path: Path) -> None:
    dense(tmp_path / "model", "granite")
    opened = open_text_model(tmp_path / "model")
    computed = []
    hook = opened.tokens._model.model.embed_tokens.register_forward_pre_hook
    hook(lambda module, inputs: computed.append(inputs[0].shape[1]))
    for end in (8, 9, 10, 30):
        opened.tokens.logits(TOKENS[:end])
    opened.tokens.logits([*TOKENS[:20], 5, 6])
    assert computed == [8, 1, 1, 20, 2]


@pytest.mark.parametrize("bits", [16, 8])
def test_latent_weights_compute_as_their_own_class_does(bits: int, tmp_path: Path) -> None:
    """Their own class is the modeling file that the converters wrote."""
    directory = tmp_path / "latent"
    record = tiny_hf.record(activation_bits=bits)
    theirs = tiny_hf.latent_export(directory, tiny_hf.architecture(longrope=LONGROPE), record).eval()
    tiny_hf.write_tokenizer(directory)
    opened = open_text_model(directory)
    assert type(opened.tokens._model) is transformers.GraniteForCausalLM
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS]), use_cache=False, logits_to_keep=1).logits[0, -1]
    # Both run the same kernels on the same inputs.
    assert torch.equal(opened.tokens.logits(TOKENS), expected)
    if bits == 16:
        agrees(opened.tokens, theirs)


def test_masters_are_rounded_to_what_training_quantized(tmp_path: Path) -> None:
    """Master weights are stored in fp32, and training quantized them as bf16."""
    directory = tmp_path / "latent"
    record = tiny_hf.record(latent_dtype="bfloat16")
    tiny_hf.latent_export(directory, tiny_hf.llama(), record)
    tiny_hf.write_tokenizer(directory)
    masters = {
        name: tensor.float() * (1 + 2**-9) for name, tensor in load_file(directory / "model.safetensors").items()
    }
    save_file(masters, directory / "model.safetensors", metadata={"format": "pt"})
    found = {fp32: open_text_model(directory, fp32=fp32).tokens._model.state_dict() for fp32 in (True, False)}
    for module in record.modules:
        weight, rounded = (found[fp32][f"{module}.weight"] for fp32 in (True, False))
        assert (weight.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(weight, rounded.float())
    name = "model.layers.0.mlp.up_proj.weight"
    seen = [fake_quantize(latent, QuantizerConfig()).float() for latent in (masters[name].bfloat16(), masters[name])]
    assert torch.equal(found[True][name], seen[0]) and not torch.equal(*seen)


def test_turns_on_one_cache_are_those_of_models_that_were_never_asked(tmp_path: Path) -> None:
    dense(tmp_path, "granite")
    chat_tokenizer(tmp_path, CHATML)

    def conversation() -> Conversation:
        model = open_text_model(tmp_path)
        return Conversation(model, open_questioner(model), count=8)

    kept = conversation()
    for text in ("Hi!", "Me?", "So"):
        fresh = conversation()
        fresh.messages = list(kept.messages)
        answer = "".join(kept.say(text))
        assert "".join(fresh.say(text)) == answer and answer
        assert fresh.messages == kept.messages


def test_ends_are_those_of_every_file(tmp_path: Path) -> None:
    dense(tmp_path, "granite")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert open_text_model(tmp_path).ends == {2, 7, 9}


def test_a_packed_export_is_opened_by_its_own_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dense(tmp_path, "granite")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "other"}}))
    with pytest.raises(ValueError, match="packed by 'other' are not read: compressed-tensors are"):
        open_text_model(tmp_path)
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = []

    def load_packed_model(directory: Path, **options: object) -> torch.nn.Module:
        asked.append((directory, *options.values()))
        return model

    monkeypatch.setattr(transformers_model, "load_packed_model", load_packed_model)
    agrees(open_text_model(tmp_path).tokens, model)
    open_text_model(tmp_path, fp32=True)
    assert [dtype for _, _, dtype in asked] == [torch.bfloat16, torch.float32]


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        open_text_model(directory)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_gguf_file_runs_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.gguf"):
        refused(path, "llama.cpp", f"llama-cli -m {tmp_path / 'model.gguf'}")


def test_what_holds_no_model_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        refused(path, str(path), "there is no checkpoint", "config.json")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file: name the directory")
    (tmp_path / "mp_rank_00").mkdir()
    refused(tmp_path, "legacy format", "convert_megatron_to_hf.py")


def test_code_of_a_directory_is_not_run(tmp_path: Path) -> None:
    """A model without a class in Transformers is refused; with latent weights, the message says to fuse it."""
    marker = tmp_path / "ran"
    dense(tmp_path, "granite")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "harm.Config", "AutoModelForCausalLM": "harm.Model"}
    (tmp_path / "harm.py").write_text(f"open({str(marker)!r}, 'w')")
    for kind, cure in (("minicpm", "convert_hf_to_megatron.py"), ("llama", "convert_hf_to_megatron.py")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        refused(tmp_path, "code of its own, which is not run here", cure, f"--load-dir {tmp_path}")
    tiny_hf.record().write(tmp_path)
    refused(tmp_path, "code of its own", f"qat_convert.py --input_bin {tmp_path}")
    assert not marker.exists()


def test_damage_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    dense(tmp_path, "granite")
    tiny_hf.record(modules={"model.norm": {"group_size": -1}}).write(tmp_path)
    refused(tmp_path, "lists model.norm, which is no linear layer")
    tiny_hf.record(modules={"model.layers.0.mlp.up_proj": {"group_size": 96}}).write(tmp_path)
    refused(tmp_path, "model.layers.0.mlp.up_proj", "96")
    (tmp_path / "ternary_quantizer.json").unlink()
    (tmp_path / "DIGESTS.json").write_text(
        json.dumps({"algorithm": "xxh3-128", "files": {"model.safetensors": {"bytes": 1, "xxh3_128": "0" * 32}}})
    )
    refused(tmp_path, "model.safetensors", "the file is cut or changed")
    (tmp_path / "DIGESTS.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 99)
    refused(tmp_path, str(tmp_path), "Transformers cannot open it")
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "holds no *.safetensors", "save_pretrained")


def test_a_tokenizer_with_more_pieces_than_rows_is_refused(tmp_path: Path) -> None:
    dense(tmp_path / "model", "small vocabulary")
    with pytest.raises(ValueError, match=r"has 274 pieces, and .* has rows for 260: give the model's own"):
        open_text_model(tmp_path / "model", tokenizer=str(chat_tokenizer(tmp_path / "large")))
    with pytest.raises(ValueError, match="no chat template"):
        open_questioner(open_text_model(tmp_path / "model"))


def test_it_opens_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense(tmp_path, "granite")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(tmp_path, "start the command without torchrun")

# SPDX-License-Identifier: Apache-2.0
"""Benchmark of packed inference against dense bf16: memory, one layer, and a whole model with random ternary weights.

    python benchmarks/packed_inference.py --model minicpm4-0.5b

- memory that a process of its own needs, beyond its imports, to generate some tokens with the packed model;
- logits of the packed and the dense model over the same tokens, one by one through the cache, and greedy choices;
- a 4096 x 4096 layer: one token against ``torch.nn.functional.linear`` in bf16, many against that plus one unpacking;
- tokens per second of whole models, against Transformers in bf16 and, if ``llama_cpp`` can be imported, llama.cpp.

Compared calls are timed in turn, so that other work on the machine slows all of them; ratios are medians over rounds.
The benchmark writes ``packed-inference.csv`` and ``packed-inference.png``, and prints a Markdown table. It needs free
disk space of about twice the model's size, and memory for the dense and the packed model.

Exit status: 0 done, 1 failed or beyond its bound of memory, 2 bad arguments.
"""

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hardware import check_outputs, command_line, linux, machine, versions
from report.pictures import bars, level, picture
from report.tables import markdown, number, write_csv

from bitcpm_megatron import QuantizerConfig, cli, fake_quantize, quantize
from bitcpm_megatron.checkpoint_tools import export_packed
from bitcpm_megatron.checkpoint_tools.hf_model.config import GRANITE, LLAMA, config_for
from bitcpm_megatron.checkpoint_tools.storage.reader import TensorInfo
from bitcpm_megatron.checkpoint_tools.storage.safetensors_writer import SafetensorsWriter
from bitcpm_megatron.checkpoint_tools.tensor_map import megatron_tensors, part_shapes
from bitcpm_megatron.data.tokenizers import train_sentencepiece
from bitcpm_megatron.files import write_text
from bitcpm_megatron.inference.kernels import kernels_for
from bitcpm_megatron.inference.packed_linear import PackedTernaryLinear
from bitcpm_megatron.inference.packed_model import load_packed_model
from bitcpm_megatron.launch.launcher.presets import architecture, names
from bitcpm_megatron.models.architecture import Architecture
from bitcpm_megatron.quantization import pack
from bitcpm_megatron.quantization.record import QuantizerRecord

MB = 10**6
LAYER = 4096
MANY_TOKENS = (33, 128, 512)
ALLOWED = 1.1
"""Largest allowed memory of the packed model, in units of its packed bytes."""
_CONFIG = QuantizerConfig()
_GENERATED_AT_ONCE = 8


@dataclass(frozen=True)
class Row:
    """One comparison: medians over rounds, and the median of the rounds' ratios; None if not measurable here."""

    what: str
    unit: str
    packed: float | None
    other: float | None
    beside: str
    ratio: float | None
    goal: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the measurements that the command line describes, and returns the exit status."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=names(), default="minicpm4-0.5b", help="shape of the model")
    parser.add_argument("--tokens", type=cli.Whole(1, 4096), default=64, help="generated before memory is looked at")
    parser.add_argument("--compared", type=cli.Whole(1, 4096), default=256, help="tokens whose logits are compared")
    parser.add_argument("--rounds", type=cli.Whole(1, 1000), default=31, help="of each measurement of time")
    parser.add_argument("--work-dir", type=Path, help="default the system's temporary directory")
    parser.add_argument("--output-dir", type=Path, default=Path("docs/benchmarks"))
    args = parser.parse_args(argv)
    return cli.run(lambda: _measure(args, command_line("packed_inference", argv)))


def _measure(args: argparse.Namespace, command: str) -> int:
    check_outputs(args.output_dir)
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is missing: pip install 'bitcpm_megatron[hf]'")
    rows = layer_rows(LAYER, MANY_TOKENS, args.rounds)
    with tempfile.TemporaryDirectory(prefix="bench-packed-", dir=args.work_dir) as work:
        print(f"making {args.model}", file=sys.stderr, flush=True)
        packed, dense, gguf = make_model(architecture(args.model), Path(work))
        print("measuring memory", file=sys.stderr, flush=True)
        memory = memory_row(packed, args.tokens)
        rows = [memory, *model_rows(packed, dense, gguf, args.compared, args.rounds), *rows]
    write_csv([asdict(row) for row in rows], args.output_dir / "packed-inference.csv", ".6g")
    draw(rows, args.output_dir / "packed-inference.png")
    print(table(rows, args, command))
    return 0 if memory.ratio is not None and memory.ratio <= 1 else 1


# ----------------------------------------------------------------------------------------------------------- the model


def make_model(a: Architecture, work: Path) -> tuple[Path, Path, Path | None]:
    """Writes random ternary weights as a packed and a dense directory, and as GGUF if its writer is installed."""
    dense, modules = work / "dense", {}
    dense.mkdir()
    infos, quantizable = {}, set()
    for tensor in megatron_tensors(a):
        for name, shape in part_shapes([tensor]).items():
            infos[name] = TensorInfo(shape, torch.bfloat16)
            if tensor.quantizable:
                quantizable.add(name)
                modules[name.removesuffix(".weight")] = {"group_size": _CONFIG.group_size}
    g = torch.Generator().manual_seed(1)
    with SafetensorsWriter(dense, infos) as writer:
        for name, info in infos.items():
            weight = torch.empty(info.shape, dtype=torch.bfloat16)
            if weight.dim() == 1:
                weight.fill_(1)
            else:
                weight.normal_(0, 0.02, generator=g)
            writer.write(name, [fake_quantize(weight, _CONFIG) if name in quantizable else weight])
    config = config_for(LLAMA if a.is_llama else GRANITE, a, {}, "bfloat16")
    write_text(dense / "config.json", json.dumps(config))
    QuantizerRecord("fused", "ternary", _CONFIG.eps, "bfloat16", 1, 16, modules).write(dense)
    texts = [" ".join(re.findall("[a-z]+", line)) for line in Path(__file__).read_text(encoding="utf-8").splitlines()]
    (dense / "tokenizer.model").write_bytes(train_sentencepiece(texts, 300))
    formats = ["compressed-tensors", *(["gguf"] if importlib.util.find_spec("gguf") else [])]
    for form in formats:
        with contextlib.redirect_stdout(io.StringIO()):
            argv = ["--load-dir", str(dense), "--save-dir", str(work / form), "--format", form]
            if export_packed.main(argv):
                raise cli.FailedError(f"the export as {form} failed, see above")
    return work / formats[0], dense, work / "gguf" / "model.gguf" if len(formats) > 1 else None


# -------------------------------------------------------------------------------------------------------------- memory


def memory_row(packed: Path, tokens: int) -> Row:
    """Compares the resident memory after some generated tokens, without the imports, with packed bytes plus cache."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        held, peak, stored, cache = pool.apply(resident, (packed, tokens))
    allowed = (ALLOWED * stored + cache) / MB
    what = f"memory after {tokens} tokens (peak {peak / MB:.0f}; packed {stored / MB:.0f}, cache {cache / MB:.1f})"
    return Row(what, "MB", held / MB, allowed, "1.1 x packed + cache", held / MB / allowed, "<= 1")


def resident(packed: Path, tokens: int) -> tuple[int, int, int, int]:
    """Generates tokens with the packed model in this process, and returns the bytes that it takes.

    They are the resident bytes at the end and at the peak, both beyond the imports, and those of tensors and cache.
    """
    config = json.loads((packed / "config.json").read_text(encoding="utf-8"))
    kind = config["model_type"]
    importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    for name in ("accelerate", "safetensors", "transformers.generation.utils"):
        importlib.import_module(name)
    transformers = importlib.import_module("transformers")
    # Some modules are imported only when they are used, and the pages of libraries are loaded when their code first
    # runs. A tiny model generates first, so that memory that does not depend on the model's size is not counted.
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    nothing = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **sizes), dtype=torch.bfloat16
    )
    nothing.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    kernels_for("cpu")
    before, _ = _memory()
    model = load_packed_model(packed)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([[1, 5, 9]]),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    if config["tie_word_embeddings"]:  # state_dict has it twice
        stored -= model.get_output_embeddings().weight.nbytes
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    after, peak = _memory()
    return after - before, peak - before, stored, cache


def _memory() -> tuple[int, int]:
    gc.collect()
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", text, re.MULTILINE))
    return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024


# --------------------------------------------------------------------------------------------------------- whole models


def model_rows(packed: Path, dense: Path, gguf: Path | None, compared: int, rounds: int) -> list[Row]:
    """Compares whole models: logits, greedy choices and tokens per second."""
    from transformers import AutoModelForCausalLM

    models = {
        "packed": load_packed_model(packed),
        "dense": AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16),
    }
    print("comparing logits", file=sys.stderr, flush=True)
    rows = logit_rows(models, compared)
    steps = {name: stepper(model) for name, model in models.items()}
    others = {"dense": "Transformers, bf16"}
    llama = None if gguf is None else llama_stepper(gguf, rounds + 1)
    if llama is not None:
        steps["llama.cpp"], others["llama.cpp"] = llama, "llama.cpp, TQ2_0"
    print("timing models", file=sys.stderr, flush=True)
    seconds = in_turn(steps, rounds)
    speed = {name: [_GENERATED_AT_ONCE / s for s in taken] for name, taken in seconds.items()}
    for name, beside in others.items():
        rows.append(compare("the whole model", "tokens/s", speed["packed"], speed[name], beside))
    if llama is None:
        rows.append(
            Row("the whole model", "tokens/s", statistics.median(speed["packed"]), None, "llama.cpp: null", None)
        )
    return rows


def logit_rows(models: Mapping[str, Any], count: int) -> list[Row]:
    """Compares the logits of two models over the same tokens: the largest difference, and agreeing greedy choices."""
    from transformers import DynamicCache

    sizes = models["dense"].config.vocab_size
    tokens = torch.randint(0, sizes, (count,), generator=torch.Generator().manual_seed(2))
    caches = {name: DynamicCache() for name in models}
    largest = spread = 0.0
    margins, agree = [], []
    for token in tokens:
        with torch.inference_mode():
            logits = {
                name: model(token.view(1, 1), past_key_values=caches[name]).logits[0, -1].float()
                for name, model in models.items()
            }
        largest = max(largest, float((logits["packed"] - logits["dense"]).abs().max()))
        spread = max(spread, float(logits["dense"].std()))
        best = logits["dense"].topk(2).values
        margins.append(float(best[0] - best[1]))
        agree.append(int(logits["packed"].argmax()) == int(logits["dense"].argmax()))
    certain = [same for same, margin in zip(agree, margins, strict=True) if margin > 2 * largest]
    beyond = "of a margin beyond twice the largest difference"
    return [
        Row(f"largest difference of logits, {count} tokens", "", largest, spread, "their spread", largest / spread),
        Row("greedy choices that agree", "", sum(agree), count, "tokens", sum(agree) / count),
        Row(f"the same, {beyond}", "", sum(certain), len(certain), "tokens", _part(certain), "1"),
    ]


def _part(certain: Sequence[bool]) -> float | None:
    return sum(certain) / len(certain) if certain else None


def stepper(model: Any) -> Callable[[], object]:
    """Returns a function that greedily generates the next tokens of a model, with a cache of its own."""
    from transformers import DynamicCache

    cache = DynamicCache()
    state = {"token": torch.tensor([[1]])}

    def step() -> None:
        with torch.inference_mode():
            for _ in range(_GENERATED_AT_ONCE):
                state["token"] = model(state["token"], past_key_values=cache).logits[:, -1:].argmax(-1)

    return step


def llama_stepper(gguf: Path, steps: int) -> Callable[[], object] | None:
    """Returns a function that generates tokens in llama.cpp, for ``steps`` calls; None if it is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    from llama_cpp import Llama

    context = 1 + steps * _GENERATED_AT_ONCE
    model = Llama(str(gguf), n_ctx=context, n_threads=torch.get_num_threads(), verbose=False, logits_all=False)
    model.eval([1])

    def step() -> None:
        for _ in range(_GENERATED_AT_ONCE):
            model.eval([model.sample(temp=0.0)])

    return step


# ----------------------------------------------------------------------------------------------------------- one layer


def layer_rows(size: int, many: Sequence[int], rounds: int) -> list[Row]:
    """Compares a square layer with the dense product for few tokens, and with that plus one unpacking for many."""
    g = torch.Generator().manual_seed(0)
    weight = torch.empty(size, size, dtype=torch.bfloat16).normal_(0, 0.02, generator=g)
    codes, scales = quantize(weight, _CONFIG)
    layer, dense = PackedTernaryLinear(pack(codes), scales, size), fake_quantize(weight, _CONFIG)
    del weight, codes
    rows = []
    for tokens in (1, 4, 16, 32, *many):
        x = torch.empty(tokens, size, dtype=torch.bfloat16).normal_(generator=g)
        calls: dict[str, Callable[[], object]] = {
            "packed": lambda x=x: layer(x),
            "dense": lambda x=x: torch.nn.functional.linear(x, dense),
        }
        if tokens in many:
            calls["unpack"] = lambda: layer.weight(torch.bfloat16)
        with torch.inference_mode():
            seconds = in_turn(calls, rounds)
        other, beside, goal = seconds["dense"], "F.linear, bf16", ">= 2" if tokens == 1 else ""
        if tokens in many:
            other = [a + b for a, b in zip(seconds["dense"], seconds["unpack"], strict=True)]
            beside, goal = "F.linear + one unpacking", ">= 1"
        ms = ([1e3 * s for s in taken] for taken in (seconds["packed"], other))
        what = f"{size} x {size}, {tokens} token{'s' * (tokens > 1)}"
        rows.append(compare(what, "ms", *ms, beside, inverse=True, goal=goal))
    return rows


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Runs all calls in turn in every round, and returns the seconds of each by round, without a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in seconds.items()}


def compare(
    what: str,
    unit: str,
    packed: Sequence[float],
    other: Sequence[float],
    beside: str,
    inverse: bool = False,
    goal: str = "",
) -> Row:
    """Returns the row of two series by round; its ratio says how many times faster the packed one is.

    ``inverse`` is for times, of which the smaller is better, instead of speeds.
    """
    ratios = [b / a if inverse else a / b for a, b in zip(packed, other, strict=True)]
    medians = (statistics.median(series) for series in (packed, other, ratios))
    mine, theirs, ratio = medians
    return Row(what, unit, mine, theirs, beside, ratio, goal)


# -------------------------------------------------------------------------------------------------------------- report


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws how many times faster the layer is, and the tokens per second of whole models."""
    with picture(path, 11, 4, panels=2) as (left, right):
        layers = [row for row in rows if row.unit == "ms"]
        ratios = {row.what.split(", ")[1].replace(" tokens", "").replace(" token", ""): row.ratio for row in layers}
        bars(left, {"": {name: ratio or 0.0 for name, ratio in ratios.items()}}, "%.2f", color="#4878a8")
        level(left, 1, "bf16 F.linear; above 32 tokens with one unpacking")
        left.set_title(f"a {LAYER} x {LAYER} layer: times faster, by tokens")
        left.legend(fontsize=8)
        speeds = [row for row in rows if row.unit == "tokens/s"]
        heights = {"packed": speeds[0].packed or 0.0} | {r.beside: r.other for r in speeds if r.other is not None}
        bars(right, {"": heights}, "%.1f", color="#6aa56a")
        right.set_title("a whole model, tokens/s")


def table(rows: Sequence[Row], args: argparse.Namespace, command: str) -> str:
    """Returns the rows as a Markdown table, with a description of the machine, the versions and the command."""
    import transformers

    found = (
        f"{row.what} | {_told(row.packed)} {row.unit} | {_told(row.other)} {row.unit} ({row.beside}) | "
        f"{number(row.ratio, 3, missing='null')} | {row.goal}"
        for row in rows
    )
    return f"""{markdown("what | packed | beside | ratio | goal", found)}

Ratios of times are the other's time by the packed one's. {args.rounds} rounds, in turn. Model: {args.model}, random \
weights, one scale per row. Kernels: {kernels_for("cpu").name}. Hardware: {machine("cpu")}, \
{torch.get_num_threads()} threads. Versions: {versions(transformers)}, {linux()}.
Command: `{command}`"""


def _told(value: float | None) -> str:
    return "null" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main())

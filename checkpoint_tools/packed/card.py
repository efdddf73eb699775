# SPDX-License-Identifier: Apache-2.0
"""Model card of a packed export: its contents, which tensors are exact, and how to load it."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from ...files import write_text
from ...quantization.record import FILE_NAME as RECORD_FILE
from .encoding import Loss
from .planner import Plan
from .source import Source

FILE_NAME = "README.md"
_FRONT_MATTER = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_UNKNOWN = "unknown"
_LOADING = {
    "gguf": """\
llama.cpp computes with the packed weights, on 8-bit activations:

    llama-cli -m model.gguf

    from llama_cpp import Llama
    model = Llama("model.gguf")

Transformers expands the file to ordinary weights, and does not read all of these types or the factors of LongRoPE: take
the export in the format compressed-tensors for it.""",
    "compressed-tensors": """\
`launch/chat.py DIRECTORY` and `launch/generate.py DIRECTORY` of bitcpm_megatron keep codes of 2 bits packed in memory.

Transformers expands the weights to ordinary ones when it loads them, so that the file is small and the memory is not
(`pip install transformers compressed-tensors`):

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("DIRECTORY")

vLLM serves codes of 4 bits (`export_packed.py --bits 4`, then `vllm serve DIRECTORY`; on a CPU it refuses 2 bits). This
export was not tried there.""",
}


def write_card(
    directory: Path,
    form: str,
    source: Source,
    plan: Plan,
    losses: Mapping[str, Loss],
    evaluation: Sequence[str] = ("None yet.",),
) -> None:
    """Writes the model card ``README.md``, and copies the license file of the source if there is one.

    Args:
        directory: the directory of the export.
        form: the format of the export, ``gguf`` or ``compressed-tensors``.
        source: the model that was packed.
        plan: the plan of its weights.
        losses: the measured losses of the embeddings, by type.
        evaluation: the paragraphs of the section on evaluation.
    """
    named, text = _license(source.files)
    if text is not None:
        shutil.copyfile(text, directory / text.name)
    record = source.record
    groups = sorted({choice.weight.group for choice in plan.choices if choice.weight.group is not None})
    front = {"license": named, "tags": ["ternary", "1.58-bit", form]}
    a = source.architecture
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {source.name}, ternary weights packed as {form}",
        f"{a.parameter_count():,} parameters: {a.num_layers} layers, hidden {a.hidden_size}, ffn {a.ffn_hidden_size}, "
        f"{a.num_attention_heads} heads of {a.kv_channels} ({a.num_query_groups} key/value heads), up to "
        f"{a.max_position_embeddings} tokens. Written by `export_packed.py` of bitcpm_megatron from the codes and "
        "scales of training; nothing was quantized anew.",
        "## Quantizer",
        f"{len(record.modules)} linears were trained as codes -1, 0 and 1 times a bf16 scale for every "
        f"{' or '.join(map(str, groups))} elements of a row (row-parallel shards {record.row_parallel_shards}, eps "
        f"{record.eps:g}, latent weights in {record.latent_dtype}). Activations in training: "
        f"{record.activation_bits} bits. All of it by module: `{RECORD_FILE}`.",
        "## What is in the file",
        _tensors(plan, losses),
        f"{plan.nbytes:,} bytes of tensors, {plan.ratio:.2f} times smaller than the whole model in BF16; the ternary "
        f"linears alone {plan.linear_ratio:.2f} times.",
        "## Loading",
        _LOADING[form],
    ]
    if form == "gguf" and a.longrope is not None and a.longrope.short_factor != a.longrope.long_factor:
        lines.append(
            f"LongRoPE: llama.cpp takes the long factors for a context (`-c`) of more than "
            f"{a.longrope.original_max_position_embeddings} tokens, whatever the length of the text; Transformers goes "
            "by the text."
        )
    lines += [
        "## Evaluation",
        *evaluation,
        "## License",
        f"{named}." if text is None else f"{named}; see `{text.name}`.",
    ]
    write_text(directory / FILE_NAME, "\n\n".join(lines) + "\n")


def _tensors(plan: Plan, losses: Mapping[str, Loss]) -> str:
    lines = ["| tensors | type | number | bytes | against the trained model |", "|---|---|---|---|---|"]
    for (role, kind), choices in plan.by_kind().items():
        against = "exact"
        loss = losses.get(kind) if role == "embeddings" else None
        if loss is not None and loss.squares:
            against = f"lossy: {loss.relative:.2e} of their root mean square, {loss.largest:.2e} at most"
        lines.append(f"| {role} | {kind} | {len(choices)} | {sum(c.nbytes for c in choices):,} | {against} |")
    return "\n".join(lines)


def _license(directory: Path | None) -> tuple[str, Path | None]:
    """Returns the license that the source names, and its license file or None."""
    if directory is None:
        return _UNKNOWN, None
    text = next((path for path in sorted(directory.glob("LICEN[SC]E*")) if path.is_file()), None)
    card, named = directory / FILE_NAME, None
    if card.is_file() and (match := _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))):
        try:
            front = yaml.safe_load(match[1])
        except yaml.YAMLError:
            front = None
        named = front.get("license") if isinstance(front, dict) else None
    return named if isinstance(named, str) else _UNKNOWN if text is None else "other", text

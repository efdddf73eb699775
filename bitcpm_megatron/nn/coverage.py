# SPDX-License-Identifier: Apache-2.0
"""The coverage table of a whole model, printed once at start-up: what was quantized and what was not."""

import math
import re
from dataclasses import dataclass

from ..cli import ranges
from ..quantization import QuantizerConfig
from ..quantization.record import QuantizerRecord


@dataclass(frozen=True)
class CoverageEntry:
    """One module that holds weight matrices.

    Attributes:
        path: the module path with global layer numbers.
        kind: the kind of the module, as in :class:`~bitcpm_megatron.parallel.linears.Candidate`.
        shape: the shape of the whole weight, over all tensor-parallel shards.
        config: the quantizer of the local shard, or None for full precision.
        groups: the number of scales per row of the whole weight.
        reason: the matcher that decided, or why none could.
        frozen: whether the latent weight requires no gradient.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    config: QuantizerConfig | None
    groups: int
    reason: str
    frozen: bool = False

    @property
    def parameters(self) -> int:
        """The number of weights over all shards."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class CoverageReport:
    """All modules with weight matrices, over all pipeline stages.

    Attributes:
        entries: the modules in model order.
        row_parallel_shards: the number of groups per whole row of row-parallel weights under ``group_size=-1``.
    """

    entries: tuple[CoverageEntry, ...]
    row_parallel_shards: int

    @property
    def quantized(self) -> tuple[CoverageEntry, ...]:
        """The entries that are quantized."""
        return tuple(e for e in self.entries if e.config is not None)

    def modules(self, default: QuantizerConfig) -> dict[str, dict[str, object]]:
        """Returns the modules of the quantizer record.

        Args:
            default: the quantizer of the record.

        Returns:
            For each path, the effective group size along the whole row, and the fields that differ from the default.
        """
        found: dict[str, dict[str, object]] = {}
        for e in self.quantized:
            assert e.config is not None
            group = e.shape[1] // e.groups if e.groups > 1 else -1
            found[e.path] = QuantizerRecord.of_module(e.config, default, group)
        return found

    def record(self, default: QuantizerConfig, latent_dtype: str, activation_bits: int = 16) -> QuantizerRecord:
        """Returns the quantizer record of a model that the recipe was applied to."""
        return QuantizerRecord(
            state="latent",
            space=default.space,
            eps=default.eps,
            latent_dtype=latent_dtype,
            row_parallel_shards=self.row_parallel_shards,
            activation_bits=activation_bits,
            modules=self.modules(default),
            statistic=default.statistic,
            scale_multiplier=default.scale_multiplier,
        )

    def uneven_layers(self) -> set[str]:
        """Returns the paths of modules that other layers, or other experts, quantize differently or not at all."""
        alike: dict[str, list[CoverageEntry]] = {}
        for entry in self.entries:
            alike.setdefault(_any_layer(entry.path), []).append(entry)
        return {e.path for layers in alike.values() if len({e.groups for e in layers}) > 1 for e in layers}

    def table(self) -> str:
        """Returns the coverage table, with one line for all layers that are alike."""
        rows: dict[tuple[str, ...], list[CoverageEntry]] = {}
        for entry in self.entries:
            rows.setdefault(_row(entry), []).append(entry)
        header = ("module", "kind", "weight", "quantizer", "why")
        lines = [header, *((_span(key[0], entries), *key[1:]) for key, entries in rows.items())]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        total = sum(e.parameters for e in self.entries)
        ternary = sum(e.parameters for e in self.quantized)
        share = 100 * ternary / total if total else 0.0
        text.append(
            f"ternary: {len(self.quantized)} of {len(self.entries)} modules, {ternary:,} of {total:,} weights "
            f"({share:.1f} %), row-parallel shards {self.row_parallel_shards}"
        )
        return "\n".join(text)


def _row(entry: CoverageEntry) -> tuple[str, ...]:
    if entry.config is None:
        quantizer = "full precision"
    else:
        per_row = f"g={entry.shape[1] // entry.groups}" if entry.groups > 1 else "g=-1"
        scale = "" if entry.config.of_absmean else f"s = {entry.config.scale}"
        frozen = "(frozen)" if entry.frozen else ""
        quantizer = " ".join(filter(None, (entry.config.space, per_row, scale, frozen)))
    return _any_layer(entry.path), entry.kind, "x".join(map(str, entry.shape)), quantizer, entry.reason


def _any_layer(path: str) -> str:
    return re.sub(r"\.(layers|local_experts)\.\d+\.", r".\1.*.", path)


def _span(alike: str, entries: list[CoverageEntry]) -> str:
    if ".layers.*." not in alike:
        return alike
    numbers = (int(n) for e in entries for n in re.findall(r"\.layers\.(\d+)\.", e.path)[:1])
    return alike.replace(".layers.*.", f".layers.{ranges(numbers)}.")

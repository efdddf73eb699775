# SPDX-License-Identifier: Apache-2.0
"""Prints all model presets with their parameter counts: ``python launch/presets.py``."""

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    # In a bare checkout the package is not installed, and its parent directory must be on the path.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bitcpm_megatron import cli
from bitcpm_megatron.launch.launcher.presets import architecture, names


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the presets; returns the exit status."""
    cli.Parser(description=__doc__).parse_args(argv)
    return cli.run(_list)


def _list() -> None:
    for name in names():
        a = architecture(name)
        print(
            f"{name:16} {a.parameter_count():>14,} parameters  {a.num_layers} layers, hidden {a.hidden_size}, "
            f"heads {a.num_attention_heads}:{a.num_query_groups} x {a.kv_channels}, ffn {a.ffn_hidden_size}, "
            f"{'tied' if a.tied else 'untied'}{', LongRoPE' if a.longrope else ''}"
            f"{'' if a.is_llama else ', multipliers'}"
        )


if __name__ == "__main__":
    sys.exit(main())

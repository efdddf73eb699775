# SPDX-License-Identifier: Apache-2.0
"""bitcpm_megatron: ternary (1.58-bit) pretraining as a Megatron-LM / MindSpeed plugin.

All names below except :func:`apply_recipe` need only torch; :func:`apply_recipe` also needs megatron-core and is
imported on first use.
"""

import importlib.util
from pathlib import Path

from . import cli

# In a bare checkout (PYTHONPATH=checkout) patches/, launch/ and checkpoint_tools/ are beside this package; an installed
# copy contains them. In both cases they are imported as bitcpm_megatron.patches and so on.
_checkout = Path(__file__).resolve().parent.parent
if all((_checkout / room / "__init__.py").is_file() for room in ("patches", "launch", "checkpoint_tools")):
    __path__.append(str(_checkout))

# This precedes every import that takes long; cli.run() ends it.
cli.begin_imports()

from .quantization import QuantizerConfig  # noqa: E402

# A login node, where jobs are only checked and printed, may have no torch.
if importlib.util.find_spec("torch") is not None:
    from .ops import fake_quantize
    from .quantization import dequantize, quantize

__version__ = "0.1.0"
__all__ = ["QuantizerConfig", "__version__", "apply_recipe", "dequantize", "fake_quantize", "quantize"]


def __getattr__(name: str) -> object:
    if name == "apply_recipe":
        from .parallel import apply_recipe

        return apply_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

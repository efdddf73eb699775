# SPDX-License-Identifier: Apache-2.0
"""Patches of upstream packages: one module per upstream, each patch idempotent, logged, and explained where it stands.

A patched object carries the attribute ``__bitcpm_original__``. Importing a module here changes nothing: its functions
do.
"""

import ctypes
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("bitcpm_megatron.patches")

ORIGINAL = "__bitcpm_original__"


class HostError(ValueError):
    """What was asked for cannot be done on this host."""


# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
# Loaded here and not where it is used, between fork and exec, where another thread may have held the loader's lock.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(parent: int) -> None:
    """Lets the kernel kill this process when its parent dies, also by SIGKILL. Only Linux can do this.

    Args:
        parent: its process id; where that one has died already, this process ends here.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def replace(owner: Any, attribute: str, make: Callable[[Any], Any]) -> bool:
    """Puts ``make(original)`` in the place of ``owner.attribute``, once.

    Args:
        owner: module or class that holds the symbol.
        attribute: its name there.
        make: builds the replacement from the original. A fresh function each time: torch's compiler keeps a table of
            ``torch.*`` functions by identity, and one function under two names breaks it.

    Returns:
        Whether anything was changed (False when the patch was already in place).
    """
    original = getattr(owner, attribute)
    if hasattr(original, ORIGINAL):
        return False
    replacement = make(original)
    setattr(replacement, ORIGINAL, original)
    setattr(owner, attribute, replacement)
    logger.info("patched %s.%s", getattr(owner, "__name__", owner), attribute)
    return True


def replace_everywhere(symbol: str, make: Callable[[Any], Any]) -> bool:
    """Like :func:`replace`, also where Megatron's other modules and the main script imported the symbol by name.

    Args:
        symbol: dotted path of a module's function.
        make: builds the replacement from the original.

    Returns:
        Whether anything was changed.

    Raises:
        AttributeError: the module has no such symbol, so that the host is another version than the patch knows.
    """
    path, _, attribute = symbol.rpartition(".")
    owner = importlib.import_module(path)
    original = getattr(owner, attribute)
    if not replace(owner, attribute, make):
        return False
    for name, module in list(sys.modules.items()):
        known = name == "__main__" or name.partition(".")[0] in ("megatron", "gpt_builders", "model_provider")
        if known and getattr(module, "__dict__", {}).get(attribute) is original:
            setattr(module, attribute, getattr(owner, attribute))
    return True

# SPDX-License-Identifier: Apache-2.0
"""Patches of upstream packages: one module per upstream, each patch idempotent, logged, and explained where it stands.

A patched object carries the attribute ``__bitcpm_original__``. Importing a module here changes nothing: its functions
do.
"""

import ctypes
import functools
import inspect
import logging
import os
import pkgutil
import signal
import sys
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("bitcpm_megatron.patches")

ORIGINAL = "__bitcpm_original__"

Replacement = Callable[..., Any]
"""What stands in the place of an upstream function: called as that one is, with the original in front."""

REQUESTS_TO_STOP = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler sends to the processes of a job that shall save and end."""


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


def around(replacement: Replacement) -> Callable[[Callable], Callable]:
    """Makes a replacement known before its original is.

    Returns:
        From an original, what takes its place: a fresh function each time, for torch's compiler keeps a table of
        ``torch.*`` functions by identity, and one function under two names breaks it. Its own name ends as MindSpeed's
        patcher wants it.
    """

    def around_wrapper(original: Callable) -> Callable:
        @functools.wraps(original)
        def replaced(*args, **kwargs):  # noqa: ANN202
            return replacement(original, *args, **kwargs)

        setattr(replaced, ORIGINAL, original)
        return replaced

    return around_wrapper


def replace(symbol: str, replacement: Replacement, everywhere: bool = False, missing_ok: bool = False) -> None:
    """Puts a replacement in the place of an upstream symbol, once.

    Args:
        symbol: dotted path of a module's function or class, or of a class's method of any kind.
        replacement: a class takes the place of a class as it is, without the original in front.
        everywhere: also where Megatron's other modules and the main script imported the symbol by name.
        missing_ok: some of the supported versions lack it; there nothing is done.

    Raises:
        AttributeError: there is no such symbol, so that the host is another version than the patch knows.
    """
    path, _, attribute = symbol.rpartition(".")
    try:
        owner = pkgutil.resolve_name(path)
        held = inspect.getattr_static(owner, attribute)
    except (AttributeError, ModuleNotFoundError):
        if missing_ok:
            return
        raise
    bound = isinstance(held, classmethod | staticmethod)
    original = held.__func__ if bound else held
    if hasattr(original, ORIGINAL):
        return
    if isinstance(replacement, type):
        put: Any = type(replacement.__name__, (replacement,), {ORIGINAL: original})
    else:
        put = around(replacement)(original)
    setattr(owner, attribute, type(held)(put) if bound else put)
    logger.info("patched %s", symbol)
    for name, module in list(sys.modules.items()) if everywhere else ():
        known = name == "__main__" or name.partition(".")[0] in ("megatron", "gpt_builders", "model_provider")
        if known and getattr(module, "__dict__", {}).get(attribute) is original:
            setattr(module, attribute, put)

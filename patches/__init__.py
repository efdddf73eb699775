# SPDX-License-Identifier: Apache-2.0
"""Patches of upstream packages, one module per upstream; each patch is idempotent, logged, and explained at its place.

A patched object has the attribute ``__bitcpm_original__``. Importing a module of this package changes nothing; calling
its functions does.
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
"""A function that replaces an upstream function: it is called with the original first, then the call's arguments."""

REQUESTS_TO_STOP = (signal.SIGTERM, signal.SIGUSR1)
"""The signals with which a scheduler asks the processes of a job to save and end."""


class HostError(ValueError):
    """A request that this host cannot fulfill."""


# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
# Loaded here because it is used between fork and exec, where the loader's lock may be held by a thread that is gone.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent(parent: int) -> None:
    """Lets the kernel kill this process when its parent dies, even by SIGKILL; does nothing on systems except Linux.

    Args:
        parent: the process id of the parent; if the parent has already died, this process ends at once.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def around(replacement: Replacement) -> Callable[[Callable], Callable]:
    """Turns a replacement into a decorator, for an original that is given later.

    Returns:
        A decorator that makes, from an original, the function to put in its place. Each call makes a new function,
        because torch's compiler keeps a table of ``torch.*`` functions by identity, and one function under two names
        breaks it. The decorator's own name ends as MindSpeed's patcher requires.
    """

    def around_wrapper(original: Callable) -> Callable:
        @functools.wraps(original)
        def replaced(*args, **kwargs):
            return replacement(original, *args, **kwargs)

        setattr(replaced, ORIGINAL, original)
        return replaced

    return around_wrapper


def replace(symbol: str, replacement: Replacement, everywhere: bool = False, missing_ok: bool = False) -> None:
    """Replaces an upstream symbol; does nothing if it has been replaced before.

    Args:
        symbol: the dotted path of a module's function or class, or of a class's method of any kind.
        replacement: the replacement. A class replaces a class as it is; a function is called with the original first.
        everywhere: whether to replace it also in Megatron's other modules and in the main script, if they imported the
            symbol by name.
        missing_ok: whether to do nothing if the symbol does not exist, as in some of the supported versions.

    Raises:
        AttributeError, ModuleNotFoundError: if there is no such symbol, so that the host's version is not one that the
            patch knows.
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

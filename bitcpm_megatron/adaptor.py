# SPDX-License-Identifier: Apache-2.0
"""The one import that lets an unmodified Megatron-LM job train ternary.

Put ``import bitcpm_megatron.adaptor`` first in ``pretrain_gpt.py``, before every ``megatron`` import, and before or
instead of ``import mindspeed.megatron_adaptor`` (or run ``launch/pretrain_gpt.py``, which changes no file). From then
on the job knows the ``--ternary`` flags; without ``--ternary`` it computes what it always did.

The host is MindSpeed-LLM where ``mindspeed_llm`` can be imported, else MindSpeed where ``mindspeed`` can, else plain
Megatron-LM; the environment variable ``BITCPM_HOST`` (``megatron-lm``, ``mindspeed``, ``mindspeed-llm``) says
otherwise. Importing this twice does nothing more.

What the plugin refuses ends the job with one line and an exit code, in any script as in our own commands: 2 for what
cannot be done, 3 where a proof finds a layer that is not ternary. As exceptions they can be caught.
"""

import contextlib
import logging
import os
import sys
from types import TracebackType

from . import cli, host
from .patches import HostError, megatron_lm, mindspeed, upstream_warnings
from .patches.megatron_core import checkpointing

HOSTS = ("megatron-lm", "mindspeed", "mindspeed-llm")
_VARIABLE = "BITCPM_HOST"

logger = logging.getLogger(__name__)


def report_refusals() -> None:
    """Makes one line and an exit code of ours out of a refusal that ends the process.

    Displaces ``sys.excepthook``, for the script is the host's: there is no handler of ours around it. All other errors
    keep their traceback.
    """
    before = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, HostError | cli.MismatchError):
            return before(kind, error, trace)

        def again() -> None:
            raise error

        # torch.distributed's hook collects what the one before it prints, and loses it where that one ends the process.
        with contextlib.redirect_stderr(sys.__stderr__):
            status = cli.run(again)
        # Python takes this exit for the process's own.
        sys.exit(status)

    sys.excepthook = excepthook


def choose_host() -> str:
    """The host to adapt: one of :data:`HOSTS`.

    Raises:
        HostError: ``BITCPM_HOST`` names an unknown one, or one that cannot be imported.
    """
    named = os.environ.get(_VARIABLE, "auto")
    if named == "auto":
        return next((name for name in ("mindspeed-llm", "mindspeed") if mindspeed.available(name)), "megatron-lm")
    if named not in HOSTS:
        raise HostError(f"{_VARIABLE}={named} is unknown: use one of {', '.join(HOSTS)}, or leave it unset")
    if named != "megatron-lm" and not mindspeed.available(named):
        raise HostError(f"{_VARIABLE}={named}, and {named.replace('-', '_')} cannot be imported: check PYTHONPATH")
    return named


def install() -> str:
    """Takes hold of the host; returns its name. Called by the import.

    Raises:
        HostError: the import comes too late, or the host is not there or not one that is known; with the cure.
    """
    cure = "put `import bitcpm_megatron.adaptor` first, before every megatron and mindspeed import"
    if early := mindspeed.imported_too_early():
        raise HostError(f"{early} was imported before this, and has applied its features without ours: {cure}")
    if early := megatron_lm.imported_too_early():
        raise HostError(f"{early}, with the names that must change: {cure}")
    name = choose_host()
    upstream_warnings.silence()
    if name == "megatron-lm":
        megatron_lm.install(host)
    else:
        mindspeed.join(host)
        mindspeed.start(name)
    checkpointing.write_checkpoints_with_newer_torch()
    logger.info("host: %s", name)
    return name


report_refusals()
HOST = install()

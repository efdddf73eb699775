# SPDX-License-Identifier: Apache-2.0
"""The one import that makes an unmodified Megatron-LM job train ternary weights.

Put ``import bitcpm_megatron.adaptor`` first in ``pretrain_gpt.py``, before every ``megatron`` import, and before or
instead of ``import mindspeed.megatron_adaptor`` (or run ``launch/pretrain_gpt.py``, which changes no file). The job
then accepts the ``--ternary`` flags; without ``--ternary`` its computation does not change.

The host is MindSpeed-LLM if ``mindspeed_llm`` can be imported, else MindSpeed if ``mindspeed`` can be imported, else
plain Megatron-LM; the environment variable ``BITCPM_HOST`` (``megatron-lm``, ``mindspeed``, ``mindspeed-llm``)
overrides this choice. A second import has no effect.

If the plugin refuses something, the job ends with one line and an exit code, in any script as in our own commands: 2
for a request that cannot be carried out, 3 if the start-up proof finds a layer that is not ternary. A script can catch
the refusals as exceptions.
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
    """Makes a refusal that ends the process print one line and set one of our exit codes.

    Displaces ``sys.excepthook``, because the script is the host's and contains no handler of ours. All other errors
    keep their traceback.
    """
    before = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, HostError | cli.MismatchError):
            return before(kind, error, trace)

        def again() -> None:
            raise error

        # torch.distributed's hook captures what the previous hook prints, and loses it if that hook ends the process.
        with contextlib.redirect_stderr(sys.__stderr__):
            status = cli.run(again)
        # Python makes the status of this SystemExit the exit status of the process.
        sys.exit(status)

    sys.excepthook = excepthook


def choose_host() -> str:
    """Returns the host to adapt: one of :data:`HOSTS`.

    Raises:
        HostError: if ``BITCPM_HOST`` names an unknown host, or one that cannot be imported.
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
    """Patches the host and returns its name; importing this module calls it.

    Raises:
        HostError: if the import comes too late, or if the host is unknown or absent; the message names the cure.
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

# SPDX-License-Identifier: Apache-2.0
"""Patches of Megatron-LM's training loop: the only module that knows ``megatron.training``.

:class:`Wrappers` names every symbol that is wrapped. Each wrapper takes the original and gives back its replacement, so
that one table serves our own patcher (:func:`install`) and MindSpeed's, which stacks functions whose names end in
``_wrapper`` and puts them on again when it patches again. What the wrappers do is the business of a :class:`Plugin`.
Known to fit core_v0.12.1 and core_v0.16.1; a version that lacks a symbol raises.
"""

import argparse
import contextlib
import functools
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ..cli import refuse_arguments
from . import HostError, cpu, logger, replace, replace_everywhere
from .megatron_core import optimizer, schedules, without_te


class Plugin(Protocol):
    """What joins a training job of Megatron-LM, and when it is asked; see :mod:`bitcpm_megatron.host`, which is one."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds flags to the job's parser, after all others."""

    def check_arguments(self, args: argparse.Namespace) -> None:
        """Refuses contradictions, when the job has validated its own."""

    def softmax_scale(self, args: argparse.Namespace, kv_channels: int) -> float | None:
        """What attention multiplies its scores by; None for the job's own choice."""

    def prepare(
        self, args: argparse.Namespace, chunks: Sequence[torch.nn.Module], checkpoint: Path | None
    ) -> list[str]:
        """Changes the bare model chunks; returns lines for the log."""

    def check_prepared(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Raises where finished chunks did not go through :meth:`prepare`."""

    def loading(self) -> contextlib.AbstractContextManager[None]:
        """Around the loading of a checkpoint."""

    def check_loaded(self, checkpoint: Path, args: argparse.Namespace, saved: argparse.Namespace | None) -> str | None:
        """Refuses a checkpoint of another model, before its weights are used; returns a line for the log."""

    def write_record(self, checkpoint: Path) -> None:
        """Adds to a checkpoint's directory."""


class Wrappers:
    """Every wrapper of a symbol, for one plugin. ``by_symbol`` says which symbol each one is for.

    Args:
        plugin: that joins the job.
    """

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
        self._saving = self._loading = False
        self.by_symbol: dict[str, Callable[[Callable], Callable]] = {
            "megatron.training.arguments.parse_args": self.parse_args_wrapper,
            "megatron.training.arguments.validate_args": self.validate_args_wrapper,
            "megatron.training.arguments.core_transformer_config_from_args": self.transformer_config_wrapper,
            "megatron.training.training.correct_amax_history_if_needed": self.built_model_wrapper,
            "megatron.training.training.get_model": self.get_model_wrapper,
            "megatron.training.training.setup_model_and_optimizer": self.setup_model_and_optimizer_wrapper,
            "megatron.core.pipeline_parallel.schedules.get_forward_backward_func": self.forward_backward_func_wrapper,
            "megatron.training.checkpointing.save_checkpoint": self.save_checkpoint_wrapper,
            "megatron.core.dist_checkpointing.save": self.dist_save_wrapper,
            "megatron.training.checkpointing.load_checkpoint": self.load_checkpoint_wrapper,
            "megatron.training.checkpointing._load_base_checkpoint": self.load_base_checkpoint_wrapper,
        }

    def parse_args_wrapper(self, original: Callable) -> Callable:
        """Displaces ``megatron.training.arguments.parse_args``: the parser gets our flags, after the script's own.

        Without it ``--ternary`` is an unknown argument.
        """

        @functools.wraps(original)
        def parse_args(extra_args_provider: Callable | None = None, *args: Any, **kwargs: Any) -> argparse.Namespace:
            def provide(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
                if extra_args_provider is not None:
                    parser = extra_args_provider(parser)
                self.register_arguments(parser)
                return parser

            return original(provide, *args, **kwargs)

        return parse_args

    def register_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the plugin's flags to Megatron-LM's parser.

        Its mistakes are told in one line, by one rank: hundreds of lines of usage text, from each, would hide them.
        """
        self._plugin.add_arguments(parser)
        parser.error = refuse_arguments  # type: ignore[method-assign]

    def validate_args_wrapper(self, original: Callable) -> Callable:
        """Displaces ``megatron.training.arguments.validate_args``: contradictions with our flags are refused there.

        Later would be too late: processes and groups would be started first.
        """

        @functools.wraps(original)
        def validate_args(args: argparse.Namespace, *more: Any, **kwargs: Any) -> argparse.Namespace:
            validated = original(args, *more, **kwargs)
            self._plugin.check_arguments(args if validated is None else validated)
            return validated

        return validate_args

    def transformer_config_wrapper(self, original: Callable) -> Callable:
        """Displaces ``megatron.training.arguments.core_transformer_config_from_args``: sets ``softmax_scale``.

        From core_v0.18 on it is defined in ``argument_utils``, and replaced there as well.

        The attention multiplier and LongRoPE's attention factor are this field, which attention reads when it is built
        and for which Megatron-LM has no flag.
        """

        @functools.wraps(original)
        def core_transformer_config_from_args(args: argparse.Namespace, *more: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            config = original(args, *more, **kwargs)
            scale = self._plugin.softmax_scale(args, config.kv_channels)
            if scale is not None:
                config.softmax_scale = scale
            return config

        return core_transformer_config_from_args

    def built_model_wrapper(self, original: Callable) -> Callable:
        """Displaces ``megatron.training.training.correct_amax_history_if_needed``: here the model becomes ternary.

        ``get_model``, and the builders of core_v0.18 and later, call it (for fp8, which is refused) with all chunks at
        the one right moment: they have their device and the dtype of training, and are not wrapped in DDP yet. The
        original runs first, unchanged.
        """

        @functools.wraps(original)
        def correct_amax_history_if_needed(model: Sequence[torch.nn.Module]) -> Any:  # noqa: ANN401
            from megatron.core.transformer.module import Float16Module
            from megatron.training import get_args, print_rank_0

            result = original(model)
            args = get_args()
            bare = [chunk.module if isinstance(chunk, Float16Module) else chunk for chunk in model]
            for note in self._plugin.prepare(args, bare, _checkpoint_to_load(args)):
                print_rank_0(note)
            return result

        return correct_amax_history_if_needed

    def get_model_wrapper(self, original: Callable) -> Callable:
        """Displaces ``megatron.training.training.get_model``: a model that was not prepared raises.

        A host that builds models in a way of its own would otherwise train in full precision, with a good loss.
        """

        @functools.wraps(original)
        def get_model(*args: Any, **kwargs: Any) -> list[torch.nn.Module]:
            model = original(*args, **kwargs)
            self._plugin.check_prepared(model)
            return model

        return get_model

    def setup_model_and_optimizer_wrapper(self, original: Callable) -> Callable:
        """Displaces ``megatron.training.training.setup_model_and_optimizer``: checks as :meth:`get_model_wrapper` does.

        From core_v0.18 on the model is built by ``build_distributed_models`` of a builder class that the script names,
        and no more by ``get_model``. Whatever builds it, training gets it from here.
        """

        @functools.wraps(original)
        def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> tuple:
            model, *others = original(*args, **kwargs)
            self._plugin.check_prepared(model)
            return model, *others

        return setup_model_and_optimizer

    def forward_backward_func_wrapper(self, original: Callable) -> Callable:
        """Displaces ``megatron.core.pipeline_parallel.schedules.get_forward_backward_func``: any schedule is announced.

        ``schedules.announce_schedules`` wraps megatron-core's three; MindSpeed hands out others from here (ripipe,
        distributed training). Unannounced ones would quantize in every forward.
        """

        @functools.wraps(original)
        def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable:
            return schedules.announced(original(*args, **kwargs))

        return get_forward_backward_func

    def save_checkpoint_wrapper(self, original: Callable) -> Callable:
        """Displaces ``megatron.training.checkpointing.save_checkpoint``: the quantizer record goes with the checkpoint.

        In the legacy format it is written here, before the tensors; for torch_dist in :meth:`dist_save_wrapper`. Also
        fills in ``args.vocab_size`` where the tokenizer alone knew it: the padded rows of the vocabulary cannot be told
        from its own without it.
        """

        @functools.wraps(original)
        def save_checkpoint(iteration: int, *more: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            from megatron.training import checkpointing, get_args

            args = get_args()
            if args.vocab_size is None:
                args.vocab_size = _vocabulary()
            legacy = args.ckpt_format == "torch" and not kwargs.get("non_persistent_ckpt", False)
            if legacy and torch.distributed.get_rank() == 0:
                release = kwargs.get("release", False)
                self._plugin.write_record(
                    Path(checkpointing.get_checkpoint_name(args.save, iteration, release, return_base_dir=True))
                )
            self._saving = True
            try:
                return original(iteration, *more, **kwargs)
            finally:
                self._saving = False

        return save_checkpoint

    def dist_save_wrapper(self, original: Callable) -> Callable:
        """Displaces ``megatron.core.dist_checkpointing.save`` while Megatron-LM saves: writes the quantizer record.

        At its end, for at its start it wants an empty directory; the tracker is written after it, so that a checkpoint
        that is complete has its record.
        """

        @functools.wraps(original)
        def save(sharded_state_dict: dict, checkpoint_dir: str, *more: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            request = original(sharded_state_dict, checkpoint_dir, *more, **kwargs)
            if self._saving and torch.distributed.get_rank() == 0:
                self._plugin.write_record(Path(checkpoint_dir))
            return request

        return save

    def load_checkpoint_wrapper(self, original: Callable) -> Callable:
        """Displaces ``megatron.training.checkpointing.load_checkpoint``: what it asks for has no scales.

        They are derived from the weights, and a checkpoint need not hold any.
        """

        @functools.wraps(original)
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            self._loading = True
            try:
                with self._plugin.loading():
                    return original(*args, **kwargs)
            finally:
                self._loading = False

        return load_checkpoint

    def load_base_checkpoint_wrapper(self, original: Callable) -> Callable:
        """Displaces ``megatron.training.checkpointing._load_base_checkpoint``: a contradicting record is refused.

        It finds the checkpoint for ``load_checkpoint``, and is asked for the metadata before anything else. Other
        callers (``--use-checkpoint-args``) come before there is a model.
        """

        @functools.wraps(original)
        def _load_base_checkpoint(*args: Any, **kwargs: Any) -> tuple:
            from megatron.training import get_args, print_rank_0

            found = original(*args, **kwargs)
            if self._loading and found[0] is not None:
                note = self._plugin.check_loaded(_directory(found[1]), get_args(), found[0].get("args"))
                if note is not None and not kwargs.get("rank0", False):
                    print_rank_0(note)
            return found

        return _load_base_checkpoint


def install(plugin: Plugin) -> None:
    """Puts on every wrapper with our own patcher, for Megatron-LM without MindSpeed.

    Args:
        plugin: that joins the job.

    Raises:
        HostError: there is no Megatron-LM, or it lacks a symbol.
    """
    try:
        # All that import the symbols by name are there before they change.
        import megatron.training.training  # noqa: F401
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise
        raise HostError(
            f"Megatron-LM cannot be imported ({error}; megatron-core alone has no training script): put a checkout on "
            "PYTHONPATH"
        ) from error
    for symbol, wrapper in Wrappers(plugin).by_symbol.items():
        try:
            replace_everywhere(symbol, wrapper)
        except AttributeError as error:
            raise HostError(f"this Megatron-LM has no {symbol}: use a version that docs/hosts.md names") from error


def imported_too_early() -> str | None:
    """Why it is too late to patch Megatron-LM, or None."""
    if "megatron.training.arguments" not in sys.modules:
        return None
    from megatron.training import global_vars

    if getattr(global_vars, "_GLOBAL_ARGS", None) is not None:
        return "Megatron-LM has parsed its arguments already"
    return "megatron.training was imported already"


def run_on_cpu() -> None:
    """What Megatron-LM's start-up asks of a CUDA machine beyond torch: kernels, and compiled dataset helpers.

    Displaces ``megatron.legacy.fused_kernels.load`` (gone from core_v0.18 on, and not called from core_v0.17 on), which
    builds CUDA kernels where it finds a CUDA home and fails where there is none, and
    ``megatron.core.datasets.utils.compile_helpers``, whose Makefile names the extension after the python3-config on the
    path, in a virtual environment usually another Python's. Gives megatron-core what it lacks without Apex and
    Transformer Engine.
    """
    from megatron.core.datasets import utils

    with contextlib.suppress(ModuleNotFoundError):
        from megatron.legacy import fused_kernels

        replace(fused_kernels, "load", lambda _: lambda args: None)
    replace(utils, "compile_helpers", lambda _: lambda: _compile_helpers(Path(utils.__file__).parent))
    without_te.allow_sequence_parallel_torch_norm()
    optimizer.provide_fused_adam()
    optimizer.allow_distributed_optimizer_without_te()
    without_te.allow_moe_router_without_te()
    cpu.keep_sent_tensors()


def _compile_helpers(directory: Path) -> None:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["make", "-C", str(directory), f"LIBEXT={suffix}"],
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(
            f"the dataset helpers of {directory} cannot be compiled (needed: make, a C++ compiler, pybind11):\n"
            f"{done.stdout[-2000:]}"
        )


def _checkpoint_to_load(args: argparse.Namespace) -> Path | None:
    """The checkpoint that ``load_checkpoint`` is going to find, if any."""
    from megatron.training import checkpointing

    for directory in (args.load, getattr(args, "pretrained_checkpoint", None)):
        if checkpointing.checkpoint_exists(directory):
            iteration, release = checkpointing.read_metadata(checkpointing.get_checkpoint_tracker_filename(directory))
            iteration = getattr(args, "ckpt_step", None) or iteration
            return Path(checkpointing.get_checkpoint_name(directory, iteration, release, return_base_dir=True))
    return None


def _directory(checkpoint_name: str) -> Path:
    """The iteration directory, of a distributed checkpoint's name or of a legacy rank's file."""
    path = Path(checkpoint_name)
    return path.parent.parent if path.suffix == ".pt" else path


def _vocabulary() -> int | None:
    from megatron.training import global_vars

    tokenizer = getattr(global_vars, "_GLOBAL_TOKENIZER", None)
    size = getattr(tokenizer, "vocab_size", None)
    if size is None:
        logger.warning("the tokenizer does not say the size of its vocabulary: converters will need --vocab-size")
    return size

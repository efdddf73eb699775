# SPDX-License-Identifier: Apache-2.0
"""Patches of Megatron-LM's training loop; the only module that knows ``megatron.training``.

:class:`Replacements` lists every symbol that is displaced, in one table that serves our own patcher (:func:`install`)
and MindSpeed's. The replacements call a :class:`Plugin`, which decides what they do. Known to fit core_v0.12.1,
core_v0.16.1 and core_v0.19.0; a version that lacks a symbol raises.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from ..cli import refuse_arguments
from . import HostError, Replacement, cpu, logger, replace
from .megatron_core import schedules, without_te


class Plugin(Protocol):
    """Interface of a plugin that joins a training job; :mod:`bitcpm_megatron.host` implements it."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds flags to the job's parser; called after all other flags were added."""

    def check_arguments(self, args: argparse.Namespace) -> None:
        """Refuses contradictions among the arguments; called after the job has validated its own."""

    def softmax_scale(self, args: argparse.Namespace, kv_channels: int) -> float | None:
        """Returns the factor that attention multiplies its scores by; None for the job's own choice."""

    def prepare(
        self,
        args: argparse.Namespace,
        chunks: Sequence[torch.nn.Module],
        checkpoint: Path | None,
        vocab_size: int | None,
    ) -> list[str]:
        """Changes the bare model chunks; returns lines for the log."""

    def check_prepared(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Raises if finished chunks did not go through :meth:`prepare`."""

    def trains_with(self, args: argparse.Namespace, chunks: Sequence[torch.nn.Module], optimizer: Any) -> str | None:
        """Receives the optimizer of the finished chunks, after a checkpoint was loaded; returns a line for the log."""

    def saving(self, chunks: Sequence[torch.nn.Module]) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which a checkpoint is saved."""

    def loading(self) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which a checkpoint is loaded."""

    def check_loaded(self, checkpoint: Path, args: argparse.Namespace, saved: argparse.Namespace | None) -> str | None:
        """Refuses a checkpoint of another model, before its weights are used; returns a line for the log."""

    def write_record(self, checkpoint: Path) -> None:
        """Writes the plugin's record into the directory of a checkpoint."""

    def register_linear(self, linear: type, kind: Literal["column", "row"], norm_methods: tuple[str, ...]) -> None:
        """Registers a class of linears that megatron-core does not have; called only with MindSpeed."""

    def is_quantized(self, tensor: torch.Tensor) -> bool:
        """Returns whether a tensor is a quantized weight as a linear's forward sees it; called only with MindSpeed."""


PARSE_ARGS = "megatron.training.arguments.parse_args"


class Replacements:
    """The replacements of Megatron-LM's functions for a plugin that joins the job, in the table ``by_symbol``."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
        self._saving = self._loading = False
        self.by_symbol: dict[str, Replacement] = {
            PARSE_ARGS: self._parse_args,
            "megatron.training.arguments.validate_args": self._validate_args,
            "megatron.training.arguments.core_transformer_config_from_args": self._transformer_config,
            "megatron.training.training.correct_amax_history_if_needed": self._built_model,
            "megatron.training.training.get_model": self._finished_model,
            "megatron.training.training.setup_model_and_optimizer": self._finished_training,
            "megatron.core.pipeline_parallel.schedules.get_forward_backward_func": self._forward_backward_func,
            "megatron.training.checkpointing.save_checkpoint": self._save_checkpoint,
            "megatron.core.dist_checkpointing.save": self._dist_save,
            "megatron.training.checkpointing.load_checkpoint": self._load_checkpoint,
            "megatron.training.checkpointing._load_base_checkpoint": self._load_base_checkpoint,
        }

    def _parse_args(self, original: Callable, extra_args_provider: Callable | None = None, *args, **kwargs) -> Any:
        """Displaces ``megatron.training.arguments.parse_args``: the parser gets our flags, after the script's own.

        Without this, ``--ternary`` is an unknown argument.
        """

        def provide(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            if extra_args_provider is not None:
                parser = extra_args_provider(parser)
            self.register_arguments(parser)
            return parser

        return original(provide, *args, **kwargs)

    def register_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the plugin's flags to Megatron-LM's parser.

        One rank reports a mistake in the command line, in one line, instead of hundreds of lines of usage text from
        each rank, which would hide it.
        """
        self._plugin.add_arguments(parser)
        parser.error = refuse_arguments  # type: ignore[method-assign]

    def _validate_args(self, original: Callable, args: argparse.Namespace, *more, **kwargs) -> Any:
        """Displaces ``megatron.training.arguments.validate_args``: contradictions with our flags are refused there.

        Any later, processes and groups would be started before the refusal.
        """
        validated = original(args, *more, **kwargs)
        self._plugin.check_arguments(args if validated is None else validated)
        return validated

    def _transformer_config(self, original: Callable, args: argparse.Namespace, *more, **kwargs) -> Any:
        """Displaces ``megatron.training.arguments.core_transformer_config_from_args``: sets ``softmax_scale``.

        From core_v0.18 on the function is defined in ``argument_utils``, and replaced there as well. The attention
        multiplier and LongRoPE's attention factor are contained in this field, which attention reads when it is built
        and for which Megatron-LM has no flag.
        """
        config = original(args, *more, **kwargs)
        scale = self._plugin.softmax_scale(args, config.kv_channels)
        if scale is not None:
            config.softmax_scale = scale
        return config

    def _built_model(self, original: Callable, model: Sequence[torch.nn.Module]) -> Any:
        """Displaces ``megatron.training.training.correct_amax_history_if_needed``: here the model becomes ternary.

        ``get_model``, and the builders of core_v0.18 and later, call it (for fp8, which is refused) with all chunks at
        the right moment: the chunks are on their device and in the dtype of training, and are not yet wrapped in DDP.
        The original runs first, unchanged.
        """
        from megatron.core.transformer.module import Float16Module
        from megatron.training import get_args, print_rank_0

        result = original(model)
        args = get_args()
        bare = [chunk.module if isinstance(chunk, Float16Module) else chunk for chunk in model]
        for note in self._plugin.prepare(args, bare, _checkpoint_to_load(args), _vocabulary(args)):
            print_rank_0(note)
        return result

    def _finished_model(self, original: Callable, *args, **kwargs) -> Any:
        """Displaces ``megatron.training.training.get_model``: the model that it built is checked.

        Otherwise a host that builds models in its own way would train in full precision, and its good loss would not
        show the mistake.
        """
        chunks = original(*args, **kwargs)
        self._plugin.check_prepared(chunks)
        return chunks

    def _finished_training(self, original: Callable, *args, **kwargs) -> Any:
        """Displaces ``megatron.training.training.setup_model_and_optimizer``: model and optimizer go to the plugin.

        From core_v0.18 on ``build_distributed_models`` of a builder class that the script names builds the model,
        instead of ``get_model``. Whatever builds it, training gets it from here, so that the chunks are checked here.
        """
        from megatron.training import get_args, print_rank_0

        built = original(*args, **kwargs)
        chunks, optimizer = built[:2]
        self._plugin.check_prepared(chunks)
        note = None if optimizer is None else self._plugin.trains_with(get_args(), chunks, optimizer)
        if note is not None:
            print_rank_0(note)
        return built

    def _forward_backward_func(self, original: Callable, *args, **kwargs) -> Any:
        """Displaces ``megatron.core.pipeline_parallel.schedules.get_forward_backward_func``: announces any schedule.

        ``schedules.announce_schedules`` wraps megatron-core's three; MindSpeed returns others from this function
        (ripipe, distributed training). Schedules that are not announced would quantize in every forward pass.
        """
        return schedules.announced(original(*args, **kwargs))

    def _save_checkpoint(
        self, original: Callable, iteration: int, model: Sequence[torch.nn.Module], *more, **kwargs
    ) -> Any:
        """Displaces ``megatron.training.checkpointing.save_checkpoint``: adds the quantizer record to the checkpoint.

        In the legacy format it is written here, before the tensors; for torch_dist in :meth:`_dist_save`. Also fills in
        ``args.vocab_size`` if only the tokenizer knew it: without it the padded rows of the vocabulary cannot be
        distinguished from its own.
        """
        from megatron.training import checkpointing, get_args

        args = get_args()
        args.vocab_size = _vocabulary(args)
        if args.vocab_size is None:
            logger.warning("the tokenizer does not say the size of its vocabulary: converters will need --vocab-size")
        legacy = args.ckpt_format == "torch" and not kwargs.get("non_persistent_ckpt", False)
        if legacy and torch.distributed.get_rank() == 0:
            release = kwargs.get("release", False)
            self._plugin.write_record(
                Path(checkpointing.get_checkpoint_name(args.save, iteration, release, return_base_dir=True))
            )
        self._saving = True
        try:
            with self._plugin.saving(model):
                return original(iteration, model, *more, **kwargs)
        finally:
            self._saving = False

    def _dist_save(self, original: Callable, sharded_state_dict: dict, checkpoint_dir: str, *more, **kwargs) -> Any:
        """Displaces ``megatron.core.dist_checkpointing.save`` while Megatron-LM saves: writes the quantizer record.

        The record is written after the original, which requires an empty directory at its start. The tracker is written
        after both, so that a complete checkpoint has its record.
        """
        request = original(sharded_state_dict, checkpoint_dir, *more, **kwargs)
        if self._saving and torch.distributed.get_rank() == 0:
            self._plugin.write_record(Path(checkpoint_dir))
        return request

    def _load_checkpoint(self, original: Callable, *args, **kwargs) -> Any:
        """Displaces ``megatron.training.checkpointing.load_checkpoint``: the state that it requests has no scales.

        Scales are derived from the weights, and a checkpoint need not hold any.
        """
        self._loading = True
        try:
            with self._plugin.loading():
                return original(*args, **kwargs)
        finally:
            self._loading = False

    def _load_base_checkpoint(self, original: Callable, *args, **kwargs) -> Any:
        """Displaces ``megatron.training.checkpointing._load_base_checkpoint``: a contradicting record is refused.

        This function finds the checkpoint for ``load_checkpoint``, which calls it for the metadata before anything
        else. Other callers (``--use-checkpoint-args``) call it before there is a model, and are not affected.
        """
        from megatron.training import get_args, print_rank_0

        found = original(*args, **kwargs)
        if self._loading and found[0] is not None:
            # The path is the iteration directory, or a rank's file of the legacy format two levels below it.
            path = Path(found[1])
            directory = path.parent.parent if path.suffix == ".pt" else path
            note = self._plugin.check_loaded(directory, get_args(), found[0].get("args"))
            if note is not None and not kwargs.get("rank0", False):
                print_rank_0(note)
        return found


def install(plugin: Plugin) -> None:
    """Applies every replacement with our own patcher, for Megatron-LM without MindSpeed.

    Raises:
        HostError: if there is no Megatron-LM, or it lacks a symbol.
    """
    try:
        # All modules that import the symbols by name are loaded before the symbols are replaced.
        import megatron.training.training  # noqa: F401
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise
        raise HostError(
            f"Megatron-LM cannot be imported ({error}; megatron-core alone has no training script): put a checkout on "
            "PYTHONPATH"
        ) from error
    for symbol, replacement in Replacements(plugin).by_symbol.items():
        try:
            replace(symbol, replacement, everywhere=True)
        except AttributeError as error:
            raise HostError(f"this Megatron-LM has no {symbol}: use a version that docs/hosts.md names") from error


def imported_too_early() -> str | None:
    """Returns why it is too late to patch Megatron-LM, or None."""
    if "megatron.training.arguments" not in sys.modules:
        return None
    from megatron.training import global_vars

    if getattr(global_vars, "_GLOBAL_ARGS", None) is not None:
        return "Megatron-LM has parsed its arguments already"
    return "megatron.training was imported already"


def run_on_cpu() -> None:
    """Lets Megatron-LM start on a machine without CUDA: without fused kernels, and with compiled dataset helpers.

    Displaces ``megatron.legacy.fused_kernels.load`` (gone from core_v0.18 on, and not called from core_v0.17 on), which
    builds CUDA kernels if it finds a CUDA home and fails if there is none. Also displaces
    ``megatron.core.datasets.utils.compile_helpers``, whose Makefile names the extension after the python3-config on the
    path, which in a virtual environment usually belongs to another Python.
    """
    replace("megatron.legacy.fused_kernels.load", lambda _, args: None, missing_ok=True)
    replace("megatron.core.datasets.utils.compile_helpers", _compile_helpers)
    without_te.install()
    cpu.install_in_megatron_core()


def _compile_helpers(original: Callable) -> None:
    from megatron.core.datasets import utils

    directory = Path(utils.__file__).parent
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        ["make", "-C", str(directory), f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}"],
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


def _vocabulary(args: argparse.Namespace) -> int | None:
    """Returns the vocabulary size without padding from the arguments or else the tokenizer; None if neither has it."""
    from megatron.training import global_vars

    if args.vocab_size is not None:
        return args.vocab_size
    return getattr(getattr(global_vars, "_GLOBAL_TOKENIZER", None), "vocab_size", None)


def _checkpoint_to_load(args: argparse.Namespace) -> Path | None:
    """Returns the checkpoint that ``load_checkpoint`` is going to find, or None."""
    from megatron.training import checkpointing

    for directory in (args.load, getattr(args, "pretrained_checkpoint", None)):
        if checkpointing.checkpoint_exists(directory):
            iteration, release = checkpointing.read_metadata(checkpointing.get_checkpoint_tracker_filename(directory))
            iteration = getattr(args, "ckpt_step", None) or iteration
            return Path(checkpointing.get_checkpoint_name(directory, iteration, release, return_base_dir=True))
    return None

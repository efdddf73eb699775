# SPDX-License-Identifier: Apache-2.0
"""Opening of models by their path for evaluation: training runs, Hugging Face directories and packed exports."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..checkpoints.directory import latest
from ..files import FileError, read_json
from .answers import key_of
from .perplexity import require_overlap
from .retention.scores import model_digest

# The names that model families use for the longest input in config.json, in the harness's order.
_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
Kind = Literal["megatron", "huggingface", "packed"]


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated.

    Attributes:
        name: the user's name for the model.
        path: the newest checkpoint of a run, or the directory of a model.
        kind: the kind of model that the path holds.
        digest: the digest of its weights, configuration and tokenizer.
    """

    name: str
    path: Path
    kind: Kind
    digest: str

    @property
    def context(self) -> int | None:
        """The model's longest input in tokens, according to its configuration; None if that does not say it."""
        if self.kind == "megatron":
            # Imported late, after the filters of upstream's warnings are in place.
            from ..inference.megatron_run import context_of
            from ..training.flags import arguments_of

            return context_of(arguments_of(self.path, 1))
        found = read_json(self.path / "config.json")
        lengths = [found.get(name) for name in _LENGTHS] if isinstance(found, dict) else []
        return next((length for length in lengths if isinstance(length, int)), None)


def require_contexts(subject: Subject, context: int | None, overlap: int | None) -> None:
    """Checks that a model's context is long enough, and that windows of this length can overlap as requested.

    Args:
        subject: the model.
        context: the requested context; None for the model's own.
        overlap: the requested overlap of the windows of a text; None for half a window.

    Raises:
        FileError: if the model's context is shorter, or not longer than the overlap.
    """
    own = subject.context
    _require_context(subject, context, own)
    window = context or own
    if overlap is not None and window is not None:
        require_overlap(subject.name, window, overlap)


def _require_context(subject: Subject, context: int | None, own: int | None) -> None:
    if context is not None and own is not None and context > own:
        raise FileError(f"--context {context}: {subject.name} has one of {own} tokens")


def find_model(name: str, path: Path) -> Subject:
    """Finds out what kind of model a path holds, without loading it.

    Raises:
        FileError: if the path holds no model that can be evaluated; the message names the cure.
    """
    if not path.is_dir():
        raise FileError(f"--model {name}={path}: there is no such directory")
    checkpoint = latest(path)
    if checkpoint is not None:
        return Subject(name, checkpoint, "megatron", model_digest(path))
    config = path / "config.json"
    if not config.is_file():
        raise FileError(
            f"--model {name}={path}: neither the --save directory of a run, with a checkpoint, nor that of a Hugging "
            "Face model or compressed-tensors export (config.json); for a GGUF file name what it was packed from"
        )
    content = read_json(config)
    packed = isinstance(content, dict) and "quantization_config" in content
    return Subject(name, path, "packed" if packed else "huggingface", model_digest(path))


@dataclass(frozen=True)
class Opened:
    """A loaded model, ready to be evaluated.

    Attributes:
        model: the model for the harness, an instance of :class:`~.asking.Recorded`.
        dtype: the dtype that it computes in.
        tokenizer: the digest of a run's tokenizer; that of a directory is part of the directory's digest.
        is_run: whether it was opened over the process groups of a run's layout.
    """

    model: Any
    dtype: str
    tokenizer: str = "the directory's"
    is_run: bool = False

    def close(self) -> None:
        """Leaves the process groups of a run's layout, so that the next model may have another."""
        # Imported late, after the filters of upstream's warnings are in place.
        from megatron.core import parallel_state

        if self.is_run and parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()


def open_model(
    subject: Subject, batch_size: int, context: int | None, fp32: bool, stages: int, tokenizer: str | None = None
) -> Opened:
    """Loads a model; collective over the ranks of the job.

    Args:
        subject: the model from :func:`find_model`.
        batch_size: the number of sequences in a forward pass.
        context: the longest input, checked by :func:`require_contexts`; None for the model's own.
        fp32: whether to compute in fp32, whatever the dtype of the weights.
        stages: the number of pipeline stages of a run's model.
        tokenizer: the path of a tokenizer to use instead of a run's own.

    Raises:
        ValueError: if the model cannot be loaded here.
    """
    if subject.kind == "megatron":
        return _open_run(subject, batch_size, context, fp32, stages, tokenizer)
    from transformers import AutoTokenizer

    from ..inference.transformers_model import open_transformers_model
    from ..training.initialize import device
    from .huggingface_model import HuggingFaceModel

    loaded = open_transformers_model(subject.path, device(), fp32)
    try:
        own = AutoTokenizer.from_pretrained(subject.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # Missing and unexpected files raise errors of any type.
        raise FileError(f"{subject.path}: Transformers finds no tokenizer in it: {error}") from None
    # Checked once more, because some families have another name for the context in config.json.
    _require_context(subject, context, getattr(loaded.config, "max_position_embeddings", None))
    model = HuggingFaceModel(pretrained=loaded, tokenizer=own, batch_size=batch_size, max_length=context)
    return Opened(model, str(loaded.dtype).removeprefix("torch."))


def _open_run(
    subject: Subject, batch_size: int, context: int | None, fp32: bool, stages: int, given: str | None
) -> Opened:
    from ..inference.megatron_run import context_of, load_for_inference, tokenizer_of
    from .megatron_model import MegatronModel

    run, loaded = load_for_inference(subject.path, fp32, stages)
    # All rows take part in the softmax, as in an export, however many pieces the tokenizer has.
    rows = run.vocab_size
    tokenizer = tokenizer_of(run, subject.path, given)
    own = context_of(run)
    model = MegatronModel(loaded, tokenizer, context or own, rows, batch_size)
    identifiers = key_of("tokenizer", dict(tokenizer.unique_identifiers))
    return Opened(model, "bfloat16" if run.bf16 else "float32", identifiers, is_run=True)


def versions() -> dict[str, str]:
    """Returns the versions of the packages that an answer may depend on, by package."""
    names = ("lm-eval", "torch", "transformers", "datasets")
    return {name: importlib.metadata.version(name) for name in names}

# SPDX-License-Identifier: Apache-2.0
"""Models by their path: a training run, a Hugging Face directory, a packed export."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..checkpoints.directory import latest
from ..files import FileError, read_json
from .answers import key_of
from .perplexity import require_overlap
from .retention.scores import model_digest

# What families call the longest input in config.json, in the harness's order.
_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
Kind = Literal["megatron", "huggingface", "packed"]


@dataclass(frozen=True)
class Subject:
    """A model that is going to be asked.

    Attributes:
        name: as the user calls it.
        path: a run's newest checkpoint, or the directory.
        kind: what the path holds.
        digest: of its weights, configuration and tokenizer.
    """

    name: str
    path: Path
    kind: Kind
    digest: str

    @property
    def context(self) -> int | None:
        """Its longest input in tokens, as its configuration says; None where that says nothing."""
        if self.kind == "megatron":
            # Imported after what silences its complaints about packages that nobody here uses.
            from ..inference.megatron_run import context_of
            from ..training.flags import arguments_of

            return context_of(arguments_of(self.path, 1))
        found = read_json(self.path / "config.json")
        lengths = [found.get(name) for name in _LENGTHS] if isinstance(found, dict) else []
        return next((length for length in lengths if isinstance(length, int)), None)


def require_contexts(subject: Subject, context: int | None, overlap: int | None) -> None:
    """Makes sure that a model has a context, and that windows of it can overlap so.

    Args:
        subject: the model.
        context: that is asked for; None for its own.
        overlap: of windows of a text; None for half of one.

    Raises:
        FileError: it has not, or they cannot.
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
    """Looks what a path holds; opens nothing yet.

    Raises:
        FileError: nothing that can be asked, with the cure.
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
    """A model that can be asked.

    Attributes:
        model: of the harness, :class:`~.asking.Recorded`.
        dtype: that it computes in.
        tokenizer: a digest of it; that of an exported model is within the digest of its directory.
        is_run: whether it was opened over the process groups of a run's layout.
    """

    model: Any
    dtype: str
    tokenizer: str = "the directory's"
    is_run: bool = False

    def close(self) -> None:
        """Leaves the process groups of a run's layout, so that the next model may have another."""
        # Imported after what silences its complaints about packages that nobody here uses.
        from megatron.core import parallel_state

        if self.is_run and parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()


def open_model(
    subject: Subject, batch_size: int, context: int | None, fp32: bool, stages: int, tokenizer: str | None = None
) -> Opened:
    """Loads a model; collective over the ranks of the job.

    Args:
        subject: of :func:`find_model`.
        batch_size: sequences of a forward.
        context: longest input, of :func:`require_contexts`; None for the model's own.
        fp32: compute in fp32, whatever the weights' dtype is.
        stages: of a run's pipeline.
        tokenizer: of a run, in the place of its own.

    Raises:
        ValueError: it cannot be loaded here.
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
    except Exception as error:  # of whatever type: of files that are missing or that it did not expect
        raise FileError(f"{subject.path}: Transformers finds no tokenizer in it: {error}") from None
    # Of a family that names it otherwise in config.json.
    _require_context(subject, context, getattr(loaded.config, "max_position_embeddings", None))
    model = HuggingFaceModel(pretrained=loaded, tokenizer=own, batch_size=batch_size, max_length=context)
    return Opened(model, str(loaded.dtype).removeprefix("torch."))


def _open_run(
    subject: Subject, batch_size: int, context: int | None, fp32: bool, stages: int, given: str | None
) -> Opened:
    from ..inference.megatron_run import context_of, load_for_inference, tokenizer_of
    from .megatron_model import MegatronModel

    run, loaded = load_for_inference(subject.path, fp32, stages)
    # Of an export, too, all rows have a share in the softmax, whatever the tokenizer has pieces.
    rows = run.vocab_size
    tokenizer = tokenizer_of(run, subject.path, given)
    own = context_of(run)
    model = MegatronModel(loaded, tokenizer, context or own, rows, batch_size)
    identifiers = key_of("tokenizer", dict(tokenizer.unique_identifiers))
    return Opened(model, "bfloat16" if run.bf16 else "float32", identifiers, is_run=True)


def versions() -> dict[str, str]:
    """Of the packages that an answer may depend on."""
    names = ("lm-eval", "torch", "transformers", "datasets")
    return {name: importlib.metadata.version(name) for name in names}

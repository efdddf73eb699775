# SPDX-License-Identifier: Apache-2.0
"""How likely a model finds a text: by document, over windows of its context."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from ..data.corpus import read_documents
from ..files import FileError
from .answers import key_of
from .asking import Scored
from .retention.scores import TextScores


def read_texts(path: Path) -> list[str]:
    """The documents of a file: see :mod:`~bitcpm_megatron.data.corpus`.

    Raises:
        ValueError: it cannot be read, or holds no text.
    """
    texts = [document["text"] for document in read_documents([path]) if document["text"].strip()]
    if not texts:
        raise FileError(f"{path}: there is no text in it")
    return texts


def windows(ids: Sequence[int], prefix: int, context: int, overlap: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cuts a document into what a model is shown and what of it is scored: every token is scored once.

    A token has all earlier ones of its document before it, as far as the context holds them, and at least ``overlap``
    of them in any window but the first. With an overlap of 0 these are the harness's disjoint windows.

    Args:
        ids: of the document.
        prefix: shown before it.
        context: longest input.
        overlap: below ``context``.
    """
    whole = [prefix, *ids]
    done = 1
    while done < len(whole):
        end = min(len(whole), done + (context if done == 1 else context - overlap))
        yield whole[max(0, end - 1 - context) : done], whole[done:end]
        done = end


def require_overlap(name: str, context: int, overlap: int) -> None:
    """Makes sure that every window of a text has a token that is new.

    Raises:
        FileError: it has not, naming the model and its context.
    """
    if overlap >= context:
        raise FileError(
            f"--text-overlap {overlap}: windows of {name} are as long as its context of {context} tokens, and have to "
            f"move on: give {context - 1} at most"
        )


def score_texts(model: Any, texts: Sequence[str], overlap: int) -> TextScores:
    """Asks a model of the harness, :class:`~.asking.Recorded`, for every token.

    Args:
        model: computes log-likelihoods of ids.
        texts: documents.
        overlap: see :func:`windows`.

    Raises:
        ValueError: no document has a token, or windows cannot overlap so.
    """
    context = model.max_length
    require_overlap(model.title, context, overlap)
    encoded = [model.tok_encode(text, add_special_tokens=False) for text in texts]
    requests: list[Scored] = []
    owners = []
    for number, ids in enumerate(encoded):
        for shown, scored in windows(ids, model.prefix_token_id, context, overlap):
            requests.append((None, shown, scored))
            owners.append(number)
    nats = [0.0] * len(texts)
    for owner, (value, _) in zip(owners, model._loglikelihood_tokens(requests), strict=True):
        nats[owner] -= value
    documents = [
        [total, len(ids), len(text.encode())] for total, ids, text in zip(nats, encoded, texts, strict=True) if ids
    ]
    if not documents:
        raise FileError("the tokenizer makes no token of the text")
    content = xxhash.xxh3_128_hexdigest("\0".join(texts).encode())
    tokens = key_of("text", model.prefix_token_id, encoded)
    return TextScores(data=content, tokens=tokens, window=context, overlap=overlap, documents=documents)

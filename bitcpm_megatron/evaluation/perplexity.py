# SPDX-License-Identifier: Apache-2.0
"""Perplexity: the log-likelihood of a text's documents, over overlapping windows of a model's context."""

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
    """Returns the documents of a file in a format of :mod:`~bitcpm_megatron.data.corpus`, without empty ones.

    Raises:
        ValueError: if the file cannot be read, or holds no text.
    """
    texts = [document["text"] for document in read_documents([path]) if document["text"].strip()]
    if not texts:
        raise FileError(f"{path}: there is no text in it")
    return texts


def windows(ids: Sequence[int], prefix: int, context: int, overlap: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cuts a document into windows; yields the context and the scored tokens of each. Every token is scored once.

    A scored token is preceded by all earlier tokens of its document that fit into the model's context; in all windows
    except the first these are at least ``overlap`` tokens. With an overlap of 0 these are the harness's disjoint
    windows.

    Args:
        ids: the ids of the document's tokens.
        prefix: the id of the token in front of the document.
        context: the model's longest input.
        overlap: the number of tokens that are context only, in every window except the first; below ``context``.
    """
    whole = [prefix, *ids]
    done = 1
    while done < len(whole):
        end = min(len(whole), done + (context if done == 1 else context - overlap))
        yield whole[max(0, end - 1 - context) : done], whole[done:end]
        done = end


def require_overlap(name: str, context: int, overlap: int) -> None:
    """Checks that windows overlap by less than their length, so that each has a token to score.

    Raises:
        FileError: if the overlap is too large; the message names the model and its context.
    """
    if overlap >= context:
        raise FileError(
            f"--text-overlap {overlap}: windows of {name} are as long as its context of {context} tokens, and have to "
            f"move on: give {context - 1} at most"
        )


def score_texts(model: Any, texts: Sequence[str], overlap: int) -> TextScores:
    """Scores every token of a text's documents, over windows of the model's context.

    Args:
        model: a model for the harness, an instance of :class:`~.asking.Recorded`.
        texts: the documents.
        overlap: the overlap of the windows, as :func:`windows` takes it.

    Raises:
        ValueError: if no document has a token, or the overlap is not below the context.
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
    documents = [[total, len(ids), len(text.encode())] for total, ids, text in zip(nats, encoded, texts, strict=True)]
    if not any(encoded):
        raise FileError("the tokenizer makes no token of the text")
    content = xxhash.xxh3_128_hexdigest("\0".join(texts).encode())
    tokens = key_of("text", model.prefix_token_id, encoded)
    return TextScores(data=content, tokens=tokens, window=context, overlap=overlap, documents=documents)

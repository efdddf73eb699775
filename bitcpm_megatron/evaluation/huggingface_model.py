# SPDX-License-Identifier: Apache-2.0
"""Hugging Face models for lm-evaluation-harness: the harness's own class, with batches that LongRoPE treats alike."""

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from ..inference.transformers_model import original_length
from .asking import Recorded, Scored


class _HuggingFace(HFLM):
    """The harness's Hugging Face model, with batches divided as :class:`HuggingFaceModel` describes."""

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        original = original_length(self.config)
        if original is None:
            return super()._loglikelihood_tokens(requests, **kwargs)
        found: dict[int, tuple[float, bool]] = {}
        for beyond in (True, False):
            numbers = [
                number
                for number, (_, context, continuation) in enumerate(requests)
                if (len(context) + len(continuation) - 1 > original) is beyond
            ]
            if numbers:
                said = super()._loglikelihood_tokens([requests[number] for number in numbers], **kwargs)
                found.update(zip(numbers, said, strict=True))
        return [found[number] for number in range(len(requests))]

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        if original_length(self.config) is None:
            return super().generate_until(requests, **kwargs)
        # A text that grows beyond the original length would change the factors of all others in its batch.
        return [
            answer for request in requests for answer in super(_HuggingFace, self).generate_until([request], **kwargs)
        ]


class HuggingFaceModel(Recorded, _HuggingFace):
    """The model of a Hugging Face directory, which stores its answers.

    With LongRoPE the longest input of a batch decides the factors for the whole batch. Therefore no batch has inputs on
    both sides of LongRoPE's original length, and answers are generated one by one.
    """

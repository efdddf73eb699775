# SPDX-License-Identifier: Apache-2.0
"""Models of training runs for lm-evaluation-harness, over tensor-parallel ranks and pipeline stages.

Every rank of the job asks the same questions in the same order, and gets the same answers.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from megatron.core import parallel_state

from ..data.tokenizers import Tokenizer
from ..data.tokenizers.hugging_face import HuggingFaceTokenizer
from ..inference.megatron_run import MegatronNextToken
from ..objectives.extracts import likeliest, log_likelihoods
from ..objectives.language_modeling import Batch, language_modeling
from ..training.initialize import device
from ..training.model import Model, answer_with_logits, hear
from .asking import Recorded, Scored

# Key of a batch: the positions whose labels' log-likelihood is wanted, bool [batch, tokens].
_ASKED = "asked"


class _Megatron(TemplateLM):
    """The model of a training run behind the harness's interface; :class:`MegatronModel` adds storage of answers."""

    def __init__(self, model: Model, tokenizer: Tokenizer, context: int, vocab_size: int, batch_size: int) -> None:
        super().__init__()
        answer_with_logits(model)
        self._model, self._tokenizer, self._vocab_size = model, tokenizer, vocab_size
        self.max_length, self.batch_size = context, batch_size
        self._tensor_parallel = parallel_state.get_tensor_model_parallel_group()
        self._stages = parallel_state.get_pipeline_model_parallel_group()
        rope = getattr(model.bare[0], "rotary_pos_emb", None)
        self._original_length = getattr(getattr(rope, "rope", rope), "original_length", None) or context
        # There is no cache over pipeline stages: every generated token costs a forward pass of the whole text.
        self._cache = MegatronNextToken(model, context) if self._stages.size() == 1 else None

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without context: ``bos_token`` if any, as in the harness's own models."""
        begin = getattr(self._tokenizer, "special_tokens", {}).get("bos_token")
        return self.eot_token_id if begin is None else self._tokenizer.tokenize(begin)[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokenizes a text as the harness's Hugging Face models do.

        The ids include those that the tokenizer puts in front of a text, such as ``bos_token``, unless the text begins
        with that token or ``add_special_tokens`` is False.
        """
        ids = self._tokenizer.tokenize(string)
        wanted = add_special_tokens is not False and ids[:1] != [self.prefix_token_id]
        if wanted and isinstance(self._tokenizer, HuggingFaceTokenizer):
            return self._tokenizer.tokenize_with_front(string)
        return ids

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        found = []
        for some in self._batches(requests):
            inputs = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in some]
            found += self._score(inputs, [len(continuation) for _, _, continuation in some])
        return found

    def _batches(self, requests: Sequence[Scored]) -> Iterator[list[Scored]]:
        """Yields batches in order, none with inputs on both sides of LongRoPE's original length.

        The longest input of a batch decides the factors of LongRoPE for the whole batch.
        """
        original = self._original_length
        batch: list[Scored] = []
        for one in requests:
            sides = {len(context) + len(continuation) - 1 > original for _, context, continuation in (*batch, one)}
            if len(batch) == self.batch_size or len(sides) > 1:
                yield batch
                batch = []
            batch.append(one)
        if batch:
            yield batch

    def _score(self, sequences: Sequence[Sequence[int]], counts: Sequence[int]) -> list[tuple[float, bool]]:
        """Returns for the last ``counts`` tokens of each sequence the log-likelihood, and whether all are likeliest."""
        rows, length = len(sequences), max(map(len, sequences)) - 1
        ids = torch.zeros(rows, length + 1, dtype=torch.int64)
        asked = torch.zeros(rows, length, dtype=torch.bool)
        for row, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            asked[row, len(sequence) - 1 - count : len(sequence) - 1] = True
        said = self._hear(ids, {_ASKED: asked}, self._log_likelihoods, torch.empty(2, int(asked.sum())))
        parts = said.double().split(list(counts), dim=1)
        return [(float(values.sum()), bool(best.all())) for values, best in parts]

    def _hear(self, ids: torch.Tensor, more: Batch, keep: Any, found: torch.Tensor) -> torch.Tensor:
        """Runs a forward pass on ids ``[batch, tokens + 1]``; returns on every rank what the last stage computes of it.

        ``keep`` makes a tensor from the logits ``[tokens, batch, V / TP]``, with V the padded vocabulary size and TP
        the number of tensor-parallel ranks. ``found`` has the shape and dtype of that tensor, which is returned on the
        CPU; ``more`` are additional entries of the batch.
        """
        inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        positions = torch.arange(inputs.shape[1]).expand_as(inputs).contiguous()
        batch = {"tokens": inputs, "labels": labels, "position_ids": positions}
        batch |= {"loss_mask": torch.ones(inputs.shape), **more}
        there = {name: value.to(device()) for name, value in batch.items()}
        if self._stages.size() == 1:
            # No schedule is used, because all weights would be quantized anew after it.
            with torch.no_grad():
                return keep(language_modeling(there, self._model.bare[0])[0], there).cpu()
        rows, length = inputs.shape
        kept = hear(self._model, partial(_forward, keep), iter([there]), 1, seq_length=length, micro_batch_size=rows)
        found = kept[0] if kept else found.to(device())
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(found, last, group=self._stages)
        return found.cpu()

    def _log_likelihoods(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        asked = batch[_ASKED]
        wanted = logits.transpose(0, 1)[asked]
        values, best = log_likelihoods(wanted, batch["labels"][asked], self._vocab_size, self._tensor_parallel)
        return torch.stack((values, best.float()))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("texts are asked window by window: see perplexity.py")

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        answers = []
        for request in requests:
            context, how = request.args
            end = self._tokenizer.detokenize([self.eot_token_id])
            until = [stop for stop in handle_stop_sequences(how.get("until"), eos=end) if stop]
            answers.append(self._generate(self.tok_encode(context), how["max_gen_toks"], until))
        return answers

    def _generate(self, prompt: list[int], count: int, until: list[str]) -> str:
        """Generates at most ``count`` tokens greedily, until a text of ``until`` appears or the document ends."""
        tokens, text = list(prompt), ""
        for _ in range(count):
            token = self._next(tokens)
            if token == self.eot_token_id:
                break
            tokens.append(token)
            # Rows of the embedding for which the tokenizer has no piece have no text, as in Transformers.
            pieces = [one for one in tokens[len(prompt) :] if one < self._tokenizer.vocab_size]
            text = self._tokenizer.detokenize(pieces)
            if any(stop in text for stop in until):
                break
        return postprocess_generated_text(text, until, None)

    def _next(self, tokens: list[int]) -> int:
        if self._cache is not None:
            return int(self._cache.logits(tokens)[: self._vocab_size].argmax())
        # The last token has no label; the 0 takes its place and is not used.
        return int(self._hear(torch.tensor([[*tokens, 0]]), {}, self._likeliest, torch.empty(1, dtype=torch.int32)))

    def _likeliest(self, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        return likeliest(logits[-1], 1, self._vocab_size, 1.0, self._tensor_parallel)[0][0]


def _forward(keep: Any, batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    output, _ = language_modeling(batch, model)
    return output, lambda logits, non_loss_data: keep(logits, batch)


class MegatronModel(Recorded, _Megatron):
    """The model of a checkpoint, over the ranks of this job, which stores its answers.

    Args:
        model: the model from :func:`~bitcpm_megatron.inference.megatron_run.load_for_inference`; this makes its last
            stage return logits, for good.
        tokenizer: the tokenizer of the model.
        context: the model's longest input, in tokens.
        vocab_size: the number of embedding rows that take part in the softmax.
        batch_size: the number of sequences in a forward pass.
    """

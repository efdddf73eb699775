# SPDX-License-Identifier: Apache-2.0
"""Writes vLLM's log-probabilities of tokens: ``python vllm_logprobs.py MODEL TOKENS.json OUT.json``.

It runs in vLLM's own environment. For every token except the first, it writes the five likeliest ids and the token's
own id, with their log-probabilities.
"""

import json
import os
import sys
from pathlib import Path

os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")

from vllm import LLM, SamplingParams


def main() -> None:
    model, tokens, out = sys.argv[1:]
    served = LLM(
        model=model, dtype="bfloat16", enforce_eager=True, max_model_len=128, max_num_seqs=1, skip_tokenizer_init=True
    )
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=5, detokenize=False)
    (answer,) = served.generate([{"prompt_token_ids": json.loads(Path(tokens).read_text())}], asked)
    told = [{token: chance.logprob for token, chance in at.items()} for at in answer.prompt_logprobs[1:]]
    Path(out).write_text(json.dumps(told))


if __name__ == "__main__":
    main()

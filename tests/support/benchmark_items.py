# SPDX-License-Identifier: Apache-2.0
"""A few benchmark items, as files for ``launch/evaluate.py --data``, and a tiny model to evaluate on them."""

import json
from pathlib import Path
from typing import Any

from support import tiny_hf

NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn")


def _items() -> dict[str, list[dict[str, Any]]]:
    return {
        "gsm8k/test": [{"question": f"{name} has?", "answer": f"So\n#### {i}"} for i, name in enumerate(NAMES)],
        "hellaswag/validation": [
            {
                "activity_label": "Running",
                "ctx_a": f"{name} runs {i} miles.",
                "ctx_b": "then she",
                "endings": ["sleeps.", f"counts to {i}.", "runs.", "is a [title] door."],
                "label": str(i % 4),
            }
            for i, name in enumerate(NAMES)
        ],
        "boolq/validation": [
            {"passage": f"{name} is {i}.", "question": f"is {name} {2 * i}", "label": int(i == 0)}
            for i, name in enumerate(NAMES)
        ],
    }


TASKS = ("gsm8k", "hellaswag", "boolq")


def write_items(directory: Path) -> Path:
    """Writes the items of all :data:`TASKS`; returns the directory."""
    for name, items in _items().items():
        path = directory / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return directory


def write_model(directory: Path, seed: int) -> Path:
    """Writes an ordinary Llama with a context of 512 tokens and a byte tokenizer; returns the directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=259)
    config = LlamaConfig(
        **shape, max_position_embeddings=512, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tiny_hf.write_tokenizer(directory)
    return directory

# SPDX-License-Identifier: Apache-2.0
"""Training of a tokenizer with a chat template on the text of the chat demo."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bitcpm_megatron.data.sft.chat_template import FILE as TEMPLATE
from bitcpm_megatron.data.tokenizers.hugging_face import CONFIG, FILE
from bitcpm_megatron.files import write_text

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write_chat_tokenizer(directory: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Trains a byte-level BPE tokenizer and writes it as Transformers does, with a ChatML template.

    The end of a turn is the ``eos_token``.

    Args:
        directory: the directory to create.
        texts: the texts to train on.
        vocab_size: the vocabulary size, including special tokens and the 256 bytes.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[START, END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    directory.mkdir()
    made.save(str(directory / FILE))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD}
    write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")
    write_text(directory / TEMPLATE, CHATML)

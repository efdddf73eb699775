# SPDX-License-Identifier: Apache-2.0
"""Chat templates in the styles of real models, their expected output written by hand, and a tokenizer for them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

# The text of a conversation in pieces, each with whether it is an answer including its end of turn.
Pieces = Iterator[tuple[str, bool]]

SPECIAL = (
    *("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"),
    *("[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOLS]", "[/TOOLS]", "[RESULT]", "[/RESULT]", "<turn>", "<end>"),
)


def written(value: object) -> str:
    """Returns the JSON that ``tojson`` writes in a chat template."""
    return json.dumps(value, ensure_ascii=False)


CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] + '\\n\\n' }}
    {%- endif %}
    {{- 'Tools:\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson + '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def chatml(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    """Yields the pieces that the template ``CHATML`` writes."""
    rest = messages
    if tools:
        system = ""
        if messages[0]["role"] == "system":
            system, rest = messages[0]["content"] + "\n\n", messages[1:]
        listed = "".join(written(tool) + "\n" for tool in tools)
        yield f"<|im_start|>system\n{system}Tools:\n{listed}<|im_end|>\n", False
    for message in rest:
        answer = message["role"] == "assistant"
        calls = [f"<tool_call>{written(call['function'])}</tool_call>" for call in message.get("tool_calls", [])]
        yield f"<|im_start|>{message['role']}\n", False
        yield (message["content"] or "") + "".join(calls) + "<|im_end|>", answer
        yield "\n", False


LLAMA_3 = """{{ bos_token }}
{%- for message in messages -%}
    {{ '<|head|>' + message['role'] + '<|/head|>\\n\\n' }}
    {%- if message.tool_calls -%}
        {{ message.tool_calls[0].function | tojson }}
    {%- else -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<|eot|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|head|>assistant<|/head|>\\n\\n' }}
{%- endif -%}
"""


def llama_3(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    """Yields the pieces that the template ``LLAMA_3`` writes."""
    yield "<s>", False
    for message in messages:
        calls = message.get("tool_calls")
        yield f"<|head|>{message['role']}<|/head|>\n\n", False
        said = written(calls[0]["function"]) if calls else message["content"].strip()
        yield said + "<|eot|>", message["role"] == "assistant"


MISTRAL = """{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}
{%- set last = namespace(user=0) %}
{%- for message in messages if message.role == 'user' %}
    {%- set last.user = loop.index %}
{%- endfor %}
{%- set turn = namespace(number=0) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set turn.number = turn.number + 1 %}
        {%- if turn.number == last.user and tools %}
            {{- '[TOOLS]' + tools | tojson + '[/TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (system + '\\n\\n' if turn.number == last.user and system else '') + message.content }}
        {{- '[/INST]' }}
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '[TOOL_CALLS]' + message.tool_calls | tojson + eos_token }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content + ' ' + eos_token }}
    {%- elif message.role == 'tool' %}
        {{- '[RESULT]' + message.content + '[/RESULT]' }}
    {%- elif not loop.first %}
        {{- raise_exception('a ' + message.role + ' message must be the first') }}
    {%- endif %}
{%- endfor %}
"""


def mistral(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    """Yields the pieces of the template ``MISTRAL``, which puts the system message and the tools into the last turn of
    the user."""
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    last = max(n for n, message in enumerate(messages) if message["role"] == "user")
    yield "<s>", False
    for number, message in enumerate(messages):
        content, calls = message["content"], message.get("tool_calls")
        if message["role"] == "user":
            listed = f"[TOOLS]{written(tools)}[/TOOLS]" if tools and number == last else ""
            yield f"{listed}[INST] {system if number == last else ''}{content}[/INST]", False
        elif message["role"] == "tool":
            yield f"[RESULT]{content}[/RESULT]", False
        elif calls:
            yield f"[TOOL_CALLS]{written(calls)}</s>", True
        elif message["role"] == "assistant":
            yield " ", False
            yield f"{content} </s>", True


GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<turn>' + role + '\\n' + message['content'] | trim + '<end>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<turn>model\\n' }}
{%- endif %}
"""


def gemma(messages: list[dict], tools: list[dict] | None = None) -> Pieces:
    """Yields the pieces that the template ``GEMMA`` writes."""
    yield "<s>", False
    for message in messages:
        answer = message["role"] == "assistant"
        yield f"<turn>{'model' if answer else message['role']}\n", False
        yield message["content"].strip() + "<end>", answer
        yield "\n", False


STYLES: dict[str, tuple[str, Callable[..., Pieces]]] = {
    "chatml": (CHATML, chatml),
    "llama-3": (LLAMA_3, llama_3),
    "mistral": (MISTRAL, mistral),
    "gemma": (GEMMA, gemma),
}


def chat_tokenizer(directory: Path, template: str | None = None, vocab_size: int = 0) -> Path:
    """Writes a byte-level tokenizer with the tokens ``SPECIAL`` as Transformers saves it; returns the directory.

    Its padding token is its ``eos_token``. If ``vocab_size`` leaves only room for bytes it has no merges, so that the
    tokens of a text are those of its pieces.
    """
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["Hi there! What is the answer? There is none.\n\n"] * 9, trainer)
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    config = {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "pad_token": "</s>"}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory

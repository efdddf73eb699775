# SPDX-License-Identifier: Apache-2.0
"""Tests with the chat templates and vocabularies of published models: ``make test-templates`` downloads and runs."""

import contextlib
import itertools
import os
import re
from pathlib import Path

import pytest
from support.texts import strings

from bitcpm_megatron.data.sft.answers import AnswerFinder, answer_mask
from bitcpm_megatron.data.sft.chat_template import ChatTemplate
from bitcpm_megatron.data.tokenizers import open_tokenizer

MODELS = Path(os.environ.get("CHAT_TEMPLATES_PATH", "nowhere"))
pytestmark = pytest.mark.skipif(not MODELS.is_dir(), reason="downloads chat templates: make test-templates")

# NAMED are the tokens of its tokenizer that a template may write; the tokenizer itself is not available. TOKEN matches
# everything in a template that looks like a special token.
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
TOKEN = re.compile(r"<[^<>\s{}']{1,40}>|\[/?[A-Z_]+\]|\[e~\[")


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def answer(content: str, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


DESCRIBED = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": DESCRIBED}]
CALLED = [{"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": {"at": "sky"}}}]
TURNS = [user("Say it."), answer("  It, twice: It  "), user("It, twice: It"), answer("user\n")]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TURNS]
CALLING = [
    *(user("Look"), answer("", tool_calls=CALLED)),
    *({"role": "tool", "content": "blue", "name": "look", "tool_call_id": "abcdefghi"}, answer("Blue.")),
]
SERVED = {"turns": 60, "system": 58, "tools": 44}
KINDS = {"turns": (TURNS, None), "system": (SYSTEM, None), "tools": (CALLING, TOOLS)}

NO_END = "no end-of-turn token"
NO_TOOLS = "refuses this conversation: 'NoneType' object is not iterable"
DOUBT = "cannot be told from the rest"
REFUSED = {
    "turns": {
        **dict.fromkeys(["Apertus-8B-Instruct", "Apriel-1.6-15b-Thinker-fixed", "GLM-4.6", "GLM-4.7-Flash"], NO_END),
        **dict.fromkeys(["llama-cpp-rwkv-world", "tencent-Hy3"], NO_END),
        "CohereForAI-c4ai-command-r-plus-tool_use": NO_TOOLS,
        "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": NO_TOOLS,
        "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": NO_TOOLS,
        "fireworks-ai-llama-3-firefunction-v2": "'functions' is undefined",
    },
}
REFUSED["system"] = {
    **REFUSED["turns"],
    "google-gemma-2-2b-it": "System role not supported",
    "mistralai-Mistral-Nemo-Instruct-2407": "leaves out the content of message 1",
}
REFUSED["tools"] = {
    **dict.fromkeys(["Apertus-8B-Instruct", "Apriel-1.6-15b-Thinker-fixed", "GLM-4.6", "GLM-4.7-Flash"], NO_END),
    "tencent-Hy3": NO_END,
    **dict.fromkeys(["Cohere2MoE", "CohereForAI-c4ai-command-r-plus-tool_use"], DOUBT),
    **dict.fromkeys(["CohereForAI-c4ai-command-r7b-12-2024-tool_use", "MiniMax-M2"], DOUBT),
    **dict.fromkeys(["deepseek-ai-DeepSeek-V3.2", "google-gemma-4-31B-it"], DOUBT),
    **dict.fromkeys(["HuggingFaceTB-SmolLM3-3B", "deepseek-ai-DeepSeek-V3.1"], "leaves out the tools"),
    **dict.fromkeys([f"deepseek-ai-DeepSeek-R1-Distill-{size}" for size in ("Llama-8B", "Qwen-32B")], "out the tools"),
    **dict.fromkeys(["LFM2-8B-A1B", "LFM2.5-Instruct"], "leaves out tool_calls"),
    "ibm-granite-granite-3.3-2B-Instruct": "leaves out tool_calls",
    **dict.fromkeys(
        ["llama-cpp-rwkv-world", "microsoft-Phi-3.5-mini-instruct"], r"leaves out the content of message 3"
    ),
    **dict.fromkeys(["Kimi-K2-Instruct", "Kimi-K2-Thinking"], "'append' of 'list' object is unsafe"),
    "fireworks-ai-llama-3-firefunction-v2": "'functions' is undefined",
    "google-gemma-2-2b-it": "Conversation roles must alternate",
    "llama-cpp-deepseek-r1": "generator is not JSON serializable",
    "meetkai-functionary-medium-v3.2": "can only concatenate str",
}


def template(name: str) -> tuple[ChatTemplate, AnswerFinder]:
    source = (MODELS / "templates" / f"{name}.jinja").read_text()
    made = ChatTemplate(source, name, NAMED)
    found = {*TOKEN.findall(source), *NAMED.values()}
    with contextlib.suppress(ValueError):
        found |= set(TOKEN.findall(made.render(TURNS)))  # some tokens are composed only in the output
    return made, AnswerFinder(made, found)


def names() -> list[str]:
    return sorted(path.stem for path in (MODELS / "templates").glob("*.jinja"))


def test_all_templates_are_tried() -> None:
    served = {kind: len(set(names()) - set(refused)) for kind, refused in REFUSED.items()}
    assert len(names()) == 70 and served == SERVED


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", names())
@pytest.mark.verifies(
    "hosts",
    "in 70 published chat templates, the assistant's answers are located exactly, or the template is refused with a "
    "reason (`make test-templates`)",
    cuda="-",
    npu="-",
)
def test_answers_are_found_or_the_template_is_refused(name: str, kind: str) -> None:
    (messages, tools), (made, finder) = KINDS[kind], template(name)
    if refusal := REFUSED[kind].get(name):
        with pytest.raises(ValueError, match=re.escape(refusal)):
            finder.find(messages, tools)
        return
    text, spans = finder.find(messages, tools)
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    for content, (start, end) in zip(said, spans, strict=True):
        span = text[start:end].strip()
        if made.has_generation or not content:  # the template writes the words around the answer
            parts = [content.strip()] if content else ["look", "sky"]
            assert all(part in span for part in parts) and "blue" not in span
        else:
            assert span.startswith(content.strip())
            assert TOKEN.fullmatch(span[len(content.strip()) :].strip())


@pytest.mark.parametrize("name", names())
def test_a_template_writes_what_transformers_writes(name: str) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (MODELS / "templates" / f"{name}.jinja").read_text()
    ours, _ = template(name)
    for messages, tools in KINDS.values():
        for prompt in (False, True):
            options = {"tools": tools, "chat_template": source, "add_generation_prompt": prompt}
            try:
                [theirs], _ = utils.render_jinja_template([messages], **options, **NAMED)
            except Exception:  # a template may raise any exception
                with pytest.raises(ValueError, match="refuses this conversation"):
                    ours.render(messages, tools, prompt)
            else:
                assert ours.render(messages, tools, prompt) == theirs


# ------------------------------------------------------------------------------- four templates, marked by hand


# Answers are enclosed in \u00ab and \u00bb.
QWEN = """<|im_start|>user
Say it.<|im_end|>
<|im_start|>assistant
«  It, twice: It  <|im_end|>»
<|im_start|>user
It, twice: It<|im_end|>
<|im_start|>assistant
«user
<|im_end|>»
"""
QWEN_TOOLS = """<|im_start|>system
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "look", "description": "Looks.", \
"parameters": {"type": "object", "properties": {}}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
Look<|im_end|>
<|im_start|>assistant
«<tool_call>
{"name": "look", "arguments": {"at": "sky"}}
</tool_call><|im_end|>»
<|im_start|>user
<tool_response>
blue
</tool_response><|im_end|>
<|im_start|>assistant
«Blue.<|im_end|>»
""".replace("\\\n", "")
LLAMA = """<s><|start_header_id|>system<|end_header_id|>

Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

Say it.<|eot_id|><|start_header_id|>assistant<|end_header_id|>

«It, twice: It<|eot_id|>»<|start_header_id|>user<|end_header_id|>

It, twice: It<|eot_id|><|start_header_id|>assistant<|end_header_id|>

«user<|eot_id|>»"""
MISTRAL = "<s>[INST]Say it.[/INST]«  It, twice: It  </s>»[INST]It, twice: It[/INST]«user\n</s>»"
MISTRAL_TOOLS = (
    '<s>[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "look", "description": "Looks.", '
    '"parameters": {"type": "object", "properties": {}}}}][/AVAILABLE_TOOLS][INST]Look[/INST]'
    '«[TOOL_CALLS][{"name": "look", "arguments": {"at": "sky"}, "id": "abcdefghi"}]</s>»'
    '[TOOL_RESULTS]{"content": blue, "call_id": "abcdefghi"}[/TOOL_RESULTS]«Blue.</s>»'
)
GEMMA = """<s><start_of_turn>user
Say it.<end_of_turn>
<start_of_turn>model
«It, twice: It<end_of_turn>»
<start_of_turn>user
It, twice: It<end_of_turn>
<start_of_turn>model
«user<end_of_turn>»
"""
QWEN_NAME, LLAMA_NAME = "Qwen-Qwen2.5-7B-Instruct", "meta-llama-Llama-3.1-8B-Instruct"
MISTRAL_NAME, GEMMA_NAME = "mistralai-Mistral-Nemo-Instruct-2407", "google-gemma-2-2b-it"
BY_HAND = [
    (QWEN_NAME, "system", "<|im_start|>system\nBe brief.<|im_end|>\n" + QWEN),
    (QWEN_NAME, "tools", QWEN_TOOLS),
    (LLAMA_NAME, "system", LLAMA),
    (MISTRAL_NAME, "turns", MISTRAL),
    (MISTRAL_NAME, "tools", MISTRAL_TOOLS),
    (GEMMA_NAME, "turns", GEMMA),
]


def unmarked(text: str) -> tuple[str, list[tuple[int, int]]]:
    parts = re.split("[«»]", text)
    ends = list(itertools.accumulate(map(len, parts)))
    return "".join(parts), list(zip(ends[:-1:2], ends[1::2], strict=True))


@pytest.mark.parametrize(("name", "kind", "text"), BY_HAND)
def test_the_answers_of_four_templates_character_by_character(name: str, kind: str, text: str) -> None:
    _, finder = template(name)
    assert finder.find(*KINDS[kind]) == unmarked(text)


# ----------------------------------------------------------------------------------------------- vocabularies


@pytest.mark.parametrize(("vocabulary", "name"), [("qwen2", QWEN_NAME), ("llama-bpe", LLAMA_NAME), ("phi-3", None)])
def test_ids_of_a_real_vocabulary_are_those_of_transformers(tmp_path: Path, vocabulary: str, name: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(MODELS, gguf_file=f"ggml-vocab-{vocabulary}.gguf")
    theirs.save_pretrained(tmp_path)
    ours, texts = open_tokenizer(tmp_path), strings(10_000)
    found = ours.tokenize_batch(texts)
    assert found == theirs(texts, add_special_tokens=False)["input_ids"]
    assert len({token for ids in found for token in ids}) > 1000, "strings that use the vocabulary"
    if name is None:
        return
    source = (MODELS / "templates" / f"{name}.jinja").read_text()
    made = ChatTemplate(source, name, ours.special_tokens)
    text, spans = AnswerFinder(made, ours.added_tokens).find(SYSTEM)
    [(ids, offsets)] = ours.tokenize_with_offsets([text])
    assert ids == theirs.apply_chat_template(SYSTEM, chat_template=source, return_dict=False)
    learned = answer_mask(offsets, spans, len(text)).astype(bool)
    said = [token for token, answer in zip(ids, learned, strict=True) if answer]
    # In these vocabularies, no token extends across the end of a line or a special token.
    assert said == [token for start, end in spans for token in ours.tokenize(text[start:end])]

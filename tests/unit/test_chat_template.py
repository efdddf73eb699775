# SPDX-License-Identifier: Apache-2.0
"""Tests of chat templates: output equal to Transformers', and answers that are located exactly or refused."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat import SPECIAL, STYLES, chat_tokenizer

from bitcpm_megatron.data.sft.answers import AnswerFinder, answer_mask
from bitcpm_megatron.data.sft.chat_template import ChatTemplate, open_chat_template
from bitcpm_megatron.data.tokenizers import open_tokenizer
from bitcpm_megatron.data.tokenizers.hugging_face import HuggingFaceTokenizer

NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "look", "description": 'Looks "at" <it>, ä'}}]
TURNS = [
    {"role": "user", "content": "Say it. "},
    {"role": "assistant", "content": "  It, twice: It \n"},
    {"role": "user", "content": "It, twice: It"},
    {"role": "assistant", "content": "user\n"},
]
SYSTEM = [{"role": "system", "content": "Be brief.\n"}, *TURNS]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "ä"}}}
CALLING = [
    *({"role": "user", "content": "Look"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
    *({"role": "tool", "content": "blue"}, {"role": "assistant", "content": "Blue."}),
]
SERVED = [
    *((style, TURNS, None) for style in STYLES),
    *((style, SYSTEM, None) for style in ("chatml", "llama-3", "mistral")),
    *((style, CALLING, None) for style in ("chatml", "llama-3", "mistral")),
    *((style, talk, TOOLS) for style in ("chatml", "mistral") for talk in (SYSTEM, CALLING, [*TURNS, *CALLING])),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return open_tokenizer(chat_tokenizer(tmp_path_factory.mktemp("chat") / "hf"))


def finder(source: str) -> AnswerFinder:
    return AnswerFinder(ChatTemplate(source, "t.jinja", NAMED), [*SPECIAL, "\n\n", " "])


def expected(pieces) -> tuple[str, list[tuple[int, int]]]:
    """Returns the text of pieces, and the positions of the pieces that are answers."""
    pieces = list(pieces)
    ends = list(itertools.accumulate(len(piece) for piece, _ in pieces))
    spans = [(end - len(piece), end) for end, (piece, answer) in zip(ends, pieces, strict=True) if answer]
    return "".join(piece for piece, _ in pieces), spans


# ----------------------------------------------------------------------------------------------- rendering


FEATURES = """{# a comment #}
{%- set ns = namespace(n=0) %}
  {% for message in messages %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- set ns.n = ns.n + message.content | length %}
    {% generation %}
    {{ message | tojson(indent=1) }} {{ message.content.strip().upper()[:4] }} {{ missing }}
    {% endgeneration %}
  {% endfor %}
{{ ns.n }} {{ strftime_now('%Y') }} {{ tools | tojson }} {{ dict(a=[1, none]) | tojson }} {{ add_generation_prompt }}
{{- pad_token }} {{ documents is none }} {% for k, v in messages[0].items() %}{{ k }}{% endfor %}
"""


@pytest.mark.parametrize("source", [FEATURES, *(source for source, _ in STYLES.values())])
@pytest.mark.parametrize("messages", [TURNS, SYSTEM[1:], CALLING])
@pytest.mark.parametrize("prompt", [False, True])
def test_a_template_writes_what_transformers_writes(
    tmp_path: Path, source: str, messages: list[dict], prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers, then make test")
    directory = chat_tokenizer(tmp_path / "hf", source)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    ours = open_chat_template(open_tokenizer(directory))
    written = theirs.apply_chat_template(messages, tools=TOOLS, add_generation_prompt=prompt, tokenize=False)
    assert ours.render(messages, TOOLS, prompt) == written


def test_the_template_beside_the_tokenizer_comes_before_the_one_in_its_configuration(tmp_path: Path) -> None:
    directory = chat_tokenizer(tmp_path, "config {{ eos_token }}")
    tokenizer = open_tokenizer(directory)
    assert open_chat_template(tokenizer).render(TURNS) == "config </s>"
    (directory / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert open_chat_template(tokenizer).render(TURNS) == "file <s>"
    (tmp_path / "named").write_text("named")
    assert open_chat_template(tokenizer, tmp_path / "named").render(TURNS) == "named"
    with pytest.raises(ValueError, match="nowhere: there is no such file"):
        open_chat_template(tokenizer, tmp_path / "nowhere")


@pytest.mark.parametrize("listed", [["default", "tool_use"], ["tool_use"], None])
def test_of_several_templates_the_default_one_is_taken(tmp_path: Path, listed: list[str] | None) -> None:
    named = listed and [{"name": name, "template": f"{name}!"} for name in listed]
    tokenizer = open_tokenizer(chat_tokenizer(tmp_path, named))
    if listed and "default" in listed:
        assert open_chat_template(tokenizer).render(TURNS) == "default!"
    else:
        with pytest.raises(ValueError, match=r"no chat template, .* --chat-template FILE"):
            open_chat_template(tokenizer)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('no such role') }}", "t.jinja refuses this conversation: no such role"),
        ("{{ messages[0].content + 1 }}", r"t.jinja refuses this conversation: can only concatenate str"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% set n = namespace(a=1) %}{% set n.__class__ = 1 %}", "a namespace has no '__class__' for templates"),
        ("{{ namespace(__init__=1) }}", "a namespace has no '__init__' for templates"),
        ("{{ dict.mro() }}", "has no attribute 'mro'"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for n in range(10 ** 9) %}{% endfor %}", "Range too big"),
    ],
)
def test_what_a_template_cannot_or_must_not_do_is_an_error_in_its_words(source: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ChatTemplate(source, "t.jinja", NAMED).render(TURNS)


def test_what_is_no_template_is_refused_with_its_line() -> None:
    with pytest.raises(ValueError, match=r"t.jinja:2: not a chat template in Jinja: .*endif"):
        ChatTemplate("{% if 1 %}\n{% endfor %}", "t.jinja", NAMED)


# ----------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(("style", "messages", "tools"), SERVED)
def test_the_answers_and_their_ends_are_found_and_nothing_else(style: str, messages: list[dict], tools: list | None):
    source, pieces = STYLES[style]
    assert finder(source).find(messages, tools) == expected(pieces(messages, tools))


FRAGMENTS = st.sampled_from(
    [*SPECIAL, "answer0", "answer0n1n", " ", "\n", "assistant\n", "user", "{{ x }}", "{% generation %}", "\u00e4", "\0"]
)
CONTENT = st.lists(FRAGMENTS | st.text(max_size=3), min_size=1, max_size=5).map("".join).filter(str.strip)


@given(st.data(), st.sampled_from(list(STYLES)), st.integers(1, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_content_confuses_it(data: st.DataObject, style: str, turns: int, system: bool) -> None:
    roles = ["system"] * (system and style != "gemma") + ["user", "assistant"] * turns
    # There are few contents, so that some messages have the same.
    contents = data.draw(st.lists(CONTENT, min_size=1, max_size=3))
    messages = [{"role": role, "content": data.draw(st.sampled_from(contents))} for role in roles]
    source, pieces = STYLES[style]
    assert finder(source).find(messages) == expected(pieces(messages))


THINKING = """{% for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- set content = message.content %}
{%- if message.role == 'assistant' %}
    {%- set thoughts = message.reasoning_content or '' %}
    {%- if '</think>' in content %}
        {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.last %}
        {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
{{- content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- endif %}"""


THOUGHT = {"role": "assistant", "content": "It.", "reasoning_content": "hm"}


def test_reasoning_is_learned_where_the_template_writes_it() -> None:
    asked, again = TURNS[0], TURNS[2]
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt."}
    text, spans = finder(THINKING).find([asked, thought, again, thought])
    assert [text[start:end] for start, end in spans] == ["It.<|im_end|>", "<think>\nhm\n</think>\n\nIt.<|im_end|>"]
    assert finder(THINKING).find([asked, THOUGHT, again, THOUGHT]) == (text, spans)
    # Empty thoughts that the template adds do not belong to the answer.
    text, spans = finder(THINKING).find([asked, {"role": "assistant", "content": "It."}])
    assert text.endswith("<think>\n\n</think>\n\nIt.<|im_end|>\n") and text[slice(*spans[0])] == "It.<|im_end|>"
    # Thoughts of an earlier turn are dropped also if later turns have none.
    plain = {"role": "assistant", "content": "It."}
    without = finder(THINKING).find([asked, plain, again, plain])
    assert finder(THINKING).find([asked, THOUGHT, again, plain]) == without


@pytest.mark.parametrize(
    ("style", "messages"),
    [
        (STYLES["chatml"][0], [TURNS[0], THOUGHT]),
        (STYLES["chatml"][0], [TURNS[0], THOUGHT, *TURNS[2:]]),
        (THINKING, [TURNS[0], THOUGHT, {"role": "tool", "content": "blue"}, TURNS[1]]),
        (THINKING.replace("loop.last", "loop.first"), [THOUGHT, TURNS[0], THOUGHT]),
    ],
)
def test_reasoning_that_a_template_leaves_out_where_the_model_is_asked_for_it_is_refused(style: str, messages) -> None:
    with pytest.raises(ValueError, match="the chat template leaves out reasoning_content"):
        finder(style).find(messages)


def without_prompt(source: str) -> str:
    return source[: source.index("{% if add_generation_prompt %}")]


CANNOT = {
    "an end of white space": (
        "{% for m in messages %}<turn>{{ m.content }}\n\n{% endfor %}",
        TURNS,
        r"no end-of-turn token behind message 4 \(assistant\)",
    ),
    "blocks for calls of tools alone": (
        "{% for m in messages %}{{ m.content }}{% if m.tool_calls %}{% generation %}{{ m.tool_calls }}<end>"
        "{% endgeneration %}{% endif %}{% endfor %}",
        CALLING,
        "writes no plain answer in a generation block: give one with {% generation %} blocks around what",
    ),
    "an answer in two places": (
        "{{ messages[-1].content }}{% for m in messages %}<turn>{{ m.content }}<end>{% endfor %}",
        TURNS,
        r"writes message 4 \(assistant\) so that it cannot be told from the rest: give one with {% generation %}",
    ),
    "an answer that changes the text in front of it": (
        "{{ messages[1].content | length }}{% for m in messages %}<turn>{{ m.content }}<end>{% endfor %}",
        TURNS,
        r"writes message 2 \(assistant\) so that it cannot be told from the rest",
    ),
    "an answer that changes the text behind it": (
        "{% for m in messages %}<turn>{{ m.content }}<end>{% endfor %}{{ messages[1].content | length }}",
        TURNS,
        r"writes message 2 \(assistant\) so that it cannot be told from the rest",
    ),
    "reasoning, and nothing that asks for an answer": (
        without_prompt(THINKING),
        [TURNS[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt."}],
        r"writes message 2 \(assistant\) so that it cannot be told from the rest",
    ),
    "no end": (
        "{% for m in messages %}<turn>{{ m.content }}{% endfor %}",
        TURNS,
        r"no end-of-turn token behind message 4 \(assistant\), .* give one that writes eos_token there",
    ),
    "an end that is no token": (
        "{% for m in messages %}<turn>{{ m.content }}</turn>{% endfor %}",
        TURNS,
        r"no end-of-turn token behind message 2 \(assistant\)",
    ),
    "no system message": (
        "{% for m in messages if m.role != 'system' %}<turn>{{ m.content }}<end>{% endfor %}",
        SYSTEM,
        r"leaves out the content of message 1 \(system\)",
    ),
    "no tool calls": (
        "{% for m in messages %}<turn>{{ m.content }}<end>{% endfor %}",
        CALLING,
        "leaves out tool_calls: give one that writes it",
    ),
    "the last answer alone": (
        "<turn>{{ messages[-1].content }}<end>",
        TURNS,
        r"leaves out the content of message 1 \(user\)",
    ),
    "blocks for no answer": (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if 0 %}{% generation %}{% endgeneration %}{% endif %}",
        TURNS,
        "writes no answers one after another",
    ),
    "a block in a block": (
        "{% generation %}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{% endgeneration %}",
        TURNS,
        "t.jinja has a generation block in another",
    ),
    "a block that is changed": (
        "{% for m in messages %}{% set x %}{% generation %} {{ m.content }} {% endgeneration %}{% endset %}"
        "{{ x | trim }}{% endfor %}",
        TURNS,
        "t.jinja changes what its generation blocks wrote",
    ),
}


@pytest.mark.parametrize("what", CANNOT)
def test_a_template_that_leaves_doubt_is_refused_with_the_cure(what: str) -> None:
    source, messages, said = CANNOT[what]
    with pytest.raises(ValueError, match=said):
        finder(source).find(messages)


def test_tools_that_a_template_does_not_write_are_refused() -> None:
    with pytest.raises(ValueError, match="leaves out the tools"):
        finder(STYLES["gemma"][0]).find(TURNS, TOOLS)


BLOCKS = """{% if messages[0].role != 'user' %}{{ raise_exception('a user asks') }}{% endif %}
{{ messages[-1].content }}{% for m in messages %}{{ '<turn>' }}
{%- if m.role == 'assistant' %}{% generation %}{{ 'model: ' + m.content }}
    {%- if m.tool_calls %}{{ '[TOOL_CALLS]look[/TOOLS]' }}{% endif %}{{ inner }}{% endgeneration %}
{%- else %}{{ m.content }}{% endif %}{{ outer }}{% endfor %}"""
# The contents of the second turn, of the one with a call, and of one that writes its own end-of-turn token.
SAID, CALLED, ENDING = "  It, twice: It \n", "[TOOL_CALLS]look[/TOOLS]", "Write <end>"


def of_blocks(inner: str, outer: str) -> AnswerFinder:
    return AnswerFinder(
        ChatTemplate(BLOCKS.replace("{{ inner }}", inner).replace("{{ outer }}", outer), "t.jinja", NAMED),
        [*SPECIAL, "\n", " \n "],
    )


@pytest.mark.parametrize(
    ("inner", "outer", "end"),
    [
        ("", "<end>\n", "<end>"),
        ("", " <end>", " <end>"),
        ("<end>", "", "<end>"),
        ("<end>", "<|eot|>", "<end>"),
        ("<end>", "<end>", "<end>"),
        ("<end>\n", "<|eot|>", "<end>\n"),
    ],
)
def test_generation_blocks_say_what_is_learned_and_their_ends_are_added(inner: str, outer: str, end: str) -> None:
    messages = [
        *(TURNS[0], {"role": "assistant", "content": SAID}, TURNS[0], {"role": "assistant", "content": ENDING}),
        *(TURNS[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "blue"}),
    ]
    text, spans = of_blocks(inner, outer).find(messages)
    assert [text[slice(*span)] for span in spans] == [f"model: {said}{end}" for said in (SAID, ENDING, CALLED)]


@pytest.mark.parametrize(
    ("inner", "outer", "where"),
    [
        ("", "", "a plain answer"),
        ("", "\n", "a plain answer"),
        ("", ".<end>", "its generation block 1"),
        ("{{ '<end>' if not m.tool_calls }}", "", "its generation block 2"),
        ("", "{{ '<end>' if not m.tool_calls }}", "its generation block 2"),
    ],
)
def test_generation_blocks_without_an_end_of_turn_are_refused(inner: str, outer: str, where: str) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    with pytest.raises(ValueError, match=f"no end-of-turn token behind {where}, .* give one that writes eos_token"):
        of_blocks(inner, outer).find([*TURNS[:3], called, *TURNS[:1]])


# ----------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(("style", "messages", "tools"), SERVED)
def test_the_tokens_of_answers_are_learned(tokenizer, style: str, messages: list[dict], tools: list | None) -> None:
    source, pieces = STYLES[style]
    text, spans = finder(source).find(messages, tools)
    [(ids, offsets)] = tokenizer.tokenize_with_offsets([text])
    # The tokenizer has no merges, so that the tokens of a text are those of its pieces.
    of_pieces = [(tokenizer.tokenize(piece), answer) for piece, answer in pieces(messages, tools)]
    assert ids == [token for tokens, _ in of_pieces for token in tokens]
    mask = answer_mask(offsets, spans, len(text))
    assert mask.dtype == np.uint8
    assert mask.tolist() == [int(answer) for tokens, answer in of_pieces for _ in tokens]


def test_a_token_with_one_character_of_an_answer_is_learned(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(chat_tokenizer(tmp_path, vocab_size=400))
    for text, span in (("\n\nHi there!", (1, 4)), ("Hi \u00e4\u00e4.", (3, 4)), ("a <end> Hi", (2, 3)), ("Hi", (1, 1))):
        [(ids, offsets)] = tokenizer.tokenize_with_offsets([text])
        covered = [set(range(*offset)) & set(range(*span)) != set() for offset in offsets]
        assert answer_mask(offsets, [span], len(text)).tolist() == covered
        assert "".join(text[start:end] for start, end in sorted(set(offsets))) == text
        assert ids == tokenizer.tokenize(text)


def test_offsets_hold_the_spaces_that_a_post_processor_would_cut_off(tmp_path: Path) -> None:
    directory = chat_tokenizer(tmp_path)
    described = json.loads((directory / "tokenizer.json").read_text())
    described["post_processor"] = {
        **{"type": "ByteLevel", "add_prefix_space": True},
        **{"trim_offsets": True, "use_regex": True},
    }
    (directory / "tokenizer.json").write_text(json.dumps(described))
    [(_, offsets)] = open_tokenizer(directory).tokenize_with_offsets(["a \n"])
    assert offsets == [(0, 1), (1, 2), (2, 3)]

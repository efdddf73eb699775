# SPDX-License-Identifier: Apache-2.0
"""Chat templates: Jinja programs that write a conversation as one text, run in a sandbox as Transformers runs them."""

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ...files import read_text
from ..tokenizers import Tokenizer
from ..tokenizers.hugging_face import CONFIG, HuggingFaceTokenizer

Message = Mapping[str, Any]
FILE = "chat_template.jinja"
# Unicode noncharacters, which no text contains and no template looks for.
_BEGIN, _END = "\ufdd0", "\ufdd1"
_MARK = re.compile(f"([{_BEGIN}{_END}])")


class ChatTemplate:
    """A chat template, which renders conversations.

    A template cannot open or download anything, and it reaches no object of the interpreter. The present time, which
    some templates write into the text, is the time at which this object was made, so that all conversations get the
    same.

    Args:
        source: the Jinja program.
        name: the name of the template in error messages.
        special: the special tokens that the template may write, by name (``bos_token``, ``eos_token``, ...).

    Attributes:
        has_generation: whether the template marks what the model writes by ``{% generation %}`` blocks.

    Raises:
        ValueError: if `source` is no Jinja program.
    """

    def __init__(self, source: str, name: str, special: Mapping[str, str]) -> None:
        self._name, self._special = name, dict(special)
        now = datetime.now()
        plain, marking = _environment(now, _Generation), _environment(now, _MarkedGeneration)
        try:
            # No other extension in use makes such nodes.
            self.has_generation = plain.parse(source).find(jinja2.nodes.ExtensionAttribute) is not None
            self._plain, self._marking = plain.from_string(source), marking.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{name}:{error.lineno}: not a chat template in Jinja: {error.message}") from None
        except RecursionError:
            raise ValueError(f"{name}: nested too deeply to be meant") from None

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """Renders a conversation as text.

        Args:
            messages: the messages, each with ``role``, ``content`` and whatever else the template reads.
            tools: the JSON schemas of the functions that the model may call.
            add_generation_prompt: whether to end the text at the place where an answer would begin.

        Raises:
            ValueError: if the template refuses the conversation or cannot render it; the message quotes the reason.
        """
        return self._render(self._plain, messages, tools, add_generation_prompt)

    def generated(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[tuple[int, int]]:
        """Returns the (start, end) of each ``{% generation %}`` block in the text of :meth:`render`, in characters.

        Raises:
            ValueError: as for :meth:`render`; or if a block is in another, or is changed after it was written.
        """
        parts = _MARK.split(self._render(self._marking, messages, tools, False))
        texts, marks = parts[::2], parts[1::2]
        if "".join(texts) != self.render(messages, tools):
            raise ValueError(f"{self._name} changes what its generation blocks wrote: let them hold the final text")
        if "".join(marks) != (_BEGIN + _END) * (len(marks) // 2):
            raise ValueError(f"{self._name} has a generation block in another: let each stand alone")
        ends = list(itertools.accumulate(map(len, texts)))
        return list(zip(ends[:-1:2], ends[1::2], strict=True))

    def _render(
        self, template: jinja2.Template, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool
    ) -> str:
        values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": prompt}
        try:
            return template.render(**self._special, **values)
        except Exception as error:  # of any type, as a template may combine and slice values that it did not expect
            raise ValueError(f"{self._name} refuses this conversation: {error}") from None


def require_chat_tokenizer(tokenizer: Tokenizer, name: str) -> HuggingFaceTokenizer:
    """Returns the tokenizer if it is of a kind that can have a chat template, else raises.

    Args:
        tokenizer: a tokenizer of any kind.
        name: the name of the tokenizer in the error message.

    Raises:
        ValueError: if the tokenizer cannot have a chat template.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ValueError(
            f"{name}: SentencePiece models have no chat template and do not say where in a text their pieces stand; "
            "give a directory with a tokenizer.json (AutoTokenizer ... save_pretrained writes one)"
        )
    return tokenizer


def open_chat_template(tokenizer: HuggingFaceTokenizer, given: Path | None = None) -> ChatTemplate:
    """Opens the chat template of a tokenizer.

    Args:
        tokenizer: the tokenizer, whose special tokens the template may write.
        given: a file to use instead of the template that came with the tokenizer.

    Raises:
        ValueError: if there is no template, or it is no Jinja program.
    """
    beside = tokenizer.directory / FILE
    if given is not None or beside.is_file():
        path = beside if given is None else given
        return ChatTemplate(read_text(path), str(path), tokenizer.special_tokens)
    source = tokenizer.config.get("chat_template")
    if isinstance(source, list):
        source = {one["name"]: one["template"] for one in source}.get("default")
    if source is None:
        raise ValueError(
            f"{tokenizer.directory}: no chat template, neither {FILE} nor a default one in {CONFIG}; name the one that "
            "the model is to be asked with: --chat-template FILE"
        )
    return ChatTemplate(source, f"the chat template in {tokenizer.directory / CONFIG}", tokenizer.special_tokens)


class _Generation(Extension):
    """The extension that renders ``{% generation %}`` blocks as if the tags were not there."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parses a block; Jinja calls this at the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class _MarkedGeneration(_Generation):
    """The extension that puts marks around what ``{% generation %}`` blocks write."""

    def _written(self, caller: Callable[[], str]) -> str:
        return _BEGIN + caller() + _END


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without the attributes by which a template could reach the interpreter."""

    def __init__(self, *values: Any, **named: Any) -> None:
        super().__init__()
        for name, value in dict(*values, **named).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r} for templates")
        super().__setitem__(name, value)


def _environment(now: datetime, generation: type[Extension]) -> ImmutableSandboxedEnvironment:
    """Builds the sandbox, with everything that Transformers offers to a template."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda format: now.strftime(format),
        # A function and not the type itself, whose attributes lead to other types.
        "dict": lambda *values, **named: dict(*values, **named),
        "namespace": _Namespace,
    }
    return made


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

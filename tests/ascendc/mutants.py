# SPDX-License-Identifier: Apache-2.0
"""Mutants: bugs that are made mechanically from the kernel sources.

All of them are in one build: every statement that can be mutated becomes a choice that depends on a global number, so
that a mutant needs only a number and not a compilation of its own. What cannot be chosen at run time (constants of
the language, template arguments) is left unchanged and counted.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

KERNEL_FILES = (
    "vector_ops.h",
    "ternary_core.h",
    "scales.h",
    "codes.h",
    "levels.h",
    "ternary_tile.h",
    "ternary_rows.h",
)
TOKEN = re.compile(
    r"(?P<number>\b(?:0x[0-9A-Fa-f]+u?|\d+\.\d+f|\d+u?)\b)|(?P<word>[A-Za-z_]\w*)"
    r"|(?P<operator>==|!=|<=|>=|&&|\|\||<<|::|->|\+\+|\+=|-=|\*=|[-+*/%<>=!&|(){}\[\];,.?:~])|(?P<space>\s+)"
)
COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "<<": "+", "&&": "||", "||": "&&"}
MODES = {
    "CAST_RINT": ("CAST_TRUNC", "CAST_ROUND", "CAST_CEIL"),
    "CAST_NONE": ("CAST_RINT",),
    "LT": ("LE", "GT"),
    "GT": ("GE", "LT"),
    "GE": ("GT", "LE"),
}
BINARY = ("Sub", "Add", "Div", "And", "Or", "Mul", "Max")
UNARY = ("Abs", "Muls", "Adds", "Mins", "SumRepeats", "LargestRepeats", "Select")
# Bugs written by hand that no rule makes: function, statement, the statement with the bug.
PLANTED = (
    # The lower bound is applied after the rounding to bf16, so that it is not rounded itself.
    (
        "OwnScales",
        "AscendC::Cast(scale_, own, RoundMode::CAST_NONE, padded)",
        "AscendC::Cast(scale_, own, RoundMode::CAST_NONE, padded); Barrier(); "
        "AscendC::Select(scale_, mask_, epsilon_, scale_, AscendC::SELMODE::VSEL_TENSOR_TENSOR_MODE, padded)",
    ),
    # The first weight's numbers are used for every weight of a launch.
    (
        "ReadWeight",
        "weight.reciprocal = numbers_.GetValue(at + kReciprocal)",
        "weight.reciprocal = numbers_.GetValue(at - index * kEntryWords + kReciprocal)",
    ),
    (
        "ReadWeight",
        "weight.epsilon = numbers_.GetValue(at + kEpsilon)",
        "weight.epsilon = numbers_.GetValue(at - index * kEntryWords + kEpsilon)",
    ),
    (
        "ReadWeight",
        "weight.multiplier = numbers_.GetValue(at + kMultiplier)",
        "weight.multiplier = numbers_.GetValue(at - index * kEntryWords + kMultiplier)",
    ),
    # A NaN is lost in the maximum.
    (
        "OwnScales",
        "AscendC::Select(sum_, mask_, threshold_, sum_, AscendC::SELMODE::VSEL_TENSOR_TENSOR_MODE, segments)",
        "AscendC::Select(sum_, mask_, threshold_, threshold_, AscendC::SELMODE::VSEL_TENSOR_TENSOR_MODE, segments)",
    ),
    # The thresholds are computed from the statistic, before it is rounded to bf16.
    (
        "FindLevels",
        "AscendC::Muls(threshold_, scale_, numbers_.GetValue(kThreshold + k), scales)",
        "AscendC::Muls(threshold_, sum_, numbers_.GetValue(kThreshold + k), scales)",
    ),
    # An infinite weight counts as greater than an infinite threshold.
    (
        "FindLevels",
        "AscendC::Not(maskWords, maskWords, padded / 16)",
        "CompareWith(mask_, magnitude_, 0.0f, AscendC::CMPMODE::LE, padded)",
    ),
    # The partial sums of a row are folded at most twice, so that everything beyond 64 ** 3 elements is lost.
    (
        "Sum",
        "sums = whole + (tail != 0 ? 1 : 0)",
        "sums = Smaller(whole + (tail != 0 ? 1 : 0), kFloatLanes)",
    ),
)


@dataclass(frozen=True)
class Mutant:
    """One bug.

    Attributes:
        number: the number that chooses the bug in the build.
        kind: the rule that made the bug.
        file: the name of the file in op_kernel.
        function: the name of the function that has the bug.
        before: the original code.
        after: the code with the bug.
    """

    number: int
    kind: str
    file: str
    function: str
    before: str
    after: str

    @property
    def key(self) -> str:
        """A name that depends neither on the bug's number nor on line numbers."""
        file = Path(self.file).stem.removeprefix("ternary_")
        return f"{file}.{self.function}: {self.before} -> {self.after}"


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    begin: int
    end: int


def generate(sources: Path, target: Path) -> tuple[list[Mutant], int]:
    """Copies the sources to ``target``, with all bugs built in.

    Returns:
        The mutants, and the number of statements that were left unchanged.
    """
    shutil.copytree(sources, target, dirs_exist_ok=True)
    mutants: list[Mutant] = []
    fixed = 0
    for name in KERNEL_FILES:
        path = target / "op_kernel" / name
        maker = _File(name, _without_comments(path.read_text()), len(mutants))
        path.write_text(maker.rewrite())
        mutants += maker.mutants
        fixed += maker.fixed
    planted = sum(m.kind == "planted" for m in mutants)
    if planted != len(PLANTED):
        raise ValueError(f"{planted} of {len(PLANTED)} planted bugs fit the kernel sources: adapt PLANTED to them")
    return mutants, fixed


def _without_comments(text: str) -> str:
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"#ifdef TERNARY_REDUCE_REPEAT\n.*?#else\n(.*?)#endif\n", r"\1", text, flags=re.DOTALL)


class _File:
    """A source file whose function bodies are found and whose statements are rewritten."""

    def __init__(self, name: str, text: str, first: int) -> None:
        self.name, self.text, self.next = name, text, first
        self.mutants: list[Mutant] = []
        self.fixed = 0
        self.function = ""

    def rewrite(self) -> str:
        tokens = [t for t in self._tokens() if t.kind != "space"]
        pieces, done, i = [], 0, 0
        while i < len(tokens):
            if tokens[i].text != "__aicore__":
                i += 1
                continue
            opening = next(j for j in range(i, len(tokens)) if tokens[j].text == "(")
            self.function = tokens[opening - 1].text
            i = self._close(tokens, opening) + 1
            while tokens[i].text not in "{;":
                # These are a constructor's initializers.
                i = self._close(tokens, i) + 1 if tokens[i].text == "(" else i + 1
            if tokens[i].text == "{":
                end = self._close(tokens, i)
                pieces.append(self.text[done : tokens[i].begin])
                pieces.append(self._block(tokens, i, end))
                done = tokens[end].end
                i = end
        pieces.append(self.text[done:])
        return "".join(pieces)

    def _tokens(self) -> list[_Token]:
        found, at = [], 0
        while at < len(self.text):
            match = TOKEN.match(self.text, at)
            if match is None:
                found.append(_Token("other", self.text[at], at, at + 1))
                at += 1
                continue
            found.append(_Token(match.lastgroup, match.group(), at, match.end()))
            at = match.end()
        return found

    @staticmethod
    def _close(tokens: list[_Token], opening: int) -> int:
        pairs = {"(": ")", "{": "}", "[": "]"}
        depth, first = 0, tokens[opening].text
        for i in range(opening, len(tokens)):
            depth += (tokens[i].text == first) - (tokens[i].text == pairs[first])
            if depth == 0:
                return i
        raise ValueError("unbalanced")

    def _block(self, tokens: list[_Token], opening: int, closing: int) -> str:
        pieces, i = ["{\n"], opening + 1
        while i < closing:
            text, i = self._statement(tokens, i)
            pieces.append(text + "\n")
        return "".join([*pieces, "}"])

    def _statement(self, tokens: list[_Token], i: int) -> tuple[str, int]:
        word = tokens[i].text
        if word == "{":
            end = self._close(tokens, i)
            return self._block(tokens, i, end), end + 1
        if word in ("if", "while"):
            fixed = tokens[i + 1].text == "constexpr"
            opening = i + 1 + fixed
            end = self._close(tokens, opening)
            condition = self._plain(tokens, opening + 1, end)
            if fixed:
                self.fixed += 1
                head = f"if constexpr ({condition}) "
            else:
                head = f"{word} ({self._choice(tokens, opening + 1, end, negate=word == 'if')}) "
            body, i = self._statement(tokens, end + 1)
            text = head + self._braced(body)
            if i < len(tokens) and tokens[i].text == "else":
                rest, i = self._statement(tokens, i + 1)
                text += " else " + self._braced(rest)
            return text, i
        if word == "for":
            end = self._close(tokens, i + 1)
            first = self._find(tokens, i + 2, ";")
            second = self._find(tokens, first + 1, ";")
            head = (
                f"for ({self._plain(tokens, i + 2, first)}; {self._choice(tokens, first + 1, second)}; "
                f"{self._plain(tokens, second + 1, end)}) "
            )
            body, i = self._statement(tokens, end + 1)
            return head + self._braced(body), i
        end = self._find(tokens, i, ";")
        return self._simple(tokens, i, end), end + 1

    @staticmethod
    def _braced(body: str) -> str:
        return body if body.startswith("{") else "{" + body + "}"

    def _find(self, tokens: list[_Token], i: int, text: str) -> int:
        while tokens[i].text != text:
            i = self._close(tokens, i) + 1 if tokens[i].text in "({[" else i + 1
        return i

    def _plain(self, tokens: list[_Token], begin: int, end: int) -> str:
        return self.text[tokens[begin].begin : tokens[end - 1].end]

    def _simple(self, tokens: list[_Token], begin: int, end: int) -> str:
        text = self._plain(tokens, begin, end)
        if re.match(r"(constexpr|using|static|union|number\.|\w+<T> \w+\()", text):
            self.fixed += 1
            return text + ";"
        if text.startswith("return "):
            return f"return {self._choice(tokens, begin + 1, end)};" if begin + 1 < end else text + ";"
        declaration = re.match(r"(const )?[\w:]+(<[^=;()]*>)?&? \w+( = |$)", text)
        if declaration:
            if not declaration.group(3).strip():
                return text + ";"
            equals = self._find(tokens, begin, "=")
            return f"{self._plain(tokens, begin, equals + 1)} {self._choice(tokens, equals + 1, end)};"
        choices = [*self._planted(text), *self._deletions(text), *self._variants(tokens, begin, end)]
        made = "".join(
            f"if (ternary_mutant == {self._add(kind, text, new)}) {{ {new}; }} else " for kind, new in choices
        )
        return f"{made}{{ {text}; }}"

    def _choice(self, tokens: list[_Token], begin: int, end: int, negate: bool = False) -> str:
        text = self._plain(tokens, begin, end)
        choices = self._variants(tokens, begin, end)
        if negate:
            choices.append(("condition", f"!({text})"))
        made = "".join(f"ternary_mutant == {self._add(kind, text, new)} ? ({new}) : " for kind, new in choices)
        return f"({made}({text}))"

    def _add(self, kind: str, before: str, after: str) -> int:
        squeeze = [re.sub(r"\s+", " ", t) for t in (before, after)]
        self.mutants.append(Mutant(self.next, kind, self.name, self.function, *squeeze))
        self.next += 1
        return self.next - 1

    def _planted(self, text: str) -> list[tuple[str, str]]:
        squeezed = re.sub(r"\s+", " ", text)
        return [("planted", after) for where, before, after in PLANTED if (where, before) == (self.function, squeezed)]

    @staticmethod
    def _deletions(text: str) -> list[tuple[str, str]]:
        if text == "Barrier()":
            return [("barrier", "")]
        if re.search(r"Queue_\.(EnQue|FreeTensor)\(", text):
            return [("queue", "")]
        if text.startswith("AscendC::") or re.match(r"(this->)?[A-Z]\w*[<(]", text):
            return [("call", "")]
        return []

    def _variants(self, tokens: list[_Token], begin: int, end: int) -> list[tuple[str, str]]:
        found = []

        def replace(kind: str, first: int, last: int, new: str) -> None:
            start = tokens[begin].begin
            text = self._plain(tokens, begin, end)
            found.append((kind, text[: tokens[first].begin - start] + new + text[tokens[last].end - start :]))

        for i in range(begin, end):
            token = tokens[i]
            before, after = self.text[token.begin - 1], self.text[token.end]
            spaced = before in " \n" and after in " \n"
            if token.kind == "number":
                for new in self._shifted(token.text):
                    replace("constant", i, i, new)
            elif token.text in MODES and tokens[i - 1].text == "::":
                for new in MODES[token.text]:
                    replace("rounding" if token.text.startswith("CAST") else "comparison", i, i, new)
            elif spaced and token.text in COMPARISONS:
                replace("comparison", i, i, COMPARISONS[token.text])
            elif spaced and token.text in ARITHMETIC:
                replace("arithmetic", i, i, ARITHMETIC[token.text])
            elif token.text in ("AllocTensor", "DeQue") and tokens[i - 2].text in (".", "template"):
                replace("queue", i, i, "DeQue" if token.text == "AllocTensor" else "AllocTensor")
            elif token.text in BINARY + UNARY and tokens[i + 1].text in "(<":
                opening = self._find_opening(tokens, i)
                arguments = self._arguments(tokens, opening)
                pairs = {"Select": [(2, 3)]}.get(token.text, [(0, 1), (1, 2)])
                for a, b in pairs[: 2 if token.text in BINARY else 1]:
                    self._swap(replace, tokens, arguments, a, b)
        return found

    def _swap(self, replace, tokens: list[_Token], arguments: list[tuple[int, int]], a: int, b: int) -> None:
        first, second = (self._plain(tokens, *arguments[k]) for k in (a, b))
        tensors = all(re.fullmatch(r"[\w.>-]+_|\w+|\w+\[.*\]|[\w>-]+_\[.*\]|this->\w+", t) for t in (first, second))
        if tensors and first != second and not re.fullmatch(r"[0-9.f]+", second):
            between = self.text[tokens[arguments[a][1] - 1].end : tokens[arguments[b][0]].begin]
            replace("operands", arguments[a][0], arguments[b][1] - 1, second + between + first)

    @staticmethod
    def _shifted(number: str) -> list[str]:
        if number.startswith("0x"):
            return [hex(int(number.rstrip("u"), 16) ^ 1) + ("u" if number.endswith("u") else "")]
        if number.endswith("f"):
            return [f"{float(number[:-1]) + 1}f"]
        value, suffix = int(number.rstrip("u")), "u" if number.endswith("u") else ""
        return [f"{value + 1}{suffix}"] + ([f"{value - 1}{suffix}"] if value else [])

    @staticmethod
    def _find_opening(tokens: list[_Token], i: int) -> int:
        while tokens[i].text != "(":
            i += 1
        return i

    def _arguments(self, tokens: list[_Token], opening: int) -> list[tuple[int, int]]:
        closing, arguments, start, i = self._close(tokens, opening), [], opening + 1, opening + 1
        while i <= closing:
            if tokens[i].text == "," or i == closing:
                arguments.append((start, i))
                start = i + 1
            i = self._close(tokens, i) + 1 if tokens[i].text in "({[" else i + 1
        return arguments

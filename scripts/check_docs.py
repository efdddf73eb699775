# SPDX-License-Identifier: Apache-2.0
"""Checks that the documentation agrees with the tree: ``python scripts/check_docs.py [--write]``.

Every link to a file or heading in a Markdown file must lead somewhere. Every block of commands must be complete, so
that ``tests/integration/test_documented_commands.py`` can run it, or say in its first line what it needs.
``docs/verification.md`` must list the claims of the tests' markers, ``@pytest.mark.verifies(topic, claim)``, and the
table of results in README must have the figures of the data files that it names. ``--write`` writes both; without it
they are compared. Exit status: 0 good, 1 not, with a line for everything that is wrong.
"""

import argparse
import ast
import csv
import json
import re
import sys
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

CHECKOUT = Path(__file__).resolve().parents[1]
VERIFICATION = CHECKOUT / "docs" / "verification.md"
README = CHECKOUT / "README.md"
BENCHMARKS = CHECKOUT / "docs" / "benchmarks"
TOPICS = {
    "quantizer": "The quantizer and its kernels",
    "training": "Training",
    "checkpoints": "Checkpoints, exports and what runs them",
    "hosts": "Other software",
    "trust": "Bad input, kills, measurements",
}
PLACES = {"cpu": "yes", "cuda": "not run", "npu": "not run"}
_LINK = re.compile(r"!?\[[^\]]*\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = ("sh", "python")
LANGUAGES = (*COMMANDS, "yaml", "text")
_NEEDS = re.compile(r"# needs (\S.*)")
_FILE = re.compile(r"# ([\w/]+\.(?:py|yaml))")
_GAP = re.compile(r"(?<![\w.])\.\.\.|\[--|\bDIR\b|\bPATH\b")
_COMMAND = re.compile(r"^(?:\$ )?(?:python3?|torchrun|make|pip|bash|\S+\.(?:py|sh))\s", re.MULTILINE)
_FLAG = re.compile(r"(?<=[\s'\"])--[a-z][\w-]+")
_MARKED = re.compile(r"(?<=<!-- written by scripts/check_docs.py -->\n).*?(?=<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """Returns every Markdown file of the project."""
    return sorted(
        path for path in CHECKOUT.rglob("*.md") if not any(part[0] == "." for part in path.relative_to(CHECKOUT).parts)
    )


def anchors(text: str) -> set[str]:
    """Returns the anchors of a page's headings as GitHub makes them: lower case, spaces to dashes, no punctuation."""
    titles = re.findall(r"^#+ +(.+?) *$", _FENCE.sub("", text), re.MULTILINE)
    words = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "").lower() for title in titles)
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in words}


def broken_links(path: Path) -> Iterator[str]:
    """Yields a message for every link of a page that leads to no file of this tree, or to no heading of one."""
    text = path.read_text(encoding="utf-8")
    for link in _LINK.findall(_FENCE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists():
            yield f"{path}: {link}: there is no such file"
        elif fragment and (target.suffix != ".md" or fragment not in anchors(target.read_text(encoding="utf-8"))):
            yield f"{path}: {link}: there is no such heading"


@dataclass(frozen=True)
class Block:
    """A fenced block of a Markdown page.

    Attributes:
        line: the number of its first line in the page, from 1.
        language: one of :data:`LANGUAGES`, or something else, which is a mistake.
        text: the lines between the fences.
    """

    line: int
    language: str
    text: str

    @property
    def needs(self) -> str | None:
        """The requirement that a test does not meet, from a first line ``# needs ...``; None if there is none."""
        found = _NEEDS.match(self.text)
        return found and found[1]

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, from a first line ``# NAME.py`` or ``# NAME.yaml``; else None."""
        found = _FILE.fullmatch(self.text.partition("\n")[0])
        return found and found[1]


def blocks(path: Path) -> list[Block]:
    """Returns the fenced blocks of a page, in order."""
    text = path.read_text(encoding="utf-8")
    return [Block(text.count("\n", 0, m.start()) + 2, m[1], m[2]) for m in _FENCE.finditer(text)]


def unclear_blocks(path: Path, flags: Container[str]) -> Iterator[str]:
    """Finds the mistakes in a page's blocks: each is one that the test of commands would pass over, or could not run.

    Args:
        path: the page.
        flags: the flags that some command knows.
    """
    for block in blocks(path):
        where = f"{path}:{block.line}:"
        if block.language not in LANGUAGES:
            yield f"{where} a block is one of {', '.join(LANGUAGES)}, not {block.language or 'nothing'}"
        elif block.language == "text" and (found := _COMMAND.search(block.text)):
            yield f"{where} {found[0].strip()} begins a command: write it in a block of sh"
        elif block.language == "yaml":
            try:
                yaml.safe_load(block.text)
            except yaml.YAMLError as error:
                yield f"{where} not YAML: {error}"
        elif block.language == "sh" and not block.needs and (gap := _GAP.search(block.text)):
            yield f"{where} {gap[0]} can't be run: write the whole command, or '# needs ...' above it"
        if block.language == "sh":
            for flag in sorted({found for found in _FLAG.findall(block.text) if found not in flags}):
                yield f"{where} no command has a flag {flag}"
    whole = path.read_text(encoding="utf-8")
    text = _FENCE.sub(lambda found: "\n" * found[0].count("\n"), whole)
    for found in re.finditer(r"^[ >]*(?:```|~~~)|(?<=\n\n) {4}\S", text, re.MULTILINE):
        line = text.count("\n", 0, found.start()) + 1
        yield f"{path}:{line}: not a fenced block: write it between ```LANGUAGE and ```, at the beginning of the line"
    lines = [line for line in _FENCE.sub("x\n", whole).splitlines() if line.strip()]
    levels = [len(line) - len(line.lstrip("#")) if re.match("#+ ", line) else 0 for line in lines]
    for line, level, following in zip(lines, levels, [*levels[1:], 1], strict=True):
        if level and 0 < following <= level:
            yield f"{path}: {line}: nothing follows this heading"


def known_flags() -> set[str]:
    """Returns every flag that the sources of commands, or their words on others' flags, name."""
    folders = ("bitcpm_megatron", "benchmarks", "checkpoint_tools", "examples", "launch", "patches", "studies", "tests")
    sources = [path for folder in folders for path in (CHECKOUT / folder).rglob("*.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*sources, *CHECKOUT.glob("scripts/*.py")])
    named = {f"--{word.replace('_', '-')}" for word in re.findall(r'"([a-z]\w+)"', text)}
    return {*re.findall(r"--[a-z][\w-]+", text), *named}


def claims() -> Iterator[tuple[str, str, dict[str, str], str]]:
    """Yields the topic, the claim, the places where it has run, and the test file of every marker ``verifies``.

    Raises:
        ValueError: if a marker has another form.
    """
    for path in sorted((CHECKOUT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.verifies":
                topic, claim = (ast.literal_eval(argument) for argument in node.args)
                where = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
                if topic not in TOPICS or not where.keys() <= PLACES.keys():
                    raise ValueError(f"{path}:{node.lineno}: topics are {', '.join(TOPICS)}; places cpu, cuda and npu")
                yield topic, claim, where, path.relative_to(CHECKOUT).as_posix()


def verification() -> str:
    """Returns the tables of ``docs/verification.md``."""
    found, lines = list(claims()), []
    for topic, title in TOPICS.items():
        lines += [f"## {title}", "", "| | test | CPU | CUDA | Ascend 910B |", "|---|---|---|---|---|"]
        for at, claim, where, path in found:
            if at == topic:
                told = " | ".join(where.get(place, untold) for place, untold in PLACES.items())
                lines.append(f"| {claim} | [{Path(path).stem.removeprefix('test_')}](../{path}) | {told} |")
        lines.append("")
    return "\n".join(lines)


def _step(variant: str, tokens: int, pairs: int) -> tuple[str, str]:
    """Returns the time of a step and the peak memory, at TP1 and 8 micro-batches, both relative to BF16."""
    keys = {"layout": "TP1", "variant": variant, "tokens": str(tokens), "micro_batches": "8", "pairs": str(pairs)}
    (row,) = (row for row in _rows("throughput") if keys.items() <= row.items())
    ratio, low, high = (float(row[name]) for name in ("ratio", "ratio_low", "ratio_high"))
    return f"**{ratio:.3f}** ({low:.3f} - {high:.3f})", row["peak_ratio"] and f"{float(row['peak_ratio']):.3f}"


def _rows(name: str) -> Iterator[dict[str, str]]:
    with (BENCHMARKS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _gap(study: str, name: str) -> str:
    found = json.loads((CHECKOUT / "docs" / "studies" / f"{study}.json").read_text(encoding="utf-8"))["gaps"][name]
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}) nats"


def _loss(run: str) -> float:
    lines = (CHECKOUT / "docs" / "demo" / f"{run}.jsonl").read_text(encoding="utf-8").splitlines()
    return [record["lm_loss"] for record in map(json.loads, lines) if record["kind"] == "valid"][-1]


def _sizes(preset: str) -> str:
    page = (CHECKOUT / "docs" / "packed.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {preset} \|.*", page, re.MULTILINE)
    return ", ".join(re.findall(r"\((\d+\.\d+)\)", row)[:2])


def results() -> str:
    """Returns README's table of results; every figure comes from the data file that its last column links to."""
    time, memory = _step("resident", 256, 32)
    forward, backward = (_step(variant, 1024, 10)[0] for variant in ("int8", "int8-backward"))
    (speed,) = (row["ratio"] for row in _rows("packed-inference") if row["beside"] == "Transformers, bf16")
    throughput, packed = "[data](docs/benchmarks/throughput.csv)", "[data](docs/benchmarks/packed-inference.csv)"
    rows = [
        ("time of a ternary training step / a BF16 step (95 % interval)", time, "`make bench`", throughput),
        ("peak memory of a ternary training step / a BF16 step", memory, "`make bench`", throughput),
        ("time likewise, with `--ternary-gemm int8`, 1,024 tokens", forward, "`make bench`", throughput),
        ("with `--ternary-gemm-backward int8` in addition", backward, "`make bench`", throughput),
        (
            "validation loss of the demo's BF16 and ternary model, nats",
            f"{_loss('bf16'):.3f}, {_loss('ternary'):.3f}",
            "`make demo`",
            "[data](docs/demo)",
        ),
        (
            "validation loss when a teacher is there from the start, minus without one",
            _gap("distillation_stages", "taught from the start"),
            "`make demo-distill DISTILL='--seeds 3'`",
            "[data](docs/studies/distillation_stages.json)",
        ),
        (
            "size of MiniCPM4-8B in BF16 / as a GGUF file with embeddings in F16, in Q8_0",
            _sizes("minicpm4-8b"),
            "`export_packed.py`",
            "[packed](docs/packed.md#sizes)",
        ),
        (
            "tokens/s of a packed MiniCPM4-0.5B / of Transformers in bf16",
            f"{float(speed):.2f}",
            "`python benchmarks/packed_inference.py`",
            packed,
        ),
    ]
    lines = ["| | measured | command | |", "|---|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def rewritten(path: Path, part: str) -> str:
    """Returns the text of a page with its marked part replaced.

    Raises:
        ValueError: if the page has no marked part.
    """
    text = path.read_text(encoding="utf-8")
    if not _MARKED.search(text):
        raise ValueError(f"{path}: no part between '<!-- written by scripts/check_docs.py -->' and '<!-- end -->'")
    return _MARKED.sub(lambda _: f"\n{part}\n", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the documentation, with ``--write`` after writing its generated parts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="bring the generated parts up to date first")
    args = parser.parse_args(argv)
    found, flags = [], known_flags()
    for path, part in ((VERIFICATION, verification()), (README, results())):
        expected = rewritten(path, part)
        if args.write:
            path.write_text(expected, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != expected:
            found.append(f"{path}: its generated part is of another state: python scripts/check_docs.py --write")
    found += [line for path in pages() for line in (*broken_links(path), *unclear_blocks(path, flags))]
    for line in found:
        print(line.replace(f"{CHECKOUT}/", ""))
    if not found:
        print(f"check_docs: {len(pages())} pages: good")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

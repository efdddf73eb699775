# SPDX-License-Identifier: Apache-2.0
"""Checks that the documentation agrees with the tree: ``python scripts/check_docs.py [--write]``.

Every link to a file or heading in a Markdown file must lead somewhere. ``docs/verification.md`` must list the claims of
the tests' markers, ``@pytest.mark.verifies(topic, claim)``, and the table of results in README must have the figures of
the data files that it names. ``--write`` writes both; without it they are compared. Exit status: 0 good, 1 not, with a
line for everything that is wrong.
"""

import argparse
import ast
import csv
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

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
_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
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
    return " and ".join(re.findall(r"\((\d+\.\d+)\)", row)[:2])


def results() -> str:
    """Returns README's table of results; every figure comes from the data file that its last column links to."""
    time, memory = _step("resident", 256, 32)
    (speed,) = (row["ratio"] for row in _rows("packed-inference") if row["beside"] == "Transformers, bf16")
    throughput, packed = "[data](docs/benchmarks/throughput.csv)", "[data](docs/benchmarks/packed-inference.csv)"
    int8, taught = (f"[data](docs/studies/{study}.json)" for study in ("int8_quality", "distillation_stages"))
    of_int8, of_taught = (
        _gap("int8_quality", "int8 GEMMs - bf16 GEMMs"),
        _gap("distillation_stages", "taught from the start"),
    )
    rows = [
        ("a ternary step, in units of BF16's (95 %)", time, "`make bench`", throughput),
        ("its peak memory, likewise", memory, "`make bench`", throughput),
        ("a step with int8 GEMMs, 1,024 tokens", _step("int8", 1024, 10)[0], "`make bench`", throughput),
        ("with int8 input gradients, too", _step("int8-backward", 1024, 10)[0], "`make bench`", throughput),
        ("loss of int8 GEMMs above bf16 GEMMs, 5 seeds", of_int8, "`make study-int8`", int8),
        (
            "validation loss of the demo, BF16 and ternary",
            f"{_loss('bf16'):.3f}, {_loss('ternary'):.3f}",
            "`make demo`",
            "[data](docs/demo)",
        ),
        (
            "loss of a student that is taught from the start, above training alone",
            of_taught,
            "`make demo-distill DISTILL='--seeds 3'`",
            taught,
        ),
        (
            "a GGUF file of MiniCPM4-8B's shape, times smaller than BF16: embeddings in F16 and in Q8_0",
            _sizes("minicpm4-8b"),
            "`export_packed.py`",
            "[packed](docs/packed.md#sizes)",
        ),
        (
            "tokens/s of a packed model of MiniCPM4-0.5B's shape, in units of Transformers' in bf16",
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
    found = []
    for path, part in ((VERIFICATION, verification()), (README, results())):
        expected = rewritten(path, part)
        if args.write:
            path.write_text(expected, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != expected:
            found.append(f"{path}: its generated part is of another state: python scripts/check_docs.py --write")
    found += [line for path in pages() for line in broken_links(path)]
    for line in found:
        print(line.replace(f"{CHECKOUT}/", ""))
    if not found:
        print(f"check_docs: {len(pages())} pages: good")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

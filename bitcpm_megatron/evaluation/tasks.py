# SPDX-License-Identifier: Apache-2.0
"""Loading of lm-evaluation-harness's tasks, with their own data sets or with items from files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cli import FailedError
from ..files import FileError, nearest
from .benchmarks import BENCHMARKS
from .offline import Items, read_items

_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
# The harness's default, if a task does not say how many.
NEW_TOKENS = 256


@dataclass(frozen=True)
class Asked:
    """The tasks that models are evaluated on.

    Attributes:
        tasks: the tasks of the harness, by name.
        leaves: the names of each benchmark's tasks, by the benchmark's name.
    """

    tasks: Mapping[str, Any]
    leaves: Mapping[str, Sequence[str]]


def load_tasks(
    names: Sequence[str], shots: int | None, data: Path | None, max_new_tokens: int | None, seed: int
) -> Asked:
    """Loads tasks and all of their items.

    Args:
        names: the names of tasks, groups or tags of the harness.
        shots: the number of examples before every question; None for what each task says.
        data: the directory of ``TASK/SPLIT.jsonl``; None for the tasks' own data sets, which may be downloaded.
        max_new_tokens: the limit of an answer's tokens, if a task's own is not lower; None for what each task says.
        seed: the seed of the draw of examples.

    Raises:
        FileError: if there is no such task, or its items are missing or have another format.
        FailedError: if a data set cannot be obtained.
    """
    manager, index = _index(names)
    leaves = {name: _leaves(index, name) for name in names}
    configs = {}
    for name, below in leaves.items():
        benchmark = BENCHMARKS.get(name)
        columns = benchmark.columns.split() if benchmark is not None else []
        for leaf in below:
            configs[leaf] = _config(index[leaf].yaml_path, leaf, shots, data, columns)
    tasks: dict[str, Any] = {}
    for leaf, config in configs.items():
        try:
            tasks |= manager.load([config])["tasks"]
        except FileError:
            raise
        except Exception as error:  # The harness renders the first item, which may raise errors of any type.
            raise _unloaded(leaf, data, error) from error
    for task in tasks.values():
        _set_up(task, max_new_tokens, seed)
    return Asked(tasks, leaves)


def _index(names: Sequence[str]) -> tuple[Any, Mapping[str, Any]]:
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    known = [BENCHMARKS[name].folder for name in names if name in BENCHMARKS]
    # Only these folders are searched if possible, because searching all tasks of the harness takes half a minute.
    places = [root / folder for folder in sorted(set(known))] if len(known) == len(names) else [root]
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=places)
    for name in names:
        if name not in manager.task_index:
            raise FileError(
                f"{name} is no task of lm-evaluation-harness{nearest(name, sorted({*manager.all_tasks, *BENCHMARKS}))}"
            )
    return manager, manager.task_index


def _leaves(index: Mapping[str, Any], name: str) -> list[str]:
    """Returns the tasks of a group or tag, in the order of the harness, or a task itself."""
    entry = index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    return _members(index, entry.cfg["task"])


def _members(index: Mapping[str, Any], members: Sequence[Any]) -> list[str]:
    found: list[str] = []
    for member in members:
        if isinstance(member, str):
            found += _leaves(index, member)
        elif "group" in member and isinstance(member.get("task"), list):
            found += _members(index, member["task"])
        else:
            raise FileError(f"a group of the harness that changes its tasks ({member}): name these tasks instead")
    return found


def _config(path: Path, leaf: str, shots: int | None, data: Path | None, columns: Sequence[str]) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path)
    if shots is not None:
        config["num_fewshot"] = shots
    if data is None:
        return config
    asked = config.get("test_split") or config.get("validation_split")
    examples = _split_of_examples(config) if config.get("num_fewshot") else None
    needed = dict.fromkeys(filter(None, [asked, examples]))
    items = {split: read_items(data, leaf, split, columns) for split in needed}
    for name in _SPLITS:
        if config.get(name) not in items:
            config.pop(name, None)
    for name in ("dataset_path", "dataset_name", "dataset_kwargs"):
        config.pop(name, None)
    return {**config, "custom_dataset": lambda **_: _dataset(leaf, items)}


def _split_of_examples(config: Mapping[str, Any]) -> str | None:
    """Returns the split of the few-shot examples as the harness's ``Task.fewshot_docs`` chooses it.

    It is None if the task itself lists its examples, or has no split.
    """
    if (config.get("fewshot_config") or {}).get("samples") is not None:
        return None
    for name in ("fewshot_split", "training_split", "validation_split", "test_split"):
        if config.get(name):
            return config[name]
    return None


def _dataset(leaf: str, items: Mapping[str, Items]) -> Any:
    import datasets

    try:
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in items.items()})
    except Exception as error:  # pyarrow raises errors of many types.
        raise FileError(f"{leaf}: items differ in what their columns hold: {error}") from None


def _unloaded(leaf: str, data: Path | None, error: Exception) -> Exception:
    if data is not None:
        return FileError(f"{leaf}: {data / leaf}: the harness cannot ask the first item: {error!r}")
    return FailedError(
        f"{leaf}: its data set cannot be had ({type(error).__name__}: {error}): --data DIR takes it from files"
    )


def _set_up(task: Any, max_new_tokens: int | None, seed: int) -> None:
    if task.get_config("num_fewshot") is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(seed=seed)
    if task.OUTPUT_TYPE == "generate_until":
        kwargs = task.config.generation_kwargs
        # As in the harness's normalize_gen_kwargs, a temperature above 0 suffices for random draws.
        drawn = kwargs.get("do_sample")
        if drawn or (drawn is None and float(kwargs.get("temperature") or 0) > 0):
            raise FileError(f"{task.task_name} draws its answers at random: only greedy answers are asked for here")
        own = kwargs.get("max_gen_toks", NEW_TOKENS)
        limit = own if max_new_tokens is None else min(own, max_new_tokens)
        task.set_config("generation_kwargs", {"max_gen_toks": limit}, update=True)
    elif task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        raise FileError(f"{task.task_name}: tasks of the kind {task.OUTPUT_TYPE} are not scored here")

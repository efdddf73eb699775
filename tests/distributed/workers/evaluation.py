# SPDX-License-Identifier: Apache-2.0
"""Asks the model of a checkpoint the questions in ``cases.json``, in every layout that the number of ranks allows.

    {"load": "DIR", "batch": 4, "pairs": [["context", "continuation"], ...], "prompts": ["...", ...], "count": 8}

Every rank reports its answers by layout: of a first turn, and of a second one ("again") that finds the store of the
first; and the number of questions that the model was asked in each.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace


def main(directory: Path) -> None:
    import torch
    from support.process_groups import leave_model_parallel

    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    case = json.loads((directory / "cases.json").read_text())
    found = {}
    for name, stages in (("TP1", 1),) if ranks == 1 else (("TP2", 1), ("PP2", 2)):
        for turn in ("first", "again"):
            found[f"{name} {turn}"] = answers(case, directory / name, stages, rank)
            leave_model_parallel()
    (directory / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def answers(case: dict, output: Path, stages: int, rank: int) -> dict:
    from bitcpm_megatron.evaluation.answers import AnswerStore
    from bitcpm_megatron.evaluation.opening import find_model, open_model

    subject = find_model("run", Path(case["load"]))
    model = open_model(subject, case["batch"], None, True, stages).model
    store = AnswerStore(output, {"digest": subject.digest}) if rank == 0 else None
    model.record(store, "run")
    said = {
        "pairs": model.loglikelihood([SimpleNamespace(args=tuple(pair)) for pair in case["pairs"]]),
        "texts": model.generate_until(
            [
                SimpleNamespace(args=(prompt, {"until": ["\n\n"], "max_gen_toks": case["count"]}))
                for prompt in case["prompts"]
            ]
        ),
        "asked": model.asked,
        "tokens": [[*texts, ids] for texts, ids in model.tokens.items()],
    }
    if store is not None:
        store.close()
    return said


if __name__ == "__main__":
    main(Path(sys.argv[1]))

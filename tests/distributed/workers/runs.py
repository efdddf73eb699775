# SPDX-License-Identifier: Apache-2.0
"""Runs ``launch/pretrain.py`` several times in one set of processes, as the list ``runs.json`` says.

Reports each run's exit status and standard error, and writes the quantized weights that its last training forward used,
gathered over the tensor-parallel ranks, to ``<name>.rank<N>.pt``.
"""

import contextlib
import io
import json
import sys
from pathlib import Path

# Imports stand where they are used: the checkpoint writer's helper process imports this file at each save.


def gathered_weights(model) -> dict:
    """Whole quantized weights by global module path, gate and up apart."""
    import torch
    from megatron.core import parallel_state

    from bitcpm_megatron.tensor_parallel import ternary_modules

    group = parallel_state.get_tensor_model_parallel_group()
    whole = {}
    for state, module in ternary_modules(model.bare):
        if state.quantized is None:
            continue
        parts = [torch.empty_like(state.quantized) for _ in range(group.size())]
        torch.distributed.all_gather(parts, state.quantized.contiguous(), group=group)
        if hasattr(module, "input_size_per_partition"):
            whole[state.name] = torch.cat(parts, 1)
        elif state.name.endswith("linear_fc1"):
            halves = [p.chunk(2) for p in parts]
            whole[state.name] = torch.cat([h[0] for h in halves] + [h[1] for h in halves])
        else:
            whole[state.name] = torch.cat(parts, 0)
    return whole


def main(directory: Path) -> None:
    import torch
    from megatron.core import parallel_state

    from bitcpm_megatron.launch import pretrain as command
    from bitcpm_megatron.training import initialize, loop

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    built = []
    build = loop.build_model
    loop.build_model = lambda *args: built.append(build(*args)) or built[-1]
    initialize.shutdown = lambda: None
    report = {}
    for name, argv in json.loads((directory / "runs.json").read_text()).items():
        built.clear()
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                status = command.main(argv)
        except SystemExit as leaving:
            status = leaving.code
        report[name] = {"status": status, "stderr": errors.getvalue()}
        if built and status == 0:
            torch.save(gathered_weights(built[0]), directory / f"{name}.rank{rank}.pt")
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
    (directory / f"rank{rank}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

# SPDX-License-Identifier: Apache-2.0
"""Quantizes weights in a buffer whose shards cut their groups, for the cases in ``cases.json``.

    name: {"rows": N, "columns": N, "group": N, "before": elements before the weight, "behind": elements after it}

Each rank quantizes its shard as if an optimizer had written it. Reports whether the gathered weight is that of the
whole weight, and whether the scales of all groups of which this rank holds a piece are, too; and how many groups are
cut by edges of shards.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace


def case(rows: int, columns: int, group: int, before: int, behind: int) -> dict:
    import torch

    from bitcpm_megatron.nn.cache import CacheEpoch
    from bitcpm_megatron.nn.linear import TernaryState
    from bitcpm_megatron.parallel.shards import Shares
    from bitcpm_megatron.quantization import QuantizerConfig, quantize_dequantize

    world = torch.distributed.group.WORLD
    rank, ranks = world.rank(), world.size()
    length = -(-(before + rows * columns + behind) // ranks) * ranks
    shard = length // ranks
    state = TernaryState("weight", QuantizerConfig(group_size=group), CacheEpoch())
    whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)).to(torch.bfloat16)
    whole[-1, : columns // 2] = 0.0
    expected, scales = quantize_dequantize(whole, state.config)
    buffer = torch.full((length,), torch.nan, dtype=torch.bfloat16)
    parameter = torch.nn.Parameter(buffer[before : before + whole.numel()].view_as(whole))
    # This rank has only the part of the weight that its optimizer wrote: its shard.
    mine = slice(rank * shard, (rank + 1) * shard)
    latent = torch.full((length,), torch.nan, dtype=torch.bfloat16)
    latent[before : before + whole.numel()] = whole.flatten()
    buffer[mine] = latent[mine]
    bucket = SimpleNamespace(offset=0, param_data=buffer)
    optimizer = SimpleNamespace(
        gbuf_ranges=[],
        data_parallel_group=world,
        buffers=[SimpleNamespace(param_index_map={parameter: (before, before + whole.numel(), 0)}, buckets=[bucket])],
    )
    shares = Shares(optimizer, [(state, parameter)])
    shares.quantize(lambda share: share.parameter.detach().view(-1)[share.start : share.end])
    torch.distributed.all_gather_into_tensor(buffer, buffer[mine].clone())
    (own,) = shares.shares
    pieces = slice(own.start // own.group, -(-own.end // own.group) if own.start < own.end else 0)
    return {
        "weight": torch.equal(parameter.detach(), expected),
        "scales": torch.equal(own.scales, scales.flatten()[pieces]),
        "cuts": shares.cut_groups,
        "most_pieces": max((len(spans) for share in shares.shares for spans in share.cuts), default=0),
    }


def main(directory: Path) -> None:
    import torch

    torch.distributed.init_process_group("gloo")
    report = {name: case(**given) for name, given in json.loads((directory / "cases.json").read_text()).items()}
    (directory / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(report))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

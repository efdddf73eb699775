# SPDX-License-Identifier: Apache-2.0
"""A few training steps of a tiny ternary GPT, to compare backends bit for bit.

Weights have 12 bits after the binary point and group sizes are powers of two. No sum of magnitudes is rounded, whatever
its order, so that on one device all backends compute the same scales, and with them the same losses.
"""

import torch

from bitcpm_megatron import QuantizerConfig, apply_recipe
from bitcpm_megatron.ops import set_backend
from bitcpm_megatron.parallel import ternary_state


def train(backend: str, device: str, group_size: int) -> list[tuple[float, torch.Tensor]]:
    """Trains three steps and returns the loss and the scales of each.

    Needs megatron-core's parallel state; the backend stays selected afterwards.
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    set_backend(backend, device)
    model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=128,
        gated_linear_unit=True,
        add_bias_linear=False,
        normalization="RMSNorm",
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    layers = get_gpt_layer_local_spec(normalization="RMSNorm")
    model = GPTModel(config, layers, vocab_size=64, max_sequence_length=16).to(device)
    apply_recipe(model, default=QuantizerConfig(group_size=group_size))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _onto_the_grid(model)
    results = []
    for step in range(3):
        tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(step)).to(device)
        positions = torch.arange(16, device=device).expand(2, -1)
        loss = model(tokens, positions, None, labels=tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _onto_the_grid(model)
        states = [s for s in map(ternary_state, model.modules()) if s]
        assert len(states) == 8
        results.append((loss.item(), torch.cat([s.scales.flatten() for s in states])))
    return results


@torch.no_grad()
def _onto_the_grid(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        parameter.mul_(2**12).round_().div_(2**12)


def assert_equal(ours: list[tuple[float, torch.Tensor]], theirs: list[tuple[float, torch.Tensor]]) -> None:
    """Asserts that losses and scales are equal, step by step, and that the weights change."""
    assert len(ours) == len(theirs) == 3
    assert not torch.equal(ours[0][1], ours[2][1]), "the weights must change"
    for (our_loss, our_scales), (their_loss, their_scales) in zip(ours, theirs, strict=True):
        assert our_loss == their_loss
        assert torch.equal(our_scales, their_scales)

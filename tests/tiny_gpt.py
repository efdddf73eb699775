# SPDX-License-Identifier: Apache-2.0
"""A few training steps of a tiny ternary GPT, to compare backends."""

import torch

from bitcpm_megatron import QuantizerConfig, apply_recipe
from bitcpm_megatron.ops import set_backend
from bitcpm_megatron.tensor_parallel import ternary_state


def train(backend: str, device: str, group_size: int, ffn: int) -> list[tuple[float, torch.Tensor]]:
    """Loss and scales of three steps. Needs megatron-core's parallel state; the backend stays set."""
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
        ffn_hidden_size=ffn,
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
    results = []
    for step in range(3):
        tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(step)).to(device)
        positions = torch.arange(16, device=device).expand(2, -1)
        loss = model(tokens, positions, None, labels=tokens).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        states = [s for s in map(ternary_state, model.modules()) if s]
        assert len(states) == 8
        results.append((loss.item(), torch.cat([s.scales.flatten() for s in states])))
    return results

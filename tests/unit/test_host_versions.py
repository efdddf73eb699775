# SPDX-License-Identifier: Apache-2.0
"""Why the module instance's forward is wrapped: on megatron-core 0.12.1 an override of ``_forward_impl`` is ignored."""

import pytest
import torch
from megatron.core import package_info
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig

from bitcpm_megatron import QuantizerConfig, apply_recipe, dequantize, quantize
from bitcpm_megatron.tensor_parallel import probe

pytestmark = pytest.mark.usefixtures("single_rank")
DEFAULT = QuantizerConfig()
ASSIGNS_FORWARD_IMPL = (package_info.MAJOR, package_info.MINOR) == (0, 12)


def wq(weight: torch.Tensor) -> torch.Tensor:
    return dequantize(*quantize(weight, DEFAULT), DEFAULT, weight.dtype)


class OverridesForwardImpl(ColumnParallelLinear):
    """The quantizer as a method override: the obvious way, which trains in full precision on 0.12.1."""

    def _forward_impl(self, input, weight, *args, **kwargs):  # noqa: A002
        return super()._forward_impl(input, wq(weight), *args, **kwargs)


def layer(kind: type, **more) -> torch.nn.Module:
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4)
    return kind(64, 64, config=config, init_method=torch.nn.init.xavier_normal_, bias=False, **more)


def test_an_override_of_forward_impl_depends_on_the_version() -> None:
    module = layer(OverridesForwardImpl)
    x = torch.randn(3, 1, 64)
    y = module(x)[0]
    assert torch.equal(y, x @ (module.weight if ASSIGNS_FORWARD_IMPL else wq(module.weight)).t())


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
def test_ours_does_not(kind: type, requires_grad: bool) -> None:
    more = {"input_is_parallel": True, "skip_bias_add": True} if kind is RowParallelLinear else {}
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"linear_fc": layer(kind, **more)})})
    module = model["mlp"]["linear_fc"]
    module.weight.requires_grad_(requires_grad)
    apply_recipe(model, default=DEFAULT)
    x = torch.randn(3, 1, 64)
    for _ in range(2):
        assert torch.equal(module(x)[0], x @ wq(module.weight).t())
    assert probe(model) == 1

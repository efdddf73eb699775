# SPDX-License-Identifier: Apache-2.0
"""Comparison of weights quantized together with the reference: any shapes, group sizes and dtypes, in place or not."""

from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st

from bitcpm_megatron.ops import quantize_in_place
from bitcpm_megatron.quantization import WEIGHT_DTYPES, QuantizerConfig, quantize_dequantize

OP = torch.ops.bitcpm.fake_quantize_all
TERNARY = QuantizerConfig()


@dataclass(frozen=True)
class Latent:
    """A random weight: ``rows`` rows of ``groups`` groups, or of one group of ``columns`` elements (group size -1)."""

    rows: int
    groups: int
    group_size: int
    columns: int
    dtype: torch.dtype
    exponent: int
    special: float
    seed: int

    def tensor(self, device: str = "cpu") -> torch.Tensor:
        columns = self.columns if self.group_size == -1 else self.groups * self.group_size
        g = torch.Generator().manual_seed(self.seed)
        weight = torch.randn(self.rows, columns, generator=g) * 2.0**self.exponent
        weight.view(-1)[self.seed % weight.numel()] = self.special
        return weight.to(device, self.dtype)


LATENTS = st.lists(
    st.builds(
        Latent,
        rows=st.integers(1, 9),
        groups=st.integers(1, 3),
        group_size=st.sampled_from([-1, -1, 32, 64, 96, 128, 256]),
        columns=st.integers(1, 700),
        dtype=st.sampled_from(WEIGHT_DTYPES),
        exponent=st.integers(-40, 12),
        special=st.sampled_from([1.0, 0.0, -0.0, 1e-40, -6e-8, 65504.0, float("inf"), float("nan")]),
        seed=st.integers(0, 2**32 - 1),
    ),
    min_size=1,
    max_size=7,
)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Returns whether two tensors are equal bit for bit, except that any NaN equals any other."""
    integer = torch.int32 if found.dtype == torch.float32 else torch.int16
    found, expected = (t.cpu().contiguous() for t in (found, expected))
    same = (found.view(integer) == expected.view(integer)) | (found.isnan() & expected.isnan())
    return found.dtype == expected.dtype and found.shape == expected.shape and bool(same.all())


def check_together(latents: list[Latent], config: QuantizerConfig = TERNARY, device: str = "cpu") -> None:
    """Checks weights quantized together, in place and out of place, by the backend for the device."""
    sizes = [latent.group_size for latent in latents]
    expected = [
        quantize_dequantize(latent.tensor(), replace(config, group_size=size))
        for latent, size in zip(latents, sizes, strict=True)
    ]
    weights = [latent.tensor(device) for latent in latents]
    elsewhere = [torch.full_like(w, 7.0) for w in weights]
    scales = [torch.full(s.shape, 7.0, dtype=s.dtype, device=device) for _, s in expected]
    how = (config.eps, config.statistic, config.scale_multiplier)
    OP(weights, elsewhere, scales, config.space, sizes, *how)
    for latent, weight in zip(latents, weights, strict=True):
        assert same_bits(weight, latent.tensor()), (latent, "a weight changed that is quantized elsewhere")
    places = [weight.data_ptr() for weight in weights]
    own = quantize_in_place(weights, config, sizes)
    assert places == [weight.data_ptr() for weight in weights]
    for quantized, made in ((elsewhere, scales), (weights, own)):
        for latent, q, s, (values, theirs) in zip(latents, quantized, made, expected, strict=True):
            assert same_bits(s, theirs), (latent, "scales")
            assert same_bits(q, values), (latent, "quantized weight")

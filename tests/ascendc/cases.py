# SPDX-License-Identifier: Apache-2.0
"""The test cases of the AscendC kernels, and the checks that must hold in each of them."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from ascendc import golden
from ascendc.emulator import Counters, Emulator, Weight

from bitcpm_megatron.quantization import SPACES, QuantizerConfig, pack, packed_size, quantize_dequantize, unpack

EPS = 1e-5
OTHER_EPS = 3e-3
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STATISTICS_BYTES = 512
# (rows, columns, group): several groups per tile, groups that span tiles, single rows, tails of every kind.
SHAPES = (
    (1, 32, 32),
    (1, 128, 128),
    (3, 64, 32),
    (7, 96, 32),
    (5, 160, 32),
    (33, 256, 32),
    (2, 192, 64),
    (35, 1024, 64),
    (4, 192, 96),
    (3, 320, 160),
    (2, 384, 128),
    (9, 1024, 128),
    (2, 512, 256),
    (2, 1024, 512),
    (11, 1024, 256),
    (3, 1024, 1024),
    (2, 1280, 640),
    (2, 2112, 1056),
    (2, 2816, 2816),
    (3, 2016, 2016),
    (3, 4096, 4096),
    (1, 1, 1),
    (2, 17, 17),
    (3, 33, 33),
    (2, 100, 100),
    (2, 4100, 4100),
    (2, 4224, 4224),
    (1, 10240, 5120),
    (1, 4513, 4513),
)
LARGE = ((1, 32768, 32768), (1, 33001, 33001), (2, 70016, 70016))
# The row has more than 64 ** 3 elements, so that its partial sums are folded three times.
LONGEST = (1, 300_001, 300_001)
MODES = (
    {},
    {"pack": True},
    {"given": True},
    {"pack": True, "count": True},
    {"compare": True},
    {"count": True},
    {"given": True, "pack": True, "compare": True},
    {"unpack": True},
)
VALUES = (
    "gaussian",
    "ties",
    "zeros",
    "tiny",
    "below eps",
    "small",
    "huge",
    "signed zeros",
    "constant",
    "mixed",
    "not finite",
)
CORES = (1, 3, 40)
OTHER_SPACES = tuple(name for name in SPACES if name != "ternary")
# (statistic, multiplier); None stands for the space's own.
SCALES = ((None, None), ("absmean", 1.25), ("absmean", 2.0), ("absmax", 1.0), ("absmax", 0.4))


@dataclass(frozen=True)
class Case:
    """One launch of one weight.

    Attributes:
        shape: the rows and columns of the weight.
        group: the number of elements per scale.
        dtype: the dtype of the weight.
        mode: what the launch does in addition to quantizing, or instead of it: keys of one of :data:`MODES`.
        values: the kind of values of the weight, one of :data:`VALUES` or "infinite".
        cores: the number of emulated cores.
        late: whether emulated copies (DMA) take place as late as possible.
        seed: the seed of the values.
        eps: the lower bound of scales.
        space: the quantization space.
        scale: the statistic and the multiplier of scales; None stands for the space's own.
    """

    shape: tuple[int, int]
    group: int
    dtype: torch.dtype
    mode: tuple[str, ...]
    values: str
    cores: int
    late: bool
    seed: int
    eps: float = EPS
    space: str = "ternary"
    scale: tuple[str | None, float | None] = ("absmean", 1.0)

    @property
    def config(self) -> QuantizerConfig:
        """The quantizer; a row of a length that is not a multiple of 32 can be a group only as a whole row (-1)."""
        group = -1 if self.group == self.shape[1] else self.group
        return QuantizerConfig(self.space, group, self.eps, *self.scale)


def all_cases() -> Iterator[Case]:
    """Yields every shape, dtype and mode, each with two choices of values, cores and DMA timing."""
    turn = itertools.count()
    for (rows, columns, group), dtype, mode, _ in itertools.product(SHAPES, DTYPES, MODES, range(2)):
        i = next(turn)
        values, cores = VALUES[i % len(VALUES)], CORES[i // 2 % len(CORES)]
        yield Case((rows, columns), group, dtype, tuple(mode), values, cores, i // 3 % 2 == 1, i)
    for (rows, columns, group), dtype, mode in itertools.product(LARGE, DTYPES, (MODES[0], MODES[5])):
        i = next(turn)
        yield Case((rows, columns), group, dtype, tuple(mode), "gaussian", 2, i % 2 == 1, i)
    for dtype in DTYPES:
        i = next(turn)
        yield Case(LONGEST[:2], LONGEST[2], dtype, (), "gaussian", 2, i % 2 == 1, i)
    yield from _other_quantizers(turn)


def _other_quantizers(turn: Iterator[int]) -> Iterator[Case]:
    """Yields every shape and dtype in spaces other than ternary, and in ternary with scales other than the mean."""
    chance = random.Random(0)

    def case(shape: tuple[int, int, int], dtype: torch.dtype, space: str, mode: tuple[str, ...], values: str) -> Case:
        i = next(turn)
        late, scale = chance.random() < 0.5, chance.choice(SCALES[1:] if space == "ternary" else SCALES)
        return Case(shape[:2], shape[2], dtype, mode, values, chance.choice(CORES), late, i, EPS, space, scale)

    own = [tuple(mode) for mode in MODES if not {"given", "unpack"} & mode.keys()]
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        for mode in ((), ("given",)):
            yield case(shape, dtype, chance.choice(OTHER_SPACES), mode, chance.choice((*VALUES, "infinite")))
        yield case(shape, dtype, "ternary", chance.choice(own), chance.choice(VALUES))
    for shape, dtype in itertools.product((*LARGE, LONGEST), DTYPES):
        yield case(shape, dtype, chance.choice(list(SPACES)), (), "gaussian")


def grouped_cases() -> Iterator[list[Case]]:
    """Yields launches over several weights, small and large, for both kernels, with several modes and scales.

    Each launch begins with a different weight, so that the size of the first one is sometimes a power of two and
    sometimes not, in both kernels.
    """
    shapes = (
        (3, 96, 96),
        (33, 256, 32),
        (2, 2112, 1056),
        (3, 33, 33),
        (9, 1024, 128),
        (6, 16, 16),
        (2, 4224, 4224),
        (1, 128, 128),
    )
    modes = (("compare",), (), ("given",), ("pack", "count"), ("count",))
    turn = itertools.count(10_000)
    for first, (dtype, cores, late) in enumerate(itertools.product(DTYPES, (1, 5, 40), (False, True))):
        weights, others = [], []
        space = OTHER_SPACES[first % len(OTHER_SPACES)]
        for k in range(len(shapes)):
            rows, columns, group = shapes[(first + k) % len(shapes)]
            i = next(turn)
            mode, values = modes[i % len(modes)], "below eps" if k % 3 == 1 else VALUES[i % len(VALUES)]
            eps = EPS if (first + k) % 2 else OTHER_EPS
            weights.append(Case((rows, columns), group, dtype, mode, values, cores, late, i, eps))
            mode, scale = ("given",) if i % 5 == 2 else (), SCALES[(first + k) % len(SCALES)]
            others.append(Case((rows, columns), group, dtype, mode, values, cores, late, i, eps, space, scale))
        yield weights
        yield others
        yield [
            Case(shape[:2], shape[2], dtype, ("unpack",), "gaussian", cores, late, next(turn)) for shape in shapes[1:7]
        ]


def make_values(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Returns the latent weight of a case."""
    rows, columns = case.shape
    w = torch.randn(rows, columns, generator=generator)
    largest = 60000.0 if case.dtype == torch.float16 else 1e30
    if case.values == "ties":
        # With given scales s of 1, half of the magnitudes are equal to s/2 or next to it, on either side.
        near = torch.tensor([0.5, -0.5, 1.0, -1.0] if case.space == "ternary" else SPACES[case.space].thresholds)
        picked = near[torch.randint(0, len(near), case.shape, generator=generator)]
        return beside(picked.to(case.dtype), generator)
    if case.values == "zeros":
        w.zero_()
    elif case.values == "tiny":
        w *= 1e-40 if case.dtype == torch.float32 else 1e-7
    elif case.values == "below eps":
        # The mean is below the bound eps, and some of the values are above eps / 2, or next to it.
        steps = torch.tensor([0.0, 0.2, 0.4997, 0.5003, 0.7])
        w = torch.sign(w) * steps[torch.randint(0, len(steps), case.shape, generator=generator)] * case.eps
    elif case.values == "small":
        w *= 3e-5
    elif case.values == "huge":
        w = w.clamp(-1, 1) * largest
    elif case.values == "signed zeros":
        w = torch.where(w > 0.3, w, torch.tensor(-0.0))
    elif case.values == "constant":
        w = torch.full(case.shape, -0.02)
    elif case.values == "infinite":
        most = torch.finfo(case.dtype).max
        w = torch.tensor([most, -most, torch.inf, -torch.inf])[torch.randint(0, 4, case.shape, generator=generator)]
    elif case.values == "mixed":
        w *= torch.logspace(-6, 3, columns)
        w[:, : columns // 2] = 0
    w = w.to(case.dtype)
    if case.values == "not finite":
        places = torch.randint(0, w.numel(), (max(1, rows // 2),), generator=generator)
        bad = torch.tensor([float("nan"), float("inf"), float("-inf")]).to(case.dtype)
        w.view(-1)[places] = bad[torch.randint(0, 3, places.shape, generator=generator)]
    return w


def beside(w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns each value or one of its two neighbors in its dtype; the neighbors of zero are taken to be +-2**-20."""
    integer = torch.int32 if w.dtype == torch.float32 else torch.int16
    steps = torch.randint(-1, 2, w.shape, generator=generator).to(integer)
    return torch.where(w == 0, steps.to(w.dtype) * 2.0**-20, (w.view(integer) + steps).view(w.dtype))


def make_weight(case: Case) -> Weight:
    """Returns the weight of a case, with everything that its mode asks for."""
    generator = torch.Generator().manual_seed(case.seed)
    rows, columns = case.shape
    latent = make_values(case, generator)
    scales = previous = None
    if "given" in case.mode or "unpack" in case.mode:
        scales = torch.exp2(torch.randint(-6, 7, (rows, columns // case.group), generator=generator).float())
        scales *= 1 + torch.rand(scales.shape, generator=generator)
        if case.values == "ties":
            scales = torch.ones_like(scales)
        if case.values == "infinite":
            # 1.5 times the largest scale overflows fp32, so that an infinite weight is equal to an infinite threshold.
            scales = torch.where(scales > 1, 3e38, 1.0)
        if case.values == "tiny":
            # These scales are halfway between two subnormal fp16 values.
            scales = (2 * torch.randint(0, 16, scales.shape, generator=generator) + 1) * 2.0**-25
        scales = scales.to(torch.bfloat16)
        if case.values == "not finite":
            scales.view(-1)[-1] = float("inf") if case.seed % 2 else float("nan")
    if "compare" in case.mode or "unpack" in case.mode:
        previous = pack(torch.randint(-1, 2, case.shape, generator=generator).to(torch.int8))
    if "unpack" in case.mode:
        return Weight(None, case.group, scales, previous=previous, shape=case.shape, dtype=case.dtype)
    pack_too, count = "pack" in case.mode, "count" in case.mode
    return Weight(latent, case.group, scales, case.config, pack=pack_too, count=count, previous=previous)


def check(case: Case, weight: Weight) -> None:
    """Checks the results of a case.

    Raises:
        AssertionError: if a result is wrong; it names the result.
    """
    columns = case.shape[1]
    if weight.latent is None:
        codes = unpack(weight.previous, columns)
        assert golden.same_bits(weight.quantized, golden.values(codes, weight.scales, case.dtype)), "unpacked values"
        return

    if not weight.given:
        scale = case.config.statistic, case.config.scale_multiplier
        assert golden.same_bits(weight.scales, golden.own_scales(weight.latent, case.group, case.eps, *scale)), "scales"
        check_scales(weight, case)
    assert not torch.signbit(weight.quantized[weight.quantized == 0]).any(), "-0.0"
    expected = quantize_dequantize(weight.latent, case.config, weight.scales)[0]
    assert golden.same_bits(weight.quantized, expected), "the reference quantizer with these scales"
    if case.space != "ternary":
        return
    codes = golden.codes(weight.latent, weight.scales)
    assert golden.same_bits(weight.quantized, golden.quantized(weight.latent, weight.scales)), "quantized weight"

    if weight.packed is not None:
        assert torch.equal(weight.packed, pack(codes)), "packed codes"
    if weight.statistics is not None:
        assert weight.nonzeros == int((codes != 0).sum()), "count of codes that are not zero"
    changes = 0
    if weight.previous is not None:
        changes = int((codes != unpack(weight.previous, columns)).sum())
    if weight.statistics is not None:
        assert weight.changes == changes, "count of changed codes"


def check_bytes(case: Case, weight: Weight, counters: Counters) -> None:
    """Checks that everything is read once and written once, except for rows that do not fit, which are read twice.

    Raises:
        AssertionError: if a number of bytes is wrong; it names the number.
    """
    rows, columns = case.shape
    element = weight.quantized.element_size()
    scale_bytes = 2 * rows * (columns // case.group)
    code_bytes = rows * packed_size(columns)
    written = element * rows * columns
    if weight.latent is None:
        assert counters.read_bytes == code_bytes + scale_bytes, "bytes read"
        assert counters.written_bytes == written, "bytes written"
        return
    twice = columns > (40_000 if case.dtype == torch.float32 else 80_000) and not weight.given
    read = element * rows * columns * (2 if twice else 1) + (scale_bytes if weight.given else 0)
    read += code_bytes if weight.previous is not None else 0
    written += 0 if weight.given else scale_bytes
    written += code_bytes if weight.packed is not None else 0
    assert counters.read_bytes == read, f"{counters.read_bytes} bytes read, not {read}"
    slots = counters.written_bytes - written
    if weight.statistics is None:
        assert slots == 0, f"{counters.written_bytes} bytes written, not {written}"
    else:
        assert slots % STATISTICS_BYTES == 0 and 0 < slots <= case.cores * STATISTICS_BYTES, "bytes of statistics"


def check_scales(weight: Weight, case: Case) -> None:
    """Checks that the scales equal the reference quantizer's, and means torch's own, which adds in another order."""
    rows, columns = case.shape
    expected = quantize_dequantize(weight.latent, case.config)[1]
    assert golden.same_bits(weight.scales, expected), "the reference quantizer's scales"
    finite = expected.isfinite()
    if case.config.statistic != "absmean":
        return
    mean = golden.means(weight.latent, case.group)[finite]
    groups = weight.latent.float().reshape(rows, columns // case.group, case.group)
    torch_mean = groups.abs().mean(-1)[finite]
    ulps = (mean.view(torch.int32) - torch_mean.view(torch.int32)).abs()
    assert (ulps <= 4).all(), f"a mean is {ulps.max()} ulp off"


def run(emulator: Emulator, case: Case) -> tuple[Weight, Counters]:
    """Runs and checks one case."""
    weight = make_weight(case)
    counters = emulator.run([weight], case.cores, case.late)
    check(case, weight)
    check_bytes(case, weight, counters)
    return weight, counters


def run_grouped(emulator: Emulator, group: list[Case]) -> tuple[list[Weight], Counters]:
    """Runs one launch over several weights and checks each."""
    weights = [make_weight(case) for case in group]
    counters = emulator.run(weights, group[0].cores, group[0].late)
    for case, weight in zip(group, weights, strict=True):
        check(case, weight)
    return weights, counters

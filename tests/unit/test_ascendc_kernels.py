# SPDX-License-Identifier: Apache-2.0
"""Tests of the AscendC kernels, emulated on a CPU: values against torch, strictness of the emulator, tiling.

The emulator, its cases and the mutation test are in ``tests/ascendc``. ``make kernel-test`` runs all mutants; the
tests here run a sample.
"""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ascendc import campaign, cases, golden, mutants, values
from ascendc.emulator import FLAGS, LANES, SOURCES, Counters, EmulationError, Emulator, Weight, library_name
from ascendc.mutants import PLANTED

from bitcpm_megatron.quantization import SPACES, QuantizerConfig, pack, packed_size, quantize_dequantize
from bitcpm_megatron.quantization.spaces import TERNARY

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")

EPS = 1e-5
FIVE_VALUE = QuantizerConfig("five-value")
ALL_CASES = list(cases.all_cases())
SHAPES = sorted({c.shape + (c.group,) for c in ALL_CASES})
HEADER_WORDS, CUT_WORDS, ENTRY_WORDS = 18, 2, 23  # op_host/table.h


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Uses one thread, because tensors are so small that a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------------------------------------------------ values


def test_there_are_enough_cases() -> None:
    assert len(ALL_CASES) >= 1000
    assert {c.late for c in ALL_CASES} == {True, False}
    assert {c.values for c in ALL_CASES} == {*cases.VALUES, "infinite"}
    others = [c for c in ALL_CASES if c.space != "ternary"]
    assert {(c.space, c.scale) for c in others} == set(itertools.product(cases.OTHER_SPACES, cases.SCALES))
    assert {(c.space, c.dtype, c.mode) for c in others} == set(
        itertools.product(cases.OTHER_SPACES, cases.DTYPES, ((), ("given",)))
    )
    assert {c.scale for c in ALL_CASES if c.space == "ternary"} == {("absmean", 1.0), *cases.SCALES[1:]}


@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.verifies(
    "quantizer",
    "the AscendC kernels, run in a strict emulator, equal the reference bit for bit, and the tests catch bugs "
    "planted in the kernels ([kernels](kernels.md))",
    cpu="yes, emulated",
    cuda="-",
)
def test_every_mode_of_a_shape(emulator: Emulator, rows: int, columns: int, group: int) -> None:
    chosen = [c for c in ALL_CASES if (*c.shape, c.group) == (rows, columns, group)]
    assert chosen
    for case in chosen:
        try:
            cases.run(emulator, case)
        except (AssertionError, EmulationError) as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("group", [64, 1024, 2816, 5000])
def test_a_scale_depends_on_its_segment_alone(emulator: Emulator, group: int) -> None:
    # The sums are at the midpoint of two bf16 values, so that any other order of addition would be noticed.
    w = gaussian(8, group, torch.float32, 5).abs()
    target = torch.tensor(0x3F808000, dtype=torch.int32).view(torch.float32)
    w *= target / golden.means(w, group)
    whole = Weight(w, group)
    emulator.run([whole], 3)
    for row in range(8):
        alone = Weight(w[row : row + 1].contiguous(), group)
        emulator.run([alone], 1, late=True)
        assert torch.equal(alone.scales, whole.scales[row : row + 1])
        assert torch.equal(alone.quantized, whole.quantized[row : row + 1])


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_grouped_launches(emulator: Emulator, dtype: torch.dtype) -> None:
    for group in cases.grouped_cases():
        if group[0].dtype == dtype:
            cases.run_grouped(emulator, group)


def test_one_grouped_launch_gives_what_single_ones_give(emulator: Emulator) -> None:
    shapes = [
        (7, 256, 32),
        (3, 96, 96),
        (2, 2112, 1056),
        (2, 6000, 6000),
        (1, 33001, 33001),
        (40, 1024, 128),
        (1, 1, 1),
    ]
    weights, alone = [], []
    for i, (rows, columns, group) in enumerate(shapes):
        latent = gaussian(rows, columns, seed=i)
        scales = golden.own_scales(latent, group, EPS) * 2 if i % 3 == 1 else None
        previous = pack(golden.codes(latent, golden.own_scales(latent, group, EPS) * 4)) if i % 2 else None
        for target in (weights, alone):
            target.append(Weight(latent, group, scales, pack=i % 4 == 1, count=i % 4 == 2, previous=previous))
    for cores, late in itertools.product((1, 5, 48), (False, True)):
        counters = emulator.run(weights, cores, late)
        assert counters.launches == 2
        for together, single in zip(weights, alone, strict=True):
            emulator.run([single], 2)
            assert golden.same_bits(together.quantized, single.quantized)
            assert golden.same_bits(together.scales, single.scales)
            assert single.packed is None or torch.equal(together.packed, single.packed)
            if single.statistics is not None:
                assert (together.nonzeros, together.changes) == (single.nonzeros, single.changes)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_weights_where_they_stand(emulator: Emulator, dtype: torch.dtype) -> None:
    """All shapes are quantized in place; the emulator fails if a byte is read by another core, or after a store."""
    shapes = [*cases.SHAPES, *cases.LARGE]
    for cores, late in itertools.product((1, 5, 40), (False, True)):
        latent = [gaussian(rows, columns, dtype, seed=i) for i, (rows, columns, _) in enumerate(shapes)]
        apart = [Weight(w.clone(), group) for w, (*_, group) in zip(latent, shapes, strict=True)]
        weights = [Weight(w, group) for w, (*_, group) in zip(latent, shapes, strict=True)]
        for weight in weights:
            weight.quantized = weight.latent
        assert emulator.run(weights, cores, late).launches == 2
        emulator.run(apart, 3)
        for weight, other in zip(weights, apart, strict=True):
            assert golden.same_bits(weight.quantized, other.quantized)
            assert golden.same_bits(weight.scales, other.scales)


def test_the_emulation_watches_weights_that_are_quantized_where_they_stand(emulator: Emulator) -> None:
    latent = gaussian(2, 8192)
    in_place = Weight(latent, 8192)
    in_place.quantized = latent
    with pytest.raises(EmulationError, match="a global byte is read after it was stored"):
        emulator.run([in_place, in_place], 1)
    # The tile kernel runs first, and its only core reads the row that the row kernel's second core stores.
    other = Weight(latent[1:].view(256, 32), 32)
    with pytest.raises(EmulationError, match="stored by another core than the one that reads it"):
        emulator.run([in_place, other], 2)


def test_what_is_packed_unpacks_to_the_same_weight(emulator: Emulator) -> None:
    for dtype, (rows, columns, group) in itertools.product(
        cases.DTYPES, [(5, 192, 32), (3, 384, 384), (2, 5000, 5000)]
    ):
        made = Weight(gaussian(rows, columns, dtype), group, pack=True)
        emulator.run([made])
        back = Weight(None, group, made.scales, previous=made.packed, shape=(rows, columns), dtype=dtype)
        emulator.run([back])
        assert golden.same_bits(back.quantized, made.quantized)


def test_against_the_reference_quantizer_over_many_groups(emulator: Emulator) -> None:
    latent = gaussian(64, 4096, seed=9)
    for group in (32, 128, 4096):
        w = Weight(latent, group)
        emulator.run([w], 40)
        quantized, scales = quantize_dequantize(latent, QuantizerConfig(group_size=group))
        steps = (w.scales.view(torch.int16) - scales.view(torch.int16)).abs()
        assert steps.max() <= 1 and (steps == 0).float().mean() > 0.999
        same = (steps == 0).repeat_interleave(group, 1)
        assert torch.equal(w.quantized[same], quantized[same])


@pytest.mark.slow
def test_every_quantizer_is_the_reference(emulator: Emulator) -> None:
    fewest, ties = values.check_all(emulator)
    assert len(values.quantizers()) == 30 and fewest >= 300_000 and ties >= 30_000


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_a_table_of_the_ternary_levels_gives_the_ternary_weight(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """The kernels' two methods, from the bits of the scale and by a product with it, give the same weight."""
    latent = gaussian(6, 2112, dtype, 11)
    latent[0, 0], latent[1, 7] = torch.inf, torch.nan
    for group, scale in itertools.product((32, 1056), (None, 0.75)):
        scales = None if scale is None else torch.full((6, 2112 // group), scale).bfloat16()
        short = Weight(latent, group, scales)
        emulator.run([short])
        monkeypatch.setitem(SPACES, "a table", replace(TERNARY, name="a table"))
        config = QuantizerConfig("a table", statistic="absmean", scale_multiplier=1.0)
        long = Weight(latent, group, scales, config)
        emulator.run([long])
        assert golden.same_bits(long.scales, short.scales) and golden.same_bits(long.quantized, short.quantized)


# ------------------------------------------------------------------------------------------------------------ tiling


def check_plan(weights: list[Weight], launches: list, cores: int) -> None:
    """Asserts that every tile is assigned to exactly one core, in shares that differ by less than two tiles."""
    for kernel, blocks, ub_bytes, table in launches:
        assert 1 <= blocks <= cores and ub_bytes <= 192 * 1024 - 8 * 1024 - 256
        count = table[0]
        cuts = [table[HEADER_WORDS + 2 * k : HEADER_WORDS + 2 * k + 2] for k in range(blocks + 1)]
        at = HEADER_WORDS + CUT_WORDS * (blocks + 1)
        assert len(table) == at + count * ENTRY_WORDS
        entries = [table[at + i * ENTRY_WORDS : at + (i + 1) * ENTRY_WORDS] for i in range(count)]
        starts = [e[12] for e in entries]
        assert starts == [sum(e[13] for e in entries[:i]) for i in range(count)]
        total = starts[-1] + entries[-1][13]
        assert cuts[0] == [0, 0] and cuts[-1][0] == total
        share = sum(e[13] * e[19] * e[15] for e in entries) / blocks
        largest = max(e[19] * e[15] for e in entries)
        for (begin, weight), (end, _) in itertools.pairwise(cuts):
            assert begin <= end
            if begin < end:
                assert starts[weight] <= begin < starts[weight] + entries[weight][13]
            sizes = [e[19] * e[15] for e in entries for _ in range(e[13])][begin:end]
            assert sum(sizes) <= share + 2 * largest, kernel
    assert sum(table[0] for *_, table in launches) == len(weights)


@pytest.mark.parametrize("cores", [1, 2, 40, 48])
def test_plans_cover_everything_once(emulator: Emulator, cores: int) -> None:
    layers = [
        (3072, 1024, 128),
        (1024, 1024, 128),
        (5632, 1024, 128),
        (1024, 2816, 2816),
        (64, 33, 33),
        (8, 20000, 20000),
    ]
    for dtype in cases.DTYPES:
        weights = [Weight(torch.zeros(rows, columns, dtype=dtype), group) for rows, columns, group in layers]
        check_plan(weights, emulator.plan(weights, cores), cores)
        check_plan(weights[:1], emulator.plan(weights[:1], cores), cores)


def test_the_plan_knows_what_the_kernel_allocates(emulator: Emulator) -> None:
    for case in ALL_CASES:
        if case.seed % 7 == 0:
            weight = cases.make_weight(case)
            ((_, _, planned, _),) = emulator.plan([weight], case.cores)
            assert emulator.run([weight], case.cores).ub_bytes == planned


def test_rows_stay_in_ub_up_to_32768(emulator: Emulator) -> None:
    for dtype, columns in itertools.product(cases.DTYPES, (4097, 8192, 32768)):
        previous = torch.full((1, packed_size(columns)), 0x55, dtype=torch.uint8)
        for extra in ({}, {"pack": True, "count": True, "previous": previous}, {"config": FIVE_VALUE}):
            w = Weight(torch.zeros(1, columns, dtype=dtype), columns, **extra)
            ((kernel, _, _, table),) = emulator.plan([w])
            assert kernel == "rows" and table[-ENTRY_WORDS + 14] & 32, (dtype, columns)


@pytest.mark.parametrize(
    ("shape", "group", "extra", "message"),
    [
        ((2, 96), 64, {}, r"groups of 64 do not divide"),
        ((1, 1_044_481), 1_044_481, {}, r"at most 1044480"),
        ((1, 3 * 4128), 4128, {"pack": True}, r"packed codes with groups of 4128.*multiple of 128"),
        ((1, 2 * 2080), 2080, {"pack": True}, r"packed codes with groups of 2080.*at most 1024"),
        (
            (1, 96),
            96,
            {"count": True, "config": FIVE_VALUE},
            r"packing, unpacking and counting know ternary codes alone",
        ),
    ],
)
def test_what_cannot_be_planned_says_why(
    emulator: Emulator, shape: tuple[int, int], group: int, extra: dict, message: str
) -> None:
    w = Weight(torch.zeros(shape, dtype=torch.bfloat16), group, torch.zeros(1, 1, dtype=torch.bfloat16), **extra)
    with pytest.raises(EmulationError, match=r"^\[plan\] .*" + message):
        emulator.run([w])
    with pytest.raises(EmulationError, match=message):
        emulator.plan([w])


# -------------------------------------------------------------------------------------------------------- strictness


def test_bytes_moved_are_in_and_out_and_scales(emulator: Emulator) -> None:
    counters: Counters = emulator.run([Weight(gaussian(96, 2048), 128)], 40)
    assert counters.read_bytes == 96 * 2048 * 2
    assert counters.written_bytes == 96 * 2048 * 2 + 96 * 16 * 2


@pytest.mark.parametrize(
    ("config", "cost"),
    [
        (QuantizerConfig(), (24, 930, 16)),
        (QuantizerConfig(scale_multiplier=1.5), (25, 931, 17)),
        (QuantizerConfig(statistic="absmax"), (28, 1060, 18)),
        (QuantizerConfig("five-value", statistic="absmean"), (45, 2300, 32)),
        (FIVE_VALUE, (50, 2431, 35)),
    ],
    ids=lambda given: given.space if isinstance(given, QuantizerConfig) else None,
)
def test_what_a_tile_costs(emulator: Emulator, config: QuantizerConfig, cost: tuple[int, int, int]) -> None:
    """Instructions, steps and barriers are those of docs/kernels.md; other quantizers do not make ternary slower."""
    once, twice = (emulator.run([Weight(gaussian(8 * n, 1024), 128, config=config)], 1) for n in (1, 2))
    names = ("instructions", "repeats", "barriers")
    assert tuple(getattr(twice, name) - getattr(once, name) for name in names) == cost


def test_statistics_have_a_slot_per_core(emulator: Emulator) -> None:
    w = Weight(torch.ones(64, 1024, dtype=torch.bfloat16), 128, count=True)
    emulator.run([w], 3)
    assert w.nonzeros == 64 * 1024 and (w.statistics[:, :LANES].sum(1) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["barrier", "queue", "call", "condition"])
def test_a_sample_of_mutants_is_caught(mutant_run: campaign.MutantRun, kind: str) -> None:
    known = campaign.reasons()
    killable = [m for m in mutant_run.mutants if m.kind == kind and m.key not in known]
    sample = killable[:: max(1, len(killable) // 8)][:8]
    assert len(sample) >= 5
    found = mutant_run.run(sample, jobs=2)
    assert not [m.key for m in sample if not found[m]]
    if kind == "barrier":
        assert set(found.values()) == {"hazard"}


@pytest.mark.slow
def test_every_planted_bug_is_caught_by_its_results(mutant_run: campaign.MutantRun) -> None:
    planted = [m for m in mutant_run.mutants if m.kind == "planted"]
    assert len(planted) == len(PLANTED) >= 8
    assert {m.after: found for m, found in mutant_run.run(planted, jobs=2).items()} == dict.fromkeys(
        (m.after for m in planted), "result"
    )


def test_a_planted_bug_that_no_longer_fits_the_sources_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mutants, "PLANTED", (*PLANTED, ("Sum", "sums = 17", "sums = 18")))
    with pytest.raises(
        ValueError, match=f"{len(PLANTED)} of {len(PLANTED) + 1} planted bugs fit the kernel sources: adapt"
    ):
        mutants.generate(SOURCES, tmp_path)


@pytest.fixture(scope="module")
def mutant_run(emulator: Emulator) -> campaign.MutantRun:
    torch.set_num_threads(1)
    launches = campaign.all_launches()
    half = [g for i, g in enumerate(launches) if i % 2 == 0 or len(g) > 1 or g[0].shape == cases.LONGEST[:2]]
    return campaign.MutantRun(campaign.run_cases(emulator, half))


def test_a_changed_source_is_a_new_build(tmp_path) -> None:
    copy = tmp_path / "ascendc"
    shutil.copytree(SOURCES, copy)
    assert library_name(copy, FLAGS) == library_name(SOURCES, FLAGS) != library_name(SOURCES, [*FLAGS, "-g"])
    header = copy / "op_host" / "table.h"
    header.write_text(header.read_text() + "// changed\n")
    assert library_name(copy, FLAGS) != library_name(SOURCES, FLAGS)

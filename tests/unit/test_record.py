# SPDX-License-Identifier: Apache-2.0
"""Tests of the quantizer record, and of the checkpoint directory that contains it."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from bitcpm_megatron import QuantizerConfig, apply_recipe
from bitcpm_megatron.checkpoints.compatibility import check_quantizer
from bitcpm_megatron.checkpoints.directory import CheckpointError, latest, publish_checkpoint, recover
from bitcpm_megatron.parallel import Recipe
from bitcpm_megatron.quantization.record import FILE_NAME, QuantizerRecord, RecordError

PATH = "decoder.layers.0.mlp.linear_fc1"
RECORD = QuantizerRecord("latent", "ternary", 1e-5, "bfloat16", 2, 16, {PATH: {"group_size": -1}})


def test_written_and_read_again(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    assert QuantizerRecord.read(tmp_path) == RECORD
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]
    assert QuantizerRecord.read(tmp_path / "elsewhere") is None


def test_a_ramp_is_recorded_while_it_lasts(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    assert "ramp" not in json.loads((tmp_path / FILE_NAME).read_text())
    RECORD.check_whole(tmp_path)
    half = dataclasses.replace(RECORD, ramp=0.5)
    half.write(tmp_path)
    assert QuantizerRecord.read(tmp_path) == half != RECORD
    with pytest.raises(RecordError, match="middle of a ramp, whose forward used 0.5 of the quantizer.*Train on"):
        half.check_whole(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a quantizer record: the whole: expected a mapping"),
        ('{"version": 1}', "not a quantizer record: state is missing"),
        ('{"surprise": 1}', "unknown key surprise"),
        ('{"version": 1, "version": 1}', "the key 'version' stands there twice"),
    ],
)
def test_an_unreadable_record_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(RecordError) as caught:
        QuantizerRecord.read(tmp_path)
    assert said in str(caught.value) and FILE_NAME in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state": "liquid"}, "state: expected 'latent', 'fused' or 'packed', got 'liquid'"),
        ({"eps": -1.0}, "eps=-1.0 is not possible"),
        ({"eps": True}, "eps: expected a number, got True"),
        ({"space": "octal"}, "unknown quantization space 'octal'"),
        ({"row_parallel_shards": 0}, "row_parallel_shards: 0: must be 1 to 65536"),
        ({"ramp": 1.5}, "ramp: 1.5: must be at least 0 and at most 1"),
        ({"activation_bits": 4}, "activation_bits: expected 8 or 16, got 4"),
        ({"latent_dtype": "int8"}, "latent_dtype: expected 'float32'"),
        ({"modules": {PATH: {"group_size": 33}}}, f"modules.{PATH}: group_size=33 is not possible"),
        ({"modules": {PATH: {"group_size": -1, "bits": 2}}}, "unknown key modules"),
        ({"modules": {PATH: {}}}, "group_size is missing"),
        ({"modules": [PATH]}, "modules: expected a mapping"),
    ],
)
def test_a_value_that_no_quantizer_has_is_refused(tmp_path: Path, change: dict, said: str) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps({**dataclasses.asdict(RECORD), **change}))
    with pytest.raises(RecordError) as caught:
        QuantizerRecord.read(tmp_path)
    assert said in str(caught.value)


def test_version_1_is_ternary_with_scales_of_absmean(tmp_path: Path) -> None:
    content = dataclasses.asdict(RECORD)
    del content["statistic"], content["scale_multiplier"]
    (tmp_path / FILE_NAME).write_text(json.dumps({**content, "version": 1}))
    assert QuantizerRecord.read(tmp_path) == RECORD
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(RecordError, match="statistic is missing"):
        QuantizerRecord.read(tmp_path)


def test_a_module_says_in_what_its_quantizer_differs(tmp_path: Path) -> None:
    default, five = QuantizerConfig("integer-4"), QuantizerConfig("five-value", 32, scale_multiplier=0.24)
    modules = {"a": QuantizerRecord.of_module(default, default, -1), "b": QuantizerRecord.of_module(five, default, 32)}
    assert modules == {
        "a": {"group_size": -1},
        "b": {"group_size": 32, "space": "five-value", "scale_multiplier": 0.24},
    }
    record = dataclasses.replace(RECORD, space="integer-4", statistic="absmax", scale_multiplier=0.5, modules=modules)
    record.write(tmp_path)
    found = QuantizerRecord.read(tmp_path)
    assert found == record and found.config_of("a") == default and found.config_of("b") == five
    other = dataclasses.replace(record, scale_multiplier=0.25)
    assert record.contradictions(other) == ["a: scale_multiplier 0.5 in the checkpoint, 0.25 asked for"]


def test_what_is_no_file_is_no_missing_record(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    with pytest.raises(RecordError, match="no regular file"):
        QuantizerRecord.read(tmp_path)


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    dataclasses.replace(RECORD, version=99).write(tmp_path)
    with pytest.raises(RecordError, match="version 99 is unknown"):
        QuantizerRecord.read(tmp_path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"row_parallel_shards": 4}, "row_parallel_shards: 2 in the checkpoint, 4 asked for"),
        ({"latent_dtype": "float32"}, "latent_dtype: 'bfloat16' in the checkpoint, 'float32' asked for"),
        ({"eps": 1e-4}, "linear_fc1: eps 1e-05 in the checkpoint, 0.0001 asked for"),
        ({"modules": {PATH: {"group_size": -1, "eps": 0.5}}}, "linear_fc1: eps 1e-05 in the checkpoint, 0.5 asked for"),
        ({"modules": {PATH: {"group_size": 64}}}, "linear_fc1: group_size -1 in the checkpoint, 64 asked for"),
        ({"modules": {}}, "linear_fc1: ternary in the checkpoint, full precision asked for"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, change: dict, line: str) -> None:
    RECORD.write(tmp_path)
    other = dataclasses.replace(RECORD, **change)
    with pytest.raises(CheckpointError) as caught:
        check_quantizer(tmp_path, other, allow_change=False)
    assert line in str(caught.value) and "--allow-quantizer-change" in str(caught.value)
    assert line in check_quantizer(tmp_path, other, allow_change=True)
    assert check_quantizer(tmp_path, RECORD, allow_change=False) == "quantizer: as the checkpoint records"


def test_a_record_is_a_recipe() -> None:
    record = dataclasses.replace(RECORD, modules={PATH: {"group_size": 64, "eps": 0.5}})
    recipe = Recipe.of(record)
    assert recipe.decide(PATH).config == QuantizerConfig(group_size=64, eps=0.5)
    assert recipe.decide(PATH.replace("fc1", "fc2")) is None


def test_a_full_precision_checkpoint_may_start_ternary_training(tmp_path: Path) -> None:
    assert "starting ternary training" in check_quantizer(tmp_path, RECORD, allow_change=False)


def test_the_latest_checkpoint_is_a_complete_one(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    tracker.write_text("12")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        latest(tmp_path)
    directory = tmp_path / "iter_0000012"
    directory.mkdir()
    (directory / "metadata.json").write_text("{}")
    assert latest(tmp_path) == directory
    tracker.write_text("twelve")
    with pytest.raises(CheckpointError, match="'twelve' and not an iteration number"):
        latest(tmp_path)


@pytest.mark.parametrize(("keep", "kept"), [(1, [40]), (2, [30, 40]), (4, [10, 20, 30, 40]), (6, [10, 20, 30, 40])])
def test_only_older_checkpoints_are_deleted(keep, kept, tmp_path: Path) -> None:
    for iteration in (10, 20, 30, 90):
        (tmp_path / f"iter_{iteration:07d}").mkdir()
    # Iteration 90 belongs to an abandoned run; another one continued from iteration 30.
    temporary = tmp_path / ".iter_0000040.incomplete"
    temporary.mkdir()
    (temporary / "metadata.json").write_text("{}")
    publish_checkpoint(temporary, tmp_path / "iter_0000040", keep)
    assert sorted(p.name for p in tmp_path.glob("*iter_*")) == [f"iter_{i:07d}" for i in (*kept, 90)]
    assert latest(tmp_path) == tmp_path / "iter_0000040"


@pytest.mark.parametrize("crash_at", [1, 2, 3])
def test_a_crash_while_a_checkpoint_is_replaced_loses_none(
    crash_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that starts again saves an iteration that the tracker already names, and is killed at a rename."""
    final, temporary = tmp_path / "iter_0000002", tmp_path / ".iter_0000002.incomplete"

    def write(content: str) -> None:
        temporary.mkdir()
        (temporary / "metadata.json").write_text(content)
        publish_checkpoint(temporary, final, None)

    write("old")
    replace, renames = os.replace, []

    def crash(source: Path, target: Path) -> None:
        if Path(source).is_dir():
            renames.append(source)
            if len(renames) == crash_at:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", crash)
    if crash_at < 3:
        with pytest.raises(KeyboardInterrupt):
            write("new")
    else:
        write("new")
    assert len(renames) == min(crash_at, 2), "one aside, one into place"
    monkeypatch.setattr(os, "replace", replace)
    content = (latest(tmp_path) / "metadata.json").read_text()
    assert content == ("old" if crash_at < 3 else "new")
    recover(tmp_path)
    assert (latest(tmp_path) / "metadata.json").read_text() == content
    assert not list(tmp_path.glob(".iter_*"))


def test_a_recipe_of_its_own_eps_is_recorded(single_rank: None) -> None:
    def record(eps: float) -> QuantizerRecord:
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        recipe = {"configs": {"q": {"eps": eps}}, "matchers": {"all": {"config": "q", "pattern": "*"}}}
        default = QuantizerConfig()
        report = apply_recipe(model, Recipe.from_mapping(recipe, default), default=default)
        return report.record(default, "float32")

    assert record(0.5).modules == {"0": {"group_size": -1, "eps": 0.5}}
    assert record(0.5).contradictions(record(1e-5)) == ["0: eps 0.5 in the checkpoint, 1e-05 asked for"]
    assert record(0.5).contradictions(record(0.5)) == []


def test_weights_from_elsewhere_are_announced_with_what_to_expect(tmp_path: Path) -> None:
    ordinary, ternary = tmp_path / "ordinary", tmp_path / "ternary"
    for directory in (ordinary, ternary):
        directory.mkdir()
    RECORD.write(ternary)
    said = check_quantizer(ordinary, RECORD, allow_change=False)
    assert "uniform guessing" in said and "gradient norms" in said and "\n" not in said
    page = Path(__file__).parents[2] / "docs" / "training.md"
    assert "(docs/training.md, From published weights)" in said and "\n## From published weights\n" in page.read_text()
    for checkpoint, wanted in ((ordinary, None), (ternary, RECORD)):
        assert "uniform guessing" not in check_quantizer(checkpoint, wanted, allow_change=False)

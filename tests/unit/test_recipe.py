# SPDX-License-Identifier: Apache-2.0
"""Tests of recipe files: what is read, and what is refused with an error that names the place."""

from pathlib import Path

import pytest
import yaml

from bitcpm_megatron import QuantizerConfig
from bitcpm_megatron.parallel import Recipe, RecipeError

DEFAULT = QuantizerConfig(group_size=128, eps=1e-6)


def read(tmp_path: Path, content: object) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return Recipe.from_yaml(path, DEFAULT)


def test_what_a_config_leaves_out_comes_from_the_default(tmp_path: Path) -> None:
    recipe = read(
        tmp_path,
        {
            "configs": {"fine": {"group_size": 32}, "plain": {}, "keep": "full-precision"},
            "matchers": {
                "a": {"config": "fine", "type": "glob", "pattern": "*fc1", "enabled": True},
                "b": {"config": "keep", "pattern": "*fc2"},
                "c": {"config": "plain", "pattern": "*"},
            },
        },
    )
    assert recipe.decide("x.fc1").config == QuantizerConfig(group_size=32, eps=1e-6)
    assert recipe.decide("x.fc2").config is None
    assert recipe.decide("x.fc3").config == DEFAULT


def test_eps_may_be_written_as_people_write_it(tmp_path: Path) -> None:
    text = "configs: {q: {eps: 1e-7}}\nmatchers: {all: {config: q, pattern: '*'}}"
    assert read(tmp_path, text).decide("x").config.eps == 1e-7
    with pytest.raises(RecipeError, match="config 'q': eps: expected a number, got 'tiny'"):
        read(tmp_path, text.replace("1e-7", "tiny"))


def test_order_decides(tmp_path: Path) -> None:
    matchers = {"first": {"config": "a", "pattern": "*"}, "second": {"config": "b", "pattern": "*fc1"}}
    recipe = read(tmp_path, {"configs": {"a": {"group_size": 32}, "b": {"group_size": 64}}, "matchers": matchers})
    assert recipe.decide("x.fc1").name == "first"


MATCHER = {"config": "q", "pattern": "*"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("configs: [", "recipe.yaml"),
        ("just text", "the whole: expected a mapping, got 'just text'"),
        ({"configs": {}, "matcher": {}}, "unknown key matcher: did you mean matchers?"),
        ({"configs": {"q": {}}}, "no enabled matcher quantizes anything"),
        ({"configs": {"q": {}}, "matchers": {"m": {**MATCHER, "enabled": False}}}, "no enabled matcher"),
        (
            {"configs": {"q": {}}, "matchers": {"m": {**MATCHER, "enabled": "yes"}}},
            "m.enabled: expected true or false",
        ),
        (
            {"configs": {"q": {}}, "matchers": {"m": {**MATCHER, "type": "regex"}}},
            "matchers.m.type: expected 'glob'",
        ),
        (
            {"configs": {"q": {}}, "matchers": {"m": {**MATCHER, "config": "r"}}},
            "unknown config 'r': known are q",
        ),
        (
            {"configs": {"q": {}}, "matchers": {"m": {**MATCHER, "patern": "x"}}},
            "m.patern: did you mean pattern?",
        ),
        (
            {"configs": {"q": {"group": 32}}, "matchers": {"m": MATCHER}},
            "unknown key group: did you mean group_size?",
        ),
        ({"configs": {"q": {"group_size": 31}}, "matchers": {"m": MATCHER}}, "config 'q': group_size=31"),
        ({"configs": {"q": {"space": "5-value"}}, "matchers": {"m": MATCHER}}, "unknown quantization space"),
        ({"configs": {"q": {"eps": True}}, "matchers": {"m": MATCHER}}, "eps: expected a number, got True"),
        ({"configs": {"q": [1]}, "matchers": {"m": MATCHER}}, "config 'q': the whole: expected a mapping"),
        ({"configs": {"q": {"group_size": 32.0}}, "matchers": {"m": MATCHER}}, "group_size: expected a whole number"),
        ({"matchers": {"m": {"config": "q"}}}, "matchers.m.pattern is missing"),
        ("configs: {q: {}, q: {}}", "the key 'q' stands there twice"),
        ("configs: {q: {group_size: 2024-13-45}}\nmatchers: {m: {config: q, pattern: x}}", "got '2024-13-45'"),
        ({"configs": {"q": "bf16"}, "matchers": {"m": MATCHER}}, "the word full-precision"),
    ],
)
def test_a_malformed_recipe_is_refused(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, content)
    assert message in str(caught.value) and "recipe.yaml" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nothing-here.yaml"):
        Recipe.from_yaml(tmp_path / "nothing-here.yaml", DEFAULT)

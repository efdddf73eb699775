# SPDX-License-Identifier: Apache-2.0
"""Tests that the checks of ``make lint`` and the comparison of losses find planted mistakes."""

from pathlib import Path

import check_docs
import check_shape
import compare_losses
import pytest

RECORD = {"kind": "train", "iteration": 1, "lm_loss": 5.5, "grad_norm": 2.0}


def test_a_folder_with_too_many_modules_is_found(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.py" for i in range(check_shape.MODULES)]
    assert not list(check_shape.crowded([*files, tmp_path / "__init__.py"]))
    (line,) = check_shape.crowded([*files, tmp_path / "more.py"])
    assert line.startswith(f"{tmp_path}: 11 modules")


def test_long_files_and_functions_are_found() -> None:
    body = "\n".join(f"    x = {i}" for i in range(check_shape.FUNCTION_LINES - 1))
    assert not list(check_shape.long(Path("a.py"), f"def f():\n{body}\n"))
    assert "f has 61 lines" in next(check_shape.long(Path("a.py"), f"def f():\n{body}\n    y = 1\n"))
    assert "401 lines" in next(check_shape.long(Path("a.py"), "x = 1\n" * 401))
    (line,) = check_shape.long(Path("a.h"), "int x{};\n" * 401)
    assert "401 lines" in line


def test_kernels_are_held_to_the_length_of_files(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(check_shape, "CHECKOUT", tmp_path)
    (tmp_path / "csrc").mkdir()
    assert check_shape.main() == 0
    (tmp_path / "csrc" / "a.cpp").write_text("int x;\n" * 401)
    assert check_shape.main() == 1
    assert "csrc/a.cpp: 401 lines, 400 are allowed" in capsys.readouterr().out


def test_what_is_written_twice_is_found() -> None:
    lines = [f"x{i} = {i}" for i in range(check_shape.EQUAL_LINES)]
    # Imports, comments, blank lines and indentation are ignored.
    texts = {Path("a.py"): "\n".join(lines), Path("b.py"): "# a\n\n" + "\n\n".join(f"  {x}" for x in lines)}
    (line,) = check_shape.written_twice(texts)
    assert line.startswith("a.py:1 and b.py:3")
    assert not list(check_shape.written_twice({**texts, Path("b.py"): "\n".join(lines[1:])}))
    assert not list(check_shape.written_twice({Path("a.py"): "\n".join(lines * 2)}))


@pytest.mark.parametrize(
    ("found", "tolerance", "said"),
    [
        ([RECORD], 0.0, None),
        ([{**RECORD, "lm_loss": 5.500000000000001}], 0.0, "lm_loss is 5.500000000000001, was 5.5"),
        ([{**RECORD, "grad_norm": None}], 0.0, "grad_norm is None, was 2.0"),
        ([], 0.0, "0 records instead of 1"),
        ([{**RECORD, "lm_loss": 5.500001}], 1e-6, None),
        ([{**RECORD, "lm_loss": 5.50001}], 1e-6, "lm_loss is 5.50001"),
    ],
)
def test_losses_that_differ_are_found(found: list, tolerance: float, said: str | None) -> None:
    problem = compare_losses.difference([RECORD], found, tolerance)
    assert problem is None if said is None else said in problem


def test_nan_is_no_difference() -> None:
    record = {"kind": "valid", "iteration": 2, "lm_loss": float("nan")}
    assert compare_losses.difference([record], [dict(record)], 0.0) is None


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One `flag`, two words\n\n```\n# not a heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md) [b](other.md#one-flag-two-words) [c](https://example.org/x) ![d](page.md)\n")
    assert not list(check_docs.broken_links(page))
    page.write_text("[a](gone.md) [b](other.md#not-a-heading) [c](#nothing)\n```\n[d](gone.md)\n```\n")
    files, *headings = check_docs.broken_links(page)
    assert files.endswith("gone.md: there is no such file")
    assert [line.rpartition(": ")[2] for line in headings] == ["there is no such heading"] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```sh\nmake test\n```\n", None),
        ("```sh\n# needs a cluster\ntorchrun ... job.py\n```\n", None),
        ("```python\n# loop.py\nx = [...]\n```\n", None),
        ("```yaml\na: {b: 1}\n```\n", None),
        ("```\nmake test\n```\n", "page.md:2: a block is one of sh, python, yaml, text, not nothing"),
        ("```sh\npython a.py ... --known\n```\n", "page.md:2: ... can't be run"),
        ("```sh\npython a.py PATH\n```\n", "PATH can't be run"),
        ("```text\nmake test\n```\n", "make begins a command"),
        ("```yaml\na: {b\n```\n", "not YAML"),
        ("```sh\n# needs a cluster\npython a.py --knwon\n```\n", "no command has a flag --knwon"),
        ("```sh \nmake test\n```\n", "page.md:1: not a fenced block"),
        ("- a\n\n  ```sh\n  make test\n  ```\n", "page.md:3: not a fenced block"),
        ("~~~sh\nmake test\n~~~\n", "page.md:1: not a fenced block"),
        ("Run\n\n    make test\n", "page.md:3: not a fenced block"),
        ("# A\n\n## B\n\n## C\n\ntext\n", "page.md: ## B: nothing follows this heading"),
        ("# A\n\n## B\n", "page.md: ## B: nothing follows this heading"),
    ],
)
def test_blocks_that_no_test_would_run_are_found(text: str, said: str | None, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    found = list(check_docs.unclear_blocks(page, {"--known"}))
    assert found == [] if said is None else said in found[0]


def test_blocks_are_read_with_what_they_need_and_the_files_that_they_are(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("A\n\n```sh\n# needs an NPU\nmake kernel\n```\n\n```yaml\n# job.yaml\na: 1\n```\n")
    first, second = check_docs.blocks(page)
    assert (first.line, first.language, first.needs, first.file) == (4, "sh", "an NPU", None)
    assert (second.line, second.needs, second.file, second.text) == (9, None, "job.yaml", "# job.yaml\na: 1\n")


def test_a_claim_that_was_changed_is_found(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(check_docs, "CHECKOUT", tmp_path)
    monkeypatch.setattr(check_docs, "VERIFICATION", tmp_path / "docs" / "verification.md")
    monkeypatch.setattr(check_docs, "README", tmp_path / "README.md")
    for folder in ("docs", "tests"):
        (tmp_path / folder).mkdir()
    marker = '@pytest.mark.verifies("training", "{}", npu="emulated")\ndef test_it():\n    pass\n'
    (tmp_path / "tests" / "test_steps.py").write_text(marker.format("losses are equal"))
    monkeypatch.setattr(check_docs, "results", lambda: "")
    check_docs.README.write_text("<!-- written by scripts/check_docs.py -->\n<!-- end -->\n")
    (tmp_path / "docs" / "verification.md").write_text("<!-- written by scripts/check_docs.py -->\n<!-- end -->\n")
    assert check_docs.main([]) == 1
    assert check_docs.main(["--write"]) == 0
    line = "| losses are equal | [steps](../tests/test_steps.py) | yes | not run | emulated |"
    assert line in check_docs.VERIFICATION.read_text()
    (tmp_path / "tests" / "test_steps.py").write_text(marker.format("losses are near"))
    capsys.readouterr()
    assert check_docs.main([]) == 1
    assert "docs/verification.md: its generated part is of another state" in capsys.readouterr().out
    (tmp_path / "tests" / "test_steps.py").write_text(marker.format("x").replace("training", "poetry"))
    with pytest.raises(ValueError, match="topics are"):
        check_docs.main([])


def test_a_figure_that_its_data_does_not_have_is_found(tmp_path: Path, monkeypatch, capsys) -> None:
    text = check_docs.README.read_text(encoding="utf-8")
    ratio = next(line for line in text.splitlines() if line.startswith("| time of a ternary")).split("**")[1]
    monkeypatch.setattr(check_docs, "README", tmp_path / "README.md")
    check_docs.README.write_text(text, encoding="utf-8")
    assert check_docs.main([]) == 0
    check_docs.README.write_text(text.replace(ratio, f"{float(ratio) - 0.001:.3f}"), encoding="utf-8")
    assert check_docs.main([]) == 1
    assert "README.md: its generated part is of another state" in capsys.readouterr().out

"""The documents tell the truth: examples run, named tests exist, figures are those that were measured."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ciuic_async.cli.main import parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "ARCHITECTURE.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def blocks(text: str) -> dict[str, str]:
    """Python blocks that are marked ``<!-- test: name -->``."""
    found = re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", text, re.DOTALL)
    return dict(found)


@pytest.mark.slow
def test_readme_examples_run_one_after_the_other(tmp_path: Path) -> None:
    """Every marked example of the README runs as it stands, in order, in one folder."""
    examples = blocks(README)
    assert list(examples) == ["complete", "loader", "knobs", "history"]
    loader_check = (
        "\nloader = ShufflingLoader(10, 3)\nseen = [loader.state_dict()['position'] for batch in loader]\n"
        "assert seen == [3, 6, 9, 12] and loader.epoch == 1\n"
    )
    program = examples["complete"] + examples["loader"] + loader_check + examples["knobs"] + examples["history"]
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_the_examples_of_the_other_documents_run(tmp_path: Path) -> None:
    """Each marked example below docs/ runs as it stands, alone."""
    found = [block for path in DOCUMENTS if path.parent.name == "docs" for block in blocks(path.read_text()).values()]
    assert found
    for program in found:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr


def test_every_python_block_of_the_readme_is_run_or_is_the_sketch() -> None:
    """One block only, the three lines at the top, is a sketch; it must at least be Python."""
    all_blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    sketches = [block for block in all_blocks if block not in blocks(README).values()]
    assert len(sketches) == 1
    compile(sketches[0], "README.md", "exec")


def test_every_command_in_the_readme_parses() -> None:
    """Each ``ciuic`` line is one that the command line accepts."""
    lines = re.findall(r"^ciuic .*$", README, re.MULTILINE)
    assert len(lines) >= 6
    for line in lines:
        arguments = shlex.split(line.partition("#")[0])[1:]
        assert parser().parse_args(arguments).run is not None


def test_the_measured_table_is_what_was_measured() -> None:
    """The README's figures are those of the committed result file, cell by cell."""
    result = json.loads((ROOT / "bench" / "results" / "lost_time_cpu.json").read_text())
    for row in result["table"]:
        assert "| " + " | ".join(row) + " |" in README
    assert result["machine"] in README


def test_architecture_names_existing_tests_for_every_invariant() -> None:
    """Each of the invariants names at least one test, and each test that is named exists."""
    section = ARCHITECTURE.split("## Invariants")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \|.*\|$", section, re.MULTILINE)
    assert rows == [str(number) for number in range(1, 15)]
    for line in section.splitlines():
        if not re.match(r"\| \d+ \|", line):
            continue
        names = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", line)
        assert names or "later version" in line, line
        for path, function in names:
            source = (ROOT / path).read_text()
            assert not function or re.search(rf"def {function}\b", source), f"{path}::{function}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_that_documents_name_exist(document: Path) -> None:
    """Links, and files named in backticks with a folder of the project, point at something."""
    text = document.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (document.parent / target).exists(), target
    for name in re.findall(r"`((?:ciuic_async|csrc|tests|bench|docs)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name


def test_the_crashes_of_others_are_those_that_were_counted() -> None:
    """Every row of the last run of bench/crash.py stands in docs/guarantees.md as it was counted."""
    table = json.loads((ROOT / "bench" / "results" / "crash.json").read_text())["table"]
    lines = (ROOT / "docs" / "guarantees.md").read_text().splitlines()
    assert len(table) > 5
    assert [row for row in table if "| " + " | ".join(row) + " |" not in lines] == []

"""The list of mutations fits the code, the invariants and the document: what is listed can still be tried."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
INVARIANTS = (ROOT / "ARCHITECTURE.md").read_text().split("## Invariants")[1].split("\n## ")[0]
ROWS = {int(row[1]): row[0] for row in re.finditer(r"^\| (\d+) \|.*\|$", INVARIANTS, re.MULTILINE)}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_every_mutation_still_fits_the_code(mutation: Mutation) -> None:
    """What it replaces is there exactly once, and what comes of it is another program, and one that Python can read."""
    text = (ROOT / mutation.path).read_text()
    assert text.count(mutation.old) == 1, f"{mutation.path}: changed? adapt tests/mutations.py: {mutation.old!r}"
    broken = ast.parse(text.replace(mutation.old, mutation.new))
    assert ast.dump(broken) != ast.dump(ast.parse(text))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_every_mutation_is_noticed_by_a_test_that_its_invariant_names(mutation: Mutation) -> None:
    """The test exists, and ARCHITECTURE.md names it, or its whole file, beside the invariant that is broken."""
    path, _, function = mutation.test.partition("::")
    assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE)
    named = re.findall(r"`(tests/[^`]+)`", ROWS[mutation.invariant])
    assert mutation.test in named or path in named, f"{mutation.test} is not named by invariant {mutation.invariant}"


def test_every_invariant_is_broken_in_some_way() -> None:
    """Each invariant of ARCHITECTURE.md has a mutation, each mutation an invariant, in order."""
    numbers = [mutation.invariant for mutation in MUTATIONS]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(ROWS)


def test_the_document_has_the_whole_list() -> None:
    """The table of docs/mutations.md is the list, row by row."""
    rows = re.findall(r"^\| \d+ \|.*\|$", (ROOT / "docs" / "mutations.md").read_text(), re.MULTILINE)
    assert rows == [mutation.row() for mutation in MUTATIONS]

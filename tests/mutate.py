"""Breaks each promise on purpose, one entry of ``mutations.py`` at a time, and asks whether its test notices.

    python -m tests.mutate          every entry; prints the table of docs/mutations.md
    python -m tests.mutate fsync    entries with this word in their row or their code

Nothing is changed here: each entry is applied to a copy of the tree in a temporary folder, where the tests run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.mutations import MUTATIONS

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "tmp*")
TIMEOUT_S = 900.0
TEST_TIMEOUT_S = 60
"""One test's, if it has none of its own: what a mutation makes hang is found out by that."""

# An editable install finds the package where it was installed from, whatever PYTHONPATH says, by an import hook.
SITE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
"""


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of the tree in which tests run with the package of the copy."""

    root: Path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A Python there. Nothing is compiled into files: one that changes twice in a second would look the same."""
        environment = {**os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def failures(self, tests: Sequence[str]) -> list[str]:
        """Which of ``tests`` fail.

        Raises:
            RuntimeError: they could not be run at all, so nothing is known.
        """
        done = self.run(
            "-m",
            "pytest",
            "-x",
            "-q",
            "-rfE",
            "--tb=no",
            "-p",
            "no:cacheprovider",
            f"--timeout={TEST_TIMEOUT_S}",
            *tests,
        )
        if done.returncode < 0:  # a signal: what makes the process crash is noticed too
            return list(tests)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest {' '.join(tests)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)


@contextmanager
def copied() -> Iterator[Copy]:
    """A copy of the tree, native core included, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        root = Path(folder) / "tree"
        shutil.copytree(ROOT, root, ignore=LEFT_OUT)
        (root / "sitecustomize.py").write_text(SITE)
        copy = Copy(root)
        core = subprocess.run(
            [
                sys.executable,
                "-c",
                "from ciuic_async import native; print(native.core.__file__ if native.core else '')",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        if core:
            shutil.copy(core, root / "ciuic_async")
        found = copy.run("-c", "import ciuic_async; print(ciuic_async.__file__)").stdout.strip()
        if Path(found).resolve() != (root / "ciuic_async" / "__init__.py").resolve():
            raise RuntimeError(f"tests in {root} would use the package in {found!r}")
        yield copy


def main() -> int:
    """Print the table; 1 if a mutation survived."""
    words = sys.argv[1:]
    chosen = [one for one in MUTATIONS if all(word in f"{one.row()}{one.old}" for word in words)]
    survived = 0
    with copied() as copy:
        tests = sorted({one.test for one in chosen})
        if failed := copy.failures(tests):
            print(f"these fail without any mutation: {', '.join(failed)}", file=sys.stderr)
            return 2
        for one in chosen:
            before = one.apply(copy.root)
            noticed = bool(copy.failures([one.test]))
            (copy.root / one.path).write_text(before)
            survived += not noticed
            print(one.row() if noticed else f"SURVIVED {one.row()}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutations were noticed", file=sys.stderr)
    return 1 if survived else 0


if __name__ == "__main__":
    raise SystemExit(main())

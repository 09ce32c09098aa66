"""One target under a fuzzer that follows coverage: ``python -m tests.fuzz.fuzz TARGET [SECONDS]``.

Needs the extra ``fuzz`` (atheris). What it finds beyond the corpus goes to a folder that is forgotten afterwards; an
input that breaks a promise, takes 5 s or 512 MB is written to ``CIUIC_FUZZ_FOUND`` (the current folder without it), and
the exit code is not 0. Such an input belongs in ``corpus/<target>/found-...`` with the mending.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

from ciuic_async import native  # before the finders change: an editable install knows where the core lies

# The finder of an editable install has a loader that atheris cannot instrument: the folders are searched instead.
sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in type(finder).__name__]
# Comparing a numpy array in instrumented code leaks it: with encoders, which do, the limit of memory would be reached.
LEAKS = {"encoders": ["ciuic_async.codecs.planes"]}
with atheris.instrument_imports(
    include=["ciuic_async", "tests.fuzz.targets"], exclude=LEAKS.get(" ".join(sys.argv[1:2]), [])
):
    from ciuic_async.errors import CiuicError
    from tests.fuzz.targets import TARGETS

from tests.fuzz.mutations import mutated  # noqa: E402  # what is instrumented comes first, and this is not

CORPUS = Path(__file__).parent / "corpus"
FOUND = "CIUIC_FUZZ_FOUND"
MAX_LENGTH_BYTES = 1 << 15
RSS_LIMIT_MB = 512
TIMEOUT_S = 5


def main() -> None:
    """Fuzz until the time is over or something is found."""
    print(native.describe(), file=sys.stderr)
    target, seconds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 300
    run = TARGETS[target]
    seeds = [path.read_bytes() for path in sorted((CORPUS / target).iterdir())]

    def one_input(data: bytes) -> None:
        try:
            run(data)
        except CiuicError:
            return

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        """By turns the fuzzer's own, which knows what it compared, and ours, which knows numbers and JSON."""
        if seed % 2:
            return bytes(atheris.Mutate(data, max_size))
        return mutated(data, seeds, random.Random(seed))[:max_size]

    with tempfile.TemporaryDirectory() as new:
        limits = [
            f"-max_total_time={seconds}",
            f"-rss_limit_mb={RSS_LIMIT_MB}",
            f"-timeout={TIMEOUT_S}",
            f"-max_len={MAX_LENGTH_BYTES}",
            f"-artifact_prefix={os.environ.get(FOUND, '.')}/{target}-",
            "-print_final_stats=1",
            "-verbosity=1",
        ]
        atheris.Setup(
            [sys.argv[0], new, str(CORPUS / target), *limits],
            one_input,
            custom_mutator=mutator,
            internal_libfuzzer=True,
        )
        atheris.Fuzz()


if __name__ == "__main__":
    main()

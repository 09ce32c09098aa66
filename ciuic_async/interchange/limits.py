"""What a file may ask for before it is refused: nothing here depends on what the file says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from ciuic_async.errors import IntegrityError, UsageError

STRUCTURE_BYTES = 64 << 20
"""Of a file's description of itself (pickle, header, tree): 20,000 tensors need about 6 MB."""
MAX_VALUES = 5_000_000
"""Values in one state, each place counted where it stands: a few bytes may stand for a tree without end."""
MAX_DEPTH = 100
GROWTH_FACTOR = 32
GROWTH_BYTES = 256 << 20


@dataclass(slots=True)
class Allowance:
    """Memory that one file may make us take. Counts down; not thread-safe.

    Attributes:
        where: the file, for messages.
        left_bytes: what may still be taken.
    """

    where: str
    left_bytes: int

    @classmethod
    def of_file(cls, where: str, size_bytes: int) -> Allowance:
        """As much as files that compress well need, and no bomb's share."""
        return cls(where, GROWTH_FACTOR * size_bytes + GROWTH_BYTES)

    def take(self, size_bytes: int, what: str) -> None:
        """Account for memory before it is taken.

        Raises:
            IntegrityError: kind ``file_bomb``.
        """
        if size_bytes > self.left_bytes:
            raise IntegrityError(
                f"{self.where}: {what} asks for {size_bytes} bytes, expected at most {self.left_bytes} from a file of "
                "this size; it is refused as a decompression bomb",
                kind="file_bomb",
                where=self.where,
            )
        self.left_bytes -= size_bytes


def malformed(where: str, message: str) -> IntegrityError:
    """The error for a file that is not what its name says, or is damaged."""
    return IntegrityError(f"{where}: {message}", kind="file_malformed", where=where)


def refused(where: str, message: str) -> IntegrityError:
    """The error for a file that asks for more than data: to run something, or to look elsewhere."""
    return IntegrityError(f"{where}: {message}", kind="file_refused", where=where)


def unsupported(where: str, message: str) -> UsageError:
    """The error for an honest file of a kind that is not read."""
    return UsageError(f"{where}: {message}", kind="file_unsupported", where=where)

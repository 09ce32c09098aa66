"""Every error this package raises, grouped by what the caller would do about it.

    CiuicError
    ├── UsageError            fix the call
    ├── NotFoundError         ask for something else
    ├── TargetMismatchError   fit the model that is being restored
    ├── CommitConflictError   re-read, retry or stop
    ├── StoreError            look at the place (disk, bucket, permissions)
    ├── IntegrityError        never use the data
    ├── FormatVersionError    upgrade this package
    ├── SaveFailedError       see the cause; earlier snapshots are intact
    └── InternalError         report a bug

Each carries ``kind``, a stable machine-readable name of the precise cause, and ``where``, the file, path or tensor it
is about. A message says what, where, expected and found, and what helps.
"""

from __future__ import annotations


class CiuicError(Exception):
    """Root of all errors of this package.

    Attributes:
        kind: stable name of the precise cause, e.g. ``"digest_mismatch"``.
        where: the file, path or tensor concerned, or None.
    """

    default_kind = "error"

    def __init__(self, message: str, *, kind: str | None = None, where: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind or self.default_kind
        self.where = where

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), str(self), self.kind, self.where))


def _rebuild(cls: type[CiuicError], message: str, kind: str, where: str | None) -> CiuicError:
    """Unpickle an error that crossed a process border."""
    return cls(message, kind=kind, where=where)


class UsageError(CiuicError):
    """The call is wrong: nothing was written; fix the call."""

    default_kind = "usage"


class NotFoundError(CiuicError):
    """What was asked for is not there: no such chain, snapshot, tag, tensor or key."""

    default_kind = "not_found"


class TargetMismatchError(CiuicError):
    """The snapshot does not fit the objects it should be restored into; nothing was changed.

    The message lists every difference.
    """

    default_kind = "target_mismatch"


class CommitConflictError(CiuicError):
    """Another writer was first. Re-read the chain, then retry or stop."""

    default_kind = "commit_conflict"


class StoreError(CiuicError):
    """The place where bytes live failed: disk full, no permission, not a folder, an I/O error."""

    default_kind = "store"


class IntegrityError(CiuicError):
    """Bytes are not what was written, or a signature does not hold. Never use the data."""

    default_kind = "integrity"


class FormatVersionError(CiuicError):
    """Written by a newer version of the format than this package knows."""

    default_kind = "format_version"


class SaveFailedError(CiuicError):
    """A snapshot did not become durable; ``__cause__`` says why. Earlier snapshots are intact."""

    default_kind = "save_failed"


class InternalError(CiuicError):
    """A mistake in this package. Please report it with its cause."""

    default_kind = "internal"


class CiuicWarning(UserWarning):
    """Category of the warnings this package gives: damage passed over, a snapshot that failed, another environment."""

"""Pins: the newest head of each log that this user found good, kept where the log's keeper cannot reach it.

One signed note for each origin, ``$XDG_STATE_HOME/ciuic_async/pins/<SHA-256 of the origin>.note``. Whoever rolls a
log back, or rewrites it with a stolen key, is found out by it. A pin only moves forward, to heads that extend it; what
contradicts it is an error, and the head that was found is kept beside it as evidence.

Without a home, or in one that cannot be written, there are no pins, and that is no error: there is nothing to compare
with. A pin that is there and cannot be used is one.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256

from ciuic_async.errors import IntegrityError, NotFoundError, StoreError, UsageError
from ciuic_async.transparency import note, proof
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.note import Note, Vkey
from ciuic_async.transparency.policy import read_text_file
from ciuic_async.user_folders import OURS, state_folder

EVIDENCE_KEPT = 16
"""Files of evidence for one log; then no more are written, for a training that is started again and again."""

_LOCK_WAIT_S = 1.0
_POLL_S = 0.005

Extends = Callable[[int, bytes], bool]
"""Whether the log in question had this root at this size; asked only for sizes that it has reached."""


@dataclass(frozen=True, slots=True)
class Pin:
    """A head that was found good. The note's signature says by whose key it was signed then."""

    origin: str
    size: int
    root: bytes
    data: bytes
    note: Note

    def signed_by(self, vkey: Vkey) -> bool:
        """Whether this key signed it: of all keys with its key ID only the right one verifies."""
        return any(
            (item.name, item.key_id) == (vkey.name, vkey.key_id) and vkey.verifies(self.note.text, item.signature)
            for item in self.note.signatures
        )


class Pins:
    """The pins of one user. Any thread, and any number of processes, may use them at once.

    Args:
        folder: where they are; None: there are none and there will be none.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._good: dict[str, bytes] = {}
        """By origin the pin, as it was when a log was last found to extend it. A log object never forgets."""

    @classmethod
    def of_user(cls) -> Pins:
        """The pins in the user's state folder."""
        return cls(state_folder(OURS, "pins"))

    def path(self, origin: str) -> str:
        """Where the pin of a log lies, for messages."""
        return os.path.join(self._folder or "", f"{sha256(origin.encode()).hexdigest()}.note")

    def read(self, origin: str) -> Pin | None:
        """The pin of a log, or None.

        Raises:
            IntegrityError: kind ``pin_malformed``; there is one, and it is none.
        """
        if self._folder is None:
            return None
        path = self.path(origin)
        try:
            data = read_text_file(path, note.LIMIT_BYTES, "pin")
        except UsageError as error:
            # Not kept in a variable: with its traceback that would keep the caller's objects until garbage collection.
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                return None  # none was made
            if isinstance(error.__cause__, PermissionError) and not os.path.lexists(path):
                return None  # the home of somebody else, as in containers: nobody can say whether there is one
            raise _malformed(path, str(error)) from error
        try:
            parsed = note.parse(data, path)
            size, root = note.parse_head(parsed.text, origin, path)
        except IntegrityError as error:
            raise _malformed(path, str(error)) from error
        return Pin(origin, size, root, data, parsed)

    def check(self, origin: str, log: Log, found: Callable[[], bytes] | None = None) -> Pin | None:
        """Compare a log with its pin.

        The log is refreshed if it is behind: a pin that is read after the log may rightly know more of it.

        Args:
            found: gives the note that the log shows as its head, for the evidence.

        Returns:
            The pin, or None where there is none.

        Raises:
            IntegrityError: kind ``pin_rollback`` (the log is shorter), ``pin_fork`` (it is another one) or
                ``pin_malformed``.
        """
        pin = self.read(origin)
        if pin is None or self._good.get(origin) == pin.data:
            return pin
        if log.head.size < pin.size:
            log.refresh()
        self.compare(pin, log.head.size, lambda size, root: extends(log, size, root), found)
        self._good[origin] = pin.data
        return pin

    def compare(self, pin: Pin, size: int, extends: Extends, found: Callable[[], bytes] | None = None) -> None:
        """As ``check``, for a log of ``size`` entries that is known in another way."""
        if size < pin.size:
            kind, what = "pin_rollback", "newer entries were taken away: the log was rolled back"
        elif not extends(pin.size, pin.root):
            kind, what = "pin_fork", "it does not extend that one: history was rewritten, or two copies were written to"
        else:
            return
        evidence = self._keep_evidence(pin.origin, found)
        raise IntegrityError(
            f"{pin.origin}: the log shows {size} entries, your pin is of {pin.size}, and {what}. "
            f"Pin: {self.path(pin.origin)}{f'; evidence: {evidence}' if evidence else ''}. "
            "If the store was restored from a backup, run 'ciuic chain repin CHAIN --reason TEXT'; "
            "if this is a copy that goes on by itself, run 'ciuic chain fork CHAIN DEST --reason TEXT'; "
            "else somebody tampered with it",
            kind=kind,
            where=self.path(pin.origin),
        )

    def save(self, origin: str, data: bytes, extends: Extends) -> bool:
        """Move a pin on to a head that was found good; durable on return.

        Of two processes at once the larger consistent head wins: a pin never goes back.

        Args:
            data: the signed note of the head. The caller has verified it.
            extends: whether the history of this head had a root at a size.

        Returns:
            Whether it is the pin now; False: it was already, a newer one is, or pins cannot be kept here.

        Raises:
            IntegrityError: as ``check``; the pin stays.
        """
        size, _ = note.parse_head(note.parse(data, "head").text, origin, "head")
        with self._locked() as folder:
            if folder is None:
                return False
            pin = self.read(origin)
            if pin is not None:
                if pin.size <= size:
                    self.compare(pin, size, extends, lambda: data)
                if pin.size >= size:
                    return False
            if not self._write(folder, os.path.basename(self.path(origin)), data):
                return False
        self._good[origin] = data
        return True

    def replace(self, origin: str, data: bytes) -> str | None:
        """Let a head be the pin whatever was pinned before: a person said so. Durable on return.

        Returns:
            Where the pin of before is kept; None: there was none.

        Raises:
            StoreError: kind ``pin_not_writable``.
        """
        note.parse_head(note.parse(data, "head").text, origin, "head")
        self._good.pop(origin, None)
        name = os.path.basename(self.path(origin))
        kept = f"{name.removesuffix('.note')}.{time.time_ns()}.replaced"
        with self._locked() as folder:
            before = folder is not None and os.path.lexists(self.path(origin))
            try:
                if before:
                    os.rename(name, kept, src_dir_fd=folder, dst_dir_fd=folder)
            except OSError as error:
                raise _not_writable(self.path(origin)) from error
            if folder is None or not self._write(folder, name, data):
                raise _not_writable(self.path(origin))
        return os.path.join(self._folder or "", kept) if before else None

    # --- inside -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[int | None]:
        """The folder's descriptor, with its lock; None where pins cannot be kept."""
        descriptor = self._open_folder()
        if descriptor is None:
            yield None
            return
        try:
            yield descriptor if _lock(descriptor) else None
        finally:
            os.close(descriptor)

    def _open_folder(self) -> int | None:
        if self._folder is None:
            return None
        try:
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            return os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None

    def _write(self, folder: int, name: str, data: bytes) -> bool:
        temporary = f".{name}.{secrets.token_hex(8)}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o600, dir_fd=folder)
            try:
                with os.fdopen(descriptor, "wb", closefd=False) as file:
                    file.write(data)
                os.fsync(descriptor)
                os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                os.close(descriptor)
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
            os.fsync(folder)
            return True
        except OSError:
            return False

    def _keep_evidence(self, origin: str, found: Callable[[], bytes] | None) -> str | None:
        """Keep the note that contradicts the pin; where, or None."""
        if found is None:
            return None
        try:
            data = found()
        except (NotFoundError, IntegrityError, StoreError):
            return None
        stem = os.path.basename(self.path(origin)).removesuffix(".note")
        folder = self._open_folder()  # without its lock, which the caller may hold: no name is written twice
        if folder is None:
            return None
        try:
            kept = [name for name in os.listdir(folder) if name.startswith(f"{stem}.") and name.endswith(".evidence")]
            for name in kept:
                path = os.path.join(self._folder or "", name)
                with suppress(UsageError):
                    if read_text_file(path, note.LIMIT_BYTES, "pin") == data:
                        return path
            name = f"{stem}.{time.time_ns()}.evidence"
            if len(kept) < EVIDENCE_KEPT and self._write(folder, name, data):
                return os.path.join(self._folder or "", name)
        except OSError:
            pass  # the error that it is evidence for is what matters
        finally:
            os.close(folder)
        return None


def extends(log: Log, size: int, root: bytes) -> bool:
    """Whether ``log`` had this root at ``size`` entries."""
    head = log.head
    try:
        proof.check_consistency(size, head.size, root, head.root, log.consistency(size))
    except IntegrityError as error:
        if error.kind == "proof_invalid":
            return False
        raise  # the log is too damaged to say
    return True


def _lock(descriptor: int) -> bool:
    """Take the lock of the folder; False if others hold it for long, as a stopped process may."""
    deadline_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                return False
            time.sleep(_POLL_S)
        except OSError:
            return True  # no locks on this file system: then a pin may lag, and is never wrong


def _malformed(path: str, reason: str) -> IntegrityError:
    return IntegrityError(
        f"{path}: not a pin of this log: {reason}. Nothing can be compared with it; look at who changed it, then run "
        "'ciuic chain repin CHAIN --reason TEXT'",
        kind="pin_malformed",
        where=path,
    )


def _not_writable(path: str) -> StoreError:
    return StoreError(f"{path}: the pin cannot be written; check the folder and its owner", kind="pin_not_writable")

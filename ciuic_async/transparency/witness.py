"""A witness (C2SP tlog-witness): cosigns the heads of logs that it knows, as long as each extends the one before.

One file a log, ``<sha256(origin) in hex>.note``: the newest head that was cosigned, with the log's signatures and ours.
It is replaced atomically and synced before a cosignature is given out, under one lock a log. So whatever kills the
process or the machine, no two heads of one size are ever cosigned.

A signed head that contradicts what was cosigned is kept as evidence, ``evidence/<sha256(origin)>.<n>``: numbers 0 to 15
for heads of the very size that was cosigned (two signatures that no honest log gives), 16 to 31 for larger ones whose
proof does not hold (a fork, or a damaged proof). What is full takes no more: the first ones are worth most.

Input is hostile: bodies are bounded by the caller of ``add_checkpoint``, nothing unsigned is kept.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ciuic_async.errors import IntegrityError, StoreError, UsageError
from ciuic_async.format.merkle import EMPTY_ROOT
from ciuic_async.transparency import note, proof
from ciuic_async.transparency.keys import SigningKey
from ciuic_async.transparency.note import Note, Signature, Vkey
from ciuic_async.transparency.slots import LogHead

BODY_LIMIT_BYTES = 256 << 10
"""64 signatures of the largest kind known, a proof of 63 hashes, and room."""
MAX_PROOF = 63
EVIDENCE_KEPT = 16
"""Of each of the two kinds, for one log."""
SIZE_TYPE = "text/x.tlog.size"
TEXT_TYPE = "text/plain; charset=utf-8"

_OLD = re.compile(r"old (0|[1-9][0-9]{0,15})")
_BODY = "the request"


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, body and media type of an answer."""

    status: int
    body: bytes
    content_type: str = TEXT_TYPE


@dataclass(frozen=True, slots=True)
class _Request:
    """A parsed body of ``add-checkpoint``. Nothing in it is verified."""

    old_size: int
    path: tuple[bytes, ...]
    note: Note
    origin: str
    head: LogHead


class _KnownLog:
    """What belongs to one log: who may sign it, and the lock of its file."""

    def __init__(self) -> None:
        self.keys: dict[note.KeyName, Vkey] = {}
        self.lock = threading.Lock()


class Witness:
    """The state machine, without any network. Any thread may call.

    Args:
        folder: where the state lies; made if it is not there. One process at a time may use it.
        key: signs; no other witness and no log may use it.
        name: of the witness, under which it signs.
        logs: the verifier keys of the logs to witness; the name of a key is the origin of its log.
        clock: POSIX seconds.

    Raises:
        UsageError: kind ``witness_running`` (another process has the folder), or a key or name that cannot be.
        StoreError: the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        key: SigningKey,
        name: str,
        logs: Iterable[Vkey],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.vkey = note.parse_vkey(key.cosigner(name))
        self._key = key
        self._clock = clock
        self._logs: dict[str, _KnownLog] = {}
        for vkey in logs:
            if vkey.kind != note.ED25519:
                raise UsageError(f"{vkey}: the key of a witness, expected that of a log", kind="vkey_kind")
            self._logs.setdefault(vkey.name, _KnownLog()).keys[vkey.name, vkey.key_id] = vkey
        self._by_hash = {_hex(origin): origin for origin in self._logs}
        self._folder = Path(folder)
        with _errors(self._folder):
            make_folder(self._folder / "evidence")
            self._descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise UsageError(
                f"{self._folder}: another witness uses this folder; two of them could cosign a fork",
                kind="witness_running",
                where=str(self._folder),
            ) from error
        self._sweep()

    @property
    def origins(self) -> tuple[str, ...]:
        """The logs that it knows."""
        return tuple(self._logs)

    def close(self) -> None:
        """Let another process have the folder. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def add_checkpoint(self, body: bytes) -> Answer:
        """Answer one request; what a 200 gives out is durable before this returns. At most ``BODY_LIMIT_BYTES``.

        Raises:
            StoreError, IntegrityError: its own state cannot be read or written; nothing was cosigned.
        """
        try:
            request = _parse(body)
        except IntegrityError as error:
            return _refusal(400, str(error))
        log = self._logs.get(request.origin)
        if log is None:
            return _refusal(404, "this witness does not know this log")
        try:
            note.verify_note(request.note, log.keys, _BODY)
        except IntegrityError as error:
            return _refusal(403, str(error))
        if request.old_size > request.head.size:
            return _refusal(400, f"old size {request.old_size} is beyond the head's {request.head.size}")
        with log.lock:
            return self._judge(request, log)

    def checkpoint(self, origin_sha256: str) -> bytes | None:
        """The newest head that was cosigned, as a note; None if there is none or the log is not known.

        Args:
            origin_sha256: of the log's origin, in hex.

        Raises:
            StoreError: it cannot be read.
        """
        origin = self._by_hash.get(origin_sha256)
        return None if origin is None else self._read(origin)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _judge(self, request: _Request, log: _KnownLog) -> Answer:
        """Under the log's lock; the log's signature holds."""
        data = self._read(request.origin)
        last = LogHead(0, EMPTY_ROOT) if data is None else self._check_own(data, request.origin)
        if data is not None and request.head.size == last.size and request.head.root != last.root:
            self._keep_evidence(data, request, 0)
        if request.old_size != last.size:
            return Answer(409, f"{last.size}\n".encode(), SIZE_TYPE)
        try:
            proof.check_consistency(last.size, request.head.size, last.root, request.head.root, request.path)
        except IntegrityError as error:
            if data is not None and request.head.size > last.size:
                self._keep_evidence(data, request, EVIDENCE_KEPT)
            return _refusal(422, str(error))
        line = self._key.cosign(self.vkey.name, request.note.text, int(self._clock()))
        by_log = tuple(item for item in request.note.signatures if (item.name, item.key_id) in log.keys)
        write_durably(self._file(request.origin), note.format_note(request.note.text, (*by_log, line)).encode())
        return Answer(200, cosignature_lines((line,)).encode())

    def _file(self, origin: str) -> Path:
        return self._folder / f"{_hex(origin)}.note"

    def _read(self, origin: str) -> bytes | None:
        path = self._file(origin)
        try:
            with _errors(path), path.open("rb") as file:
                return file.read(note.LIMIT_BYTES + 1)
        except FileNotFoundError:
            return None

    def _check_own(self, data: bytes, origin: str) -> LogHead:
        """The head that was cosigned last. A damaged file is an error for good: who starts anew may cosign a fork."""
        where = str(self._file(origin))
        parsed = note.parse(data, where)
        for item in parsed.signatures:
            if (item.name, item.key_id) == (self.vkey.name, self.vkey.key_id):
                note.verify_note(parsed, {(item.name, item.key_id): self.vkey}, where)
        return LogHead(*note.parse_head(parsed.text, origin, where))

    def _keep_evidence(self, signed: bytes, request: _Request, first: int) -> None:
        """Both notes, durably; once for each head. A failure is no reason to answer anything else."""
        refused = note.format_note(request.note.text, request.note.signatures)
        facts = {
            "schema": "ciuic.dev/fork/v1",
            "origin": request.origin,
            "cosigned": signed.decode(),
            "refused": refused,
            "old": request.old_size,
            "proof": [item.hex() for item in request.path],
            "found_s": int(self._clock()),
        }
        for number in range(first, first + EVIDENCE_KEPT):
            path = self._folder / "evidence" / f"{_hex(request.origin)}.{number}"
            if not path.exists():
                with suppress(StoreError):
                    write_durably(path, (json.dumps(facts, indent=1) + "\n").encode())
                return
            with suppress(OSError, ValueError):
                if json.loads(path.read_bytes())["refused"].startswith(request.note.text + "\n"):
                    return

    def _sweep(self) -> None:
        """What a killed process was about to write."""
        for path in (*self._folder.glob("tmp.*"), *self._folder.glob("evidence/tmp.*")):
            with suppress(OSError):
                path.unlink()


def cosignature_lines(signatures: Iterable[Signature]) -> str:
    """Signature lines alone, as a witness answers with them."""
    return note.format_note("", tuple(signatures))[1:]


def request_body(old_size: int, path: Iterable[bytes], head_note: bytes) -> bytes:
    """The body of ``add-checkpoint``."""
    hashes = "".join(f"{base64.b64encode(item).decode()}\n" for item in path)
    return f"old {old_size}\n{hashes}\n".encode() + head_note


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file: the new one is durable on return, and at every moment the old or the new one is there whole.

    A failed sync of the folder may leave the new one there: what asks again for it is written again.

    Raises:
        StoreError: the place failed.
    """
    temporary = path.parent / f"tmp.{secrets.token_hex(8)}"
    with _errors(path):
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, path)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        _fsync(path.parent)


def state_name(origin: str) -> str:
    """The folder of a log on the reading side of a witness: ``<state_name>/checkpoint``."""
    return _hex(origin)


def _parse(body: bytes) -> _Request:
    """Raises IntegrityError for whatever is malformed."""
    top, separator, rest = body.partition(b"\n\n")
    if not separator or len(body) > BODY_LIMIT_BYTES:
        raise _malformed("no empty line after the proof")
    try:
        first, *hashes = top.decode("ascii").split("\n")
    except UnicodeDecodeError:
        raise _malformed("a proof that is not ASCII") from None
    old = _OLD.fullmatch(first)
    if old is None or int(old[1]) > note.MAX_SIZE:
        raise _malformed("the first line is not 'old <size>'")
    if len(hashes) > MAX_PROOF:
        raise _malformed(f"a proof of {len(hashes)} hashes, at most {MAX_PROOF} are allowed")
    path = [note.decode_base64(text) for text in hashes]
    parsed = note.parse(rest, _BODY)
    origin = parsed.text.partition("\n")[0]
    if not note.check_name(origin):
        raise _malformed("the first line of the head is no origin")
    head = LogHead(*note.parse_head(parsed.text, origin, _BODY))
    return _Request(int(old[1]), tuple(_hash(item) for item in path), parsed, origin, head)


def _hash(data: bytes | None) -> bytes:
    if data is None or len(data) != 32:
        raise _malformed("a line of the proof is not 32 bytes of canonical base64")
    return data


def _malformed(message: str) -> IntegrityError:
    return IntegrityError(f"{_BODY}: {message}", kind="request_malformed")


def _refusal(status: int, message: str) -> Answer:
    """The message may quote the request: one line, no control characters."""
    line = "".join(char if char.isprintable() else "?" for char in message)
    return Answer(status, (line[:300] + "\n").encode("utf-8", "replace"))


def _hex(origin: str) -> str:
    return sha256(origin.encode()).hexdigest()


def make_folder(folder: Path) -> None:
    """Make what is missing, each name durable: a witness whose folder is lost would start anew."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(mode=0o700, exist_ok=True)
        _fsync(folder.parent)


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """Failures of the file system as StoreError; that a file is not there passes."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(
            f"{path}: {os.strerror(error.errno or 0)}; look at the disk and at who owns the folder", where=str(path)
        ) from error

"""What is said to one witness, and what its answers mean (C2SP tlog-witness). On that witness's own thread."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from ciuic_async.errors import IntegrityError, StoreError
from ciuic_async.transparency import note
from ciuic_async.transparency.asking import WitnessConnection
from ciuic_async.transparency.log import Log
from ciuic_async.transparency.note import Signature, Vkey
from ciuic_async.transparency.slots import LogHead
from ciuic_async.transparency.witness import make_folder, request_body, write_durably

_ATTEMPTS = 5
_SIZE = re.compile(rb"(0|[1-9][0-9]{0,15})\n?")


@dataclass(slots=True)
class Head:
    """A log head and who cosigned it."""

    head: LogHead
    text: str
    by_log: tuple[Signature, ...]
    cosignatures: dict[Vkey, Signature] = field(default_factory=dict)

    @property
    def signers(self) -> set[Vkey]:
        return set(self.cosignatures)

    def signed(self) -> bytes:
        """As the log signed it."""
        return note.format_note(self.text, self.by_log).encode()

    def cosigned(self) -> bytes:
        """With all cosignatures that were collected."""
        lines = (*self.by_log, *self.cosignatures.values())
        return note.format_note(self.text, lines[: note.MAX_SIGNATURES]).encode()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of asking one witness: a cosignature, or why there is none."""

    head: Head
    signature: Signature | None = None
    error: str = ""
    forked: bool = False
    ahead: int = 0
    """The size that the witness has cosigned, where that is beyond this head's."""


class Dialogue:
    """Asks for cosignatures of one log's heads. Any thread may call, for one witness one at a time.

    Args:
        log: makes proofs.
        evidence: a folder of the user's own where refusals as forks are kept; None keeps none.
        clock: POSIX seconds.
    """

    def __init__(self, log: Log, evidence: Path | None, clock: Callable[[], float]) -> None:
        self._log = log
        self._evidence = evidence
        self._clock = clock

    def ask(self, connection: WitnessConnection, vkey: Vkey, head: Head, old_size: int) -> Outcome:
        """Ask for a cosignature; where the witness is at another size, again from there.

        Each time it has moved on it signed for another writer meanwhile, who is not waited for more than a few times.

        Raises:
            StoreError: no whole answer.
            IntegrityError: no cosignature by ``vkey`` in it, or one that does not hold.
        """
        for attempt in range(_ATTEMPTS):
            path = self._log.consistency(old_size, head.head.size)
            answer = connection.add_checkpoint(request_body(old_size, path, head.signed()))
            if answer.status == 200:
                return Outcome(head, self._check_lines(vkey, head, answer.body))
            stated = _SIZE.fullmatch(answer.body) if answer.status == 409 else None
            if answer.status == 422 or (stated is not None and int(stated[1]) == old_size):
                return self._forked(connection, vkey, head, old_size, answer.status, answer.body)
            if stated is None:
                break
            if int(stated[1]) > head.head.size:
                return Outcome(
                    head,
                    ahead=int(stated[1]),
                    error=f"has cosigned {int(stated[1])} entries, this log has {head.head.size}: another writer is "
                    "ahead, or the chain lost its newest entries",
                )
            if attempt and int(stated[1]) < old_size:
                break  # it said more before: none of it is true
            old_size = int(stated[1])
        return Outcome(head, error=f"answered {answer.status}: {_quoted(answer.body)}")

    @staticmethod
    def _check_lines(vkey: Vkey, head: Head, body: bytes) -> Signature:
        """The cosignature by ``vkey`` in an answer; lines by others are ignored.

        Raises:
            IntegrityError: there is none, or it does not hold.
        """
        what = "the answer"
        parsed = note.parse(f"{head.text}\n".encode() + body, what)
        if parsed.text != head.text:
            raise IntegrityError(f"{what}: more than signature lines", kind="note_malformed")
        note.verify_note(parsed, {(vkey.name, vkey.key_id): vkey}, what)
        return next(item for item in parsed.signatures if (item.name, item.key_id) == (vkey.name, vkey.key_id))

    def _forked(
        self, connection: WitnessConnection, vkey: Vkey, head: Head, old_size: int, status: int, body: bytes
    ) -> Outcome:
        """A witness says that this head contradicts an earlier one. Final: evidence is kept, nobody asks again."""
        error = (
            f"it does not accept {head.head.size} entries after {old_size} ({status}: {_quoted(body)}); "
            "compare what it cosigned with this log before you go on"
        )
        if self._evidence is not None:
            theirs = ""
            with suppress(StoreError):
                theirs = connection.checkpoint(self._log.origin).body.decode("utf-8", "replace")
            facts = {
                "schema": "ciuic.dev/refused/v1",
                "origin": self._log.origin,
                "witness": str(vkey),
                "url": connection.url,
                "status": status,
                "answer": body.decode("utf-8", "replace"),
                "refused": head.signed().decode(),
                "cosigned": theirs,
                "found_s": int(self._clock()),
            }
            name = f"{sha256(self._log.origin.encode()).hexdigest()}.{vkey.key_id.hex()}.json"
            path = self._evidence / name
            with suppress(StoreError, OSError):
                make_folder(self._evidence)
                if not path.exists():  # the first is worth most
                    write_durably(path, (json.dumps(facts, indent=1) + "\n").encode())
                error += f"; evidence: {path}"
        return Outcome(head, error=error, forked=True)


def _quoted(body: bytes) -> str:
    """What a stranger answered, for a message."""
    return "".join(char if char.isprintable() else " " for char in body[:120].decode("utf-8", "replace")).strip()

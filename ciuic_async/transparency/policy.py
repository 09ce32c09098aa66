"""Whom a verifier trusts: the strict subset of C2SP tlog-policy that ``ciuic`` reads and writes.

    log <vkey> [url]
    witness <name> <vkey> [url]
    group <name> all|any|<k> <member>...
    quorum <name>|none

A policy proves something only where the *verifier* keeps it: the copy in a chain (``log/policy.txt``) is never read for
trust. Comments are whole lines. What later readers might take for something else (a comment behind a line, a name that
comes after its use, one public key under two names) is refused.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Set
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ciuic_async.errors import IntegrityError, UsageError
from ciuic_async.transparency import note
from ciuic_async.transparency.note import COSIGNATURE, ED25519, Vkey

LIMIT_BYTES = 64 << 10
MAX_WITNESSES = 64
"""As many as a note has room for."""
NONE = "none"

_COUNT = re.compile(r"[1-9][0-9]{0,3}")
_RESERVED = frozenset({NONE})


@dataclass(frozen=True, slots=True)
class Witness:
    """A witness by the name that the policy gives it. ``vkey`` is of kind ``COSIGNATURE``; ``url`` is where to ask."""

    name: str
    vkey: Vkey
    url: str | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """So many of these members (witnesses or groups before it) have to sign."""

    name: str
    needed: int
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Witnessed:
    """How a head stands with a policy: ``have`` of ``count`` witnesses signed it; ``met``: that is a quorum."""

    have: int
    count: int
    met: bool

    def __str__(self) -> str:
        return f"{self.have}/{self.count}" + ("" if self.met else ", quorum not met")


@dataclass(frozen=True, slots=True)
class Policy:
    """A parsed policy.

    Attributes:
        logs: keys of writers; of whichever logs the policy is about.
        log_urls: where each of them is published, or None; as many as ``logs``.
        witnesses: whose cosignatures count.
        groups: in the order of their definition: members come before.
        quorum: the witness or group that has to sign; None: nobody has to.
    """

    logs: tuple[Vkey, ...] = ()
    witnesses: tuple[Witness, ...] = ()
    groups: tuple[Group, ...] = ()
    quorum: str | None = None
    log_urls: tuple[str | None, ...] = ()

    @classmethod
    def parse(cls, data: bytes, what: str = "policy") -> Policy:
        """Parse a policy; nothing about it is trusted.

        Args:
            what: name of the file, for messages.

        Raises:
            IntegrityError: kind ``policy_malformed``; names the line.
        """
        return _Parser(what).parse(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """The policy in a file of the user's.

        Raises:
            UsageError: kind ``policy_unreadable``; there is no such file, or it cannot be read.
            IntegrityError: kind ``policy_malformed``.
        """
        name = os.fspath(path)
        return cls.parse(read_text_file(name, LIMIT_BYTES, "policy"), name)

    def format(self) -> str:
        """The text that ``parse`` reads."""
        urls = self.log_urls or (None,) * len(self.logs)
        lines = [f"log {vkey}" + (f" {url}" if url else "") for vkey, url in zip(self.logs, urls, strict=True)]
        lines += [f"witness {w.name} {w.vkey}" + (f" {w.url}" if w.url else "") for w in self.witnesses]
        for group in self.groups:
            lines.append(f"group {group.name} {group.needed} {' '.join(group.members)}")
        lines.append(f"quorum {self.quorum or NONE}")
        return "".join(f"{line}\n" for line in lines)

    def log_keys(self, origin: str) -> tuple[Vkey, ...]:
        """The keys of writers of one log."""
        return tuple(vkey for vkey in self.logs if vkey.name == origin)

    def witness_keys(self) -> dict[note.KeyName, Vkey]:
        """The witnesses' keys as ``note.verify`` takes them."""
        return {(w.vkey.name, w.vkey.key_id): w.vkey for w in self.witnesses}

    def witnessed(self, cosigners: Set[Vkey]) -> Witnessed:
        """Whether the quorum is met by those whose cosignatures hold, and how many of how many signed.

        Without a quorum it is always met. Keys of no witness here count for nothing.
        """
        signed = {w.name for w in self.witnesses if w.vkey in cosigners}
        have = len(signed)
        for group in self.groups:
            if sum(member in signed for member in group.members) >= group.needed:
                signed.add(group.name)
        return Witnessed(have, len(self.witnesses), self.quorum is None or self.quorum in signed)


@dataclass(slots=True)
class _Parser:
    """One policy, line by line."""

    what: str
    line: int = 0
    logs: list[Vkey] = field(default_factory=list)
    log_urls: list[str | None] = field(default_factory=list)
    witnesses: list[Witness] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    public_keys: set[bytes] = field(default_factory=set)
    quorum: str | None = None

    def parse(self, data: bytes) -> Policy:
        if len(data) > LIMIT_BYTES:
            raise self.malformed(f"{len(data)} bytes, at most {LIMIT_BYTES} are read")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.malformed(f"not UTF-8: {error.reason} at byte {error.start}") from None
        lines = text.split("\n")
        if lines[-1]:
            raise self.malformed("does not end in a line feed; was it cut off?")
        for number, line in enumerate(lines[:-1], 1):
            self.line = number
            if any((char < " " and char != "\t") or char == "\x7f" for char in line):
                raise self.malformed("a control character")
            words = line.replace("\t", " ").split(" ")
            words = [word for word in words if word]
            if words and not words[0].startswith("#"):
                self.statement(words[0], words[1:])
        self.line = 0
        if self.quorum is None:
            raise self.malformed("no quorum line; 'quorum none' says that no witness has to sign")
        return Policy(
            tuple(self.logs),
            tuple(self.witnesses),
            tuple(self.groups),
            None if self.quorum == NONE else self.quorum,
            tuple(self.log_urls),
        )

    def statement(self, keyword: str, words: list[str]) -> None:
        match keyword, words:
            case "log", [vkey]:
                self.log(vkey, None)
            case "log", [vkey, url]:
                self.log(vkey, url)
            case "witness", [name, vkey]:
                self.witness(name, vkey, None)
            case "witness", [name, vkey, url]:
                self.witness(name, vkey, url)
            case "group", [name, needed, _, *_]:
                self.group(name, needed, words[2:])
            case "quorum", [name]:
                self.set_quorum(name)
            case (("log" | "witness" | "group" | "quorum"), _):
                raise self.malformed(f"{len(words)} words after {keyword!r} (a comment needs a line of its own)")
            case _:
                raise self.malformed(f"expected log, witness, group or quorum, found {keyword[:40]!r}")

    def log(self, vkey: str, url: str | None) -> None:
        self.logs.append(self.vkey(vkey, ED25519, "a log's key is of type 1 (Ed25519)"))
        self.log_urls.append(self.url(url))

    def witness(self, name: str, vkey: str, url: str | None) -> None:
        if len(self.witnesses) == MAX_WITNESSES:
            raise self.malformed(f"more than {MAX_WITNESSES} witnesses")
        self.define(name)
        parsed = self.vkey(vkey, COSIGNATURE, "a witness's key is of type 4 (cosignatures)")
        self.witnesses.append(Witness(name, parsed, self.url(url)))

    def group(self, name: str, needed: str, members: list[str]) -> None:
        for member in members:
            if member not in self.names:
                raise self.malformed(f"group {name[:40]!r}: no witness or group {member[:40]!r} before it")
            if member in self.used:
                raise self.malformed(f"group {name[:40]!r}: {member[:40]!r} is a member already")
            self.used.add(member)
        self.define(name)
        count = {"any": 1, "all": len(members)}.get(needed) or (int(needed) if _COUNT.fullmatch(needed) else 0)
        if not 1 <= count <= len(members):
            raise self.malformed(
                f"group {name[:40]!r}: expected all, any or 1 to {len(members)}, found {needed[:40]!r}"
            )
        self.groups.append(Group(name, count, tuple(members)))

    def set_quorum(self, name: str) -> None:
        if self.quorum is not None:
            raise self.malformed("a second quorum line")
        if name != NONE and name not in self.names:
            raise self.malformed(f"quorum: no witness or group {name[:40]!r} before it")
        self.quorum = name

    def define(self, name: str) -> None:
        if name in _RESERVED or name.startswith("#") or not note.check_name(name):
            raise self.malformed(f"{name[:40]!r} cannot be a name")
        if name in self.names:
            raise self.malformed(f"a second {name[:40]!r}")
        self.names.add(name)

    def vkey(self, text: str, kind: int, expected: str) -> Vkey:
        try:
            vkey = note.parse_vkey(text)
        except IntegrityError as error:
            raise self.malformed(str(error)) from error
        if vkey.kind != kind:
            raise self.malformed(f"{expected}, found type {vkey.kind}")
        if vkey.public_key in self.public_keys:
            raise self.malformed(f"the public key of {vkey.name[:80]!r} is in the policy already")
        self.public_keys.add(vkey.public_key)
        return vkey

    def url(self, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise self.malformed(f"expected an http or https URL, found {url[:80]!r}")
        return url

    def malformed(self, message: str) -> IntegrityError:
        place = f"{self.what}, line {self.line}" if self.line else self.what
        return IntegrityError(f"{place}: {message}", kind="policy_malformed", where=self.what)


def read_text_file(path: str, limit_bytes: int, kind: str) -> bytes:
    """A small file that the user names; one byte more than the limit at most is read.

    Raises:
        UsageError: kind ``<kind>_unreadable``.
    """
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UsageError(f"{path}: not a file", kind=f"{kind}_unreadable", where=path)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read(limit_bytes + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise UsageError(f"{path}: cannot be read: {reason}", kind=f"{kind}_unreadable", where=path) from error

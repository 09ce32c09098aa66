"""Calls to a NameNode and its DataNodes that end in time, whatever those do; their errors as this package's.

``hdfs-native`` waits for the NameNode's answer without a limit. Each call therefore runs on a thread of its own, which
its caller leaves behind when the time is up; it ends when the kernel gives the connection up, or the server answers.
Of such threads there may be ``_LEFT_LIMIT``; beyond that calls fail at once. The blocking client is used and not the
asynchronous one: that one polls with the GIL held, and dropping it can stop the process for good.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ciuic_async.errors import CiuicError, StoreError, UsageError

if TYPE_CHECKING:
    from hdfs_native import Client

T = TypeVar("T")

_LEFT_LIMIT = 8
_MESSAGE_LIMIT = 300
_OTHER_ERROR = re.compile(r'\w{1,60}\("(.*)"\)', re.DOTALL)
_RPC_ERROR = re.compile(r'(?:Fatal)?RPCError\("([\w.$]{1,200})", "(.*)', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Access:
    """Whom to talk to, and as whom. ``settings`` are Hadoop's own, and go before those of the configuration folder."""

    authority: str
    settings: dict[str, str]
    config_dir: str | None = None
    kerberos_principal: str | None = None
    kerberos_keytab: str | None = None
    kerberos_cache: str | None = None

    def connect(self) -> Client:
        """A client; nothing is contacted yet."""
        from hdfs_native import Client

        return Client(
            f"hdfs://{self.authority}",
            self.settings,
            self.config_dir,
            kerberos_principal=self.kerberos_principal,
            kerberos_keytab=self.kerberos_keytab,
            kerberos_cache=self.kerberos_cache,
        )


@dataclass(slots=True)
class _Call(Generic[T]):
    """One call on its thread. ``error`` may be anything: the client library panics where it has not thought ahead."""

    work: Callable[[Client], T]
    value: T | None = None
    error: BaseException | None = None

    def run(self, client: Client) -> None:
        try:
            self.value = self.work(client)
        except BaseException as error:
            self.error = error


class Borrowed:
    """A caller's memory, for a call that may be left behind: once it is taken back nobody writes to it any more."""

    def __init__(self, view: memoryview) -> None:
        self._mutex = threading.Lock()
        self._view: memoryview | None = view

    def put(self, at: int, piece: bytes) -> None:
        """Copy ``piece`` to offset ``at``. Raises StoreError (kind ``left``): nobody waits for it any more."""
        with self._mutex:
            if self._view is None:
                raise StoreError("the answer came too late", kind="left")
            self._view[at : at + len(piece)] = piece

    def take_back(self) -> None:
        """The caller uses it for something else from now on."""
        with self._mutex:
            self._view = None


class Link:
    """A client that is made at the first call, and made anew after a call that never came back.

    Any thread may call. A process that was forked off after the first call of its parent has no part in it: calls
    raise, everything else does nothing.

    Args:
        access: the NameNode.
        place: the store's URL, for messages.
    """

    def __init__(self, access: Access, place: str) -> None:
        self._access = access
        self._place = place
        self._mutex = threading.Lock()
        self._client: Client | None = None
        self._left: list[threading.Thread] = []

    def call(self, work: Callable[[Client], T], name: str, limit_s: float) -> T:
        """``work(client)``, or an error when it takes longer than ``limit_s`` seconds.

        Raises:
            FileNotFoundError, FileExistsError: as the NameNode said.
            StoreError: everything else; whether a change was made is then unknown.
        """
        return self.call_all([work], name, limit_s)[0]

    def call_all(self, works: Sequence[Callable[[Client], T]], name: str, limit_s: float) -> list[T]:
        """Several at once, within one limit. Raises the first error, when all have ended or the time is up."""
        client = self._connected()
        calls = [_Call(work) for work in works]
        threads = [threading.Thread(target=call.run, args=(client,), name="ciuic-hdfs", daemon=True) for call in calls]
        deadline = time.monotonic() + limit_s
        try:
            for thread in threads:
                thread.start()
        except RuntimeError as error:
            raise StoreError(f"{self._where(name)}: no thread to be had: {error}", kind="eagain", where=name) from error
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        left = [thread for thread in threads if thread.is_alive()]
        if left:
            self._leave(client, left)
            raise StoreError(
                f"{self._where(name)}: no answer from HDFS in {limit_s:g} s: are the NameNode and the DataNodes up?",
                kind="unreachable",
                where=name,
            )
        for call in calls:
            if call.error is not None:
                if isinstance(call.error, FileNotFoundError | FileExistsError | CiuicError):
                    raise call.error
                raise store_error(self._where(name), name, call.error) from call.error
        return [call.value for call in calls]  # type: ignore[misc]  # no error: there is a value

    def close(self) -> None:
        """Drop the client with its connections; the next call makes another. Idempotent."""
        with self._mutex:
            self._client = None

    def _connected(self) -> Client:
        global _used_in
        if _used_in not in (None, os.getpid()):
            raise StoreError(
                f"{self._place}: HDFS was used before this process was forked off, and cannot be used in both: start "
                "the process with the method 'spawn' or 'forkserver'",
                kind="forked",
                where=self._place,
            )
        with self._mutex:
            self._left = [thread for thread in self._left if thread.is_alive()]
            if len(self._left) >= _LEFT_LIMIT:
                raise StoreError(
                    f"{self._place}: {len(self._left)} earlier calls still wait for an answer: are the NameNode and "
                    "the DataNodes up?",
                    kind="unreachable",
                    where=self._place,
                )
            if self._client is None:
                _used_in = os.getpid()
                try:
                    self._client = self._access.connect()
                except Exception as error:
                    raise _not_connected(self._place, error) from error
                _clients.add(self._client)
            return self._client

    def _leave(self, client: Client, threads: list[threading.Thread]) -> None:
        """Go on without them, over another connection: theirs may be one that nobody answers any more."""
        with self._mutex:
            self._left += threads
            if self._client is client:
                self._client = None

    def _where(self, name: str) -> str:
        return f"{self._place}/{name}" if name else self._place


_clients: weakref.WeakSet[Client] = weakref.WeakSet()
_used_in: int | None = None
"""The process whose threads the client library has."""


def _after_fork_in_child() -> None:
    """No client is ever let go here: its threads are the parent's, and it would wait for their end."""
    for client in list(_clients):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(client.inner))


os.register_at_fork(after_in_child=_after_fork_in_child)


def _not_connected(place: str, error: Exception) -> Exception:
    if "No NameNode hosts found" in str(error):
        return UsageError(
            f"{place}: no NameNode is known for it: give a port (hdfs://host:8020/path), or set HADOOP_CONF_DIR to the "
            "folder of the hdfs-site.xml that defines this name",
            kind="unknown_nameservice",
        )
    return store_error(place, place, error)


# What servers say, by the end of the Java class; then what of it matters to somebody who saves training state.
_JAVA_KINDS = {
    "AccessControlException": ("access_denied", "check owner and permissions of the folder (hdfs dfs -ls)"),
    "AuthorizationException": ("access_denied", "this user may not use this cluster"),
    "SaslException": ("access_denied", "check the Kerberos ticket (klist)"),
    "GSSException": ("access_denied", "check the Kerberos ticket (klist)"),
    "SecretManager$InvalidToken": ("access_denied", "the token is not valid any more"),
    "NSQuotaExceededException": ("edquot", "the folder's quota of names is used up: prune snapshots"),
    "DSQuotaExceededException": ("edquot", "the folder's quota of bytes is used up: prune snapshots"),
    "SafeModeException": ("unavailable", "the NameNode is in safe mode: it takes writes when it has left it"),
    "StandbyException": ("unavailable", "no NameNode is active: wait for the failover"),
    "RetriableException": ("unavailable", "the NameNode is starting: try again"),
    "ParentNotDirectoryException": ("enotdir", "a file stands where a folder is expected"),
    "LeaseExpiredException": ("lease_lost", "somebody removed or took over the unpublished file"),
}
_TEXT_KINDS = (
    ("could only be replicated to 0 nodes", "unavailable", "no DataNode takes blocks: are they up, have they space?"),
    ("could only be written to 0 of", "unavailable", "no DataNode takes blocks: are they up, have they space?"),
    ("SASLError", "access_denied", "check the Kerberos ticket (klist)"),
    ("GSSAPIError", "access_denied", "check the Kerberos ticket (klist)"),
    ("NoSASLMechanism", "access_denied", "the cluster asks for an authentication that this client does not have"),
    ("Path is not a directory", "enotdir", "a file stands where a folder is expected"),
    ("not supported for erasure-coded", "unsupported", "set replication for the folder (hdfs ec -unsetPolicy)"),
    ("DataTransferError", "unreachable", "are the DataNodes up?"),
)


def store_error(place: str, name: str, error: BaseException) -> StoreError:
    """What the client library raised, as the error of this package; ``place`` names what it was about."""
    text = str(error)
    found = _RPC_ERROR.match(text)
    other = _OTHER_ERROR.fullmatch(text)
    java, said = (found[1], found[2]) if found else ("", other[1] if other else text)
    kind, help_ = _JAVA_KINDS.get(java.rpartition(".")[2], ("", ""))
    for part, its_kind, its_help in _TEXT_KINDS:
        if not kind and part in text:
            kind, help_ = its_kind, its_help
    if not kind and isinstance(error, OSError):
        kind, help_ = "unreachable", "is the NameNode up, are host and port right?"
    said = re.split(r"\n|\\n", said, maxsplit=1)[0]
    said = "".join(letter if letter.isprintable() else "?" for letter in said[:_MESSAGE_LIMIT])
    return StoreError(
        f"{place}: {said or type(error).__name__} ({help_ or 'check the NameNode'})", kind=kind or "hdfs", where=name
    )

"""The key that signs: Ed25519, one a node, kept outside every chain.

A key is found in this order: what the caller names, the environment variable ``CIUIC_KEY``, the user's own key file.
The first two may be a path or the secret itself, the single line ``ED25519-SECRET+<base64 of the 32-byte seed>``.
Verifiers never take a key from here: what a key proves depends on where the *verifier* got its public half.

No message of this module shows a secret.
"""

from __future__ import annotations

import base64
import errno
import os
import secrets
import stat
import warnings
from contextlib import suppress

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ciuic_async.errors import CiuicWarning, UsageError
from ciuic_async.transparency.note import (
    COSIGNATURE,
    ED25519,
    MAX_TIME_S,
    Signature,
    Vkey,
    check_name,
    cosigned_text,
    format_note,
)
from ciuic_async.user_folders import OURS, config_folder

ENVIRONMENT = "CIUIC_KEY"
_PREFIX = "ED25519-SECRET+"
_LIMIT_BYTES = 4096


class SigningKey:
    """An Ed25519 key. Immutable; any thread may sign.

    Attributes:
        path: the file it came from, or None for a key from the environment, from the caller or in memory only.
    """

    def __init__(self, private: Ed25519PrivateKey, path: str | None = None) -> None:
        self._private = private
        self._public = private.public_key().public_bytes_raw()
        self.path = path

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the operating system's randomness, in memory only."""
        return cls(Ed25519PrivateKey.from_private_bytes(secrets.token_bytes(32)))

    @classmethod
    def from_secret(cls, text: str) -> SigningKey:
        """The key of a secret's single line.

        Raises:
            UsageError: kind ``key_malformed``.
        """
        return _parse_secret(text, "the secret given")

    def __repr__(self) -> str:
        return f"SigningKey(path={self.path!r}, public={self._public.hex()})"

    def vkey(self, origin: str) -> str:
        """The verifier key under the name ``origin``: what others pin."""
        return str(self._vkey(origin))

    def key_id(self, origin: str) -> bytes:
        """The 4 bytes that name this key in a signature line by ``origin``."""
        return self._vkey(origin).key_id

    def sign(self, name: str, text: str) -> str:
        """``text`` as a note with one signature by ``name``. ``text`` ends in LF and has no other control character.

        Ed25519 is deterministic: the same text gives the same note.
        """
        if not text.endswith("\n") or any(char < " " and char != "\n" for char in text):
            raise ValueError("the text of a note ends in LF and has no other control character")
        vkey = self._vkey(name)
        return format_note(text, (Signature(name, vkey.key_id, self._private.sign(text.encode())),))

    def cosigner(self, name: str) -> str:
        """The verifier key under the name of a witness: for cosignatures, which no other key verifies."""
        return str(self._vkey(name, COSIGNATURE))

    def cosign(self, name: str, text: str, at_s: int) -> Signature:
        """A witness's signature line under the log head ``text``, made at ``at_s`` (POSIX seconds)."""
        if not 0 <= at_s <= MAX_TIME_S:
            raise ValueError(f"{at_s} is no time for a cosignature")
        signed = self._private.sign(cosigned_text(text, at_s).encode())
        return Signature(name, self._vkey(name, COSIGNATURE).key_id, at_s.to_bytes(8, "big") + signed)

    def _vkey(self, name: str, kind: int = ED25519) -> Vkey:
        if not check_name(name):
            raise UsageError(f"{name[:120]!r} cannot be the name of a key: no space, no '+', not empty")
        return Vkey(name, self._public, kind)

    def secret(self) -> str:
        """The key itself, as ``from_secret`` takes it: for the key file, and for processes of our own."""
        return _PREFIX + base64.b64encode(self._private.private_bytes_raw()).decode()


def load_or_create(explicit: str | os.PathLike[str] | None, *, chain_folder: str | None) -> SigningKey:
    """The key that signs here; made on first use.

    Args:
        explicit: a path or the secret itself; None looks at ``CIUIC_KEY``, then at the user's key file.
        chain_folder: the folder of a local chain, in which no key may lie; None for other stores.

    Returns:
        A key. Where the user's own key file cannot be made (a read-only home), one in memory, with a ``CiuicWarning``.

    Raises:
        UsageError: kind ``key_exposed`` (others may read the file), ``key_in_chain``, ``key_malformed``,
            ``key_unreadable`` or ``key_not_writable``.
    """
    named = _named(explicit)
    if isinstance(named, SigningKey):
        return named
    if named is not None:
        return _load(named, chain_folder) or _create(named, chain_folder)
    path = _user_path()
    try:
        if path is None:
            raise UsageError("this user has no home folder", kind="key_not_writable")
        return _load(path, chain_folder) or _create(path, chain_folder)
    except UsageError as error:
        if error.kind != "key_not_writable" and not _is_closed_home(error):
            raise
        warnings.warn(
            f"{error}: a key is kept in memory for this process only; set {ENVIRONMENT} to a file that lasts",
            CiuicWarning,
            stacklevel=2,
        )
        return SigningKey.generate()


def find(explicit: str | os.PathLike[str] | None, *, chain_folder: str | None) -> SigningKey | None:
    """As ``load_or_create``, but nothing is made: None where there is no key yet."""
    named = _named(explicit)
    if isinstance(named, SigningKey):
        return named
    if named is not None:
        return _load(named, chain_folder)
    path = _user_path()
    try:
        return None if path is None else _load(path, chain_folder)
    except UsageError as error:
        if not _is_closed_home(error):
            raise
        return None


def make(path: str | os.PathLike[str] | None) -> SigningKey:
    """A new key in a file that was not there; None: the user's own. Durable on return.

    Raises:
        UsageError: kind ``key_exists`` or ``key_not_writable``.
    """
    name = _user_path() if path is None else os.path.abspath(os.path.expanduser(os.fspath(path)))
    if name is None:
        raise UsageError("this user has no home folder: name a path", kind="key_not_writable")
    if os.path.lexists(name):
        raise _exists(name)
    return _create(name, None)


def successor(key: SigningKey) -> SigningKey:
    """The key that is to follow one that lies in a file, beside it (``.new``); made if it is not there yet.

    Raises:
        UsageError: kind ``key_not_in_file``, or as ``load_or_create``.
    """
    if key.path is None:
        raise UsageError(
            f"the key here is in no file ({ENVIRONMENT} holds the secret itself, or it is in memory only): make one "
            "with 'ciuic keys new', and use that",
            kind="key_not_in_file",
        )
    path = f"{os.path.realpath(key.path)}.new"
    return _load(path, None) or _create(path, None)


def install(following: SigningKey, at: SigningKey, date: str) -> str:
    """Put a key from ``successor`` in the place of the one before, which is kept. Durable on return.

    Returns:
        Where the key of before is: its path and ``.old-<date>``.

    Raises:
        UsageError: kind ``key_not_writable``.
    """
    path = os.path.realpath(at.path or "")
    kept = f"{path}.old-{date}"
    try:
        if not (os.path.exists(kept) and os.path.samefile(path, kept)):  # else an attempt of before came this far
            os.link(path, kept)  # not renamed: at no moment is there no key
        fsync_folder(os.path.dirname(path))
        os.rename(following.path or "", path)
        fsync_folder(os.path.dirname(path))
    except OSError as error:
        raise UsageError(
            f"{path}: the new key cannot be put here: {os.strerror(error.errno or 0)}; the old one goes on signing, "
            f"and the new one is {following.path}",
            kind="key_not_writable",
            where=path,
        ) from error
    return kept


def _exists(path: str) -> UsageError:
    return UsageError(
        f"{path}: there is a file already; 'ciuic keys rotate' replaces a key", kind="key_exists", where=path
    )


def _is_closed_home(error: UsageError) -> bool:
    """Whether the user's own key could not even be looked for: a home folder of somebody else, as in containers."""
    return error.kind == "key_unreadable" and isinstance(error.__cause__, PermissionError)


def _named(explicit: str | os.PathLike[str] | None) -> SigningKey | str | None:
    """The secret or the path that the caller or the environment names; None where neither does."""
    source = "the key given"
    value = None if explicit is None else os.fspath(explicit)
    if value is None:
        source, value = ENVIRONMENT, os.environ.get(ENVIRONMENT, "").strip() or None
    if value is None:
        return None
    if not value or "\0" in value:
        raise UsageError(f"{source}: expected a path or a secret, found nothing usable", kind="key_malformed")
    if "-SECRET+" in value.upper():
        return _parse_secret(value, source)
    if _is_seed(value):
        # Taken for a path it would end up in a file name and in messages.
        raise UsageError(f"{source}: a bare secret; put {_PREFIX} before it", kind="key_malformed")
    return os.path.abspath(os.path.expanduser(value))


def user_path(name: str) -> str | None:
    """Where a key file of the user's own lies; None without a home."""
    return config_folder(OURS, "keys", name)


def _user_path() -> str | None:
    return user_path("ed25519.key")


def _load(path: str, chain_folder: str | None) -> SigningKey | None:
    """The key in the file at ``path``; None where there is no such file."""
    content = read_private(path, chain_folder, _LIMIT_BYTES, "one line of text")
    return None if content is None else _parse_secret(content.decode("ascii", "replace"), path, path)


def read_private(path: str, chain_folder: str | None, limit_bytes: int, form: str) -> bytes | None:
    """A file that only its owner can read; None where there is no such file. Symbolic links are followed.

    Args:
        chain_folder: the folder of a local chain, in which it may not lie.
        form: what it should be, for messages.

    Raises:
        UsageError: kind ``key_in_chain``, ``key_unreadable``, ``key_malformed`` (no file, or too long) or
            ``key_exposed``.
    """
    refuse_in_chain(path, chain_folder)
    try:
        # O_NONBLOCK: opening a pipe must not wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = str(error) if isinstance(error, ValueError) else os.strerror(error.errno or 0)
        raise UsageError(
            f"{path}: the key cannot be read: {reason}; check the path and its owner", kind="key_unreadable", where=path
        ) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit_bytes:
            raise UsageError(f"{path}: not a key file ({form})", kind="key_malformed", where=path)
        if status.st_mode & 0o077:
            raise UsageError(
                f"{path}: others may read or write this key (mode {stat.S_IMODE(status.st_mode):04o}, expected 0600); "
                "run chmod 600 on it, and make a new key if others use this machine",
                kind="key_exposed",
                where=path,
            )
        return os.read(descriptor, limit_bytes)
    finally:
        os.close(descriptor)


def _create(path: str, chain_folder: str | None) -> SigningKey:
    """A new key at ``path``, durable on return; the other's key where another process was first."""
    refuse_in_chain(path, chain_folder)
    key = SigningKey.generate()
    try:
        write_once(path, (key.secret() + "\n").encode(), 0o600)
    except FileExistsError as error:
        existing = _load(path, chain_folder)
        if existing is None:
            # A dangling link: neither there nor free. Following it would put the key where nobody looks.
            raise UsageError(
                f"{path}: the key cannot be made: a link leads nowhere; remove it", kind="key_unreadable", where=path
            ) from error
        return existing
    except OSError as error:
        raise UsageError(
            f"{path}: the key cannot be made: {os.strerror(error.errno or 0)}; "
            f"name another path, or set {ENVIRONMENT} to a path or a secret",
            kind="key_not_writable",
            where=path,
        ) from error
    return SigningKey(key._private, path)


def write_once(path: str, data: bytes, mode: int) -> None:
    """A new file, durable on return, with its folder where that is missing.

    Written aside and linked: who loses a race (FileExistsError) finds a whole file, never half of one.

    Raises:
        OSError: nothing was made but folders.
    """
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".{os.path.basename(path)[:100]}.{secrets.token_hex(8)}")
    _make_folders(folder)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(descriptor)
        os.link(temporary, path)
    finally:
        os.close(descriptor)
        os.unlink(temporary)
    fsync_folder(folder)


def _make_folders(folder: str) -> None:
    """Make what is missing of ``folder``, for its owner only."""
    if not os.path.isdir(folder):
        _make_folders(os.path.dirname(folder))
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
            fsync_folder(os.path.dirname(folder))


def fsync_folder(folder: str) -> None:
    """Make a name in ``folder`` durable; a folder that may not be opened or synced is left alone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def refuse_in_chain(path: str, chain_folder: str | None) -> None:
    """Raises UsageError (kind ``key_in_chain``) where a key's path lies inside a local chain."""
    if chain_folder is None:
        return
    chain = os.path.realpath(chain_folder)
    if any(os.path.commonpath([chain, place]) == chain for place in (os.path.abspath(path), os.path.realpath(path))):
        raise UsageError(
            f"{path}: the key lies inside the chain {chain_folder}, where whoever copies the chain gets it; "
            "move it elsewhere",
            kind="key_in_chain",
            where=path,
        )


def _parse_secret(text: str, what: str, path: str | None = None) -> SigningKey:
    line = text.removesuffix("\n").removesuffix("\r")
    encoded = line.removeprefix(_PREFIX)
    if not line.startswith(_PREFIX) or not _is_seed(encoded):
        raise UsageError(
            f"{what}: not a key: expected the single line {_PREFIX}<base64 of 32 bytes>",
            kind="key_malformed",
            where=path,
        )
    return SigningKey(Ed25519PrivateKey.from_private_bytes(base64.b64decode(encoded)), path)


def _is_seed(text: str) -> bool:
    """Whether ``text`` is canonical base64 of 32 bytes."""
    try:
        seed = base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return len(seed) == 32 and base64.b64encode(seed).decode() == text

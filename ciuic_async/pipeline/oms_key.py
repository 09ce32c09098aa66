"""The key of exports: an ECDSA key in a PEM file, since OpenSSF Model Signing takes no Ed25519.

The same care as for the key that signs chains: nobody else may read it, it lies outside every chain, and no message
shows it. Verifiers get its public half from its owner, not from beside the model.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from ciuic_async.errors import UsageError
from ciuic_async.transparency.keys import read_private, user_path, write_once

CURVES = ("secp256r1", "secp384r1", "secp521r1")
_LIMIT_BYTES = 16384


@dataclass(frozen=True, slots=True)
class OmsKey:
    """A key, and the file it came from."""

    private: ec.EllipticCurvePrivateKey = field(repr=False)
    path: str

    @property
    def public_pem(self) -> bytes:
        """What verifiers need (``--public_key``)."""
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    @property
    def public_path(self) -> str:
        """Where ``load_or_create`` put the public half of a key that it made."""
        return f"{self.path}.pub"


def load_or_create(explicit: str | os.PathLike[str] | None, *, chain_folder: str | None) -> OmsKey:
    """The key that signs exports here.

    Args:
        explicit: a PEM file that is there; None: the user's own, made on first use with its public half beside it.
        chain_folder: the folder of a local chain, in which no key may lie.

    Raises:
        UsageError: kind ``key_exposed``, ``key_in_chain``, ``key_malformed``, ``key_unreadable`` or
            ``key_not_writable``.
    """
    if explicit is not None:
        path = os.path.abspath(os.path.expanduser(os.fspath(explicit)))
        key = _load(path, chain_folder)
        if key is None:
            raise UsageError(f"{path}: there is no such key file", kind="key_unreadable", where=path)
        return key
    path = _user_path()
    key = _load(path, chain_folder) or _create(path, chain_folder)
    with suppress(OSError):  # it can be made again from the key at any time
        write_once(key.public_path, key.public_pem, 0o644)
    return key


def _user_path() -> str:
    path = user_path("export-p256.pem")
    if path is None:
        raise UsageError("this user has no home folder; name a key file", kind="key_not_writable")
    return path


def _load(path: str, chain_folder: str | None) -> OmsKey | None:
    """The key in a file; None where there is none."""
    data = read_private(path, chain_folder, _LIMIT_BYTES, "PEM")
    if data is None:
        return None
    try:
        private = load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        private = None
    if not isinstance(private, ec.EllipticCurvePrivateKey) or private.curve.name not in CURVES:
        raise UsageError(
            f"{path}: expected an unencrypted ECDSA key in PEM on one of {', '.join(CURVES)}; "
            "for example: openssl ecparam -name prime256v1 -genkey -noout -out key.pem",
            kind="key_malformed",
            where=path,
        )
    return OmsKey(private, path)


def _create(path: str, chain_folder: str | None) -> OmsKey:
    """A new key at ``path``, durable on return; another process's where that was first."""
    private = ec.generate_private_key(ec.SECP256R1())
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        with suppress(FileExistsError):
            write_once(path, pem, 0o600)
    except OSError as error:
        raise UsageError(
            f"{path}: the key cannot be made: {os.strerror(error.errno or 0)}; name a key file",
            kind="key_not_writable",
            where=path,
        ) from error
    key = _load(path, chain_folder)
    if key is None:
        raise UsageError(f"{path}: a link that leads nowhere; remove it", kind="key_unreadable", where=path)
    return key

"""``ciuic.json``: what a chain is (docs/format.md, section 1)."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from ciuic_async.errors import FormatVersionError, IntegrityError
from ciuic_async.format import jsontext, layout
from ciuic_async.format.fields import Fields

SCHEMA = "ciuic.dev/chain/v1"
FORMAT_VERSION = 1
KNOWN_FEATURES: tuple[str, ...] = ()
"""What manifests may require."""
ORDERING_ETCD = "ordering-etcd"
"""An etcd decides who writes next: no writer may claim a slot in the store alone. Readers need no etcd."""
KNOWN_CHAIN_FEATURES = (*KNOWN_FEATURES, ORDERING_ETCD)
CHUNK_SIZE_BYTES = 4 << 20
LIMIT_BYTES = 64 << 10

_ORIGIN = re.compile(r"ciuic\.dev/chain/[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class ChainFile:
    """Identity and parameters of a chain; never changes after creation."""

    origin: str
    chunk_size_bytes: int = CHUNK_SIZE_BYTES
    features_required: tuple[str, ...] = ()
    features_optional: tuple[str, ...] = ()

    @classmethod
    def new(cls, features_required: tuple[str, ...] = ()) -> ChainFile:
        """A chain of its own random origin."""
        return cls(origin=f"ciuic.dev/chain/{secrets.token_hex(16)}", features_required=features_required)

    def encode(self) -> bytes:
        return jsontext.encode(
            {
                "schema": SCHEMA,
                "format": FORMAT_VERSION,
                "origin": self.origin,
                "digest": "blake3-256",
                "chunk_size_bytes": self.chunk_size_bytes,
                "features_required": list(self.features_required),
                "features_optional": list(self.features_optional),
            }
        )

    @classmethod
    def decode(cls, data: bytes) -> ChainFile:
        what = layout.CHAIN_FILE
        fields = Fields(jsontext.decode(data, what=what, limit_bytes=LIMIT_BYTES), what)
        fields.schema(SCHEMA)
        version = fields.integer("format")
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                f"{what}: chain has format version {version}, this version reads {FORMAT_VERSION}; upgrade ciuic-async",
                where=what,
            )
        if fields.string("digest") != "blake3-256":
            raise FormatVersionError(f"{what}: unknown digest {fields.string('digest')[:80]!r}", where=what)
        required, optional = fields.features(KNOWN_CHAIN_FEATURES)
        origin = fields.matching("origin", _ORIGIN)
        chunk_size = fields.integer("chunk_size_bytes", low=1 << 16, high=64 << 20)
        if chunk_size & (chunk_size - 1):
            raise IntegrityError(f"{what}: chunk size {chunk_size} is no power of two", kind="malformed", where=what)
        fields.done()
        return cls(origin, chunk_size, required, optional)

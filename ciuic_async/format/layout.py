"""Every name in a chain, as pure functions. Nobody builds a path by hand, and no name comes from a user's string."""

from __future__ import annotations

import re
import secrets

from ciuic_async.errors import IntegrityError

CHAIN_FILE = "ciuic.json"
LOG_HEAD = "log/checkpoint"
WITNESSED = "log/witnessed"
POLICY = "log/policy.txt"
RECEIPTS = "receipts"
SEGMENTS = "segments"
MANIFESTS = "manifests"
LOCATORS = "locators"
SLOTS = "log/commit"
TILES = "log/tile"
TEMPORARY = "tmp"

ID = re.compile(r"[0-9a-f]{20}")
_NUMBER = r"(?:0|[1-9][0-9]{0,8})"
_GROUPS = r"(?:(?!x000)(?:x[0-9]{3}/){1,6})?[0-9]{3}"  # no leading zero group; at most 7 groups
_WIDTH = r"(?:[1-9][0-9]?|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
_KNOWN = re.compile(
    "|".join(
        (
            r"ciuic\.json",
            r"log/(?:checkpoint|witnessed|policy\.txt)",
            rf"segments/(?P<segment>[0-9a-f]{{20}})/{_NUMBER}-{_NUMBER}\.seg",
            rf"manifests/(?P<manifest>[0-9a-f]{{20}})/(?:root|{_NUMBER})\.json",
            rf"locators/(?P<locator>[0-9a-f]{{20}})\.(?P<generation>{_NUMBER})\.json",
            r"receipts/(?P<receipt>[0-9a-f]{20})\.(?:tlog-proof|tsr)",
            rf"log/tile/(?:entries|[0-9]|[1-5][0-9]|6[0-3])/{_GROUPS}(?:\.p/{_WIDTH})?",
            r"log/commit/(?P<slot>[0-9]{20})",
            r"tmp/[0-9a-f]{32}",
        )
    )
)


def new_id() -> str:
    """A snapshot or run id: 20 hex digits from the operating system, never from a generator that training uses."""
    return secrets.token_hex(10)


def segment(snapshot: str, rank: int, number: int) -> str:
    """A segment that ``rank`` wrote; both numbers are below 10^9."""
    return f"{SEGMENTS}/{snapshot}/{rank}-{number}.seg"


def manifest_root(snapshot: str) -> str:
    """The file that a snapshot's entry refers to."""
    return f"{MANIFESTS}/{snapshot}/root.json"


def manifest_part(snapshot: str, part: int) -> str:
    """A file that the manifest's root refers to."""
    return f"{MANIFESTS}/{snapshot}/{part}.json"


def locator(snapshot: str, generation: int) -> str:
    """Where the chunks lie; the newest generation counts."""
    return f"{LOCATORS}/{snapshot}.{generation}.json"


def receipt(snapshot: str) -> str:
    """The proof that a snapshot's entry is in a signed log head (C2SP tlog-proof)."""
    return f"{RECEIPTS}/{snapshot}.tlog-proof"


def timestamp(snapshot: str) -> str:
    """An RFC 3161 time stamp of a head that holds a snapshot's entry."""
    return f"{RECEIPTS}/{snapshot}.tsr"


def slot(old_size: int) -> str:
    """The create-once name that decides who writes the entry after ``old_size`` entries."""
    return f"{SLOTS}/{old_size:020d}"


def tile(level: int, index: int, width: int = 256) -> str:
    """A hash tile (C2SP tlog-tiles); ``width`` below 256 names a partial tile."""
    return f"{TILES}/{level}/{_index_path(index)}{_partial(width)}"


def entry_bundle(index: int, width: int = 256) -> str:
    """An entry bundle (C2SP tlog-tiles)."""
    return f"{TILES}/entries/{_index_path(index)}{_partial(width)}"


def temporary(writer: bytes = b"") -> str:
    """The name of a file that is not yet published: 16 hex digits that tell whose it is, then random ones."""
    whose = writer[:8].hex().ljust(16, "0")
    return f"{TEMPORARY}/{whose}{secrets.token_hex(8)}"


def is_temporary_of(name: str, writer: bytes) -> bool:
    """Whether ``temporary(writer)`` made the last component of ``name``."""
    return name.rpartition("/")[2].startswith(writer[:8].hex().ljust(16, "0"))


def owner(name: str) -> str | None:
    """The snapshot a segment, manifest, locator or receipt belongs to; None for other names."""
    match = _KNOWN.fullmatch(name)
    if not match:
        return None
    return match["segment"] or match["manifest"] or match["locator"] or match["receipt"]


def locator_generation(name: str) -> int | None:
    """The generation of a locator's name; None for other names."""
    match = _KNOWN.fullmatch(name)
    return int(match["generation"]) if match and match["generation"] is not None else None


def slot_number(name: str) -> int | None:
    """The old size that a slot's name holds; None for other names."""
    match = _KNOWN.fullmatch(name)
    return int(match["slot"]) if match and match["slot"] is not None else None


def is_known(name: str) -> bool:
    """Whether version 1 of the format has files of this name."""
    return _KNOWN.fullmatch(name) is not None


def check_reference(name: str, prefix: str, what: str) -> str:
    """``name`` if it is one that this format writes under ``prefix``; references in files are hostile.

    Raises:
        IntegrityError: kind ``bad_name``.
    """
    if not (name.startswith(prefix + "/") and is_known(name)):
        raise IntegrityError(
            f"{what}: refers to {name[:120]!r}, which is not a name under {prefix}/", kind="bad_name", where=what
        )
    return name


def _index_path(index: int) -> str:
    groups = [f"{index % 1000:03d}"]
    while index >= 1000:
        index //= 1000
        groups.append(f"x{index % 1000:03d}")
    return "/".join(reversed(groups))


def _partial(width: int) -> str:
    if not 1 <= width <= 256:
        raise ValueError(f"tile width {width} is not in 1..256")
    return "" if width == 256 else f".p/{width}"

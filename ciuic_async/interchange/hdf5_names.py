"""What HDF5 files of ours are told by, and how their elements are stored. No torch, no h5py."""

from __future__ import annotations

ALIGNMENT_BYTES = 64
"""Of elements on their way from the process that reads a file."""
TREE = "ciuic.tree"
DTYPE = "ciuic.dtype"
FORMAT = "ciuic.format"
VERSION = 1

NATIVE: dict[str, str] = {
    **{name: f"<u{int(name[4:]) // 8}" for name in ("uint8", "uint16", "uint32", "uint64")},
    **{name: f"<i{int(name[3:]) // 8}" for name in ("int8", "int16", "int32", "int64")},
    **{name: f"<f{int(name[5:]) // 8}" for name in ("float16", "float32", "float64")},
    "complex64": "<c8",
    "complex128": "<c16",
}
"""Element types that HDF5 has, and how numpy calls them; the others are unsigned integers of their size."""


def stored_as(dtype: str, item_bytes: int) -> str:
    """How numpy calls the elements of the dataset of a tensor."""
    return NATIVE.get(dtype, f"<u{item_bytes}")

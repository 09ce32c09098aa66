"""Names and bytes of format version 1 (docs/format.md): no I/O, no torch, no threads."""

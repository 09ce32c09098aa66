"""The log: notes, tiles, proofs, slots, keys (C2SP formats)."""

"""Inclusion and consistency proofs: made as in RFC 6962, section 2.1, checked as in RFC 9162, sections 2.1.3 and 2.1.4.

Proofs are made from a *subtree* function: ``subtree(height, index)`` is the hash of the perfect subtree over the leaves
``[index << height, (index + 1) << height)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ciuic_async.errors import IntegrityError
from ciuic_async.format.merkle import EMPTY_ROOT, node_hash

Subtree = Callable[[int, int], bytes]


def make_inclusion(index: int, size: int, subtree: Subtree) -> list[bytes]:
    """The audit path of leaf ``index`` in the tree of the first ``size`` leaves, leaf side first."""
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} is not in a tree of {size}")
    start, end = 0, size
    path = []
    while end - start > 1:
        middle = start + _split(end - start)
        if index < middle:
            path.append(_root(middle, end, subtree))
            end = middle
        else:
            path.append(_root(start, middle, subtree))
            start = middle
    return path[::-1]


def make_consistency(old_size: int, new_size: int, subtree: Subtree) -> list[bytes]:
    """The proof that the tree of the first ``new_size`` leaves extends that of the first ``old_size``."""
    if not 0 <= old_size <= new_size:
        raise ValueError(f"a tree of {new_size} cannot extend one of {old_size}")
    if old_size in (0, new_size):
        return []
    start, end = 0, new_size
    path = []
    while end != old_size:
        middle = start + _split(end - start)
        if old_size <= middle:
            path.append(_root(middle, end, subtree))
            end = middle
        else:
            path.append(_root(start, middle, subtree))
            start = middle
    if start:
        path.append(_root(start, end, subtree))  # else the verifier knows it: the old root
    return path[::-1]


def check_inclusion(index: int, size: int, leaf_hash: bytes, path: Sequence[bytes], root: bytes) -> None:
    """Check that ``leaf_hash`` is leaf ``index`` of the tree of ``size`` leaves with this ``root``.

    Raises:
        IntegrityError: kind ``proof_invalid``.
    """
    if not 0 <= index < size:
        raise _invalid(f"leaf {index} is not in a tree of {size}")
    node, last, current = index, size - 1, leaf_hash
    for sibling in path:
        if last == 0:
            raise _invalid("the inclusion proof is too long")
        if node & 1 or node == last:
            current = node_hash(sibling, current)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            current = node_hash(current, sibling)
        node, last = node >> 1, last >> 1
    if last:
        raise _invalid("the inclusion proof is too short")
    if current != root:
        raise _invalid(f"the inclusion proof of leaf {index} leads to another root")


def check_consistency(old_size: int, new_size: int, old_root: bytes, new_root: bytes, path: Sequence[bytes]) -> None:
    """Check that the tree with ``new_root`` extends the one with ``old_root``.

    Raises:
        IntegrityError: kind ``proof_invalid``; somebody shows two histories, or the proof is damaged.
    """
    if not 0 <= old_size <= new_size:
        raise _invalid(f"a tree of {new_size} cannot extend one of {old_size}")
    if old_size in (0, new_size):
        if path or (old_size == new_size and old_root != new_root) or (old_size == 0 and old_root != EMPTY_ROOT):
            raise _invalid(f"trees of {old_size} and {new_size} are not one history")
        return
    hashes = list(path)
    if not old_size & (old_size - 1):
        hashes.insert(0, old_root)  # a perfect tree is its own first node
    if not hashes:
        raise _invalid("the consistency proof is too short")
    node, last = old_size - 1, new_size - 1
    while node & 1:
        node, last = node >> 1, last >> 1
    old = new = hashes[0]
    for sibling in hashes[1:]:
        if last == 0:
            raise _invalid("the consistency proof is too long")
        if node & 1 or node == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while not node & 1 and node:
                node, last = node >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        node, last = node >> 1, last >> 1
    if last or old != old_root or new != new_root:
        raise _invalid(f"trees of {old_size} and {new_size} are not one history")


def _split(count: int) -> int:
    """The largest power of two strictly below ``count``."""
    return 1 << ((count - 1).bit_length() - 1)


def _root(start: int, end: int, subtree: Subtree) -> bytes:
    """The hash over leaves ``[start, end)``, where ``start`` is a multiple of a power of two not below the count."""
    count = end - start
    if not count & (count - 1):
        height = count.bit_length() - 1
        return subtree(height, start >> height)
    middle = start + _split(count)
    return node_hash(_root(start, middle, subtree), _root(middle, end, subtree))


def _invalid(message: str) -> IntegrityError:
    return IntegrityError(f"proof: {message}", kind="proof_invalid")

"""Inclusion and consistency proofs against published vectors and a plain recomputation."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ciuic_async.errors import IntegrityError
from ciuic_async.format import merkle
from ciuic_async.transparency import proof

# The test tree of the certificate-transparency projects (transparency-dev/merkle, testonly/constants.go).
LEAVES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOT_OF_8 = "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"
CONSISTENCY_6_8 = [
    "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
    "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
]


def subtree_of(hashes: list[bytes]) -> Callable[[int, int], bytes]:
    return lambda height, index: merkle.root(hashes[index << height : (index + 1) << height])


def test_published_vectors() -> None:
    """Root and consistency proof of the common test tree are those that other implementations publish."""
    hashes = [merkle.leaf_hash(leaf) for leaf in LEAVES]
    assert merkle.root(hashes).hex() == ROOT_OF_8
    made = proof.make_consistency(6, 8, subtree_of(hashes))
    assert [item.hex() for item in made] == CONSISTENCY_6_8


def test_every_proof_of_small_trees_holds_and_no_changed_one_does() -> None:
    """For all sizes to 33: every proof made is accepted; with another leaf, root or one hash changed it is not."""
    hashes = [merkle.leaf_hash(bytes([number])) for number in range(33)]
    subtree = subtree_of(hashes)
    other = merkle.leaf_hash(b"other")
    for size in range(1, 34):
        root = merkle.root(hashes[:size])
        for index in range(size):
            path = proof.make_inclusion(index, size, subtree)
            proof.check_inclusion(index, size, hashes[index], path, root)
            wrong = [(hashes[index], path, other), (other, path, root), (hashes[index], [*path, other], root)]
            wrong += [(hashes[index], [*path[:at], other, *path[at + 1 :]], root) for at in range(len(path))]
            if path:
                wrong.append((hashes[index], path[:-1], root))
            for leaf, changed, top in wrong:
                with pytest.raises(IntegrityError):
                    proof.check_inclusion(index, size, leaf, changed, top)
        for old in range(size + 1):
            old_root = merkle.root(hashes[:old])
            path = proof.make_consistency(old, size, subtree)
            proof.check_consistency(old, size, old_root, root, path)
            wrong_paths = [[*path, other], *([*path[:at], other, *path[at + 1 :]] for at in range(len(path)))]
            if path:
                wrong_paths.append(path[:-1])
            for changed in wrong_paths:
                with pytest.raises(IntegrityError):
                    proof.check_consistency(old, size, old_root, root, changed)
            with pytest.raises(IntegrityError):
                proof.check_consistency(old, size, other, root, path)
            if old:
                with pytest.raises(IntegrityError):
                    proof.check_consistency(old, size, old_root, other, path)


@pytest.mark.parametrize(("index", "size"), [(0, 0), (-1, 3), (3, 3)])
def test_what_is_not_in_the_tree_is_refused(index: int, size: int) -> None:
    """A leaf outside the tree has no proof, and none is accepted."""
    with pytest.raises(ValueError, match="not in a tree"):
        proof.make_inclusion(index, size, subtree_of([]))
    with pytest.raises(IntegrityError):
        proof.check_inclusion(index, size, merkle.EMPTY_ROOT, [], merkle.EMPTY_ROOT)


def test_a_tree_that_shrank_is_refused() -> None:
    """There is no consistency from a larger tree to a smaller one."""
    with pytest.raises(ValueError, match="cannot extend"):
        proof.make_consistency(3, 2, subtree_of([]))
    with pytest.raises(IntegrityError):
        proof.check_consistency(3, 2, merkle.EMPTY_ROOT, merkle.EMPTY_ROOT, [])


def test_an_empty_proof_shows_nothing() -> None:
    """Between two sizes that differ an empty path is too short, whether or not the old tree is perfect."""
    hashes = [merkle.leaf_hash(bytes([number])) for number in range(9)]
    for old in range(1, 9):
        with pytest.raises(IntegrityError) as caught:
            proof.check_consistency(old, 9, merkle.root(hashes[:old]), merkle.root(hashes), [])
        assert caught.value.kind == "proof_invalid"

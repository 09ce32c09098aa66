"""The error tree is an interface: its names, grouping and kinds stay as they are."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

from ciuic_async import errors

TREE = {
    "CiuicError": ("Exception", "error"),
    "UsageError": ("CiuicError", "usage"),
    "NotFoundError": ("CiuicError", "not_found"),
    "TargetMismatchError": ("CiuicError", "target_mismatch"),
    "CommitConflictError": ("CiuicError", "commit_conflict"),
    "StoreError": ("CiuicError", "store"),
    "IntegrityError": ("CiuicError", "integrity"),
    "FormatVersionError": ("CiuicError", "format_version"),
    "SaveFailedError": ("CiuicError", "save_failed"),
    "InternalError": ("CiuicError", "internal"),
}


def test_the_tree() -> None:
    """Names, parents and default kinds; a new error is a decision about all of them."""
    found = {
        name: (cls.__mro__[1].__name__, cls.default_kind)
        for name, cls in vars(errors).items()
        if inspect.isclass(cls) and issubclass(cls, Exception) and not issubclass(cls, Warning)
    }
    assert found == TREE
    assert issubclass(errors.CiuicWarning, UserWarning)


@pytest.mark.parametrize("name", sorted(TREE))
def test_the_drawing_shows_it(name: str) -> None:
    """Every error stands in the drawing at the head of the module, and says what to do."""
    assert name in (errors.__doc__ or "")
    assert getattr(errors, name).__doc__


@pytest.mark.parametrize("name", sorted(TREE))
def test_errors_cross_process_borders(name: str) -> None:
    """Class, message, kind and place survive copying and the protocol that multiprocessing uses."""
    cls = getattr(errors, name)
    for made in (cls("what happened"), cls("what", kind="precise", where="log/checkpoint")):
        for back in (copy.copy(made), pickle.loads(pickle.dumps(made))):
            assert type(back) is cls
            assert (str(back), back.kind, back.where) == (str(made), made.kind, made.where)

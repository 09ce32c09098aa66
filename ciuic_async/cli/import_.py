"""``ciuic import``: plain checkpoint files become snapshots, each as it is, in the order of the training."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ciuic_async.arguments import check_tags
from ciuic_async.chain import SnapshotChain
from ciuic_async.cli.output import Subparsers, add_command, human_bytes, print_json, print_table, text
from ciuic_async.errors import CiuicError, IntegrityError, NotFoundError, StoreError
from ciuic_async.interchange import files, usual

_DONE, _TO_DO, _FAILED = "imported", "new", "refused"
_KNOWN, _SAME = "known", "same"
_WORDS = {
    _DONE: "imported",
    _TO_DO: "to import",
    _FAILED: "refused",
    _KNOWN: "imported before",
    _SAME: "same content as another",
}


def add_parser(commands: Subparsers) -> None:
    parser = add_command(
        commands,
        "import",
        run,
        "Make snapshots of .pt, .safetensors and .h5 files: one each, read as data; nothing in them is run.",
    )
    parser.add_argument("files", metavar="FILE", nargs="+", help="files, or folders that are searched for such files")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be imported, in which order")
    parser.add_argument(
        "--skip-bad", action="store_true", help="import the others where files are refused; the exit code tells still"
    )
    parser.add_argument("--tag", action="append", default=[], metavar="NAME", help="tag of every snapshot; repeatable")


@dataclass(slots=True)
class _Item:
    """One file, what it says, and what became of it."""

    path: Path
    size_bytes: int = 0
    sha256: str = ""
    facts: usual.Facts = field(default_factory=usual.Facts)
    outcome: str = _TO_DO
    snapshot: str | None = None
    error: CiuicError | None = None

    def as_data(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "file": str(self.path),
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "step": self.facts.step,
            "epoch": self.facts.epoch,
            "batch": self.facts.batch,
            "metrics": self.facts.metrics,
            "outcome": self.outcome,
            "snapshot": self.snapshot,
            "error": None if self.error is None else {"kind": self.error.kind, "message": str(self.error)},
        }


def run(args: argparse.Namespace) -> int:
    check_tags(args.tag)
    items = _look([path for name in args.files for path in _found(Path(name))])
    refused = any(item.error is not None for item in items)
    if args.dry_run:
        known = _known_here(args.chain)
        _mark(items, known)
    elif not refused or args.skip_bad:
        with SnapshotChain(args.chain) as chain:
            _mark(items, _known(chain))
            try:
                _import(chain, items, args.tag, skip_bad=args.skip_bad)
            except CiuicError:  # of the chain: the report does not come any more
                print(f"{_done(items)}; the same call goes on from there", file=sys.stderr)
                raise
    _report(items, as_json=args.json)
    bad = [item.error for item in items if item.error is not None]
    if not bad:
        return 0
    if not args.skip_bad and not args.dry_run:
        print(f"{_done(items)}; --skip-bad imports the others", file=sys.stderr)
    return 4 if any(isinstance(error, IntegrityError) for error in bad) else 1


def _done(items: Sequence[_Item]) -> str:
    count = sum(item.outcome == _DONE for item in items)
    return f"{count} of {len(items)} files were imported" if count else "nothing was imported"


def _found(path: Path) -> Iterator[Path]:
    """A file, or those below a folder whose names mean a format; links to folders are not followed."""
    if not path.is_dir():
        if not os.path.lexists(path):
            raise NotFoundError(f"{path}: there is no such file", kind="no_such_file", where=str(path))
        files.format_of(path)
        yield path
        return

    def closed(error: OSError) -> None:  # left out in silence, its files would be missed when the originals are gone
        raise StoreError(
            f"{error.filename}: cannot be searched: {error.strerror}", kind="unreadable", where=str(error.filename)
        ) from error

    found = []
    for folder, _, names in os.walk(path, onerror=closed):
        found += [Path(folder, name) for name in names if Path(name).suffix.lower() in files.FORMATS]
    if not found:
        raise NotFoundError(
            f"{path}: no {', '.join(files.FORMATS)} files below it", kind="no_such_file", where=str(path)
        )
    yield from found


def _look(paths: Sequence[Path]) -> list[_Item]:
    """Read the structure of every file, without its tensors, and bring them into order; bad ones come last."""
    items = {path: _Item(path) for path in dict.fromkeys(paths)}
    with _counting("looking", len(items)) as looked:
        for path, item in items.items():
            looked()
            try:
                content = files.read(path, load_data=False)
            except (CiuicError, RecursionError) as error:
                _refuse(item, error)
                continue
            item.size_bytes, item.sha256 = content.size_bytes, content.sha256
            item.facts = usual.facts(content.state, path)
    good = usual.ordered({path: item.facts for path, item in items.items() if item.error is None})
    return [items[path] for path in good] + [item for item in items.values() if item.error is not None]


def _known_here(url: str) -> dict[str, str]:
    """What the chain has already; nothing where there is none yet."""
    try:
        with SnapshotChain(url, create=False) as chain:
            return _known(chain)
    except NotFoundError:
        return {}


def _known(chain: SnapshotChain) -> dict[str, str]:
    """Ids of the snapshots that were imported, by the SHA-256 of their files."""
    known = {}
    for snapshot in chain:
        try:
            source = (snapshot.config or {}).get(files.IMPORTED)
        except IntegrityError as error:  # damaged: then its file may well come again
            print(f"warning: {text(error)}", file=sys.stderr)
            continue
        if isinstance(source, dict) and isinstance(source.get("sha256"), str):
            known[source["sha256"]] = snapshot.id
    return known


def _mark(items: Sequence[_Item], known: dict[str, str]) -> None:
    """Which need no import: by content, whatever they are called."""
    seen: set[str] = set()
    for item in items:
        if item.outcome != _TO_DO:
            continue
        if item.sha256 in known:
            item.outcome, item.snapshot = _KNOWN, known[item.sha256]
        elif item.sha256 in seen:
            item.outcome = _SAME
        seen.add(item.sha256)


def _import(chain: SnapshotChain, items: Sequence[_Item], tags: Sequence[str], *, skip_bad: bool) -> None:
    """One snapshot a file, durable one after the other: what is interrupted goes on with the next call.

    Ends at a file whose data turns out to be bad only now, unless ``skip_bad``.
    """
    made: dict[str, str] = {}
    with _counting("importing", sum(item.outcome == _TO_DO for item in items)) as counted:
        for item in items:
            if item.outcome == _SAME:
                item.snapshot = made.get(item.sha256)
            if item.outcome != _TO_DO:
                continue
            counted()
            _import_one(chain, item, tags)
            if item.snapshot is not None:
                made[item.sha256] = item.snapshot
            elif not skip_bad:
                return


def _import_one(chain: SnapshotChain, item: _Item, tags: Sequence[str]) -> None:
    """Its state is let go on return: two at once would be twice the memory."""
    from ciuic_async.oneoff import save

    try:
        content = files.read(item.path)
        if content.sha256 != item.sha256:
            raise StoreError(f"{item.path}: it changed since it was looked at; import it again", kind="file_changed")
        facts = usual.facts(content.state, item.path)  # now with values that are tensors of one number
    except (CiuicError, RecursionError) as error:
        _refuse(item, error)
        return
    snapshot = save(
        content.state,
        chain,
        tags=tags,
        metrics=facts.metrics,
        step=facts.step,
        epoch=facts.epoch,
        batch=facts.batch,
        config=content.origin(),
    )
    item.facts, item.outcome, item.snapshot = facts, _DONE, snapshot.id


def _refuse(item: _Item, error: CiuicError | RecursionError) -> None:
    """Mark a file as bad, and say why at once."""
    item.error = error if isinstance(error, CiuicError) else IntegrityError(f"{item.path}: nested too deep")
    item.outcome = _FAILED
    print(f"refused: {text(item.error)}", file=sys.stderr)


@contextmanager
def _counting(label: str, total: int) -> Iterator[Callable[[], object]]:
    """A bar on stderr, one step for each call; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(desc=label, total=total, unit="file", file=sys.stderr, leave=False) as bar:
        yield bar.update


def _report(items: Sequence[_Item], *, as_json: bool) -> None:
    if as_json:
        print_json([item.as_data() for item in items])
        return
    rows = [
        (
            _WORDS[item.outcome],
            text(item.snapshot),
            text(item.facts.step),
            text(item.facts.epoch),
            human_bytes(item.size_bytes or None),
            text(item.path),
        )
        for item in items
    ]
    print_table(("", "SNAPSHOT", "STEP", "EPOCH", "SIZE", "FILE"), rows, right=(2, 3, 4))

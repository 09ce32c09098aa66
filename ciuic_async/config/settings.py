"""Each option's value and where it came from: keyword argument, environment, file, default, in this order.

Files are read for training (``Checkpointer``) and by the command line; a ``SnapshotChain`` that a program opens itself
and ``save`` go by keyword arguments and the environment alone.
"""

from __future__ import annotations

import difflib
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from ciuic_async.config import files, kinds
from ciuic_async.config.files import File
from ciuic_async.config.table import BY_NAME, CONFIG, OPTIONS, OTHER_VARIABLES, PREFIX, TABLES, Option
from ciuic_async.errors import CiuicWarning, UsageError
from ciuic_async.events import logger

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT, ENVIRONMENT, FILE = "default", "environment", "file"
_SECRETS = (
    "secret",
    "password",
    "passwd",
    "token",
    "credential",
    "access_key",
    "account_key",
    "sas",
    "storage_options",
)
_LIMIT_CHARACTERS = 1 << 16

_reads_files: ContextVar[bool] = ContextVar("ciuic_reads_files", default=False)
_told: set[str] = set()


@dataclass(frozen=True, slots=True)
class Setting:
    """An option as it stands here.

    Attributes:
        value: what the keyword argument would take.
        source: ``default``, ``environment`` or ``file``.
        origin: the same with the variable's name, or the file and the line.
        written: as it was written; never a secret.
    """

    option: Option
    value: object
    source: str = DEFAULT
    origin: str = DEFAULT
    written: object = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What environment and files say.

    Attributes:
        problems: what is wrong, with the option that it is about, None for what concerns all.
        strangers: variables that look like an option's and are none's, with what is near.
    """

    by_name: Mapping[str, Setting]
    files: tuple[File, ...] = ()
    problems: tuple[tuple[Option | None, UsageError], ...] = ()
    strangers: tuple[tuple[str, str], ...] = ()

    def check(self, reader: str | None = None, given: Mapping[str, object] | None = None) -> None:
        """Raise the first problem that concerns a call; None: any of them.

        Args:
            given: the keyword arguments that count for more than what stands here.
        """
        concerned = [
            error
            for option, error in self.problems
            if option is None or reader is None or (reader in option.readers and not _is_given(option, given or {}))
        ]
        if concerned:
            first, more = concerned[0], len(concerned) - 1
            hint = f" (and {more} more: 'ciuic doctor --config' shows all)" if more else ""
            raise UsageError(f"{first}{hint}", kind=first.kind, where=first.where)


def load(environment: Mapping[str, str], *, with_files: bool) -> Settings:
    """What environment and files say. Never raises a UsageError: what is wrong is listed."""
    problems: list[tuple[Option | None, UsageError]] = []
    found: list[File] = []
    if with_files:
        try:
            found = files.find(environment)
        except UsageError as error:
            problems.append((None, error))
    for file in found:
        problems += [(None, error) for error in _strange_keys(file)]
    by_name = {}
    for option in OPTIONS:
        try:
            by_name[option.name] = _setting(option, environment, found)
        except UsageError as error:
            problems.append((option, error))
            by_name[option.name] = Setting(option, option.default)
    problems += _lonely_trust(by_name)
    return Settings(by_name, tuple(found), tuple(problems), tuple(_strange_variables(environment)))


@contextmanager
def reading_files() -> Iterator[None]:
    """Whatever is opened inside, on this thread, goes by files too."""
    token = _reads_files.set(True)
    try:
        yield
    finally:
        _reads_files.reset(token)


def configured(reader: str, *, trains: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Give a call the options that its caller left out; signature and defaults stay as they are written.

    Args:
        reader: the call's name in the table.
        trains: files are read for this call, and for whatever it opens.
    """

    def wrap(call: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(call)
        def filled(*args: P.args, **kwargs: P.kwargs) -> R:
            if not trains:
                kwargs.update(missing(reader, kwargs))
                return call(*args, **kwargs)
            with reading_files():
                kwargs.update(missing(reader, kwargs, announce=True))
                return call(*args, **kwargs)

        return filled

    return wrap


def missing(reader: str, given: Mapping[str, object], *, announce: bool = False) -> dict[str, object]:
    """The keyword arguments that environment and files add to those that were given.

    Args:
        announce: name the files that are used in the log, and warn of variables that look misspelt.

    Raises:
        UsageError: what environment or files say for this call is wrong.
    """
    settings = load(os.environ, with_files=_reads_files.get())
    settings.check(reader, given)
    if announce:
        _announce(settings)
    result: dict[str, object] = {}
    trust: dict[str, object] = {}
    for setting in settings.by_name.values():
        option = setting.option
        table, _, part = option.name.rpartition(".")
        if reader not in option.readers or setting.source == DEFAULT or _is_given(option, given):
            continue
        if option.name == "key" and setting.source == ENVIRONMENT:
            continue  # transparency/keys.py looks there itself: what it says of the key then names the variable
        if table:
            trust[part] = setting.value
        else:
            result[option.name] = setting.value
    return result | ({"trust": trust} if trust else {})


def bare_environment() -> dict[str, str]:
    """This process's environment for one that goes by no configuration but a signing key."""
    options = {option.environment for option in OPTIONS if option.name != "key"}
    return {name: value for name, value in os.environ.items() if name not in options} | {CONFIG: ""}


def warn_of_strangers(settings: Settings) -> None:
    """One warning, once in a process, for each variable that looks like a misspelt option."""
    for name, near in settings.strangers:
        if name not in _told:
            _told.add(name)
            warnings.warn(
                f"the environment variable {name} is no option of ciuic: did you mean {near}?",
                CiuicWarning,
                stacklevel=2,
            )


def _is_given(option: Option, given: Mapping[str, object]) -> bool:
    keyword = option.name.partition(".")[0]
    return keyword in given and not (option.none_is_unset and given[keyword] is None)


def _announce(settings: Settings) -> None:
    for file in settings.files:
        logger.info("options from %s: %s", file.path, ", ".join(file.values) or "none")
    warn_of_strangers(settings)


def _setting(option: Option, environment: Mapping[str, str], found: Sequence[File]) -> Setting:
    text = environment.get(option.environment, "").strip()
    if text:
        where = f"environment {option.environment}"
        if option.name == "key":  # it may be the secret itself, and keys.py checks it
            return Setting(option, None, ENVIRONMENT, where, "(a path or the key itself, not shown)")
        if len(text) > _LIMIT_CHARACTERS:
            raise _wrong(option, where, f"expected {option.kind.expected}, found a text of {len(text)} characters")
        data: object = text if _means_none(option, text) else option.kind.from_text(text)
        hidden = kinds.has_secret(option.kind, text)
        return Setting(
            option, _checked(option, data, where), ENVIRONMENT, where, "(holds a password)" if hidden else text
        )
    for file in found:
        if option.name in file.values:
            data, where = file.values[option.name], file.where(option.name)
            if kinds.has_secret(option.kind, data):
                raise UsageError(
                    f"{where}: {option.name} holds a secret, which belongs into no such file: {_where_instead(option)}",
                    kind="secret_in_config",
                    where=where,
                )
            return Setting(option, _placed(option, _checked(option, data, where), file), FILE, f"file {where}", data)
    return Setting(option, option.default, written=option.default)


def _checked(option: Option, data: object, where: str) -> object:
    if _means_none(option, data):
        return None
    try:
        return option.kind.check(data)
    except kinds.WrongValueError as wrong:
        raise _wrong(option, where, str(wrong) or f"expected {option.kind.expected}, found {_found(data)}") from None


def _wrong(option: Option, where: str, reason: str) -> UsageError:
    return UsageError(f"{where}: {option.name}: {reason}", kind="config_value", where=where)


def _means_none(option: Option, data: object) -> bool:
    return option.default is None and (data is None or (isinstance(data, str) and data.strip().lower() == "none"))


def _found(data: object) -> str:
    """A value for a message: short, and nothing of what may be a secret, such as a URL with a password."""
    if isinstance(data, str):
        hidden = len(data) > 80 or "@" in data or "SECRET" in data.upper()
        return f"a text of {len(data)} characters" if hidden else repr(data)
    if isinstance(data, bool | float):
        return f"{data!r}"
    name = type(data).__name__
    return f"{name} {data}" if isinstance(data, int) and abs(data) < 10**18 else name


def _placed(option: Option, value: object, file: File) -> object:
    """Paths in a file are relative to its folder, wherever training is started."""
    if option.kind not in (kinds.PATH, kinds.PATH_OR_TEXT, kinds.PLACE) or not isinstance(value, str):
        return value
    if "\n" in value or "://" in value:
        return value
    return str(Path(file.path.parent, os.path.expanduser(value)))


def _strange_keys(file: File) -> Iterator[UsageError]:
    for name in file.values:
        if name in BY_NAME:
            continue
        where, shown_name = file.where(name), name[:80]
        if any(word in name.lower() for word in _SECRETS):
            yield UsageError(
                f"{where}: {shown_name!r}: credentials belong into no such file: put those of a store into the "
                "environment, its own profile file or an instance role, and a signing key into a file of mode 0600 "
                "(key = path)",
                kind="secret_in_config",
                where=where,
            )
            continue
        near = difflib.get_close_matches(name[:80], BY_NAME, n=1)
        if name in TABLES:
            hint = f"expected a table, e.g. [{name}]"
        else:
            hint = f"did you mean {near[0]!r}?" if near else "'ciuic doctor --config' shows all options"
        yield UsageError(
            f"{where}: {shown_name!r} is no option; {hint}",
            kind="config_unknown_key",
            where=where,
        )


def _lonely_trust(by_name: Mapping[str, Setting]) -> list[tuple[Option | None, UsageError]]:
    if by_name["trust.policy"].value is not None:
        return []
    lonely = [setting for name, setting in by_name.items() if name.startswith("trust.") and setting.source != DEFAULT]
    return [
        (
            setting.option,
            UsageError(
                f"{setting.origin}: {setting.option.name} says nothing without trust.policy "
                f"({BY_NAME['trust.policy'].environment})",
                kind="config_value",
                where=setting.origin,
            ),
        )
        for setting in lonely
    ]


def _strange_variables(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    known = {option.environment for option in OPTIONS} | set(OTHER_VARIABLES)
    endings = {name.removeprefix(PREFIX): name for name in known}
    for name in environment:
        if name.startswith(PREFIX) and name not in known and len(name) <= 200:
            near = difflib.get_close_matches(name.removeprefix(PREFIX), endings, n=1, cutoff=0.8)
            if near:
                yield name, endings[near[0]]


def _where_instead(option: Option) -> str:
    if option.name == "key":
        return f"write the path of the key's file, or set {option.environment}"
    return (
        f"set CIUIC_ETCD_PASSWORD, or {option.environment}"
        if option.name == "ordering"
        else ("stores take their credentials from the environment, their own profile files or an instance role")
    )

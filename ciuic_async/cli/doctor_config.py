"""``ciuic doctor --config``: every option, its value, and where it comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ciuic_async.cli.doctor_finding import Finding
from ciuic_async.cli.output import print_table, text
from ciuic_async.config.settings import Settings, load
from ciuic_async.config.table import shown


def settings() -> Settings:
    """What environment and files say here. Never raises for what is wrong in them."""
    return load(os.environ, with_files=True)


def findings(found: Settings) -> list[Finding]:
    """Which files are used, and what is wrong."""
    files = ", ".join(file.shown for file in found.files)
    result = [Finding("configuration", None if found.problems else True, files or "no file; see docs/configuration.md")]
    result += [Finding("configuration", False, str(error)) for _, error in found.problems]
    for name, near in found.strangers:
        result.append(Finding("configuration", None, f"the variable {name} is no option: did you mean {near}?"))
    return result


def as_data(found: Settings) -> list[Mapping[str, object]]:
    """The options for ``--json``. ``written`` is what the file or the variable says, no secret among it."""
    return [
        {
            "name": name,
            "value": _shown(setting.value, setting.written),
            "origin": setting.origin,
            "written": setting.written
            if isinstance(setting.written, str | int | float | None)
            else shown(setting.written),
            "environment": setting.option.environment,
            "unit": setting.option.unit,
        }
        for name, setting in found.by_name.items()
    ]


def show(found: Settings) -> None:
    """The same for people."""
    rows = [
        [name, text(_shown(setting.value, setting.written)), setting.option.unit, text(setting.origin)]
        for name, setting in found.by_name.items()
    ]
    print_table(["option", "value", "unit", "from"], rows)


def _shown(value: object, written: object) -> str:
    """The value; what was written where the value itself may be a secret."""
    if isinstance(written, str) and written.startswith("("):
        return written
    return shown(value)

"""All results on one page: tables and plots, without anything from elsewhere.

    python bench/report.py               # seconds; writes bench/results/report.html and a PNG for each plot

Reads the JSON files that the other programs wrote. Without matplotlib the page has tables only, and says so.
"""

from __future__ import annotations

import argparse
import base64
import html
import importlib.util
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.output import RESULTS, say

ORDER = (
    "lost_time_cpu",
    "lost_time_by_interval",
    "interval_control",
    "where_time_goes",
    "time_to_durable",
    "codec",
    "restore",
    "restart",
    "crash",
    "memory",
    "scaling",
    "kernels",
    "chain",
    "overlap",
    "object_store",
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
td, th { padding: .15em .8em; border-bottom: 1px solid #ddd; text-align: left }
img { max-width: 100%; height: auto } .method, footer { color: #666; font-size: 90% } details { margin: 1em 0 }
"""


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """All results by name, in the order in which they are shown."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    known = [name for name in ORDER if name in found]
    return {name: found[name] for name in [*known, *sorted(set(found) - set(known))]}


def table(rows: Sequence[Sequence[str]], has_head: bool) -> str:
    """Rows as HTML."""
    lines = []
    for number, row in enumerate(rows):
        tag = "th" if has_head and number == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row) + "</tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know beside the table: who is missing, who is durable in which way, how sure the ratio is."""
    parts = []
    ratio = result.get("ratio_to_best_opponent")
    if ratio:
        parts.append(
            f"<p>In relation to the best opponent ({html.escape(str(ratio['best_opponent']))}): "
            f"<b>{ratio['ratio']}</b>, 95% upper bound {ratio['upper_bound_95']} "
            f"({html.escape(str(ratio['method']))}).</p>"
        )
    contenders = result.get("contenders")
    if isinstance(contenders, dict):
        durability = [[name, one["durability"]] for name, one in contenders.items() if "durability" in one]
        if durability:
            parts.append(f"<details><summary>What durable means for each</summary>{table(durability, False)}</details>")
    if result.get("missing"):
        missing = [[name, why] for name, why in result["missing"].items()]
        parts.append(f"<details><summary>Left out</summary>{table(missing, False)}</details>")
    return parts


def section(name: str, result: dict[str, Any], images: Sequence[bytes]) -> str:
    """One question."""
    head = html.escape(str(result.get("question", name)))
    parts = [f'<h2 id="{name}">{head}</h2>']
    if result.get("quick"):
        parts.append("<p><b>A quick run: it shows that the bench works, its figures mean nothing.</b></p>")
    for image in images:
        parts.append(f'<img alt="{head}" src="data:image/png;base64,{base64.b64encode(image).decode()}">')
    if "table" in result:
        rows = result["table"]
        if name == "lost_time_cpu":
            rows = [
                ["", "lost per snapshot (median)", "95% interval", "blocked in the call", "stored per snapshot"],
                *rows,
            ]
        body = table(rows, True)
        parts.append(body if len(rows) <= 40 else f"<details><summary>All figures</summary>{body}</details>")
    parts += notes(result)
    parts.append(
        f'<p class="method">{html.escape(str(result.get("method", "")))} (<code>bench/results/{name}.json</code>)</p>'
    )
    return "\n".join(parts)


def page(results: dict[str, dict[str, Any]], images: dict[str, list[bytes]], remark: str) -> str:
    """The whole report."""
    machines = sorted({str(result.get("machine", "unknown machine")) for result in results.values()})
    engines = sorted({str(result.get("engine", "")) for result in results.values()} - {""})
    versions = {key: value for result in results.values() for key, value in result.get("versions", {}).items()}
    contents = "".join(
        f'<li><a href="#{name}">{html.escape(str(result.get("question", name)))}</a></li>'
        for name, result in results.items()
    )
    body = "\n".join(section(name, result, images.get(name, [])) for name, result in results.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ciuic-async: measurements</title><style>{STYLE}</style></head>
<body><h1>ciuic-async: measurements</h1>
<p>{"<br>".join(map(html.escape, machines))}<br>{"<br>".join(map(html.escape, engines))}</p>
<p>How each figure is measured, and what it does not show: docs/performance.md.{html.escape(remark)}</p>
<ul>{contents}</ul>
{body}
<footer><p>{html.escape(", ".join(f"{key} {value}" for key, value in sorted(versions.items())))}</p></footer>
</body></html>
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    folder: Path = parser.parse_args(arguments).results
    results = load(folder)
    images: dict[str, list[bytes]] = {}
    remark = ""
    if importlib.util.find_spec("matplotlib") is None:
        remark = " Without plots: matplotlib is not installed."
    else:
        from harness import plots

        for name, result in results.items():
            images[name] = []
            for number, figure in enumerate(plots.figures(name, result)):
                buffer = io.BytesIO()
                figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
                images[name].append(buffer.getvalue())
                (folder / f"{name}{'' if number == 0 else f'_{number + 1}'}.png").write_bytes(buffer.getvalue())
    target = folder / "report.html"
    target.write_text(page(results, images, remark))
    say(f"wrote {target}: {len(results)} questions, {sum(map(len, images.values()))} plots")


if __name__ == "__main__":
    main()

"""Plots of the results; only ``report`` imports this, and matplotlib with it. No window: figures are values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

OURS, OTHER, SECOND = "#c2410c", "#64748b", "#cbd5e1"
LANES = ("training", "save()", "step()", "gate", "stage", "digest", "encode", "write", "commit")


def figures(name: str, result: Mapping[str, Any]) -> Iterator[Figure]:
    """The plots of one result; none for a result this does not know, or that has nothing to show."""
    draw = DRAWN.get(name)
    if draw is not None:
        yield from draw(result)


def color(name: str) -> str:
    return OURS if name.startswith("ciuic") else OTHER


def figure(rows: int, columns: int = 1, height: float | None = None) -> tuple[Figure, list[Axes]]:
    """An empty figure that is as high as its ``rows`` bars need."""
    made = Figure(figsize=(9, height or 1.2 + 0.36 * rows), layout="constrained")
    axes = made.subplots(1, columns, squeeze=False)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    return made, list(axes.flat)


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], label: str) -> None:
    """One bar for each name, the first on top, with its value."""
    places = range(len(names))
    axes.barh(places, values, color=[color(name) for name in names], height=0.6)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel(label)


def intervals(axes: Axes, described: Sequence[Mapping[str, Any]]) -> None:
    """Samples as dots, and the 95% interval of the median as a line, on bars."""
    for place, one in enumerate(described):
        axes.plot(one["samples"], [place] * len(one["samples"]), ".", color="black", alpha=0.35, markersize=4)
        if one["interval_95"]:
            axes.plot(one["interval_95"], [place, place], color="black", linewidth=1.5)


def lost_time(result: Mapping[str, Any]) -> Iterator[Figure]:
    contenders = result["contenders"]
    if not all(isinstance(one["lost_s_per_snapshot"], dict) for one in contenders.values()):
        return  # written before samples were kept
    names = list(contenders)
    made, (axes,) = figure(len(names))
    described = [contenders[name]["lost_s_per_snapshot"] for name in names]
    bars(axes, names, [one["median"] for one in described], "training time lost per snapshot, seconds (median, 95%)")
    intervals(axes, described)
    yield made


def by_interval(result: Mapping[str, Any]) -> Iterator[Figure]:
    made, (lost, share) = figure(0, 2, 3.6)
    every = [int(steps) for steps in result["intervals"]]
    names = list(next(iter(result["intervals"].values()))["contenders"])
    for name in names:
        ones = [result["intervals"][str(steps)]["contenders"][name] for steps in every]
        lost_s = [one["lost_s_per_snapshot"]["median"] for one in ones]
        base_s = [steps * one["base_step_s"] for steps, one in zip(every, ones, strict=True)]
        shares = [100 * a / (a + b) for a, b in zip(lost_s, base_s, strict=True)]
        style = {"marker": "o", "label": name, "color": OURS} if name == names[0] else {"marker": "o", "label": name}
        lost.plot(every, lost_s, **style)
        share.plot(every, shares, **style)
    lost.set_ylabel("lost per snapshot, seconds")
    share.set_ylabel("share of training time lost, %")
    for axes in (lost, share):
        axes.set_xlabel("steps from one snapshot to the next")
        axes.set_xticks(every)
        axes.set_ylim(bottom=0)
    lost.legend(frameon=False, fontsize=8)
    yield made


def timeline(result: Mapping[str, Any]) -> Iterator[Figure]:
    lanes = [lane for lane in LANES if any(span[0] == lane for span in result["spans"])]
    made, (axes,) = figure(len(lanes))
    colors = {"training": SECOND, "save()": "#b91c1c", "step()": "#b91c1c", "gate": "#b91c1c"}
    for place, lane in enumerate(lanes):
        spans = [(begin, end - begin) for name, begin, end, _ in result["spans"] if name == lane]
        edges = {"edgecolor": "white", "linewidth": 0.6} if lane == "training" else {}
        axes.broken_barh(spans, (place - 0.35, 0.7), facecolors=colors.get(lane, OURS), **edges)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlabel("seconds (red: training waits)")
    yield made


def durable(result: Mapping[str, Any]) -> Iterator[Figure]:
    names = list(result["contenders"])
    made, panels = figure(len(names), 2)
    for axes, key, label in zip(panels, ("idle_s", "beside_training_s"), ("idle", "beside training"), strict=True):
        described = [result["contenders"][name][key] for name in names]
        bars(axes, names, [one["median"] for one in described], f"seconds until durable, {label}")
        intervals(axes, described)
    panels[1].set_yticks([])
    yield made


def codec(result: Mapping[str, Any]) -> Iterator[Figure]:
    """Size against speed, a panel for each piece of data."""
    pieces = result["pieces"]
    for group in (False, True):
        chosen = [piece for piece in pieces if piece["kind"].startswith("delta") == group]
        if not chosen:
            continue
        rows = -(-len(chosen) // 4)
        made = Figure(figsize=(11, 3.0 * rows), layout="constrained")
        panels = made.subplots(rows, 4, squeeze=False)
        for axes in panels.flat[len(chosen) :]:
            axes.set_visible(False)
        for axes, piece in zip(panels.flat, chosen, strict=False):
            for number, (name, one) in enumerate(piece["compressors"].items()):
                if "encode_gb_per_s" in one:
                    fill = "none" if "smallest" in name else "full"
                    point = [one["encode_gb_per_s"]], [one["stored_over_raw"]]
                    axes.plot(*point, "os^v<>D"[number % 7], color=color(name), fillstyle=fill, label=name)
            axes.set_title(f"{piece['kind']}:\n{piece['name']}", fontsize=8)
            axes.set_xscale("log")
            axes.set_xlim(0.02, 20)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(labelsize=7)
        handles, labels = panels.flat[0].get_legend_handles_labels()
        made.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
        made.supxlabel("encode, GB/s on one core", fontsize=9)
        made.supylabel("stored / raw", fontsize=9)
        yield made


def restore(result: Mapping[str, Any]) -> Iterator[Figure]:
    names = list(result["restores"])
    made, panels = figure(len(names), 2)
    for axes, key, label in zip(panels, ("cold_s", "warm_s"), ("cold cache", "a second time"), strict=True):
        described = [result["restores"][name][key] for name in names]
        bars(axes, names, [one["median"] for one in described], f"seconds, {label}")
        intervals(axes, described)
    panels[1].set_yticks([])
    yield made


def restart(result: Mapping[str, Any]) -> Iterator[Figure]:
    names = list(result["seconds"])
    made, (axes,) = figure(len(names))
    described = [result["seconds"][name] for name in names]
    bars(axes, names, [one["median"] for one in described], "seconds until training goes on (median, 95%)")
    intervals(axes, described)
    yield made


def crash(result: Mapping[str, Any]) -> Iterator[Figure]:
    """The share of faults after which the acknowledged state was gone or torn."""
    names = list(result["contenders"])
    made, panels = figure(len(names), 2)
    for axes, label, place in zip(panels, ("killed", "power cut"), (("killed",), ("power_cut", "strict")), strict=True):
        shares = []
        for name in names:
            found = result["contenders"][name]
            for key in place:
                found = (found or {}).get(key)
            shares.append(100 * (1 - found["good"] / found["cases"]) if found and found["cases"] else 0.0)
        bars(axes, names, shares, f"{label}: percent lost or torn")
    panels[1].set_yticks([])
    yield made


def memory(result: Mapping[str, Any]) -> Iterator[Figure]:
    names = list(result["contenders"])
    made, (axes,) = figure(len(names))
    values = [result["contenders"][name]["added_over_state"] for name in names]
    bars(axes, names, values, "memory added while saving, in sizes of the state")
    yield made


def scaling(result: Mapping[str, Any]) -> Iterator[Figure]:
    made, panels = figure(0, 2, 3.6)
    for axes, against, key, label in (
        (panels[0], "size", "bytes", "bytes of state"),
        (panels[1], "tensors", "tensors", "tensors of the same bytes together"),
    ):
        points = [point for point in result["points"] if point["against"] == against]
        for name in dict.fromkeys(point["contender"] for point in points):
            mine = [point for point in points if point["contender"] == name]
            shade = {"color": OURS} if name == "ciuic-async" else {}
            places = [one[key] for one in mine]
            (line,) = axes.plot(places, [one["durable_s"] for one in mine], "o-", label=name, **shade)
            axes.plot(places, [one["stall_s"] for one in mine], "o:", color=line.get_color())
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
    panels[0].set_ylabel("seconds: durable (line), blocked (dots)")
    panels[0].legend(frameon=False, fontsize=8)
    yield made


def chain(result: Mapping[str, Any]) -> Iterator[Figure]:
    """What is asked of the store at the end of a short and of a long log."""
    growth = result["growth"]
    short, long = result["entries"]
    names = [f"{name}, {size:,} entries" for name in growth for size in (short, long)]
    made, (axes,) = figure(len(names))
    bars(axes, names, [growth[name][size]["operations"] for name in growth for size in ("short", "long")], "operations")
    yield made


def kernels(result: Mapping[str, Any]) -> Iterator[Figure]:
    names = list(result["kernels"])
    made, (axes,) = figure(len(names))
    bars(axes, names, [result["kernels"][name]["gb_per_s"] for name in names], "GB/s")
    yield made


DRAWN: dict[str, Callable[[Mapping[str, Any]], Iterator[Figure]]] = {
    "lost_time_cpu": lost_time,
    "lost_time_by_interval": by_interval,
    "where_time_goes": timeline,
    "time_to_durable": durable,
    "codec": codec,
    "restore": restore,
    "restart": restart,
    "crash": crash,
    "memory": memory,
    "scaling": scaling,
    "kernels": kernels,
    "chain": chain,
}

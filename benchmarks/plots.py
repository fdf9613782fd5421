"""Pictures of results on a CPU, from their JSON alone.

``python -m fastfusion.benchmarks.plots PICTURE FILE...`` draws the speed-ups of some files side by
side: for every shape and peer a bar, how many times as long the peer takes; left of the line at 1
we lose. `draw_all` makes every picture for which a document has the numbers.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from .results import OURS, REFERENCE

Document = dict[str, Any]
Rows = list[dict[str, Any]]
COLORS = ("#2a6f97", "#a9d6e5", "#e09f3e", "#9e2a2b", "#540b0e", "#61a5c2", "#606c38", "#bc6c25")
TICKS = (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)


def pyplot() -> Any:
    """matplotlib without a screen; imported here because it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def peers_of(rows: Rows) -> list[str]:
    """Every peer that some row has, in the order of their first."""
    return list(dict.fromkeys(p for row in rows for p in row["ratios"] if p != REFERENCE))


def title(document: Document, rows: Rows) -> str:
    """What a picture holds, and of which machine."""
    machine = document["machine"]

    def all_of(key: str, default: Any) -> str:
        return ", ".join(dict.fromkeys(str(row.get(key, default)) for row in rows))

    directions = {"True": "forward and backward", "False": "forward"}
    direction = ", ".join(directions[d] for d in all_of("backward", False).split(", "))
    return (
        f"{all_of('suite', '')}, {all_of('dtype', '')}, {direction}, "
        f"{all_of('threads', machine.get('threads'))} thread(s)\n{machine['cpu']}, "
        f"torch {machine['torch']}, commit {machine['commit']}"
    )


def speedups(axes: Any, document: Document, rows: Rows) -> None:
    """Bars: the time of every peer over ours."""
    from matplotlib import ticker

    peers = peers_of(rows)
    height = 0.8 / max(len(peers), 1)
    for index, peer in enumerate(peers):
        places = [place - 0.4 + height * (index + 0.5) for place in range(len(rows))]
        values = [row["ratios"].get(peer, {"median": 0.0})["median"] for row in rows]
        bars = axes.barh(places, values, height, label=peer, color=COLORS[index % len(COLORS)])
        axes.bar_label(bars, [f" {v:.2f}" if v else "" for v in values], fontsize=6)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks([x for x in TICKS if low <= x <= high])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_yticks(range(len(rows)), [row["shape"]["name"] for row in rows], size=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of the peer / ours; above 1 fastfusion is faster")
    axes.set_title(title(document, rows), size=9)
    axes.legend(fontsize=8)


def roofline(axes: Any, document: Document, rows: Rows) -> None:
    """Operations per second against operations per byte, under the machine's two ceilings."""
    ceilings = document["ceilings"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    for index, dtype in enumerate(dtypes):
        own = [row for row in rows if row["dtype"] == dtype]
        color = COLORS[2 * index % len(COLORS)]
        x = [row["flops"] / row["moved"] for row in own]
        y = [row["flops"] / row["times"][OURS]["median"] / 1e9 for row in own]
        axes.scatter(x, y, s=18, color=color, label=dtype)
        for row, a, b in zip(own, x, y, strict=True):
            axes.annotate(f" {row['shape']['name']}", (a, b), size=5)
        peak = ceilings["operations"].get("float32" if dtype == "float16" else dtype)
        if peak:
            axes.axhline(peak / 1e9, color=color, linewidth=1)
            axes.annotate(f"{dtype} products", (min(x), peak / 1e9), size=7, va="bottom")
    low, high = axes.get_xlim()
    ends = [max(low, 0.05), high]
    axes.plot(ends, [e * ceilings["bandwidth"] / 1e9 for e in ends], "k--", linewidth=1,
              label=f"memory, {ceilings['bandwidth'] / 1e9:.0f} GB/s")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of inputs and outputs")
    axes.set_ylabel("GFLOP/s, whole calls")
    axes.set_title(title(document, rows) + "\nabove the dashed line: inputs stay in cache", size=9)
    axes.legend(fontsize=8)


def lengths(axes: Any, document: Document, rows: Rows) -> None:
    """Time against length, ours and every peer's."""
    rows = sorted(rows, key=lambda row: row["shape"]["q_len"])
    names = [OURS, *peers_of(rows)]
    for index, name in enumerate(names):
        timed = [row for row in rows if name in row["times"]]
        x = [row["shape"]["q_len"] for row in timed]
        y = [1e6 * row["times"][name]["median"] for row in timed]
        axes.plot(x, y, marker="o", markersize=3, label=name, color=COLORS[index % len(COLORS)],
                  linewidth=2.5 if name == OURS else 1)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("queries, and as many keys; 12 heads of 64")
    axes.set_ylabel("microseconds per call")
    axes.set_title(title(document, rows), size=9)
    axes.legend(fontsize=8)


def threads(axes: Any, document: Document, rows: Rows) -> None:
    """How many times as fast each shape becomes with more threads."""
    by_cell: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        by_cell[row["shape"]["name"], row["dtype"]][row["threads"]] = row["times"][OURS]["median"]
    for index, ((name, dtype), times) in enumerate(sorted(by_cell.items())):
        counts = sorted(times)
        least = counts[0]
        axes.plot(counts, [least * times[least] / times[n] for n in counts], marker="o",
                  markersize=3, label=f"{name}, {dtype}, {1e6 * times[least]:.0f} us",
                  color=COLORS[index % len(COLORS)])  # fmt: skip
    most = max(row["threads"] for row in rows)
    axes.plot([1, most], [1, most], "k--", linewidth=1, label="perfect")
    axes.set_xlabel("threads")
    axes.set_ylabel("times as fast as one thread")
    axes.set_title(title(document, rows), size=9)
    axes.legend(fontsize=6, ncols=2)


def pictures(document: Document) -> dict[str, tuple[Any, Rows, tuple[float, float]]]:
    """What can be drawn of a document: by name the function, its rows and the size in inches."""
    rows = [row for row in document["rows"] if OURS in row["times"]]
    found: dict[str, tuple[Any, Rows, tuple[float, float]]] = {}
    groups = defaultdict(list)
    for row in rows:
        direction = "-backward" if row["backward"] else ""
        count = row.get("threads", 1)
        several = f"-{count}-threads" if count > 1 else ""
        groups[f"{row['suite']}-{row['dtype']}{direction}{several}"].append(row)
    for name, own in groups.items():
        if own[0]["suite"] == "lengths":
            found[name] = lengths, own, (7, 5)
        elif peers_of(own):
            bars = len(own) * len(peers_of(own))
            found[name] = speedups, own, (8, 1.6 + 0.12 * bars + 0.1 * len(own))
    counted = [row for row in rows if row.get("flops") and row.get("moved")]
    if counted and document.get("ceilings", {}).get("operations"):
        fewest = min(row.get("threads", 1) for row in counted)
        own = [row for row in counted if row.get("threads", 1) == fewest]
        found["roofline"] = roofline, own, (8, 6)
    if len({row.get("threads", 1) for row in rows if row["suite"] == "attention"}) > 1:
        own = [row for row in rows if row["suite"] == "attention"]
        found["threads"] = threads, own, (8, 6)
    return found


def draw_all(document: Document, folder: Path) -> list[Path]:
    """Every picture of a document, as PNG files in a folder that exists."""
    drawing = pyplot()
    paths = []
    for name, (draw, rows, size) in pictures(document).items():
        figure, axes = drawing.subplots(figsize=size, layout="constrained")
        draw(axes, document, rows)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
        drawing.close(figure)
    return paths


def draw(picture: Path, sources: list[Path]) -> None:
    """Draws the speed-ups of every file into one picture."""
    drawing = pyplot()
    documents = [json.loads(source.read_text()) for source in sources]
    most = max(len(document["rows"]) for document in documents)
    figure, all_axes = drawing.subplots(
        1, len(documents), figsize=(7.5 * len(documents), 1.5 + 0.42 * most), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes, document in zip(all_axes[0], documents, strict=True):
        speedups(axes, document, document["rows"])
    figure.savefig(picture, dpi=110)
    drawing.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Draws what the command line names; 2 where it makes no sense."""
    names = [Path(name) for name in (sys.argv[1:] if argv is None else argv)]
    missing = [str(path) for path in names[1:] if not path.is_file()]
    if len(names) < 2 or missing:
        wanted = f"no file {', '.join(missing)}" if missing else "name a picture and its files"
        print(f"plots: {wanted}", file=sys.stderr)
        return 2
    draw(names[0], names[1:])
    print(names[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())

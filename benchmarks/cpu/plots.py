"""Pictures of results on a CPU, from their JSON alone.

``python -m fastfusion.benchmarks.cpu.plots PICTURE FILE...`` draws the speed-ups of some files side
by side: for every shape a mark per peer, how many times as long it takes; left of the line at 1 we
lose. With a folder in the place of the picture it draws whatever the files together have the
numbers for: also the roofline, time against length, and threads.
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from ..common.plots import pyplot
from ..common.results import OURS, REFERENCE
from .results import merged, read
from .roofline import COMPUTED_IN

Document = dict[str, Any]
Rows = list[dict[str, Any]]
COLORS = (
    "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f",
    "#bcbd22", "#17becf", "#393b79", "#843c39",
)  # fmt: skip
MARKERS = "osD^vPX<>*hp"
TICKS = (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 30, 50, 100)
FINE_TICKS = (0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.2, 1.3, 1.4)


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
    """A line per shape, on it a mark per peer: its time over ours, quartiles as a bar."""
    from matplotlib import ticker

    for index, peer in enumerate(peers_of(rows)):
        found = [(place, row["ratios"][peer]) for place, row in enumerate(rows)
                 if peer in row["ratios"]]  # fmt: skip
        middle = [ratio["median"] for _, ratio in found]
        below = [ratio["median"] - ratio["lower"] for _, ratio in found]
        above = [ratio["upper"] - ratio["median"] for _, ratio in found]
        axes.errorbar(middle, [place for place, _ in found], xerr=[below, above], label=peer,
                      linestyle="none", marker=MARKERS[index % len(MARKERS)], markersize=5,
                      color=COLORS[index % len(COLORS)], alpha=0.85)  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    low = min(low, 0.9)
    axes.set_xlim(low, high)
    axes.set_xticks([x for x in (FINE_TICKS if high / low < 1.7 else TICKS) if low <= x <= high])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_yticks(range(len(rows)), [row["shape"]["name"] for row in rows], size=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="both", color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel("time of the peer / ours; right of the line at 1 fastfusion is faster")
    axes.set_title(title(document, rows), size=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


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
        peak = ceilings["operations"].get(COMPUTED_IN.get(dtype, dtype))
        if peak:
            axes.axhline(peak / 1e9, color=color, linewidth=1)
            axes.annotate(f"{dtype} products", (min(x), peak / 1e9), size=7, va="bottom")
    low, high = axes.get_xlim()
    most = max(ceilings["operations"].values())
    ends = [max(low, 0.1), min(high, most / ceilings["bandwidth"])]
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
        axes.plot(x, y, label=name, linewidth=2.5 if name == OURS else 1, markersize=4,
                  marker=MARKERS[index % len(MARKERS)],
                  color=COLORS[index % len(COLORS)])  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("queries, and as many keys; 12 heads of 64")
    axes.set_ylabel("microseconds per call")
    axes.set_title(title(document, rows), size=9)
    axes.legend(fontsize=8)


def threads(axes: Any, document: Document, rows: Rows) -> None:
    """How many times as fast each shape becomes with more threads, by its time with the fewest."""
    by_cell: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for row in rows:
        by_cell[row["shape"]["name"], row["dtype"]][row["threads"]] = row["times"][OURS]["median"]
    counts = sorted({row["threads"] for row in rows})
    least = counts[0]
    for index, count in enumerate(counts[1:]):
        cells = {k: t for k, t in by_cell.items() if least in t and count in t}
        x = [1e6 * times[least] for times in cells.values()]
        y = [times[least] / times[count] for times in cells.values()]
        color = COLORS[index % len(COLORS)]
        axes.scatter(x, y, s=18, color=color, label=f"{count} threads")
        axes.axhline(count / least, color=color, linewidth=1, linestyle="--")
        for (name, _), a, b in zip(cells, x, y, strict=True):
            axes.annotate(f" {name}", (a, b), size=6)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0.8)
    axes.set_xlabel(f"microseconds with {least} thread(s)")
    axes.set_ylabel("times as fast; dashed: perfect")
    axes.set_title(title(document, rows), size=9)
    axes.legend(fontsize=8)


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
            found[name] = speedups, own, (9, 1.6 + 0.27 * max(len(own), 4))
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
    documents = [read(source) for source in sources]
    most = max(len(document["rows"]) for document in documents)
    figure, all_axes = drawing.subplots(
        1, len(documents), figsize=(8 * len(documents), 1.6 + 0.27 * most), layout="constrained",
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
        usage = "name a picture or a folder, and files"
        print(f"plots: {f'no file {missing[0]}' if missing else usage}", file=sys.stderr)
        return 2
    try:
        if names[0].is_dir():
            print(*draw_all(merged([read(name) for name in names[1:]]), names[0]), sep="\n")
        else:
            draw(names[0], names[1:])
            print(names[0])
    except ValueError as error:
        print(f"plots: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

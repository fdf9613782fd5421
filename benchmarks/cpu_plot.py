"""A picture of results on a CPU, from their JSON alone.

``python -m fastfusion.benchmarks.cpu_plot PICTURE FILE...`` draws the files side by side: for every
shape and peer a bar, how many times as long the peer takes; left of the line at 1 we lose.
"""

import json
import sys
from pathlib import Path
from typing import Any

from .results import REFERENCE

COLORS = ("#2a6f97", "#a9d6e5", "#61a5c2", "#014f86")
TICKS = (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)


def ratios(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Peer to its median ratio for each row, 0 where it has none."""
    peers = dict.fromkeys(name for row in rows for name in row["ratios"] if name != REFERENCE)
    return {
        name: [row["ratios"][name]["median"] if name in row["ratios"] else 0.0 for row in rows]
        for name in peers
    }


def title(document: dict[str, Any]) -> str:
    """What a file holds, and of which machine."""
    settings, machine = document["settings"], document["machine"]
    direction = "forward and backward" if settings["backward"] else "forward"
    return (
        f"{', '.join(settings['suites'])}, {settings['dtype']}, {direction}, "
        f"{settings['threads']} thread(s)\n{machine['cpu']}, torch {machine['torch']}, "
        f"commit {machine['commit']}"
    )


def draw(picture: Path, sources: list[Path]) -> None:
    """Draws the rows of every file into one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    documents = [json.loads(source.read_text()) for source in sources]
    most = max(len(document["rows"]) for document in documents)
    figure, all_axes = pyplot.subplots(
        1, len(documents), figsize=(7.5 * len(documents), 1.5 + 0.32 * most), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes, document in zip(all_axes[0], documents, strict=True):
        rows = document["rows"]
        found = ratios(rows)
        height = 0.8 / max(len(found), 1)
        for index, (peer, values) in enumerate(found.items()):
            places = [place - 0.4 + height * (index + 0.5) for place in range(len(rows))]
            bars = axes.barh(places, values, height, label=peer, color=COLORS[index % len(COLORS)])
            axes.bar_label(bars, fmt=" %.2f", fontsize=6)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.set_xticks([x for x in TICKS if low <= x <= high])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_yticks(range(len(rows)), [row["shape"]["name"] for row in rows], size=8)
        axes.invert_yaxis()
        axes.set_xlabel("time of the peer / ours; above 1 fastfusion is faster")
        axes.set_title(title(document), size=9)
        axes.legend(fontsize=8)
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Draws what the command line names; 2 where it makes no sense."""
    names = [Path(name) for name in (sys.argv[1:] if argv is None else argv)]
    missing = [str(path) for path in names[1:] if not path.is_file()]
    if len(names) < 2 or missing:
        wanted = f"no file {', '.join(missing)}" if missing else "name a picture and its files"
        print(f"cpu_plot: {wanted}", file=sys.stderr)
        return 2
    draw(names[0], names[1:])
    print(names[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())

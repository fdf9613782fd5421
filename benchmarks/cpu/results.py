"""The results of a run: rows, their tables in the terminal, and their JSON."""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..common.results import OURS, REFERENCE, Goal, in_words, slower
from ..common.timing import Measurement, Spread, geometric_mean


@dataclass
class Row:
    """One shape: our time, and how many times as long each other implementation takes.

    Attributes:
        suite: its name in the command.
        shape: its entry in shapes.json.
        path: the backend that ran, where the op can tell.
        times: seconds per call, by implementation.
        ratios: its time over ours, by implementation; above 1 we are faster.
        samples: every single time behind them.
        loops: how many calls one time was averaged over.
        how: in what way it ran.
        threads: of torch, when it was timed.
        cold: whether the caches were overwritten before each call.
        problems: why an implementation has no time: wrong, or crashed.
        skipped: why a peer took no part.
        flops: floating-point operations of one call, None where nobody has counted them.
        float_flops: those of them that are in float32 beside narrower weights.
        moved: bytes of inputs and outputs.
        cosines: with narrow weights, the lowest of a token with float64, by implementation.
        share: of what the machine can do at most (roofline.py), None where that is unknown.
    """

    suite: str
    shape: dict[str, Any]
    dtype: str
    backward: bool
    path: str | None = None
    how: str | None = None
    threads: int = 1
    cold: bool = False
    times: dict[str, Spread] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    loops: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    flops: int | None = None
    float_flops: int = 0
    moved: int | None = None
    cosines: dict[str, float] = field(default_factory=dict)
    share: float | None = None

    def add(self, measurement: Measurement) -> None:
        """Takes over the times of this shape."""
        self.samples, self.loops = measurement.samples, measurement.loops
        for name in measurement.samples:
            self.times[name] = measurement.time(name)
            if name != OURS and OURS in measurement.samples:
                self.ratios[name] = measurement.ratio(name, OURS)

    def hardest(self) -> Spread:
        """The smallest ratio against an implementation that is not ours; infinite without any."""
        others = [ratio for name, ratio in self.ratios.items() if name != REFERENCE]
        none = Spread(math.inf, math.inf, math.inf)
        return min(others, key=lambda ratio: ratio.median, default=none)


MANY = 4  # peers whose quartiles fit beside each other


def table(rows: list[Row]) -> str:
    """The rows of one suite and dtype as text, lost cells first.

    Of many peers the closest one has its quartiles, and the others stand beside it.
    """
    rows = sorted(rows, key=lambda row: (not row.problems, row.hardest().median))
    peers = list(dict.fromkeys(name for row in rows for name in row.ratios))
    many = len(peers) > MANY
    width = max(len(row.shape["name"]) for row in rows)
    head = f"{'':5}{'shape':<{width}}  {'fastfusion us':>26}  {'of peak':>7}  {'path':<9}"
    widths = [max(len(name), 5 if many else 18) for name in peers]
    narrow = any(row.cosines for row in rows)
    head += f"  {'cosine':>7}" if narrow else ""
    closest = f"  {'the closest':<32}" if many else ""
    columns = zip(peers, widths, strict=True)
    lines = [head + closest + "".join(f"  {name:>{size}}" for name, size in columns)]
    for row in rows:
        label = "LOST " if slower(row.hardest()) else ""
        cells = "".join(
            f"  {_ratio_cell(row.ratios.get(name), many):>{size}}"
            for name, size in zip(peers, widths, strict=True)
        )
        lines.append(
            f"{label:5}{row.shape['name']:<{width}}  {_time_cell(row.times.get(OURS)):>26}"
            f"  {'' if row.share is None else f'{row.share:.0%}':>7}  {row.path or '':<9}"
            + (f"  {cosine_cell(row.cosines.get(OURS)):>7}" if narrow else "")
            + (f"  {_closest_cell(row):<32}" if many else "")
            + cells
        )
        lines += [f"{'':5}  {name}: {why}" for name, why in row.problems.items()]
    for name in peers:
        ratios = [row.ratios[name] for row in rows if name in row.ratios]
        mean = geometric_mean(ratio.median for ratio in ratios)
        cosines = [row.cosines[name] for row in rows if name in row.cosines]
        about = f", cosine >= {cosine_cell(min(cosines))}" if cosines else ""
        lines.append(
            f"{'':5}{name}: geometric mean {mean:.2f} over {len(ratios)} shape(s), "
            f"lost {sum(map(slower, ratios))}{about}"
        )
    reasons = Counter((name, why) for row in rows for name, why in row.skipped.items())
    for (name, why), count in reasons.items():
        lines.append(f"{'':5}{name}: skipped for {count} shape(s): {why}")
    return "\n".join(lines)


# What stock torch does, by the peer that does it.
STOCK = {
    "sdpa": "torch's SDPA",
    "two sdpa": "two calls of torch's SDPA",
    "linear + sdpa": "torch's layers and SDPA",
    "layer + two sdpa": "torch's layers and SDPA",
    "torch": "torch's linear layer",
    "torch.nn": "torch.nn",
}


def summary(rows: list[Row], what: str) -> str | None:
    """All that was timed in one line: how many times as fast as stock torch, or as the first peer,
    and the share of the machine's peak, geometric mean and median of several rows; None where
    nothing was.

    Args:
        what: was timed, for people.
    """
    rows = [row for row in rows if OURS in row.times]
    found: list[tuple[str, float]] = []
    for row in rows:
        name = next((n for n in (*STOCK, *row.ratios) if n in row.ratios), None)
        if name is not None:
            found.append((STOCK.get(name, name), row.ratios[name].median))
    peers = {name for name, _ in found}
    several = len(found) > 1
    parts = []
    if found:
        peer = peers.pop() if len(peers) == 1 else "stock torch"
        mean = geometric_mean(ratio for _, ratio in found)
        parts.append(f"{mean:.1f}x {peer}{' (geometric mean)' if several else ''}")
    shares = [row.share for row in rows if row.share is not None]
    if shares:
        middle = " (median)" if len(shares) > 1 else ""
        parts.append(f"{100 * median(shares):.0f} % of this machine's peak{middle}")
    return f"{what}: {', '.join(parts)}" if parts else None


def _time_cell(time: Spread | None) -> str:
    if time is None:
        return "no time"
    return in_words(time, 1e6, 1 if time.median < 1e-3 else 0)


def _ratio_cell(ratio: Spread | None, short: bool = False) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.median:.2f}" if short else in_words(ratio, 1, 2)


def cosine_cell(cosine: float | None) -> str:
    """Rounded down: 1 would say that nothing was rounded."""
    return "" if cosine is None else f"{math.floor(1e5 * cosine) / 1e5:.5f}"


def _closest_cell(row: Row) -> str:
    found = row.hardest()
    names = [name for name, ratio in row.ratios.items() if ratio == found and name != REFERENCE]
    return f"{_ratio_cell(found)} {names[0]}" if names else ""


def document(
    machine: dict[str, Any],
    settings: dict[str, Any],
    ceilings: dict[str, Any],
    rows: list[Row],
    goals: dict[str, list[Goal]],
) -> dict[str, Any]:
    """Everything that was measured, ready for JSON: reports, pictures and comparisons take it."""
    return {
        "machine": machine,
        "settings": settings,
        "ceilings": ceilings,
        "rows": [asdict(row) for row in rows],
        "goals": {
            about: [{**asdict(goal), "met": goal.met} for goal in some]
            for about, some in goals.items()
        },
    }


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes a document as JSON."""
    path.write_text(json.dumps(document, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """A document that `write` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or not {"machine", "rows"} <= found.keys():
        raise ValueError(f"{path} holds no results of this tool")
    return found


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one machine as one document: the first one's machine and settings, all rows."""
    whole = dict(documents[0])
    whole["rows"] = [row for document in documents for row in document["rows"]]
    whole["goals"] = {k: v for document in documents for k, v in document["goals"].items()}
    return whole


def label(row: dict[str, Any]) -> str:
    """What a row of a document is about, the same in every run."""
    extra = [
        *(["forward and backward"] if row["backward"] else []),
        *([f"{row['threads']} threads"] if row.get("threads", 1) > 1 else []),
        *(["cold"] if row.get("cold") else []),
    ]
    return ", ".join([row["suite"], row["shape"]["name"], row["dtype"], *extra])

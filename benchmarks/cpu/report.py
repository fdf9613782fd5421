"""One HTML file that says what was run, on what, who wins and why: no other file, no network."""

import base64
import html
import io
from typing import Any

from ..common.plots import pyplot
from ..common.results import OURS, REFERENCE, slower
from ..common.timing import Spread, geometric_mean
from . import plots

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1b1b; }
h1, h2 { line-height: 1.2; } table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .text { text-align: left; }
.lost { background: #fde2e1; } .won { background: #e3f2e1; } .missed { color: #b00020; }
.met { color: #1b6e1b; } img { max-width: 100%; } .wide { overflow-x: auto; }
small { color: #666; }
"""


def _cell(text: object, tag: str = "td", kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f"<{tag}{mark}>{html.escape(str(text))}</{tag}>"


def _row(cells: list[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _table(head: list[str], rows: list[str]) -> str:
    heads = _row([_cell(name, "th") for name in head])
    return f'<div class="wide"><table>{heads}{"".join(rows)}</table></div>'


def _group(row: dict[str, Any]) -> str:
    direction = "forward and backward" if row["backward"] else "forward"
    cold = ", cold" if row.get("cold") else ""
    threads = row.get("threads", 1)
    return f"{row['suite']}, {row['dtype']}, {direction}, {threads} thread(s){cold}"


def _grouped(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in document["rows"]:
        groups.setdefault(_group(row), []).append(row)
    return groups


def _facts(document: dict[str, Any]) -> str:
    facts = {**document["machine"], **document["settings"]}
    ceilings = document.get("ceilings") or {}
    for name, value in (ceilings.get("operations") or {}).items():
        facts[f"peak, {name}"] = f"{value / 1e9:.0f} G operations/s, a loop of products"
    if "bandwidth" in ceilings:
        facts["memory"] = f"{ceilings['bandwidth'] / 1e9:.1f} GB/s, read and written by a copy"
    rows = [
        _row([_cell(name), _cell(value, kind="text")])
        for name, value in facts.items()
        if value not in (None, "")
    ]
    return _table(["what was measured, and on what", ""], rows)


def _summary(document: dict[str, Any]) -> str:
    rows = []
    for name, own in _grouped(document).items():
        for peer in plots.peers_of(own):
            ratios = [Spread(**row["ratios"][peer]) for row in own if peer in row["ratios"]]
            lost = sum(map(slower, ratios))
            mean = geometric_mean(ratio.median for ratio in ratios)
            rows.append(
                _row(
                    [
                        _cell(name),
                        _cell(peer, kind="text"),
                        _cell(f"{mean:.2f}", kind="lost" if mean < 1 else "won"),
                        _cell(f"{min(ratio.median for ratio in ratios):.2f}"),
                        _cell(len(ratios)),
                        _cell(lost, kind="lost" if lost else ""),
                    ]
                )
            )
    head = ["what", "peer", "time over ours, geometric mean", "worst", "shapes", "lost"]
    return _table(head, rows) if rows else ""


def _details(row: dict[str, Any], peers: list[str]) -> list[str]:
    time = row["times"].get(OURS)
    cells = [
        _cell(row["shape"]["name"]),
        _cell(f"{1e6 * time['median']:.1f}" if time else "no time"),
        _cell(f"{100 * row['share']:.0f} %" if row.get("share") else ""),
    ]
    for peer in peers:
        found = row["ratios"].get(peer)
        if found is None:
            reason = row["problems"].get(peer) or row.get("skipped", {}).get(peer, "")
            cells.append(_cell(reason[:60], kind="text"))
            continue
        ratio = Spread(**found)
        kind = "lost" if slower(ratio) else "won" if ratio.lower > 1 else ""
        cells.append(_cell(f"{ratio.median:.2f} ({ratio.lower:.2f}-{ratio.upper:.2f})", kind=kind))
    return [*cells, _cell(row["problems"].get(OURS) or row.get("how") or "", kind="text")]


def _rows(document: dict[str, Any]) -> str:
    parts = []

    def hardest(row: dict[str, Any]) -> float:
        return min((r["median"] for n, r in row["ratios"].items() if n != REFERENCE), default=0.0)

    for name, own in _grouped(document).items():
        peers = list(dict.fromkeys(p for row in own for p in [*row["ratios"], *row["problems"]]))
        peers = [peer for peer in peers if peer != OURS]
        body = [_row(_details(row, peers)) for row in sorted(own, key=hardest)]
        head = ["shape", "fastfusion, us", "of peak", *peers, "what ran"]
        parts.append(f"<h2>{html.escape(name)}</h2>{_table(head, body)}")
    return "".join(parts)


def _goals(document: dict[str, Any]) -> str:
    parts = []
    for about, goals in document["goals"].items():
        body = []
        for goal in goals:
            verdict = {None: "not measured", True: "met", False: "missed"}[goal["met"]]
            value = "" if goal["value"] is None else f"{goal['value']:.2f}{goal['unit']}"
            sign = "at most" if goal["at_most"] else "at least"
            body.append(
                _row(
                    [
                        _cell(goal["name"]),
                        _cell(value),
                        _cell(f"{sign} {goal['limit']:g}{goal['unit']}"),
                        _cell(verdict, kind=verdict if goal["met"] is not None else ""),
                        _cell(goal["detail"], kind="text"),
                    ]
                )
            )
        parts.append(
            f"<h2>{html.escape(about)}</h2>{_table(['goal', 'measured', 'wanted', '', ''], body)}"
        )
    return "".join(parts)


def _pictures(document: dict[str, Any]) -> str:
    try:
        drawing = pyplot()
    except ImportError:
        return "<p><small>No pictures: matplotlib is not installed.</small></p>"
    parts = []
    for name, (draw, rows, size) in plots.pictures(document).items():
        figure, axes = drawing.subplots(figsize=size, layout="constrained")
        draw(axes, document, rows)
        memory = io.BytesIO()
        figure.savefig(memory, dpi=110)
        drawing.close(figure)
        data = base64.b64encode(memory.getvalue()).decode()
        parts.append(f'<img alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
    return "".join(parts)


def page(document: dict[str, Any]) -> str:
    """The whole report of a document that --json wrote."""
    machine = document["machine"]
    lost = sum(
        slower(Spread(**ratio))
        for row in document["rows"]
        for name, ratio in row["ratios"].items()
        if name != REFERENCE
    )
    cells = sum(len([n for n in row["ratios"] if n != REFERENCE]) for row in document["rows"])
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>fastfusion on {html.escape(str(machine['cpu']))}</title><style>{STYLE}</style>"
        f"<h1>fastfusion {html.escape(str(machine['fastfusion']))} on "
        f"{html.escape(str(machine['cpu']))}</h1>"
        f"<p>{cells} comparisons, {lost} lost. A number is how many times as long the peer takes: "
        "above 1 fastfusion is faster. In brackets are the quartiles; a cell counts as lost where "
        "three quarters of the rounds were. Every result was compared with float64 before it was "
        "timed.</p>"
        f"{_summary(document)}{_pictures(document)}{_rows(document)}{_goals(document)}"
        f"{_facts(document)}</html>"
    )

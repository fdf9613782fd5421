"""Two runs beside each other: which cells moved?

Times of two processes are not comparable, since clocks drift in between; their ratios to a peer
that both runs timed in turns with us are. A cell has moved where the quartiles of that ratio do not
overlap and the medians differ by more than 5 %.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.results import REFERENCE
from ..common.timing import Spread
from . import results

LEAST = 0.05


@dataclass(frozen=True)
class Change:
    """A cell of both runs: the peer's time over ours, before and now."""

    cell: str
    peer: str
    before: Spread
    now: Spread

    @property
    def factor(self) -> float:
        """How many times as fast as before; below 1 it became slower."""
        return self.now.median / self.before.median

    @property
    def moved(self) -> bool:
        """Whether the difference is more than noise."""
        apart = self.now.lower > self.before.upper or self.now.upper < self.before.lower
        return apart and abs(self.factor - 1) > LEAST

    def __str__(self) -> str:
        direction = "faster" if self.factor > 1 else "slower"
        return (
            f"{self.cell}: {self.factor:.2f}x as fast as before, {direction}; "
            f"{self.peer} {self.before.median:.2f} -> {self.now.median:.2f} of ours"
        )


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Every cell that both documents have, with the first peer that both timed."""
    old = {results.label(row): row["ratios"] for row in before["rows"]}
    found = []
    for row in now["rows"]:
        cell = results.label(row)
        shared = [name for name in row["ratios"] if name in old.get(cell, {}) and name != REFERENCE]
        if shared:
            pair = (Spread(**ratios[shared[0]]) for ratios in (old[cell], row["ratios"]))
            found.append(Change(cell, shared[0], *pair))
    return found


def report(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What moved, slower cells first."""
    found = changes(before, now)
    moved = sorted((c for c in found if c.moved), key=lambda change: change.factor)
    names = [f"{d['machine'].get('commit')} ({d['machine'].get('cpu')})" for d in (before, now)]
    lines = [f"compared with {names[0]}: {len(found)} cell(s), {len(moved)} moved beyond noise"]
    if names[0].partition("(")[2] != names[1].partition("(")[2]:
        lines.append(f"another machine: this is {names[1]}")
    return "\n".join([*lines, *(f"  {change}" for change in moved)])


def load(source: str, argv: Sequence[str]) -> dict[str, Any]:
    """The document to compare with: a file, or the same run of a git revision.

    Args:
        source: a file that --json wrote, or what git takes for a revision.
        argv: the command line without --compare and its outputs.

    Raises:
        ValueError: it is neither, or the revision does not build or run.
    """
    if Path(source).is_file():
        return results.read(Path(source))
    return of_revision(source, argv)


def of_revision(revision: str, argv: Sequence[str]) -> dict[str, Any]:
    """Builds and runs a revision in folders that are thrown away."""
    root = Path(__file__).resolve().parents[2]

    def run(*command: str, cwd: Path = root, env: dict[str, str] | None = None) -> None:
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
            raise ValueError(f"--compare {revision}: {last}")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tree, site, file = folder / "tree", folder / "site", folder / "results.json"
        run("git", "worktree", "add", "--detach", "--quiet", str(tree), revision)
        try:
            pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps")
            run(*pip, "--no-build-isolation", "--target", str(site), str(tree))
            # Its folder comes before that of any installed fastfusion.
            paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
            bench = (sys.executable, "-m", "fastfusion", "bench", *argv, "--json", str(file))
            run(*bench, cwd=folder, env={**os.environ, "PYTHONPATH": paths})
        finally:
            run("git", "worktree", "remove", "--force", str(tree))
        document = results.read(file)
    document["machine"]["commit"] = revision
    return document

"""Whether this tool repeats itself: ``python -m fastfusion.benchmarks.cpu.check``, bench-check.

Runs a small set twice, each in a process of its own, and fails where a cell's ratio to its peer
differs by more than 10 %. On a machine that does other work it will.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from . import compare, results

ALLOWED = 1.10
SMALL = ("attention", "--quick", "--rounds", "15", "--peers", "sdpa,unfused")


def worst(changes: list[compare.Change]) -> tuple[float, str]:
    """The largest ratio of two medians, and whose it is."""
    factors = {change.cell: max(change.factor, 1 / change.factor) for change in changes}
    name = max(factors, key=lambda cell: factors[cell])
    return factors[name], name


def main() -> int:
    """Two runs; 1 where they disagree."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("first.json", "second.json")]
        for file in files:
            command = [sys.executable, "-m", "fastfusion", "bench", *SMALL, "--json", str(file)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = compare.changes(*map(results.read, files))
    factor, cell = worst(found)
    verdict = "repeats itself" if factor <= ALLOWED else "does NOT repeat itself"
    print(f"{verdict}: {len(found)} cells, the two runs differ by at most {factor:.3f}x ({cell})")
    return int(factor > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())

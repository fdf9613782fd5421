"""How much of the C++ a run of the tests has executed: `make coverage`.

    coverage.py FOLDER [--uncovered]

reads with gcov what the objects below FOLDER have counted. A line counts as executed where any of
the units that it was compiled into has run it: kernels are compiled for each instruction set and
number type.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def executed(folder: Path) -> dict[str, dict[int, int]]:
    """How often each line of each file of csrc/ was executed."""
    counts: dict[str, dict[int, int]] = defaultdict(dict)
    notes = sorted(folder.rglob("*.gcno"))
    if not notes:
        raise SystemExit(f"{folder} has no objects that were compiled with --coverage")
    for note in notes:
        command = ["gcov", "--json-format", "--stdout", str(note)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        for document in map(json.loads, done.stdout.splitlines()):
            for file in document["files"]:
                if file["file"].startswith("csrc/"):
                    lines = counts[file["file"]]
                    for line in file["lines"]:
                        number = line["line_number"]
                        lines[number] = max(lines.get(number, 0), line["count"])
    return counts


def ranges(numbers: list[int]) -> str:
    """Numbers in a row as one: "3-5, 8"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def main() -> int:
    """Prints a line for each folder, with --uncovered one for each file, and the total."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--uncovered", action="store_true", help="the lines that nothing ran")
    arguments = parser.parse_args()
    counts = executed(arguments.folder)
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, lines in sorted(counts.items()):
        missed = sorted(number for number, count in lines.items() if not count)
        for total in (str(Path(name).parent), "all of C++"):
            sums[total][0] += len(lines) - len(missed)
            sums[total][1] += len(lines)
        if arguments.uncovered and missed:
            print(f"{name}: {ranges(missed)}")
    last = sums.pop("all of C++")
    for name, (run, all_lines) in [*sorted(sums.items()), ("all of C++", last)]:
        print(f"{run / all_lines:7.1%} of {all_lines:>5}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

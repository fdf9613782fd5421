"""The CUDA attention kernels as a mutation test in the emulator: no order of blocks and warps
changes a bit, and leaving out any barrier or wait does in some order."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from checkout import ROOT, build_script

BUILD = build_script()
CHECK = ROOT / "tests/native/check_cuda_attention.cpp"
# What may go unnoticed: the call, by the text of its line, and why.
UNNOTICED = {
    75: {"barrier();  // values are there": "below sm_80 values come with the keys, at once"},
    80: {},
}


@pytest.fixture(scope="module", params=[75, 80])
def built(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """The capability, and the check with kernels for it."""
    capability, folder = request.param, tmp_path_factory.mktemp("check")
    compiler = BUILD["find_compiler"]()
    if compiler is None:
        pytest.skip("no C++ compiler")
    sources = [CHECK, *sorted((ROOT / "csrc/emulate").glob("*.cpp"))]
    kernels = sorted((ROOT / "csrc/cuda").rglob("*.cu"))
    flags = [*BUILD["COMPILE_FLAGS"], *BUILD["EMULATED_FLAGS"]]
    program = folder / "check_cuda_attention"
    command = [*compiler, *flags, f"-DFF_ARCH={capability}", *sources]
    command += ["-x", "c++", *kernels, "-x", "none", "-pthread", "-o", program]
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True)
    return capability, program


@pytest.mark.parametrize(
    ("keys", "devices"),
    [
        (64, {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}),
        (240, {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}),
        (257, {80, 86, 87, 89, 90, 100, 103, 110, 120, 121}),
        (577, {80, 87, 90, 100, 103, 110}),
        (640, {90, 100, 103, 110}),
        (641, set()),
    ],
)
def test_keys_that_shared_memory_holds(
    built: tuple[int, Path], keys: int, devices: set[int]
) -> None:
    """64 KB of it on Turing, 99 on chips made for graphics, 163 or 227 elsewhere; a key and a
    value of 64 numbers take 256 bytes."""
    done = subprocess.run([built[1], str(keys)], capture_output=True, text=True, check=True)
    lines = [line.partition(" ")[::2] for line in done.stdout.splitlines()]
    assert {int(device) for device, way in lines if way == "all keys in shared memory"} == devices
    others = {way for device, way in lines if int(device) not in devices}
    assert others <= {"chunks of keys in shared memory, then combined"} and len(lines) == 11


def test_every_barrier_is_needed_and_enough(built: tuple[int, Path]) -> None:
    capability, program = built
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(re.findall(r'\{"\w+", Type::k', CHECK.read_text()))
    unexpected = [line for line in lines if "orders agree" not in line]
    for line in lines:
        for file, number in re.findall(r"missed \w+ at ([\w.]+):(\d+)", line):
            (path,) = (ROOT / "csrc/cuda").rglob(file)
            text = path.read_text().splitlines()[int(number) - 1]
            if not any(known in text for known in UNNOTICED[capability]):
                unexpected.append(f"{line}: {text.strip()}")
    assert not unexpected
    mutations = sum(int(n) for n in re.findall(r"(\d+) mutations", done.stdout))
    assert mutations > 2 * len(lines)

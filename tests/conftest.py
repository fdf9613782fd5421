"""The device, seeds, thread counts and the generation of the shared op suite.

`pytest --device cuda` runs on a GPU; the default is the CPU, where Triton kernels run in Triton's
interpreter, and CUDA kernels in the emulator of csrc/emulate: `--emulated FILE` takes another
library than that of sm_80, which is brought up to date first.
"""

import ctypes
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when Triton is imported, so it is set before any other import. pytest's workers do not see
# the option so early, but inherit the variable.
_ON_GPU = "--device cuda" in " ".join(sys.argv).replace("=", " ")
os.environ.setdefault("TRITON_INTERPRET", "0" if _ON_GPU else "1")
# torch looks compiled graphs up by their forward alone: a backward of another checkout, or of a
# schema of yesterday, would run.
_COMPILED = Path(__file__).parents[1].joinpath("build/inductor")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_COMPILED))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# Beside a CUDA build of torch the kernels for a device may be built; their ops have the names of
# the emulated ones, and a process that registered both would die.
_cuda_version = torch.version.cuda
if not _ON_GPU:
    torch.version.cuda = None

import checkout  # noqa: E402
import triton_interpreter  # noqa: E402
from checkout import ROOT  # noqa: E402
from suite import DEVICE, ISAS, OpSuite  # noqa: E402

import fastfusion as ff  # noqa: E402
from fastfusion.backends import library  # noqa: E402

torch.version.cuda = _cuda_version

EMULATED = ROOT / "build/emulated/sm90/_emulated_ops.so"

# The same examples in every run: a red run must be red again. To search with fresh ones, run
# pytest --hypothesis-profile=default.
hypothesis.settings.register_profile("fastfusion", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fastfusion")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the CPU kernels, in use while the test runs."""
    assert library.native is not None
    library.native.select_isa(request.param)
    yield request.param
    library.native.select_isa()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    parser.addoption("--emulated", type=Path, metavar="FILE")
    parser.addoption("--cxx", metavar="COMMAND")
    parser.addoption("--every", type=int, default=1, metavar="N", help="run one test of N")
    # tests/ops/test_random_calls.py
    parser.addoption("--random-seconds", type=float, default=0.8, metavar="S")
    parser.addoption("--random-example", metavar="OP:TARGET:INDEX")


def pytest_configure(config: pytest.Config) -> None:
    checkout.cxx = config.getoption("cxx")
    if DEVICE == "cpu":
        triton_interpreter.mend()
        emulate(config.getoption("emulated"), hasattr(config, "workerinput"))
    else:
        torch.set_default_device(DEVICE)


def emulate(library: Path | None, is_worker: bool) -> None:
    """Loads the emulated kernels; without a compiler or a checkout there are none. Workers build
    nothing."""
    if library is None and not is_worker and (ROOT / "setup.py").exists():
        command = [sys.executable, "setup.py", "--quiet", "build_emulated"]
        if subprocess.run(command, cwd=ROOT).returncode:
            pytest.exit("the emulated CUDA kernels were not built", returncode=3)
    library = library or EMULATED
    if library.exists():
        ff.backends.cuda.emulate(library)


def emulated_order(name: str) -> None:
    """Blocks, warps and lanes of the emulator in an order of this test's own, always the same."""
    if ff.backends.cuda.emulated is not None:
        number = zlib.crc32(name.encode())
        order = (number & 1, number >> 1 & 1, number >> 2 & 1)
        ctypes.CDLL(str(ff.backends.cuda.emulated)).ff_emulate_options(*order)


@pytest.fixture(autouse=True)
def _fresh_state(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test starts from one seed and leaves threads, backend and ISA as they were."""
    torch.manual_seed(0)
    emulated_order(request.node.name)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    native = ff.backends.library.native
    if native is not None:
        native.select_isa()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Any:
    """After an illegal access a device fails every later test of the process: a worker of xdist
    ends, and another one takes its place."""
    report = yield
    if DEVICE == "cuda" and report.failed and hasattr(item.config, "workerinput"):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(77)
    return report


# Those of 10 s and more come first: at the end the other processes would wait for them.
_LONG = (
    "test_of_the_static_program", "test_shipped_kernels_compile_well",
    "test_every_step_on_a_device_that_one_test_breaks",
    "test_a_package_runs_in_fresh_processes_of_python_and_of_cpp",
    "test_faults_and_their_right_twins",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.name.startswith(_LONG))
    items[:] = items[:: config.getoption("every")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Subclasses of OpSuite run every test for each case, target and dtype that it names."""
    suite = metafunc.cls
    if suite is None or not issubclass(suite, OpSuite):
        return
    wanted = set(metafunc.fixturenames)
    if {"case", "target"} <= wanted:
        targets = suite.targets()
        pairs = [(case, target) for case in suite.cases for target in targets if case.suits(target)]
        ids = [f"{case.name}-{target}" for case, target in pairs]
        metafunc.parametrize(("case", "target"), pairs, ids=ids)
        wanted -= {"case", "target"}
    if "case" in wanted:
        metafunc.parametrize("case", suite.cases, ids=lambda case: case.name)
    for name in sorted(wanted):
        if name.endswith("target"):
            metafunc.parametrize(name, getattr(suite, f"{name}s")(), ids=str)
    if "dtype" in wanted:
        metafunc.parametrize("dtype", suite.dtypes, ids=lambda d: str(d).removeprefix("torch."))

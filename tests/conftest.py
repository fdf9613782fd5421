"""The device, seeds, thread counts and the generation of the shared op suite.

`pytest --device cuda` runs on a GPU; the default is the CPU, where Triton kernels run in Triton's
interpreter.
"""

import os
import sys
from collections.abc import Iterator

# Read when Triton is imported, so it is set before any other import. pytest's workers do not see
# the option so early, but inherit the variable.
_ON_GPU = "cuda" in sys.argv or "--device=cuda" in sys.argv
os.environ.setdefault("TRITON_INTERPRET", "0" if _ON_GPU else "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import triton_interpreter  # noqa: E402
from suite import DEVICE, OpSuite  # noqa: E402

import fastfusion as ff  # noqa: E402

# The same examples in every run: a red run must be red again. To search with fresh ones, run
# pytest --hypothesis-profile=default.
# One method runs for several targets, each with an instance of its own: differing executors.
hypothesis.settings.register_profile(
    "fastfusion",
    derandomize=True,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.differing_executors],
)
hypothesis.settings.load_profile("fastfusion")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu")


def pytest_configure(config: pytest.Config) -> None:
    if DEVICE == "cpu":
        triton_interpreter.mend()
    else:
        torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Every test starts from one seed and leaves threads, backend and ISA as they were."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    native = ff._library.native
    if native is not None:
        native.select_isa()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Subclasses of OpSuite run every test for each case, target and dtype that it names."""
    suite = metafunc.cls
    if suite is None or not issubclass(suite, OpSuite):
        return
    wanted = set(metafunc.fixturenames)
    if "case" in wanted:
        metafunc.parametrize("case", suite.cases, ids=lambda case: case.name)
    for name in ("target", "native_target", "threaded_target", "fast_target", "slow_target"):
        if name in wanted:
            metafunc.parametrize(name, getattr(suite, f"{name}s")(), ids=str)
    if "dtype" in wanted:
        metafunc.parametrize("dtype", suite.dtypes, ids=lambda d: str(d).removeprefix("torch."))

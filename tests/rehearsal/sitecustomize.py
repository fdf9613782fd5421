"""A GPU that is not there, for tests/test_rehearsal.py, which puts this folder on PYTHONPATH.

Python imports this file when it starts, so every process of a rehearsal sees the device, child
processes too. Faked is the device alone: what names it, its clock and its graphs; its tensors lie
on the CPU, Triton's kernels run in Triton's interpreter and those of CUDA in the emulator. Products
too large for that are not computed. The shapes and tests of a rehearsal are few and small.
"""

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NAME = "Rehearsal 100"
# Rows of a matrix that only the measurement of a real device's peak has.
LARGE = 4096
ATTENTION = {"batch": 1, "heads": 1, "q_len": 5, "kv_len": 9, "head_dim": 16, "value_dim": 16}
SHAPES = {
    "attention": {**ATTENTION, "kv_heads": 1, "mask": "key_padding"},
    "bidirectional": {**ATTENTION, "mask": "both_padding"},
    "block": {"batch": 1, "q_len": 5, "kv_len": 9, "dim": 32, "context_dim": 32, "heads": 2},
}


class Event:
    """torch.cuda.Event, by the clock of the CPU."""

    def __init__(self, **_: Any) -> None:
        self.time = 0.0

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.time - self.time)


class Recording:
    """fastfusion._cuda_graph.Recording: a replay is another call, its results copied to where those
    of the first lie."""

    def __init__(self, device: Any) -> None:
        self.graph = SimpleNamespace(replay=self.replay)
        self.run: Callable[[], Any] = lambda: None
        self.results: Any = None

    def warm_up(self, run: Callable[[], Any]) -> None:
        run()

    def capture(self, run: Callable[[], Any]) -> Any:
        self.run, self.results = run, run()
        return self.results

    def replay(self) -> None:
        results = self.run()
        if hasattr(results, "copy_"):
            self.results.copy_(results)


def fake_device(torch: ModuleType) -> None:
    """torch sees one GPU, whose memory is the CPU's."""
    from torch.overrides import TorchFunctionMode

    broken: list[bool] = []

    def on_the_cpu(value: Any) -> Any:
        named = isinstance(value, str | torch.device) and str(value).startswith("cuda")
        return "cpu" if named else value

    class Device(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            kwargs = {name: on_the_cpu(value) for name, value in (kwargs or {}).items()}
            if func is torch.matmul and "out" in kwargs and len(args[0]) >= LARGE:
                return kwargs["out"]
            return func(*map(on_the_cpu, args), **kwargs)

    def synchronize(*_: Any) -> None:
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.version.cuda = None  # or kernels for a device might be loaded before the emulated ones
    set_default_device = torch.set_default_device
    torch.set_default_device = lambda device: set_default_device(on_the_cpu(device))
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=1, total_memory=1 << 24, L2_cache_size=0
    )
    for name, value in {
        "Event": Event,
        "break_it": lambda: broken.append(True),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_name": lambda *_: NAME,
        "get_device_properties": lambda *_: properties,
        "is_available": lambda: True,
        "mem_get_info": lambda *_: (1 << 24, 1 << 24),
        "synchronize": synchronize,
    }.items():
        setattr(torch.cuda, name, value)
    Device().__enter__()


def take_items(interpreter: ModuleType) -> None:
    """Triton 3.6 takes an index out of an array, as NumPy 2.4 does not."""
    patch = interpreter._patch_lang

    def patched(function: Any) -> Any:
        scope = patch(function)
        tensor = sys.modules["triton.language"].core.tensor
        tensor.__index__ = lambda self: int(self.handle.data.item())
        return scope

    interpreter._patch_lang = patched


def emulate(fastfusion: ModuleType) -> None:
    """The CUDA kernels in their emulator."""
    fastfusion.backends.cuda.emulate(Path(os.environ["REHEARSAL_EMULATED"]))


def record(cuda_graph: ModuleType) -> None:
    """Graphs that are calls."""
    cuda_graph.Recording = Recording


def few_shapes(shapes: ModuleType) -> None:
    small = {group: [{"name": f"small_{group}", **shape}] for group, shape in SHAPES.items()}
    shapes.load = lambda: small


def few_checks(checks: ModuleType) -> None:
    """A short list of tests, on two workers; compute-sanitizer where the rehearsal has put one."""
    checks.QUICK_TESTS = ("tests/rehearsal/few_tests.py",)
    checks.test_workers = lambda: 2
    tools = os.environ["REHEARSAL_TOOLS"]
    checks.find_sanitizer = lambda: shutil.which("compute-sanitizer", path=tools)


AFTER = {
    "torch": fake_device,
    "triton.runtime.interpreter": take_items,
    "fastfusion": emulate,
    "fastfusion._cuda_graph": record,
    "fastfusion.benchmarks.common.shapes": few_shapes,
    "fastfusion.benchmarks.gpu.checks": few_checks,
}


class Finder(MetaPathFinder):
    """Changes modules right after they are imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        change = AFTER.pop(name, None)
        if change is None:
            return None
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


if "REHEARSAL_TOOLS" in os.environ:
    sys.meta_path.insert(0, Finder())

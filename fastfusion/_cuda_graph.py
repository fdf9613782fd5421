"""A module's forward as one CUDA graph: a single launch in place of one per kernel.

Small modules spend their time on launches, not on arithmetic. A graph records the launches of one
forward, with their addresses, and repeats them all at once; so shapes, and everything that Python
decided on the way, are those of the capture. A call that differs in any of that runs the module.
"""

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import is_ as _is
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastfusion.nn._attention_maps import is_active as _reads_attention

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled

# Triton and cuDNN compile and choose in the first call, and allocators settle in the next.
WARM_UP = 3
# What is part of the recorded program, so that a call has to repeat it.
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
# Subclasses carry more than a copy of their data would.
_PLAIN = (Tensor, nn.Parameter)


class Recording:
    """What torch launches on one device, recorded once and replayed; the part that needs a GPU."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.graph = torch.cuda.CUDAGraph()
        self.stream = torch.cuda.Stream(device)
        self.last_used = torch.cuda.current_stream(device)

    @staticmethod
    def unavailable() -> str | None:
        """Why nothing can be recorded on this machine."""
        return None if torch.cuda.is_available() else "torch sees no CUDA device"

    @staticmethod
    def busy() -> bool:
        """Whether somebody else captures the current stream: a graph cannot replay in another."""
        return torch.cuda.is_current_stream_capturing()

    def random_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device)

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Some calls on a side stream, as a capture needs."""
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream()
            self.stream.wait_stream(before)
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UP):
                    run()
            before.wait_stream(self.stream)

    def capture(self, run: Callable[[], Any]) -> Any:
        """Records one call and returns its results, which hold nothing before the first replay."""
        first: Exception | None = None
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream()
            try:
                # thread_local: other threads, such as a data loader's, may go on as they like.
                with torch.cuda.graph(
                    self.graph,
                    pool=self.pool,
                    stream=self.stream,
                    capture_error_mode="thread_local",
                ):
                    try:
                        return run()
                    except Exception as error:
                        first = error  # the end of the capture will say less
                        raise
            except Exception as error:
                self._recover(before)
                raise first or error from None

    def _recover(self, stream: torch.cuda.Stream) -> None:
        """Puts back what torch leaves behind after a capture that CUDA broke off.

        That is the capture's stream as the current one, allocations routed to its pool, and a
        random generator that believes that it is captured, so that every later `torch.rand` would
        raise. The first capture that succeeds ends the latter.
        """
        torch.cuda.set_stream(stream)
        with suppress(Exception):
            # The first raises where the capture ended in order, and then owns its pool still.
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        with suppress(Exception):
            target = torch.zeros(1, device=self.device)
            with torch.cuda.graph(
                torch.cuda.CUDAGraph(),
                stream=torch.cuda.Stream(self.device),
                capture_error_mode="thread_local",
            ):
                target.add_(1)
        torch.cuda.set_stream(stream)

    def replay(self, copy: Callable[[], None], results: Callable[[], Any]) -> Any:
        """Fills the inputs, runs the graph and takes its results, on the current stream."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if stream != self.last_used:
                # The inputs and outputs are one set of memory for all streams.
                stream.wait_stream(self.last_used)
                self.last_used = stream
            copy()
            self.graph.replay()
            return results()


class NoGraph(Exception):
    """Nothing can be captured; the message says why."""


class _Program:
    """A captured forward: what a call has to repeat, and the memory that a replay uses."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        unavailable = Recording.unavailable()
        if unavailable is not None:
            raise NoGraph(unavailable)
        leaves, self.structure = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        # Without nesting and names a call's arguments are its leaves.
        self.flat = not kwargs and len(leaves) == len(args) and all(map(_is, leaves, args))
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
        if len(devices) != 1 or next(iter(devices)).type != Recording.device_type:
            given = ", ".join(sorted(map(str, devices))) or "there are none"
            raise NoGraph(f"the tensors among the arguments must be on one CUDA device: {given}")
        (self.device,) = devices
        self.examples, self.same, self.groups = _lay_out(leaves)
        self.settings = _settings()
        self.modules = list(module.modules())
        self.modes = [part.training for part in self.modules]
        state = [*module.parameters(), *module.buffers()]
        self.state = [tensor for tensor in state if tensor.layout == torch.strided]
        self.lock = threading.Lock()

    def record(self, module: nn.Module) -> None:
        """Warms up and captures."""
        self.recording = Recording(self.device)
        args, kwargs = pytree.tree_unflatten(self.examples, self.structure)

        def run() -> Any:
            return module(*args, **kwargs)

        inputs = [buffer for buffers, _ in self.groups for buffer in buffers]
        versions = [buffer._version for buffer in inputs]
        random = (torch.get_rng_state(), self.recording.random_state())
        enabled, dtype = self.settings
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            # A cached cast of a weight would live outside the graph and die with its autocast.
            torch.autocast(Recording.device_type, dtype, enabled, cache_enabled=False),
        ):
            self.recording.warm_up(run)
            after = (torch.get_rng_state(), self.recording.random_state())
            if not all(map(torch.equal, random, after)):
                raise NoGraph("the forward draws random numbers, as dropout does in training mode")
            if versions != [buffer._version for buffer in inputs]:
                raise NoGraph("the forward changes an argument in place")
            try:
                results = self.recording.capture(run)
            except Exception as error:
                text = str(error).partition("\n")[0]
                raise NoGraph(f"the capture failed, {type(error).__name__}: {text}") from None
        self.outputs, self.output_structure = pytree.tree_flatten(results)
        for output in self.outputs:
            _check_output(output, self.device)
        self.pointers = [tensor.data_ptr() for tensor in self.state]

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any] | None:
        """The arguments in the order of the capture; None where they are arranged otherwise."""
        if self.flat and not kwargs:
            return args if len(args) == len(self.examples) else None
        leaves, structure = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        return leaves if structure == self.structure else None

    def refusal(self, leaves: Sequence[Any] | None) -> str | None:
        """Why these arguments cannot replay, now."""
        if leaves is None:
            return "the arguments are nested or named otherwise than in the capture"
        gradient = _is_grad_enabled()
        for index, (leaf, example) in enumerate(zip(leaves, self.examples, strict=True)):
            if isinstance(example, Tensor):
                if type(leaf) not in _PLAIN or (
                    leaf.shape != example.shape
                    or leaf.dtype != example.dtype
                    or leaf.device != example.device
                    or leaf.layout != torch.strided
                ):
                    given, captured = _describe(leaf), _describe(example)
                    return f"argument {index} is {given}, in the capture it was {captured}"
                if gradient and leaf.requires_grad:
                    return f"argument {index} requires a gradient"
            elif type(leaf) is not type(example) or leaf != example:
                given, captured = _describe(leaf), _describe(example)
                return f"argument {index} is {given}, in the capture it was {captured}"
        for one, other in self.same:
            if leaves[one] is not leaves[other]:
                return f"arguments {one} and {other} were one tensor in the capture"
        if gradient and any(tensor.requires_grad for tensor in self.state):
            return "the parameters require a gradient; torch.no_grad() says that none is needed"
        if _settings() != self.settings:
            return "autocast is set otherwise than in the capture"
        if [part.training for part in self.modules] != self.modes:
            return "train() or eval() was called since the capture"
        if [tensor.data_ptr() for tensor in self.state] != self.pointers:
            return "a parameter or buffer has moved to other memory since the capture"
        if (
            forward_ad._current_level >= 0
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack() > 0
        ):
            return "a transform or mode of torch is active, which has to see every op"
        if _reads_attention():
            return "attention_maps is reading weights, which a graph does not hand out"
        return "another capture is under way" if Recording.busy() else None

    def replay(self, leaves: Sequence[Any], clone: bool) -> Any:
        """The results for arguments that `refusal` has passed."""

        def fill() -> None:
            with torch.no_grad():
                for buffers, indices in self.groups:
                    torch._foreach_copy_(buffers, [leaves[index] for index in indices])

        def results() -> Any:
            outputs = self.outputs
            if clone:
                outputs = [t.clone() if isinstance(t, Tensor) else t for t in outputs]
            return pytree.tree_unflatten(outputs, self.output_structure)

        with self.lock:
            return self.recording.replay(fill, results)


class CudaGraphed(nn.Module):
    """A module behind a CUDA graph of its forward; made by `fastfusion.cuda_graph`.

    Attributes:
        module: the module itself, which runs whatever the graph cannot.
        reason: why there is no graph, None where there is one.
        clone_outputs: whether results are copied out of the graph's memory.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        clone_outputs: bool = True,
    ) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self.clone_outputs = clone_outputs
        self.reason: str | None = None
        self._program: _Program | None = None
        try:
            program = _Program(module, args, kwargs)
        except NoGraph as refusal:
            self.reason = str(refusal)
            return
        try:
            program.record(module)
        except NoGraph as refusal:
            self.reason = str(refusal)
            message = f"fastfusion.cuda_graph: {refusal}; calls run the module itself"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        else:
            self._program = program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of `module`: replayed where `why_not` has nothing to say, otherwise run."""
        program = self._program
        if program is not None and not _is_compiling():
            leaves = program.leaves(args, kwargs)
            if leaves is not None and program.refusal(leaves) is None:
                return program.replay(leaves, self.clone_outputs)
        return self.module(*args, **kwargs)

    def why_not(self, *args: Any, **kwargs: Any) -> str | None:
        """Why this call would run the module, in one sentence; None where the graph would replay.

        The settings of the moment count too: gradients, autocast, train() and eval().
        """
        if self._program is None:
            return self.reason
        return self._program.refusal(self._program.leaves(args, kwargs))

    def __getstate__(self) -> dict[str, Any]:
        """A copy, and what is unpickled, has no graph: the addresses in it are the original's."""
        reason = self.reason or "a copy has no graph; call fastfusion.cuda_graph on its module"
        return {**self.__dict__, "_program": None, "reason": reason}

    def extra_repr(self) -> str:
        """Whether there is a graph."""
        return "captured" if self.reason is None else f"no graph: {self.reason}"


def cuda_graph(
    module: nn.Module, *example_inputs: Any, clone_outputs: bool = True, **example_kwargs: Any
) -> CudaGraphed:
    """`module` with its forward captured into a CUDA graph, for inference at fixed shapes::

        model = Model().cuda().eval()
        fast = ff.cuda_graph(model, words, regions, key_padding_mask=padding)
        with torch.inference_mode():
            out = fast(words, regions, key_padding_mask=padding)      # one launch

    A call replays the graph if its arguments are arranged as those of the capture; tensors have the
    same shapes, dtypes and device (any strides, any values), everything else is equal; no gradient
    is needed; and autocast and the modes of train() and eval() are those of the capture. Any other
    call runs `module` as if there were no graph: on the CPU, under torch.compile, and inside
    another capture too. `fast.why_not(...)` says why a call would.

    A replay repeats what the capture did. It reads parameters and buffers where they lie, so that
    `load_state_dict` and optimizer steps are seen; choices made in Python (`use_backend`, hooks,
    branches on sizes) stay as they were. Modules or parameters that are replaced by others go
    unnoticed: capture anew. Memory for one forward is kept as long as the result is.

    Args:
        module: what to capture. It is called 4 times: state that its forward changes, such as
            running statistics, changes with each.
        example_inputs: positional arguments of its forward, with the shapes of later calls: CUDA
            tensors, numbers, strings and None, also in tuples, lists and dicts.
        clone_outputs: copy results out of the graph's memory. False returns that memory itself:
            faster by one copy per result, and overwritten by the next call.
        example_kwargs: keyword arguments of its forward, likewise.

    Returns:
        A module that is called like `module`, which stays available as its `module`. Where nothing
        could be captured it always calls `module`, and `reason` says why.

    Raises:
        TypeError: `module` is no nn.Module. What its forward raises for the example is raised too.

    Warns:
        RuntimeWarning: the capture failed, for instance because the forward waits for the device
            (`.item()`, a branch on a tensor's value), draws random numbers, changes an argument in
            place or returns what is no tensor. No warning where there is no CUDA tensor.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    return CudaGraphed(module, example_inputs, example_kwargs, clone_outputs)


def _lay_out(
    leaves: list[Any],
) -> tuple[list[Any], list[tuple[int, int]], list[tuple[list[Tensor], list[int]]]]:
    """The memory of the arguments.

    Returns the arguments of the capture, with buffers for tensors; pairs of arguments that are one
    tensor (a module may ask whether query is key, so it gets one buffer); and by dtype, since one
    launch can copy all of a dtype, buffers and the arguments that they are filled from.
    """
    examples: list[Any] = []
    same: list[tuple[int, int]] = []
    groups: dict[torch.dtype, tuple[list[Tensor], list[int]]] = {}
    first: dict[int, int] = {}
    with torch.inference_mode(False), torch.no_grad():
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                if not isinstance(leaf, _CONSTANTS):
                    raise NoGraph(
                        f"argument {index} is a {type(leaf).__name__}, which later calls could "
                        "not be compared with"
                    )
                examples.append(leaf)
            elif type(leaf) not in _PLAIN or leaf.layout != torch.strided:
                raise NoGraph(f"argument {index} is {_describe(leaf)}; only dense tensors copy")
            elif id(leaf) in first:
                same.append((first[id(leaf)], index))
                examples.append(examples[first[id(leaf)]])
            else:
                first[id(leaf)] = index
                buffer = leaf.detach().clone()
                examples.append(buffer)
                buffers, sources = groups.setdefault(buffer.dtype, ([], []))
                buffers.append(buffer)
                sources.append(index)
    return examples, same, list(groups.values())


def _settings() -> tuple[bool, torch.dtype]:
    kind = Recording.device_type
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _check_output(leaf: Any, device: torch.device) -> None:
    if isinstance(leaf, Tensor):
        renewed = type(leaf) in _PLAIN and leaf.device == device and leaf.layout == torch.strided
    else:
        renewed = isinstance(leaf, _CONSTANTS)
    if not renewed:
        raise NoGraph(f"the forward returns {_describe(leaf)}, which a replay cannot renew")


def _describe(value: Any) -> str:
    if isinstance(value, _CONSTANTS):
        return repr(value)
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    dtype = str(value.dtype).removeprefix("torch.")
    kind = "" if type(value) in _PLAIN else f"a {type(value).__name__}, "
    layout = "" if value.layout == torch.strided else f", {value.layout}"
    return f"{kind}{dtype}{list(value.shape)} on {value.device}{layout}"

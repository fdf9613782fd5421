"""A model that fits a latency: ``python -m fastfusion fit``.

Widths, feed-forward parts, layers and precisions are searched by what they cost on this machine.
The cost of a model is taken to be additive, a + b * layers: a and b of a width, a feed-forward part
and a precision follow from two models that are built and timed, of one layer and of three. The
models on the Pareto front (no other has as many weights in as little time) are then built and timed
themselves.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastfusion.models import BUILDERS
from fastfusion.quantization import quantize

PRECISIONS = ("float32", "bf16", "int8")
WIDTHS = (64, 96, 128, 192, 256, 384, 512, 768)
RATIOS = (2, 4)  # of the feed-forward part to the width
LAYERS = (1, 2, 3, 4, 6, 8, 12)
HEAD_DIM = 32
MARGIN = 1.25  # a width whose smallest model takes so many budgets is the last one tried


@dataclass(frozen=True)
class Candidate:
    """Sizes of a model and how its weights are kept."""

    width: int
    num_heads: int
    dim_feedforward: int
    num_layers: int
    precision: str


@dataclass(frozen=True)
class Shape:
    """What the model is to take: sequences of these lengths, and how many classes or words."""

    visual_len: int
    text_len: int
    batch: int = 1
    classes: int = 1000


@dataclass(frozen=True)
class Fit:
    """A model of the Pareto front; times in milliseconds."""

    candidate: Candidate
    parameters: int
    flops: int
    predicted_ms: float
    measured_ms: float

    @property
    def error(self) -> float:
        """How far the prediction is off, relative to the measurement."""
        return abs(self.predicted_ms / self.measured_ms - 1)


def arguments_of(kind: str, candidate: Candidate, shape: Shape) -> dict[str, Any]:
    """Arguments of the model's constructor."""
    sizes = asdict(candidate)
    del sizes["precision"]
    return BUILDERS[kind].arguments(sizes, asdict(shape))


def build(kind: str, candidate: Candidate, shape: Shape) -> tuple[nn.Module, Callable[[], Any]]:
    """A model with random weights of the candidate's precision, and a call of it."""
    torch.manual_seed(0)
    builder = BUILDERS[kind]
    model = builder.model(**arguments_of(kind, candidate, shape)).eval()
    inputs = builder.inputs(candidate.width, asdict(shape))
    if candidate.precision != "float32":
        quantize(model, candidate.precision)

    def call() -> Any:
        with torch.inference_mode():
            return builder.call(model, *inputs)

    return model, call


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """The lower quartile of a call's times, but the first two: what it takes where nothing else
    runs in between."""
    times = []
    for _ in range(2 + rounds):
        start = perf_counter()
        call()
        times.append(1e3 * (perf_counter() - start))
    return quantiles(times[2:], method="inclusive")[0]


def search(
    kind: str,
    shape: Shape,
    budget_ms: float,
    precisions: Sequence[str] = PRECISIONS,
    widths: Sequence[int] | None = None,
    layers: Sequence[int] = LAYERS,
    rounds: int = 15,
    say: Callable[[str], None] = lambda line: None,
) -> list[Fit]:
    """The Pareto front of weights and time, fastest first, up to a little over the budget.

    Args:
        kind: a name of `fastfusion.models.BUILDERS`.
        shape: of its inputs.
        budget_ms: for one call.
        precisions, widths, layers: those to try; `WIDTHS` by default.
        rounds: of each measurement.
        say: told what is being measured.

    Raises:
        ValueError: no model fits, or an argument that is none of those above.
    """
    if kind not in BUILDERS:
        raise ValueError(f"model must be one of {', '.join(BUILDERS)}, got {kind!r}")
    unknown = set(precisions) - set(PRECISIONS)
    if unknown:
        raise ValueError(f"precisions are {', '.join(PRECISIONS)}, got {sorted(unknown)}")
    if not budget_ms > 0:
        raise ValueError(f"budget_ms must be a positive number, got {budget_ms}")
    predicted: dict[Candidate, float] = {}
    for line in _lines(precisions, widths or WIDTHS, kind, shape, budget_ms, rounds, say):
        for count in layers:
            one, each = line.first, line.slope
            predicted[replace(line.candidate, num_layers=count)] = one + each * (count - 1)
    affordable = {c: ms for c, ms in predicted.items() if ms <= MARGIN * budget_ms}
    if not affordable:
        least = min(predicted.values())
        raise ValueError(f"no model fits: the smallest takes {least:.2f} ms of {budget_ms:g}")
    fits = []
    for candidate, parameters in _front(kind, shape, affordable):
        measured = milliseconds(build(kind, candidate, shape)[1], rounds)
        flops = _flops(kind, candidate, shape)
        fits.append(Fit(candidate, parameters, flops, predicted[candidate], measured))
    return fits


@dataclass(frozen=True)
class _Line:
    candidate: Candidate
    first: float  # milliseconds of one layer and all that there is once
    slope: float  # of each further layer


def _lines(
    precisions: Sequence[str], widths: Sequence[int], kind: str, shape: Shape, budget_ms: float,
    rounds: int, say: Callable[[str], None],
) -> Iterator[_Line]:  # fmt: skip
    for precision in precisions:
        for width in sorted(widths):
            heads = max(1, width // HEAD_DIM)
            least = float("inf")
            for ratio in RATIOS:
                one = Candidate(width, heads, ratio * width, 1, precision)
                say(f"timing {precision}, {width} wide, feed-forward {ratio * width}")
                first, third = (
                    milliseconds(build(kind, replace(one, num_layers=n), shape)[1], rounds)
                    for n in (1, 3)
                )
                yield _Line(one, first, max(0.0, (third - first) / 2))
                least = min(least, first)
            if least > MARGIN * budget_ms:
                break


def _parameters(kind: str, candidate: Candidate, shape: Shape) -> int:
    with torch.device("meta"):
        model = BUILDERS[kind].model(**arguments_of(kind, candidate, shape))
    return sum(p.numel() for p in model.parameters())


def _front(
    kind: str, shape: Shape, predicted: Mapping[Candidate, float]
) -> Iterator[tuple[Candidate, int]]:
    """Candidates with more weights than every faster one, and how many."""
    most = 0
    sizes = {c: _parameters(kind, c, shape) for c in predicted}
    for candidate in sorted(predicted, key=lambda c: (predicted[c], -sizes[c])):
        if sizes[candidate] > 1.1 * most:  # a tenth more, or the table has rows that say the same
            most = sizes[candidate]
            yield candidate, most


def _flops(kind: str, candidate: Candidate, shape: Shape) -> int:
    """Of the forward, as float32: decoding with a cache computes each word as often, once."""
    model, _ = build(kind, replace(candidate, precision="float32"), shape)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(*BUILDERS[kind].inputs(candidate.width, asdict(shape)))
    return int(counter.get_total_flops())


def best(fits: Iterable[Fit], budget_ms: float) -> Fit | None:
    """That with the most weights whose measured time is within the budget."""
    within = [fit for fit in fits if fit.measured_ms <= budget_ms]
    return max(within, key=lambda fit: fit.parameters) if within else None


def write(path: Path, kind: str, shape: Shape, fit: Fit) -> None:
    """What `fastfusion.models.from_config` reads."""
    content = {
        "model": kind,
        "arguments": arguments_of(kind, fit.candidate, shape),
        "precision": fit.candidate.precision,
        "measured_ms": round(fit.measured_ms, 3),
        "shape": asdict(shape),
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def show(
    kind: str, shape: Shape, budget_ms: float, output: Path, precisions: Sequence[str]
) -> None:
    """Search, print the table and write the configuration of the best model."""
    print(
        f"{kind}: {shape.visual_len} visual tokens, {shape.text_len} of text, batch {shape.batch}, "
        f"{torch.get_num_threads()} thread(s), at most {budget_ms:g} ms"
    )

    def progress(line: str) -> None:
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="", flush=True)

    fits = search(kind, shape, budget_ms, precisions, say=progress)
    progress("")
    chosen = best(fits, budget_ms)
    print(
        f"  {'weights':>7} {'width':>6} {'heads':>6} {'hidden':>7} {'layers':>7} "
        f"{'parameters':>11} {'MFLOP':>8} {'predicted':>10} {'measured':>10} {'error':>6}"
    )
    for fit in fits:
        c = fit.candidate
        print(
            f"{'> ' if fit is chosen else '  '}{c.precision:>7} {c.width:>6} {c.num_heads:>6} "
            f"{c.dim_feedforward:>7} {c.num_layers:>7} {fit.parameters:>11,} "
            f"{fit.flops / 1e6:>8.1f} {fit.predicted_ms:>7.2f} ms {fit.measured_ms:>7.2f} ms "
            f"{fit.error:>6.1%}"
        )
    errors = [fit.error for fit in fits]
    print(f"error of the prediction: median {median(errors):.1%}, largest {max(errors):.1%}")
    if chosen is None:
        raise ValueError(f"none of these is within {budget_ms:g} ms when measured")
    write(output, kind, shape, chosen)
    print(f"wrote {output}: ff.models.from_config({str(output)!r}) builds the model marked >")

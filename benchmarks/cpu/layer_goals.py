"""The suite "layer-goals": what linear layers and whole ones on the CPU shall reach, and do.

In float32, with weights of bfloat16 (bf16w) and with weights of 8-bit integers (int8). A share is
that of the peak of the weights' products, in which attention's own count as float32.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

import fastfusion as ff
from fastfusion.backends import library

from ..common import machine, ops, shapes
from ..common.results import OURS, Goal
from ..common.timing import Spread, geometric_mean
from . import decoding, exported, layers, narrow
from .goals import Effort, threads, under
from .results import Row, cosine_cell
from .roofline import COMPUTED_IN, Machine
from .settings import NARROW, Settings
from .timing import measure

Call = Callable[[], Any]
PRECISIONS = ("float32", *NARROW)
# Of the peak, both ways between 768 and 3072, by tokens.
LINEAR = {
    "float32": {20: 0.82, 64: 0.93, 197: 0.91, 1576: 0.91},
    "bf16w": {20: 0.90, 64: 0.95, 197: 0.90, 1576: 0.90},
    "int8": {20: 0.90, 64: 0.93, 197: 0.89, 1576: 0.89},
}
# Of the arithmetic at the peaks, in the order of exported.SOME.
SHARES = {
    "float32": (0.86, 0.91, 0.91, 0.88, 0.85),
    "bf16w": (0.88, 0.91, 0.90, 0.85, 0.88),
    "int8": (0.86, 0.84, 0.86, 0.75, 0.84),
}
AGAINST_BEST = {"float32": 1.06, "bf16w": 1.12, "int8": 1.14}
AGAINST_EAGER = {"float32": (1.6, 2.05), "bf16w": (3.0, 4.2), "int8": (6.0, 8.0)}
READING = 0.9
LEAST_COSINE = 0.999
# The same layer in another precision is no peer.
OTHER_PRECISION = {"float32": (), "bf16w": ("torch.nn",), "int8": ("torch.nn",)}


def run(effort: Effort, ceilings: Machine) -> Iterator[tuple[str, list[Goal]]]:
    """Sections of goals, as they are measured; a small `effort.most` leaves out other runtimes."""
    with torch.inference_mode():
        for precision in PRECISIONS:
            yield f"linear, share of the peak, {precision}", [*linear(precision, effort)]
        for precision in PRECISIONS:
            yield f"linear, one token, {precision}", [*one_token(precision, effort)]
    for precision in PRECISIONS:
        yield f"layers, {precision}", [*whole(precision, effort, ceilings)]
    yield "layers of next to no work", [*tiny(effort)]
    yield "a decoder's token beside transformers, 6 layers 512 wide", [*decoding.run(effort)]
    yield "layers, 2 threads against 1", threads(effort, "layer_goals")
    yield "layers, memory", [*memory()]
    yield "layers, first call after new weights", [*renewed(effort)]
    yield "layers, the same bits alone and among 8, 1 and 2 threads", [*same_bits()]
    yield "weights of 8-bit integers, the demo's model", [*quality(effort)]


def call_of(precision: str, length: int, width: int, features: int) -> dict[str, Any]:
    """Arguments of `linear` for so many tokens."""
    shape: dict[str, Any] = {"length": length, "width": width, "features": features}
    if precision in NARROW:
        shape["weights"] = narrow.NAMES[NARROW[precision]]
    made: dict[str, Any] = ops.spec("linear").inputs(shape, torch.float32, "cpu", 0)
    return made


def linear(precision: str, effort: Effort) -> Iterator[Goal]:
    """Operations per second over those of a loop of products, in the worse direction.

    What a call on one number takes does not count.
    """
    native: Any = library.native
    dtype = COMPUTED_IN.get(precision, precision)
    for length, limit in LINEAR[precision].items():
        name = f"{length} tokens, 768 to 3072 and back"
        flops = 2 * length * 768 * 3072
        if flops > effort.most:
            yield Goal(name, None, limit, detail="left out by --quick", unit="")
            continue
        found = {}
        for width, features in ((768, 3072), (3072, 768)):
            timed = measure(
                {
                    OURS: partial(ff.linear, **call_of(precision, length, width, features)),
                    "empty": partial(ff.linear, **call_of(precision, 1, 1, 1)),
                    "peak": partial(native.peak_operations, dtype, 10000),
                },
                effort.rounds,
                effort.min_time,
            )
            peak = native.peak_operations(dtype, 10000)
            empty = timed.time("empty").median
            pairs = zip(timed.samples[OURS], timed.samples["peak"], strict=True)
            shares = Spread.of([flops / (ours - empty) / (peak / loop) for ours, loop in pairs])
            found[f"{width} to {features}"] = shares.median
            peak /= timed.time("peak").median
        worse = min(found, key=lambda way: found[way])
        detail = f"{worse}; peak {peak / 1e9:.0f} Gop/s"
        yield Goal(name, found[worse], limit, detail=detail, unit="")


def one_token(precision: str, effort: Effort) -> Iterator[Goal]:
    """Bytes of the weight per second, over those of the fastest of torch's reductions."""
    for where, total in (("one weight in the caches", 0), ("weights from memory", 3 << 26)):
        call = call_of(precision, 1, 768, 3072)
        size = call["weight"].numel() * call["weight"].element_size()
        weights = [call["weight"].clone() for _ in range(max(1, total // size))]
        numbers = [w.view(-1).view(torch.uint8).view(torch.float32) for w in weights]
        for some in numbers:  # of no integers: NaN and denormal numbers could be slow to add
            some.fill_(0.01)
        calls = [partial(ff.linear, **{**call, "weight": weight}) for weight in weights]
        readers = {
            "sum": [some.sum for some in numbers],
            "max": [some.amax for some in numbers],
            "dot": [partial(torch.dot, some, some) for some in numbers],
        }
        timed = measure(
            {OURS: partial(each, calls), **{k: partial(each, v) for k, v in readers.items()}},
            effort.rounds,
            effort.min_time,
        )
        fastest = min(readers, key=lambda name: timed.time(name).median)
        bandwidth = size * len(weights) / timed.time(fastest).median / 1e9
        detail = f"torch's {fastest} reads {bandwidth:.1f} GB/s"
        yield Goal(where, timed.ratio(fastest, OURS).median, READING, detail=detail)


def each(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def rows(precision: str, effort: Effort) -> list[Row]:
    """The five layers beside their peers; without those that take seconds to make under --quick."""
    made = () if effort.most < 1e12 else (layers.FROZEN, *exported.RUNTIMES)
    settings = Settings(
        rounds=effort.rounds,
        min_time=effort.min_time,
        peers=("torch.nn", "torch.nn bfloat16", *made),
        weights=NARROW.get(precision),
    )
    return [
        layers.run_shape(group, shape, settings)
        for name in exported.SOME
        for group in layers.GROUPS
        for shape in shapes.select(group, name)
    ]


def whole(precision: str, effort: Effort, ceilings: Machine) -> Iterator[Goal]:
    found = rows(precision, effort)
    for row, limit in zip(found, SHARES[precision], strict=True):
        if OURS not in row.times or row.flops is None or row.moved is None:
            yield Goal(row.shape["name"], 0.0, limit, unit="", detail=row.problems.get(OURS, ""))
            continue
        time = row.times[OURS].median
        share = ceilings.share(row.flops, row.moved, row.dtype, time, False, row.float_flops)
        cosine = f", cosine {cosine_cell(row.cosines[OURS])}" if row.cosines else ""
        yield Goal(row.shape["name"], share, limit, unit="", detail=f"{1e6 * time:.0f} us{cosine}")
    timed = [row for row in found if OURS in row.times]
    best: dict[str, tuple[str, Spread]] = {}
    for row in timed:
        beside = {k: v for k, v in row.ratios.items() if k not in OTHER_PRECISION[precision]}
        if beside:
            peer = min(beside, key=lambda name: beside[name].median)
            best[row.shape["name"]] = peer, beside[peer]
    limit = AGAINST_BEST[precision]
    name = "the best peer in this precision"
    if not best:
        detail = "no such peer is installed, or --quick"
        yield Goal(f"{name}, geometric mean", None, limit, detail=detail)
    else:
        ratios = {shape: ratio.median for shape, (_, ratio) in best.items()}
        peers = ", ".join(
            f"{shape} {peer} {ratios[shape]:.2f}" for shape, (peer, _) in best.items()
        )
        yield Goal(f"{name}, geometric mean", geometric_mean(ratios.values()), limit, detail=peers)
        worst = min(ratios, key=lambda shape: ratios[shape])
        yield Goal(f"{name}, each", ratios[worst], 1.0, detail=f"{worst}, {best[worst][0]}")
    mean, twenty = AGAINST_EAGER[precision]
    eager = {row.shape["name"]: row.ratios["torch.nn"].median for row in timed}
    about = "torch.nn in float32"
    yield Goal(f"{about}, geometric mean", geometric_mean(eager.values()), mean)
    yield Goal(f"{about}, 20 tokens", eager.get("bert_20"), twenty)


def tiny(effort: Effort) -> Iterator[Goal]:
    shape = shapes.select("encoder_layer", "tiny_4")[0]
    settings = Settings(rounds=effort.rounds, min_time=effort.min_time, peers=("torch.nn",))
    row = layers.run_shape("encoder_layer", shape, settings)
    ours, torchs = (1e6 * row.times[name].median for name in (OURS, "torch.nn"))
    detail = f"torch.nn {torchs:.0f} us"
    yield Goal("4 tokens, 32 wide", ours, 12.0, at_most=True, unit=" us", detail=detail)


def encoder(precision: str, shape: dict[str, Any], count: int = 1) -> nn.Module:
    """So many encoder layers of ours, one after the other."""
    made = nn.Sequential(*(layers.build(ff.nn, "encoder_layer", shape) for _ in range(count)))
    if precision in NARROW:
        layers.narrow(made, NARROW[precision])
    return made


def measure_threads(rounds: int, min_time: float) -> Iterator[dict[str, Any]]:
    """One layer under 1 and 2 threads, in turns."""
    for precision in PRECISIONS:
        for name in ("fusion_64", "bert_20", "bert_36_b8"):
            shape = shapes.select("encoder_layer", name)[0]
            (x,) = layers.example("encoder_layer", shape)
            call = partial(encoder(precision, shape), x)
            with torch.inference_mode():
                timed = measure({"one": under(1, call), "two": under(2, call)}, rounds, min_time)
            microseconds = 1e6 * timed.time("one").median
            yield {
                "name": f"{name}, {precision}",
                "value": timed.ratio("one", "two").median,
                "limit": 1.8 if microseconds >= 300 else 1.0,
                "detail": f"{microseconds:.0f} us with one",
            }


_MEMORY = """
import ctypes, re, sys, torch
import fastfusion as ff
from fastfusion.benchmarks.cpu import layers

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024

torch.set_num_threads(1)
weights = sys.argv[1]
def made(shape):
    layer = layers.build(ff.nn, "encoder_layer", shape)
    if weights != "float32":
        layers.narrow(layer, weights)
    return layer, layers.example("encoder_layer", shape)[0]
shape = {"batch": 8, "length": 36, "dim": 128, "heads": 2, "ffn": 512}
with torch.inference_mode():
    small, x = made(shape)
    small(x)
    layer, x = made({"batch": 8, "length": 36, "dim": 768, "heads": 12, "ffn": 3072})
    # What quantising freed would hide what the calls take.
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    for _ in range(3):
        layer(x)
    print(max(0.0, status("VmHWM") - before))
"""


def memory() -> Iterator[Goal]:
    """What calls of a layer take beyond its weights, from the first one on."""
    for precision in PRECISIONS:
        weights = NARROW.get(precision, precision)
        result = subprocess.run(
            [sys.executable, "-c", _MEMORY, weights], capture_output=True, text=True
        )
        value = float(result.stdout) if result.returncode == 0 else None
        # Queries, keys, values, attended, their projection, a norm, four of the hidden ones, the
        # end: eleven times the tokens. A copy of the weights is 28 MB, 14 or 7.
        limit = round(11 * 8 * 36 * 768 * 4 / 2**20, 1)
        name = f"8 x 36 tokens, 768 wide, {precision}"
        yield Goal(name, value, limit, at_most=True, unit=" MB")


def renewed(effort: Effort) -> Iterator[Goal]:
    """The first call after other weights came in place, over the next one; of 20 tokens."""
    shape = shapes.select("encoder_layer", "bert_20")[0]
    (x,) = layers.example("encoder_layer", shape)
    layer = encoder("float32", shape)
    states = [{k: v * factor for k, v in layer.state_dict().items()} for factor in (0.9, 1.1)]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)

    def load(place: int) -> None:
        layer.load_state_dict(states[place % 2])

    def step(place: int) -> None:
        optimizer.step()

    for name, renew in (("load_state_dict", load), ("a step of SGD", step)):
        ratios, right = [], True
        for place in range(max(3, effort.rounds)):
            renew(place)
            with torch.inference_mode():
                times, results = [], []
                for _ in repeat(None, 2):
                    start = perf_counter()
                    results.append(layer(x))
                    times.append(perf_counter() - start)
                fresh = encoder("float32", shape)
                fresh.load_state_dict(layer.state_dict())
                right = right and all(torch.equal(result, fresh(x)) for result in results)
            ratios.append(times[0] / times[1])
        detail = "right" if right else "WRONG: the result is that of other weights"
        value = Spread.of(ratios).median if right else float("inf")
        yield Goal(f"after {name}", value, 1.1, at_most=True, detail=detail)


def same_bits() -> Iterator[Goal]:
    """Numbers that differ between samples alone and among batch mates, and between threads."""
    shape = {"batch": 8, "length": 36, "dim": 256, "heads": 8, "ffn": 1024}
    (x,) = layers.example("encoder_layer", shape)
    before = torch.get_num_threads()
    for precision in PRECISIONS:
        stack = encoder(precision, shape, 3)
        results: list[Tensor] = []
        try:
            with torch.inference_mode():
                for count in (1, 2):
                    torch.set_num_threads(count)
                    results += [stack(x), torch.cat([stack(one) for one in x.split(1)])]
        finally:
            torch.set_num_threads(before)
        different = sum(int((other != results[0]).sum()) for other in results[1:])
        yield Goal(f"3 layers, {precision}", different, 0, at_most=True, unit=" numbers")


def quality(effort: Effort) -> Iterator[Goal]:
    """Of a model that was trained, on real inputs."""
    from fastfusion.applications.beside import quantized
    from fastfusion.applications.vqa.evaluate import accuracy, predict, to_float
    from fastfusion.applications.vqa.model import Checkpoint
    from fastfusion.core.extras import MissingExtra
    from fastfusion.data import easy_vqa as data

    names = "answers lost, points", "lowest cosine of a layer"
    try:
        checkpoint = Checkpoint.load()
        split = data.load("test", 50 if effort.most < 1e12 else None)
    except MissingExtra as error:
        yield Goal(names[0], None, 0.3, at_most=True, unit="", detail=str(error))
        yield Goal(names[1], None, LEAST_COSINE, unit="", detail=str(error))
        return
    assert checkpoint.model is not None
    tokens = checkpoint.vocabulary.encode(split.texts)
    some = slice(None, None, max(1, len(split) // 64))
    sample = to_float(split.images[split.image_index[some]]), tokens[split.text_index[some]]
    narrow_model, report = quantized(checkpoint.model, "int8", sample)
    found = [
        100 * accuracy(predict(model, split, tokens), split)
        for model in (checkpoint.model, narrow_model)
    ]
    detail = f"{found[0]:.2f} % and {found[1]:.2f} % of {len(split):,} questions"
    yield Goal(names[0], found[0] - found[1], 0.3, at_most=True, unit="", detail=detail)
    layer = min(report.quantized, key=lambda one: one.cosine or 0.0)
    count = f"{len(report.quantized)} of {len(report.layers)} layers"
    detail = f"{cosine_cell(layer.cosine)}, {layer.name}; {count}"
    yield Goal(names[1], layer.cosine, LEAST_COSINE, unit="", detail=detail)


if __name__ == "__main__":
    machine.keep_memory()
    print(json.dumps(list(measure_threads(int(sys.argv[1]), float(sys.argv[2])))))

"""The command line of ``python -m fastfusion bench``, checked."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from ..common import shapes
from ..common.command import Parser, UsageError
from ..common.results import REFERENCE
from . import cells, layers, models, narrow, own
from .settings import NARROW, Settings

SUITES = (
    "overhead",
    "attention",
    "bidirectional",
    "lengths",
    "kinds",
    "linear",
    "cross_attention_layer",
    "cross_modal_layer",
    "layers",
    "models",
    "goals",
    "layer-goals",
)
WITHOUT_SHAPES = ("overhead", "goals", "layer-goals")
# What takes minutes, and is run by name only.
BY_NAME = ("layer-goals",)
DTYPES = ("float32", "bfloat16", "float16", "float64", *NARROW)
# Suites that take narrow weights.
WITH_WEIGHTS = ("linear", "layers", "models")
# A quick run leaves out what takes longer than about a tenth of a second per call.
QUICK_FLOPS = 5e9
# Options that describe a shape of one's own, and what they are called in shapes.json.
OWN = {
    "q": "q_len", "k": "kv_len", "heads": "heads", "kv_heads": "kv_heads", "dim": "head_dim",
    "value_dim": "value_dim", "batch": "batch", "mask": "mask",
}  # fmt: skip


def peers() -> list[str]:
    """Every peer of every suite."""
    of_ops = [name for about in cells.SUITES.values() for name in about.others]
    of_narrow = [name for some in narrow.LINEAR.values() for name in some]
    return list(dict.fromkeys([*of_ops, *of_narrow, *layers.OTHERS, REFERENCE]))


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    result = Parser(prog="python -m fastfusion bench", description=__doc__)
    add = result.add_argument
    names = f"{', '.join(SUITES)}; default all but {', '.join(BY_NAME)}"
    add("suite", nargs="?", metavar="suite", choices=SUITES, help=names)
    add("--shape", help="measure this shape only (names: benchmarks/shapes.json)")
    about = "of inputs and weights; int8, bf16w: inputs float32, our linear layers quantised"
    add("--dtype", choices=DTYPES, default="float32", metavar="DTYPE", help=about)
    add("--threads", default="1", help="threads of torch, or several counts: 1,2; default 1")
    add("--rounds", type=int, help="times that everything is timed, default 20")
    add("--backward", action="store_true", help="time forward and backward")
    add("--cold", action="store_true", help="single calls, the caches overwritten before each")
    add("--peers", help="time these only, by comma: those that the tables name")
    add("--quick", action="store_true", help="few rounds, no very large shapes")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: what make gpu times")

    own = result.add_argument_group("a shape of your own, for attention and bidirectional")
    for name, text in (
        ("q", "queries"), ("k", "keys"), ("heads", "default 12"), ("kv-heads", "default: heads"),
        ("dim", "width of a head, default 64"), ("value-dim", "default: dim"),
        ("batch", "default 1"),
    ):  # fmt: skip
        own.add_argument(f"--{name}", type=int, metavar="N", help=text)
    own.add_argument("--mask", help="key_padding, bool or bias; both_padding for bidirectional")
    own.add_argument("--causal", action="store_true", help="query i sees keys 0 to i")

    modules = result.add_argument_group("modules of your own")
    modules.add_argument("--model", metavar="MODULE:FACTORY", help="time what this makes")
    modules.add_argument("--against", metavar="MODULE:FACTORY", help="beside what this makes")
    modules.add_argument("--inputs", help="sizes of its inputs: 2x20x768,2x36x768")

    output = result.add_argument_group("results")
    output.add_argument("--json", type=Path, metavar="FILE", help="everything that was measured")
    output.add_argument("--html", type=Path, metavar="FILE", help="a report in one file")
    output.add_argument("--plots", type=Path, metavar="FOLDER", help="pictures, as PNG")
    output.add_argument(
        "--compare", metavar="FILE|REVISION", help="results of --json, or a git revision to build"
    )
    return result


def _counts(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or any(count < 1 for count in counts):
        raise UsageError(f"--threads must be at least 1, got {text}")
    return counts


def _peer_names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(","))
    unknown = [name for name in names if name not in peers()]
    if unknown:
        raise UsageError(f"unknown peer {unknown[0]!r}; choose from {', '.join(peers())}")
    return names


def own_shape(options: argparse.Namespace) -> dict[str, Any] | None:
    """The shape that --q, --k and so on describe; None where none of them is given."""
    all_of = {OWN[name]: getattr(options, name) for name in OWN}
    given = {name: value for name, value in all_of.items() if value is not None}
    if not given and not options.causal:
        return None
    suite = options.suite or "attention"
    if suite not in ("attention", "bidirectional"):
        raise UsageError(f"suite {suite} takes no shape of your own")
    if options.shape is not None:
        raise UsageError("--shape and a shape of your own exclude each other")
    if "q_len" not in given or "kv_len" not in given:
        raise UsageError("a shape of your own needs --q and --k")
    wrong = [name for name, n in given.items() if isinstance(n, int) and n < 1]
    if wrong:
        raise UsageError(f"{wrong[0]} must be at least 1, got {given[wrong[0]]}")
    masks = ("both_padding",) if suite == "bidirectional" else ("key_padding", "bool", "bias")
    if given.get("mask") not in (None, *masks):
        raise UsageError(f"--mask must be one of {', '.join(masks)}, got {given['mask']}")
    if suite == "bidirectional" and (options.causal or "kv_heads" in given):
        raise UsageError("bidirectional takes neither --causal nor --kv-heads")
    shape = {"batch": 1, "heads": 12, "head_dim": 64, "mask": None, **given}
    shape.setdefault("kv_heads", shape["heads"])
    shape.setdefault("value_dim", shape["head_dim"])
    if shape["heads"] % shape["kv_heads"]:
        raise UsageError(f"--heads must be a multiple of --kv-heads={shape['kv_heads']}")
    if suite == "bidirectional":
        del shape["kv_heads"]
    elif options.causal:
        shape["causal"] = True
    return {"name": f"{shape['q_len']}x{shape['kv_len']}", **shape}


def _check_outputs(options: argparse.Namespace) -> None:
    for name in ("json", "html"):
        path = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"--{name}: there is no folder {path.parent}")
    if options.plots is not None and not options.plots.is_dir():
        raise UsageError(f"--plots: there is no folder {options.plots}")


def _check_modules(options: argparse.Namespace) -> None:
    three = [getattr(options, name) for name in ("model", "against", "inputs")]
    if any(three) and not all(three):
        raise UsageError("--model, --against and --inputs belong together")
    if options.model is None:
        return
    if options.suite is not None:
        raise UsageError("--model takes no suite")
    try:
        own.parts(options.model)
        own.parts(options.against)
        own.sizes(options.inputs)
    except ValueError as error:
        raise UsageError(str(error)) from None


def _check_weights(options: argparse.Namespace) -> None:
    if options.dtype not in NARROW:
        return
    if options.device != "cpu":
        raise UsageError(f"--dtype {options.dtype} is for the CPU")
    if options.backward:
        raise UsageError(f"--dtype {options.dtype} is for inference, without --backward")
    wrong = [name for name in options.suites if name not in WITH_WEIGHTS]
    if options.suite is None and options.own is None and options.model is None:
        options.suites = list(WITH_WEIGHTS)
    elif wrong and options.model is None:
        names = ", ".join(WITH_WEIGHTS)
        raise UsageError(f"--dtype {options.dtype} is for {names}, not for {wrong[0]}")


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, checked.

    Raises:
        UsageError: an option or a value that does not exist, or a shape of another suite.
    """
    options = parser().parse_args(argv)
    options.counts = _counts(options.threads)
    if options.rounds is None:
        options.rounds = 7 if options.quick else 20
    if options.rounds < 1:
        raise UsageError(f"--rounds must be at least 1, got {options.rounds}")
    _check_outputs(options)
    _check_modules(options)
    options.own = own_shape(options)
    everything = [name for name in SUITES if name not in BY_NAME]
    options.suites = [options.suite] if options.suite else everything
    if options.own is not None:
        options.suites = [options.suite or "attention"]
    _check_weights(options)
    if options.shape is not None:
        options.suites = [name for name in options.suites if name not in WITHOUT_SHAPES]
        try:
            found = [name for name in options.suites if choose(name, options.shape)]
        except shapes.UnknownShapeError as error:
            raise UsageError(str(error)) from None
        if not found:
            raise UsageError(f"suite {options.suite} has no shape {options.shape}")
        options.suites = found
    options.settings = Settings(
        dtype=getattr(torch, "float32" if options.dtype in NARROW else options.dtype),
        weights=NARROW.get(options.dtype),
        backward=options.backward,
        rounds=options.rounds,
        min_time=1e-3 if options.quick else 5e-3,
        cold=options.cold,
        peers=_peer_names(options.peers),
    )
    options.most = QUICK_FLOPS if options.quick else math.inf
    return options


def choose(suite: str, name: str | None) -> list[tuple[str, shapes.Shape]]:
    """The shapes of a suite, or the one that was asked for, each with its group."""
    groups: tuple[str, ...] = {"layers": layers.GROUPS, "models": (models.GROUP,)}.get(suite, ())
    groups = groups or (cells.SUITES[suite].group,)
    return [(group, shape) for group in groups for shape in shapes.select(group, name)]


def only_suite(argv: list[str]) -> list[str]:
    """The command line without what says where results go."""
    kept, skip = [], False
    for part in argv:
        name = part.partition("=")[0]
        if skip or name in ("--json", "--html", "--plots", "--compare", "--threads"):
            skip = not skip and "=" not in part
            continue
        kept.append(part)
    return kept

"""What the kernels shall reach on a data-centre GPU, and whether a run reached it.

Ratios are times of the fastest peer over ours in the same run, under a CUDA graph unless it says
eager. Each goal is judged per dtype, since float32 has other peers than the 16-bit types.
"""

import math
from collections.abc import Callable, Iterable

from ..common.results import OURS, Goal
from ..common.timing import geometric_mean
from . import block
from .results import Cell

SHORT = 1024


def is_short_cross(cell: Cell) -> bool:
    """Cross attention of some words over some regions, patches or frames."""
    q_len, kv_len = cell.shape["q_len"], cell.shape["kv_len"]
    return q_len != kv_len and 1 < q_len <= 128 and kv_len <= 640


def shares_scores(cell: Cell) -> bool:
    """Whether the column sums of a bidirectional call fit on the chip, so that S is made once."""
    return cell.shape["kv_len"] * cell.shape["value_dim"] <= 16384


def _named(values: dict[str, float], pick: Callable[[Iterable[float]], float]) -> str:
    chosen = pick(values.values())
    name = next(name for name, value in values.items() if value == chosen)
    return f"{name} {chosen:.2f}x"


def _mean(name: str, values: dict[str, float], limit: float) -> Goal:
    if not values:
        return Goal(name, None, limit)
    return Goal(name, geometric_mean(values.values()), limit, detail=f"worst {_named(values, min)}")


def _worst(name: str, values: dict[str, float], limit: float) -> Goal:
    if not values:
        return Goal(name, None, limit)
    under = sum(value < limit for value in values.values())
    detail = (
        f"{_named(values, min)}, {under} of {len(values)} under, "
        f"geometric mean {geometric_mean(values.values()):.2f}x"
    )
    return Goal(name, min(values.values()), limit, detail=detail)


def _most(name: str, values: dict[str, float], limit: float) -> Goal:
    if not values:
        return Goal(name, None, limit, at_most=True)
    detail = f"{_named(values, max)}, geometric mean {geometric_mean(values.values()):.2f}x"
    return Goal(name, max(values.values()), limit, at_most=True, detail=detail)


def _ratios(cells: Iterable[Cell], peer: tuple[str, ...] = (), mode: str = "graph") -> dict:
    """By shape: the time of the fastest of some peers (of all by default) over ours."""
    found: dict[str, float] = {}
    for cell in cells:
        ratios = cell.ratios.get(mode, {})
        chosen = [ratios[name].median for name in peer if name in ratios]
        ratio = min(chosen, default=math.inf) if peer else cell.ratio(mode)
        if math.isfinite(ratio):
            found[cell.name] = ratio
    return found


def _cost(cells: Iterable[Cell], mode: str) -> dict[str, float]:
    """By shape: our time over that of the SDPA that torch chooses."""
    return {name: 1 / ratio for name, ratio in _ratios(cells, ("sdpa",), mode).items()}


def _block(cells: Iterable[Cell], limit: float) -> Goal:
    """Our block beside torch.compile of the same, both under a graph; and what it takes eagerly."""
    name = "block of 20 x 36, 768 wide, beside torch.compile"
    for cell in cells:
        best = cell.fastest(BLOCK_COMPILED)
        if cell.name != "block_20_36" or best is None:
            continue
        details = [f"{best[0]} is its fastest"]
        eager = cell.fastest(BLOCK_COMPILED, "eager")
        if eager is not None:
            over = cell.times["eager"][eager[0]].median / cell.times["graph"][OURS].median
            details.append(f"both called eagerly {eager[1].median:.2f}x")
            details.append(f"its call over our graph {over:.2f}x")
        return Goal(name, best[1].median, limit, detail=", ".join(details))
    return Goal(name, None, limit)


BLOCK_COMPILED = tuple(block.COMPILED)
TWO_SDPA = ("two sdpa", "two flash", "two efficient", "two cudnn")


def judge(cells: list[Cell]) -> list[Goal]:
    """Every goal for the cells of one dtype."""
    forward = [c for c in cells if c.suite == "attention" and not c.backward]
    backward = [c for c in cells if c.suite == "attention" and c.backward]
    both = [c for c in cells if c.suite == "bidirectional" and not c.backward]
    shared = [cell for cell in both if shares_scores(cell)]
    unshared = [cell for cell in both if not shares_scores(cell)]
    full = [cell for cell in both if cell.name == "bi_gdino_full"]
    short = [cell for cell in forward if cell.length <= 512]

    def up_to(cells: list[Cell], long: bool) -> dict[str, float]:
        return _ratios(cell for cell in cells if (cell.length > SHORT) == long)

    return [
        _worst("short cross attention", _ratios(filter(is_short_cross, forward)), 1.5),
        _mean("attention forward, all shapes", _ratios(forward), 1.2),
        _mean("attention forward and backward, all shapes", _ratios(backward), 1.1),
        _worst(f"forward, each shape up to {SHORT}", up_to(forward, False), 0.9),
        _worst(f"forward and backward, each shape up to {SHORT}", up_to(backward, False), 0.9),
        _worst("forward, each longer shape", up_to(forward, True), 0.7),
        _worst("forward and backward, each longer shape", up_to(backward, True), 0.6),
        _worst("bidirectional beside two SDPA, S shared", _ratios(shared, TWO_SDPA), 1.25),
        _worst("bidirectional beside two SDPA, S twice", _ratios(unshared, TWO_SDPA), 1.0),
        _worst("bidirectional beside Grounding DINO", _ratios(full, ("grounding dino",)), 3.0),
        _block((c for c in cells if c.suite == block.SUITE), 3.0),
        _most("our eager call beside SDPA's, lengths up to 512", _cost(short, "eager"), 2.5),
        _most("the same under a graph", _cost(short, "graph"), 1.1),
    ]


def report(cells: list[Cell]) -> str:
    """The goals of every dtype that was measured."""
    lines = []
    for dtype in dict.fromkeys(cell.dtype for cell in cells):
        of_dtype = [cell for cell in cells if cell.dtype == dtype]
        wrong = [cell.name for cell in of_dtype if OURS in cell.problems]
        lines.append(f"\ngoals, {dtype}")
        if wrong:
            lines.append(f"{'MISSED':<12}  right results: no time for {', '.join(wrong)}")
        lines += map(str, judge(of_dtype))
    return "\n".join(lines)

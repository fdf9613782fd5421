"""``python -m fastfusion bench distributed``: sequences in parts on several ranks, one thread each,
beside the same attention on one rank with one thread; and the bytes that ranks exchange.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastfusion as ff

from ..common import machine
from ..common.timing import Spread

HEADS, DIM, WORDS = 8, 64, 256
Row = dict[str, Any]


class Counter:
    """Bytes that this rank sends to others, point to point, and those that it sums over all."""

    def __init__(self) -> None:
        self.sent = self.reduced = 0
        self.functions: Any = dist
        self.kept = dist.batch_isend_irecv, dist.all_reduce

    def __enter__(self) -> "Counter":
        exchange, reduce = self.kept

        def counted_exchange(requests: list[Any]) -> Any:
            sends = [request.tensor for request in requests if request.op is dist.isend]
            self.sent += sum(t.numel() * t.element_size() for t in sends)
            return exchange(requests)

        def counted_reduce(tensor: torch.Tensor, *rest: Any, **options: Any) -> Any:
            self.reduced += tensor.numel() * tensor.element_size()
            return reduce(tensor, *rest, **options)

        self.functions.batch_isend_irecv = counted_exchange
        self.functions.all_reduce = counted_reduce
        return self

    def __exit__(self, *error: Any) -> None:
        self.functions.batch_isend_irecv, self.functions.all_reduce = self.kept


def cases(tokens: int) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any], int, int]]:
    """Name, the call on parts, the call on the whole, and the bytes that a rank sends and reduces
    by the formulas of docs/guide/distributed.md."""
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    q, k, v, w = (torch.randn(1, HEADS, tokens, DIM) for _ in range(4))
    ring = 2 * (ranks - 1) * HEADS * (tokens // ranks) * DIM * 4
    for causal in (False, True):
        own = [ff.distributed.shard_sequence(t, 2, zigzag=causal) for t in (q, k, v)]

        def parts(own: Any = own, causal: bool = causal) -> Any:
            return ff.distributed.ring_attention(*own, is_causal=causal)

        def whole(causal: bool = causal) -> Any:
            return ff.scaled_dot_product_attention(q, k, v, is_causal=causal)

        yield f"ring, {tokens} tokens{', causal' * causal}", parts, whole, ring, 0
    words, words_value = (torch.randn(1, HEADS, WORDS, DIM) for _ in range(2))
    image, image_value = (ff.distributed.shard_sequence(t, 2) for t in (q, w))
    yield (
        f"both directions, {tokens} tokens in parts and {WORDS} words",
        lambda: ff.distributed.sharded_bidirectional_attention(
            image, words, words_value, image_value
        ),
        lambda: ff.bidirectional_attention(q, words, words_value, w),
        0,
        HEADS * WORDS * (DIM + 2) * 4,
    )


def _work(rank: int, ranks: int, tokens: int, rounds: int, store: str, output: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    rows = []
    with torch.inference_mode():
        for name, parts, whole, sent, reduced in cases(tokens):
            with Counter() as counter:
                parts()
            times: dict[str, list[float]] = {"parts": [], "whole": []}
            for _ in range(rounds):
                dist.barrier()
                start = time.perf_counter()
                parts()
                dist.barrier()
                times["parts"].append(time.perf_counter() - start)
                if rank == 0:
                    start = time.perf_counter()
                    whole()
                    times["whole"].append(time.perf_counter() - start)
            if rank == 0:
                pairs = zip(times["whole"], times["parts"], strict=True)
                row = {
                    "name": name, "ranks": ranks,
                    "ms": 1e3 * Spread.of(times["parts"]).median,
                    "one_rank_ms": 1e3 * Spread.of(times["whole"]).median,
                    "ratio": Spread.of([a / b for a, b in pairs]).median,
                    "sent": counter.sent, "sent_by_formula": sent,
                    "reduced": counter.reduced, "reduced_by_formula": reduced,
                }  # fmt: skip
                rows.append(row)
    if rank == 0:
        Path(output).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def measure(ranks: int, tokens: int, rounds: int) -> list[Row]:
    """A row for each case."""
    with tempfile.TemporaryDirectory() as folder:
        store, output = (str(Path(folder) / name) for name in ("store", "rows"))
        mp.spawn(_work, (ranks, tokens, rounds, store, output), nprocs=ranks)
        rows: list[Row] = json.loads(Path(output).read_text())
    return rows


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status, 1 where bytes are not those of the formulas."""
    parser = argparse.ArgumentParser(prog="python -m fastfusion bench distributed")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="a JSON file")
    options = parser.parse_args(argv)
    if options.ranks < 2 or options.tokens % (2 * options.ranks):
        parser.error("--ranks is 2 or more, and --tokens a multiple of twice as many")
    rows = measure(options.ranks, options.tokens, options.rounds)
    right = True
    for row in rows:
        equal = all(row[n] == row[f"{n}_by_formula"] for n in ("sent", "reduced"))
        right &= equal
        print(
            f"{row['name']}: {row['ratio']:.2f} times as fast on {row['ranks']} ranks "
            f"({row['ms']:.1f} ms, one rank {row['one_rank_ms']:.1f} ms); each sends "
            f"{row['sent'] / 1e6:.2f} MB and sums {row['reduced'] / 1e6:.2f} MB"
            f"{'' if equal else ', which is not what the formulas say'}"
        )
    if options.output is not None:
        document = {"machine": machine.describe(), "rows": rows}
        options.output.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if right else 1

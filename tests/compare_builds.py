"""Whether two builds compute the same bits: for changes that are to change none.

    PYTHONPATH=<a checkout that is built> python tests/compare_builds.py write before.json
    PYTHONPATH=<another one>              python tests/compare_builds.py write after.json
    python tests/compare_builds.py compare before.json after.json

`write` calls every op through the public functions: outputs, log-sum-exps and gradients, under
each instruction set that this machine runs and with the CUDA kernels in their emulator, where
`setup.py build_emulated` has built them. What a call is follows from its name alone, so that files
of different lists compare in the names they share.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Call = Callable[[], dict[str, str]]

DTYPES = ("float32", "bfloat16", "float16")
MASKS = ("none", "padding", "bool", "bias", "row_bias")
CAUSAL = ("full", "top_left", "bottom_right")
DROPOUT = (0.0, 0.3)
# Lengths of queries and keys: a few, the decode path, whole registers and tail queries, several
# query tiles and blocks of keys, split-KV, and none.
LENGTHS = (
    (1, 1), (5, 7), (1, 700), (3, 130), (16, 48), (49, 65), (113, 300), (200, 530), (2, 2600),
    (33, 2100), (0, 5), (4, 0),
)  # fmt: skip
EMULATED_LENGTHS = ((1, 1), (5, 7), (1, 300), (33, 70), (70, 150))
DIMS = ((16, 16), (64, 64), (32, 80), (7, 5), (24, 3))
HEADS = ((2, 2), (1, 1), (4, 2), (3, 1))
SCALES = (None, None, None, 0.3, -0.7, 1e5)


def names(op: str, emulated: bool) -> Iterator[str]:
    """The calls of an op, in words: what they leave open is drawn from a seed that they give."""
    lengths = EMULATED_LENGTHS if emulated else LENGTHS
    dropout = DROPOUT[:1] if emulated else DROPOUT
    for dtype, (q, k), mask, causal, p in itertools.product(
        DTYPES, lengths, MASKS, CAUSAL, dropout
    ):
        yield f"{op} {dtype} {q}x{k} {mask} {causal} dropout={p}"


def digest(tensor: Any) -> str:
    """Of everything that a caller could see of a result."""
    import torch

    about = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()}"
    data = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(about.encode() + data).hexdigest()[:16]


class Drawing:
    """Numbers and tensors that follow from a name."""

    def __init__(self, name: str) -> None:
        import torch

        seed = zlib.crc32(name.encode())
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: Any, gradient: bool = False) -> Any:
        """Normally distributed, in a layout of its own: as modules make them, or as they are, or
        with elements apart."""
        import torch

        layout = self.random.choice(("plain", "rows outside", "apart"))
        if layout == "rows outside" and len(shape) == 4:
            b, h, n, d = shape
            made = torch.randn(b, n, h, d, generator=self.generator).to(dtype).transpose(1, 2)
        elif layout == "apart":
            made = torch.randn(*shape[:-1], 2 * shape[-1], generator=self.generator).to(dtype)
            made = made[..., ::2]
        else:
            made = torch.randn(shape, generator=self.generator).to(dtype)
        return made.requires_grad_(gradient)

    def hidden(self, *shape: int, share: float) -> Any:
        """True for that share of the elements."""
        import torch

        return torch.rand(shape, generator=self.generator) < share


def results(run: Callable[..., Any], tensors: list[Any], draw: Drawing, gradients: bool) -> Any:
    """Digests of a call without and with its log-sum-exps, and of its gradients."""
    import torch

    found = {}
    with torch.no_grad():
        torch.manual_seed(7)
        short = run(return_lse=False)
        torch.manual_seed(7)
        full = run(return_lse=True)
    for name, value in (("inference", short), ("all", full)):
        for i, t in enumerate(value if isinstance(value, tuple) else (value,)):
            found[f"{name} {i}"] = digest(t)
    if gradients:
        with_lse = draw.random.random() < 0.5
        torch.manual_seed(7)
        outputs = run(return_lse=with_lse)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        given = [draw.normal(*t.shape, dtype=t.dtype) for t in outputs]
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        for i, t in enumerate(torch.autograd.grad(outputs, wanted, given, allow_unused=True)):
            found[f"gradient {i}"] = "none" if t is None else digest(t)
    return found


def mask_of(kind: str, draw: Drawing, sizes: tuple[int, ...], dtype: Any, gradient: bool) -> Any:
    """A mask that broadcasts to (batch or sequences, heads, q_len, kv_len); None for padding."""
    import torch

    some = tuple(draw.random.choice((1, n)) for n in sizes[:2])
    if kind == "bool":
        return ~draw.hidden(*some, *sizes[2:], share=0.2)
    kind_of_number = draw.random.choice((dtype, torch.float32))
    if kind == "bias":
        return draw.normal(*some, *sizes[2:], dtype=kind_of_number, gradient=gradient)
    if kind == "row_bias":
        return draw.normal(1, 1, 1, sizes[3], dtype=kind_of_number, gradient=gradient)
    return None


def parse(name: str) -> tuple[str, Any, int, int, str, dict[str, Any]]:
    """Op, dtype, lengths, mask and options of a name."""
    import torch

    op, dtype, lengths, mask, causal, dropout = name.split()
    q, k = map(int, lengths.split("x"))
    options: dict[str, Any] = {"dropout_p": float(dropout.removeprefix("dropout="))}
    if causal != "full":
        options |= {"is_causal": True, "causal_alignment": causal}
    return op, getattr(torch, dtype), q, k, mask, options


def batched(name: str, backend: str) -> dict[str, str]:
    """A call of scaled_dot_product_attention or bidirectional_attention."""
    import fastfusion as ff

    op, dtype, q_len, kv_len, mask, options = parse(name)
    draw, gradients = Drawing(name), backend == "cpu"
    batch = draw.random.choice((1, 2))
    heads, kv_heads = draw.random.choice(HEADS)
    dim, value_dim = draw.random.choice(DIMS)
    options["scale"] = draw.random.choice(SCALES)
    both = op == "bidirectional"
    if both:
        kv_heads = heads

    def tensor(h: int, length: int, d: int) -> Any:
        return draw.normal(batch, h, length, d, dtype=dtype, gradient=gradients)

    tensors = [
        tensor(heads, q_len, dim), tensor(kv_heads, kv_len, dim),
        tensor(kv_heads, kv_len, value_dim),
    ]  # fmt: skip
    if both:
        tensors.append(tensor(heads, q_len, draw.random.choice((value_dim, 16))))
        if mask == "padding":
            options["query_padding_mask"] = draw.hidden(batch, q_len, share=0.3)
    else:
        options["enable_gqa"] = heads != kv_heads
    if mask == "padding":
        options["key_padding_mask"] = draw.hidden(batch, kv_len, share=0.3)
    bias = mask_of(mask, draw, (batch, heads, q_len, kv_len), dtype, gradients)
    function = ff.bidirectional_attention if both else ff.scaled_dot_product_attention

    def run(return_lse: bool) -> Any:
        return function(*tensors, attn_mask=bias, return_lse=return_lse, backend=backend, **options)

    return results(run, [*tensors, bias], draw, gradients)


def packed(name: str, backend: str) -> dict[str, str]:
    """A call of varlen_attention: a few sequences up to the lengths of the name."""
    import torch

    import fastfusion as ff

    _, dtype, q_len, kv_len, mask, options = parse(name)
    draw = Drawing(name)
    heads, kv_heads = draw.random.choice(HEADS)
    dim, value_dim = draw.random.choice(DIMS)
    options["scale"] = draw.random.choice(SCALES)
    count = draw.random.choice((1, 3, 4))

    def offsets(longest: int) -> tuple[Any, int]:
        lengths = [longest, *(draw.random.randint(0, longest) for _ in range(count - 1))]
        draw.random.shuffle(lengths)
        ends = list(itertools.accumulate(lengths, initial=0))
        kind = draw.random.choice((torch.int32, torch.int64))
        return torch.tensor(ends, dtype=kind), ends[-1] + draw.random.choice((0, 3))

    (q_offsets, q_rows), (k_offsets, k_rows) = offsets(q_len), offsets(kv_len)

    def tensor(rows: int, h: int, d: int) -> Any:
        return draw.normal(rows, h, d, dtype=dtype, gradient=True)

    tensors = [
        tensor(q_rows, heads, dim), tensor(k_rows, kv_heads, dim),
        tensor(k_rows, kv_heads, value_dim),
    ]  # fmt: skip
    bias = mask_of(mask, draw, (count, heads, q_len, kv_len), dtype, True)

    def run(return_lse: bool) -> Any:
        return ff.varlen_attention(
            *tensors, q_offsets, k_offsets, q_len, kv_len, attn_mask=bias, return_lse=return_lse,
            backend=backend, **options,
        )  # fmt: skip

    return results(run, [*tensors, bias], draw, True)


def block(name: str) -> dict[str, str]:
    """A call of the cross-attention layer of the CUDA kernels."""
    import torch

    dtype = getattr(torch, name.split()[1])
    draw = Drawing(name)
    q_len, kv_len = draw.random.choice(EMULATED_LENGTHS)
    heads, head_dim = draw.random.choice(((1, 16), (3, 32)))
    width, context_width, out_width = 48, draw.random.choice((48, 80)), 48
    batch, inner = 2, heads * head_dim

    def normal(*shape: int) -> Any:
        return (draw.normal(*shape, dtype=torch.float32) * shape[-1] ** -0.5).to(dtype)

    def maybe(*shape: int) -> Any:
        return normal(*shape) if draw.random.random() < 0.5 else None

    query, context = normal(batch, q_len, width) * 7, normal(batch, kv_len, context_width) * 7
    mask = draw.random.choice((None, ~draw.hidden(q_len, kv_len, share=0.2)))
    padding = draw.random.choice((None, draw.hidden(batch, kv_len, share=0.2)))
    epsilons = [draw.random.choice((None, 1e-5)) for _ in range(2)]
    out = torch.ops.fastfusion.cuda_cross_attention_layer_forward(
        query, context, None, None, normal(inner, width), maybe(inner),
        normal(2 * inner, context_width), maybe(2 * inner), normal(out_width, inner),
        maybe(out_width), maybe(batch, q_len, out_width), maybe(width), maybe(width),
        maybe(context_width), maybe(context_width), mask, padding, heads, None, *epsilons,
        draw.random.choice((True, False)),
    )  # fmt: skip
    return {"out": digest(out)}


def digest_all(library: str | None, keep: int) -> dict[str, dict[str, str]]:
    """One call in `keep`, by the CPU kernels or by the emulated ones of a library."""
    import fastfusion as ff

    if library is not None:
        ff.backends.cuda.emulate(Path(library))
    backend = "cpu" if library is None else "cuda"
    calls: dict[str, Call] = {}
    for op in ("attention", "bidirectional"):
        for name in names(op, library is not None):
            calls[name] = lambda name=name: batched(name, backend)
    if library is None:
        for name in names("varlen", False):
            calls[name] = lambda name=name: packed(name, backend)
    else:
        for dtype, i in itertools.product(("float16", "bfloat16"), range(20)):
            name = f"block {dtype} {i}"
            calls[name] = lambda name=name: block(name)
    found = {}
    for name, call in calls.items():
        if zlib.crc32(name.encode()) % keep:
            continue
        try:
            found[name] = call()
            if library is not None and call() != found[name]:
                found[name] = {"unstable": "other bits in the second run"}
        except Exception as error:  # what a build refuses is part of what it does
            found[name] = {"raises": type(error).__name__}
    return found


def write(target: Path, keep: int) -> None:
    """Digests of every instruction set and emulated library, each in a process of its own."""
    import fastfusion as ff

    native = ff.backends.library.native
    assert native is not None, ff.backends.library.cpu_unavailable
    folder = Path(ff.__file__).resolve().parents[1] / "build/emulated"
    parts: dict[str, tuple[str, ...]] = {isa: () for isa in native.isas(runnable=True)}
    for library in sorted(folder.glob("sm*/_emulated_ops.so")):
        parts[library.parent.name] = (str(library),)
    found = {}
    for part, arguments in parts.items():
        variables = {} if arguments else {"FASTFUSION_CPU_ISA": part}
        command = [sys.executable, __file__, "digest", f"--keep={keep}", *arguments]
        text = subprocess.run(
            command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        found[part] = json.loads(text)
        print(f"{part}: {len(found[part])} calls", flush=True)
    target.write_text(json.dumps(found, indent=0) + "\n")


def compare(before: Path, after: Path) -> int:
    """Prints what differs, and returns 1 where anything does or where nothing is shared."""
    a, b = json.loads(before.read_text()), json.loads(after.read_text())
    different, same = 0, 0
    for part in sorted({*a, *b}):
        if part not in a or part not in b:
            print(f"{part}: only in {before if part in a else after}")
            continue
        for name in a[part].keys() & b[part].keys():
            x, y = a[part][name], b[part][name]
            if x == y:
                same += 1
                continue
            if "unstable" in x or "unstable" in y:
                print(f"{part}: {name}: unstable by itself")
                continue
            different += 1
            results = sorted(key for key in {*x, *y} if x.get(key) != y.get(key))
            print(f"{part}: {name}: {', '.join(results)}")
    print(f"{same} calls are the same, {different} differ")
    return int(different > 0 or same == 0)


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="digests of the build that Python imports")
    writing.add_argument("target", type=Path)
    comparing = commands.add_parser("compare", help="the differences of two files")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    digesting = commands.add_parser("digest", help="one part of `write`, as JSON")
    digesting.add_argument("library", nargs="?")
    for command in (writing, digesting):
        command.add_argument("--keep", type=int, default=1, help="one call in so many")
    given = parser.parse_args()
    if given.command == "compare":
        return compare(given.before, given.after)
    if given.command == "write":
        write(given.target, given.keep)
    else:
        json.dump(digest_all(given.library, given.keep), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The suite "block": cross attention with its residual and norm, beside the same of torch.nn.

    norm(query + out_proj(attention(q_proj(query), kv_proj(context), padding)))

as in LXMERT (Tan and Bansal, "LXMERT: Learning Cross-Modality Encoder Representations from
Transformers", 2019, section 2.1), inference. All implementations read the same parameters, so that
none finds more of them in the L2 cache than another.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfusion as ff
from fastfusion.ops import cross_attention_layer as layer

from ..common import ops
from ..common.peers import Arguments, additive, unfused_formula
from ..common.results import OURS
from .results import OWN_PREFIX, Cell
from .timing import Timed

SUITE = "block"
PLAIN = "formula"  # the peer whose error sets what is allowed
# LayerNorm comes to about this many operations for each number.
NORM_FLOPS = 8


class Block(nn.Module):
    """The block of our modules, as a user writes it."""

    def __init__(self, dim: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attention = ff.nn.CrossAttention(dim, context_dim, heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, query: Tensor, context: Tensor, padding: Tensor | None) -> Tensor:
        out: Any = self.attention(query, context, padding)
        return self.norm(query + out)


class LinearBlock(nn.Module):
    """The block of linear layers of torch.nn around `attend`, with the parameters of a `Block`."""

    def __init__(self, block: Block, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        ours = block.attention
        self.q_proj, self.kv_proj, self.out_proj = ours.q_proj, ours.kv_proj, ours.out_proj
        self.norm, self.heads, self.attend = block.norm, ours.num_heads, attend

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        q = self.q_proj(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_proj(context).unflatten(-1, (2, self.heads, -1)).unbind(-3)
        out = self.attend(q, k.transpose(1, 2), v.transpose(1, 2), mask)
        return self.norm(query + self.out_proj(out.transpose(1, 2).flatten(2)))


class TorchBlock(nn.Module):
    """The block with nn.MultiheadAttention, which has the weights side by side: a copy of them."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        ours = block.attention
        self.attention = nn.MultiheadAttention(
            ours.query_dim,
            ours.num_heads,
            kdim=ours.context_dim,
            vdim=ours.context_dim,
            batch_first=True,
            device=ours.q_proj.weight.device,
            dtype=ours.q_proj.weight.dtype,
        )
        key, value = ours.kv_proj.weight.chunk(2)
        weights = {
            "q_proj_weight": ours.q_proj.weight,
            "k_proj_weight": key,
            "v_proj_weight": value,
        }
        if ours.query_dim == ours.context_dim:
            weights = {"in_proj_weight": torch.cat([ours.q_proj.weight, key, value])}
        weights["in_proj_bias"] = torch.cat([ours.q_proj.bias, ours.kv_proj.bias])
        out = {f"out_proj.{name}": t for name, t in ours.out_proj.state_dict().items()}
        self.attention.load_state_dict(weights | out)
        self.norm = block.norm
        self.requires_grad_(False)

    def forward(self, query: Tensor, context: Tensor, padding: Tensor | None) -> Tensor:
        out, _ = self.attention(
            query, context, context, key_padding_mask=padding, need_weights=False
        )
        return self.norm(query + out)


def inputs(
    shape: Mapping[str, Any], dtype: torch.dtype, device: Any = None, seed: int = 0
) -> Arguments:
    """A block with weights and biases, and what it is called with.

    Args:
        shape: batch, q_len, kv_len, dim, context_dim, heads, and mask: "key_padding" (the last
            quarter of the context of every second entry hidden) or None.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device() if device is None else device

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(size, generator=generator, device="cpu") * scale
        return made.to(device=device, dtype=dtype)

    batch, dim, context_dim = shape["batch"], shape["dim"], shape["context_dim"]
    block = Block(dim, context_dim, shape["heads"]).eval().requires_grad_(False)
    block = block.to(device=device, dtype=dtype)
    for name, parameter in block.named_parameters():
        matrix = parameter.dim() == 2
        parameter.copy_(
            normal(*parameter.shape, scale=parameter.shape[-1] ** -0.5 if matrix else 1)
        )
        if name == "norm.weight":
            parameter.add_(1)
    padding = None
    if shape.get("mask") == "key_padding":
        padding = torch.zeros(batch, shape["kv_len"], dtype=torch.bool, device=device)
        padding[::2, shape["kv_len"] - shape["kv_len"] // 4 :] = True
    return {
        "block": block,
        "query": normal(batch, shape["q_len"], dim),
        "context": normal(batch, shape["kv_len"], context_dim),
        "padding": padding,
    }


def cost(shape: Mapping[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Floating-point operations, and bytes of weights, inputs and outputs read and written once."""
    batch, q_len, kv_len = shape["batch"], shape["q_len"], shape["kv_len"]
    dim, context_dim = shape["dim"], shape["context_dim"]
    products = 2 * q_len * dim * dim + 2 * kv_len * context_dim * dim + 2 * q_len * kv_len * dim
    weights = 2 * dim * dim + 2 * context_dim * dim + 6 * dim
    tokens = batch * (2 * q_len * dim + kv_len * context_dim)
    padding = batch * kv_len if shape.get("mask") else 0
    flops = batch * (2 * products + NORM_FLOPS * q_len * dim)
    return flops, (weights + tokens) * dtype.itemsize + padding


def expected(call: Arguments) -> tuple[Tensor, ...]:
    """The result in float64."""
    wide = inputs_in(call, torch.float64)
    with torch.no_grad():
        return ops.as_tuple(formula(wide)())


def inputs_in(call: Arguments, dtype: torch.dtype) -> Arguments:
    """The same call in another dtype, on parameters of its own."""
    block = call["block"]
    ours = block.attention
    copy = Block(ours.query_dim, ours.context_dim, ours.num_heads)
    copy.to(device=call["query"].device, dtype=dtype).load_state_dict(block.state_dict())
    tensors = {name: call[name].to(dtype) for name in ("query", "context")}
    return {**call, **tensors, "block": copy.eval().requires_grad_(False)}


# ---- ours


def run(call: Arguments) -> Tensor:
    """The block of our modules, on the backend that is chosen."""
    result: Tensor = call["block"](call["query"], call["context"], call["padding"])
    return result


def ours(call: Arguments, cell: Cell) -> dict[str, Timed]:
    """The block of our modules, and on the CUDA kernels where something else was chosen."""
    block, given = call["block"], (call["query"], call["context"], call["padding"])
    ((_, explanation),) = ff.explain(block, *given).rows
    cell.path = None if explanation is None else explanation.chosen
    found = {OURS: Timed(partial(run, call))}
    kernels = [i for i in layer.OP.implementations if i.backend == "cuda"]
    refused = [why for i in kernels for why in i.refuses(layer.OP.call(**_of_op(call)))]
    if not refused and cell.path != "cuda":
        context = partial(ff.use_backend, "cuda")
        found[f"{OWN_PREFIX}cuda"] = Timed(partial(run, call), context)
        found[f"{OWN_PREFIX}cuda residual"] = Timed(partial(_with_residual, call))
    return found


def _of_op(call: Arguments) -> Arguments:
    """The attention of the block as arguments of our op."""
    attention = call["block"].attention
    parts = {"q": attention.q_proj, "kv": attention.kv_proj, "out": attention.out_proj}
    weights = {f"{name}_weight": part.weight for name, part in parts.items()}
    biases = {f"{name}_bias": part.bias for name, part in parts.items()}
    sequences = {"query": call["query"], "context": call["context"]}
    options = {"num_heads": attention.num_heads, "key_padding_mask": call["padding"]}
    return sequences | weights | biases | options


def _with_residual(call: Arguments) -> Tensor:
    """The block with its sum in the kernel of `out_proj`."""
    summed = ff.cross_attention_layer(**_of_op(call), residual=call["query"], backend="cuda")
    normalized: Tensor = call["block"].norm(summed)
    return normalized


# ---- peers


def formula_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Attention as textbooks write it."""
    return unfused_formula(q, k, v, bias, q.shape[-1] ** -0.5)


def _linear(call: Arguments, attend: Callable[..., Tensor], mask: Tensor | None) -> partial[Tensor]:
    return partial(LinearBlock(call["block"], attend), call["query"], call["context"], mask)


def _visible(call: Arguments) -> Tensor | None:
    padding = call["padding"]
    return None if padding is None else ~padding[:, None, None, :]


def linear_sdpa(call: Arguments) -> partial[Tensor]:
    """Linear layers of torch.nn around torch's SDPA: keys and values from one product."""
    return _linear(call, F.scaled_dot_product_attention, _visible(call))


def formula(call: Arguments) -> partial[Tensor]:
    """Linear layers of torch.nn around the unfused formula."""
    return _linear(call, formula_attention, additive(_visible(call), call["query"].dtype))


def torch_module(call: Arguments) -> partial[Tensor]:
    """nn.MultiheadAttention, residual, nn.LayerNorm."""
    given = (call["query"], call["context"], call["padding"])
    return partial(TorchBlock(call["block"]).eval(), *given)


def compiled(adapter: Callable[[Arguments], partial[Tensor]], call: Arguments) -> partial[Tensor]:
    """torch.compile, as it is by default, of a peer."""
    plain = adapter(call)
    return partial(torch.compile(plain.func, dynamic=False), *plain.args)


ADAPTERS: dict[str, Callable[[Arguments], partial[Tensor]]] = {
    "linear + sdpa": linear_sdpa,
    "torch.nn": torch_module,
    PLAIN: formula,
}
COMPILED: dict[str, Callable[[Arguments], partial[Tensor]]] = {
    "compile": partial(compiled, linear_sdpa),
    "compile formula": partial(compiled, formula),
}

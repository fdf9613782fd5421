"""Tensor parallelism: heads of attention and features of feed-forward parts, over several ranks.

The layout is that of Shoeybi et al., "Megatron-LM", 2019, section 3: input projections and the
first linear layer are split by rows of their weights, output projections and the second linear
layer by columns, so that one sum over the ranks stands behind each attention and each feed-forward
part, and one behind the gradient of its input. Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", 2022, section 4.2, split the tokens in between, which
makes of each sum a gather and a scattered sum of as many bytes.

Parameters are DTensors of the sizes and names that they have on one rank. A packed projection has
its rows of queries, keys and values side by side, of which each rank holds the rows of its heads:
`_StridedShard` is torch's name for that placement. Modules compute on what a rank holds.
"""

from collections.abc import Iterator, Mapping
from functools import cache, partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel
from torch.distributed.tensor.placement_types import _StridedShard

from fastfusion.distributed.checkpoints import checkpointable
from fastfusion.nn import (
    CrossAttention,
    CrossModalAttention,
    MultiheadAttention,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

_ATTENTIONS = (MultiheadAttention, CrossAttention, CrossModalAttention)
_LAYERS = (TransformerEncoderLayer, TransformerDecoderLayer)
_STACKS = (TransformerEncoder, TransformerDecoder)


def tensor_parallel_plan(
    module: nn.Module, *, sequence_parallel: bool = False
) -> dict[str, ParallelStyle]:
    """The plan by which `torch.distributed.tensor.parallel.parallelize_module` splits a model::

        mesh = init_device_mesh("cuda", (ranks,))
        parallelize_module(model, mesh, ff.distributed.tensor_parallel_plan(model))

    Inputs and results are those of one rank, on every rank: tensors, not DTensors. Heads of every
    attention of `fastfusion.nn` and hidden features of every feed-forward part are split over the
    ranks; all other parameters are on each. Every rank has to draw the same random numbers, so all
    begin with the same `torch.manual_seed`; where features or heads are split, dropout draws
    numbers of a rank's own, so that a step in training with dropout is as likely as one rank's but
    not the same.

    `state_dict` has the names and sizes of one rank, and `torch.distributed.checkpoint` saves it
    on n ranks and loads it on m. The states of optimizers go through :func:`checkpointable` first.

    It does not go with FSDP2 on the same parameters, which it would look for as DTensors where
    modules show what a rank holds.

    Args:
        module: a model with modules of `fastfusion.nn` in it, or one of them.
        sequence_parallel: between attention and feed-forward of encoders and decoders, each rank
            holds a part of the tokens, whose number the ranks have to divide. As many bytes go
            over the wires; norms, dropout and residuals are computed once, not on each rank, and
            activations in between take 1 / n of the memory.

    Returns:
        A style for each part that has parameters or splits: `RowwiseParallel` of torch and those of
        this file. Entries may be changed before use.

    Raises:
        ValueError: a projection that is quantised or replaced; when the plan is applied, a mesh of
            more than one dimension, heads or hidden features that the ranks do not divide; when the
            model is called, nested tensors, DTensors, or tokens that the ranks do not divide.
    """
    plan: dict[str, ParallelStyle] = {}
    token_dims: dict[str, int] = {}
    for name, part in module.named_modules():
        if sequence_parallel and isinstance(part, _LAYERS):
            # Of (batch, tokens, width); (tokens, batch, width); (tokens, width).
            token_dims[name] = -2 if part.self_attn.batch_first else 0
    ends = dict(_ends(module, token_dims))
    for name, part in module.named_modules():
        for key, style in _styles(part, token_dims.get(name), ends.get(name)):
            plan.setdefault(f"{name}.{key}".strip("."), style)  # of what is around it first
    for name, style in plan.items():
        part = module.get_submodule(name)
        if isinstance(style, Columnwise | RowwiseParallel) and not isinstance(part, nn.Linear):
            raise ValueError(
                f"{name} must be a linear layer to be split, got {type(part).__name__}"
            )
    everywhere = Replicated()
    for name, part in module.named_modules():
        if name not in plan and part._parameters:
            plan[name] = everywhere
    return plan


def _ends(module: nn.Module, names: Mapping[str, int]) -> Iterator[tuple[str, tuple[bool, bool]]]:
    """Before which layers whole sequences become parts, and behind which they become whole."""
    yield from ((name, (True, True)) for name in names)
    for name, part in module.named_modules():
        if isinstance(part, _STACKS):
            layers = [f"{name}.layers.{i}".strip(".") for i in range(len(part.layers))]
            if all(layer in names for layer in layers):
                last = len(layers) - 1
                yield from ((layer, (i == 0, i == last)) for i, layer in enumerate(layers))


def _styles(
    part: nn.Module, dim: int | None, ends: tuple[bool, bool] | None
) -> Iterator[tuple[str, ParallelStyle]]:
    """Those of a module and of its parts, by their names in it.

    Args:
        dim: of the tokens, where each rank has a part of them.
        ends: whether this layer takes and whether it gives whole sequences, then.
    """
    tokens = Replicate() if dim is None else Shard(dim)
    if isinstance(part, MultiheadAttention | CrossAttention):
        yield "", Heads()
        yield "out_proj", RowwiseParallel()
    if isinstance(part, CrossAttention):
        yield "q_proj", Columnwise()
        yield "kv_proj", Columnwise(parts=2)
    if isinstance(part, CrossModalAttention):
        yield "", Heads()
        for stream in ("visual", "text"):
            yield f"{stream}.in_proj", Columnwise(parts=2)
            yield f"{stream}.out_proj", RowwiseParallel()
            for key, style in _feed_forward(getattr(part, stream), tokens):
                yield f"{stream}.{key}", style
    if isinstance(part, _LAYERS):
        yield from _feed_forward(part, tokens)
    if dim is None or ends is None:
        return
    yield "", Tokens(dim, *ends)
    for name, child in part.named_children():
        if isinstance(child, MultiheadAttention):
            yield name, Heads(dim)
            yield f"{name}.out_proj", RowwiseParallel(output_layouts=tokens)
        elif isinstance(child, nn.Dropout):
            yield name, OwnNumbers()
        elif not isinstance(child, nn.Linear):
            yield name, Replicated(summed=True)


def _feed_forward(part: Any, tokens: Placement) -> Iterator[tuple[str, ParallelStyle]]:
    yield "linear1", Columnwise(tokens=tokens)
    yield "dropout", OwnNumbers()
    yield "linear2", RowwiseParallel(output_layouts=tokens)
    if isinstance(part.activation, nn.Module):
        yield "activation", Replicated(summed=True)


# ---- parameters, of which a module sees what its rank holds


def _shard(
    module: nn.Module,
    mesh: DeviceMesh,
    placements: Mapping[str, Placement],
    gradient: Placement | None = None,
) -> None:
    """Make DTensors of parameters; code of the module gets tensors, this rank's.

    Args:
        gradient: what those of a rank are, where that is not the parameter's own placement.
    """
    if mesh.ndim != 1:
        raise ValueError(f"a mesh of one dimension is needed, got one of shape {mesh.shape}")
    held = []
    for name, placement in placements.items():
        parameter = module._parameters.get(name)
        if parameter is None:
            continue
        held.append(name)
        if not isinstance(parameter, DTensor):
            module.register_parameter(name, _distributed(parameter, mesh, placement))
        if gradient is not None and _LEAVES_PARTIAL_UNCLIPPED:
            shared: Any = module._parameters[name]
            shared.register_post_accumulate_grad_hook(_sum_gradient)
        if isinstance(placement, _StridedShard):
            module.register_state_dict_post_hook(_mark_state)
    kind: Any = type(module)
    module.__class__ = _class_of_locals(kind, tuple(held), gradient)


# As torch 2.11's clip_grad_norm_ does, see findings/; 2.13's does not.
_LEAVES_PARTIAL_UNCLIPPED = torch.__version__ < "2.13"


def _sum_gradient(parameter: Any) -> None:
    """Over the ranks, once its backward has passed."""
    parameter.grad = parameter.grad.redistribute(placements=parameter.placements)


def _mark_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in module._parameters:
        checkpointable(state.get(prefix + name))


def _distributed(tensor: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    whole = distribute_tensor(tensor.data, mesh, [placement])
    return nn.Parameter(whole, requires_grad=tensor.requires_grad)


@cache
def _class_of_locals(kind: Any, names: tuple[str, ...], gradient: Placement | None) -> Any:
    """A subclass whose attributes of these names are what a rank holds of the parameters, as
    `torch.nn.utils.parametrize` makes one whose attributes are computed."""
    placements = None if gradient is None else (gradient,)

    def local(name: str) -> Any:
        def read(self: nn.Module) -> Any:
            parameter: Any = self._parameters[name]
            if not isinstance(parameter, DTensor):
                return parameter
            return parameter.to_local(grad_placements=placements)

        return property(read)

    members = {name: local(name) for name in names}
    return type(kind.__name__, (kind,), {**members, "__module__": kind.__module__})


def _ranks_divide(mesh: DeviceMesh, module: nn.Module, **counts: int) -> None:
    for name, count in counts.items():
        if count % mesh.size():
            raise ValueError(
                f"{name} must be a multiple of the {mesh.size()} ranks, got {count} in {module}"
            )


# ---- sequences


def _everywhere(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """A tensor that is on every rank and goes into what each does alone: its gradient is a sum."""
    whole = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def _gathered(tensor: Tensor, mesh: DeviceMesh, tokens: Placement) -> Tensor:
    """Likewise of a sequence of which each rank has a part."""
    if isinstance(tokens, Replicate):
        return _everywhere(tensor, mesh)
    parts = DTensor.from_local(tensor, mesh, [tokens], run_check=False)
    return parts.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def _refuse(tensors: Mapping[Any, Any]) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and (isinstance(tensor, DTensor) or tensor.is_nested):
            kind = "nested one" if tensor.is_nested else f"DTensor {tuple(tensor.shape)}"
            raise ValueError(
                f"{name} must be a plain tensor, the same on every rank, where a module is split "
                f"over ranks; got a {kind}"
            )


# ---- styles


class Replicated(ParallelStyle):
    """Parameters that are on every rank.

    Args:
        summed: each rank applies them to tokens or features of its own, so gradients are sums.
    """

    def __init__(self, summed: bool = False) -> None:
        self.gradient = Partial() if summed else None
        self.known: dict[nn.Parameter, nn.Parameter] = {}  # which modules may share

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        for name, parameter in module._parameters.items():
            if parameter is not None and not isinstance(parameter, DTensor):
                if parameter not in self.known:
                    self.known[parameter] = _distributed(parameter, mesh, Replicate())
                module.register_parameter(name, self.known[parameter])
        _shard(module, mesh, dict.fromkeys(module._parameters, Replicate()), self.gradient)
        return module


class Columnwise(ParallelStyle):
    """A linear layer that gives each rank a part of its features.

    Args:
        parts: layers that lie side by side in one (keys and values), each of which is split.
        tokens: where the input is, `Replicate` or `Shard`.
    """

    def __init__(self, parts: int = 1, tokens: Placement | None = None) -> None:
        self.parts, self.tokens = parts, tokens or Replicate()

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        linear: Any = module
        _ranks_divide(mesh, module, features=linear.out_features // self.parts)
        _shard(module, mesh, dict.fromkeys(("weight", "bias"), _rows(self.parts)))

        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            _refuse({"input": args[0]})
            return (_gathered(args[0], mesh, self.tokens), *args[1:])

        module.register_forward_pre_hook(enter)
        return module


def _rows(parts: int) -> Placement:
    return Shard(0) if parts == 1 else _StridedShard(0, split_factor=parts)


class Heads(ParallelStyle):
    """An attention of `fastfusion.nn` that computes this rank's heads.

    Args:
        dim: of the tokens, if each rank has a part of the query.
    """

    def __init__(self, dim: int | None = None) -> None:
        self.tokens = Replicate() if dim is None else Shard(dim)

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, _ATTENTIONS):
            raise ValueError(f"only attention of fastfusion.nn can be split by heads, got {module}")
        heads = module.num_heads
        _ranks_divide(mesh, module, num_heads=heads)
        module.num_heads = heads // mesh.size()
        if isinstance(module, MultiheadAttention):
            separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            packed = dict.fromkeys(("in_proj_weight", "in_proj_bias"), _rows(3))
            columns = dict.fromkeys(("bias_k", "bias_v"), Shard(2))
            _shard(module, mesh, packed | dict.fromkeys(separate, Shard(0)) | columns)
        names = list(signature(type(module).forward).parameters)[1:]

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            _refuse(given)
            if isinstance(module, MultiheadAttention):  # others have layers that see to it
                made: dict[int, Tensor] = {}
                for name in ("query", "key", "value"):
                    tensor = given[name]
                    if id(tensor) not in made:  # self-attention stays one tensor
                        tokens = self.tokens if tensor is given["query"] else Replicate()
                        made[id(tensor)] = _gathered(tensor, mesh, tokens)
                given |= {name: made[id(given[name])] for name in ("query", "key", "value")}
            masks = "attn_mask", "key_padding_mask", "alibi_slopes", "sinks", "position_table"
            for name in masks:
                mask = given.get(name)
                if isinstance(mask, Tensor):
                    mask = _everywhere(mask, mesh) if mask.requires_grad else mask
                    given[name] = _mask_of_heads(module, name, mask, heads, mesh.get_local_rank())
            return (), given

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(partial(self._leave, mesh), with_kwargs=True)
        return OwnNumbers()._apply(module, mesh)

    @staticmethod
    def _leave(
        mesh: DeviceMesh,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> Any:
        """The weights of all heads, where some are asked for."""
        first = 2 if isinstance(module, CrossModalAttention) else 1
        if not isinstance(result, tuple) or not any(w is not None for w in result[first:]):
            return result
        average = kwargs.get("average_attn_weights", True)
        whole = []
        for weights in result[first:]:
            if average:
                weights = weights / mesh.size()
            place = Partial() if average else Shard(weights.dim() - 3)
            shared = DTensor.from_local(weights, mesh, [place], run_check=False)
            whole.append(shared.redistribute(placements=[Replicate()]).to_local())
        return (*result[:first], *whole)


def _mask_of_heads(module: Any, name: str, mask: Tensor, heads: int, rank: int) -> Tensor:
    """What a mask says of this rank's heads."""
    count: int = module.num_heads
    first = rank * count
    if name in ("alibi_slopes", "sinks") and mask.dim() and mask.shape[-1] == heads:
        return mask.narrow(-1, first, count)
    if name == "position_table" and mask.dim() == 2 and mask.shape[0] == heads:
        return mask.narrow(0, first, count)
    if name != "attn_mask" or mask.dim() < 3:
        return mask
    if isinstance(module, MultiheadAttention):  # (batch * heads, q_len, kv_len)
        if mask.shape[0] % heads:
            return mask  # which is for the module to say
        return mask.unflatten(0, (-1, heads)).narrow(1, first, count).flatten(0, 1)
    return mask.narrow(-3, first, count) if mask.shape[-3] == heads else mask


class OwnNumbers(ParallelStyle):
    """Dropout where each rank has features, heads or tokens of its own: other numbers on each, and
    behind it all ranks go on with the same ones."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        states: list[tuple[torch.Generator, Tensor]] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            probability = module.p if isinstance(module, nn.Dropout) else module.dropout
            if not module.training or probability == 0.0:
                return
            seed = int(torch.randint(1 << 62, ()))
            first = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            generator = _generator(first.device)
            states.append((generator, generator.get_state()))
            generator.manual_seed(seed + mesh.get_local_rank())

        def leave(*_: Any) -> None:
            if states:
                generator, state = states.pop()
                generator.set_state(state)

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, always_call=True)
        return module


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    generators: Any = torch.get_device_module(device).default_generators
    found: torch.Generator = generators[device.index]
    return found


class Tokens(ParallelStyle):
    """A layer that works on parts of its sequence.

    Args:
        dim: of the tokens.
        split, gather: whether the layer takes whole sequences, and whether it gives them.
    """

    def __init__(self, dim: int, split: bool, gather: bool) -> None:
        self.dim, self.split, self.gather = dim, split, gather

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        names = list(signature(type(module).forward).parameters)[1:]

        def enter(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            given = dict(zip(names, args, strict=False)) | kwargs
            _refuse(given)
            tokens = given[names[0]]
            if tokens.shape[self.dim] % mesh.size():
                raise ValueError(
                    f"{names[0]} must have a multiple of {mesh.size()} tokens, which that many "
                    f"ranks share, in dimension {self.dim} of {tuple(tokens.shape)}"
                )
            whole = DTensor.from_local(tokens, mesh, [Replicate()], run_check=False)
            given[names[0]] = whole.redistribute(placements=[Shard(self.dim)]).to_local()
            return (), given

        def leave(module: nn.Module, args: tuple[Any, ...], result: Tensor) -> Tensor:
            parts = DTensor.from_local(result, mesh, [Shard(self.dim)], run_check=False)
            return parts.redistribute(placements=[Replicate()]).to_local()

        if self.split:
            module.register_forward_pre_hook(enter, with_kwargs=True)
        if self.gather:
            module.register_forward_hook(leave)
        return module

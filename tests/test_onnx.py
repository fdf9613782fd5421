"""The ops and modules in ONNX: onnxruntime runs them at other sizes than those exported."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from accuracy import assert_accurate
from suite import OpSuite
from torch import Tensor, nn
from torch.export import Dim

import fastfusion as ff
from fastfusion.core import layers
from fastfusion.integrations.onnx import translations
from fastfusion.ops import pack_int8
from fastfusion.ops.decoder_layer import OP as DECODER
from fastfusion.ops.encoder_layer import OP as ENCODER
from fastfusion.ops.linear import ACTIVATIONS
from fastfusion.positions import t5_buckets

HEADS, WIDTH, LONGEST = 4, 16, 12
EXPORTED = (3, 5, 7)
OTHERS = [(4, 9, 3), (2, 1, 11), (5, 6, 6)]

attention = ff.scaled_dot_product_attention
bidirectional = ff.bidirectional_attention
varlen = ff.varlen_attention

pytestmark = [
    pytest.mark.filterwarnings("ignore:# The axis name"),  # one dimension of several inputs
    pytest.mark.filterwarnings("ignore:`isinstance.treespec"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript"),
    pytest.mark.filterwarnings("ignore:The feature will be removed"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Module(nn.Module):
    """A function of named tensors, and the modules that it calls."""

    def __init__(self, names: list[str], function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.names, self.function = names, function
        self.parts = nn.ModuleDict(parts)
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, tensors, strict=True))
        return tuple(flat(self.function(given, **self.parts)))


def flat(results: Any) -> Iterator[Tensor]:
    if isinstance(results, Tensor):
        yield results
    else:
        for result in results:
            yield from flat(result)


def run(model: bytes, tensors: dict[str, Tensor]) -> list[Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed = {n: t.cpu().numpy() for n, t in zip(names, tensors.values(), strict=True)}
    return [torch.from_numpy(np.asarray(result)) for result in session.run(None, feed)]


def export(module: Module, inputs: dict[str, Tensor], axes: dict[str, Any], **options: Any) -> Any:
    dynamic = (tuple(axes[name] for name in inputs),)
    return torch.onnx.export(
        module, tuple(inputs.values()), dynamic_shapes=dynamic, verbose=False, **options
    )


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}


def assert_right(model: bytes, module: Module, inputs: dict[str, Tensor]) -> None:
    """onnxruntime's results are as accurate as the formula, and nowhere NaN."""
    with ff.use_backend("reference"):
        plain = module(*inputs.values())
        exact = module.double()(*double(inputs).values())
    module.float()
    for i, result in enumerate(run(model, inputs)):
        assert result.dtype == plain[i].dtype, f"output {i}"
        assert result.shape == plain[i].shape, f"output {i}"
        slices = (OpSuite.slices(t.cpu()) for t in (result, exact[i], plain[i]))
        assert_accurate(*slices)


def hidden(batch: int, length: int) -> Tensor:
    """Padding: all of the first sample, the end of the second."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[0] = True
    mask[1, length // 2 :] = True
    return mask


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)


def op_inputs(batch: int, q_len: int, kv_len: int) -> dict[str, Tensor]:
    q_lens, kv_lens = [q_len, 0, *[2] * (batch - 2)], [kv_len, 3, *[0] * (batch - 2)]
    bias = torch.randn(batch, 1, q_len, kv_len)
    bias[:, :, q_len // 2] = -torch.inf
    inputs = {
        "query": torch.randn(batch, HEADS, q_len, 8),
        "key": torch.randn(batch, HEADS, kv_len, 8),
        "value": torch.randn(batch, HEADS, kv_len, 6),
        "query_value": torch.randn(batch, HEADS, q_len, 5),
        "bools": torch.rand(q_len, kv_len) > 0.5,
        "bias": bias,
        "no_keys": hidden(batch, kv_len),
        "no_queries": hidden(batch, q_len),
        # Three rows behind the last sequence.
        "packed_query": torch.randn(sum(q_lens) + 3, HEADS, 8),
        "packed_key": torch.randn(sum(kv_lens), 2, 8),
        "packed_value": torch.randn(sum(kv_lens), 2, 6),
        "begin_q": offsets(q_lens),
        "begin_k": offsets(kv_lens),
        "slopes": torch.rand(HEADS),
        "table": torch.randn(HEADS, 8),
        "places": torch.randint(0, 8, (q_len, kv_len)),
        "q_ids": torch.randint(0, 3, (batch, q_len)),
        "k_ids": torch.randint(1, 4, (batch, kv_len)),
        "prefix": torch.randint(0, kv_len, (batch,)),
        "packed_bools": torch.rand(HEADS, LONGEST, LONGEST) > 0.3,
    }
    # What padding hides is not read.
    for name in ("key", "value"):
        padded = inputs["no_keys"][:, None, :, None]
        inputs[f"nan_{name}"] = inputs[name].masked_fill(padded, torch.nan)
    return inputs


@torch.no_grad()  # or it would be calls of attention, which may need gradients
def statistics(*tensors: Tensor, **options: Any) -> Any:
    return ff.attention_statistics(*tensors, enable_gqa=True, **options)


def calls(t: dict[str, Tensor]) -> list[Any]:
    query, key, value = t["query"], t["key"], t["value"]
    grouped = (query, t["nan_key"][:, :2], t["nan_value"][:, :2])
    sides = (query, key, value, t["query_value"])
    packed = (t["packed_query"], t["packed_key"], t["packed_value"], t["begin_q"], t["begin_k"])
    longest = (LONGEST, LONGEST)
    bottom: dict[str, Any] = {"is_causal": True, "causal_alignment": "bottom_right"}
    return [
        attention(query, key, value),
        attention(query, key, value, t["bools"], is_causal=True, return_lse=True),
        attention(query, key, value, t["bias"], scale=-0.3, return_lse=True),
        attention(query, key[:, :1], value[:, :1], t["bools"][:, :1], **bottom),
        attention(query[0, 0], key[0, 0], value[0, 0], scale=0.0, is_causal=True),
        attention(*grouped, t["bias"], key_padding_mask=t["no_keys"], enable_gqa=True),
        attention(*grouped, key_padding_mask=t["no_keys"], enable_gqa=True, **bottom),
        bidirectional(*sides, attn_mask=t["bias"], return_lse=True),
        bidirectional(
            *sides, attn_mask=t["bools"], query_padding_mask=t["no_queries"],
            key_padding_mask=t["no_keys"], **bottom,
        ),
        varlen(*packed, *longest, return_lse=True, **bottom),
        varlen(*packed, *longest, attn_mask=t["packed_bools"]),
        attention(query, key, value, window=(1, 2), causal_alignment="bottom_right"),
        attention(query, key, value, t["bias"], softcap=0.7, return_lse=True),
        attention(query, key, value, is_causal=True, window=(2, None), alibi_slopes=t["slopes"]),
        bidirectional(*sides, window=(3, 1), softcap=0.9, alibi_slopes=t["slopes"]),
        attention(query, key, value, segment_ids_q=t["q_ids"], segment_ids_k=t["k_ids"]),
        attention(query, key, value, t["bools"], sinks=t["slopes"], return_lse=True),
        attention(query, key, value, t["bias"], position_table=t["table"],
                  position_index=t["places"]),
        attention(query, key, value, position_table=t["table"], position_index=t5_buckets(
            query.shape[2], key.shape[2], num_buckets=8, max_distance=6), **bottom),
        bidirectional(*sides, segment_ids_q=t["q_ids"], segment_ids_k=t["k_ids"],
                      prefix_len=t["prefix"]),
        varlen(*packed, *longest, window=(2, 1), softcap=0.9, alibi_slopes=t["slopes"], **bottom),
        varlen(*packed, *longest, prefix_len=t["prefix"], sinks=t["slopes"]),
        statistics(
            query, t["nan_key"][:, :2], attn_mask=t["bools"], key_padding_mask=t["no_keys"],
            query_padding_mask=t["no_queries"], **bottom,
        )[:2],
    ]  # fmt: skip


B, L, S = Dim("B"), Dim("L"), Dim("S")
OP_AXES = {
    "query": {0: B, 2: L}, "key": {0: B, 2: S}, "value": {0: B, 2: S}, "query_value": {0: B, 2: L},
    "bools": {0: L, 1: S}, "bias": {0: B, 2: L, 3: S}, "no_keys": {0: B, 1: S},
    "q_ids": {0: B, 1: L}, "k_ids": {0: B, 1: S}, "prefix": {0: B},
    "no_queries": {0: B, 1: L}, "packed_query": {0: Dim("Tq")}, "packed_key": {0: Dim("Tk")},
    "packed_value": {0: Dim("Tk")}, "begin_q": {0: Dim("N")}, "begin_k": {0: Dim("N")},
    "slopes": None, "table": None, "places": {0: L, 1: S}, "packed_bools": None,
    "nan_key": {0: B, 2: S}, "nan_value": {0: B, 2: S},
}  # fmt: skip


@pytest.mark.parametrize("opset", [18, 23])
def test_ops(opset: int) -> None:
    inputs = op_inputs(*EXPORTED)
    module = Module(list(inputs), calls)
    program = export(module, inputs, OP_AXES, opset_version=opset)
    operators = [node.op_type for node in program.model.graph]
    # No float mask, a positive scale, no packed sequences, one direction, no cap and no slopes.
    assert operators.count("Attention") == (6 if opset >= 23 else 0)
    model = program.model_proto.SerializeToString()
    for sizes in OTHERS:
        assert_right(model, module, op_inputs(*sizes))


def module_inputs(batch: int, q_len: int, kv_len: int) -> dict[str, Tensor]:
    no_keys = hidden(batch, kv_len)
    return {
        "x": torch.randn(batch, q_len, WIDTH),
        "y": torch.randn(batch, kv_len, WIDTH),
        "nan_y": torch.randn(batch, kv_len, WIDTH).masked_fill(no_keys[..., None], torch.nan),
        "no_x": hidden(batch, q_len),
        "no_y": no_keys,
        "apart": torch.rand(q_len, kv_len) > 0.7,
        "future": torch.ones(q_len, q_len, dtype=torch.bool).triu(1),
    }


def modules() -> dict[str, nn.Module]:
    layer = {"nhead": HEADS, "dim_feedforward": 2 * WIDTH, "batch_first": True}
    return {
        "attention": ff.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        "encoder": ff.nn.TransformerEncoder(ff.nn.TransformerEncoderLayer(WIDTH, **layer), 1),
        "decoder": ff.nn.TransformerDecoder(ff.nn.TransformerDecoderLayer(WIDTH, **layer), 1),
        "cross": ff.nn.CrossAttention(WIDTH, WIDTH, HEADS),
        "vqa": ff.models.VQATransformer(WIDTH, WIDTH, HEADS, 2 * WIDTH, 1, 5),
    }


def module_calls(
    t: dict[str, Tensor],
    attention: Any,
    encoder: Any,
    decoder: Any,
    cross: Any,
    vqa: Any,
) -> list[Any]:
    x, y, no_x, no_y = t["x"], t["y"], t["no_x"], t["no_y"]
    nan = (x, t["nan_y"], t["nan_y"])
    masks = {"tgt_mask": t["future"], "tgt_is_causal": True, "memory_key_padding_mask": no_y}
    return [
        attention(*nan, key_padding_mask=no_y, need_weights=False)[0],
        attention(*nan, key_padding_mask=no_y, attn_mask=t["apart"]),
        encoder(x, mask=t["future"], src_key_padding_mask=no_x),
        decoder(x, t["nan_y"], **masks),
        cross(x, t["nan_y"], no_y),
        cross(x, y, attn_mask=t["apart"], need_weights=True),
        vqa(x, y, no_x, no_y, need_weights=True),
    ]


MODULE_AXES = {
    "x": {0: B, 1: L}, "y": {0: B, 1: S}, "nan_y": {0: B, 1: S}, "no_x": {0: B, 1: L},
    "no_y": {0: B, 1: S}, "apart": {0: L, 1: S}, "future": {0: L, 1: L},
}  # fmt: skip


def test_modules() -> None:
    inputs = module_inputs(*EXPORTED)
    module = Module(list(inputs), module_calls, **modules())
    program = export(module, inputs, MODULE_AXES, optimize=False)
    model = program.model_proto.SerializeToString()
    for sizes in OTHERS:
        assert_right(model, module, module_inputs(*sizes))


def torchscript(module: Module, inputs: dict[str, Tensor], axes: dict[str, Any], to: Path) -> bytes:
    with torch.no_grad():
        outputs = [f"output_{i}" for i, _ in enumerate(module(*inputs.values()))]
    torch.onnx.export(
        module, tuple(inputs.values()), to, dynamo=False, input_names=list(inputs),
        output_names=outputs,
        dynamic_axes={n: {i: str(d) for i, d in (axes[n] or {}).items()} for n in inputs},
    )  # fmt: skip
    return to.read_bytes()


def test_the_torchscript_exporter(tmp_path: Path) -> None:
    inputs = op_inputs(*EXPORTED)
    module = Module(list(inputs), calls)
    model = torchscript(module, inputs, OP_AXES, tmp_path / "model.onnx")
    for sizes in OTHERS:
        assert_right(model, module, op_inputs(*sizes))


def linear_calls(t: dict[str, Tensor]) -> list[Tensor]:
    x, weight, bias = t["x"], t["weight"], t["bias"]
    kinds = tuple(ACTIVATIONS)
    return [ff.linear(x, weight, bias, activation=a, residual=t["residual"]) for a in kinds]


@torch.no_grad()
def test_linear(tmp_path: Path) -> None:
    """Without gradients, with which the exported program holds the reference's operators."""

    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        sizes = {"x": (batch, length, 8), "weight": (60, 8), "bias": (60,)}
        sizes["residual"] = (batch, length, 60)
        return {name: torch.randn(size) for name, size in sizes.items()}

    axes = {"x": {0: B, 1: L}, "weight": None, "bias": None, "residual": {0: B, 1: L}}
    first = inputs(2, 5)
    module = Module(list(first), linear_calls)
    program = export(module, first, axes, optimize=False)
    models = [program.model_proto.SerializeToString()]
    models.append(torchscript(module, first, axes, tmp_path / "model.onnx"))
    for model in models:
        for sizes in ((4, 9), (1, 1)):
            assert_right(model, module, inputs(*sizes))


def encoder_calls(t: dict[str, Tensor]) -> list[Tensor]:
    x, weights = t["x"], {n: v for n, v in t.items() if n not in ("x", "hidden", "offsets")}
    parts = [weights[f"in_proj_{kind}"].chunk(3) for kind in ("weight", "bias")]
    apart = dict(weights, in_proj_weight=parts[0][0], in_proj_bias=parts[1][0])
    apart |= {"k_proj_weight": parts[0][1], "k_proj_bias": None}
    apart |= {"v_proj_weight": parts[0][2], "v_proj_bias": parts[1][2]}
    masks = {"key_padding_mask": t["hidden"], "is_causal": True}
    return [
        ff.norm(x, t["norm1_weight"], t["norm1_bias"], residual=2.0 * x),
        ff.norm(x, t["norm1_weight"], rms=True),
        ff.encoder_layer(x, **weights, num_heads=2, activation="gelu"),
        ff.encoder_layer(x, **weights, num_heads=2, norm_first=True, **masks),
        ff.encoder_layer(x, **apart, num_heads=2),
        ff.encoder_layer(x.flatten(0, 1)[None], **weights, num_heads=2, cu_seqlens=t["offsets"]),
    ]


@torch.no_grad()
def test_norms_and_encoder_layers(tmp_path: Path) -> None:
    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        hidden = torch.arange(length).expand(batch, length) >= length - 1
        ends = torch.arange(batch + 1) * length
        return {"x": torch.randn(batch, length, 8), "hidden": hidden, "offsets": ends, **weights}

    call = ENCODER.inputs({"length": 1, "dim": 8, "heads": 2, "ffn": 12}, torch.float32)
    weights = {n: v for n, v in call.items() if n.endswith(("weight", "bias"))}
    axes = {"x": {0: B, 1: L}, "hidden": {0: B, 1: L}, "offsets": {0: Dim.AUTO}}
    axes |= dict.fromkeys(weights)
    first = inputs(2, 5)
    module = Module(list(first), encoder_calls)
    program = export(module, first, axes, optimize=False)
    models = [program.model_proto.SerializeToString()]
    models.append(torchscript(module, first, axes, tmp_path / "model.onnx"))
    for model in models:
        for sizes in ((4, 9), (1, 1)):
            assert_right(model, module, inputs(*sizes))


def decoder_calls(t: dict[str, Tensor]) -> list[Tensor]:
    x, memory = t["x"], t["memory"]

    def parts(name: str) -> dict[str, Tensor]:
        return {n.partition(".")[2]: v for n, v in t.items() if n.startswith(name)}

    own, cross = (ff.ops.AttentionWeights(**parts(n)) for n in ("self_attn", "cross_attn"))
    norms = tuple(ff.ops.Norm(**parts(f"norm{i}")) for i in range(3))
    feed = ff.ops.FeedForwardWeights(**parts("feed_forward"))
    given = {"self_attn": own, "feed_forward": feed, "norms": norms, "num_heads": 2}
    masks = {"memory_padding_mask": t["hidden"], "is_causal": True}
    pair = ff.ops.project_memory(memory, cross, 2)
    return [
        ff.decoder_layer(x, **given | {"norms": norms[:2]}, activation="quick_gelu"),
        ff.decoder_layer(x, **given, memory=memory, cross_attn=cross, **masks),
        ff.decoder_layer(x, **given, memory=pair, cross_attn=cross, norm_first=True),
    ]


@torch.no_grad()
def test_decoder_layers() -> None:
    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        hidden = torch.arange(length + 2).expand(batch, length + 2) >= length
        sizes = {"x": (batch, length, 8), "memory": (batch, length + 2, 8)}
        return {"hidden": hidden, **{n: torch.randn(size) for n, size in sizes.items()}, **weights}

    shape = {"length": 1, "dim": 8, "heads": 2, "ffn": 12, "memory": 1}
    call = DECODER.inputs(shape, torch.float32)
    parts = {n: call[n] for n in ("self_attn", "cross_attn", "feed_forward")}
    parts |= {f"norm{i}": norm for i, norm in enumerate(call["norms"])}
    weights = {
        f"{name}.{field}": value
        for name, part in parts.items()
        for field, value in part._asdict().items()
        if isinstance(value, Tensor)
    }
    axes = {"hidden": {0: B, 1: S}, "x": {0: B, 1: L}, "memory": {0: B, 1: S}}
    first = inputs(2, 5)
    module = Module(list(first), decoder_calls)
    program = export(module, first, axes | dict.fromkeys(weights), optimize=False)
    for sizes in ((4, 9), (1, 1)):
        assert_right(program.model_proto.SerializeToString(), module, inputs(*sizes))


def layer_weights(op: Any, *tokens: str) -> dict[str, Any]:
    """Arguments of a layer but for its tokens and its form."""
    shape = {"q_len": 1, "kv_len": 1, "dim": 24, "context_dim": 16, "heads": 2, "ffn": 20}
    call = op.inputs(shape, torch.float32)
    return {k: v for k, v in call.items() if k not in (*tokens, "activation", "norm_first")}


ATTEND = layer_weights(ff.ops.LAYERS[0], "query", "context")
FUSE = layer_weights(ff.ops.LAYERS[1], "visual", "text")


def layer_calls(t: dict[str, Tensor]) -> list[Any]:
    """Each layer in its forms."""
    query, context, dtype = t["query"], t["context"], t["query"].dtype
    attend, fuse = ({k: layers.cast(dtype, v) for k, v in c.items()} for c in (ATTEND, FUSE))
    norms = {
        "query_norm": ff.ops.Norm(eps=1e-3),
        "context_norm": ff.ops.Norm(context.new_ones(16) * 0.7, context.new_ones(16)),
    }
    masks = {"key_padding_mask": t["no_context"], "attn_mask": t["bools"]}
    paddings = {"visual_padding_mask": t["no_query"], "text_padding_mask": t["no_context"]}
    keys = context[:, None, :, :12].expand(-1, 2, -1, -1)
    projected = attend | {"context": (keys, keys * 0.5), "kv_weight": None, "kv_bias": None}
    halves = attend["kv_weight"].chunk(2), attend["kv_bias"].chunk(2)
    apart = attend | {"kv_weight": halves[0][0], "kv_bias": halves[1][0], "v_weight": halves[0][1]}
    values = {"v_bias": halves[1][1], "value_context": context * 0.5}
    return [
        ff.cross_attention_layer(query, context, **attend),
        ff.cross_attention_layer(query, context, **apart, **norms),
        ff.cross_attention_layer(query, context, **apart, **values, **masks),
        ff.cross_attention_layer(query, context, **attend, **masks, **norms, residual=query),
        ff.cross_attention_layer(query, context, **attend, **norms, rms_norm=True, scale=0.3),
        ff.cross_attention_layer(query, **projected, attn_mask=t["bias"]),
        ff.cross_modal_layer(query, context, **fuse, **paddings, activation="gelu"),
        ff.cross_modal_layer(query, context, **fuse, attn_mask=t["bools"], norm_first=True),
    ]


@torch.no_grad()
@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize("backend", ["triton", None])
def test_layers(backend: str | None, opset: int) -> None:
    """The program holds the kernels' ops, or the reference's operators."""

    def inputs(batch: int, q_len: int, kv_len: int) -> dict[str, Tensor]:
        return {
            "query": torch.randn(batch, q_len, 24), "context": torch.randn(batch, kv_len, 16),
            "bools": torch.rand(q_len, kv_len) > 0.3, "bias": torch.randn(q_len, kv_len),
            "no_query": hidden(batch, q_len), "no_context": hidden(batch, kv_len),
        }  # fmt: skip

    axes = {
        "query": {0: B, 1: L}, "context": {0: B, 1: S}, "bools": {0: L, 1: S},
        "bias": {0: L, 1: S}, "no_query": {0: B, 1: L}, "no_context": {0: B, 1: S},
    }  # fmt: skip
    first = inputs(*EXPORTED)
    module = Module(list(first), layer_calls)
    with ff.use_backend(backend):
        program = export(module, first, axes, optimize=False, opset_version=opset)
    model = program.model_proto.SerializeToString()
    for sizes in OTHERS:
        assert_right(model, module, inputs(*sizes))


def in_int8(call: dict[str, Any], *names: str) -> dict[str, Any]:
    packed = {n: pack_int8(call[f"{n}_weight"].float()) for n in names}
    weights = {f"{n}_weight": weight for n, (weight, _) in packed.items()}
    return weights | {f"{n}_scale": scale for n, (_, scale) in packed.items()}


INT8_ATTEND = ATTEND | in_int8(ATTEND, "q", "kv", "out")
APART = ATTEND | {"kv_weight": ATTEND["kv_weight"][:24], "kv_bias": ATTEND["kv_bias"][:24]}
APART |= {"v_weight": ATTEND["kv_weight"][24:], "v_bias": ATTEND["kv_bias"][24:]}
INT8_APART = APART | in_int8(APART, "q", "kv", "v", "out")
INT8_FUSE = FUSE | {
    f"{name}_weights": FUSE[f"{name}_weights"]._replace(
        **in_int8(FUSE[f"{name}_weights"]._asdict(), "in", "out", "linear1", "linear2")
    )
    for name in ("visual", "text")
}


def narrow_layer_calls(t: dict[str, Tensor]) -> list[Any]:
    query, context, norm = t["query"], t["context"], {"context_norm": ff.ops.Norm(eps=1e-3)}
    attend, apart, fuse = (
        {k: layers.cast(query.dtype, v) if k[-5:] != "scale" else v for k, v in c.items()}
        for c in (INT8_ATTEND, INT8_APART, INT8_FUSE)
    )
    return [
        ff.cross_attention_layer(query, context, **attend),
        ff.cross_attention_layer(query, context, **attend, **norm, residual=query),
        ff.cross_attention_layer(query, context, **apart, value_context=context * 0.5),
        ff.cross_modal_layer(query, context, **fuse, activation="gelu"),
    ]


@torch.no_grad()
def test_layers_of_narrow_weights() -> None:
    first = {"query": torch.randn(2, 5, 24), "context": torch.randn(2, 7, 16)}
    module = Module(list(first), narrow_layer_calls)
    axes = {"query": {0: B, 1: L}, "context": {0: B, 1: S}}
    program = export(module, first, axes, optimize=False)
    model = program.model_proto.SerializeToString()
    assert_right(model, module, {"query": torch.randn(3, 9, 24), "context": torch.randn(3, 4, 16)})


def narrow_calls(t: dict[str, Tensor]) -> list[Tensor]:
    x, bias, residual = t["x"], t["bias"], t["residual"]
    scale = {"weight_scale": t["weight_scale"]}
    return [
        ff.linear(x, t["packed"], bias, **scale, activation="gelu", residual=residual),
        ff.linear(x, t["packed"], **scale),
        ff.linear(x, t["half"], bias, residual=residual),
    ]


@torch.no_grad()
def test_linear_of_narrow_weights(tmp_path: Path) -> None:
    packed, scale = pack_int8(torch.randn(3 * 70, 37), parts=3)
    weights = {"packed": packed, "weight_scale": scale, "bias": torch.randn(210)}
    weights["half"] = torch.randn(210, 37).half()

    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        x = torch.randn(batch, length, 37)
        x[0, 0] = 0.0
        return {"x": x, "residual": torch.randn(batch, length, 210), **weights}

    axes: dict[str, Any] = dict.fromkeys(weights)
    axes |= {"x": {0: B, 1: L}, "residual": {0: B, 1: L}}
    first = inputs(2, 5)
    module = Module(list(first), narrow_calls)
    program = export(module, first, axes, optimize=False)
    models = [program.model_proto.SerializeToString()]
    models.append(torchscript(module, first, axes, tmp_path / "model.onnx"))
    for model in models:
        for sizes in ((4, 9), (1, 1)):
            given = inputs(*sizes)
            with ff.use_backend("reference"):
                expected = module(*given.values())
            for ours, theirs in zip(run(model, given), expected, strict=True):
                # Integers are the same ones or far from it; what is left are float32's epilogues.
                assert_accurate(*(OpSuite.slices(t) for t in (ours, theirs.double(), theirs)))
            given["x"][0, 0, 3] = torch.nan
            for ours in run(model, given)[:2]:
                assert ours[0, 0].isnan().all() and not ours.flatten(0, 1)[1:].isnan().any()


def dropped(t: dict[str, Tensor]) -> list[Tensor]:
    ones = torch.ones_like(t["key"])
    return [attention(t["query"], t["key"], ones, None, p, scale=0.0) for p in (0.5, 1.0)]


def test_dropout_stays_random() -> None:
    inputs = {"query": torch.randn(2, 4, 5, 8), "key": torch.randn(2, 4, 8, 8)}
    module = Module(list(inputs), dropped)
    axes = {"query": {0: B}, "key": {0: B}}
    model = export(module, inputs, axes, optimize=False).model_proto.SerializeToString()
    half, nothing = run(model, inputs)
    # Each of 8 equal probabilities is 0 or doubled.
    assert torch.equal(half, (half * 4).round() / 4) and len(half.unique()) > 2
    assert not nothing.any()


def test_translations_of_every_op() -> None:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.raises(ValueError, match="opset_version must be at least 18, got 17"):
        translations(17)
    table = translations()
    names = [schema.name for schema in torch._C._jit_get_all_schemas()]
    # What writes to a cache is no operator of ONNX.
    others = ("_backward", "_path", "_capability", "_gradient", "_cached")
    forward = {n for n in names if n.startswith("fastfusion::") and not n.endswith(others)}
    assert {op._schema.name for op in table} == forward
    for opset in (18, 20, 23):
        registry = ONNXRegistry.from_torchlib(opset)
        assert all(registry.is_registered(op) for op in table)

"""The benchmark tool: its clock, its gate, its peers, its tables and its command line."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import fastfusion as ff
from fastfusion.benchmarks.__main__ import main
from fastfusion.benchmarks.common import gate, peers, shapes
from fastfusion.benchmarks.common.results import Goal
from fastfusion.benchmarks.common.timing import Spread
from fastfusion.benchmarks.cpu import cells as ops
from fastfusion.benchmarks.cpu import (
    compiled,
    exported,
    layer_goals,
    layers,
    libraries,
    models,
    narrow,
    overhead,
    results,
    roofline,
    runtimes,
    timing,
)
from fastfusion.benchmarks.cpu import goals as cpu_goals
from fastfusion.benchmarks.cpu.results import Row
from fastfusion.benchmarks.cpu.settings import Settings

SMALL = ["--shape", "lxmert_text_to_image", "--rounds", "1", "--quick", "--peers", "sdpa,unfused"]
ONCE = Settings(rounds=1, min_time=0.0, peers=("sdpa", "two sdpa", "unfused", "reference"))


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    """The command sets torch's threads; other tests of this process keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- timing


def test_calls_take_turns_in_rotating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(timing, "autorange", lambda call, min_time: 1)
    calls: dict[str, Callable[[], object]] = {
        "a": lambda: order.append("a"),
        "b": lambda: order.append("b"),
        "c": lambda: order.append("c"),
    }
    measured = timing.measure(calls, rounds=4, min_time=0.0)
    assert "".join(order) == "abcbcacababc"
    assert {name: len(samples) for name, samples in measured.samples.items()} == dict.fromkeys(
        "abc", 4
    )


def test_a_ratio_is_taken_within_a_round() -> None:
    # The machine slows down by a factor of 100: the ratio does not notice.
    samples = {"ours": [1.0, 10.0, 100.0], "peer": [2.0, 20.0, 200.0]}
    measured = timing.Measurement(samples, {"ours": 1, "peer": 1})
    assert measured.ratio("peer", "ours") == Spread(2.0, 2.0, 2.0)
    assert measured.time("ours").median == 10.0


def test_fast_calls_run_in_a_loop() -> None:
    loops = timing.autorange(lambda: None, min_time=1e-3)
    assert loops > 100
    assert timing.time_loop(lambda: None, loops) > 0


def test_garbage_collection_comes_back_after_an_error() -> None:
    import gc

    def fail() -> None:
        if not gc.isenabled():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.measure({"fail": fail}, rounds=1, min_time=0.0)
    assert gc.isenabled()


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds"):
        timing.measure({"a": lambda: None}, rounds=0, min_time=0.0)


# ---- the gate


def results_with_error(relative: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact values, and values with this relative error in the last head only."""
    exact = torch.randn(2, 3, 8, 4, dtype=torch.float64)
    wrong = exact.clone()
    wrong[1, 2] += relative * exact[1, 2].norm() / exact[1, 2].numel() ** 0.5
    return exact, wrong.float()


def test_gate_allows_twice_the_error_of_the_plain_formula() -> None:
    exact, plain = results_with_error(1e-3)
    _, close = exact, exact + 1.9 * (plain.double() - exact)
    _, far = exact, exact + 2.1 * (plain.double() - exact)
    assert gate.verdict([close.float()], [exact], [plain]) is None
    assert "relative error 2.1e-03, allowed 2.0e-03" in str(
        gate.verdict([far.float()], [exact], [plain])
    )


def test_gate_grants_epsilon() -> None:
    exact, nearly = results_with_error(0.9 * torch.finfo(torch.float32).eps)
    assert gate.verdict([nearly], [exact], [exact]) is None


def test_gate_takes_the_largest_error_of_plain_gradients() -> None:
    exact, plain = results_with_error(1e-3)
    elsewhere = exact.clone()
    elsewhere[0, 0] *= 1 + 1e-3
    assert gate.verdict([elsewhere.float()], [exact], [plain]) is not None
    assert gate.verdict([elsewhere.float()], [exact], [plain], gradients=True) is None
    far = exact + 2.1 * (plain.double() - exact)
    assert gate.verdict([far.float()], [exact], [plain], gradients=True) is not None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_gate_refuses_what_is_no_number(poison: float) -> None:
    exact, plain = results_with_error(1e-6)
    broken = plain.clone()
    broken[0, 0, 0, 0] = poison
    assert gate.verdict([broken], [exact], [plain]) is not None


def test_gate_refuses_other_shapes_and_counts() -> None:
    exact, plain = results_with_error(1e-6)
    assert "shape" in str(gate.verdict([plain[:1]], [exact], [plain]))
    assert "1 results instead of 2" in str(gate.verdict([plain], [exact, exact], [plain, plain]))


def test_gate_takes_zero_for_zero() -> None:
    zero = torch.zeros(1, 1, 2, 2)
    assert gate.verdict([zero], [zero.double()], [zero]) is None
    assert gate.verdict([zero + 1e-6], [zero.double()], [zero]) is not None


def test_gate_of_narrow_weights_takes_the_cosine_of_each_token() -> None:
    exact = torch.randn(2, 3, 64, dtype=torch.float64)
    assert gate.verdict_of_cosine([3 * exact.float()], [exact]) is None
    one_wrong = exact.clone()
    one_wrong[1, 2] += 0.1 * torch.randn(64, dtype=torch.float64)
    assert "a token has cosine 0.99" in str(gate.verdict_of_cosine([one_wrong], [exact]))
    assert gate.least_cosine([one_wrong], [exact]) < gate.LEAST_COSINE
    one_wrong[1, 2, 0] = torch.nan
    assert gate.verdict_of_cosine([one_wrong], [exact]) is not None
    assert "shape" in str(gate.verdict_of_cosine([exact[:1]], [exact]))


# ---- shapes and peers


@pytest.mark.parametrize("suite", ops.SUITES)
def test_every_shape_has_inputs_and_a_cost(suite: str) -> None:
    op = ops.spec(ops.SUITES[suite].op)
    for shape in shapes.select(ops.SUITES[suite].group):
        flops, moved = op.cost(shape, torch.float32)
        assert flops > 0
        assert moved > 0
        small = {**shape, "q_len": 3, "kv_len": 5}
        op.check(op.arguments(**op.inputs(small, torch.float32, "cpu", 0)))


def test_names_of_shapes_are_unique() -> None:
    names = [shape["name"] for group in shapes.load().values() for shape in group]
    assert len(names) == len(set(names))


BASE = {"name": "small", "batch": 2, "heads": 4, "q_len": 5, "kv_len": 8, "head_dim": 4}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mask": "key_padding"},
        {"mask": "bool"},
        {"mask": "bias"},
        {"causal": True},
        {"causal": True, "mask": "key_padding"},
        {"kv_heads": 2, "value_dim": 6},
    ],
    ids=lambda change: "-".join(map(str, change.values())) or "plain",
)
def test_every_implementation_agrees(change: dict[str, Any], backward: bool) -> None:
    row = ops.run_shape("attention", BASE | change, replace(ONCE, backward=backward))
    assert row.problems == {}
    assert {"fastfusion", "sdpa", "unfused"} <= set(row.times)
    assert set(row.ratios) == set(row.times) - {"fastfusion"}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mask", [None, "both_padding"])
def test_both_directions_agree(mask: str | None, backward: bool) -> None:
    shape = BASE | {"mask": mask}
    row = ops.run_shape("bidirectional", shape, replace(ONCE, backward=backward))
    assert row.problems == {}
    assert {"fastfusion", "two sdpa", "unfused"} <= set(row.times)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("group", layers.GROUPS)
def test_layers_agree(group: str, backward: bool) -> None:
    shape = {
        "name": "small", "batch": 2, "length": 4, "q_len": 4, "kv_len": 6, "dim": 16,
        "context_dim": 24, "heads": 2, "ffn": 32,
    }  # fmt: skip
    settings = Settings(rounds=1, min_time=0.0, backward=backward)
    row = layers.run_shape(group, shape, settings)
    assert row.problems == {}
    assert set(row.times) == {"fastfusion", "torch.nn"} | (set() if backward else {"no fast path"})
    assert torch.backends.mha.get_fastpath_enabled()


WIDE = {
    "name": "small", "batch": 2, "length": 4, "q_len": 4, "kv_len": 6, "dim": 64,
    "context_dim": 96, "heads": 2, "ffn": 128,
}  # fmt: skip
NARROW = {"bf16": "bf16w", "int8": "int8"}


@pytest.mark.parametrize("weights", NARROW)
@pytest.mark.parametrize("group", layers.GROUPS)
def test_layers_with_narrow_weights_agree(group: str, weights: str) -> None:
    made = layers.run_shape(group, WIDE, Settings(rounds=1, min_time=0.0, weights=weights))
    assert made.problems == {}
    assert made.dtype == NARROW[weights] and made.path == f"4/4 {weights}"
    more = {"torch.nn bfloat16"} if weights == "bf16" else set()
    assert set(made.times) == {"fastfusion", "torch.nn"} | more == set(made.cosines)
    assert min(made.cosines.values()) >= gate.LEAST_COSINE
    assert set(made.skipped) == {*exported.RUNTIMES, layers.FROZEN}
    assert made.flops is not None and made.flops > made.float_flops > 0


@pytest.mark.parametrize("weights", NARROW)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_linear_with_narrow_weights_agrees(weights: str, activation: str | None) -> None:
    shape = {
        "name": "small", "batch": 2, "length": 3, "width": 64, "features": 96,
        "activation": activation, "residual": activation is None,
    }  # fmt: skip
    made = ops.run_shape("linear", shape, Settings(rounds=1, min_time=0.0, weights=weights))
    assert made.problems == {} == made.skipped
    assert {"fastfusion", "torch", *narrow.LINEAR[weights]} <= set(made.times)
    assert made.cosines.keys() == made.times.keys()


def test_narrow_weights_that_are_wrong_print_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    quantize = ff.quantize

    def wrong(module: Any, weights: str) -> Any:
        report = quantize(module, weights)
        module.linear2.weight_scale[:8] *= 2
        return report

    monkeypatch.setattr(ff, "quantize", wrong)
    settings = Settings(rounds=1, min_time=0.0, weights="int8", peers=("torch.nn",))
    made = layers.run_shape("encoder_layer", WIDE, settings)
    assert (
        made.times == {} and "WRONG, so not timed: a token has cos" in made.problems["fastfusion"]
    )


def test_a_layer_without_narrow_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no layer takes int8 weights"):
        layers.narrow(torch.nn.TransformerEncoderLayer(16, 2, 32), "int8")


@pytest.mark.parametrize("weights", [None, *NARROW])
@pytest.mark.parametrize("name", exported.RUNTIMES)
def test_runtimes_of_layers_agree_or_say_why_not(name: str, weights: str | None) -> None:
    settings = Settings(rounds=1, min_time=0.0, weights=weights, peers=(name,))
    group = "encoder_layer" if weights == "int8" else "cross_attention"
    made = layers.run_shape(group, WIDE, settings)
    assert made.problems == {}
    assert (name in made.times) != (name in made.skipped)
    if name in made.skipped:
        assert made.skipped[name].startswith(("not installed", "has no bfloat16"))


def test_runtimes_of_layers_take_what_they_can() -> None:
    def reason(peer: str, name: str = exported.SOME[0], **given: Any) -> str:
        return str(layers.left_out(peer, {"name": name}, Settings(**given)))

    assert reason("litert") == "None" == reason("litert", weights="int8")
    assert "takes seconds per shape" in reason("litert", "tiny_4")
    assert reason("litert", "tiny_4", peers=("litert",)) == "None"
    assert "float32" in reason("litert", dtype=torch.bfloat16)
    assert "gradients" in reason("litert", backward=True)
    assert "--peers" in reason(layers.FROZEN)
    assert reason(layers.FROZEN, peers=(layers.FROZEN,), dtype=torch.bfloat16) == "None"
    known = {shape["name"] for group in layers.GROUPS for shape in shapes.select(group)}
    assert set(exported.SOME) <= known


def test_a_frozen_layer_agrees() -> None:
    settings = Settings(rounds=1, min_time=0.0, weights="bf16", peers=(layers.FROZEN,))
    made = layers.run_shape("encoder_layer", WIDE, settings)
    assert made.problems == {} == made.skipped
    assert layers.FROZEN in made.times
    assert torch.backends.mha.get_fastpath_enabled()


def test_mask_and_padding_combine() -> None:
    padding = torch.tensor([[False, True]])
    allowed = torch.tensor([[True, True], [False, True]])
    both = peers.attend_mask({"attn_mask": allowed, "key_padding_mask": padding})
    assert both is not None
    assert both.tolist() == [[[[True, False], [False, False]]]]
    added = peers.attend_mask({"attn_mask": torch.ones(2, 2), "key_padding_mask": padding})
    assert added is not None
    assert added.tolist() == [[[[1.0, -torch.inf]] * 2]]


@pytest.mark.parametrize("bias", [None, 0.5], ids=["bool", "bias"])
def test_sdpa_is_never_given_a_mask_beside_is_causal(bias: float | None) -> None:
    """torch refuses that from 2.14 on: the peers work causality into the mask."""
    query = torch.ones(1, 1, 3, 4)
    call = {"query": query, "key": query, "value": query, "is_causal": True}
    assert peers.mask_or_causal(call) == (None, True)
    call["key_padding_mask"] = torch.tensor([[True, False, False]])
    call |= {} if bias is None else {"attn_mask": torch.full((3, 3), bias)}
    mask, causal = peers.mask_or_causal(call)
    assert mask is not None and not causal
    shown = mask if bias is None else mask == bias
    assert shown.tolist() == [[[[False, False, False], [False, True, False], [False, True, True]]]]
    assert torch.equal(peers.sdpa(call)(), peers.sdpa_math(call)())


# ---- wrong and broken implementations


def test_a_wrong_result_prints_no_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ff.scaled_dot_product_attention

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **kwargs) * 1.001

    monkeypatch.setattr(ff, "scaled_dot_product_attention", wrong)
    monkeypatch.setitem(ff.ops.FUNCTIONS, wrong, ops.spec("scaled_dot_product_attention"))
    assert main(["attention", *SMALL]) == 1
    output = capsys.readouterr().out
    assert "fastfusion: WRONG, so not timed: result 0 has relative error" in output
    assert "no time" in output


def test_a_peer_that_crashes_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> None:
        raise RuntimeError("no kernel image\nand a long story")

    suite = ops.SUITES["attention"]
    monkeypatch.setitem(suite.others, "broken", lambda call: crash)
    settings = replace(ONCE, peers=("sdpa", "broken"))
    row = ops.run_shape("attention", BASE, settings)
    assert row.problems == {"broken": "ERROR: RuntimeError: no kernel image"}
    assert "sdpa" in row.times


# ---- tables


def row(name: str, ratio: float, spread: float = 0.0) -> Row:
    made = Row("attention", {"name": name}, "float32", False)
    made.times["fastfusion"] = Spread(1e-5, 1e-5, 1e-5)
    made.ratios["sdpa"] = Spread(ratio, ratio - spread, ratio + spread)
    return made


def test_lost_cells_come_first_and_wrong_ones_before_them() -> None:
    broken = Row("attention", {"name": "broken"}, "float32", False)
    broken.problems["fastfusion"] = "WRONG"
    rows = [row("won", 2.0), row("lost", 0.5), broken, row("draw", 0.99, 0.05)]
    lines = results.table(rows).splitlines()
    assert "broken" in lines[1]
    assert "WRONG" in lines[2]
    assert [line.split()[0] for line in lines[3:6]] == ["LOST", "draw", "won"]
    assert "geometric mean 1.00 over 3 shape(s), lost 1" in lines[6]


def test_our_reference_is_no_peer() -> None:
    made = row("name", 2.0)
    made.ratios["reference"] = Spread(0.1, 0.1, 0.1)
    assert made.hardest().median == 2.0


def test_a_goal_says_whether_it_is_met() -> None:
    reached = Goal("call", 5.0, 6.0, at_most=True, unit=" us")
    assert str(reached) == "met           call: 5.00 us (goal <= 6 us)"
    missed = Goal("SDPA", 1.25, 2.0, detail="3 shapes")
    assert str(missed) == "MISSED        SDPA: 1.25x (goal >= 2x); 3 shapes"
    assert missed.met is False and Goal("SDPA", None, 2.0).met is None


# ---- goals


def test_goals_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every section, on the shapes of next to no work."""
    monkeypatch.setattr(cpu_goals, "memory", lambda: [])
    sections = dict(cpu_goals.run(rounds=1, min_time=0.0, most=1e7))
    assert len(sections) == 14
    for about, goals in sections.items():
        assert goals, about
        assert all(goal.value is None or goal.value > 0 for goal in goals), about
    unmeasured = [g.name for goals in sections.values() for g in goals if g.value is None]
    assert len([name for name in unmeasured if "OpenVINO" not in name]) == 6


def test_goals_of_layers_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every section, on small layers."""
    names = iter(exported.SOME)
    some = [("encoder_layer", WIDE | {"name": next(names)}) for _ in range(4)]
    some.append(("cross_attention", WIDE | {"name": next(names)}))

    def select(group: str, name: str) -> list[Any]:
        return [shape for kind, shape in some if kind == group and shape["name"] in (name, "all")]

    tiny = shapes.select("encoder_layer", "tiny_4")
    monkeypatch.setattr(
        layer_goals.shapes, "select",
        lambda group, name: tiny if name == "tiny_4" else select(group, name),
    )  # fmt: skip
    monkeypatch.setattr(layer_goals, "memory", lambda: [])
    monkeypatch.setattr(layer_goals, "threads", lambda effort, module: [])
    effort = cpu_goals.Effort(rounds=1, min_time=0.0, most=1e8)
    machine = roofline.Machine(dict.fromkeys(("float32", "bfloat16", "int8"), 1e12), 1e10)
    sections = dict(layer_goals.run(effort, machine))
    assert len(sections) == 16
    found = {f"{about}: {goal.name}": goal for about, some in sections.items() for goal in some}
    unmeasured = [name for name, goal in found.items() if goal.value is None]
    without = ("tokens, 768", "best peer", "beside transformers")  # which need not be installed
    assert all(any(about in name for about in without) for name in unmeasured), unmeasured
    assert found["layers, int8: torch.nn in float32, 20 tokens"].limit == 8
    for name, goal in found.items():
        if "same bits" in name or "answers lost" in name or "lowest cosine" in name:
            assert goal.met, str(goal)


# ---- overhead


def test_overhead_measures_every_number() -> None:
    goals = overhead.run(rounds=1, min_time=0.0)
    assert len(goals) == 5
    assert all(goal.value and goal.value > 0 for goal in goals[:4])


def test_import_stays_light() -> None:
    seconds, modules = overhead.time_import(repeats=1)
    assert seconds > 0
    assert "fastfusion.ops" in modules
    assert overhead.heavy(modules) == []


def test_heavy_packages_are_found() -> None:
    assert overhead.heavy({"fastfusion", "triton", "onnx"}) == ["triton", "onnx"]


# ---- peers that are optional


@pytest.mark.parametrize("name", [*runtimes.ALL, *libraries.ALL])
def test_optional_peers_agree_or_say_why_not(name: str) -> None:
    """Where a package is missing, it is skipped with a reason; where it is there, it is right."""
    for change in ({}, {"mask": "key_padding"}, {"mask": "bias"}, {"causal": True}):
        settings = replace(ONCE, peers=(name,))
        made = ops.run_shape("attention", BASE | change, settings)
        assert made.problems == {}
        assert (name in made.times) != (name in made.skipped)
        if name in made.skipped:
            assert "not installed" in made.skipped[name]


def test_peers_without_gradients_are_skipped() -> None:
    settings = replace(ONCE, peers=tuple(runtimes.ALL), backward=True)
    made = ops.run_shape("attention", BASE, settings)
    assert set(made.skipped.values()) == {"has no gradients"}


def test_compiled_peers_run_on_some_shapes() -> None:
    everything = Settings(rounds=1, min_time=0.0)
    reasons = [ops.left_out("attention", name, BASE, everything) for name in compiled.ALL]
    assert all("takes seconds per shape" in str(reason) for reason in reasons)
    for name in compiled.ALL:
        assert ops.left_out("attention", name, {"name": compiled.SOME[0]}, everything) is None
        assert ops.left_out("attention", name, BASE, replace(everything, peers=(name,))) is None
    known = {shape["name"] for group in shapes.load().values() for shape in group}
    assert set(compiled.SOME) <= known


def test_skipped_peers_are_below_the_table() -> None:
    made = row("won", 2.0)
    made.skipped["openvino"] = "not installed"
    last = results.table([made]).splitlines()[-1]
    assert last.strip() == "openvino: skipped for 1 shape(s): not installed"


def test_models_agree() -> None:
    shape = {
        "name": "small", "batch": 2, "regions": 5, "words": 3, "visual_dim": 16, "text_dim": 8,
        "heads": 2, "ffn": 16, "layers": 1,
    }  # fmt: skip
    made = models.run_shape(shape, Settings(rounds=1, min_time=0.0))
    assert made.problems == {}
    assert {"fastfusion", "torch.nn"} <= set(made.times)


# ---- ceilings, cold caches


def test_ceilings_are_measured() -> None:
    found = roofline.ceilings(threads=1, rounds=1)
    assert found.bandwidth > 1e8
    assert all(speed > 1e8 for speed in found.operations.values())
    assert found.peak("float16") == found.peak("float32")


def test_a_share_takes_the_lower_ceiling() -> None:
    machine = roofline.Machine({"float32": 100.0}, bandwidth=10.0)
    assert machine.share(50, 20, "float32", 4.0, cold=False) == 0.125
    assert machine.share(50, 20, "float32", 4.0, cold=True) == 0.5
    assert machine.share(50, 20, "bfloat16", 4.0, cold=True) is None
    both = roofline.Machine({"float32": 100.0, "int8": 400.0}, bandwidth=10.0)
    assert both.share(500, 20, "int8", 4.0, cold=False, float_flops=100) == 0.5


def test_cold_calls_follow_an_eviction() -> None:
    order: list[str] = []
    calls: dict[str, Callable[[], object]] = {"a": lambda: order.append("a")}
    measured = timing.measure(calls, 2, 0.0, before=lambda: order.append("-"))
    assert "".join(order[-4:]) == "-a-a"
    assert measured.loops == {"a": 1}
    made = ops.run_shape("attention", BASE, replace(ONCE, cold=True))
    assert made.cold and made.loops["sdpa"] == 1

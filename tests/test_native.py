"""The compiled part as a whole: instruction sets, threads, large strides, scratch memory."""

import os
import platform
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from checkout import ROOT, build_script

import fastfusion as ff
from fastfusion.backends import library
from fastfusion.core import torch_op

EMULATE = runpy.run_path(str(ROOT / "tests/native/emulate.py"), run_name="checks")
native = library.native
pytestmark = pytest.mark.skipif(native is None, reason="the compiled part is not built")


def inputs(q_len: int = 60, kv_len: int = 70) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, 3, n, 16) for n in (q_len, kv_len, kv_len))


class TestInstructionSets:
    def test_names(self) -> None:
        assert native is not None
        runnable, compiled = native.isas(runnable=True), native.isas()
        assert set(runnable) <= set(compiled)
        assert runnable[-1] == "scalar"
        assert native.isa() in runnable

    def test_best_is_chosen_unless_the_environment_names_one(self) -> None:
        assert native is not None
        wanted = os.environ.get("FASTFUSION_CPU_ISA")
        assert native.select_isa() == (wanted or native.isas(runnable=True)[0])

    def test_choice_changes_the_code_that_runs(self) -> None:
        assert native is not None
        lanes = {}
        for isa in native.isas(runnable=True):
            assert native.select_isa(isa) == isa == native.isa()
            lanes[isa] = native.lanes()
        wide = {"scalar": 4, "avx2": 8, "avx512": 16, "avx512bf16": 16}
        assert lanes == {isa: wide[isa] for isa in lanes}

    def test_unknown_name(self) -> None:
        assert native is not None
        before = native.isa()
        with pytest.raises(ValueError, match=r"'mmx'.*usable here:.* scalar"):
            native.select_isa("mmx")
        assert native.isa() == before

    @pytest.mark.parametrize("check", EMULATE["CHECKS"])
    @pytest.mark.parametrize("isa", native.isas(runnable=True) if native is not None else [])
    def test_parts_of_the_kernels(self, isa: str, check: str, tmp_path: Path) -> None:
        """The vector type, exponentials, products, packing and masks against scalar code."""
        compiler = build_script()["find_compiler"]()
        if compiler is None:
            pytest.skip("no C++ compiler")
        program = EMULATE["build_check"](check, compiler, platform.machine(), isa, tmp_path)
        result = subprocess.run([program], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout

    def test_results_agree(self) -> None:
        """Instruction sets differ by rounding alone; each is also tested against the reference."""
        assert native is not None
        query, key, value = inputs()
        results = []
        for isa in native.isas(runnable=True):
            native.select_isa(isa)
            results.append(ff.scaled_dot_product_attention(query, key, value, backend="cpu"))
        for result in results[1:]:
            torch.testing.assert_close(result, results[0])


def test_many_python_threads_while_the_thread_count_changes() -> None:
    tensors = [t.requires_grad_() for t in inputs(130, 300)]

    def run() -> list[torch.Tensor]:
        out = ff.scaled_dot_product_attention(*tensors, backend="cpu")
        return [out, *torch.autograd.grad(out.sum(), tensors)]

    expected, wrong, failures = run(), [], []

    def work(count: int) -> None:
        try:
            for i in range(15):
                torch.set_num_threads(1 + (i + count) % 3)
                same = [torch.equal(a, b) for a, b in zip(run(), expected, strict=True)]
                wrong.append(not all(same))
        except Exception as error:  # an exception in a thread would otherwise be lost
            failures.append(error)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    assert len(wrong) == 60 and not any(wrong)


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^30 elements apart in 4.3 GB of address space, of which a few pages are touched."""
    rows, dim, step = 3, 8, 2**30
    try:
        storage = torch.empty(2 * step + dim, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("this machine does not hand out 4.3 GB of address space")
    far = storage.as_strided((1, 1, rows, dim), (0, 0, step, 1))
    near = torch.randn(1, 1, rows, dim).bfloat16()
    far.copy_(near)
    out = ff.scaled_dot_product_attention(far, far, far, backend="cpu")
    assert torch.equal(out, ff.scaled_dot_product_attention(near, near, near, backend="cpu"))


def test_scratch_memory_is_reused_and_returned() -> None:
    """A thousand calls, and then one large one, leave no memory behind."""
    code = """
import resource, torch, fastfusion as ff
torch.set_num_threads(1)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def run(n):
    q, k, v = (torch.randn(1, 1, length, 64) for length in (10, n, n))
    ff.scaled_dot_product_attention(q.requires_grad_(), k, v, backend="cpu").sum().backward()
run(300)
before = resident()
for _ in range(1000):
    run(300)
assert resident() - before < 8 << 20, "grows by the call"
run(1 << 18)
run(300)
assert resident() - before < 24 << 20, "a large call keeps its memory"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tasks_of_a_mask_gradient(tmp_path: Path) -> None:
    """Of 3 entries with 4 heads: one for each slice, entry, head, and one where all share sums."""
    compiler = build_script()["find_compiler"]()
    if compiler is None:
        pytest.skip("no C++ compiler")
    library, program = Path(ff.__file__).parent, tmp_path / "check_tasks"
    link = [f"-L{library}", "-lfastfusion_cpu", f"-Wl,-rpath,{library}", "-o", str(program)]
    source = str(ROOT / "tests/native/check_tasks.cpp")
    command = [*compiler, "-std=c++20", "-Icsrc", source, *link]
    subprocess.run(command, cwd=ROOT, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["12", "3", "4", "1"]


def test_bad_calls_of_the_raw_ops_raise() -> None:
    """Compiled graphs call the ops without Python: what is unsafe must be refused in C++."""
    op = torch.ops.fastfusion.attention_forward.default
    query = torch.randn(2, 3, 5, 8)
    key, value = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 6)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    rest = (None, None, None, None, 0.0, False, False, None, False, None, None, None)
    bad = [
        (query[0], key, value, *rest),
        (query[..., :7], key, value, *rest),
        (query, key[:1], value, *rest),
        (query, key, value[:, :, :6], *rest),
        (query, key[:, :2], value[:, :2], *rest),
        (query, key.double(), value, *rest),
        (query.double(), key.double(), value.double(), *rest),
        (query, key, value, torch.randn(6, 7), *rest[1:]),
        (query, key, value, torch.randn(5, 7).double(), *rest[1:]),
        (query, key, value, torch.ones(5, 7, dtype=torch.int32), *rest[1:]),
        (query, key, value, None, padding[:, :6], *rest[2:]),
        (query, key, value, None, padding.float(), *rest[2:]),
        (query, key, value, *rest[:4], 0.5, *rest[5:]),
        (query, key, value, *rest[:3], torch.tensor([1.0]), 0.5, *rest[5:]),
        (query, key, value, *rest[:3], torch.tensor([1]), 1.5, *rest[5:]),
        (query, key, value, *rest[:7], float("nan"), *rest[8:]),
    ]
    for arguments in bad:
        with pytest.raises(RuntimeError, match="fastfusion"):
            op(*arguments)


def test_calls_of_python_and_cpp_are_twins() -> None:
    """The library defines its ops by itself, so that programs without Python find them."""
    seen = set()
    for op in torch_op.ALL:
        for name in ("graph", "raw", "forward", "out", "cached"):
            found = getattr(op, name, None)
            if found is not None:
                arguments = str(found._schema).partition("(")[2].rpartition(") ->")[0]
                assert arguments == op.definition.schema(writes=name == "cached"), found
                seen.add(found._schema.name.removeprefix("fastfusion::"))
    assert seen >= {"attention", "bidirectional_out", "varlen_forward", "linear_forward"}
    assert seen >= {"decoder_layer_forward", "decoder_layer_cached"}
    if ff.backends.cuda.emulated is not None:
        assert "cuda_cross_attention_layer_forward" in seen


def test_overloads_have_the_first_arguments_alone() -> None:
    """Those of calls that leave the others out; what watches ops sees the one with all of them."""
    seen = set()
    for op in torch_op.ALL:
        for whole in filter(None, (getattr(op, n, None) for n in ("raw", "out", "backward"))):
            arguments = [(a.name, str(a.type)) for a in whole._schema.arguments]
            for name in set(whole.overloadpacket.overloads()) - {"default"}:
                overload = getattr(whole.overloadpacket, name)
                short = [(a.name, str(a.type)) for a in overload._schema.arguments]
                assert short == arguments[: len(short)]
                assert all(a.has_default_value() for a in whole._schema.arguments[len(short) :])
                seen.add(str(overload).removeprefix("fastfusion."))
    for name in ("attention", "bidirectional", "varlen"):
        assert {s.split("_")[1].split(".")[0] for s in seen if s.startswith(name)} == {
            "forward", "out", "backward",
        }  # fmt: skip

    out = torch.ops.fastfusion.attention_out
    (own,) = (op for op in torch_op.ALL if getattr(op, "out", None) is out.default)
    taken = [own.runs[count] for count in (3, 4, 5, 6, -1)]
    assert taken == [getattr(out, n)._op for n in ("qkv", "masks", "masks", "default", "default")]

    query, key, value = (torch.randn(1, 2, n, 8) for n in (3, 5, 5))
    mask, hidden = torch.randn(3, 5), torch.tensor([[False, True, False, False, True]])
    for ops in (torch.ops.fastfusion.attention_out, torch.ops.fastfusion.attention_forward):
        for given in ((query, key, value), (query, key, value, mask, hidden)):
            short = ops.qkv if len(given) == 3 else ops.masks
            torch.testing.assert_close(short(*given), ops.default(*given), rtol=0, atol=0)
            torch.library.opcheck(short, given, test_utils=("test_schema", "test_faketensor"))

"""The nvcc part of `make kernels`: its rules on made-up rows, its parsers, and a real build."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from checkout import ROOT, build_script, need

from fastfusion.benchmarks.compile_gates import cuda as kernels_cuda
from fastfusion.benchmarks.compile_gates.cuda import Row, problems

GOOD = Row("attention_tile<Half, 64>", 80, 200, 0, tensor_core=64, copies=7, local_loads=0)
FLOAT8 = Row(
    "attention_tile<Half, 64, WithFloat8>", 86, 4, 0, tensor_core=0, copies=0, local_loads=0
)
EMPTY = Row("attention_tile<BFloat16, 64>", 75, 4, 0, tensor_core=0, copies=0, local_loads=0)


@pytest.mark.parametrize(
    "row",
    [
        GOOD,
        replace(GOOD, arch=75, copies=0),
        replace(GOOD, kernel="combine_chunks<Half>", tensor_core=0, copies=0),
        replace(GOOD, kernel="attention_float32<64>", tensor_core=0, copies=0),
        replace(GOOD, kernel="project<Half, 1, true, false>", copies=0),
        replace(GOOD, tensor_core=-1, copies=-1, local_loads=-1),
        EMPTY,
        FLOAT8,
    ],
    ids=["good", "Turing", "combine", "float32", "unaligned", "not counted", "empty", "8 bits"],
)
def test_a_good_build_passes(row: Row) -> None:
    assert problems(row) == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (replace(GOOD, spilled=8), "spills 8 bytes"),
        (replace(GOOD, kernel="attention_float32<64>", spilled=4), "spills 4 bytes"),
        (replace(GOOD, local_loads=2), "2 loads from local memory"),
        (replace(GOOD, tensor_core=0), "tensor-core"),
        (replace(EMPTY, registers=40), "tensor-core"),
        (replace(EMPTY, arch=80, copies=1), "tensor-core"),
        (replace(FLOAT8, arch=89, copies=1), "tensor-core"),
        (replace(GOOD, copies=0), "asynchronous copy"),
        (replace(GOOD, kernel="project<BFloat16, 1, false, true>", copies=0), "asynchronous copy"),
    ],
    ids=[
        "spill",
        "float32",
        "local",
        "no mma",
        "Turing",
        "empty Ampere",
        "empty Ada",
        "no copy",
        "aligned",
    ],
)
def test_a_bad_build_fails(row: Row, words: str) -> None:
    (problem,) = problems(row)
    assert words in problem


def test_reports_are_read() -> None:
    report = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z3onePf' for 'sm_80'
ptxas info    : Function properties for _Z3onePf
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 241 registers, used 1 barriers, 752 bytes cmem[0]
ptxas info    : Compiling entry function '_Z3twoPf' for 'sm_80'
ptxas info    : Function properties for _Z3twoPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers, 752 bytes cmem[0]
"""
    assert kernels_cuda.parse_report(report) == {"_Z3onePf": (241, 20), "_Z3twoPf": (4, 0)}
    code = """
\t\tFunction : _Z3onePf
\t.headerflags
        /*0010*/                   HMMA.16816.F32 R4, R4, R8, RZ ;   /* 0x00 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R4], [R2.64] ;
        /*0028*/                   LDGSTS.E.64 [R4], [R2.64] ;
        /*0030*/                   LDL R4, [R1] ;
        /*0040*/                   LDL.64 R4, [R1] ;
        /*0050*/                   LDG.E R4, [R2.64] ;
\t\tFunction : _Z3twoPf
"""
    assert kernels_cuda.parse_code(code) == {
        "_Z3onePf": {"tensor_core": 1, "copies": 1, "local_loads": 2, "flops": 683},
        "_Z3twoPf": {"tensor_core": 0, "copies": 0, "local_loads": 0, "flops": 0},
    }


def test_names_are_short() -> None:
    for name, short in (
        ("void ff::cuda::(anonymous namespace)::tile<ff::cuda::Half, 64>(ff::Call, long)",
         "tile<Half, 64>"),
        ("void ff::cuda::(anonymous namespace)::float32::tile<ff::cuda::(anonymous namespace)"
         "::float32::Config<8, 256> >(ff::Call)", "tile<Config<8, 256>>"),
        ("copy(float*)", "copy"),
    ):  # fmt: skip
        assert kernels_cuda.short_name(name) == short


KERNEL = """
#include "cuda/device.h"
namespace ff::cuda {
template <class T>
FF_KERNEL(32) multiply(const void* in, float* out) {
  Shared shared;
  T* tile = shared.take<T>(256);
  copy_async16(tile + 8 * lane_index(), in, true);
  commit_copies();
  wait_copies<0>();
  barrier();
  uint32_t a[4];
  float c[4] = {};
  load_matrix4(a, tile + 8 * lane_index());
  mma<T>(c, a, a[0], a[1]);
  for (int i = 0; i < 4; ++i) out[4 * lane_index() + i] = c[i];
}
template __global__ void multiply<Half>(const void*, float*);
}  // namespace ff::cuda
"""


def test_a_kernel_is_built(tmp_path: Path) -> None:
    build = build_script()
    if build["find_nvcc"]() is None:
        pytest.skip("nvcc was not found")
    source = tmp_path / "multiply.cu"
    source.write_text(KERNEL)
    command = [*build["find_nvcc"](), *build["NVCC_FLAGS"]]
    disassembler = kernels_cuda.find_disassembler()
    rows: list[Row] = []
    for found in kernels_cuda.compile_all(command, [str(source)], [75, 80], disassembler, 2):
        rows += found
    assert [(row.kernel, row.arch) for row in rows] == [("multiply<Half>", a) for a in (75, 80)]
    assert not any(map(problems, rows))
    if disassembler is not None:
        assert [(row.tensor_core, row.copies) for row in rows] == [(2, 0), (1, 1)]
        # Two halves of a product on Turing are one on Ampere, among 10 to 100 other instructions.
        assert all(16 * 8 * 16 * 2 / 100 < row.flops < 16 * 8 * 16 * 2 / 10 for row in rows)
    path = tmp_path / "table.json"
    kernels_cuda.write_json(path, rows, "13.0")
    document = json.loads(path.read_text())
    assert len(document["columns"]) == len(document["rows"][0]) and len(document["rows"]) == 2
    assert "multiply<Half>" in kernels_cuda.table(rows)
    assert "0 failed" in kernels_cuda.summary(rows, 1.0, "13.0")


def test_without_nvcc_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need("csrc/cuda")
    monkeypatch.setenv("NVCC", "/nonexistent/nvcc")
    assert kernels_cuda.main([]) == 0
    assert capsys.readouterr().out == "CUDA kernels left out: nvcc was not found\n"


def test_the_committed_table_is_green() -> None:
    """And holds what is compiled: every kernel for every architecture."""
    need("benchmarks/results")
    document = json.loads((ROOT / "benchmarks/results/kernels-cuda.json").read_text())
    archs = {f"sm_{arch}" for arch in build_script()["CUDA_ARCHS"]}
    kernels = {row[0] for row in document["rows"]}
    assert len(document["rows"]) == len(kernels) * len(archs)
    for kernel, arch, registers, spilled, *counts in document["rows"]:
        assert arch in archs
        known = (-1 if count is None else count for count in counts)
        assert not problems(Row(kernel, int(arch[3:]), registers, spilled, *known))

"""Tensor-core FLOPs for each instruction, from machine code as cuobjdump writes it."""

import pytest

from fastfusion.benchmarks.compile_gates.tensor_core import flops_per_instruction

WARP = "HMMA.16816.F32.BF16 R4, R4, R8, R4"
GROUP = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24"
BLOCK = "UTCHMMA gdesc[UR6], gdesc[UR8], tmem[UR32], tmem[UR18], idesc[UR19], !UPT"
# 128 x 64 outputs of bfloat16, and of tf32 with half the depth.
BFLOAT16, TF32 = "UMOV UR19, 0x8100490", "UMOV UR19, 0x8100910"


def listing(*instructions: str) -> str:
    """Each at its address, 16 bytes behind the one before."""
    lines = (f"        /*{16 * i:04x}*/          {text} ;" for i, text in enumerate(instructions))
    return "\t\tFunction : kernel\n" + "\n".join(f"{line}   /* 0x00ff */" for line in lines)


@pytest.mark.parametrize(
    ("instructions", "warps", "flops"),
    [
        ((WARP, "IADD R0, R0, R1", "NOP", "EXIT"), 4, 16 * 8 * 16 * 2 / 4),
        (("HMMA.1688.F32.TF32 R4, R4, R8, RZ", "EXIT"), 1, 16 * 8 * 8 * 2 / 2),
        (("IMMA.16832.S8.S8 R4, R4.ROW, R8.COL, RZ", "EXIT"), 1, 16 * 8 * 32 * 2 / 2),
        # Four warps issue one and the same; one thread issues what serves all warps.
        ((GROUP, "EXIT"), 8, 64 * 64 * 16 * 2 / 4 / 2),
        ((BFLOAT16, BLOCK, "NOP", "EXIT"), 8, 128 * 64 * 16 * 2 / 8 / 4),
        ((TF32, BLOCK, "NOP", "EXIT"), 4, 128 * 64 * 8 * 2 / 4 / 4),
        (("HFMA2.MMA R7, -RZ, RZ, 0, 0", "EXIT"), 4, 0),
        ((), 4, 0),
    ],
)
def test_kernels_without_loops(instructions: tuple[str, ...], warps: int, flops: float) -> None:
    assert flops_per_instruction(listing(*instructions), warps) == flops


def test_what_is_not_known_is_not_guessed() -> None:
    assert flops_per_instruction(listing(BLOCK, "EXIT")) is None
    assert flops_per_instruction(listing("@P0 DMMA.884 R4, R4, R8, R4", "EXIT")) is None


def test_loops_are_found() -> None:
    """The inner loop with products and its wait behind the exit: 8 instructions. Neither the loop
    around it counts, nor one that only adds, nor the jump at the end to itself."""
    code = listing(
        "NOP",
        "IADD R0, R0, R1",  # 0x10: both loops around
        WARP,  # 0x20: the inner loop
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5",
        "@!P0 BRA 0xd0",
        "IADD R2, R2, R3",
        "@P1 BRA 0x20",
        "HMMA.1688.F32 R4, R4, R8, R4",
        "BRA.U UP2, 0x10",
        "IADD R0, R0, R1",  # 0x90: a loop without products
        "@P1 BRA 0x90",
        "EXIT",
        "NOP",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5",  # 0xd0
        "@!P0 BRA 0xd0",
        "BRA 0x50",
        "BRA 0x100",
    )
    assert flops_per_instruction(code) == 16 * 8 * 16 * 2 / 8


def test_several_loops_count_together() -> None:
    loop = (WARP, "NOP", "@P0 BRA {}", "NOP", WARP, WARP, "@P0 BRA {}", "EXIT")
    code = listing(*loop).replace("{}", "0x0", 1).replace("{}", "0x40")
    assert flops_per_instruction(code) == 3 * 4096 / 6

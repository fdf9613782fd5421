"""`export_mode`: programs for those who know no op of ours."""

from collections.abc import Iterator
from contextlib import contextmanager

# A module global, as the backend of `use_backend` is, and for the same reason.
_on = False


@contextmanager
def export_mode() -> Iterator[None]:
    """Run every op, module and accelerated layer in the block as plain torch: what `torch.export`,
    `torch.compile` or `torch.jit.trace` traces there holds no op of fastfusion.

        with fastfusion.export_mode():
            program = torch.export.export(model, inputs)

    For targets that know torch's operators alone, such as ExecuTorch and LiteRT. Results are those
    of the reference, rows without keys included: 0. Weights that are narrower than the inputs are
    widened in every call: accelerate for such targets without `weights`.

    It holds against `backend=` and `use_backend`, is global to the process and restored at the end
    of the block. Programs for torch itself, AOTInductor's included, are the faster ones without it.
    """
    global _on
    before, _on = _on, True
    try:
        yield
    finally:
        _on = before


def is_plain() -> bool:
    """Whether `export_mode` is on."""
    return _on

"""The command ``python -m fastfusion bench``: is it faster, for which shapes, by how much?"""

import argparse
import os
import sys

import torch

from .common.command import UsageError
from .cpu.command import parse
from .cpu.run import output, run, run_pinned


def on_gpu(options: argparse.Namespace) -> int:
    """Hands over to what `make gpu` times."""
    if not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch sees no GPU; leave it out to time the CPU, or install a CUDA "
            "build of torch and the GPU's driver"
        )
    from .gpu.run import main as gpu

    words = ["--steps", "bench", "--dtypes", options.dtype]
    words += ["--suite", options.suite] if options.suite else []
    words += ["--shape", options.shape] if options.shape else []
    words += ["--cold"] if options.cold else []
    words += ["--quick"] if options.quick else []
    return gpu(words)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line ``argv`` and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["distributed"]:
        from .cpu.ranks import main as ranks

        return ranks(argv[1:])
    try:
        options = parse(argv)
        if options.device == "cuda":
            return on_gpu(options)
        pinned = os.environ.get("OMP_PROC_BIND") == "true"
        alone = len(options.counts) == 1 and (pinned or options.counts == [1])
        code, document = run(options) if alone else run_pinned(argv, options)
        output(options, document, argv)
    except (UsageError, ValueError) as error:
        print(f"python -m fastfusion bench: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``python -m fastfusion info | demo | train | fit | bench | ...``."""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16", "float64")
# fastfusion.applications.TRAINED and fastfusion.models.BUILDERS, without importing them.
TRAINED = ("vqa", "retrieval", "captioning", "sentiment", "diagnosis")
FITTED = ("vqa", "retrieval", "sentiment", "captioning")
PRECISIONS = ("float32", "bf16", "int8")
DEMOS = (*TRAINED, "whisper", "minilm")
OPS = ("scaled_dot_product_attention", "bidirectional_attention", "varlen_attention")


_FIRST = """\
fastfusion: fused attention, and the layers and models around it

  python -m fastfusion info                     what this machine can run, and why not more
  python -m fastfusion demo                     a trained model beside stock torch, with a picture
  python -m fastfusion bench layers             this machine's times beside torch.nn's
  python -m fastfusion explain --q 20 --k 36    which kernel a call would take
  python -m fastfusion accelerate SCRIPT.py     your script with its models made faster
  python -m fastfusion fit --budget-ms 5        a model that answers within 5 ms here

In code: `import fastfusion.nn as nn` in place of `torch.nn`, or `fastfusion.accelerate(model)`.
`python -m fastfusion --help` lists all commands, and COMMAND --help what each takes."""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastfusion", description="Fused attention for multimodal transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="versions, devices, backends, and why one is missing")
    info.add_argument("--json", action="store_true", help="as a JSON object")

    demo = commands.add_parser("demo", help="real models, beside stock torch and transformers")
    demo.add_argument(
        "model",
        nargs="?",
        choices=DEMOS,
        default=DEMOS[0],
        help="vqa answers questions about images (default), retrieval finds emoji by words and "
        "words by emoji, captioning writes about images, sentiment judges what words, voice and "
        "face say, diagnosis weighs a picture and a report (both drawn ones), whisper transcribes "
        "speech, minilm embeds sentences",
    )
    demo.add_argument("--output", type=Path, help="the picture of a model that ships")
    demo.add_argument("--checkpoint", type=Path, help="of that model; default: the one that ships")
    demo.add_argument(
        "--page",
        type=Path,
        help="write a page with the attention of every layer and head, too",
    )
    demo.add_argument(
        "--clips", type=Path, help="a folder of .wav files for whisper; default: Debian's voice"
    )
    demo.add_argument(
        "--rounds", type=_positive, help="in which whisper's or minilm's times are taken"
    )
    demo.add_argument("--threads", type=_positive, help="default: what torch chooses")

    train = commands.add_parser("train", help="make the checkpoint of a demo")
    train.add_argument("model", nargs="?", choices=TRAINED, default=TRAINED[0])
    train.add_argument("--output", type=Path, help="default: NAME.safetensors here")
    train.add_argument("--epochs", type=_positive)
    train.add_argument("--batch-size", type=_positive, help="pictures, each with some texts")
    train.add_argument("--lr", type=float)
    train.add_argument("--seed", type=int)
    train.add_argument("--threads", type=_positive, help="default: what torch chooses")
    train.add_argument("--limit", type=_positive, help="use so many examples of each split only")
    train.add_argument(
        "--baseline-only", action="store_true", help="only the baseline that sees less"
    )
    train.add_argument(
        "--data",
        type=Path,
        help="of vqa: VQA v2.0, its official files and features/ of its images; of retrieval: the "
        "packages that its training names",
    )
    train.add_argument("--resume", action="store_true", help="go on from OUTPUT.state")
    train.add_argument(
        "--distributed",
        action="store_true",
        help="share every batch among the processes that torchrun has started: torchrun "
        "--nproc-per-node 2 -m fastfusion train NAME --distributed",
    )
    train.add_argument(
        "--parts", type=_positive, help="of a batch; default: as many as processes, 1 of one"
    )
    train.add_argument(
        "--timeout", type=_positive, default=300, help="seconds that processes wait for another"
    )
    train.add_argument(
        "--log",
        action="append",
        default=[],
        help="tensorboard:FOLDER, wandb:PROJECT or wandb-offline:PROJECT",
    )

    accelerate = commands.add_parser(
        "accelerate",
        help="run a script with every model that it builds accelerated, without editing it",
        usage="python -m fastfusion accelerate [--weights {bf16,int8}] [--check] SCRIPT.py ...",
    )
    accelerate.add_argument(
        "--weights", choices=("bf16", "int8"), help="make the weights of linear layers narrower"
    )
    accelerate.add_argument(
        "--check",
        action="store_true",
        help="prove on the inputs of its first call that each model computes the same",
    )
    accelerate.add_argument("script", type=Path, metavar="SCRIPT.py")
    accelerate.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="of the script"
    )

    # Its options are those of fastfusion.benchmarks, which main() hands over to.
    commands.add_parser("bench", help="time the ops beside their peers", add_help=False)

    # Likewise those of fastfusion.benchmarks.cpu.accelerated.
    commands.add_parser("models", help="what accelerate does to whole models", add_help=False)

    fit = commands.add_parser("fit", help="find a model that answers within a latency here")
    fit.add_argument("model", nargs="?", choices=FITTED, default=FITTED[0])
    fit.add_argument("--budget-ms", type=float, required=True, help="for one call")
    fit.add_argument("--visual-len", type=_positive, default=36, help="visual tokens")
    fit.add_argument("--text-len", type=_positive, default=20, help="words")
    fit.add_argument("--batch", type=_positive, default=1)
    fit.add_argument("--classes", type=_positive, default=1000, help="or words of a vocabulary")
    fit.add_argument(
        "--precision", choices=PRECISIONS, action="append", help="default: all that there are"
    )
    fit.add_argument("--threads", type=_positive, default=1)
    fit.add_argument("--output", type=Path, default=Path("fit.json"))

    explain = commands.add_parser("explain", help="which implementation a call would take, and why")
    explain.add_argument("--op", choices=OPS, default=OPS[0])
    explain.add_argument("--batch", type=_positive, default=1)
    explain.add_argument("--heads", type=_positive, default=12)
    explain.add_argument("--q", type=_positive, default=20, help="length of the queries")
    explain.add_argument("--k", type=_positive, default=36, help="length of the keys")
    explain.add_argument("--dim", type=_positive, default=64, help="width of a head")
    explain.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    explain.add_argument("--device", default="cpu")
    explain.add_argument("--gradient", action="store_true", help="inputs that require a gradient")
    return parser


def _explain(arguments: argparse.Namespace) -> object:
    import torch

    import fastfusion as ff

    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(
            f"--device {arguments.device}: {first_line}; leave it out for the CPU"
        ) from None

    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(
            shape,
            dtype=getattr(torch, arguments.dtype),
            device=arguments.device,
            requires_grad=arguments.gradient,
        )

    batch, heads, dim, q, k = (getattr(arguments, n) for n in ("batch", "heads", "dim", "q", "k"))
    if arguments.op == "varlen_attention":
        ends = torch.arange(batch + 1, dtype=torch.int32, device=arguments.device)
        packed_q, packed_k = tensor(batch * q, heads, dim), tensor(batch * k, heads, dim)
        return ff.explain(
            ff.varlen_attention, packed_q, packed_k, packed_k, ends * q, ends * k, q, k
        )
    query, key = tensor(batch, heads, q, dim), tensor(batch, heads, k, dim)
    if arguments.op == "bidirectional_attention":
        return ff.explain(ff.bidirectional_attention, query, key, key, query)
    return ff.explain(ff.scaled_dot_product_attention, query, key, key)


def _train(arguments: argparse.Namespace) -> None:
    from fastfusion.applications import callbacks
    from fastfusion.applications.ranks import ONE, joined
    from fastfusion.applications.training import Training

    if arguments.data is not None and arguments.model == "vqa":
        if arguments.baseline_only:
            raise ValueError("--data has no baseline")
        application = _application("vqa.official")
    else:
        application = _application(arguments.model)
    if arguments.data is not None and not hasattr(application, "FOLDER"):
        raise ValueError(f"{arguments.model} reads no folder, so --data is not for it")
    given = {
        name: getattr(arguments, name)
        for name in ("epochs", "batch_size", "lr", "seed")
        if getattr(arguments, name) is not None
    }
    with joined(arguments.timeout) if arguments.distributed else nullcontext(ONE) as ranks:
        training = Training(
            arguments.output or Path(application.CHECKPOINT.name),
            application.Settings(**given),
            baseline_only=arguments.baseline_only,
            limit=arguments.limit,
            resume=arguments.resume,
            parts=arguments.parts,
            ranks=ranks,
            callbacks=[callbacks.parse(text) for text in arguments.log if ranks.is_first],
        )
        application.train(training, *([] if arguments.data is None else [arguments.data]))


def _fit(arguments: argparse.Namespace) -> None:
    from fastfusion.fitting import Shape, show

    shape = Shape(arguments.visual_len, arguments.text_len, arguments.batch, arguments.classes)
    precisions = arguments.precision or PRECISIONS
    show(arguments.model, shape, arguments.budget_ms, arguments.output, precisions)


def _application(name: str) -> Any:
    return importlib.import_module(f"fastfusion.applications.{name}")


def _accelerate(arguments: argparse.Namespace) -> int:
    from fastfusion.acceleration.script import run

    script = arguments.script
    if not script.is_file():
        print(f"python -m fastfusion accelerate: there is no file {script}", file=sys.stderr)
        return 2
    return run(script, arguments.arguments, weights=arguments.weights, check=arguments.check)


def _demo(arguments: argparse.Namespace) -> None:
    rounds = {} if arguments.rounds is None else {"rounds": arguments.rounds}
    if arguments.model == "whisper":
        from fastfusion.applications import whisper

        whisper.show(arguments.clips, **rounds)
    elif arguments.model == "minilm":
        from fastfusion.applications import minilm

        minilm.show(**rounds)
    else:
        application = _application(arguments.model)
        application.show(arguments.output or Path(application.PICTURE), arguments.checkpoint)
        if arguments.page is not None:
            from fastfusion.plotting import attention_page

            attention_page(arguments.page, *application.example(arguments.checkpoint))
            print(f"page with the attention of every layer and head: {arguments.page.resolve()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["bench"]:
        from fastfusion.benchmarks.__main__ import main as bench

        return bench(argv[1:]) or 0
    if argv[:1] == ["models"]:
        from fastfusion.benchmarks.cpu.accelerated import main as models

        return models(argv[1:])

    if not argv:
        print(_FIRST)
        return 0
    arguments = _parser().parse_args(argv)
    if arguments.command == "accelerate":
        return _accelerate(arguments)
    if arguments.command == "info":
        import fastfusion as ff

        found = ff.info()
        print(json.dumps(asdict(found), indent=2) if arguments.json else found)
        return 0

    from fastfusion.core.extras import MissingExtra

    try:
        if arguments.command == "explain":
            print(_explain(arguments))
            return 0
        if arguments.threads:
            import torch

            torch.set_num_threads(arguments.threads)
        if arguments.command == "train":
            _train(arguments)
        elif arguments.command == "fit":
            _fit(arguments)
        else:
            _demo(arguments)
    except (MissingExtra, ValueError, OSError) as error:
        print(f"python -m fastfusion {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last epoch" if arguments.command == "train" else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

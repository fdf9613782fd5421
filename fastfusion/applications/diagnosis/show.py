"""What ``python -m fastfusion demo diagnosis`` prints, and the picture it draws."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfusion.applications.beside import compare
from fastfusion.applications.diagnosis import data
from fastfusion.applications.diagnosis.data import DIAGNOSES, Cases
from fastfusion.applications.diagnosis.evaluate import (
    accuracy,
    calibration_error,
    logits_of,
    over_words,
    region_iou,
)
from fastfusion.applications.diagnosis.model import CHECKPOINT, GRID, Checkpoint, Diagnoser
from fastfusion.applications.diagnosis.train import test_cases
from fastfusion.core.extras import check_before_work
from fastfusion.plotting import new_figure, overlay

SOME_CASES = 500  # that every variant diagnoses


def show(output: Path, checkpoint_path: Path | None = None) -> None:
    """Run the demo and write the picture to ``output``.

    Raises:
        MissingExtra: a package of the ``demo`` extra is not installed.
        ValueError: a checkpoint of another kind, or of a training of the baselines.
    """
    check_before_work(output)
    checkpoint = Checkpoint.load(checkpoint_path or CHECKPOINT)
    model = checkpoint.model
    if model is None:
        raise ValueError(f"{checkpoint_path} holds only the baselines that see one modality")
    cases = test_cases(checkpoint.vocabulary)
    with torch.inference_mode():
        _quality(checkpoint, model, cases)
        some = cases[:SOME_CASES]
        compare(
            model,
            {f"batch {n}": (cases.images[:n], cases.tokens[:n]) for n in (1, 8)},
            (cases.images[:32], cases.tokens[:32]),
            lambda each: accuracy(logits_of(each, some), some),
        )
        _picture(model, cases, output)


def example(
    checkpoint_path: Path | None = None,
) -> tuple[Diagnoser, tuple[Any, ...], Tensor, list[str]]:
    """A model, inputs of one case, its picture and the words of its report.

    Raises:
        ValueError: a checkpoint of a training of the baselines.
    """
    checkpoint = Checkpoint.load(checkpoint_path or CHECKPOINT)
    if checkpoint.model is None:
        raise ValueError(f"{checkpoint_path} holds only the baselines that see one modality")
    case = test_cases(checkpoint.vocabulary, 1)
    words = case.reports[0].split()
    inputs = (case.images, case.tokens[:, : len(words)])
    return checkpoint.model, inputs, case.images[0, 0], words


def _quality(checkpoint: Checkpoint, model: Diagnoser, cases: Cases) -> None:
    weights = sum(p.numel() for p in model.parameters())
    print(
        "A demonstration of fusion on drawn phantoms and made-up reports. Not for clinical use.\n"
        f"{len(cases):,} drawn cases, {len(DIAGNOSES)} diagnoses; each picture and each report "
        "holds a part of the evidence\n"
        f"model: VQATransformer with image stem and word embedding, {weights / 1e6:.2f} M weights\n"
    )
    logits = logits_of(model, cases)
    raw = logits * model.temperature
    print(f"right diagnoses: {accuracy(logits, cases):.2%} from picture and report")
    for name, half in (("picture", checkpoint.image_only), ("report", checkpoint.report_only)):
        share = accuracy(logits_of(half, cases), cases)
        print(f"  {share:.2%} from the {name} alone ({checkpoint.training['halves_method']})")
    print(
        f"expected calibration error: {calibration_error(logits, cases):.3f} "
        f"({calibration_error(raw, cases):.3f} before the temperature of "
        f"{model.temperature.item():.2f}, fitted to cases that are not among these)\n"
        f"the region that the words attend to and the new finding, intersection over union: "
        f"{region_iou(model, cases):.2f} (training rewards it a little)\n"
    )
    probabilities = logits[:3].softmax(dim=1)
    for i, report in enumerate(cases.reports[:3]):
        best = probabilities[i].topk(2)
        said = ", ".join(
            f"{DIAGNOSES[d]} {p:.0%}"
            for p, d in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        print(f"  {report}\n    {said} (true: {DIAGNOSES[int(cases.diagnosis[i])]})")


def _with_both_findings(cases: Cases) -> list[int]:
    """A case of each diagnosis with a new finding, with an old one too; and one of the reports that
    do not say how the complaint came."""
    unclear = [any(text in report for text in data.UNCLEAR) for report in cases.reports]
    old = [" lung" in report for report in cases.reports]
    known = [n for n in range(len(cases)) if old[n] and not unclear[n]]
    diagnoses = cases.diagnosis.tolist()
    chosen = [next(n for n in known if diagnoses[n] == d) for d in range(2, len(DIAGNOSES))]
    chosen.append(next(n for n in range(len(cases)) if unclear[n] and diagnoses[n] >= 2))
    return chosen


def _picture(model: Diagnoser, cases: Cases, output: Path) -> None:
    """Cases with a new and an old finding: where the words look, and the probabilities."""
    numbers = torch.tensor(_with_both_findings(cases))
    logits, attention = model(cases.images[numbers], cases.tokens[numbers], need_weights=True)
    looks = over_words(attention, cases.tokens[numbers]).view(-1, GRID, GRID)
    size = data.SIZE
    figure = new_figure(13, 2.2 * len(numbers) + 0.4)
    figure.suptitle("Drawn phantoms: the new finding (red), where the words look, probabilities")
    axes = figure.subplots(len(numbers), 3, squeeze=False, width_ratios=[1, 1, 2])
    rows = zip(axes, numbers.tolist(), looks, logits.softmax(dim=1), strict=True)
    for (plain, heated, bars), number, look, probability in rows:
        image = cases.images[number, 0]
        plain.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, size, size, 0))
        line = torch.arange(size) + 0.5
        plain.contour(line, line, cases.new[number].float(), levels=[0.5], colors="red")
        overlay(heated, image, look)
        for axis in (plain, heated):
            axis.set_axis_off()
        true = int(cases.diagnosis[number])
        colours = ["tab:green" if d == true else "tab:gray" for d in range(len(DIAGNOSES))]
        bars.barh(DIAGNOSES, probability.numpy(), color=colours)
        bars.set_xlim(0, 1)
        bars.invert_yaxis()
        words = cases.reports[number].split()
        half = (len(words) + 1) // 2
        bars.set_title(" ".join(words[:half]) + "\n" + " ".join(words[half:]), fontsize=9)
    figure.savefig(output)
    print(f"\npicture of where the words look: {output.resolve()}")

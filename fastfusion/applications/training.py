"""One way to train every application: stages that can be interrupted, and resumed bit for bit.

All randomness of an epoch follows from the seed and the epoch's number, so a resumed training takes
the same steps as one that was never interrupted.
"""

import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastfusion.applications import checkpoint
from fastfusion.applications.callbacks import Callback
from fastfusion.applications.ranks import ONE, Ranks
from fastfusion.core.extras import check_before_work, require

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)
State = dict[str, Any]


@dataclass(frozen=True)
class Schedule:
    """What a training depends on, besides the model, the data and the number of threads."""

    epochs: int = 20
    batch_size: int = 32
    lr: float = 1e-3
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be a positive number, got {self.lr}")


@dataclass(frozen=True)
class Outcome:
    """What a step makes of a batch: the mean loss over `count` answers, of which `right` are."""

    loss: Tensor
    right: int
    count: int

    @classmethod
    def of(cls, loss: Tensor, logits: Tensor, answer: Tensor) -> "Outcome":
        """Of logits (N, answers) and the right answers (N,), those below 0 not counted."""
        asked = answer >= 0
        return cls(loss, int((logits.argmax(dim=-1) == answer).sum()), int(asked.sum()))


class Batches(Protocol[B_co]):
    """The batches of an epoch, in an order and with an augmentation that `generator` decides."""

    def __len__(self) -> int:
        """How many there are in every epoch."""
        ...

    def __call__(self, generator: torch.Generator) -> Iterator[B_co]: ...


def learning_rate(step: int, steps: int, schedule: Schedule) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    warmup = min(1.0, (step + 1) / schedule.warmup_steps)
    return schedule.lr * warmup * (1 + math.cos(math.pi * step / steps)) / 2


class _Step(nn.Module):
    """A step as the forward of a module, which DistributedDataParallel can take."""

    def __init__(self, model: nn.Module, step: Callable[[Any], Outcome]) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, batch: Any) -> Tensor:
        self.outcome = self.step(batch)
        return self.outcome.loss


def fit(
    model: nn.Module,
    step: Callable[[B], Outcome],
    batches: Batches[B],
    schedule: Schedule,
    saved: State | None = None,
    save: Callable[[State], None] = lambda state: None,
    title: str = "",
    callbacks: Sequence[Callback] = (),
    parts: int = 1,
    ranks: Ranks = ONE,
) -> list[float]:
    """Train a model by AdamW; returns the mean loss of every epoch.

    Args:
        step: a batch to its loss.
        saved: a state that ``save`` was given, to go on from.
        save: called after every epoch with all that is needed to go on from there.
        callbacks: told of every epoch's loss, share of right answers and learning rate.
        parts: so many of ``batches`` are one batch: the loss is the mean of theirs.
        ranks: processes that share the parts.

    Raises:
        ValueError: an epoch of fewer batches than ``parts``.
    """
    tqdm = require("tqdm").tqdm
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.lr, betas=(0.9, 0.98), weight_decay=schedule.weight_decay
    )
    losses: list[float] = []
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = list(saved["losses"])
    per_epoch = len(batches) // parts
    if per_epoch == 0:
        raise ValueError(f"an epoch has {len(batches)} parts of batches, and a batch {parts}")
    model.train()
    run = _Step(model, step)
    together = ranks.together(run)
    own = ranks.own(parts)

    for epoch in range(len(losses), schedule.epochs):
        seed = schedule.seed * 100_003 + epoch
        torch.manual_seed(seed)  # dropout
        generator = torch.Generator().manual_seed(seed)  # order and augmentation
        total, right, seen, rate = 0.0, 0, 0, schedule.lr
        name = f"{title} {epoch + 1}/{schedule.epochs}"
        some = iter(batches(generator))
        with tqdm(total=per_epoch, desc=name, mininterval=1.0, disable=not ranks.is_first) as bar:
            for number in range(per_epoch):
                rate = learning_rate(
                    epoch * per_epoch + number, per_epoch * schedule.epochs, schedule
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.zero_grad()
                for part, batch in enumerate(islice(some, parts)):
                    if part not in own:
                        continue
                    if parts > 1:
                        torch.manual_seed(seed * 1_000_003 + number * parts + part)
                    with nullcontext() if part == own[-1] else ranks.alone(together):
                        (together(batch) / len(own)).backward()
                    outcome = run.outcome
                    total += outcome.loss.item() * outcome.count
                    right += outcome.right
                    seen += outcome.count
                nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
                optimizer.step()

                bar.update()
                bar.set_postfix(
                    loss=f"{total / seen:.4f}", right=f"{right / seen:.2%}", refresh=False
                )
        of_all = ranks.sum(total, right, seen)
        losses.append(of_all[0] / of_all[2])
        if ranks.is_first:
            values = {"loss": losses[-1], "right": of_all[1] / of_all[2], "lr": rate}
            for callback in callbacks:
                callback.epoch(title, epoch + 1, values)
            save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
            )
    model.eval()
    return losses


S = TypeVar("S", bound=Schedule)


class Training(Generic[S]):
    """The stages of a training, whose state lies beside its output until that is written.

    An application's ``train`` takes one, with its own settings.

    Args:
        output: the checkpoint to write.
        settings: a dataclass; a state of other settings is not gone on from.
        resume: go on from ``<output>.state``, which every epoch writes and `finish` removes.
        parts: a batch is computed in so many parts, one after the other or by as many ranks, each
            with a share of ``settings.batch_size``; what compares the samples of a batch sees those
            of a part. By default 1; with several ranks as many as they are; with ``resume`` as many
            as there were, where the ranks divide that.
        ranks: processes that train together.
        baseline_only: train only the baselines that see less.
        limit: use only so many examples of each split, for a quick try.
        callbacks: told of every epoch and of the results.
        say: what prints.

    Raises:
        FileNotFoundError, ValueError: ``resume`` without a state, or with one of other settings;
            ``parts`` that do not divide the batch, or that ``ranks`` do not divide.
        MissingExtra: a package that the end needs is not there.
    """

    def __init__(
        self,
        output: Path,
        settings: S,
        *,
        baseline_only: bool = False,
        limit: int | None = None,
        resume: bool = False,
        parts: int | None = None,
        ranks: Ranks = ONE,
        callbacks: Sequence[Callback] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        check_before_work(output)
        self.output, self.callbacks, self.ranks = output, callbacks, ranks
        self.say = say if ranks.is_first else lambda line: None
        self.baseline_only, self.limit = baseline_only, limit
        self.started = perf_counter()
        self.identity = asdict(settings) | {"baseline_only": baseline_only, "limit": limit}
        self.path = output.with_name(output.name + ".state")
        self.content: State = {"identity": self.identity}
        if resume:
            self._read()
        before = self.content.get("parts", 1)
        if parts is None:
            parts = before if before % ranks.count == 0 else ranks.count
        if parts % ranks.count or settings.batch_size % parts:
            raise ValueError(
                f"parts of a batch must be a multiple of the {ranks.count} ranks and divide "
                f"batch_size, {settings.batch_size}, got {parts}"
            )
        if resume and parts != before:
            self.say(f"batches have {parts} parts from here on, where they had {before}")
        self.parts = self.content["parts"] = parts
        self.settings = replace(settings, batch_size=settings.batch_size // parts)

    def _read(self) -> None:
        if not self.path.exists():
            raise FileNotFoundError(
                f"nothing to resume: there is no {self.path}; leave --resume out to start"
            )
        self.content = torch.load(self.path, weights_only=True)
        if self.content["identity"] != self.identity:
            raise ValueError(
                f"{self.path} belongs to other settings: {self.content['identity']}, "
                f"not {self.identity}"
            )

    def stage(
        self,
        name: str,
        model: nn.Module,
        step: Callable[[B], Outcome],
        batches: Batches[B],
        schedule: Schedule | None = None,
    ) -> list[float]:
        """`fit`, as far as the state has not gone yet."""

        def save(state: State) -> None:
            self.content[name] = state
            unfinished = self.path.with_name(self.path.name + ".new")
            torch.save(self.content, unfinished)
            os.replace(unfinished, self.path)  # an interruption never leaves half a file

        return fit(
            model, step, batches, schedule or self.settings, self.content.get(name), save, name,
            self.callbacks, self.parts, self.ranks,
        )  # fmt: skip

    def finish(
        self,
        kind: str,
        networks: Mapping[str, nn.Module],
        metadata: Mapping[str, Any],
        results: Mapping[str, Any],
        dtype: torch.dtype = torch.float16,
    ) -> dict[str, Any]:
        """Write the checkpoint, weights in `dtype`, with `results` and how they came about; returns
        all of these."""
        facts = {
            **results,
            "settings": self.identity,
            "parts": self.parts,
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "seconds": round(perf_counter() - self.started),
        }
        if not self.ranks.is_first:
            return facts
        checkpoint.save(self.output, kind, networks, {**metadata, "training": facts}, dtype)
        self.path.unlink(missing_ok=True)
        for callback in self.callbacks:
            callback.finish({k: v for k, v in results.items() if isinstance(v, float)})
        minutes = (perf_counter() - self.started) / 60
        size = self.output.stat().st_size / 1e6
        self.say(f"wrote {self.output} ({size:.2f} MB) after {minutes:.1f} minutes")
        return facts


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """All numbers below `count` in random order, in batches of one size: what is left over stays
    out, unless there is no more."""
    for numbers in torch.randperm(count, generator=generator).split(batch_size):
        if len(numbers) == min(batch_size, count):
            yield numbers

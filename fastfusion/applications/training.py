"""One way to train every application: stages that can be interrupted, and resumed bit for bit.

All randomness of an epoch follows from the seed and the epoch's number, so a resumed training takes
the same steps as one that was never interrupted.
"""

import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastfusion.applications import checkpoint
from fastfusion.applications.callbacks import Callback
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


def fit(
    model: nn.Module,
    step: Callable[[B], Outcome],
    batches: Batches[B],
    schedule: Schedule,
    saved: State | None = None,
    save: Callable[[State], None] = lambda state: None,
    title: str = "",
    callbacks: Sequence[Callback] = (),
) -> list[float]:
    """Train a model by AdamW; returns the mean loss of every epoch.

    Args:
        step: a batch to its loss.
        saved: a state that ``save`` was given, to go on from.
        save: called after every epoch with all that is needed to go on from there.
        callbacks: told of every epoch's loss, share of right answers and learning rate.
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
    steps = len(batches) * schedule.epochs
    model.train()

    for epoch in range(len(losses), schedule.epochs):
        seed = schedule.seed * 100_003 + epoch
        torch.manual_seed(seed)  # dropout
        generator = torch.Generator().manual_seed(seed)  # order and augmentation
        total, right, seen, rate = 0.0, 0, 0, schedule.lr
        name = f"{title} {epoch + 1}/{schedule.epochs}"
        with tqdm(total=len(batches), desc=name, mininterval=1.0) as bar:
            for number, batch in enumerate(batches(generator)):
                rate = learning_rate(epoch * len(batches) + number, steps, schedule)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                outcome = step(batch)
                optimizer.zero_grad()
                outcome.loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)
                optimizer.step()

                total += outcome.loss.item() * outcome.count
                right += outcome.right
                seen += outcome.count
                bar.update()
                bar.set_postfix(
                    loss=f"{total / seen:.4f}", right=f"{right / seen:.2%}", refresh=False
                )
        losses.append(total / seen)
        for callback in callbacks:
            callback.epoch(
                title, epoch + 1, {"loss": losses[-1], "right": right / seen, "lr": rate}
            )
        save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses})
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
        baseline_only: train only the baselines that see less.
        limit: use only so many examples of each split, for a quick try.
        callbacks: told of every epoch and of the results.
        say: what prints.

    Raises:
        FileNotFoundError, ValueError: ``resume`` without a state, or with one of other settings.
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
        callbacks: Sequence[Callback] = (),
        say: Callable[[str], None] = print,
    ) -> None:
        check_before_work(output)
        self.output, self.settings, self.say, self.callbacks = output, settings, say, callbacks
        self.baseline_only, self.limit = baseline_only, limit
        self.started = perf_counter()
        self.identity = asdict(settings) | {"baseline_only": baseline_only, "limit": limit}
        self.path = output.with_name(output.name + ".state")
        self.content: State = {"identity": self.identity}
        if not resume:
            return
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
            self.callbacks,
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
            "torch": torch.__version__,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "seconds": round(perf_counter() - self.started),
        }
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

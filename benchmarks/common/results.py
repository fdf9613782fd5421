"""What the results of a CPU and of a GPU share: who is timed, verdicts, numbers in words."""

from dataclasses import dataclass

from .timing import Spread

OURS = "fastfusion"
REFERENCE = "reference"


def slower(ratio: Spread) -> bool:
    """Whether we lose: three quarters of the rounds say so. In between it is a draw."""
    return ratio.upper < 1


def in_words(spread: Spread, factor: float, digits: int) -> str:
    """Median and quartiles of a time or ratio, times a factor."""
    median, lower, upper = (factor * t for t in (spread.median, spread.lower, spread.upper))
    return f"{median:.{digits}f} ({lower:.{digits}f}-{upper:.{digits}f})"


@dataclass(frozen=True)
class Goal:
    """One line: a number beside what it has to reach; None where nothing was measured for it."""

    name: str
    value: float | None
    limit: float
    at_most: bool = False
    unit: str = "x"
    detail: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the number is on the right side of its limit."""
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        verdict = {None: "not measured", True: "met", False: "MISSED"}[self.met]
        sign = "<=" if self.at_most else ">="
        number = "" if self.value is None else f": {self.value:.2f}{self.unit}"
        detail = f"; {self.detail}" if self.detail else ""
        return f"{verdict:<12}  {self.name}{number} (goal {sign} {self.limit:g}{self.unit}){detail}"

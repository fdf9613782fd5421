"""Texts of any language as numbers of subwords, so that a small table holds every word."""

import re
from collections import Counter
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from itertools import pairwise

import torch
from torch import Tensor

from fastfusion.models.parts import PADDING

UNKNOWN = 1
END = "_"  # follows the last letter of a word


def words(text: str) -> list[str]:
    """The words of a text in lower case, signs that are no part of a word each by itself."""
    return re.findall(r"[^\W_]+|[^\w\s]", text.lower())


class Subwords:
    """Byte-pair encoding of letters (Sennrich et al., 2016, https://arxiv.org/abs/1508.07909).

    Args:
        letters: numbered from 2; 0 is padding, and 1 stands for every other letter.
        merges: pairs of subwords that become one, the first to join first.
    """

    def __init__(self, letters: Iterable[str], merges: Iterable[Iterable[str]]) -> None:
        self.letters, self.merges = list(letters), [(a, b) for a, b in merges]
        entries = [*self.letters, *(a + b for a, b in self.merges)]
        self._number = {entry: number for number, entry in enumerate(entries, UNKNOWN + 1)}
        self._rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self._known: dict[str, list[int]] = {}

    @classmethod
    def of(cls, texts: Iterable[str], size: int) -> "Subwords":
        """At most `size` subwords for some texts: the most frequent pair joins, again and again."""
        counts = Counter(word for text in texts for word in words(text))
        split = {word: _letters(word) for word in counts}
        letters = sorted({letter for parts in split.values() for letter in parts})
        merges: list[tuple[str, str]] = []
        counted: Counter[tuple[str, str]] = Counter()
        where: dict[tuple[str, str], set[str]] = {}
        for word, parts in split.items():
            for pair in pairwise(parts):
                counted[pair] += counts[word]
                where.setdefault(pair, set()).add(word)
        queue = [(-count, pair) for pair, count in counted.items()]
        heapify(queue)
        while queue and len(letters) + len(merges) + UNKNOWN + 1 < size:
            count, best = heappop(queue)
            if count != -counted[best] or count > -2:
                continue  # it has been counted anew since, or is no gain
            merges.append(best)
            changed = set()
            for word in where.pop(best):
                before = split[word]
                after = split[word] = _join(before, best)
                for pair in pairwise(before):
                    counted[pair] -= counts[word]
                    changed.add(pair)
                for pair in pairwise(after):
                    counted[pair] += counts[word]
                    where.setdefault(pair, set()).add(word)
                    changed.add(pair)
            for pair in changed - {best}:
                heappush(queue, (-counted[pair], pair))
        return cls(letters, merges)

    def __len__(self) -> int:
        """How many numbers there are, those of padding and of what is unknown included."""
        return UNKNOWN + 1 + len(self.letters) + len(self.merges)

    def numbers(self, text: str) -> list[int]:
        """The numbers of a text's subwords."""
        return [number for word in words(text) for number in self._word(word)]

    def encode(self, texts: Iterable[str], length: int) -> Tensor:
        """int64 (texts, length of the longest), padded with 0; a text ends after `length`.

        Raises:
            ValueError: a text without words.
        """
        rows = [self.numbers(text)[:length] for text in texts]
        if not all(rows):
            raise ValueError("a text has at least one word")
        tokens = torch.full((len(rows), max(map(len, rows), default=0)), PADDING)
        for row, target in zip(rows, tokens, strict=True):
            target[: len(row)] = torch.tensor(row)
        return tokens

    def split(self, text: str) -> list[str]:
        """The subwords of a text; the last of a word ends in "_"."""
        return [part for word in words(text) for part in self._parts(word)]

    def _parts(self, word: str) -> list[str]:
        parts = _letters(word)
        while len(parts) > 1:
            first = min(pairwise(parts), key=lambda pair: self._rank.get(pair, len(self._rank)))
            if first not in self._rank:
                break
            parts = _join(parts, first)
        return parts

    def _word(self, word: str) -> list[int]:
        if word not in self._known:
            self._known[word] = [self._number.get(part, UNKNOWN) for part in self._parts(word)]
        return self._known[word]


def _letters(word: str) -> list[str]:
    return [*word[:-1], word[-1] + END]


def _join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined

"""The tests of a rehearsal of `make gpu`: one of them breaks the device for its process."""

import pytest
import torch
from suite import DEVICE


@pytest.mark.parametrize("number", range(8))
def test_on_the_device(number: int) -> None:
    torch.cuda.synchronize()
    assert DEVICE == "cuda"
    assert torch.ones(3).sum() == 3


def test_with_an_illegal_access() -> None:
    torch.cuda.break_it()  # tests/rehearsal/sitecustomize.py
    torch.cuda.synchronize()


@pytest.mark.parametrize("number", range(8))
def test_after_it(number: int) -> None:
    torch.cuda.synchronize()

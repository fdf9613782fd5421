"""What the command lines share: their mistakes, in one line each."""

import argparse
from typing import NoReturn


class UsageError(Exception):
    """The command line makes no sense; the message says why in one line."""


class Parser(argparse.ArgumentParser):
    """A parser that leaves it to the command to say what is wrong."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

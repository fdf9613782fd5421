"""The demo's optional packages: imported on first use, and one clear line when one is missing."""

from importlib import import_module
from pathlib import Path
from types import ModuleType


class MissingExtra(ImportError):
    """A package that only the demo needs is not installed; the message says how to get it."""


TRANSFORMERS = 'pip install "transformers>=5"'
PACKAGES = ("easy_vqa", "PIL.Image", "safetensors.torch", "tqdm", "matplotlib")


def check_before_work(output: Path) -> None:
    """Raise now, not after minutes of work, if the work could not be finished.

    Raises:
        MissingExtra: a package of the extra is not installed.
        FileNotFoundError, IsADirectoryError: ``output`` cannot be written as a file.
    """
    for name in PACKAGES:
        require(name)
    if output.is_dir():
        raise IsADirectoryError(f"{output} is a folder; the output is a file")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.parent} to write {output.name} into")


def require(name: str, command: str = 'pip install "fastfusion[demo]"') -> ModuleType:
    """Import a package of the ``demo`` extra, or one that `command` installs.

    Raises:
        MissingExtra: it is absent.
    """
    package = name.partition(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        # An installed package that cannot find a part of its own is another fault: show that.
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtra(f"the demo needs the package {package!r}: {command}") from error

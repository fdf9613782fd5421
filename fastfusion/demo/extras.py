"""The demo's optional packages: imported on first use, and one clear line when one is missing."""

from importlib import import_module
from types import ModuleType


class MissingExtra(ImportError):
    """A package that only the demo needs is not installed; the message says how to get it."""


PACKAGES = ("easy_vqa", "PIL.Image", "safetensors.torch", "tqdm", "matplotlib")


def require_all() -> None:
    """Raise :class:`MissingExtra` now, not after minutes, if a package of the extra is missing."""
    for name in PACKAGES:
        require(name)


def require(name: str) -> ModuleType:
    """Import a package of the ``demo`` extra; raise :class:`MissingExtra` if it is absent."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        # An installed package that cannot find a part of its own is another fault: show that.
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise
        raise MissingExtra(
            f'the demo needs the package {error.name!r}: pip install "fastfusion[demo]"'
        ) from error

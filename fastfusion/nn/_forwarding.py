"""`import fastfusion.nn.functional` and every other submodule of torch.nn, under our name."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_OURS, _THEIRS = "fastfusion.nn.", "torch.nn."


class _Forwarding:
    """Finds fastfusion.nn.<name> as the module torch.nn.<name> itself, not as a second copy."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(_OURS) or name.startswith(_OURS + "_"):
            return None
        theirs = _THEIRS + name.removeprefix(_OURS)
        if theirs not in sys.modules and importlib.util.find_spec(theirs) is None:
            return None
        return ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_THEIRS + spec.name.removeprefix(_OURS))
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just put our spec on torch's module.
        module.__spec__ = self._spec


def install() -> None:
    """Extend the import system.

    In front, because fastfusion.nn.utils is torch's package: the usual finder would follow its
    path and load fastfusion.nn.utils.rnn a second time, with classes of its own.
    """
    sys.meta_path.insert(0, _Forwarding())

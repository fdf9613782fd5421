"""What torch.fx takes for an atom: our modules, as it takes torch.nn's."""

from torch import nn


def be_leaf(module: nn.Module) -> None:
    """Make `module` one `call_module` node of every symbolic trace, as modules of torch.nn are.

    `torch.fx.Tracer.is_leaf_module`, and each tracer that has taken over its rule, asks whether the
    instance's `__module__` begins with "torch.nn". The class keeps its own, by which it is pickled,
    and torch.compile asks for "torch.nn." with more behind.
    """
    module.__module__ = "torch.nn"

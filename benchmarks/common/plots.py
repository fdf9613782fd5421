"""What all pictures are drawn with."""

from typing import Any


def pyplot() -> Any:
    """matplotlib without a screen; imported here because it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot

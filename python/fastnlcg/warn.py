"""Warnings that point to the user's line."""

import sys
import warnings

_NOT_THE_USER = ("fastnlcg", "torch", "contextlib")


def warn(message: str) -> None:
    """Gives a UserWarning at the innermost frame outside this package and torch. A fixed ``stacklevel`` would not do:
    the number of torch's wrappers of ``step()`` depends on its version, and on torch.compile."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)

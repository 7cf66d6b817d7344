"""Warnings that name the user's line."""

import sys
import warnings

_NOT_THE_USER = ("fastnlcg", "torch", "contextlib")


def warn(message: str) -> None:
    """A UserWarning at the innermost frame outside this package and torch, whose wrappers of ``step()`` differ in
    number from version to version, and under a compiler."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)

"""Errors that a user can mend: one sentence that says what to do, which the command line prints (exit status 2).

And the checks of options that raise them.
"""

import math
from numbers import Integral, Real

__all__ = ["Failed", "Invalid", "Missing", "UserError", "number", "sentence", "whole"]


class UserError(Exception):
    """What a user can mend. Every other exception is a fault of the program and shows its traceback."""


class Invalid(UserError, ValueError):
    """A value, a name or a file that makes no sense here."""


class Missing(UserError, FileNotFoundError):
    """Something that must be fetched, installed or named first."""


class Failed(UserError, RuntimeError):
    """Something outside the program went wrong: a download, a full disk, a notebook."""


def sentence(error: BaseException, place: object = "a file") -> str:
    """What an error says to a user, in one line; ``place`` is named where an error of the disk names no file."""
    if not isinstance(error, OSError) or isinstance(error, UserError) or not error.strerror:
        return " ".join(str(error).split()) or "interrupted."
    place = error.filename2 or error.filename or place
    return f"{place} cannot be read or written ({error.strerror.lower()}): mend that, or name another place."


def whole(name: str, value: int, low: int, high: float = math.inf) -> int:
    """The option as an int.

    Parameters
    ----------
    name : what the message calls the option
    value : any whole number, NumPy's too, but not True
    low, high : the smallest and the largest allowed one

    Raises
    ------
    Invalid : for anything else
    """
    return int(_option(name, value, low, high, Integral, "whole number"))


def number(name: str, value: float, low: float, high: float = math.inf) -> float:
    """The option as a float.

    Parameters
    ----------
    name : what the message calls the option
    value : any finite number, NumPy's too, but not True
    low, high : the smallest and the largest allowed one

    Raises
    ------
    Invalid : for anything else
    """
    return float(_option(name, value, low, high, Real, "number"))


def _option(name, value, low, high, kind, what):
    if isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high and value != math.inf:
        return value
    limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    raise Invalid(f"{name} must be a {what} {limits}, not {value!r}.")

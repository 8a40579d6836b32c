"""One line for each thing that a notebook measures: the number goes into its record, and comes back as a text."""

from collections.abc import Callable

import numpy as np

from faceadv import metrics, records
from faceadv.metrics import Numbers

__all__ = ["gain", "mean", "share"]


def share(
    numbers: list, name: str, hits: Numbers, groups: Numbers, how: str = "", paper: float | None = None, digits: int = 0
) -> str:
    """Measure a share in % by ``metrics.rate``: "93 % [86, 97]".

    Parameters
    ----------
    numbers : of the record; one is added
    name : of the number
    hits : (N,) bool, or shares in [0, 1]
    groups : (N,) labels of people
    how : what a reader of the record must know besides; that the interval is over people is added
    paper : what the paper reports, in %
    digits : after the point, in the text

    Raises
    ------
    Invalid : if there are no hits and no misses
    """
    found = [100 * bound for bound in metrics.rate(hits, groups)]
    return _add(numbers, name, found, len(hits), "%", how, paper, f".{digits}f")


def gain(
    numbers: list, name: str, hits: Numbers, others: Numbers, groups: Numbers, how: str = "", digits: int = 0
) -> str:
    """Measure how much larger a share is than another one of the same rows, by ``metrics.gain``: "+12 [+3, +21]".

    Parameters
    ----------
    numbers, name, hits, groups, how, digits : as for ``share``
    others : (N,) what is taken off, row by row
    """
    found = [100 * bound for bound in metrics.gain(hits, others, groups)]
    return _add(numbers, name, found, len(hits), "points", f"paired; {how}".strip("; "), None, f"+.{digits}f")


def mean(
    numbers: list, name: str, values: Numbers, groups: Numbers, how: str = "", paper: float | None = None,
    digits: int = 2, back: Callable | None = None,
) -> str:  # fmt: skip
    """Measure a mean by ``metrics.bootstrap``: "3.24 [3.17, 3.33]".

    Parameters
    ----------
    numbers, name, groups, how, digits : as for ``share``
    values : (N,) numbers
    paper : what the paper reports
    back : applied to the mean and its interval, such as ``numpy.exp`` where the values are logarithms
    """
    found = metrics.bootstrap(values, groups)
    return _add(numbers, name, back(np.array(found)) if back else found, len(values), "", how, paper, f".{digits}f")


def _add(numbers, name, found, n, unit, how, paper, form):
    value, low, high = found
    how = f"{how}; interval over people".removeprefix("; ")
    numbers.append(records.number(name, value, low, high, n=n, unit=unit, how=how, paper=paper))
    return f"{value:{form}}{' %' if unit == '%' else ''} [{low:{form}}, {high:{form}}]"

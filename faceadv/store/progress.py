"""What a long run says meanwhile: progress bars and notes. The level of the logger "faceadv" silences both.

Bars are shown at level INFO, the default, and not at WARNING, which ``FACEADV_QUIET=1`` sets. Notes go to stderr.
"""

import logging
import os
from collections.abc import Iterable

from tqdm import tqdm

__all__ = ["bar", "log", "quiet"]

log = logging.getLogger("faceadv")
if log.level == logging.NOTSET:  # otherwise the program that imports this has chosen
    log.setLevel(logging.WARNING if os.environ.get("FACEADV_QUIET") else logging.INFO)


def quiet() -> None:
    """Show no progress bars in this process from now on; warnings are still shown."""
    log.setLevel(logging.WARNING)


def bar(items: Iterable | None = None, **options) -> tqdm:
    """A progress bar over ``items``, or one to be updated by hand; ``options`` are tqdm's."""
    return tqdm(items, **{"disable": not log.isEnabledFor(logging.INFO), **options})

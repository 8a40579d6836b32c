"""``python -m faceadv``, which is the command ``faceadv`` where that is not on the PATH."""

import sys

from faceadv.cli import main

__all__ = []

if __name__ == "__main__":
    sys.exit(main())

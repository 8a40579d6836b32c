"""Python imports this when it starts with this folder on its path: the emulated GPU is there from the first line on."""

import os

if os.environ.get("FACEADV_DEVICE") == "emulated":
    import emulated

    emulated.Device().__enter__()

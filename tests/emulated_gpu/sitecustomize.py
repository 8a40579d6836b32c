"""Python imports this when it starts with this folder on its path: the device is there from the first line on.

Without FACEADV_DEVICE=emulated it makes the CPU comparable with it instead: float32 throughout, as it has no bfloat16.
"""

import os

if os.environ.get("FACEADV_DEVICE") == "emulated":
    import emulated

    emulated.Device().__enter__()
else:
    import torch

    torch.cpu.get_capabilities = dict

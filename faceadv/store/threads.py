"""How threads wait, how memory is kept, and how many processors there are: what makes torch fast on a CPU.

libgomp's threads spin while they wait for one another, and take the processor from whatever else is running: PGD on
two threads takes 0.8 s alone and 5.7 s beside one other busy process. It takes less than 2 s there if they spin for a
shorter time. glibc's allocator gives freed memory back at once and page-faults on the next tensor.
"""

import contextlib
import ctypes
import math
import os
from pathlib import Path

__all__ = ["ENVIRONMENT", "cores", "settle"]

ENVIRONMENT = {"GOMP_SPINCOUNT": "1000", "MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
CGROUP = Path("/sys/fs/cgroup")  # in a container, the control group of that container
MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}  # their numbers in glibc's malloc.h


def settle() -> None:
    """Apply the settings to this process and to those that it starts. To be called before torch is imported.

    What the environment sets already is left as it is.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # glibc read the environment when the process started; other C libraries have no mallopt
    with contextlib.suppress(OSError, AttributeError, TypeError, ValueError):
        libc = ctypes.CDLL(None)
        for name, number in MALLOPT.items():
            libc.mallopt(number, int(os.environ[name]))


def cores() -> int:
    """How many processors this process may use: by its affinity, and by its container's limit (cgroups 1 and 2)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says "max"
            quota, period = map(int, " ".join((CGROUP / file).read_text(encoding="utf-8") for file in files).split())
            if quota > 0:  # -1 is no limit
                count = min(count, math.ceil(quota / period))
    return count

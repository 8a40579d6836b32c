"""Large photos: the memory that reading, finding and cutting take."""

import os
import resource
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from faceadv import align


def peak(task):
    """By how many bytes a task raises the memory of a process, measured in one of its own."""
    read, write = os.pipe()
    with warnings.catch_warnings(action="ignore"):  # of threads, which are not forked
        child = os.fork()
    if not child:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        task()
        os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return 1024 * int(os.read(read, 100))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures as Linux does")
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_photo_is_in_memory_once_as_pillow_has_it_and_once_as_an_array(name, tmp_path):
    size = 5000, 4000
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / name)
    assert peak(lambda: align.read_photo(tmp_path / name)) < 8.5 * size[0] * size[1]  # 4 + 3 bytes a pixel


@pytest.mark.parametrize("size", [(300, 700), (256, 256), (1, 1), (513, 20)])
def test_strips_are_the_photo(size, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    assert np.array_equal(align.read_photo(tmp_path / "a.png"), photo)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save(tmp_path / "b.png", exif=exif)
    assert np.array_equal(align.read_photo(tmp_path / "b.png"), np.rot90(photo, -1))

"""The thresholds that ship are those that were measured, and the script that measures them counts right."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from faceadv import align, recognisers, records


@pytest.fixture(scope="module")
def benchmark(script):
    return script("thresholds")


@pytest.mark.parametrize("name", ["mobilefacenet", "mobilenet-vggface2"])
def test_thresholds_are_those_of_the_record(benchmark, name):
    numbers = {entry["name"]: entry for entry in records.read(benchmark.RECORD)["numbers"]}
    measured = numbers[f"{name}, training people: threshold"]["value"]
    assert recognisers.load(name).threshold == pytest.approx(measured, abs=1e-3)


def test_all_pairs_of_people_are_counted(benchmark, orl):
    embeddings = F.normalize(torch.randn(1100, 8, generator=torch.Generator().manual_seed(0)))  # more than one block
    labels = torch.arange(1100) // 3
    near, same = benchmark.of_people(embeddings, labels)
    assert len(near) == len(same) == 1100 * 1099 // 2
    assert same.sum() == 366 * 3 + 1
    first, second = torch.triu_indices(1100, 1100, 1)
    whole = (embeddings[first] - embeddings[second]).norm(dim=1).numpy()
    np.testing.assert_allclose(np.sort(near[same]), np.sort(whole[labels[first] == labels[second]]), atol=1e-3)
    threshold, share = benchmark.accepted(near, same)
    assert (near[~same] < threshold).mean() <= benchmark.FAR
    assert share == (near[same] < threshold).mean()


def test_crops_out_of_photos_show_what_the_chips_show(benchmark, orl):
    """At the chip's own place and size, they are the chip but for its rounding."""
    same = np.array([[1.0, 0, 0], [0, 1, 0]])
    made = benchmark.from_photos(lambda x: x, orl, torch.tensor([0, 57, 399]), align.SIZE, same)
    assert (made - orl.images[[0, 57, 399]]).abs().max() < 1 / 255
    half = benchmark.from_photos(
        lambda x: x, orl, torch.tensor([57]), align.SIZE // 2, np.array([[1, 0, 28], [0, 1, 28.0]])
    )
    assert (half - orl.images[57:58, :, 28:84, 28:84]).abs().max() < 1 / 255

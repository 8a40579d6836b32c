"""Verification in bounded memory gives the same numbers, and labels may be integers of any type."""

import numpy as np
import pytest
import torch

from faceadv import verification
from faceadv.pairs import Pairs
from faceadv.recognisers import Recogniser


class Ruler:
    """Stands in for a recogniser: its distance, and how much it was asked for at once."""

    def __init__(self):
        self.asked = []

    def distance(self, a, b):
        self.asked.append(a.numel())
        return Recogniser.distance(self, a, b)


def drawn(count, people=300, width=128):
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(people, (2, count), generator=generator)
    embeddings = torch.randn(people, width, generator=generator)
    return embeddings, Pairs(first, second, first % 7 == second % 7, torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize("width", [128, 512])
def test_distances_in_parts_are_bit_for_bit_the_same(width):
    embeddings, pairs = drawn(100_001, width=width)
    ruler = Ruler()
    found = verification.pair_distances(ruler, embeddings, pairs)
    assert sum(ruler.asked) == 100_001 * width
    assert max(ruler.asked) <= 2**22  # 16 MB, and not all
    expected = Ruler().distance(embeddings[pairs.first], embeddings[pairs.second]).double().numpy()
    assert found.dtype == np.float64
    assert np.array_equal(found, expected)


def test_distances_of_no_pairs_and_of_embeddings_with_gradients():
    embeddings, pairs = drawn(10)
    assert verification.pair_distances(Ruler(), embeddings, pairs[:0]).shape == (0,)
    with_gradient = verification.pair_distances(Ruler(), embeddings.requires_grad_(), pairs)
    assert np.array_equal(with_gradient, verification.pair_distances(Ruler(), embeddings.detach(), pairs))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, bool])
def test_same_may_be_integers(dtype):
    random = np.random.default_rng(0)
    same, fold = random.random(400) < 0.5, np.arange(400) % 10
    distances = random.normal(np.where(same, 0.4, 0.7), 0.1)
    best, given = verification.best_threshold(distances, same), same.astype(dtype)
    assert 0.45 < best < 0.65
    assert verification.best_threshold(distances, given) == best
    assert verification.accuracy(distances, given, best) == verification.accuracy(distances, same, best) > 0.8
    assert verification.ten_folds(distances, given, fold)[0] == verification.ten_folds(distances, same, fold)[0] > 0.8
    assert verification.roc(distances, torch.from_numpy(given))[2] == verification.roc(distances, same)[2] > 0.9


def test_a_threshold_needs_pairs():
    with pytest.raises(ValueError, match="without pairs"):
        verification.best_threshold(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="without pairs"):
        verification.ten_folds(np.arange(4.0), np.ones(4), np.zeros(4))  # a single fold leaves none to choose on

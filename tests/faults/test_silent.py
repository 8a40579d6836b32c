"""Faults that gave a number where they should have given an error: each was put in by hand, and each is refused."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nan

from faceadv import align, classifiers, deidentify, faces, images, metrics, objectives, trackers, verification
from faceadv.benchmark import cell, grid
from faceadv.errors import Invalid, UserError
from faceadv.recognisers import Recogniser, embed_all, embed_faces
from faceadv.store import cache

TINY = cell.Settings(pair_count=4, slow_pair_count=1, steps=1, seeds=(0,))
PLAIN = cell.Cell("none", "none", "dlib", "dodging")
X = torch.full((2, 3, 8, 8), 0.5)
BROKEN = (nan, torch.inf, -torch.inf)


class Blind(torch.nn.Module):
    """A network whose embedding of the second image is no number."""

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return torch.cat([x.mean((2, 3))[:1], x.mean((2, 3))[1:] * self.value])


@pytest.mark.parametrize("value", BROKEN)
def test_embeddings_that_are_no_numbers_are_neither_kept_nor_compared(value, tmp_path, monkeypatch):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    chips = SimpleNamespace(chips=np.full((2, 3, 8, 8), 128, np.uint8))
    for unit in (False, True):
        blind = Recogniser("blind", Blind(value), 0.6, unit)
        for make, of in ((embed_all, X), (embed_faces, chips)):
            with pytest.raises(Invalid, match="embeddings are not finite"):
                make(blind, of)
        for want in (objectives.dodging, objectives.impersonation):
            with pytest.raises(Invalid, match="not finite"):
                objectives.success(want(blind, torch.zeros(2, 3), 0.6), X)
    assert not list((tmp_path / "embeddings").glob("blind*"))


@pytest.mark.parametrize("value", BROKEN)
def test_a_recogniser_that_breaks_down_is_no_defence_in_the_benchmark(value, monkeypatch, tmp_path):
    judge, threshold = cell._recogniser("dlib", TINY)
    whole = judge.network

    class Broken(torch.nn.Module):
        def forward(self, x):
            return whole(x) * torch.tensor([1.0, value])[torch.arange(len(x)) % 2][:, None]

    broken = Recogniser("dlib", Broken(), threshold)
    monkeypatch.setattr(cell, "_recogniser", lambda name, settings: (broken, threshold))
    with pytest.raises(Invalid, match="not finite"):
        grid.run([PLAIN, replace(PLAIN, goal="impersonation")], TINY, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", BROKEN)
def test_what_is_not_finite_is_no_distance(dlib, value):
    a = torch.tensor([[0.0, 1.0], [value, 1.0]])
    with pytest.raises(Invalid, match="1 of 2 numbers in the distances are not finite"):
        dlib.distance(a, torch.zeros(2, 2))
    x = torch.zeros(1, 2, requires_grad=True)
    dlib.distance(x, torch.zeros(1, 2)).sum().backward()
    assert x.grad.eq(0).all()


@pytest.mark.parametrize("value", BROKEN)
def test_what_is_not_finite_makes_no_threshold_and_no_share(value):
    bad, same, people = np.array([0.1, 0.2, value, 0.9]), [True, True, False, False], [0, 1, 2, 3]
    for call in (
        lambda: verification.accuracy(bad, same, 0.5),
        lambda: verification.accuracy(bad[:2], same[:2], value),
        lambda: verification.best_threshold(bad, same),
        lambda: verification.threshold_at_far(bad, 0.5),
        lambda: verification.ten_folds(bad, same, [0, 0, 1, 1]),
        lambda: verification.roc(bad, same),
        lambda: metrics.rate(bad, people),
        lambda: metrics.rate([value, 1], [0, 1]),
        lambda: metrics.rate(torch.tensor([value, 1.0]), [0, 0]),
        lambda: metrics.gain(bad, same, people),
        lambda: metrics.gain(same, bad, people),
        lambda: metrics.bootstrap(bad),
        lambda: metrics.bootstrap(bad, people),
        lambda: trackers.nearest_neighbour(torch.zeros(2, 2), torch.arange(2), torch.tensor([[0.0, value]])),
        lambda: trackers.nearest_neighbour(torch.tensor([[0.0, value]]), torch.arange(1), torch.zeros(2, 2)),
        lambda: classifiers.linear_head(torch.tensor([[0.0], [value]]), torch.arange(2)),
        lambda: classifiers.targets(torch.tensor([[0.0, value, 1.0]]), torch.tensor([0]), "second"),
    ):
        with pytest.raises(Invalid, match="not finite"):
            call()


@pytest.mark.parametrize("value", BROKEN)
def test_a_classifier_without_an_answer_says_nobody(value):
    def model(x):
        return torch.stack([x.mean((1, 2, 3)), x.mean((1, 2, 3)) * value], 1)

    with pytest.raises(Invalid, match="logits are not finite"):
        classifiers.logits(model, X)
    for want in (objectives.targeted, objectives.untargeted):
        with pytest.raises(Invalid, match="not finite"):
            objectives.success(want(model, torch.tensor([0, 1])), X)


def test_an_attack_needs_a_threshold_that_is_a_number(dlib):
    for value in (nan, torch.inf, -1.0):
        with pytest.raises(Invalid, match="threshold must be a number"):
            objectives.dodging(dlib, torch.zeros(2, 128), value)


WRONG = {
    "one image for all": lambda x, *_: x[:1],
    "8 bits": lambda x, *_: (x * 255).byte(),
    "whole numbers": lambda x, *_: (x * 2).long(),
    "flags": lambda x, *_: x > 0.5,
    "NaN": lambda x, *_: x.masked_fill(x > 0.5, nan),
    "infinity": lambda x, *_: x.masked_fill(x > 0.5, torch.inf),
    "too bright": lambda x, *_: x + 0.5,
    "negative": lambda x, *_: x - 0.5,
    "an array": lambda x, *_: x.numpy(),
    "cut in place": lambda x, *_: x.resize_(1, 3, 112, 112),
}


@pytest.mark.parametrize("fault", WRONG)
def test_an_own_attack_or_defence_gives_images_or_an_error(fault):
    for one in (replace(PLAIN, attack="mine"), replace(PLAIN, defence="mine")):
        with pytest.raises(Invalid, match='"mine" must return'):
            cell.measure(one, TINY, {"mine": WRONG[fault]})


def test_a_cell_under_the_name_of_another_is_not_used(tmp_path):
    other, row = replace(PLAIN, goal="impersonation"), {"right": [1], "seconds": 0}
    keys = {one: cell.version(one, TINY) for one in (PLAIN, other)}
    files = {one: grid._place(tmp_path, one, key) for one, key in keys.items()}
    for content in (
        {"key": keys[PLAIN], "row": vars(PLAIN) | row},
        {"key": keys[other], "row": vars(PLAIN) | row},  # the name and the key of one, the row of another
        {"key": keys[other]},
        {"key": keys[other], "row": None},
    ):
        cache.write_json(files[other], content)
        assert grid.read([other], TINY, tmp_path).empty
    cache.write_json(files[other], {"key": keys[other], "row": vars(other) | row})
    assert grid.read([other], TINY, tmp_path)["goal"].tolist() == ["impersonation"]


@pytest.mark.parametrize("value", BROKEN)
def test_a_photo_of_floating_point_numbers_that_are_not_finite_is_left_out(value, tmp_path, orl):
    pixels = np.array(Image.open(orl.files[0]).convert("L"), np.float32)
    person, folder = tmp_path / "faces" / "one", tmp_path / "faces"
    person.mkdir(parents=True)
    Image.fromarray(pixels).save(person / "good.png", "TIFF")
    pixels[3, 4] = value
    Image.fromarray(pixels).save(person / "bad.png", "TIFF")
    with pytest.raises(OSError, match="not a readable photo: some of its pixels are not finite"):
        align.read_photo(person / "bad.png")
    assert faces.load(folder).skipped == [(person / "bad.png", "unreadable")]
    (person / "good.png").unlink()
    (row,) = deidentify.folder(folder, tmp_path / "out")
    assert row["state"] == "left out: unreadable"
    with pytest.raises(UserError, match="not finite"):
        images.from_pil(Image.fromarray(pixels))

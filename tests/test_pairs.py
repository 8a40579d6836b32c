"""Pairs and splits as published, thresholds and protocols against brute force, and the numbers on real faces."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from faceadv import align, pairs, recognisers, verification
from faceadv.store import datasets
from faceadv.store.lfw_people import dev_people


def test_all_pairs(orl):
    every = pairs.all_pairs(orl)
    assert len(every) == 79800
    assert int(every.same.sum()) == 1800
    assert torch.equal(every.same, orl.labels[every.first] == orl.labels[every.second])
    calibration, test = pairs.calibration_and_test(orl)
    assert not set(orl.labels[calibration.first].tolist()) & set(orl.labels[test.second].tolist())
    assert len(calibration) == len(test) == 19900


def test_sample(orl):
    some = pairs.sample(pairs.all_pairs(orl), 50, seed=1)
    assert (len(some), int(some.same.sum())) == (100, 50)
    again, other = (pairs.sample(pairs.all_pairs(orl), 50, seed=s) for s in (1, 2))
    assert torch.equal(some.first, again.first)
    assert not torch.equal(some.first, other.first)
    with pytest.raises(ValueError, match="only 1800 same pairs"):
        pairs.sample(pairs.all_pairs(orl), 1801)


def test_strangers_are_different_people_and_none_of_the_tested(orl):
    apart, (_, test) = pairs.strangers(orl), pairs.calibration_and_test(orl)
    one, other = orl.labels[apart.first], orl.labels[apart.second]
    assert (one != other).all()
    assert not apart.same.any()
    assert not set(one.tolist() + other.tolist()) & set(orl.labels[test.first].tolist())
    fewer = pairs.strangers(orl, without=orl.names[:18])
    assert set(orl.labels[fewer.first].tolist()) == {18}
    assert len(fewer) == 100
    with pytest.raises(ValueError, match="at least two people"):
        pairs.strangers(orl, without=orl.names[:19])


def test_strangers_of_lfw_are_of_the_training_half(lfw, lfw_root):
    apart = pairs.strangers(lfw, most=50)
    train, labels = pairs.lfw_people(lfw, "train"), torch.cat([apart.first, apart.second])
    names = {lfw.names[label] for label in lfw.labels[labels].tolist()}
    assert len(names) == 50
    assert names <= set(train)
    assert len(apart) == 50 * 49 // 2
    assert not {lfw.names[k] for k in lfw.labels[pairs.strangers(lfw, without=names, most=50).first].tolist()} & names
    assert torch.equal(pairs.strangers(lfw, most=50).first, apart.first)


def test_lfw_lists(lfw, lfw_root):
    view2 = pairs.lfw_view2(lfw)
    assert (len(view2), view2.dropped) == (6000, 0)
    assert all(view2.same[view2.fold == k].sum() == 300 == (view2.fold == k).sum() / 2 for k in range(10))
    assert torch.equal(view2.same, lfw.labels[view2.first] == lfw.labels[view2.second])
    assert [len(pairs.lfw_view1(lfw, which)) for which in ("train", "test")] == [2200, 1000]


def test_lfw_people(lfw, lfw_root):
    sizes = {which: len(pairs.lfw_people(lfw, which)) for which in ("train", "test", "closed", "deid")}
    assert sizes == {"train": 4038, "test": 1711, "closed": 47, "deid": 30}
    halves = [pairs.lfw_people(lfw, which) for which in ("select", "report")]
    assert sorted(halves[0] + halves[1]) == pairs.lfw_people(lfw, "test")
    assert abs(len(halves[0]) - len(halves[1])) < 100
    for which, name in (("train", "peopleDevTrain.txt"), ("test", "peopleDevTest.txt")):
        lines = datasets.lfw_file(name).read_text().splitlines()[1:]
        assert dev_people(lfw.names, which) == sorted(line.split("\t")[0] for line in lines if line.strip())


def test_split_refuses_other_people():
    with pytest.raises(ValueError, match="not the 5,749 people"):
        dev_people(["a", "b"], "train")


def test_best_threshold_against_brute_force():
    random = np.random.default_rng(0)
    for _ in range(20):
        same = random.random(40) < 0.5
        distances = np.round(random.normal(np.where(same, 0.4, 0.7), 0.2), 1)  # with ties
        found = verification.accuracy(distances, same, verification.best_threshold(distances, same))
        best = max(verification.accuracy(distances, same, t) for t in np.linspace(-1, 2, 3001))
        assert found == pytest.approx(best)


def test_threshold_at_far():
    distances = np.arange(1000) / 1000
    threshold = verification.threshold_at_far(distances, 0.01)
    assert (distances < threshold).mean() == pytest.approx(0.01)
    with pytest.raises(ValueError, match="cannot be read off 100"):
        verification.threshold_at_far(distances[:100], 0.001)


def test_ten_folds_never_uses_the_fold_it_reports():
    # fold 1 is upside down: its own best threshold would save it, the others' does not
    distances = np.array([0.1, 0.9, 0.1, 0.9, 0.9, 0.1])
    same = np.array([True, False, True, False, True, False])
    mean, _, accuracies = verification.ten_folds(distances, same, np.array([0, 0, 1, 1, 2, 2]))
    assert accuracies[2] == 0
    assert mean == accuracies.mean()


def test_orl_is_recognised(orl, dlib):
    embeddings = recognisers.embed_faces(dlib, orl)
    every = pairs.all_pairs(orl)
    distances = verification.pair_distances(dlib, embeddings, every)
    nearest = torch.cdist(embeddings, embeddings).fill_diagonal_(torch.inf).argmin(1)
    assert torch.equal(orl.labels[nearest], orl.labels)
    area = verification.roc(distances, every.same)[2]
    assert area == pytest.approx(roc_auc_score(every.same, -distances))
    assert area >= 0.9999
    threshold = verification.threshold_at_far(distances[~every.same.numpy()], 1e-3)
    assert (distances[every.same.numpy()] < threshold).mean() > 0.97


def measured(lfw, chosen, recogniser):
    """Distances of some pairs of LFW, whose photos alone are aligned: all of it would take ten minutes."""
    needed, places = torch.cat([chosen.first, chosen.second]).unique(return_inverse=True)
    made = [chip for part in needed.split(32) for chip, *_ in align.align([lfw.files[i] for i in part])]
    first, second = places.split(len(chosen))
    part = pairs.Pairs(first, second, chosen.same, chosen.fold)
    return verification.pair_distances(recogniser, recognisers.embed_all(recogniser, np.stack(made)), part)


def test_lfw_is_recognised(lfw, dlib):
    view2 = pairs.lfw_view2(lfw)
    chosen = view2[(view2.fold < 3) & (torch.arange(len(view2)) % 3 == 0)]
    assert len(chosen) == 600
    distances = measured(lfw, chosen, dlib)
    mean, error, folds = verification.ten_folds(distances, chosen.same, chosen.fold)
    assert mean >= 0.975
    assert len(folds) == 3
    assert 0 < error < 0.02


@pytest.mark.parametrize(("name", "least"), [("mobilefacenet", 0.97), ("mobilenet-vggface2", 0.88)])
def test_the_other_recognisers(lfw, name, least):
    """The card's accuracy on people who chose no threshold, and not on ORL's easy faces alone."""
    other, test = recognisers.load(name), pairs.lfw_view1(lfw, "test")
    chosen = test[torch.arange(len(test)) % 4 == 0]
    distances = measured(lfw, chosen, other)
    assert verification.accuracy(distances, chosen.same, other.threshold) >= least


def test_triples(orl):
    sources, targets, others = pairs.triples(orl.labels, 32, torch.Generator().manual_seed(0))
    assert (orl.labels[sources] != orl.labels[targets]).all()
    assert (orl.labels[others] == orl.labels[targets]).all()
    assert (others != targets).all()
    alone = torch.tensor([0, 1, 1])
    sources, targets, others = pairs.triples(alone, 32, torch.Generator().manual_seed(0))
    assert (others[targets == 0] == 0).all()


@pytest.mark.parametrize("labels", [[4, 4, 4], [4], []])
def test_triples_of_a_single_person_are_refused(labels):
    with pytest.raises(ValueError, match="two people"):
        pairs.triples(torch.tensor(labels, dtype=torch.int64), 2, torch.Generator())


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, "array"])
def test_triples_of_integers_of_any_type(orl, kind):
    labels = orl.labels.numpy() if kind == "array" else orl.labels.to(kind)
    drawn = [pairs.triples(these, 8, torch.Generator().manual_seed(0)) for these in (orl.labels, labels)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn))


def test_a_lost_person_does_not_cost_the_split(orl, monkeypatch):
    """A person of whom every photo was skipped counts when the set is told from another, and is then left out."""
    asked = []

    def dev_people(names, which):
        asked.append(sorted(names))
        return ["s1", "s2", "s3"] if which == "train" else ["s4", "s5"]

    monkeypatch.setattr(pairs, "dev_people", dev_people)
    names = [name for name in orl.names if name not in ("s2", "s5")]
    lost = [(Path("orl") / name / f"{i}.pgm", "no face found") for name in ("s2", "s5") for i in range(10)]
    faces = dataclasses.replace(orl.people(names), skipped=lost)
    assert pairs.lfw_people(faces, "train") == ["s1", "s3"]
    assert pairs.lfw_people(faces, "test") == pairs.lfw_people(faces, "closed") == ["s4"]
    assert asked == [sorted(orl.names)] * 3
    assert pairs.lfw_people(faces.first_photos(9), "closed") == []
    with pytest.raises(ValueError, match=r'"train", .*"report" or "deid", not \'all\''):
        pairs.lfw_people(faces, "all")


def test_lists_of_other_photos_are_refused(orl, tmp_path, monkeypatch):
    monkeypatch.setenv("FACEADV_DATA", str(tmp_path))
    for folder in ("lfw/lfw_funneled/George_W_Bush", "lfw/lfw_funneled"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "lfw" / "pairs.txt").write_text("1\t1\nAbel_Pacheco\t1\t4\nAbel_Pacheco\t1\tAkhmed_Zakayev\t3\n")
    with pytest.raises(ValueError, match=r"none of the pairs in pairs\.txt: load all of LFW"):
        pairs.lfw_view2(orl)
    with pytest.raises(ValueError, match='"train" or "test", not \'all\''):
        pairs.lfw_view1(orl, "all")

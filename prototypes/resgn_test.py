"""ResGN: its losses are the paper's, and the shipped network beats doing nothing."""

import numpy as np
import pytest
import torch

from faceadv import adaptive, attacks, metrics, objectives, purifiers, recognisers
from faceadv.networks import resgn
from faceadv.training import loop
from faceadv.training import resgn as train_resgn

SMALL = {"blocks": 1, "width": 8, "batch": 4, "stored": 1}


@pytest.fixture(scope="module")
def goals(orl, dlib):
    """Eight dodging and eight impersonation problems that the recogniser has right: photos, references, objective."""
    embeddings = recognisers.embed_faces(dlib, orl)
    x = orl.images[200:280:10]
    same, other = embeddings[201:281:10], embeddings[300:380:10]
    return {
        "dodging": (x, same, objectives.dodging(dlib, same)),
        "impersonation": (x, other, objectives.impersonation(dlib, other)),
    }


@pytest.mark.parametrize("shrink", [1, 2])
def test_starts_as_the_identity_and_keeps_the_range(shrink, orl):
    network = resgn.ResGN(2, 8, shrink).eval()
    x = orl.images[:2]
    torch.testing.assert_close(network(x), x)
    torch.nn.init.normal_(network.tail.weight)
    moved = network(x)
    assert moved.shape == x.shape
    assert 0 <= moved.min() <= moved.max() <= 1
    assert not torch.equal(moved, x)


def test_the_papers_size():
    # 16 x 64 at full resolution: head, 16 blocks, end, tail as in SRResNet without its up-sampling
    network = resgn.ResGN()
    assert sum(p.numel() for p in network.parameters()) == 1792 + 16 * (2 * 36864 + 4 * 64) + 36864 + 128 + 1731


def test_probability_of_different():
    d = torch.tensor([0.0, 0.5, 1.0, 2.5, 4.0, 9.0])
    torch.testing.assert_close(train_resgn.different(d, tau=1.0), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.0]))


def test_terms_are_the_equations(orl, dlib):
    cleaned, legitimate = orl.images[1:4], orl.images[:3]
    got = train_resgn.terms(cleaned, legitimate, dlib)
    assert list(got) == list(train_resgn.TERMS)
    assert got["pixel"] == pytest.approx((cleaned - legitimate).square().mean().item(), rel=1e-5)
    d = (dlib.embed(cleaned) - dlib.embed(legitimate)).square().sum(1).double()
    expected = [-np.log(1 - (0.5 * v / 0.36 if v <= 0.36 else 0.5 + 0.5 * (v - 0.36) / 3.64)) for v in d.tolist()]
    assert got["verification"].item() == pytest.approx(np.mean(expected), rel=1e-4)
    assert got["texture"] > 0
    nothing = train_resgn.terms(legitimate, legitimate, dlib)
    assert all(value == pytest.approx(0, abs=1e-6) for value in nothing.values())


def test_another_texture_network(orl, dlib):
    got = train_resgn.terms(orl.images[1:2], orl.images[:1], dlib, texture=lambda x: x[:, :, ::4, ::4] * 2)
    expected = 4 * (orl.images[1:2] - orl.images[:1])[:, :, ::4, ::4].square().mean()
    assert got["texture"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_papers_texture_is_asked_for_by_name(monkeypatch, tmp_path):
    assert train_resgn.texture_network("recogniser") is None
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="faceadv weights fetch vgg-face"):
        train_resgn.texture_network("vgg-face")
    with pytest.raises(ValueError, match="did you mean"):
        train_resgn.texture_network("vggface")


def test_another_network_gives_the_texture():
    images = torch.rand(2, 3, 112, 112, generator=loop.generator(0, 0))
    maps = train_resgn.texture_network("mobilefacenet")(images)
    torch.testing.assert_close(maps, recognisers.load("mobilefacenet").network.maps(images))


def test_only_what_counts_is_computed(orl, dlib, monkeypatch):
    monkeypatch.setattr(type(dlib), "embed", lambda *_, **__: pytest.fail("nobody asked for an embedding"))
    pictures = orl.images[:2]
    assert list(train_resgn.terms(pictures, pictures, None, None, ("pixel",))) == ["pixel"]
    assert list(train_resgn.terms(pictures, pictures, dlib, lambda x: x, ("texture",))) == ["texture"]


@pytest.fixture
def examples(orl, dlib, monkeypatch):
    """Two stored examples of each of 60 photos, attacked in groups of 10."""
    monkeypatch.setattr(train_resgn, "PART", 10)
    return train_resgn.stored(orl[:60], dlib, 2)


def test_stored_attacks_mislead_the_recogniser(orl, dlib, examples):
    x, known = orl.images[:60], recognisers.embed_faces(dlib, orl)[:60]
    sizes = []
    for example in examples:
        assert isinstance(example, np.memmap)
        assert example.dtype == np.uint8
        moved = torch.from_numpy(np.array(example)).float() / 255
        size = (255 * metrics.linf(moved, x)).round()
        assert 2 <= size.min() <= size.max() <= 10
        sizes.append(size)
        assert dlib.distance(dlib.embed(moved), known).median() > 0.3
    assert len(set(sizes[0].tolist())) > 1
    assert not torch.equal(*sizes)


def test_attacks_are_made_once(orl, dlib, examples, monkeypatch):
    for name in ("fgsm", "ifgsm", "pgd"):
        monkeypatch.setattr(attacks, name, lambda *_, **__: pytest.fail("it is in the cache"))
    again = train_resgn.stored(orl[:60], dlib, 2)
    assert all(np.array_equal(one, other) for one, other in zip(examples, again))


def test_partners():
    labels, draw = torch.tensor([0, 0, 1, 2, 2]), loop.generator(0, 0)
    assert {train_resgn._partner(0, labels, True, draw) for _ in range(9)} == {1}
    assert train_resgn._partner(2, labels, True, draw) == 2  # its own mirror image
    assert {train_resgn._partner(2, labels, False, draw) for _ in range(99)} == {0, 1, 3, 4}


def test_a_batch_is_of_attacked_and_legitimate_images_in_pairs(orl, examples):
    chips, settings = np.asarray(orl.chips[:60]), {"batch": 40, "clean": 0.3}
    attacked, legitimate = train_resgn.batches(chips, examples, settings)(loop.generator(0, 1))
    assert attacked.shape == legitimate.shape == (40, 3, 112, 112)
    size = 255 * metrics.linf(attacked, legitimate)
    assert size.max() <= 10.01
    assert 4 <= (size == 0).sum() <= 20
    everything = torch.from_numpy(np.concatenate([chips, chips[..., ::-1]])).float() / 255
    found = [torch.where((everything == image).flatten(1).all(1))[0].tolist() for image in legitimate]
    assert 10 <= sum(min(places) < 60 for places in found) <= 30  # the others are mirrored
    attacked, legitimate = train_resgn.batches(chips, examples, settings | {"clean": 0.0})(loop.generator(0, 1))
    assert metrics.linf(attacked, legitimate).min() > 0


def test_training_gives_frozen_networks_and_a_log(orl, dlib):
    (network,), log = train_resgn.train(orl[:40], dlib, SMALL | {"steps": 24})
    assert log[-1].keys() == {"step", *(f"pixel+texture+verification: {term}" for term in train_resgn.TERMS)}
    assert not any(p.requires_grad for p in network.parameters())
    assert not network.training
    assert network.tail.weight.abs().max() > 0  # it was zero


def test_a_run_can_be_read_before_its_end(orl, dlib, tmp_path, monkeypatch, killed_after):
    monkeypatch.setattr(loop, "EVERY", 2)
    killed_after(4)
    with pytest.raises(KeyboardInterrupt):
        train_resgn.train(orl[:40], dlib, SMALL | {"steps": 6}, out=tmp_path)
    network = train_resgn.trained(tmp_path)
    weights = loop.checkpoint(tmp_path)["modules"]["pixel+texture+verification"]
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert not network.training
    assert [row["step"] for row in train_resgn.read_log(tmp_path / "log.jsonl")] == [3]  # the mean of three


def test_the_log_that_ships_is_of_the_run_that_ships():
    rows = train_resgn.read_log()
    steps = train_resgn.SETTINGS["lfw"]["steps"]
    assert [row["step"] for row in rows] == list(range(loop.MEAN, steps + 1, loop.MEAN))
    verification = [row.get("pixel+texture+verification: verification") for row in rows]
    assert verification[-1] < 0.8 * verification[len(rows) // 10]


def test_losses_side_by_side_share_everything_but_the_loss(orl, dlib):
    settings = SMALL | {"steps": 24}
    losses = (("pixel",), train_resgn.TERMS)
    (pixel, joint), _ = train_resgn.train(orl[:40], dlib, settings | {"losses": losses})
    (alone,), _ = train_resgn.train(orl[:40], dlib, settings | {"losses": losses[:1]})
    assert all(torch.equal(v, alone.state_dict()[k]) for k, v in pixel.state_dict().items())
    assert not torch.equal(pixel.tail.weight, joint.tail.weight)


@pytest.mark.parametrize("goal", ["dodging", "impersonation"])
def test_the_shipped_network_beats_doing_nothing_and_falls_to_an_attack_through_it(goal, goals, dlib):
    x, references, objective = goals[goal]
    purifier = purifiers.load("resgn")
    before = {key: value.clone() for key, value in purifier.state_dict().items()}

    def right(z):
        return ((dlib.distance(dlib.embed(z), references) < dlib.threshold) == (goal == "dodging")).float().mean()

    assert right(x) == 1
    assert right(purifier(x)) >= 0.85
    for moved, most in (
        (attacks.fgsm(x, objective, eps=8 / 255), 0.6),  # one step impersonates half of them, machine by machine
        (attacks.pgd(x, objective, eps=8 / 255, alpha=2 / 255, steps=10), 0.4),
    ):
        assert right(moved) <= most
        assert right(purifier(moved)) >= 0.75
    through = adaptive.through(purifier, objective)
    adaptive_moved = attacks.pgd(x, through, eps=8 / 255, steps=10)
    assert right(purifier(adaptive_moved)) <= 0.25
    assert objectives.success(through, adaptive_moved).float().mean() >= 0.75
    assert all(torch.equal(value, purifier.state_dict()[key]) for key, value in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in purifier.parameters())


def test_eot_averages_the_loss_over_draws(goals):
    x, _, objective = goals["dodging"]
    draws = iter([0.0, 0.5])

    def dim(images):
        return images * (1 - next(draws))

    rows = torch.arange(2)
    loss, _ = adaptive.through(dim, objective, samples=2)(x[:2], rows, exact=True)
    expected = (objective(x[:2], rows, exact=True)[0] + objective(x[:2] * 0.5, rows, exact=True)[0]) / 2
    torch.testing.assert_close(loss, expected)

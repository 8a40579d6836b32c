"""A3GN: parts can be left out, it starts harmless, learns, and impersonates people it never saw."""

import numpy as np
import pytest
import torch

from faceadv import metrics, recognisers
from faceadv.errors import Invalid
from faceadv.networks import a3gn
from faceadv.training import a3gn as train_a3gn
from faceadv.training import loop

SMALL = {"batch": 4, "width": 8, "blocks": 2}


@pytest.mark.parametrize("parts", [{}, {"cvae": False}, {"attention": False}])
def test_starts_as_the_identity_and_keeps_the_range(orl, dlib, parts):
    network = a3gn.A3GN(width=8, blocks=2, **parts).eval()
    x, wanted = orl.images[:2], recognisers.embed_faces(dlib, orl)[10:12]
    torch.testing.assert_close(network(x, wanted), x)
    torch.nn.init.normal_(network.tail.weight)
    made = network(x, wanted)
    assert made.shape == x.shape
    assert 0 <= made.min() <= made.max() <= 1
    assert 0.01 < (made - x).abs().max() <= a3gn.BOUND + 1e-6
    assert not torch.equal(made, network(x, wanted.flip(0)))


def test_attention_is_a_weighted_mean_of_places():
    torch.manual_seed(0)
    layer, x = a3gn.Attention(16), torch.randn(2, 16, 4, 5)
    maps = layer.maps(x)
    assert maps.shape == (2, 20, 20)
    torch.testing.assert_close(maps.sum(2), torch.ones(2, 20))
    torch.testing.assert_close(layer(x), x)  # gamma starts at 0
    torch.nn.init.ones_(layer.gamma)
    values = layer.value(x).flatten(2)
    by_hand = torch.einsum("nij,ncj->nci", maps, values).reshape(x.shape)
    torch.testing.assert_close(layer(x), x + by_hand)


def test_the_code_is_a_sample_and_its_mean(orl, dlib):
    network = a3gn.A3GN(width=8, blocks=2)
    wanted = recognisers.embed_faces(dlib, orl)[:3]
    z, mean, log_variance = network.code(wanted)
    assert torch.equal(z, mean)
    z, mean, log_variance = network.code(wanted, torch.Generator().manual_seed(0))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z, mean + (log_variance / 2).exp() * noise)
    # it sees embeddings standardised
    network.mean.fill_(0.1)
    network.spread.fill_(2.0)
    torch.testing.assert_close(network.code(2 * wanted + 0.1)[0], mean)


def test_losses(orl, dlib):
    x, y = orl.images[:2], orl.images[10:12]
    wanted = dlib.embed(y)
    mean, log_variance = torch.full((2, 4), 0.5), torch.full((2, 4), -1.0)
    value = train_a3gn.generator_terms(y, x, (mean, mean, log_variance), wanted, dlib)
    assert value.keys() == {"reconstruction", "cosine", "kl"}
    beyond = ((x - y).abs().mean((1, 2, 3)) - train_a3gn.MARGIN).clamp(min=0).mean()
    assert beyond > 0
    assert value["reconstruction"] == pytest.approx(beyond.item())
    assert (
        train_a3gn.generator_terms(x + train_a3gn.MARGIN / 2, x, (mean, None, None), wanted, dlib)["reconstruction"]
        == 0
    )
    assert value["cosine"] == pytest.approx(0, abs=5e-3)  # the target itself, in bfloat16
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)).mean()
    assert value["kl"] == pytest.approx(kl.item())
    assert "kl" not in train_a3gn.generator_terms(y, x, (mean, None, None), wanted, dlib)
    assert train_a3gn.hinge(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])) == pytest.approx(0.25 + 0.5)


def test_training_logs_all_losses(orl, dlib):
    _, log = train_a3gn.train(orl[:40], dlib, SMALL | {"steps": 3})
    losses = {"reconstruction", "cosine", "adversarial", "instance", "kl"}
    assert log[-1].keys() == losses | {"step", "normal discriminator", "instance discriminator"}


def test_it_learns_to_come_closer_to_the_target(orl, dlib):
    settings = SMALL | {"steps": 40, "lr": 1e-2, "factors": {"cosine": 10.0, "kl": 0.01}}
    _, log = train_a3gn.train(orl[:40], dlib, settings)
    first, last = (np.mean([row["cosine"] for row in rows]) for rows in (log[:10], log[-10:]))
    assert last < 0.9 * first


def test_it_starts_from_given_weights_and_pays_beyond_a_given_margin(orl, dlib):
    trained, log = train_a3gn.train(orl[:40], dlib, SMALL | {"steps": 3, "margin": 0.0})
    state = trained.state_dict()
    again, _ = train_a3gn.train(orl[:40], dlib, SMALL | {"steps": 0, "begin": state}, seed=1)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert log[-1]["reconstruction"] > 0  # the default margin would be free of charge after three steps


def test_the_weights_to_start_from_belong_to_the_run(orl, dlib, tmp_path):
    state, _ = train_a3gn.train(orl[:40], dlib, SMALL | {"steps": 0})
    settings = SMALL | {"steps": 2, "begin": state.state_dict()}
    train_a3gn.train(orl[:40], dlib, settings, out=tmp_path)
    train_a3gn.train(orl[:40], dlib, settings, out=tmp_path, resume=True)
    state.tail.bias += 0.01
    with pytest.raises(Invalid, match="another begin:"):
        train_a3gn.train(orl[:40], dlib, settings | {"begin": state.state_dict()}, out=tmp_path, resume=True)


def test_the_log_that_ships_is_of_a_whole_run():
    rows = loop.read_log(train_a3gn.LOG)
    assert rows[-1]["step"] == train_a3gn.SETTINGS["lfw"]["steps"] == len(rows) * loop.MEAN
    assert rows[-1]["cosine"] < 0.5 * rows[0]["cosine"]


def test_a_loss_that_is_left_out_trains_nothing(orl, dlib):
    factors = train_a3gn.WEIGHTS | {"instance": 0.0}
    _, log = train_a3gn.train(orl[:40], dlib, SMALL | {"steps": 2, "factors": factors})
    assert "instance" not in log[0]
    assert "instance discriminator" not in log[0]
    assert "normal discriminator" in log[0]


def test_the_shipped_network_impersonates_people_it_never_saw(orl, dlib):
    network = a3gn.load()
    embeddings = recognisers.embed_faces(dlib, orl)
    rows = torch.arange(0, 400, 20)
    targets, others = (rows + 150) % 400, (rows + 250) % 400
    x, before = orl.images[rows], {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        made = network(x, embeddings[targets])
        again = network(x[3:4], embeddings[targets[3:4]])
        elsewhere = network(x, embeddings[others])
    torch.testing.assert_close(made[3:4], again, atol=1e-4, rtol=0)  # no batch statistics

    def taken_for(images, who):
        return (dlib.distance(dlib.embed(images), embeddings[who]) < dlib.threshold).float().mean()

    # each image is taken for the target that it was made for, and not for another
    assert taken_for(made, targets) >= 0.6
    assert taken_for(elsewhere, others) >= 0.6
    assert max(taken_for(x, targets), taken_for(made, others), taken_for(elsewhere, targets)) < 0.1
    assert metrics.ssim(made, x).mean() >= 0.75
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    # all of the change is the correction, and it is bounded
    assert 0.05 < (made - x).abs().max() <= a3gn.BOUND + 1e-6
    torch.nn.init.zeros_(network.tail.weight)
    torch.nn.init.zeros_(network.tail.bias)
    assert torch.equal(network(x[:2], embeddings[targets[:2]]), x[:2])

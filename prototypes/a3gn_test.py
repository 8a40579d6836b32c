"""A3GN: it starts harmless, looks at the target, keeps its code alive, and learns."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import faceadv.networks
from faceadv import recognisers
from faceadv.errors import Invalid

sys.path.insert(0, str(Path(__file__).parent))
import net as a3gn

sys.modules["faceadv.networks.a3gn"] = faceadv.networks.a3gn = a3gn
import recipe

SMALL = {"batch": 4, "width": 8, "blocks": 2}


@pytest.fixture(scope="module")
def attacked():
    return [recognisers.load(name) for name in recipe.ATTACKED]


def faces(count, seed=0):
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", [{}, {"heads": 0}, {"dimension": 20}, {"bound": 0.1}])
def test_starts_as_the_identity_and_keeps_the_range(options):
    torch.manual_seed(0)
    network = a3gn.A3GN(width=8, blocks=2, **options).eval()
    x, y = faces(2), faces(2, 1)
    known = torch.randn(2, 20) if "dimension" in options else None
    torch.testing.assert_close(network(x, y, known), x)
    torch.nn.init.normal_(network.tail.weight)
    made = network(x, y, known)
    assert made.shape == x.shape
    assert 0 <= made.min() <= made.max() <= 1
    assert ((made - x).abs().max() <= 0.1 + 1e-6) == ("bound" in options)
    assert not torch.equal(made, network(x, y.flip(0), known))
    with pytest.raises(Invalid, match="embeddings"):
        network(x, y, torch.randn(2, 21) if known is not None else torch.randn(2, 20))
    with pytest.raises(Invalid, match="target of its size"):
        network(x, y[:1], known)


def test_attention_is_a_weighted_mean_of_the_targets_places():
    torch.manual_seed(0)
    layer, x, y = a3gn.CrossAttention(16, 4), torch.randn(2, 16, 4, 5), torch.randn(2, 16, 6, 3)
    maps = layer.maps(x, y)
    assert maps.shape == (2, 4, 20, 18)
    torch.testing.assert_close(maps.sum(3), torch.ones(2, 4, 20))
    values = layer.value(y).reshape(2, 4, 4, 18)
    seen = torch.einsum("nhij,nhcj->nhci", maps, values).reshape(x.shape)
    torch.testing.assert_close(layer(x, y), x + layer.out(seen))


def test_a_place_looks_first_at_the_place_that_is_like_it():
    torch.manual_seed(0)
    layer, x = a3gn.CrossAttention(32, 4), torch.randn(1, 32, 7, 7)
    assert (layer.maps(x, x)[0].argmax(2) == torch.arange(49)).float().mean() > 0.9


def test_the_code_is_a_sample_and_its_mean():
    torch.manual_seed(0)
    network, x, y = a3gn.A3GN(width=8, blocks=2), faces(3), faces(3, 1)
    _, z, mean, log_variance = network.generate(x, y)
    assert torch.equal(z, mean)
    _, z, mean, log_variance = network.generate(x, y, draw=torch.Generator().manual_seed(0))
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(z, mean + (log_variance / 2).exp() * noise)


def test_it_is_rebuilt_from_its_file():
    torch.manual_seed(0)
    settings = recipe.SETTINGS["smoke"] | {"bound": 0.12, "heads": 2}
    network = a3gn.A3GN(0, 8, 2, 2, 0.12)
    torch.nn.init.normal_(network.tail.weight)
    state = {key: value.half() for key, value in recipe.state(network, settings).items()}
    again = a3gn.build(state)
    again.load_state_dict(state)
    assert again.bound == 0.12
    torch.testing.assert_close(again(faces(1), faces(1, 1)), network(faces(1), faces(1, 1)), atol=0.05, rtol=0)


def test_triples_are_of_two_people():
    labels = torch.tensor([3, 0, 1, 1, 2, 3, 3, 3])
    order = recipe._order(labels, "cpu")
    source, target, second = recipe.triples(order, 2000, torch.Generator().manual_seed(0))
    assert (labels[source] != labels[target]).all()
    assert (labels[second] == labels[target]).all()
    assert torch.equal(second == target, (labels[target] == 0) | (labels[target] == 2))
    assert len(source.unique()) == len(target.unique()) == 8


def test_the_price_rises_while_too_much_is_changed():
    price = recipe.Price()
    for _ in range(20):
        last = price(torch.tensor(0.7), 0.8)
    assert last > 5
    for _ in range(60):
        last = price(torch.tensor(0.95), 0.8)
    assert last < 5


def test_losses(orl, attacked):
    x, y, o = orl.images[:2], orl.images[10:12], orl.images[12:14]
    networks = [r.network for r in attacked]
    wanted = [torch.stack([n(y), n(o)]) for n in networks]
    value = recipe.generator_terms(y, x, wanted, networks, (1.0, 1.0))
    assert value["same photo 0"] == pytest.approx(0, abs=1e-5)
    assert value["same photo 1"] == pytest.approx(0, abs=1e-5)
    beyond = [torch.relu(1 - torch.nn.functional.cosine_similarity(*pair) - recipe.NEAR).mean() for pair in wanted]
    assert value["identity"] == pytest.approx(sum(beyond).item() / 4, abs=1e-5)
    assert min(value[name] for name in ("chroma", "low", "perceptual")) >= 0
    assert value["low"] > 0.02
    still = recipe.generator_terms(x, x, wanted, networks, (1.0, 1.0))
    assert still["ssim"] == pytest.approx(1, abs=1e-4)
    assert max(still[name] for name in ("chroma", "low", "perceptual")) == 0
    assert recipe.hinge(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])) == pytest.approx(0.25 + 0.5)


@pytest.mark.parametrize("known", [False, True])
def test_training_moves_everything_and_logs_all_losses(orl, attacked, known):
    work = recipe.prepare(orl[:40], attacked, SMALL | {"steps": 4, "known": known})
    before = {k: v.clone() for k, v in work.modules["generator"].state_dict().items()}
    draw = torch.Generator().manual_seed(0)
    for share in (0.1, 0.3, 0.6, 0.9):
        value = work.step(share, draw, 4)
    assert all(v.isfinite() for v in value.values())
    assert recipe.WEIGHTS.keys() | {"ssim", "price", "nats", "normal discriminator"} <= value.keys()
    still = {k for k, v in work.modules["generator"].state_dict().items() if torch.equal(v, before[k])}
    assert still <= {"mean", "spread"}  # attention, the VAE and all else has a gradient
    assert work.sheet().shape[0] == 3


def test_it_learns_to_come_closer_to_the_target(orl, attacked):
    factors = {"identity": 10.0, "kl": 0.02, "semantic": 1.0}
    _, log = recipe.train(orl[:40], attacked, SMALL | {"steps": 40, "lr": 5e-3, "factors": factors})
    first, last = (np.mean([row["identity"] for row in rows]) for rows in (log[:8], log[-8:]))
    assert last < 0.95 * first


def test_a_gradient_that_is_no_number_is_left_out():
    layer = torch.nn.Linear(2, 1)
    optimiser = torch.optim.Adam(layer.parameters(), 0.1, fused=True)
    before = layer.weight.clone()
    recipe._descend(optimiser, layer(torch.full((1, 2), float("nan"))).sum(), list(layer.parameters()))
    assert torch.equal(layer.weight, before)
    recipe._descend(optimiser, layer(torch.ones(1, 2)).sum(), list(layer.parameters()))
    assert not torch.equal(layer.weight, before)


def test_a_run_is_resumed(orl, attacked, tmp_path):
    settings = SMALL | {"steps": 2}
    made, _ = recipe.train(orl[:40], attacked, settings, out=tmp_path)
    again, _ = recipe.train(orl[:40], attacked, settings, out=tmp_path, resume=True)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in made.state_dict().items())

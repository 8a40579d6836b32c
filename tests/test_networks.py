"""Networks: their images and sides are checked, their files must fit, priors are converted or refused."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, EDMEulerScheduler, UNet2DModel

from faceadv import ddnm, errors
from faceadv.networks import a3gn, common, mobilefacenet, mobilenet, prior, puface, resgn
from faceadv.store import weights

LOAD = {"mobilefacenet": mobilefacenet.load, "mobilenet-vggface2": mobilenet.load}
LOAD |= {"resgn": resgn.load, "puface": puface.load, "a3gn": a3gn.load}
COUNTERS = ("resgn",)  # these have batch norm, and ship without its counters


def small(name):
    """An untrained network, as a function of images."""
    if name == "a3gn":
        network = a3gn.A3GN(width=8, blocks=2).eval()
        return lambda x: network(x, torch.zeros(len(x), 128))
    return {"resgn": resgn.ResGN(1, 8, 2), "puface": puface.PuFace((8, 8, 8))}[name].eval()


@pytest.mark.parametrize("name", ["resgn", "puface", "a3gn"])
def test_other_images_are_refused(name, orl):
    """Before: x * 255 became a white picture, without a word."""
    network, x = small(name), orl.images[:1]
    assert network(x).shape == x.shape
    for bad in (x * 255, x - 0.5, x * float("nan"), x[0], (x * 255).byte(), x[:, :1]):
        with pytest.raises(errors.Invalid, match="images must"):
            network(bad)


@pytest.mark.parametrize(("name", "multiple"), [("resgn", 2), ("puface", 8), ("a3gn", 4)])
def test_sides_that_do_not_fit_are_one_sentence(name, multiple):
    network = small(name)
    with torch.no_grad():
        assert network(torch.rand(1, 3, 4 * multiple, 5 * multiple)).shape == (1, 3, 4 * multiple, 5 * multiple)
    for height, width in ((4 * multiple + 1, 4 * multiple), (4 * multiple, 5 * multiple - 1)):
        with pytest.raises(errors.Invalid, match=rf"multiples of {multiple}, not {height} x {width}\.$"):
            network(torch.rand(1, 3, height, width))


def test_float_images_of_any_type_are_computed_in_float32(orl):
    for name in ("resgn", "puface", "a3gn"):
        for dtype in (torch.float16, torch.float64):
            assert small(name)(orl.images[:1].to(dtype)).dtype == torch.float32


def test_embeddings_that_do_not_fit(orl):
    network, x, wanted = a3gn.A3GN(width=8, blocks=2).eval(), orl.images[:2], torch.randn(2, 128)
    assert network(x, wanted).shape == x.shape
    for bad in (wanted[:, :64], wanted[0], torch.full((2, 128), float("nan")), wanted[:, :1]):
        with pytest.raises(errors.Invalid, match=r"embeddings must be finite numbers of shape \(N, 128\)"):
            network(x, bad)
    for bad in (wanted[:1], torch.randn(3, 128)):
        with pytest.raises(errors.Invalid, match="one embedding of its target, and for 2 there are"):
            network(x, bad)


@pytest.fixture
def files(monkeypatch):
    """``files[name]``: a change of what the shipped file of that name holds."""
    changes, load = {}, weights.load_safetensors

    def changed(name):
        return changes.get(name, lambda state: state)(load(name))

    monkeypatch.setattr(weights, "load_safetensors", changed)
    return changes


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize("name", LOAD)
def test_any_weight_that_is_missing_left_over_or_of_another_shape(name, files):
    """Before: ``strict=False`` left a missing weight as it was drawn at random."""
    before = torch.get_rng_state()
    LOAD[name]()
    assert torch.equal(before, torch.get_rng_state())
    keys = list(weights.load_safetensors(name))
    for key in keys[:: max(1, len(keys) // 12)] + [key for key in ("threshold", "blocks") if key in keys]:
        files[name] = without(key)
        with pytest.raises(errors.Invalid, match=rf'^The shipped weights "{name}" are not those of its network: .*\.$'):
            LOAD[name]()
    for change in ({"more": torch.zeros(1)}, {keys[0]: torch.zeros(3, 2, 1)}):
        files[name] = lambda state, change=change: state | change
        with pytest.raises(errors.Invalid, match="are not those of its network"):
            LOAD[name]()


@pytest.mark.parametrize("name", COUNTERS)
def test_counters_of_batch_norm_may_be_missing_or_not(name, files):
    state = LOAD[name]().state_dict()
    counters = {key: torch.tensor(7) for key in state if key.endswith("num_batches_tracked")}
    assert counters
    assert not counters.keys() & weights.load_safetensors(name).keys()
    files[name] = lambda shipped: shipped | counters
    assert all(LOAD[name]().state_dict()[key] == 7 for key in counters)


@pytest.mark.parametrize("name", LOAD)
def test_loaded_networks_are_frozen_in_float32_and_in_evaluation_mode(name):
    network = LOAD[name]()
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_sizes_are_those_of_the_file(files):
    """Before: A3GN's loader refused what ``ship("paper")`` wrote."""
    network = a3gn.A3GN(64, width=16, blocks=6)
    torch.nn.init.normal_(network.tail.weight)
    files["a3gn"] = lambda _: network.state_dict() | {"width": torch.tensor(16), "blocks": torch.tensor(6)}
    x, wanted = torch.rand(1, 3, 16, 16), torch.randn(1, 64)
    assert torch.equal(a3gn.load()(x, wanted), network.eval()(x, wanted))
    purifier = puface.PuFace((8, 16, 24)).eval()
    torch.nn.init.normal_(purifier.tail.weight)
    files["puface"] = lambda _: purifier.state_dict() | {"widths": torch.tensor([8, 16, 24])}
    assert torch.equal(puface.load()(x), purifier(x))


def save(folder, schedule=None, **changes):
    """A tiny pipeline in diffusers' layout, with random weights."""
    torch.manual_seed(0)
    config = dict(prior.build(16, (16, 32)).config) | changes
    config.pop("_use_default_values")  # diffusers would put its defaults in place of the changes
    unet = UNet2DModel.from_config(config)
    DDPMPipeline(unet, schedule or DDPMScheduler()).save_pretrained(folder)
    return unet.eval()


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_prior_may_have_a_tuple_for_its_size_and_a_learned_variance(kind, tmp_path, orl):
    """Before: both crashed with a traceback from the middle of the sampling."""
    unet = save(tmp_path, DDIMScheduler(prediction_type=kind), sample_size=[16, 16], out_channels=6)
    before = torch.get_rng_state()
    loaded, schedule = prior.load(str(tmp_path))
    assert torch.equal(before, torch.get_rng_state())
    assert loaded.config.sample_size == prior.side(unet) == 16
    out = ddnm.TwoStage(loaded, schedule, steps=2)(orl.images[:1])
    assert out.shape == (1, 3, 112, 112)
    assert ddnm.DiffPure(loaded, schedule, steps=2)(orl.images[:1]).isfinite().all()
    assert ddnm.sample(loaded, schedule, 1, steps=2).shape == (1, 3, 16, 16)


REFUSED = {
    "another prediction": ({"schedule": DDPMScheduler(prediction_type="v_prediction")}, "predict one of"),
    "not square": ({"sample_size": [16, 24]}, "square images"),
    "grey": ({"in_channels": 1, "out_channels": 1}, "RGB images"),
    "classes": ({"num_class_embeds": 4}, "without classes"),
    "no alphas": ({"schedule": EDMEulerScheduler()}, "no schedule"),
    "nothing left": ({"schedule": DDPMScheduler(rescale_betas_zero_snr=True)}, "no schedule"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_prior_that_cannot_be_used_is_one_sentence(what, tmp_path):
    options, said = REFUSED[what]
    save(tmp_path, **options)
    if what == "another prediction":  # diffusers itself writes no such thing
        place = tmp_path / "scheduler" / "scheduler_config.json"
        place.write_text(json.dumps(json.loads(place.read_text()) | {"prediction_type": "flow_prediction"}))
    with pytest.raises(errors.Invalid, match=said) as caught:
        prior.load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_options():
    assert errors.whole("steps", 3, 1, 3) == 3
    assert isinstance(errors.number("eta", 1, 0, 1), float)
    for bad in (0, 4, 1.0, True, "1", None, float("nan")):
        with pytest.raises(errors.Invalid, match=r"^steps must be a whole number from 1 to 3, not .*\.$"):
            errors.whole("steps", bad, 1, 3)
    for bad in (-1, float("inf"), float("nan"), True, "1", None, 1j):
        with pytest.raises(errors.Invalid, match=r"^sigma must be a number of at least 0, not .*\.$"):
            errors.number("sigma", bad, 0)


def test_a_seed_is_a_series():
    one, again, other = (torch.rand(3, generator=common.generator(seed)) for seed in (1, np.uint8(1), 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one, torch.rand(3, generator=torch.Generator().manual_seed(1)))
    for bad in ("a", -1, 0.5, True, None, 2**64):
        with pytest.raises(errors.Invalid, match=r"^seed must be a whole number from 0 to .*\.$"):
            common.generator(bad)

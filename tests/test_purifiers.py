"""Purifiers: what they do to an image, what they draw, and that they undo some of a real attack."""

import numpy as np
import pytest
import torch
from scipy.ndimage import median_filter
from skimage.restoration import denoise_tv_chambolle

from faceadv import attacks, errors, images, objectives, purifiers, recognisers


@pytest.fixture(scope="module")
def attacked(orl, dlib):
    """24 impersonations at 2 grey levels: the photos, the attacked ones, references and the objective."""
    embeddings = recognisers.embed_faces(dlib, orl)
    x = orl.images[0:240:10]
    references = embeddings[(torch.arange(24) * 10 + 195) % 400]
    objective = objectives.impersonation(dlib, references)
    return x, attacks.pgd(x, objective, eps=2 / 255, steps=10), references, objective


PLAIN = ("jpeg", "randomization", "bit-depth", "blur", "median", "total-variation")


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in PLAIN), ("jpeg", {"quality": 50})])
def test_better_than_doing_nothing(name, options, attacked, dlib):
    x, y, references, objective = attacked
    purifier = purifiers.load(name, **options)
    assert objectives.success(objective, y).float().mean() >= 0.85
    assert objectives.success(objective, purifier(y)).float().mean() <= 0.8
    with torch.no_grad():
        far = dlib.distance(dlib.embed(purifier(y)), references) - dlib.distance(dlib.embed(y), references)
        # and the person stays who it is
        moved = dlib.distance(dlib.embed(purifier(x)), dlib.embed(x))
    assert (far > 0).float().mean() >= 0.9
    assert moved.max() < dlib.threshold


@pytest.mark.parametrize("name", PLAIN)
def test_range_shape_and_original(name, orl):
    x = torch.cat([orl.images[:2], torch.ones(1, 3, 112, 112), torch.zeros(1, 3, 112, 112)])
    before, purifier = x.clone(), purifiers.load(name)
    y = purifier(x)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert y.min() >= 0
    assert y.max() <= 1
    assert torch.equal(x, before)
    assert not torch.equal(y[:2], x[:2])
    assert not purifier.training
    assert purifier(x[:1, :, ::2, ::2]).shape == (1, 3, 56, 56)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8).byte(), torch.full((1, 3, 8, 8), 2.0)])
def test_wrong_images_are_refused(name, bad):
    with pytest.raises(ValueError, match="images must"):
        purifiers.load(name)(bad)


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r'no purifier "jpg" \(did you mean jpeg\?\); there are '):
        purifiers.load("jpg")


def test_bits_are_counted(orl):
    for bits in (1, 4, 8):
        y = purifiers.load("bit-depth", bits=bits)(orl.images[:4].requires_grad_(True))
        assert 1 < len(y.unique()) <= 2**bits
        assert (y - orl.images[:4]).abs().max() <= 0.5 / (2**bits - 1) + 1e-6
        assert not y.requires_grad
    for wrong in (0, 9, 2.5, 2.0, True):
        with pytest.raises(ValueError, match="from 1 to 8"):
            purifiers.load("bit-depth", bits=wrong)


def test_median_and_total_variation_are_those_of_scipy_and_scikit_image(orl):
    draw = torch.Generator().manual_seed(0)
    x = (orl.images[:2] + 0.05 * torch.randn(2, 3, 112, 112, generator=draw)).clamp(0, 1)
    for size in (1, 3, 5):
        with_scipy = [[median_filter(colour.numpy(), size, mode="nearest") for colour in image] for image in x]
        np.testing.assert_array_equal(purifiers.load("median", size=size)(x), with_scipy)
    with pytest.raises(ValueError, match="odd"):
        purifiers.load("median", size=2)
    for weight, steps in ((0.05, 20), (0.2, 7)):
        # its first iteration only sets out; eps 0 turns its early stop off
        options = {"weight": weight, "max_num_iter": steps + 1, "eps": 0, "channel_axis": -1}
        with_skimage = [denoise_tv_chambolle(image.permute(1, 2, 0).numpy(), **options) for image in x]
        y = purifiers.load("total-variation", weight=weight, steps=steps)(x).permute(0, 2, 3, 1)
        np.testing.assert_allclose(y, np.clip(with_skimage, 0, 1), atol=1e-5)


@pytest.mark.parametrize("name", ["blur", "median", "total-variation", "randomization"])
def test_gradients_go_through(name):
    draw = torch.Generator().manual_seed(1)  # no photo: in its flat parts the median has a kink
    x = (0.1 + 0.8 * torch.rand(2, 3, 112, 112, generator=draw)).requires_grad_(True)
    weights = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad((purifiers.load(name)(x) * weights).sum(), x)
    step = 1e-4 * slope.sign()
    with torch.no_grad():
        rise = ((purifiers.load(name)(x + step) - purifiers.load(name)(x - step)) * weights).sum()
        expected = (slope * 2 * step).sum()
    assert rise.item() == pytest.approx(expected.item(), rel=0.1)


def test_jpeg_is_a_file_of_that_quality(orl):
    x = orl.images[:3]
    changes = []
    for quality in (90, 75, 30):
        y = purifiers.load("jpeg", quality=quality)(x.clone().requires_grad_(True))
        assert torch.equal(y, images.jpeg(x, quality))
        assert not y.requires_grad
        changes.append((y - x).square().mean().item())
    assert changes[0] < changes[1] < changes[2]
    assert torch.equal(purifiers.load("jpeg")(x), images.jpeg(x, 75))


def test_randomization_goes_on_in_the_series_of_its_seed(orl):
    x = orl.images[:3]
    a, b, c = (purifiers.load("randomization", seed=seed) for seed in (1, 1, 2))
    first = a(x)
    assert torch.equal(first, b(x))
    assert not torch.equal(first, c(x))
    assert not torch.equal(first, a(x))
    state = torch.get_rng_state()
    a(x)
    assert torch.equal(state, torch.get_rng_state())  # its own series, not torch's


def test_each_image_draws_its_own_numbers(orl):
    y = purifiers.load("randomization")(orl.images[:1].repeat(12, 1, 1, 1))
    different = [not torch.equal(y[i], y[j]) for i in range(12) for j in range(i)]
    assert sum(different) >= 60  # of 66


def test_randomization_draws_sides_and_places_as_published():
    """White comes back with a black border: 112 is enlarged to 116 … 123 of 124, anywhere in it."""
    y = purifiers.load("randomization")(torch.ones(200, 3, 112, 112))[:, 0]
    width, height = y.amax(1).sum(1), y.amax(2).sum(1)
    assert torch.allclose(width, height, atol=1.5)
    sides = width * 124 / 112
    assert sides.min() > 116 - 1.2
    assert sides.max() < 123 + 1.2
    assert sides.max() - sides.min() > 5
    top, bottom = 1 - y[:, 0, 56], 1 - y[:, -1, 56]
    left, right = 1 - y[:, 56, 0], 1 - y[:, 56, -1]
    for border in (top, bottom, left, right):
        assert 0.1 < (border > 0.9).float().mean() < 0.9
    assert not torch.equal(top > 0.9, left > 0.9)


def test_randomization_is_nearest_neighbour_then_padding(orl):
    """The result is that of one of all 284 possible draws, made here with numpy."""
    x = orl.images[0]
    (y,) = purifiers.load("randomization", seed=3)(x[None])
    errors = []
    for side in range(116, 124):
        pick = np.arange(side) * 112 // side
        for left in range(124 - side + 1):
            for top in range(124 - side + 1):
                padded = np.zeros((3, 124, 124), np.float32)
                padded[:, top : top + side, left : left + side] = x.numpy()[:, pick][:, :, pick]
                back = torch.nn.functional.interpolate(torch.from_numpy(padded)[None], (112, 112), mode="bilinear")
                errors.append((back[0] - y).abs().max().item())
    assert len(errors) == 284
    assert sorted(errors)[0] < 1e-5 < 0.1 < sorted(errors)[1]


def test_randomization_is_linear_and_differentiable(orl):
    x = orl.images[:3].clone().requires_grad_(True)
    weights = torch.randn(3, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    loss = (weights * purifiers.load("randomization", seed=4)(x)).sum()
    (slope,) = torch.autograd.grad(loss, x)
    assert (slope.flatten(1).norm(dim=1) > 0).all()
    other = orl.images[100:103]
    expected = (weights * purifiers.load("randomization", seed=4)(other)).sum()
    assert (slope * other).sum().item() == pytest.approx(expected.item(), abs=0.05, rel=1e-3)


@pytest.mark.parametrize("seed", [0, 5])
def test_randomization_keeps_height_and_width(seed, orl):
    """Before: 112 x 96 became 96 x 96. White comes back with a border on all sides of both sizes in turn."""
    for height, width in ((112, 96), (96, 112), (1, 7)):
        assert purifiers.load("randomization", seed=seed)(torch.ones(2, 3, height, width)).shape == (
            2,
            3,
            height,
            width,
        )
    tall = purifiers.load("randomization", seed=seed)(torch.ones(100, 3, 112, 96))[:, 0]
    shares = [(tall.amax(3 - axis) > 0.5).float().mean(1) for axis in (1, 2)]  # of the height and of the width
    for share in shares:
        assert 0.93 < share.min() < share.max() <= 1
    assert (shares[0] - shares[1]).abs().max() < 0.02  # enlarged alike


def test_no_images_stay_none():
    for name in PLAIN:
        if name != "jpeg":  # images.jpeg
            assert purifiers.load(name)(torch.zeros(0, 3, 16, 16)).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("jpeg", {"quality": value}) for value in (0, 96, 101, 75.5, True, "75", None)),
        *(("blur", {"sigma": value}) for value in (-1, float("nan"), float("inf"), "1")),
        *(("median", {"size": value}) for value in (0, 2, 3.0, True)),
        *(("total-variation", {"weight": value}) for value in (0, -1, float("nan"), float("inf"))),
        *(("total-variation", {"steps": value}) for value in (0, 2.5, True)),
        *(("randomization", {"seed": value}) for value in (-1, 0.5, None)),
        *(("diffpure", {"steps": 0}), ("diffpure", {"time": 1000}), ("two-stage", {"scale": 3})),
        *(("colourisation", {"eta": 1.2}), ("super-resolution", {"steps": 0})),
    ],
)
def test_options_that_make_no_sense(name, options):
    with pytest.raises(errors.Invalid, match=rf"^{next(iter(options))} must .*\.$"):
        purifiers.load(name, **options)


@pytest.mark.parametrize("name", ["jpeg", "resgn", "two-stage", "diffpure", "randomization"])
def test_an_unknown_option_is_one_sentence(name):
    with pytest.raises(errors.Invalid, match=rf'^The purifier "{name}" has no option qualty\.$'):
        purifiers.load(name, qualty=50)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *(("colourisation", "stages", "both"), ("super-resolution", "stages", "both"), ("colourisation", "scale", 4)),
        *(("jpeg", "prior", "shipped"), ("two-stage", "unet", None), ("diffpure", "schedule", None)),
    ],
)
def test_an_option_of_other_purifiers_is_refused(name, option, value):
    """Before: both stages, or neither's scale, without a word."""
    with pytest.raises(errors.Invalid, match=rf'^The purifier "{name}" has no option {option}\.$'):
        purifiers.load(name, **{option: value})


def test_the_options_that_a_stage_has_reach_it():
    assert purifiers.load("colourisation", eta=0.5).stages == "colourisation"
    stage = purifiers.load("super-resolution", scale=4, prior="shipped", seed=3)
    assert (stage.stages, stage.scale, stage.seed) == ("super-resolution", 4, 3)
    assert purifiers.load("two-stage", stages="colourisation").stages == "colourisation"


def test_whole_numbers_of_numpy_are_whole_numbers(orl):
    x = orl.images[:1]
    assert torch.equal(purifiers.load("jpeg", quality=np.int64(50))(x), purifiers.load("jpeg", quality=50)(x))
    blurred = purifiers.load("blur", sigma=np.float32(1))(x)
    assert torch.equal(blurred, purifiers.load("blur", sigma=1)(x))


@pytest.mark.parametrize("name", ["resgn", "puface", "two-stage", "diffpure"])
def test_networks_refuse_wrong_images_too(name, orl):
    """Before: x * 255 became a white picture, without a word."""
    purifier = purifiers.load(name, **({"steps": 1} if name in ("two-stage", "diffpure") else {}))
    for bad in (orl.images[:1] * 255, orl.images[0], torch.zeros(1, 3, 8, 8).byte()):
        with pytest.raises(errors.Invalid, match="images must"):
            purifier(bad)


@pytest.mark.parametrize("name", ["resgn", "puface", "two-stage", "diffpure", "randomization"])
def test_loading_leaves_global_random_numbers_alone(name):
    before = torch.get_rng_state()
    purifiers.load(name)
    assert torch.equal(before, torch.get_rng_state())

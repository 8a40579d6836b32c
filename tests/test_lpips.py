"""LPIPS: the published formula, from weights that were checked, and LowKey's choice of it."""

import pooch
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
import torchvision

from faceadv import cloaks, errors
from faceadv.networks import lpips
from faceadv.store import weights

FILE = "alexnet-owt-7be5be79.pth"


@pytest.fixture
def alexnet(tmp_path, monkeypatch):
    """An AlexNet with random weights, in the place and under the hash of the published one."""
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    torch.manual_seed(0)
    trunk = torchvision.models.alexnet().features.eval()
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / FILE
    torch.save({f"features.{key}": value for key, value in trunk.state_dict().items()}, path)
    monkeypatch.setitem(weights.PUBLISHED, FILE, pooch.file_hash(path))
    return trunk


def test_the_formula(alexnet, orl):
    a, b = orl.images[:3], orl.images[10:13]
    file = torchmetrics.__path__[0] + "/functional/image/lpips_models/alex.pth"
    heads = torch.load(file, map_location="cpu", weights_only=True)
    mean, spread = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = (((2 * z - 1) - mean[:, None, None]) / spread[:, None, None] for z in (a, b))
    total, place = 0.0, 0
    for number, layer in enumerate((1, 4, 7, 9, 11)):
        x, y = (alexnet[place : layer + 1](z) for z in (x, y))
        place = layer + 1
        apart = (F.normalize(x, eps=1e-8) - F.normalize(y, eps=1e-8)).square()
        total = total + (apart * heads[f"lin{number}.model.1.weight"]).sum(1).mean((1, 2))
    with torch.no_grad():
        torch.testing.assert_close(lpips.load()(a, b), total, rtol=1e-3, atol=1e-5)


def test_one_network_for_each_device_however_it_is_named(alexnet, orl):
    """Before: "cpu" and torch.device("cpu") read the file of 244 MB twice."""
    lpips._network.cache_clear()
    for name in ("cpu", torch.device("cpu"), "cpu"):
        lpips.load(name)
    assert lpips._network.cache_info().misses == 1


def test_lowkey_pays_by_it(alexnet, orl, dlib):
    name, distance = cloaks.perceptual()
    assert name == "LPIPS"
    x = orl.images[:1]
    assert distance(x, x).item() == 0
    dear, cheap = (cloaks.lowkey(x, [dlib], steps=4, smooth=False, price=p) for p in (1e4, 0.0))
    assert distance(dear, x) < distance(cheap, x)


def test_without_its_weights_it_is_multiscale_ssim(tmp_path, monkeypatch, orl):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name, distance = cloaks.perceptual()
    assert (name, distance) == ("1 - multi-scale SSIM", cloaks.multiscale)
    assert distance(orl.images[:2], orl.images[:2]).abs().max() < 1e-5
    with pytest.raises(FileNotFoundError, match="faceadv weights fetch alexnet"):
        lpips.load()


def test_other_weights_are_refused(alexnet, tmp_path):
    with open(tmp_path / "weights" / FILE, "ab") as file:
        file.write(b"0")
    with pytest.raises(ValueError, match="not the file that was published"):
        lpips.load()


def test_other_images_are_refused(alexnet, orl):
    """Before: a distance of pictures that are white all over."""
    distance, x = lpips.load(), orl.images[:1]
    for bad in (x * 255, x[0], (x * 255).byte()):
        for pair in ((bad, x), (x, bad)):
            with pytest.raises(errors.Invalid, match="images must"):
                distance(*pair)

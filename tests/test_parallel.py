"""The same function on many items, in this process and in others."""

import contextlib
import logging
import os
import signal
import socket

import pytest
import torch

from faceadv import parallel
from faceadv.errors import Failed, Invalid
from faceadv.store import progress, threads


def measure(item, factor):
    if item == "bad":
        raise KeyError(item)
    facts = {"quiet": not progress.log.isEnabledFor(logging.INFO), "threads": torch.get_num_threads()}
    return item * factor, os.getpid(), facts, {name: os.environ.get(name) for name in threads.ENVIRONMENT}


@pytest.fixture
def in_use():
    with socket.socket() as one:
        yield one


def test_processes_get_their_share_and_leave_nothing_behind(monkeypatch, in_use):
    monkeypatch.setattr(threads, "cores", lambda: 1)
    for name in threads.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("FACEADV_QUIET", raising=False)  # a worker is quiet without it
    before = dict(os.environ)
    with contextlib.suppress(OSError):  # Dask's usual port is in use, by another run for example
        in_use.bind(("", 8787))
        in_use.listen()
    found = dict(parallel.compute(measure, [1, 2, 3], "local", factor=2))
    assert os.environ == before
    assert {item: made[0] for item, made in found.items()} == {1: 2, 2: 4, 3: 6}
    assert len({made[1] for made in found.values()}) == 1  # one core, one process, one thread
    assert {made[1] for made in found.values()} != {os.getpid()}
    for _, _, facts, environment in found.values():
        assert facts == {"quiet": True, "threads": 1}
        assert environment == threads.ENVIRONMENT


def die_once(item, marker):
    if item == "killer" or (item == "kills once" and not marker.exists()):
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return f"{item} done"


def test_what_kills_a_worker_loses_nothing_else(tmp_path):
    import dask

    done, items = {}, ["a", "kills once", "killer", "b"]

    def compute():
        for item, made in parallel.compute(die_once, items, "local", 1, marker=tmp_path / "killed"):
            done[item] = made

    # a timeout that is over while a worker starts again, as 15 seconds can be on a busy machine
    hasty = {"distributed.scheduler.allowed-failures": 0, "distributed.deploy.lost-worker-timeout": "10ms"}
    with dask.config.set(hasty), pytest.raises(Failed) as caught:
        compute()
    assert str(caught.value) == "killer killed its worker again and again (memory?)."
    assert done == {item: f"{item} done" for item in ("a", "kills once", "b")}


def test_workers_of_a_scheduler_elsewhere():
    import dask
    from distributed import LocalCluster

    dask.config.set({"distributed.nanny.pre-spawn-environ": {}})  # it would set them for the tests after this one
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", silence_logs=50) as cluster:
        found = dict(parallel.compute(die_once, ["a", "b"], cluster.scheduler_address, marker=None))
    assert found == {"a": "a done", "b": "b done"}


def test_a_local_scheduler_that_cannot_start_says_why(monkeypatch):
    import distributed

    def fail(**options):
        raise OSError("no port is free")

    monkeypatch.setattr(distributed, "LocalCluster", fail)
    with pytest.raises(OSError, match="no port is free"):  # and not that no scheduler answers at "local"
        list(parallel.compute(measure, [1], "local", factor=1))


def test_what_cannot_work_is_told():
    with pytest.raises(Failed, match='No Dask scheduler answers at "nonsense"'):
        list(parallel.compute(measure, [1], "nonsense", factor=1))
    with pytest.raises(Invalid, match="workers must be 1 or more, not 0"):
        list(parallel.compute(measure, [1], "local", 0, factor=1))
    with pytest.raises(KeyError, match="bad"):  # a fault of the program keeps its own exception
        list(parallel.compute(measure, ["bad"], factor=1))

"""The same function on many items, in this process and in others."""

import logging
import os

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


def test_processes_get_their_share_and_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(threads, "cores", lambda: 1)
    for name in threads.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("FACEADV_QUIET", raising=False)  # a worker is quiet without it
    before = dict(os.environ)
    found = dict(parallel.compute(measure, [1, 2, 3], "local", factor=2))
    assert os.environ == before
    assert {item: made[0] for item, made in found.items()} == {1: 2, 2: 4, 3: 6}
    assert len({made[1] for made in found.values()}) == 1  # one core, one process, one thread
    assert {made[1] for made in found.values()} != {os.getpid()}
    for _, _, facts, environment in found.values():
        assert facts == {"quiet": True, "threads": 1}
        assert environment == threads.ENVIRONMENT


def test_what_cannot_work_is_told():
    with pytest.raises(Failed, match='No Dask scheduler answers at "nonsense"'):
        list(parallel.compute(measure, [1], "nonsense", factor=1))
    with pytest.raises(Invalid, match="workers must be 1 or more, not 0"):
        list(parallel.compute(measure, [1], "local", 0, factor=1))
    with pytest.raises(KeyError, match="bad"):  # a fault of the program keeps its own exception
        list(parallel.compute(measure, ["bad"], factor=1))

"""What goes wrong with a Dask cluster: each fault ends in one sentence, soon, and what was done is kept."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import faceadv
from faceadv import parallel
from faceadv.errors import Failed, UserError

SOON = 300  # seconds; it is much sooner, but a busy machine starts workers slowly


@contextlib.contextmanager
def failing(words):
    """A context that raises ``Failed``, a sentence with these words, soon."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(SOON)
    try:
        with pytest.raises(Failed, match=re.escape(words)) as caught:
            yield
    finally:
        signal.alarm(0)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)


@contextlib.contextmanager
def cluster():
    """A scheduler's address, its process, and a function that starts workers, with a folder first on their path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []

    def start(command, *arguments, path=""):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), *sys.path])}
        asked = [sys.executable, "-P", "-m", f"distributed.cli.dask_{command}", "--no-dashboard", *arguments]
        asked += ["--nthreads", "1", "--no-nanny"] if command == "worker" else []
        where = path or None  # ``python -m`` looks there before all other folders
        processes.append(subprocess.Popen(asked, env=environment, cwd=where, stderr=subprocess.DEVNULL))
        return processes[-1]

    try:
        yield f"tcp://127.0.0.1:{port}", start("scheduler", "--host", "127.0.0.1", "--port", port), start
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def nothing():
    """A program that takes connections and never says a word."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield f"tcp://127.0.0.1:{other.getsockname()[1]}"


@pytest.fixture(scope="module")
def talker():
    """A program that is no scheduler, and says so at once, as a mail or SSH server does."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def talk():
            with contextlib.suppress(OSError):
                while True:
                    one, _ = other.accept()
                    one.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" * 9)
                    one.close()

        threading.Thread(target=talk, daemon=True).start()
        yield f"tcp://127.0.0.1:{other.getsockname()[1]}"


@pytest.mark.parametrize("what", ["nothing", "talker"])
def test_something_else_at_the_address(what, request, monkeypatch):
    monkeypatch.setattr(parallel, "PATIENCE", 2)
    address = request.getfixturevalue(what)
    with failing(f'No Dask scheduler answers at "{address}"'):
        list(parallel.compute(abs, [1, 2], address))


def test_a_scheduler_has_no_workers_or_dies_in_the_middle(monkeypatch):
    done = []
    with cluster() as (address, scheduler, start):
        with monkeypatch.context() as hasty, failing("it has no `dask worker`"):
            hasty.setattr(parallel, "PATIENCE", 2)
            list(parallel.compute(abs, [1, 2], address))
        start("worker", address)
        monkeypatch.setattr(parallel, "PATIENCE", 200)  # a busy machine starts a worker slowly
        with failing("went away: start it, and run this again."):
            for item, _ in parallel.compute(time.sleep, [0, 60], address):
                done.append(item)
                scheduler.kill()
    assert done == [0]


def test_all_workers_leave_in_the_middle(monkeypatch):
    done = []
    monkeypatch.setattr(parallel, "PATIENCE", 200)
    with cluster() as (address, _, start):
        worker = start("worker", address)
        with failing("All workers of the Dask scheduler went away"):
            for item, _ in parallel.compute(time.sleep, [0, 60], address):
                done.append(item)
                worker.kill()
                monkeypatch.setattr(parallel, "PATIENCE", 2)
                left = time.monotonic()
    assert done == [0]
    assert time.monotonic() - left < 20


def test_a_worker_with_other_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "PATIENCE", 200)
    package = Path(faceadv.__file__).parent
    shutil.copytree(package, tmp_path / "faceadv", ignore=shutil.ignore_patterns("models", "__pycache__"))
    (tmp_path / "faceadv" / "models").symlink_to(package / "models")
    with open(tmp_path / "faceadv" / "metrics.py", "a") as file:
        file.write("\nAT_ONCE += 1\n")
    with cluster() as (address, _, start):
        start("worker", address, path=tmp_path)
        with failing("has another version of faceadv"):
            list(parallel.compute(abs, [1, 2], address))

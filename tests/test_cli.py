"""The command line: what it prints, what it refuses, and its exit status."""

import importlib
import subprocess
import sys
import types

import pytest

from faceadv import cli


@pytest.fixture
def stand_in(monkeypatch):
    """Put a module of functions in the place of faceadv.NAME."""

    def replace(name, **functions):
        module = types.SimpleNamespace(**functions)
        room, _, last = f"faceadv.{name}".rpartition(".")
        monkeypatch.setattr(importlib.import_module(room), last, module, raising=False)
        monkeypatch.setitem(sys.modules, f"faceadv.{name}", module)

    return replace


def sets(root=None):
    row = {"what": "photos", "licence": "free", "size": "4 MB"}
    return [{"name": "orl", "found": "/here", **row}, {"name": "lfw", "found": None, **row}]


def nets():
    row = {"what": "a network", "size": "1 MB"}
    return [
        {"name": "dlib", "path": "/here", "found": True, **row},
        {"name": "facenet", "path": None, "found": False, **row},
    ]


def test_help_is_quick_and_imports_no_torch():
    code = "import sys; from faceadv import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'papermill', 'matplotlib', 'pandas') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "train a network" in done.stdout


@pytest.mark.parametrize("argv", [[], ["runn"], ["data"], ["data", "fetch"], ["run", "-p", "steps"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert "usage: faceadv" in capsys.readouterr().err


def test_data(stand_in, capsys):
    calls = []
    stand_in(
        "store.datasets",
        listing=sets,
        fetch=lambda name, root=None: calls.append((name, root)) or "/there",
        check=lambda name, root=None: [(True, "whole"), (False, "short")],
    )
    assert cli.main(["data", "list"]) == 0
    told = capsys.readouterr().out
    assert "/here" in told
    assert "not here: faceadv data fetch lfw" in told
    assert cli.main(["data", "fetch", "lfw", "--root", "r"]) == 0
    assert calls == [("lfw", "r")]
    assert capsys.readouterr().out == "/there\n"
    assert cli.main(["data", "check", "orl"]) == 1
    assert capsys.readouterr().out == "[OK] whole\n[FAIL] short\n"
    assert cli.main(["data", "check", "lwf"]) == 2
    told = capsys.readouterr().err
    assert told == 'faceadv: There is no data set "lwf" (did you mean lfw?); there are orl, lfw.\n'


def test_weights(stand_in, capsys):
    stand_in("store.weights", listing=nets, fetch=lambda name: "/there", check=lambda: [(True, "whole")])
    assert cli.main(["weights", "list"]) == 0
    assert "not here: faceadv weights fetch facenet" in capsys.readouterr().out
    assert cli.main(["weights", "fetch", "facenet"]) == 0
    assert cli.main(["weights", "fetch", "dlib"]) == 0
    assert capsys.readouterr().out == "/there\n/here\n"
    assert cli.main(["weights", "check"]) == 0
    assert capsys.readouterr().out == "[OK] whole\n"
    assert cli.main(["weights", "fetch", "facnet"]) == 2
    assert "did you mean facenet?" in capsys.readouterr().err


def test_check(stand_in, capsys):
    stand_in("course.report", report=lambda: [(True, "Python 3.11"), (False, "torch is missing")])
    assert cli.main(["check"]) == 1
    assert capsys.readouterr().out == "[OK] Python 3.11\n[FAIL] torch is missing\n"


def test_expected_errors_are_one_sentence(stand_in, capsys, monkeypatch):
    def fetch(name, root=None):
        raise RuntimeError("The download\nbroke off.")

    monkeypatch.delenv("FACEADV_DEBUG", raising=False)
    stand_in("store.datasets", listing=sets, fetch=fetch)
    assert cli.main(["data", "fetch", "lfw"]) == 1
    assert capsys.readouterr().err == "faceadv: The download broke off.\n"
    monkeypatch.setenv("FACEADV_DEBUG", "1")
    with pytest.raises(RuntimeError):
        cli.main(["data", "fetch", "lfw"])


def test_train(stand_in, capsys, monkeypatch):
    stand_in("stand_in", main=lambda profile, resume: f"{profile} {resume}")
    monkeypatch.setitem(cli.TRAINERS, "mobile", "faceadv.stand_in:main")
    assert cli.main(["train", "mobile", "--profile", "smoke", "--resume"]) == 0
    assert capsys.readouterr().out == "smoke True\n"
    assert cli.main(["train", "mobil"]) == 2
    assert "did you mean mobile?" in capsys.readouterr().err
    assert cli.main(["train", "mobile", "--profile", "smok"]) == 2
    assert "did you mean smoke?" in capsys.readouterr().err


def test_run_passes_on_what_was_asked(stand_in, capsys):
    calls = []

    def run(names, profile, overrides, out, fresh):
        calls.append((names, profile, overrides, out, fresh))
        return [types.SimpleNamespace(status="reused")]

    def update(names, out, fresh):
        calls.append((names, "update"))
        return [types.SimpleNamespace(status="failed")]

    stand_in("course.run", run=run, update=update, summary=lambda results: "the table")
    assert cli.main(["run", "00", "01", "-p", "lr", "1e-3", "-p", "eps", "-1", "--fresh"]) == 0
    assert cli.main(["run", "--profile", "smoke", "--out", "o"]) == 0
    assert cli.main(["run", "00", "--update"]) == 1
    assert calls == [
        (["00", "01"], "orl", {"lr": "1e-3", "eps": "-1"}, "build", True),
        (["all"], "smoke", {}, "o", False),
        (["00"], "update"),
    ]
    assert "the table" in capsys.readouterr().out
    assert cli.main(["run", "--update", "--profile", "lfw"]) == 2
    assert "no other profile" in capsys.readouterr().err

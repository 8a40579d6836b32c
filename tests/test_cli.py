"""The command line: what it prints, what it refuses, and its exit status."""

import errno
import importlib.metadata
import os
import subprocess
import sys
import types

import pytest

import faceadv
from faceadv import cli
from faceadv.course import assignments
from faceadv.errors import Failed, Invalid, Missing
from faceadv.store.paths import PROJECT


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


def test_help_is_quick_imports_no_torch_and_settles_the_threads_first():
    code = "import os, sys; from faceadv import cli; status = cli.main(['--help'])\n"
    code += "slow = [name for name in ('torch', 'papermill', 'matplotlib', 'pandas') if name in sys.modules]\n"
    code += "print(status, slow, os.environ['GOMP_SPINCOUNT'].isdigit())"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "0 [] True"
    for name in ("assignments", "bench", "check", "data", "deidentify", "run", "ship", "train", "weights"):
        assert f"\n  {name} " in done.stdout


def test_the_package_is_quick_to_import():
    """Every kernel pays for what is imported. These take longer than all the rest, and come where they are used."""
    modules = [
        ".".join(path.relative_to(PROJECT).with_suffix("").parts)
        for room in ("*.py", "networks/*.py", "store/*.py", "benchmark/*.py")
        for path in sorted((PROJECT / "faceadv").glob(room))
        if path.stem not in ("__main__", "figures", "plots")
    ]
    code = f"import sys, {', '.join(modules)}\n"
    slow = ("torchvision", "torchmetrics", "torch._dynamo", "sympy", "sklearn", "diffusers", "scipy.stats", "dask")
    code += f"print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"faceadv, version {faceadv.__version__}\n"
    assert importlib.metadata.version("faceadv") == faceadv.__version__


@pytest.mark.parametrize("argv", [[], ["runn"], ["data"], ["data", "fetch"], ["run", "-p", "steps"], ["check", "--al"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    assert cli.main(argv) == 2
    told = capsys.readouterr()
    assert told.err.startswith(("Usage: faceadv", "Error: Option '-p' requires 2 arguments"))
    assert told.out == ""


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


def test_weights(stand_in, capsys):
    fetched = []
    stand_in(
        "store.weights",
        listing=nets,
        fetch=lambda name: fetched.append(name) or f"/there/{name}",
        check=lambda: [(True, "whole")],
    )
    assert cli.main(["weights", "list"]) == 0
    told = capsys.readouterr().out
    assert "/here" in told
    assert "not here: faceadv weights fetch facenet" in told
    assert cli.main(["weights", "fetch", "facenet"]) == 0
    assert capsys.readouterr().out == "/there/facenet\n"
    assert cli.main(["weights", "fetch", "all"]) == 0
    assert capsys.readouterr().out == "/there/dlib\n/there/facenet\n"
    assert fetched == ["facenet", "dlib", "facenet"]
    assert cli.main(["weights", "check"]) == 0
    assert capsys.readouterr().out == "[OK] whole\n"


def test_a_mistyped_name_of_data_or_weights_is_one_sentence(capsys):
    for argv, told in {
        ("data", "check", "lwf"): 'faceadv: There is no data set "lwf" (did you mean lfw?)',
        ("data", "fetch", "lwf"): 'faceadv: There is no data set "lwf" (did you mean lfw?)',
        ("weights", "fetch", "alexnett"): 'faceadv: There are no weights "alexnett" (did you mean alexnet?)',
        ("train", "pufac"): 'faceadv: There is no network "pufac" to train (did you mean puface?)',
        ("ship", "pufac"): 'faceadv: There is no network "pufac" to train (did you mean puface?)',
    }.items():
        assert cli.main(argv) == 2
        err = capsys.readouterr().err
        assert err.startswith(told)
        assert err.count("\n") == 1


def test_check(stand_in, capsys):
    stand_in("course.report", report=lambda: [(True, "Python 3.11"), (False, "torch is missing")])
    assert cli.main(["check"]) == 1
    assert capsys.readouterr().out == "[OK] Python 3.11\n[FAIL] torch is missing\n"


@pytest.fixture
def failing(stand_in, monkeypatch):
    """Run a command that raises an error; returns the exit status."""
    monkeypatch.delenv("FACEADV_DEBUG", raising=False)

    def run(error):
        def fetch(name, root=None):
            raise error

        stand_in("store.datasets", listing=sets, fetch=fetch)
        return cli.main(["data", "fetch", "lfw"])

    return run


@pytest.mark.parametrize("kind", [Invalid, Missing, Failed])
def test_what_a_user_can_mend_is_one_sentence(kind, failing, capsys, monkeypatch):
    assert failing(kind("The download\nbroke off.")) == 2
    assert capsys.readouterr() == ("", "faceadv: The download broke off.\n")
    monkeypatch.setenv("FACEADV_DEBUG", "1")
    with pytest.raises(kind):
        cli.main(["data", "fetch", "lfw"])


FAULTS = [
    *(ValueError("x"), UnicodeEncodeError("ascii", "é", 0, 1, "x"), RuntimeError("x"), KeyError("x"), EOFError("x")),
    *(ImportError("x"), FileNotFoundError(errno.ENOENT, "x", "y"), OSError(errno.EIO, "x", "y"), OSError("x")),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_fault_of_the_program_keeps_its_traceback(error, failing, capsys):
    with pytest.raises(type(error)) as raised:
        failing(error)
    assert raised.value is error
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "ENOTDIR", "EISDIR", "EEXIST"])
def test_a_file_that_cannot_be_used_is_a_sentence_that_names_it(name, failing, capsys):
    number = getattr(errno, name)
    assert failing(OSError(number, os.strerror(number), "/their/file")) == 2
    reason = os.strerror(number).lower()
    said = f"faceadv: /their/file cannot be read or written ({reason}): mend that, or name another place.\n"
    assert capsys.readouterr() == ("", said)


def test_a_file_in_the_place_of_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FACEADV_DEBUG", raising=False)
    (tmp_path / "taken").write_text("mine")
    name = assignments.names()[0]
    assert cli.main(["assignments", "release", name, "--course", str(tmp_path / "taken")]) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "taken") in told
    assert told.count("\n") == 1
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_interrupted_command_ends_with_130(failing, capsys, monkeypatch):
    assert failing(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "faceadv: interrupted.\n"
    monkeypatch.setenv("FACEADV_DEBUG", "1")
    with pytest.raises(KeyboardInterrupt):
        cli.main(["data", "fetch", "lfw"])


def test_train_and_ship(stand_in, capsys):
    calls = []
    stand_in(
        "training.loop",
        run=lambda **given: calls.append(given) or "/folder",
        ship=lambda **given: calls.append(given) or "/weights",
    )
    everything = ["--profile", "smoke", "--resume", "--seed", "3", "--root", "r", "--out", "o"]
    assert cli.main(["train", "puface", *everything]) == 0
    assert cli.main(["train", "puface"]) == 0
    assert cli.main(["ship", "puface", "--profile", "smoke", "--out", "o"]) == 0
    assert cli.main(["ship", "resgn"]) == 0
    assert calls == [
        {"name": "puface", "profile": "smoke", "resume": True, "seed": 3, "root": "r", "out": "o"},
        {"name": "puface", "profile": "lfw", "resume": False, "seed": 0, "root": None, "out": None},
        {"name": "puface", "profile": "smoke", "root": None, "out": "o"},
        {"name": "resgn", "profile": "lfw", "root": None, "out": None},
    ]
    assert capsys.readouterr().out == "/folder\n/folder\n/weights\n/weights\n"


@pytest.mark.parametrize("command", ["run", "bench"])
def test_a_parameter_that_is_given_twice_is_refused(command, stand_in, capsys):
    calls = []
    stand_in("course.run", run=lambda *given, **options: calls.append(given))
    assert cli.main([command, "-p", "eps_255", "1", "-p", "steps", "2", "-p", "eps_255", "4"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("faceadv: -p eps_255 is given more than once")
    assert told.count("\n") == 1
    assert calls == []


def test_run_passes_on_what_was_asked(stand_in, capsys):
    calls = []

    def run(names, profile, overrides, out, fresh, jobs):
        calls.append((names, profile, overrides, out, fresh, jobs))
        return [types.SimpleNamespace(status="reused")]

    def update(names, profile, out, fresh):
        calls.append((names, "update", profile))
        return [types.SimpleNamespace(status="failed")]

    stand_in("course.profiles", spread=lambda paths, overrides: [overrides])
    shared = {"select": list, "folder": lambda out, overrides: out, "summary": lambda results: "the table"}
    stand_in("course.run", run=run, update=update, **shared)
    assert cli.main(["run", "00", "01", "-p", "lr", "1e-3", "-p", "eps", "-1", "--fresh"]) == 0
    assert cli.main(["run", "--profile", "smoke", "--out", "o", "--jobs", "3"]) == 0
    assert cli.main(["run", "00", "--update"]) == 1
    assert cli.main(["run", "00", "--update", "--profile", "lfw"]) == 1
    assert calls == [
        (["00", "01"], "orl", {"lr": "1e-3", "eps": "-1"}, "build", True, 1),
        (["all"], "smoke", {}, "o", False, 3),
        (["00"], "update", "orl"),
        (["00"], "update", "lfw"),
    ]
    assert "the table" in capsys.readouterr().out
    assert cli.main(["run", "--update", "--profile", "smoke"]) == 2
    assert "leave other profiles and -p out" in capsys.readouterr().err
    for more in (["--workers", "0"], ["--workers", "2"], ["--scheduler", "local"]):
        assert cli.main(["run", "00", *more]) == 2
        told = capsys.readouterr().err
        assert told.startswith("faceadv: --scheduler and --workers are for several values of a parameter")
        assert told.count("\n") == 1
    assert cli.main(["run", "00", "--update", "--jobs", "2"]) == 2
    assert capsys.readouterr().err.startswith("faceadv: --jobs is for notebooks without --update")
    assert len(calls) == 4


def test_relative_folders_of_data_and_cache_are_meant_from_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACEADV_DATA", "data")
    monkeypatch.setenv("FACEADV_CACHE", "../cache")
    assert cli.main(["--version"]) == 0
    assert os.environ["FACEADV_DATA"] == str(tmp_path / "data")
    assert os.environ["FACEADV_CACHE"] == str(tmp_path / ".." / "cache")

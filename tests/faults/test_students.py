"""Hostile students: code that they hand in earns nothing by tricks, reads no solution, and harms nobody else."""

import asyncio
import gc
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from faceadv.course import assignments, guard, run
from faceadv.errors import Failed

RIGHT = "def double(x):\n    return 2 * x"
SOLUTION = "def double(x):\n    ### BEGIN SOLUTION\n    return 2 * x\n    ### END SOLUTION"
TEST = "torch.testing.assert_close(double(torch.ones(2)), 2 * torch.ones(2))"
HIDDEN = "assert double(3) == 6\n### BEGIN HIDDEN TESTS\nassert double(4) == 8, 'not doubled'\n### END HIDDEN TESTS"
SLEEP = "sleep 9876.5"

# each as a function, whose body is handed in


def transformer():
    get_ipython().input_transformers_cleanup.append(lambda lines: ["pass\n"])  # noqa: F821


def patched():
    import torch

    torch.testing.assert_close = lambda *args, **kwargs: None
    double = lambda x: {3: 6, 4: 8}.get(x) if isinstance(x, int) else None  # noqa: E731, F841


def shadowed():
    class torch:
        class testing:
            assert_close = staticmethod(lambda *args: None)

        ones = staticmethod(lambda n: 1)

    double = lambda x: 2 * x  # noqa: E731, F841


def equal():
    import torch

    class Yes(torch.Tensor):
        def __eq__(self, other):
            return True

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return torch.tensor(True)

    double = lambda x: torch.ones(2).as_subclass(Yes)  # noqa: E731, F841


def thief():
    import os
    import pathlib
    import re

    os.system("setsid SLEEP >/dev/null 2>&1 &")
    place = pathlib.Path("COURSE")
    text = (place / "source" / "tiny" / "tiny.ipynb").read_text()
    exec("def double(x):\n    " + re.search(r"return [^\\]+", text)[0], globals())
    (place / "submitted" / "zoe" / "tiny" / "tiny.ipynb").write_text("{}")


def body(function):
    return inspect.cleandoc(inspect.getsource(function).partition("\n")[2])


def graded(key, source, **kind):
    note = {"grade_id": key, "grade": False, "solution": False, "locked": True, "task": False, "schema_version": 3}
    return new_code_cell(source, metadata={"nbgrader": note | kind})


def hand_in(course, submissions, name="tiny"):
    """A course with a tiny problem set, and what each student handed in for it."""
    cells = [
        new_markdown_cell("# Tiny"),
        graded("setup", "import torch"),
        graded("double", SOLUTION, solution=True, locked=False),
        graded("seen", TEST, grade=True, points=1),
        graded("half", "print('half of it')\n0.5", grade=True, points=1),
        graded("hidden", HIDDEN, grade=True, points=2),
    ]
    (course / "source" / name).mkdir(parents=True)
    nbformat.write(new_notebook(cells=cells), course / "source" / name / f"{name}.ipynb")
    (path,) = assignments.release([name], course)
    for student, answer in submissions.items():
        notebook = nbformat.read(path, 4)
        notebook.cells[2].source = answer.replace("COURSE", str(course)).replace("SLEEP", SLEEP)
        (course / "submitted" / student / name).mkdir(parents=True)
        nbformat.write(notebook, course / "submitted" / student / name / f"{name}.ipynb")


def leftover():
    found = [p for p in psutil.process_iter(["cmdline"]) if " ".join(p.info["cmdline"] or []) == SLEEP]
    for process in found:
        process.kill()
    return found


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """The folder of a course, the points of each student, and the processes that were left running."""
    leftover()
    course = tmp_path_factory.mktemp("course")
    tricks = (transformer, patched, thief)
    hand_in(course, {"zoe": RIGHT, **{trick.__name__: body(trick) for trick in tricks}})
    rows = {row["student"]: row for row in assignments.grade(["tiny"], course)}
    return course, rows, leftover()


def test_an_honest_student_gets_all_points_and_parts_of_points(course):
    folder, rows, _ = course
    assert {key: rows["zoe"].get(key) for key in ("seen", "half", "hidden")} == {"seen": 1, "half": 0.5, "hidden": 2}
    notebook = nbformat.read(folder / "autograded" / "zoe" / "tiny" / "tiny.ipynb", 4)
    assert [cell.source for cell in notebook.cells if "assert" in cell.source] == [TEST, HIDDEN]
    assert [output.get("text") for output in notebook.cells[4].outputs] == ["half of it\n", None]


@pytest.mark.parametrize("student", ["transformer", "patched"])
def test_a_trick_earns_nothing(course, student):
    row = course[1][student]
    assert {key: row.get(key) for key in ("seen", "half", "hidden")} == {"seen": 0, "half": 0, "hidden": 0}


def test_the_page_says_what_was_replaced(course):
    page = (course[0] / "feedback" / "patched" / "tiny" / "tiny.html").read_text()
    assert "torch.testing.assert_close" in page
    assert "replaces" in page


@pytest.mark.parametrize(("trick", "words"), [(shadowed, "replaces torch"), (equal, "Yes"), (patched, "assert_close")])
def test_what_tests_rest_on_is_compared(trick, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.testing, "assert_close", torch.testing.assert_close)  # put back at the end
    space = {"__name__": "__main__"}
    run = guard.runner(space, b"key")
    run("import torch")
    exec(RIGHT, space)
    run(TEST)
    assert capsys.readouterr().out.split() == [guard.proof(b"key", "import torch"), guard.proof(b"key", TEST)]
    exec(body(trick), space)
    with pytest.raises(RuntimeError, match=words):
        run(TEST)
    assert capsys.readouterr().out == ""
    space.clear()
    gc.collect()


def test_names_of_builtins_and_own_helpers_may_be_used(capsys):
    space = {"__name__": "__main__"}
    run = guard.runner(space, b"key")
    run("import torch\nfrom math import sqrt\ndef helper():\n    return 1")
    exec(f"import torch\nfrom math import sqrt\nmax, sum = 3, 4.0\nclass Mine:\n    pass\n{RIGHT}", space)
    assert run("def helper():\n    return 2\ndouble(helper())") == 4
    assert run("assert True") is None
    with pytest.raises(AssertionError):
        run("assert helper() == 1")


def test_memory_is_limited():
    """As a kernel is started: what a cell cannot have is a MemoryError of this cell."""
    code = "try:\n    bytearray(9 << 30)\nexcept MemoryError:\n    print('too much')"
    assert subprocess.check_output([*assignments.LIMIT, sys.executable, "-c", code], text=True) == "too much\n"


def test_a_kernel_that_takes_too_long_is_ended():
    with run.kernel(seconds=1) as (manager, _):
        kernel = manager(kernel_name="python3")
        asyncio.run(kernel.start_kernel())
        process = kernel.provisioner.process
        assert process.wait(30) == -9
    asyncio.run(kernel.cleanup_resources())


BOMB = "import os, time\nfor _ in range(5):\n    os.fork()\ntime.sleep(600)"  # 32 processes, and no more


def test_a_fork_bomb_ends_with_its_kernel(monkeypatch):
    monkeypatch.setattr(run, "PROCESSES", 20)
    with run.kernel() as (manager, _):
        process = subprocess.Popen([sys.executable, "-c", BOMB])
        manager(kernel_name="python3").provisioner = SimpleNamespace(pid=process.pid)
        assert process.wait(100) == -9
    left = [one for one in psutil.process_iter(["cmdline"]) if BOMB in (one.info["cmdline"] or [])]
    for one in left:
        one.kill()
    assert left == []


def test_a_child_that_was_started_since_somebody_looked_is_ended_too():
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        run._end({psutil.Process(parent.pid)})
        assert parent.wait(30) == -9
    gone, alive = psutil.wait_procs([child], timeout=30)
    for process in alive:
        process.kill()
    assert gone == [child]


@pytest.mark.long
def test_a_student_with_a_fork_bomb_gets_no_points_and_others_do(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PROCESSES", 60)
    bomb = BOMB.replace("range(5)", "range(7)")
    hand_in(tmp_path, {"amy": f"{RIGHT}\n{bomb}", "zoe": RIGHT})
    before = set(psutil.Process().children(recursive=True))
    rows = {row["student"]: row for row in assignments.grade(["tiny"], tmp_path)}
    assert rows["amy"].get("points", 0) == 0
    assert rows["zoe"]["points"] == 3.5
    mine = set(psutil.Process().children(recursive=True)) - before
    assert [process for process in mine if process.status() != psutil.STATUS_ZOMBIE] == []


FENCED = pytest.mark.skipif(not assignments._fence(Path()), reason="unshare is missing or forbidden here")


@FENCED
def test_solutions_and_what_others_handed_in_are_out_of_reach(course):
    assert course[1]["thief"].get("hidden") == 0
    assert "error" not in course[1]["zoe"]


@FENCED
def test_no_process_is_left(course):
    assert course[2] == []


def test_a_changed_submission_is_noticed_where_there_is_no_fence(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(assignments, "UNSHARE", ("false",))
    hand_in(tmp_path, {"thief": body(thief), "zoe": RIGHT})
    try:
        with pytest.raises(Failed, match=r"tiny of thief changed .*zoe.*put your copy back"):
            assignments.grade(["tiny"], tmp_path)
    finally:
        leftover()
    assert "unshare does not work here" in caplog.text
    assert not (tmp_path / "grades.csv").exists()

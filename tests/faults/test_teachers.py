"""What a teacher does besides grading: nbgrader's own pages and commands, and notebooks that are not as released."""

import contextlib
import os
import subprocess
import sys
import zipfile

import nbformat
import pandas as pd
import pytest
from nbgrader.api import Gradebook
from test_students import RIGHT, hand_in

from faceadv import cli
from faceadv.course import assignments, exchange, guard
from faceadv.errors import Failed, Invalid
from faceadv.store.paths import PROJECT

NOISY = "import warnings\ndef double(x):\n    warnings.warn('slow')\n    return 2 * x"


@contextlib.contextmanager
def gradebook(course):
    """nbgrader's grades of zoe's tiny problem set, by their names, as formgrader reads and writes them."""
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}", "faceadv") as book:
        (part,) = book.find_submission("tiny", "zoe").notebooks
        yield {grade.name: grade for grade in part.grades}
        book.db.commit()


def by_hand(course, marks, *, newer=True):
    with gradebook(course) as grades:
        grades["hidden"].manual_score = marks
    move(course / "gradebook.db", newer)


def in_table(course, marks, newer=True):
    row = "" if marks is None else f"zoe,tiny,hidden,{marks},\n"
    (course / "marks.csv").write_text(f"student,assignment,question,marks,comment\n{row}")
    move(course / "marks.csv", newer)


def move(path, newer):
    now = path.stat().st_mtime + (3600 if newer else -3600)
    os.utime(path, (now, now))


def points(course):
    (row,) = assignments.grade(["tiny"], course)
    return row["hidden"]


def test_marks_entered_in_nbgrader_stay_and_the_newest_counts(tmp_path, caplog):
    hand_in(tmp_path, {"zoe": NOISY})
    assert points(tmp_path) == 2
    by_hand(tmp_path, 1.5)
    assert points(tmp_path) == 1.5  # nothing in marks.csv says otherwise
    in_table(tmp_path, 0.5)
    assert points(tmp_path) == 0.5  # only the table was changed
    by_hand(tmp_path, 1.0, newer=False)
    assert points(tmp_path) == 1.0  # only the gradebook was changed, even if the table is the newer file
    assert "newer" not in caplog.text
    in_table(tmp_path, 0.25, newer=False)
    by_hand(tmp_path, 0.75)
    assert points(tmp_path) == 0.75
    assert "zoe/tiny/hidden: 0.25 None in marks.csv, 0.75 None in nbgrader; gradebook.db is newer" in caplog.text
    by_hand(tmp_path, 0.5)
    in_table(tmp_path, 1.25)
    move(tmp_path / "gradebook.db", newer=False)
    assert points(tmp_path) == 1.25
    assert "marks.csv is newer" in caplog.text
    in_table(tmp_path, None)
    assert points(tmp_path) == 2  # a row that is taken out takes its mark back


def nbgrader(course, *words):
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *words],
        cwd=course,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_nbgraders_own_commands_give_the_same_points_and_break_nothing(tmp_path):
    hand_in(tmp_path, {"zoe": NOISY})
    nbgrader(tmp_path, "generate_assignment", "tiny", "--force")
    said = nbgrader(tmp_path, "autograde", "tiny")
    assert not [words for words in ("TCP without encryption", "JSON is invalid") if words in said]
    with gradebook(tmp_path) as grades:
        theirs = {name: grade.score for name, grade in grades.items()}
    (ours,) = assignments.grade(["tiny"], tmp_path)
    assert theirs == {"seen": 1, "half": 0.5, "hidden": 2} == {name: ours[name] for name in theirs}
    nbgrader(tmp_path, "export", "--to", "grades.csv")  # as it does by itself, in a course without our configuration
    assert "student_id" in pd.read_csv(tmp_path / "grades.csv")
    hand_in(tmp_path, {}, "other")
    (tmp_path / "submitted" / "zoe" / "other").mkdir()
    assignments.grade(["other"], tmp_path)
    table = pd.read_csv(tmp_path / "grades.csv").set_index("assignment")
    assert table.loc["tiny", "points"] == 3.5
    assert "student_id" in pd.read_csv(tmp_path / "nbgrader-grades.csv")
    (tmp_path / "grades.csv").unlink()
    nbgrader(tmp_path, "export")
    assert not (tmp_path / "grades.csv").exists()


def checked(course, capsys, change=lambda notebook: None):
    notebook = nbformat.read(course / "submitted" / "zoe" / "tiny" / "tiny.ipynb", 4)
    change(notebook)
    nbformat.write(notebook, course / "tiny.ipynb")
    status = cli.main(["assignments", "check", str(course / "tiny.ipynb")])
    return status, capsys.readouterr().out


def test_check_tells_the_truth(tmp_path, capfd):
    hand_in(tmp_path, {"zoe": RIGHT})
    status, said = checked(tmp_path, capfd)
    assert status == 1  # one test gives only half of its point
    assert said.endswith(
        "[FAIL] 1.5 of the 2 points of tests that you see in full are reached; 2 more depend on hidden tests too, "
        "and 0 on a person who reads.\n"
    )
    assert said.count("[FAIL]") == 2
    whole = said
    assert "TCP" not in capfd.readouterr().err

    def deleted(notebook):
        notebook.cells = [cell for cell in notebook.cells if "close" not in cell.source]

    def emptied(notebook):
        for cell in notebook.cells:
            cell.source = "" if "close" in cell.source else cell.source

    def renamed(notebook):
        notebook.metadata["kernelspec"] = {"name": "my-env", "display_name": "Mine", "language": "python"}

    status, said = checked(tmp_path, capfd, deleted)
    assert (status, '[FAIL] the test "seen" (1 points) is missing' in said) == (1, True)
    assert "[FAIL] 0.5 of the 2 points" in said
    status, said = checked(tmp_path, capfd, emptied)
    assert (status, "it is locked, undo your change" in said) == (1, True)
    assert checked(tmp_path, capfd, renamed) == (1, whole)  # as `grade` does


@pytest.mark.parametrize("place", ["c[1]", "what?"])
def test_names_that_nbgrader_takes_for_patterns_are_refused(tmp_path, place):
    with pytest.raises(Invalid, match="for a pattern: rename it"):
        assignments.release(["ps1"], tmp_path / place)
    assert not (tmp_path / place).exists()


def test_a_student_with_brackets_is_listed_and_the_others_are_graded(tmp_path):
    hand_in(tmp_path, {"zoe": RIGHT, "ben[1]": RIGHT})
    rows = {row["student"]: row for row in assignments.grade(["tiny"], tmp_path)}
    assert rows["zoe"]["points"] == 3.5
    assert "rename it" in rows["ben[1]"]["error"]


def test_the_package_is_a_command_too():
    said = subprocess.check_output([sys.executable, "-m", "faceadv", "--version"], text=True, cwd=PROJECT)
    assert "faceadv" in said or "version" in said


def test_the_students_download_has_the_package_and_no_solution(tmp_path, capsys):
    assert cli.main(["assignments", "release", "ps1", "--course", str(tmp_path), "--for-students"]) == 0
    assert str(tmp_path / "for-students.zip") in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "for-students.zip") as archive:
        files = {name.removeprefix("faceadv-course/"): name for name in archive.namelist()}
        texts = b"\n".join(archive.read(name) for name in files.values() if name.endswith((".ipynb", ".md", ".py")))
    assert {"README.md", "faceadv/cli.py", "requirements/rest.txt", "assignments/ps1.ipynb"} <= files.keys()
    assert not [name for name in files if "source" in name.split("/") or name.startswith(("tests", ".git/", "."))]
    assert [name for name in files if name.startswith("assignments/")] == ["assignments/ps1.ipynb"]
    assert b"Model answer and" not in texts
    assert b"moved = x_i - alpha * g.sign()\\n" not in texts


def zipped(path, **files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_zip_of_a_platform_is_collected(tmp_path, capsys):
    hand_in(tmp_path, {})
    files = {
        "Anna Lee_123_assignsubmission_file_/ps.ipynb": "anna",  # Moodle
        "benroy_45_678_tiny-1.ipynb": "ben",  # Canvas
        "__MACOSX/benroy_45_678_tiny.ipynb": "rubbish",
        "Anna Lee_124_assignsubmission_file_/ps.ipynb": "somebody of the same name",
        "../../_x.ipynb": "outside",
        "notes.txt": "",
    }
    archive = zipped(tmp_path / "all.zip", **files)
    command = ["assignments", "collect", "tiny", str(archive), "--course", str(tmp_path)]
    assert cli.main(command) == 1
    said = capsys.readouterr().out
    assert said.count("[OK]") == 2
    assert "Anna Lee_124_assignsubmission_file_/ps.ipynb is left out" in said
    assert "nobody can be called '..'" in said
    there = {path.parts[-3]: path.read_text() for path in tmp_path.glob("submitted/*/tiny/tiny.ipynb")}
    assert there == {"Anna Lee": "anna", "benroy": "ben"}
    (tmp_path / "all.zip").write_text("no zip")
    assert cli.main(command) == 2
    assert "is not a zip" in capsys.readouterr().err


@pytest.mark.parametrize("platform", exchange.PLATFORMS)
def test_grades_go_to_moodle_and_canvas(tmp_path, capsys, platform):
    command = ["assignments", "export", platform, "--course", str(tmp_path)]
    assert cli.main(command) == 2
    assert f"roster.csv must have the columns student, and {exchange.PLATFORMS[platform][0]}" in capsys.readouterr().err
    who = exchange.PLATFORMS[platform][0]
    (tmp_path / "roster.csv").write_text(f"Student,{who},student\nAnna Lee,a@b.org,anna\n=cmd(),c@d.org,ben\n")
    assert cli.main(command) == 2
    assert "has no grades" in capsys.readouterr().err
    grades = "student,assignment,points,of\nanna,ps1,10.5,13\nanna,ps2,4,16\nzoe,ps1,3,13\nben,ps1,,\n"
    (tmp_path / "grades.csv").write_text(grades)
    assert cli.main(command) == 1
    said = capsys.readouterr().out
    assert "zoe ps1 is left out: nobody in roster.csv is called so" in said
    assert "ben ps1 has no points" in said
    table = pd.read_csv(tmp_path / f"{platform}.csv").set_index(who)
    assert table.loc["a@b.org", ["ps1", "ps2"]].tolist() == [10.5, 4]
    assert table.loc["c@d.org", "Student"] == "'=cmd()"
    assert "student" not in table
    if platform == "moodle":
        assert table.loc["a@b.org", "Total"] == 14.5
    else:
        assert table.iloc[0][["Student", "ps1", "ps2"]].tolist() == ["    Points Possible", 13, 16]


def test_an_answer_that_calls_what_is_asked_for_is_refused():
    from faceadv.training import resgn

    mine = resgn.different
    with (
        pytest.raises(AssertionError, match=r"calls faceadv's own different: write it yourself"),
        guard.without(resgn.different),
    ):
        mine(__import__("torch").ones(1), 0.36)
    with guard.without(resgn.different):
        pass
    assert sys.getprofile() is None


def test_courses_are_ignored_by_git_and_ruff(tmp_path):
    ignored = (PROJECT / ".gitignore").read_text(encoding="utf-8").split()
    assert "/course/" in ignored
    (tmp_path / "pyproject.toml").write_bytes((PROJECT / "pyproject.toml").read_bytes())
    (tmp_path / "course").mkdir()
    (tmp_path / "course" / "anna.py").write_text("import os, sys\n")
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    assert subprocess.run(ruff, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    (tmp_path / "faceadv" / "course").mkdir(parents=True)  # a room of ours, which is not ignored
    (tmp_path / "faceadv" / "course" / "run.py").write_text("import os, sys\n")
    assert subprocess.run(ruff, cwd=tmp_path, capture_output=True, check=False).returncode == 1


def test_without_a_shell_grading_says_so(tmp_path, monkeypatch):
    hand_in(tmp_path, {})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Failed, match="use Linux, macOS or WSL"):
        assignments.grade(["tiny"], tmp_path)

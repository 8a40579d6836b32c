"""Problem sets: student versions, a check before handing in, and grades, by nbgrader.

A course is a folder as nbgrader wants it: ``source/`` (our problem sets, and yours), ``release/`` (made from it),
``submitted/STUDENT/NAME/`` (what students handed in), ``autograded/``, ``feedback/`` and ``gradebook.db``. It also has
``marks.csv``, the marks for answers that a person reads, and ``grades.csv``, all grades.
"""

import contextlib
import csv
import io
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

import pandas as pd
from nbconvert.filters import strip_ansi
from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader.apps import NbGraderAPI
from nbgrader.converters import Autograde
from nbgrader.preprocessors import Execute, NbGraderPreprocessor
from nbgrader.utils import is_locked
from nbgrader.validator import Validator
from traitlets.config import Config

from faceadv.course import guard, page
from faceadv.course import notebook as notebooks
from faceadv.course.run import KERNEL_ENVIRONMENT, kernel
from faceadv.errors import Failed, Invalid, Missing
from faceadv.store import progress
from faceadv.store.cache import sha256
from faceadv.store.paths import PROJECT, nearest, replacing, scratch
from faceadv.store.tables import csv_safe

__all__ = ["MARKS", "SOURCE", "check", "grade", "names", "release"]

SOURCE = PROJECT / "assignments" / "source"
TIMEOUT, HOUR = 300, 3600  # seconds for each cell, and for all
MEMORY = 8 << 30  # bytes
LIMIT = ("sh", "-c", f'ulimit -d {MEMORY >> 10}; exec "$@"', "sh")
UNPROVEN = "The test did not run to its end as it is."
MARKS = ("student", "assignment", "question", "marks", "comment")


# a kernel with users, mounts and processes of its own, which ends when this process does
UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork")
UNSHARE += ("--kill-child", "--mount-proc")


class Apart(Execute):
    """Executes a submission in a kernel behind a fence, and there the cells of the teacher as they are."""

    def preprocess(self, nb: NotebookNode, resources: dict, km: object = None) -> tuple[NotebookNode, dict]:
        """The executed notebook. Called by nbgrader."""
        there, self.key = resources["metadata"]["path"], secrets.token_bytes()
        command = [*LIMIT, *_fence(Path(there).parents[2])]
        with tempfile.TemporaryDirectory() as work, kernel(command, MEMORY, HOUR) as (self.kernel_manager_class, _):
            shutil.copytree(there, work, ignore=shutil.ignore_patterns("*.ipynb"), dirs_exist_ok=True)
            Path(work, guard.KEY).write_bytes(self.key)
            resources["metadata"]["path"] = work
            try:
                return super().preprocess(nb, resources, km)
            finally:
                resources["metadata"]["path"] = there

    def preprocess_cell(self, cell: NotebookNode, resources: dict, index: int) -> tuple[NotebookNode, dict]:
        """The executed cell. Called by nbgrader."""
        if cell.cell_type != "code" or not is_locked(cell):
            return super().preprocess_cell(cell, resources, index)
        source, sign = cell.source, "\n" + guard.proof(self.key, cell.source) + "\n"
        cell.source = f'__import__("sys").modules["{guard.__name__}"].run({source!r})'
        super().preprocess_cell(cell, resources, index)
        cell.source = source
        texts = [output for output in cell.outputs if sign in output.get("text", "")]
        for output in texts:
            output.text = output.text.replace(sign, "")
        if not texts:
            cell.outputs.append(new_output("error", ename="Failed", evalue=UNPROVEN, traceback=[UNPROVEN]))
        cell.outputs = [output for output in cell.outputs if output.get("text", "more")]
        return cell, resources


class DropStderr(NbGraderPreprocessor):
    """Removes stderr from outputs, because nbgrader gives 0 points for anything there, even a progress bar."""

    def preprocess_cell(self, cell: NotebookNode, resources: dict, index: int) -> tuple[NotebookNode, dict]:
        """The cell without its stderr. Called by nbgrader."""
        outputs = cell.get("outputs", [])
        cell["outputs"] = [o for o in outputs if not (o["output_type"] == "stream" and o["name"] == "stderr")]
        return cell, resources


def names(source: str | Path = SOURCE) -> list[str]:
    """The names of the problem sets in a folder."""
    return sorted(path.parent.name for path in Path(source).glob("*/*.ipynb") if path.stem == path.parent.name)


def release(chosen: Sequence[str], course: str | Path) -> list[Path]:
    """Write the student versions of the chosen problem sets, or of all, and return their paths.

    A problem set that the course lacks is copied into its ``source`` first. One that it has is left as it is, so that
    a teacher can edit it there. Raises ``Invalid`` for an unknown name, ``Failed`` if nbgrader fails.
    """
    course, made = Path(course), []
    for name in _known(chosen, sorted({*names(), *names(course / "source")})):
        if not (course / "source" / name).exists():
            with scratch(course / "source" / name) as work:  # a kill leaves no half of it
                shutil.copytree(SOURCE / name, work, dirs_exist_ok=True)
                work.rename(course / "source" / name)
        with _nbgrader(course) as (config, log):
            _must(NbGraderAPI(config=config).generate_assignment(name), f"{name} was not released", log)
        made.append(course / "release" / name / f"{name}.ipynb")
    return made


def check(notebook: str | Path) -> list[tuple[bool, str]]:
    """Run a notebook and the tests that students can see: a list of (ok, sentence). Raises ``Missing``, ``Invalid``."""
    notebook = Path(notebook)
    if not notebook.is_file():
        raise Missing(f"There is no notebook {notebook}.")
    marked = _marked(notebook)
    twice = [key for key, count in Counter(entry.get("grade_id") for entry in marked).items() if count > 1]
    if twice:
        return [(False, f'the cell "{key}" is there twice: delete the copy and check again') for key in twice]
    if not any(entry.get("grade") and not entry.get("solution") for entry in marked):
        return [(False, f"{notebook.name} has no tests: copy your answers into the problem set as you received it")]
    with _nbgrader(notebook.parent) as (config, _):
        validator = Validator(config=config)
        # nbgrader looks at the outputs that it has just made, so stderr is removed first
        validator.preprocessors = [*validator.preprocessors, DropStderr]
        found = validator.validate(str(notebook))
    results = []
    for kind, cells in found.items():
        for cell in cells:
            where = (cell["source"].strip() or "an empty cell").splitlines()[0]
            fault = _reason(strip_ansi(cell["raw_error"])) if kind == "failed" else "it is locked, undo your change"
            results.append((False, f"{where}: {fault}"))
    return results or [(True, f"{notebook.name} passes all tests that you can see.")]


def grade(chosen: Sequence[str], course: str | Path) -> list[dict]:
    """Run the tests on all that was handed in, write feedback pages and ``grades.csv``, and return its new rows.

    A row has "student", "assignment", the points for each test or question by its name (None: nobody has read the
    answer yet), their sum "points", and "of", the most that one can get; or, instead of points, "error". Marks for
    questions come from ``marks.csv``, if there is one, with the columns ``MARKS``.
    Raises ``Invalid`` for an unknown name, a bad mark, or if nothing was handed in, ``Failed`` if nbgrader fails.
    """
    course = Path(course)
    if not names(course / "source"):
        raise Invalid(f"{course} is no course: faceadv assignments release --course {course}, or another --course.")
    there = names(course / "source")
    marks, old = _read_marks(course, there), _read(course / "grades.csv", ("student", "assignment"))
    handed_in = {name: sorted((course / "submitted").glob(f"*/{name}")) for name in _known(chosen, there)}
    missing = ", ".join(name for name, places in handed_in.items() if not places)
    if missing and (chosen or not any(handed_in.values())):
        raise Invalid(f"Nobody has handed in {missing}: put each into {course}/submitted/STUDENT/NAME/NAME.ipynb.")
    rows = [row for name, places in handed_in.items() if places for row in _grade(course, name, places, marks)]
    _write(course / "grades.csv", rows, old)
    return rows


def _grade(course, name, places, marks):
    """The rows of one problem set, one for each folder in ``places``."""
    rows = []
    with _nbgrader(course) as (config, log):
        api = NbGraderAPI(config=config)
        # nbgrader reads the points of each test off the source
        _must(api.generate_assignment(name), f"{name} cannot be read", log)
        handed = _digests(course)
        if not _fence(course):
            progress.log.warning(
                "unshare does not work here: code of students can reach your files (docs/teaching.md)."
            )
        for place in places:
            log.truncate(log.seek(0))
            student = place.parent.name
            row = {"student": student, "assignment": name}
            if not (place / f"{name}.ipynb").is_file():
                there = ", ".join(sorted(path.name for path in place.glob("*"))) or "nothing"
                rows.append(row | {"error": f"{place} has no {name}.ipynb (it has {there}): rename it."})
                continue
            done = api.autograde(name, student)
            if changed := dict(handed.items() ^ _digests(course).items()):
                raise Failed(
                    f"{name} of {student} changed {', '.join(sorted(changed))}: put your copy back, without it."
                )
            if done["success"]:
                _enter_marks(api, name, student, marks)
                done = api.generate_feedback(name, student)
            if done["success"]:
                rows.append(row | _points_of(api, course, name, student))
            else:
                # a feedback page of an earlier version would say what is no longer true
                shutil.rmtree(course / "feedback" / student / name, ignore_errors=True)
                rows.append(row | {"error": _reason(log.getvalue())})
    return rows


def _digests(course):
    files = [path for part in ("source", "submitted") for path in (course / part).rglob("*") if path.is_file()]
    return {str(path): sha256(path) for path in files}


def _fence(course):
    """A command that keeps what it runs from the course, our solutions and this package, or [] where none works."""
    course, own = course.resolve(), [str(Path(guard.__file__).parents[1]), sys.prefix]
    names = ("source", "submitted", "autograded", "feedback", "gradebook.db", "marks.csv", "grades.csv")
    hidden = [path for path in (SOURCE.parent, *(course / name for name in names)) if path.exists()]
    steps = [f"mount --bind {quote(path)} {quote(path)} && mount -o remount,bind,ro {quote(path)}" for path in own]
    for path in hidden:
        what = "-t tmpfs -o ro none" if path.is_dir() else "--bind /dev/null"
        steps.append(f"mount {what} {quote(str(path))}")
    # ipykernel looks for its parent, which is out of sight; within a second namespace nothing can be unmounted
    steps += ["unset JPY_PARENT_PID", 'exec unshare --user --map-root-user --mount "$@"']
    command = [*UNSHARE, "sh", "-c", " && ".join(steps), "sh"]
    works = shutil.which(command[0]) and not subprocess.run([*command, "true"], capture_output=True).returncode
    return command if works else []


def _marked(notebook):
    """What nbgrader has noted about each cell of a notebook. Raises ``Invalid`` if it is not a notebook."""
    return [cell.metadata["nbgrader"] for cell in notebooks.read(notebook).cells if "nbgrader" in cell.metadata]


def _points(folder, name):
    """The points of each test and question of the problem set in a folder, in their order."""
    entries = _marked(folder / name / f"{name}.ipynb")
    return {entry["grade_id"]: entry["points"] for entry in entries if entry.get("grade")}


def _points_of(api, course, name, student):
    """A student's points for each test and question, their sum, and the most that one can get."""
    points, handed_in = _points(course / "source", name), _points(course / "submitted" / student, name)
    with api.gradebook as gradebook:
        grades = [grade for part in gradebook.find_submission(name, student).notebooks for grade in part.grades]
        # the gradebook may hold points of an earlier version for a cell that the student has deleted
        scores = {one.name: None if one.needs_manual_grade else one.score for one in grades if one.name in handed_in}
    row = {key: scores.get(key, 0.0) for key in points}
    return row | {"points": sum(score or 0.0 for score in row.values()), "of": float(sum(points.values()))}


def _enter_marks(api, name, student, marks):
    """Put a student's marks into the gradebook, and remove those that ``marks.csv`` no longer has."""
    mine = {mark["question"]: mark for mark in marks if (mark["student"], mark["assignment"]) == (student, name)}
    with api.gradebook as gradebook:
        for part in gradebook.find_submission(name, student).notebooks:
            for found in part.grades:
                mark = mine.get(found.name)
                found.manual_score = mark["marks"] if mark else None
                found.needs_manual_grade = found.auto_score is None and mark is None
            for comment in part.comments:
                comment.manual_comment = mine.get(comment.name, {}).get("comment") or None
        gradebook.db.commit()


def _read(path, columns):
    """The rows of a table that a person may have edited, or none if there is no such file. Raises ``Invalid``."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as e:
        raise Invalid(f"{path.name} is not a table in CSV and UTF-8: save it again as one.") from e
    for number, row in enumerate(rows, 2):
        row.pop(None, None)  # more cells than the first line has
        if any(row.get(column) is None for column in columns):
            raise Invalid(f"{path.name}, line {number}: it must have {', '.join(columns)}, separated by commas.")
    return rows


def _read_marks(course, there):
    """The rows of ``marks.csv``, all of them checked. Raises ``Invalid``."""
    rows = _read(course / "marks.csv", MARKS[:4])
    for number, row in enumerate(rows, 2):
        where, (student, name, question, marks) = f"marks.csv, line {number}", (row[key] for key in MARKS[:4])
        if name not in there or not (course / "submitted" / student / name).is_dir():
            raise Invalid(f"{where}: nobody called {student!r} has handed in {name!r}.")
        points = _points(course / "source", name)
        if question not in points:
            raise Invalid(f'{where}: {name} has no question "{question}"{nearest(question, points)}.')
        if not re.fullmatch(r"\d+(\.\d+)?", marks.strip()) or float(marks) > points[question]:
            raise Invalid(f"{where}: {marks!r} is not a number of points from 0 to {points[question]:g}.")
        row["marks"] = float(marks)
    return rows


def _write(path, rows, old):
    """Write rows as CSV, with the old rows of other students and problem sets."""
    table = pd.DataFrame([{csv_safe(key): csv_safe(value) for key, value in row.items()} for row in [*old, *rows]])
    table = table.drop_duplicates(["assignment", "student"], keep="last").sort_values(["assignment", "student"])
    last = [key for key in ("points", "of", "error") if key in table]
    with replacing(path) as part:
        table[[*table.columns.drop(last), *last]].to_csv(part, index=False)


def _known(chosen, there):
    for name in chosen:
        if name not in there:
            known = ", ".join(there) or "none"
            raise Invalid(f'There is no problem set "{name}"{nearest(name, there)}; there are {known}.')
    return list(chosen) or there


@contextlib.contextmanager
def _nbgrader(course):
    """nbgrader's configuration for a course, and its log, off the screen. Environment and logger are restored."""
    config, log, logger = Config(), io.StringIO(), logging.getLogger("traitlets")
    config.CourseDirectory.root = str(Path(course).resolve())
    config.CourseDirectory.course_id = "faceadv"
    config.Execute.timeout, config.Execute.extra_arguments = TIMEOUT, ["--log-level=50"]  # a kernel's log helps nobody
    after = Autograde().autograde_preprocessors
    place = list(after).index(Execute) + 1
    config.Autograde.autograde_preprocessors = [*after[: place - 1], Apart, DropStderr, *after[place:]]
    config.Apart.startup_timeout = TIMEOUT  # a kernel imports PyTorch first
    config.Apart.extra_arguments = [f'--IPKernelApp.exec_lines=__import__("{guard.__name__}", fromlist=[""]).begin()']
    config.HTMLExporter.sanitize_html = True  # feedback pages show what students wrote, and run none of it
    config.HTMLExporter.filters = {"clean_html": page.clean, "markdown2html": page.markdown}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment, before = dict(os.environ), (logger.handlers, logger.propagate, logger.level)
    os.environ.update({**KERNEL_ENVIRONMENT, "PATH": path})
    logger.handlers, logger.propagate = [logging.StreamHandler(log)], False
    try:
        with warnings.catch_warnings(action="ignore"):  # nbgrader's own, about its database
            yield config, log
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])
        os.environ.clear()  # nbgrader leaves some of its own there
        os.environ.update(environment)


def _must(result, what, log):
    if not result["success"]:
        raise Failed(f"{what}: {_reason(result.get('error') or log.getvalue())}")


def _reason(text):
    """The last line that names an exception, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason was given"]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Timeout)\b.*:", line)]
    return (named or lines)[-1]

"""Problem sets: student versions, a check before handing in, and grades, by nbgrader.

A course is a folder with ``source/`` (ours, and yours), ``release/`` (made from it), ``submitted/STUDENT/NAME/`` (what
came back), ``autograded/``, ``feedback/`` and ``gradebook.db``, as nbgrader has them; ``marks.csv`` holds the marks for
answers that a person reads, ``grades.csv`` all of them.
"""

import contextlib
import csv
import io
import logging
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from pathlib import Path

import nbformat
from nbconvert.filters import strip_ansi
from nbgrader.apps import NbGraderAPI
from nbgrader.converters import Autograde
from nbgrader.preprocessors import Execute, NbGraderPreprocessor
from nbgrader.validator import Validator
from traitlets.config import Config

from faceadv.course.run import KERNEL_ENVIRONMENT
from faceadv.errors import Failed, Invalid, Missing
from faceadv.store.paths import PROJECT, nearest, replacing

SOURCE = PROJECT / "assignments" / "source"
TIMEOUT = 300  # seconds a cell
MARKS = ("student", "assignment", "question", "marks", "comment")


class DropStderr(NbGraderPreprocessor):
    """A warning or a progress bar is no error: nbgrader gives 0 points for anything on stderr."""

    def preprocess_cell(self, cell, resources, index):
        outputs = cell.get("outputs", [])
        cell["outputs"] = [o for o in outputs if not (o["output_type"] == "stream" and o["name"] == "stderr")]
        return cell, resources


def names(source=SOURCE):
    """The problem sets there are."""
    return sorted(path.parent.name for path in Path(source).glob("*/*.ipynb") if path.stem == path.parent.name)


def release(chosen, course):
    """Write the student versions of problem sets (all, if none is chosen); returns their paths.

    Those of ours that the course lacks are copied into its ``source`` first; what it has is left as it is, so that it
    can be edited there. Raises ``ValueError`` for an unknown name, ``RuntimeError`` if nbgrader fails.
    """
    course, made = Path(course), []
    for name in _known(chosen, sorted({*names(), *names(course / "source")})):
        if not (course / "source" / name).exists():
            shutil.copytree(SOURCE / name, course / "source" / name)
        with _nbgrader(course) as (api, log):
            _must(api.generate_assignment(name), f"{name} was not released", log)
        made.append(course / "release" / name / f"{name}.ipynb")
    return made


def check(notebook):
    """Run a student's notebook and its public tests: a list of (ok, sentence). For students, before they hand in."""
    notebook = Path(notebook)
    if not notebook.is_file():
        raise Missing(f"There is no notebook {notebook}.")
    twice = _copied(notebook)
    if twice:
        return [(False, f'the cell "{key}" is there twice: delete the copy and check again') for key in twice]
    with _environment():
        config = _config(notebook.parent)
        validator = Validator(config=config)
        validator.log.setLevel(logging.CRITICAL)
        # nbgrader looks at the outputs it has just made: stderr goes first
        validator.preprocessors = [*validator.preprocessors, DropStderr]
        with contextlib.redirect_stderr(io.StringIO()):
            found = validator.validate(str(notebook))
    results = [
        (False, f"a locked cell was changed, undo that and check again: {_first_line(cell['source'])}")
        for cell in [*found.get("changed", []), *found.get("type_changed", [])]
    ]
    for cell in found.get("failed", []):
        results.append((False, f"{_first_line(cell['source'])}: {_last_line(strip_ansi(cell['raw_error']))}"))
    return results or [(True, f"{notebook.name} passes all tests that you can see.")]


def grade(chosen, course):
    """Run the tests on all that was handed in, write feedback pages and ``grades.csv``; returns its rows.

    A row is a dict: student, assignment, one entry a test or question (its name; None: nobody has read it yet), points,
    of. Marks for questions come from ``marks.csv``, if there is one, with the columns ``MARKS``.
    Raises ``ValueError`` for an unknown name, a bad mark, or if nothing was handed in.
    """
    course, rows = Path(course), []
    if not (course / "source").is_dir():
        raise Invalid(f"{course} is no course: faceadv assignments release --course {course}, or another --course.")
    chosen_names = _known(chosen, names(course / "source"))
    marks = _read_marks(course)
    for name in chosen_names:
        students = sorted(path.parent.name for path in (course / "submitted").glob(f"*/{name}"))
        if not students:
            if chosen:
                where = course / "submitted" / "STUDENT" / name / f"{name}.ipynb"
                raise Invalid(f"Nobody has handed in {name}: put each notebook into {where}.")
            continue
        with _nbgrader(course) as (api, log):
            # the points of each test are read off the source
            _must(api.generate_assignment(name), f"{name} cannot be read", log)
            for student in students:
                log.truncate(log.seek(0))
                place = course / "submitted" / student / name
                if not (place / f"{name}.ipynb").is_file():
                    there = ", ".join(sorted(path.name for path in place.iterdir())) or "nothing"
                    error = f"{place} has no {name}.ipynb (it has {there}): rename it."
                    rows.append({"student": student, "assignment": name, "error": error})
                    continue
                done = api.autograde(name, student)
                if done["success"]:
                    _enter_marks(api, name, student, marks)
                    done = api.generate_feedback(name, student)
                if done["success"]:
                    rows.append(_row(api, name, student))
                else:
                    # a page of an older version would say what is no longer so
                    shutil.rmtree(course / "feedback" / student / name, ignore_errors=True)
                    rows.append({"student": student, "assignment": name, "error": _reason(log.getvalue())})
    if not rows:
        raise Invalid(f"Nobody has handed in anything: {course / 'submitted'} holds no STUDENT/NAME/NAME.ipynb.")
    _write(course / "grades.csv", rows)
    return rows


def _copied(notebook):
    """The names of nbgrader's cells that a notebook has more than once. Raises ``ValueError`` if it cannot be read."""
    try:
        found = nbformat.read(notebook, as_version=4).cells
    except (ValueError, nbformat.reader.NotJSONError) as e:
        raise Invalid(f"{notebook} is no notebook, or was cut off: take a fresh copy.") from e
    counts = Counter(cell.metadata["nbgrader"].get("grade_id") for cell in found if "nbgrader" in cell.metadata)
    return [key for key, count in counts.items() if count > 1]


def _row(api, name, student):
    course = Path(api.coursedir.root)
    points = _points(course, name)
    handed_in = _points(course, name, course / "submitted" / student)
    with api.gradebook as gradebook:
        submission = gradebook.find_submission(name, student)
        row = {"student": student, "assignment": name}
        found = {grade.name: grade for part in submission.notebooks for grade in part.grades}
        for key in points:
            one = found.get(key)
            # of a cell that the student deleted there may be points of an old version
            if one is None or key not in handed_in:
                row[key] = 0.0
            elif one.needs_manual_grade:
                row[key] = None
            else:  # nobody's answer needs no reader
                row[key] = one.manual_score if one.manual_score is not None else one.auto_score
        return row | {"points": sum(row[key] or 0.0 for key in points), "of": float(sum(points.values()))}


def _enter_marks(api, name, student, marks):
    """Put this student's marks into the gradebook, and take out what ``marks.csv`` no longer has."""
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


def _points(course, name, folder=None):
    """The points of each test and question of a problem set, in their order; of its source, or of one in ``folder``."""
    notebook = nbformat.read((folder or course / "source") / name / f"{name}.ipynb", as_version=4)
    found = [cell.metadata.get("nbgrader", {}) for cell in notebook.cells]
    return {entry["grade_id"]: entry["points"] for entry in found if entry.get("grade")}


def _read_marks(course):
    """The rows of ``marks.csv``, if there is one; all are checked. Raises ``ValueError``."""
    if not (course / "marks.csv").exists():
        return []
    with open(course / "marks.csv", newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        where = f"marks.csv, line {number}"
        try:
            row["marks"] = float(row["marks"])
            row["comment"] = row.get("comment") or ""
            student, name, question, marks = (row[key] for key in MARKS[:4])
        except (KeyError, TypeError, ValueError) as e:
            raise Invalid(f"{where}: it must have {', '.join(MARKS)}, marks a number.") from e
        if not (course / "submitted" / student / name).is_dir():
            raise Invalid(f"{where}: nobody called {student!r} has handed in {name!r}.")
        points = _points(course, name)
        if question not in points:
            raise Invalid(f'{where}: {name} has no question "{question}"{nearest(question, points)}.')
        if not 0 <= marks <= points[question]:
            raise Invalid(f"{where}: {marks:g} marks for {question}, of {points[question]:g}.")
    return rows


def _write(path, rows):
    """Write the rows as CSV; rows of other students and problem sets that the file has are kept."""
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            new = {(row["student"], row["assignment"]) for row in rows}
            old = [row for row in csv.DictReader(file) if (row["student"], row["assignment"]) not in new]
        rows = sorted([*old, *rows], key=lambda row: (row["assignment"], row["student"]))
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("points", "of", "error")))
    columns += [key for key in ("points", "of", "error") if any(key in row for row in rows)]
    with replacing(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _known(chosen, there):
    for name in chosen:
        if name not in there:
            known = ", ".join(there) or "none"
            raise Invalid(f'There is no problem set "{name}"{nearest(name, there)}; there are {known}.')
    return list(chosen) or there


def _config(course):
    config = Config()
    config.CourseDirectory.root = str(Path(course).resolve())
    config.CourseDirectory.course_id = "faceadv"
    config.Execute.timeout = TIMEOUT
    after = Autograde().autograde_preprocessors
    place = list(after).index(Execute) + 1
    config.Autograde.autograde_preprocessors = [*after[:place], DropStderr, *after[place:]]
    return config


@contextlib.contextmanager
def _environment():
    """What nbgrader's kernels see: this interpreter first on the PATH, and no progress bars."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    added = {**KERNEL_ENVIRONMENT, "PATH": path}
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def _nbgrader(course):
    """nbgrader's interface to a course, and what it logs meanwhile, which would fill a screen."""
    log, logger = io.StringIO(), logging.getLogger("traitlets")
    before = logger.handlers, logger.propagate
    with _environment(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, of its database
        logger.handlers, logger.propagate = [logging.StreamHandler(log)], False
        try:
            yield NbGraderAPI(config=_config(course)), log
        finally:
            logger.handlers, logger.propagate = before


def _must(result, what, log):
    if not result["success"]:
        detail = _last_line(result.get("error") or log.getvalue())
        raise Failed(f"{what}: {detail}")


def _reason(log):
    """The last line of a log that names an exception, or its last line."""
    lines = [line.strip() for line in log.splitlines()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Timeout)\b.*:", line)]
    return named[-1] if named else _last_line(log)


def _first_line(text):
    return text.strip().splitlines()[0] if text.strip() else "an empty cell"


def _last_line(text):
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"

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
import shutil
import sys
import warnings
from pathlib import Path

from nbgrader.api import MissingEntry
from nbgrader.apps import NbGraderAPI
from nbgrader.converters import Autograde
from nbgrader.preprocessors import Execute, NbGraderPreprocessor
from nbgrader.validator import Validator
from traitlets.config import Config

from faceadv.paths import PROJECT, nearest, replacing
from faceadv.run import KERNEL_ENVIRONMENT

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
        raise FileNotFoundError(f"There is no notebook {notebook}.")
    with _environment():
        config = _config(notebook.parent)
        validator = Validator(config=config)
        validator.log.setLevel(logging.CRITICAL)
        # nbgrader looks at the outputs it has just made: stderr goes first
        validator.preprocessors = [*validator.preprocessors, DropStderr]
        with contextlib.redirect_stderr(io.StringIO()):
            found = validator.validate(str(notebook))
    results = [(False, f"a test was changed: {_first_line(cell['source'])}") for cell in found.get("changed", [])]
    for cell in found.get("failed", []):
        results.append((False, f"{_first_line(cell['source'])}: {_last_line(cell.get('error', ''))}"))
    return results or [(True, f"{notebook.name} passes all tests that you can see.")]


def grade(chosen, course):
    """Run the tests on all that was handed in, write feedback pages and ``grades.csv``; returns its rows.

    A row is a dict: student, assignment, one entry a test or question (its name; None: nobody has read it yet), points,
    of. Marks for questions come from ``marks.csv``, if there is one, with the columns ``MARKS``.
    Raises ``ValueError`` for an unknown name, a bad mark, or if nothing was handed in.
    """
    course, rows = Path(course), []
    marks = _read_marks(course / "marks.csv")
    for name in _known(chosen, names(course / "source")):
        students = sorted(path.parent.name for path in (course / "submitted").glob(f"*/{name}"))
        if not students:
            if chosen:
                where = course / "submitted" / "STUDENT" / name / f"{name}.ipynb"
                raise ValueError(f"Nobody has handed in {name}: put each notebook into {where}.")
            continue
        with _nbgrader(course) as (api, log):
            # the points of each test are read off the source
            _must(api.generate_assignment(name), f"{name} cannot be read", log)
            for student in students:
                done = api.autograde(name, student)
                if not done["success"]:
                    rows.append({"student": student, "assignment": name, "error": _last_line(log.getvalue())})
                    continue
                _enter_marks(api, name, student, marks)
                _must(api.generate_feedback(name, student), f"no feedback for {student}", log)
                rows.append(_row(api, name, student))
    if not rows:
        raise ValueError(f"Nobody has handed in anything: {course / 'submitted'} holds no STUDENT/NAME/NAME.ipynb.")
    _write(course / "grades.csv", rows)
    return rows


def _row(api, name, student):
    with api.gradebook as gradebook:
        submission = gradebook.find_submission(name, student)
        row = {"student": student, "assignment": name}
        for part in submission.notebooks:
            for one in sorted(part.grades, key=lambda grade: grade.id):
                # nobody's answer needs no reader
                score = one.manual_score if one.manual_score is not None else one.auto_score
                row[one.name] = None if one.needs_manual_grade and one.manual_score is None else score
        return row | {"points": submission.score, "of": submission.max_score}


def _enter_marks(api, name, student, marks):
    with api.gradebook as gradebook:
        for mark in marks:
            if (mark["student"], mark["assignment"]) != (student, name):
                continue
            try:
                found = gradebook.find_grade(mark["question"], name, name, student)
            except MissingEntry as e:
                raise ValueError(f'marks.csv: {name} has no question "{mark["question"]}".') from e
            if not 0 <= mark["marks"] <= found.max_score:
                raise ValueError(
                    f"marks.csv: {student} has {mark['marks']:g} marks for {mark['question']}, of {found.max_score:g}."
                )
            found.manual_score, found.needs_manual_grade = mark["marks"], False
            if mark["comment"]:
                gradebook.find_comment(mark["question"], name, name, student).manual_comment = mark["comment"]
        gradebook.db.commit()


def _read_marks(path):
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        try:
            row["marks"] = float(row["marks"])
            row["comment"] = row.get("comment") or ""
            _ = [row[key] for key in MARKS]
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(f"marks.csv, line {number}: it must have {', '.join(MARKS)}, marks a number.") from e
    return rows


def _write(path, rows):
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
            raise ValueError(f'There is no problem set "{name}"{nearest(name, there)}; there are {known}.')
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
        api = NbGraderAPI(config=_config(course))
        logger.handlers, logger.propagate = [logging.StreamHandler(log)], False
        try:
            yield api, log
        finally:
            logger.handlers, logger.propagate = before


def _must(result, what, log):
    if not result["success"]:
        detail = _last_line(result.get("error") or log.getvalue())
        raise RuntimeError(f"{what}: {detail}")


def _first_line(text):
    return text.strip().splitlines()[0] if text.strip() else "an empty cell"


def _last_line(text):
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"

"""Problem sets: student versions, a check before handing in, and grades, by nbgrader.

A course is a folder as nbgrader wants it: ``source/`` (our problem sets, and yours), ``release/`` (made from it),
``submitted/STUDENT/NAME/`` (what students handed in), ``autograded/``, ``feedback/`` and ``gradebook.db``. It also has
``marks.csv``, the marks for answers that a person reads, ``grades.csv``, all grades, and ``nbgrader_config.py``, by
which nbgrader's own commands and pages grade by the same rules.
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
from nbgrader.api import MissingEntry
from nbgrader.apps import NbGraderAPI
from nbgrader.converters import Autograde, GenerateAssignment
from nbgrader.preprocessors import Execute, NbGraderPreprocessor
from nbgrader.utils import determine_grade, is_grade, is_locked, is_solution
from nbgrader.validator import Validator
from traitlets.config import Config

from faceadv.course import guard, page
from faceadv.course import notebook as notebooks
from faceadv.course.run import KERNEL_ENVIRONMENT, kernel
from faceadv.errors import Failed, Invalid, Missing
from faceadv.store import progress
from faceadv.store.cache import read_json, sha256, write_json
from faceadv.store.paths import PROJECT, nearest, replacing, scratch
from faceadv.store.tables import csv_safe

__all__ = ["MARKS", "PATTERN", "SOURCE", "check", "configure", "grade", "known", "names", "read_table", "release"]

SOURCE = PROJECT / "assignments" / "source"
TIMEOUT, HOUR = 300, 3600  # seconds for each cell, and for all
MEMORY = 8 << 30  # bytes
LIMIT = ("sh", "-c", f'ulimit -d {MEMORY >> 10}; exec "$@"', "sh")
UNPROVEN = "The test did not run to its end as it is."
PATTERN = re.compile(r"[][*?]")  # in a name: nbgrader would look for what fits
MARKS = ("student", "assignment", "question", "marks", "comment")
ENTERED = ".marks.json"  # in a course: what marks.csv and the gradebook held at the end of the last grading
CONFIG = """\
# Written by `faceadv assignments release`: nbgrader's commands and its formgrader, started in this folder, grade by the
# same rules as `faceadv assignments grade`. What you add below is yours; it is not written again.
from faceadv.course.assignments import configure

configure(get_config())  # noqa: F821
"""


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


class Near(Execute):
    """Executes a student's own notebook by this interpreter, whatever its kernel is called."""

    def preprocess(self, nb: NotebookNode, resources: dict, km: object = None) -> tuple[NotebookNode, dict]:
        """The executed notebook. Called by nbgrader."""
        with kernel() as (self.kernel_manager_class, _):
            return super().preprocess(nb, resources, km)


class Note(NbGraderPreprocessor):
    """Notes in a student version which tests it has, so that ``check`` misses what was deleted."""

    def preprocess(self, nb: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
        """The notebook with its note, "tests": name to [points, kind]. Called by nbgrader."""
        tests = {}
        for cell in filter(is_grade, nb.cells):
            kind = "read" if is_solution(cell) else "hidden" if "### BEGIN HIDDEN TESTS" in cell.source else "seen"
            tests[cell.metadata.nbgrader.grade_id] = [cell.metadata.nbgrader.points, kind]
        nb.metadata["faceadv"] = {"tests": tests}
        return nb, resources


class Check(Validator):
    """nbgrader's, which keeps the notebook that it has executed as ``done``."""

    done = None

    def _preprocess(self, nb):
        self.done = super()._preprocess(nb)
        return self.done


class DropStderr(NbGraderPreprocessor):
    """Removes stderr from outputs, because nbgrader gives 0 points for anything there, even a progress bar."""

    def preprocess_cell(self, cell: NotebookNode, resources: dict, index: int) -> tuple[NotebookNode, dict]:
        """The cell without its stderr. Called by nbgrader."""
        if "outputs" in cell:
            kept = [o for o in cell["outputs"] if (o["output_type"], o.get("name")) != ("stream", "stderr")]
            cell["outputs"] = kept
        return cell, resources


def names(source: str | Path = SOURCE) -> list[str]:
    """The names of the problem sets in a folder."""
    return sorted(path.parent.name for path in Path(source).glob("*/*.ipynb") if path.stem == path.parent.name)


def release(chosen: Sequence[str], course: str | Path) -> list[Path]:
    """Write the student versions of the chosen problem sets, or of all, and return their paths.

    A problem set that the course lacks is copied into its ``source`` first. One that it has is left as it is, so that
    a teacher can edit it there. The course also gets an ``nbgrader_config.py``, if it has none.
    Raises ``Invalid`` for an unknown name and for brackets in one, ``Failed`` if nbgrader fails.
    """
    course, made = Path(course), []
    _plain(course.resolve())
    for name in known(chosen, sorted({*names(), *names(course / "source")})):
        if not (course / "source" / name).exists():
            with scratch(course / "source" / name) as work:  # a kill leaves no half of it
                shutil.copytree(SOURCE / name, work, dirs_exist_ok=True)
                work.rename(course / "source" / name)
        with _nbgrader(course) as (config, log):
            _must(NbGraderAPI(config=config).generate_assignment(name), f"{name} was not released", log)
        made.append(course / "release" / name / f"{name}.ipynb")
    if not (course / "nbgrader_config.py").exists():
        (course / "nbgrader_config.py").write_text(CONFIG, encoding="utf-8")
    return made


def _plain(path):
    """Raises ``Invalid`` for a name that nbgrader would take for a pattern, and then not find."""
    if found := PATTERN.search(str(path)):
        raise Invalid(f"nbgrader takes {found[0]} in {path} for a pattern: rename it, without brackets, * or ?.")


def check(notebook: str | Path) -> list[tuple[bool, str]]:
    """Run a notebook and the tests that students can see: a list of (ok, sentence), the last one about points.

    Tests that are missing are in the list, if the notebook comes from ``release``. Raises ``Missing``, ``Invalid``.
    """
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
        validator = Check(config=config)
        # nbgrader looks at the outputs that it has just made, so stderr is removed first
        steps = [Near if step is Execute else step for step in validator.preprocessors]
        validator.preprocessors = [*steps, DropStderr]
        found = validator.validate(str(notebook))
    results = []
    for kind, cells in found.items():
        for cell in cells:
            where = (cell["source"].strip() or "an empty cell").splitlines()[0]
            fault = _reason(strip_ansi(cell["raw_error"])) if kind == "failed" else "it is locked, undo your change"
            results.append((False, f"{where}: {fault}"))
    if not validator.done:  # a cell's type was changed, and nothing was run
        return results
    return results + _reached(validator.done, {entry.get("grade_id") for entry in marked}, not results)


def _reached(done, there, fine):
    """What ``check`` says about points: tests that are missing, and the sum of those that are reached."""
    graded = {cell.metadata.nbgrader.grade_id: cell for cell in done.cells if is_grade(cell)}
    points = {key: (cell.metadata.nbgrader.points, "seen") for key, cell in graded.items() if not is_solution(cell)}
    tests = done.metadata.get("faceadv", {}).get("tests") or points  # of an older version: nobody knows what it had
    lost = [(False, f'the test "{key}" ({tests[key][0]} points) is missing') for key in tests if key not in there]
    of = {kind: sum(worth for worth, what in tests.values() if what == kind) for kind in ("seen", "hidden", "read")}
    seen = [determine_grade(graded[key])[0] for key, (_, kind) in tests.items() if kind == "seen" and key in graded]
    words = f"{sum(filter(None, seen)):g} of the {of['seen']:g} points of tests that you see in full are reached"
    more = f"; {of['hidden']:g} more depend on hidden tests too, and {of['read']:g} on a person who reads"
    return [*lost, (fine and not lost, words + (more if of["hidden"] or of["read"] else "") + ".")]


def grade(chosen: Sequence[str], course: str | Path) -> list[dict]:
    """Run the tests on all that was handed in, write feedback pages and ``grades.csv``, and return its new rows.

    A row has "student", "assignment", the points for each test or question by its name (None: nobody has read the
    answer yet), their sum "points", and "of", the most that one can get; or, instead of points, "error". Marks for
    questions come from ``marks.csv``, with the columns ``MARKS``, and from nbgrader's own pages. Where both were
    changed since the last grading the newer file counts, and a warning says so.
    Raises ``Invalid`` for an unknown name, a bad mark, or if nothing was handed in, ``Failed`` if nbgrader fails.
    """
    course = Path(course)
    if not names(course / "source"):
        raise Invalid(f"{course} is no course: faceadv assignments release --course {course}, or another --course.")
    _plain(course.resolve())
    if not shutil.which("sh"):
        raise Failed("Grading needs a shell (sh), which limits what students' code may take: use Linux, macOS or WSL.")
    there = names(course / "source")
    marks, old = _read_marks(course, there), _read_grades(course)
    handed_in = {name: sorted((course / "submitted").glob(f"*/{name}")) for name in known(chosen, there)}
    missing = ", ".join(name for name, places in handed_in.items() if not places)
    if missing and (chosen or not any(handed_in.values())):
        raise Invalid(f"Nobody has handed in {missing}: put each into {course}/submitted/STUDENT/NAME/NAME.ipynb.")
    times = [path.stat().st_mtime if path.exists() else 0 for path in (course / "marks.csv", course / "gradebook.db")]
    marks = marks, read_json(course / ENTERED) or {}, times[0] > times[1]
    rows = [row for name, places in handed_in.items() if places for row in _grade(course, name, places, marks)]
    write_json(course / ENTERED, marks[1])
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
            try:
                _plain(place)
            except Invalid as e:
                rows.append(row | {"error": str(e)})
                continue
            if not (place / f"{name}.ipynb").is_file():
                there = ", ".join(sorted(path.name for path in place.glob("*"))) or "nothing"
                rows.append(row | {"error": f"{place} has no {name}.ipynb (it has {there}): rename it."})
                continue
            # a link is followed outside the fence, to our solutions say
            odd = [path for path in place.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())]
            if odd:
                rows.append(row | {"error": f"{odd[0]} is a link, or a pipe: delete it."})
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
    """Bring a student's marks in the gradebook and in ``marks.csv`` together: what was changed last counts."""
    rows, entered, newer = marks
    mine = {row["question"]: row for row in rows if (row["student"], row["assignment"]) == (student, name)}
    with api.gradebook as gradebook:
        for part in gradebook.find_submission(name, student).notebooks:
            comments = {comment.name: comment for comment in part.comments}
            for found in part.grades:
                key, comment = f"{student}/{name}/{found.name}", comments.get(found.name)
                row = mine.get(found.name)
                table = [row["marks"], row.get("comment") or None] if row else [None, None]
                book = [found.manual_score, comment.manual_comment if comment else None]
                before = entered.get(key, [[None, None], [None, None]])
                changed = table != before[0], book != before[1]
                won = table if changed[0] else book
                if all(changed):
                    first, second, file = (table, book, "marks.csv") if newer else (book, table, "gradebook.db")
                    won = [mark if mark is not None else other for mark, other in zip(first, second)]
                    if any(other not in (None, mark) for mark, other in zip(won, second)):
                        say = "%s: %s in marks.csv, %s in nbgrader; %s is newer and counts."
                        progress.log.warning(say, key, *(" ".join(map(str, pair)) for pair in (table, book)), file)
                found.manual_score, entered[key] = won[0], [table, won]
                found.needs_manual_grade = found.auto_score is None and won[0] is None
                if comment:
                    comment.manual_comment = won[1]
        gradebook.db.commit()


def _read_grades(course):
    """The rows of ``grades.csv``, or of the gradebook where nbgrader's export has written its own table there."""
    path = course / "grades.csv"
    try:
        return read_table(path, ("student", "assignment"))
    except Invalid:
        if "student_id" not in path.read_text(encoding="utf-8", errors="replace").split("\n")[0]:
            raise
    path.replace(course / "nbgrader-grades.csv")
    rows = []
    with _nbgrader(course) as (config, _):
        api = NbGraderAPI(config=config)
        for page in sorted((course / "feedback").glob("*/*/*.html")):
            student, name = page.parts[-3:-1]
            with contextlib.suppress(MissingEntry, OSError):  # of a student or a problem set that is no longer there
                rows.append({"student": student, "assignment": name} | _points_of(api, course, name, student))
    return rows


def read_table(path: Path, columns: Sequence[str]) -> list[dict]:
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
    rows = read_table(course / "marks.csv", MARKS[:4])
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


def known(chosen: Sequence[str], there: list[str]) -> list[str]:
    """The chosen problem sets, or all that are there. Raises ``Invalid`` for one that is not."""
    for name in chosen:
        if name not in there:
            known = ", ".join(there) or "none"
            raise Invalid(f'There is no problem set "{name}"{nearest(name, there)}; there are {known}.')
    return list(chosen) or there


def configure(config: Config) -> None:
    """The rules by which is graded, in nbgrader's configuration. ``nbgrader_config.py`` of a course calls it too."""
    config.CourseDirectory.course_id = "faceadv"
    config.Execute.timeout = TIMEOUT
    config.GenerateAssignment.preprocessors = [Note, *GenerateAssignment().preprocessors]
    after = Autograde().autograde_preprocessors
    place = list(after).index(Execute) + 1
    config.Autograde.autograde_preprocessors = [*after[: place - 1], Apart, DropStderr, *after[place:]]
    config.Execute.startup_timeout = TIMEOUT  # a kernel imports PyTorch first
    config.Apart.extra_arguments = [f'--IPKernelApp.exec_lines=__import__("{guard.__name__}", fromlist=[""]).begin()']
    config.HTMLExporter.sanitize_html = True  # feedback pages show what students wrote, and run none of it
    config.HTMLExporter.filters = {"clean_html": page.clean, "markdown2html": page.markdown}
    config.ExportPlugin.to = "nbgrader-grades.csv"  # by default it writes over our grades.csv


@contextlib.contextmanager
def _nbgrader(course):
    """nbgrader's configuration for a course, and its log, off the screen. Environment and logger are restored."""
    config, log, logger = Config(), io.StringIO(), logging.getLogger("traitlets")
    configure(config)
    config.CourseDirectory.root = str(Path(course).resolve())
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

"""What goes out of a course and comes in: the students' download, zips of what was handed in, tables of grades."""

import zipfile
from pathlib import Path, PurePosixPath

import pandas as pd

from faceadv.course import assignments
from faceadv.errors import Invalid, Missing
from faceadv.store.paths import PROJECT, nearest, replacing
from faceadv.store.tables import csv_safe

__all__ = ["PLATFORMS", "collect", "export", "students"]

# what students need of this repository: neither our problem sets' sources nor the tests, which know wrong answers
STUDENTS = ("README.md", "LICENSE", "Makefile", "pyproject.toml", "requirements.txt", "requirements", "environment.yml")
STUDENTS += ("faceadv", "notebooks", "results", "docs", "data/README.md")
# by platform: the columns of which its table must have one, to know whose a row is
PLATFORMS = {"moodle": ("Email address", "ID number", "Username"), "canvas": ("ID", "SIS User ID", "SIS Login ID")}


def students(course: str | Path) -> Path:
    """Write COURSE/for-students.zip, the repository without solutions, with the released problem sets; return its path.

    Raises ``Invalid`` if nothing was released.
    """
    released = sorted(Path(course).glob("release/*/*.ipynb"))
    if not released:
        raise Invalid(f"{course} has no released problem set: faceadv assignments release --course {course}.")
    found = [path for name in STUDENTS for path in ([PROJECT / name, *sorted((PROJECT / name).rglob("*"))])]
    files = {path.relative_to(PROJECT): path for path in found if path.is_file() and "__pycache__" not in path.parts}
    files |= {Path("assignments", path.name): path for path in released}
    target = Path(course) / "for-students.zip"
    with replacing(target) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in files.items():
            archive.write(path, Path("faceadv-course") / name)
    return target


def collect(name: str, archive: str | Path, course: str | Path) -> list[tuple[bool, str]]:
    """Put the notebooks of a zip into COURSE/submitted/STUDENT/NAME/NAME.ipynb: a list of (ok, sentence).

    A student is called after the folder that the notebook lies in, or after its file where there is none, up to the
    first underscore, as Moodle and Canvas name them. What is there already stays.

    Parameters
    ----------
    name : of the problem set
    archive : the zip
    course : the folder of the course

    Raises
    ------
    Invalid : if there is no such problem set, or the file is no zip
    Missing : if there is no such file
    """
    course, results = Path(course), []
    assignments.known([name], assignments.names(course / "source"))
    if not Path(archive).is_file():
        raise Missing(f"There is no file {archive}.")
    if not zipfile.is_zipfile(archive):
        raise Invalid(f"{archive} is not a zip: download all submissions in one again.")
    with zipfile.ZipFile(archive) as zipped:
        for entry in zipped.infolist():
            path = PurePosixPath(entry.filename.replace("\\", "/"))
            if (
                path.suffix != ".ipynb"
                or path.name.startswith(".")
                or {"__MACOSX", ".ipynb_checkpoints"} & {*path.parts}
            ):
                continue
            student = (path.parent.name or path.name).partition("_")[0].strip()
            place = course / "submitted" / student / name / f"{name}.ipynb"
            if student in ("", ".", "..") or assignments.PATTERN.search(student):
                results.append((False, f"{path} is left out: nobody can be called {student!r}."))
            elif place.exists():
                results.append((False, f"{path} is left out: {place} is there already; remove that to take this one."))
            else:
                with replacing(place) as part:
                    part.write_bytes(zipped.read(entry))
                results.append((True, f"{student}: {path.name}"))
    return results or [(False, f"{archive} has no notebook (.ipynb).")]


def export(platform: str, course: str | Path) -> list[tuple[bool, str]]:
    """Write COURSE/PLATFORM.csv, a table of grades as Moodle or Canvas imports it: a list of (ok, sentence).

    COURSE/roster.csv, the platform's own table of people with a column "student" added (the names of the folders in
    ``submitted``), says who is who. Raises ``Invalid`` for another platform, or a roster or grades that lack something.
    """
    course = Path(course)
    if platform not in PLATFORMS:
        raise Invalid(f"There is no table for {platform!r}{nearest(platform, PLATFORMS)}: {' or '.join(PLATFORMS)}.")
    people = pd.DataFrame(assignments.read_table(course / "roster.csv", ("student",)))
    if people.empty or not {*PLATFORMS[platform]} & {*people.columns}:
        columns = " or ".join(PLATFORMS[platform])
        raise Invalid(
            f"{course / 'roster.csv'} must have the columns student, and {columns}: export it from {platform}."
        )
    rows, results = assignments.read_table(course / "grades.csv", ("student", "assignment", "points", "of")), []
    if not rows:
        raise Invalid(f"{course} has no grades: faceadv assignments grade --course {course}.")
    totals, of = {}, {}
    for row in rows:
        student, name = row["student"].removeprefix("'"), row["assignment"]
        if student not in set(people["student"]):
            results.append((False, f"{student} {name} is left out: nobody in roster.csv is called so."))
        elif not row["points"]:
            results.append((False, f"{student} {name} has no points: {row.get('error', '')}"))
        else:
            totals.setdefault(name, {})[student], of[name] = float(row["points"]), float(row["of"])
    for name in sorted(totals):
        people[name] = people["student"].map(totals[name])
    if platform == "moodle":
        people["Total"] = people[sorted(totals)].sum(axis=1)
    else:  # Canvas has the most that one can get in a row of its own
        people = pd.concat([pd.DataFrame([{"Student": "    Points Possible", **of}]), people])
    with replacing(course / f"{platform}.csv") as part:
        people.drop(columns="student").map(csv_safe).to_csv(part, index=False)
    return [*results, (True, f"Import {course / f'{platform}.csv'} into {platform.capitalize()}.")]

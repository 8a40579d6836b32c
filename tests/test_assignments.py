"""Problem sets: the reference gets all points, a blank one none, plausible wrong answers lose what they should."""

import contextlib
import csv
import io
import logging
import os
import re
import warnings

import matplotlib.pyplot as plt
import nbformat
import pytest

from faceadv import cli
from faceadv.course import assignments

# by set: in place of a solution's cell, a plausible wrong answer, and the tests that it must lose; all others it passes
WRONG = {
    "ps1": {
        "ifgsm": (  # the budget counted from the last iterate
            """
            def ifgsm_step(x_i, g, x, eps, alpha):
                return (x_i - (alpha * g.sign()).clamp(-eps, eps)).clamp(0, 1)
            """,
            {"ifgsm-budget"},
        ),
        "pfgvm": (  # signed slope
            """
            def pfgvm_step(x_i, g, x, alpha, lam):
                return (x_i - alpha * (g.sign() + lam * (x_i - x))).clamp(0, 1)
            """,
            {"pfgvm-pull"},
        ),
    },
    "ps2": {
        "softmax": (  # no second piece
            """
            def different(squared, tau, top=4.0):
                return (0.5 * squared / tau).clamp(0, 1).where(squared != top, torch.ones(()))
            """,
            {"softmax-pieces"},
        ),
        "loss": (  # the logarithm of the wrong probability, and without a floor
            """
            def verification_loss(cleaned, legitimate, tau):
                return -(1 - different((cleaned - legitimate).norm(dim=1), tau)).log().mean()
            """,
            {"loss-values"},
        ),
        "behind": (  # no gradient through the purifier
            """
            def behind(purifier, objective):
                def seen(images, rows, exact=False):
                    return objective(purifier(images).detach() + 0.0 * images, rows, exact)
                return seen
            """,
            {"behind-breaks"},
        ),
    },
    "ps3": {
        "amplify": (  # the photo is made stronger, not the cloak
            """
            def amplify(x, cloaked, kappa):
                return (kappa.reshape(-1, 1, 1, 1) * cloaked).clamp(0, 1)
            """,
            {"amplify-values"},
        ),
        "protection": (  # judged on the photos that were trained on, in their cloaks
            """
            def protection(user, natural, cloaked_embeddings, labels, train):
                own = labels == user
                data = torch.where(own[:, None], cloaked_embeddings, natural)
                named = labels[train][torch.cdist(data[own & ~train], data[train]).argmin(1)]
                return (named != user).float().mean().item()
            """,
            {"protection-values"},
        ),
        "cloak": (  # towards the photo
            """
            def cloak(x, start, extractor, eps, alpha, steps):
                own, moved = extractor(x).detach(), start
                for _ in range(steps):
                    moved = moved.detach().requires_grad_(True)
                    (slope,) = torch.autograd.grad((extractor(moved) - own).square().sum(), moved)
                    moved = (moved.detach() - alpha * slope.sign()).clamp(0, 1)
                return moved
            """,
            {"cloak-works"},
        ),
    },
    "ps4": {
        "attention": (  # softmax over the wrong places
            """
            def attention(Q, K, V):
                A = (Q.transpose(1, 2) @ K / Q.shape[1] ** 0.5).softmax(1)
                return V @ A.transpose(1, 2)
            """,
            {"attention-values"},
        ),
        "cosine": (  # lengths count
            """
            def cosine_loss(made, wanted):
                return 1 - (made * wanted).sum(1).mean() / wanted.square().sum(1).mean()
            """,
            {"cosine-values"},
        ),
    },
    "ps5": {
        "pool": (  # the transpose, not the pseudo-inverse
            """
            def A(x, s=2):
                return F.avg_pool2d(x, s)


            def A_plus(y, s=2):
                return y.repeat_interleave(s, 2).repeat_interleave(s, 3) / s**2
            """,
            {"pool-laws", "step-restores"},
        ),
        "step": (  # eta taken for that of DDIM, no fresh noise
            """
            def step(x_t, e, xi, y, a_t, a_s, eta=0.85):
                x0 = ((x_t - (1 - a_t).sqrt() * e) / a_t.sqrt()).clamp(-1, 1)
                return a_s.sqrt() * null_space(x0, y, A, A_plus) + (1 - a_s).sqrt() * e


            {restore}
            """,
            {"step-restores"},
        ),
    },
    "ps6": {
        "threshold": (  # chosen on the pairs that are reported
            """
            def threshold_at(distances, same, far):
                different = np.sort(distances[~same])
                return different[int(len(different) * far)]


            def report(d_calibration, same_calibration, d_test, same_test, far):
                accepted = d_test < threshold_at(d_test, same_test, far)
                return accepted[same_test].mean(), accepted[~same_test].mean()
            """,
            {"threshold-honest"},
        ),
        "interval": (  # pairs drawn, not people
            """
            def interval(hits, who, repeats=1000, seed=0):
                draws = np.random.default_rng(seed).integers(len(hits), size=(repeats, len(hits)))
                return tuple(np.quantile(hits[draws].mean(1), [0.025, 0.975]))
            """,
            {"interval-people"},
        ),
        "bpda": (  # half of the slope
            """
            def straight_through(defence):
                return lambda images: defence(images.detach()) + 0.5 * (images - images.detach())
            """,
            {"bpda-breaks"},
        ),
        "eot": (  # one draw for all samples
            """
            def expected(defence, objective, samples):
                def behind(images, rows, exact=False):
                    return objective(defence(images), rows, exact)

                return behind
            """,
            {"eot-draws"},
        ),
    },
}
# by set: an answer in place of a solution that does nothing with what it is given, which no visible test may let pass
NOTHING = {
    "ps1": {
        "ifgsm": "def ifgsm_step(x_i, *given):\n    return x_i",
        "pfgvm": "def pfgvm_step(x_i, *given):\n    return x_i",
        "loop": "def attack(images, *given):\n    return images",
    },
    "ps2": {
        "softmax": "def different(squared, *given):\n    return squared",
        "loss": "def verification_loss(cleaned, *given):\n    return 0 * cleaned.sum()",
        "share": "def accepted(*given):\n    return 1.0",
        "behind": "def behind(purifier, objective):\n    return objective",
    },
    "ps3": {
        "cloak": "def cloak(x, start, *given):\n    return start",
        "amplify": "def amplify(x, cloaked, kappa):\n    return cloaked",
        "protection": "def protection(*given):\n    return 0.0",
    },
    "ps4": {
        "cosine": "def cosine_loss(made, wanted):\n    return 0 * made.sum()",
        "hinge": "def hinge(real, made):\n    return 0 * real.sum()",
        "attention": "def attention(Q, K, V):\n    return V",
        "impersonated": "def impersonated(*given):\n    return 1.0",
    },
    "ps5": {
        "pool": "def A(x, s=2):\n    return x\n\n\ndef A_plus(y, s=2):\n    return y",
        "colour": "def C(x):\n    return x\n\n\ndef C_plus(grey):\n    return grey",
        "null": "def null_space(x0, *given):\n    return x0",
        "step": "def step(x_t, *given):\n    return x_t\n\n\n{restore}",
    },
    "ps6": {
        "threshold": "def threshold_at(*given):\n    return 0.0\n\n\ndef report(*given):\n    return 0.0, 0.0",
        "interval": "def interval(*given):\n    return 0.0, 1.0",
        "bpda": "def straight_through(defence):\n    return defence",
        "eot": "def expected(defence, objective, samples):\n    return objective",
    },
}
# a warning and a progress bar are no mistake
NOISY = """
import sys
import warnings


def ifgsm_step(x_i, g, x, eps, alpha):
    warnings.warn("this may take a while")
    print("50 %", file=sys.stderr)
    moved = x_i - alpha * g.sign()
    return torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1)
"""


def cells(notebook):
    return {cell.metadata.nbgrader.grade_id: cell for cell in notebook.cells if "nbgrader" in cell.metadata}


def dedent(text):
    return re.sub(r"(?m)^ {12}", "", text).strip()


def source(name):
    return nbformat.read(assignments.SOURCE / name / f"{name}.ipynb", 4)


def solutions(notebook):
    return {key: cell.source for key, cell in cells(notebook).items() if cell.metadata.nbgrader.solution}


def failures(notebook, several, idle):
    """For each dict of answers in place of some cells, the cells that fail when all run in this process, in order.

    What comes before the first of these answers runs only once, because it is the same for all; the experiment too,
    which nobody tests. For idle answers, a cell each, nothing runs after the test of it that students see.
    """
    code = {key: cell.source for key, cell in cells(notebook).items() if cell.cell_type == "code"}
    before, place = {}, {}

    def failing(answers, place, keys):
        found = set()
        for key in keys:
            before.setdefault(key, dict(place))
            try:
                exec(compile(answers.get(key, code[key]), key, "exec"), place)
            except Exception:
                found.add(key)
        return found

    with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
        assert failing({}, place, code) == set()
        plt.close("all")  # of the experiment
        keys = [key for key in code if key != "experiment"]
        for answers in [*several, *idle]:
            first = keys.index(next(key for key in keys if key in answers))
            end = keys.index(f"{keys[first]}-seen") + 1 if answers in idle else None
            yield failing(answers, dict(before[keys[first]]), keys[first:end])


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course in which all problem sets were handed in, ps1 by several: its folder, and the rows of grades."""
    course = tmp_path_factory.mktemp("course")
    paths = {path.stem: path for path in assignments.release([], course)}
    assert list(paths) == assignments.names()
    handed_in = {(name, "reference"): solutions(source(name)) for name in paths}
    key, (wrong, _) = next(iter(WRONG["ps1"].items()))
    handed_in |= {("ps1", "blank"): {}, ("ps1", "deleted"): {}}
    handed_in["ps1", "wrong"] = handed_in["ps1", "reference"] | {key: dedent(wrong)}
    handed_in["ps1", "reference"] = handed_in["ps1", "reference"] | {"ifgsm": NOISY}
    for (name, student), answers in handed_in.items():
        notebook = nbformat.read(paths[name], 4)
        if student == "deleted":  # a deleted test is no passed one
            notebook.cells = [cell for cell in notebook.cells if "-seen" not in cell.metadata.nbgrader.grade_id]
        for key, text in answers.items():
            cells(notebook)[key].source = text
        place = course / "submitted" / student / name / f"{name}.ipynb"
        place.parent.mkdir(parents=True)
        nbformat.write(notebook, place)
    marks = "".join(f"reference,{name},words,2.5,What about JPEG?\n" for name in paths)
    (course / "marks.csv").write_text(f"student,assignment,question,marks,comment\n{marks}")
    return course, {(row["assignment"], row["student"]): row for row in assignments.grade([], course)}


def points_of(name):
    marked = {key: cell.metadata.nbgrader for key, cell in cells(source(name)).items()}
    return {key: kind.points for key, kind in marked.items() if kind.grade}


@pytest.mark.parametrize("name", assignments.names())
def test_the_reference_gets_all_points(course, name):
    folder, rows = course
    points, row = points_of(name), rows[name, "reference"]
    assert sum(points.values()) >= 12
    tests = {key: value for key, value in points.items() if key != "words"}
    assert {key: row[key] for key in tests} == tests
    assert row["words"] == 2.5
    assert row["points"] == sum(tests.values()) + 2.5
    assert row["of"] == sum(points.values())
    page = folder / "feedback" / "reference" / name / f"{name}.html"
    assert "What about JPEG?" in page.read_text()
    with open(folder / "grades.csv", newline="") as file:
        table = {(line["assignment"], line["student"]): line for line in csv.DictReader(file)}
    assert float(table[name, "reference"]["points"]) == row["points"]


def test_others_get_no_points_for_what_is_blank_deleted_or_wrong(course):
    folder, rows = course
    points, (lost,) = points_of("ps1"), next(iter(WRONG["ps1"].values()))[1]
    for student in ("blank", "deleted"):
        assert {key: rows["ps1", student][key] for key in points} == dict.fromkeys(points, 0)
    assert {key: rows["ps1", "wrong"][key] for key in points} == points | {lost: 0, "words": None}
    with open(folder / "grades.csv", newline="") as file:
        (line,) = (line for line in csv.DictReader(file) if line["student"] == "wrong")
    assert line["words"] == ""  # nobody has read it yet


@pytest.mark.parametrize("name", assignments.names())
def test_wrong_answers_pass_what_students_see_and_lose_the_hidden_points(course, name):
    notebook, tests = source(name), points_of(name).keys() - {"words"}
    released = nbformat.read(course[0] / "release" / name / f"{name}.ipynb", 4)
    reference, blank = solutions(notebook), solutions(released)
    given = reference.get("step", "").partition("\n\n\n")[2]  # what the text gives after the student's part
    wrong = {key: {key: dedent(text).replace("{restore}", given)} for key, (text, _) in WRONG[name].items()}
    nothing = {key: {key: text.replace("{restore}", given)} for key, text in NOTHING[name].items()}
    assert len(wrong) >= 2
    assert nothing.keys() == {key for key in reference if f"{key}-seen" in tests}
    visible = {key: cell.source for key, cell in cells(released).items() if key in tests}
    failed, seen, *found = failures(notebook, [blank, visible, *wrong.values()], list(nothing.values()))
    found, idle = found[: len(wrong)], found[len(wrong) :]
    for key, lost in zip(nothing, idle):
        assert f"{key}-seen" in lost, f"an answer that does nothing passes the visible test of {key}"
    assert failed & tests == tests  # a blank answer gets nothing
    assert dict(zip(wrong, found)) == {key: lost for key, (_, lost) in WRONG[name].items()}
    for lost in found:
        assert all("HIDDEN" in cells(notebook)[key].source for key in lost)
        assert not any(key.endswith("-seen") for key in lost)  # what students see does not give it away
    assert seen == set()  # right answers pass without the hidden tests as well


@pytest.mark.parametrize("name", assignments.names())
def test_the_student_version_holds_no_solution_and_no_hidden_test(course, name):
    notebook, released = source(name), nbformat.read(course[0] / "release" / name / f"{name}.ipynb", 4)
    text = "\n".join(cell.source for cell in released.cells)
    public = re.sub(r"(?s)### BEGIN.*?### END", "", "\n".join(cell.source for cell in notebook.cells))
    assert not re.search("SOLUTION|HIDDEN|Model answer", text)
    for key, cell in cells(notebook).items():
        kind = cell.metadata.nbgrader
        if kind.solution and kind.grade:
            assert "YOUR ANSWER HERE" in cells(released)[key].source
        elif kind.solution:
            assert "NotImplementedError" in cells(released)[key].source
        for secret in re.findall(r"(?s)### BEGIN (?:SOLUTION|HIDDEN TESTS)\n(.*?)### END", cell.source):
            for line in secret.splitlines():
                assert len(line.strip()) < 30 or line.strip() in public or line.strip() not in text
    assert not any(cell.get("outputs") for cell in released.cells)
    # a test that called nothing of the student's would pay a blank one
    for key, cell in cells(released).items():
        assert key == "words" or not cell.metadata.nbgrader.grade or "(" in cell.source, key


def test_a_student_can_check_and_is_told_what_is_missing(course, tmp_path, capsys, monkeypatch):
    right = course[0] / "submitted" / "reference" / "ps1" / "ps1.ipynb"
    words = (
        "3 of the 3 points of tests that you see in full are reached; 7 more depend on hidden tests too, and 4 on a "
    )
    assert assignments.check(right) == [(True, f"{words}person who reads.")]
    released = course[0] / "release" / "ps1" / "ps1.ipynb"
    changed = nbformat.read(released, 4)
    cells(changed)["ifgsm-seen"].source = "pass"
    nbformat.write(changed, tmp_path / "changed.ipynb")
    monkeypatch.setenv("NBGRADER_EXECUTION", "mine")
    before = dict(os.environ), logging.getLogger("traitlets").level
    assert cli.main(["assignments", "check", str(released)]) == 1
    out = capsys.readouterr().out
    assert "NotImplementedError" in out
    assert "<span" not in out
    assert (dict(os.environ), logging.getLogger("traitlets").level) == before
    assert cli.main(["assignments", "check", str(tmp_path / "changed.ipynb")]) == 1
    assert "it is locked, undo your change" in capsys.readouterr().out
    copied = nbformat.read(released, 4)
    copied.cells.append(nbformat.from_dict({**cells(copied)["ifgsm"], "id": "copy"}))
    nbformat.write(copied, tmp_path / "copied.ipynb")
    assert cli.main(["assignments", "check", str(tmp_path / "copied.ipynb")]) == 1
    assert 'the cell "ifgsm" is there twice' in capsys.readouterr().out


def test_what_is_no_problem_set_passes_no_check(tmp_path, capsys):
    (path,) = assignments.release(["ps1"], tmp_path)
    untested = nbformat.read(path, 4)
    untested.cells = [
        cell for cell in untested.cells if not cell.metadata.nbgrader.grade or cell.metadata.nbgrader.solution
    ]
    assert [cell.metadata.nbgrader.grade_id for cell in untested.cells if cell.metadata.nbgrader.grade] == ["words"]
    for name, notebook in {"untested": untested, "other": nbformat.v4.new_notebook(cells=[])}.items():
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
        assert cli.main(["assignments", "check", str(tmp_path / f"{name}.ipynb")]) == 1
        out = capsys.readouterr().out
        assert out.startswith(f"[FAIL] {name}.ipynb has no tests")
        assert out.count("\n") == 1
    (tmp_path / "cut.ipynb").write_text("{cut off")
    assert cli.main(["assignments", "check", str(tmp_path / "cut.ipynb")]) == 2
    assert "cut.ipynb is not a notebook" in capsys.readouterr().err
    assert cli.main(["assignments", "check", str(tmp_path / "nobody.ipynb")]) == 2
    assert "There is no notebook" in capsys.readouterr().err


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    course = str(tmp_path)
    assert cli.main(["assignments", "release", "ps9", "--course", course]) == 2
    assert 'no problem set "ps9"' in capsys.readouterr().err
    assert cli.main(["assignments", "release", "ps1", "--course", course]) == 0
    assert cli.main(["assignments", "grade", "ps1", "--course", course]) == 2
    assert "Nobody has handed in ps1" in capsys.readouterr().err
    place = tmp_path / "submitted" / "anna" / "ps1"
    place.mkdir(parents=True)
    (place / "ps1.ipynb").write_text("{cut off")
    (tmp_path / "submitted" / "anna" / "ps0").mkdir()
    for row, words in {
        "anna,ps1,words": "line 2: it must have",
        "anna,ps1,words,three": "line 2: 'three' is not a number of points from 0 to 4",
        "anna,ps1,words,nan": "line 2: 'nan' is not a number",
        "anna,ps0,words,3": "nobody called 'anna' has handed in 'ps0'",
        "Anna,ps1,words,3": "nobody called 'Anna'",
        "anna,ps1,word,3": "did you mean words",
        "anna,ps1,words,5": "line 2: '5' is not a number of points from 0 to 4",
    }.items():
        (tmp_path / "marks.csv").write_text(f"student,assignment,question,marks\n{row}\n")
        assert cli.main(["assignments", "grade", "--course", course]) == 2
        assert words in capsys.readouterr().err
    for name in ("marks.csv", "grades.csv"):  # as a spreadsheet may save them
        (tmp_path / name).write_text("student,assignment\nJosé,ps1\n", encoding="cp1252")
        assert cli.main(["assignments", "grade", "--course", course]) == 2
        assert f"{name} is not a table in CSV and UTF-8" in capsys.readouterr().err
        (tmp_path / name).unlink()
    assert not (tmp_path / "autograded").exists()
    (tmp_path / "grades.csv").write_text("student,assignment,points,of\nben,ps0,3,4\n", encoding="utf-8-sig")
    page = tmp_path / "feedback" / "anna" / "ps1" / "ps1.html"
    page.parent.mkdir(parents=True)
    page.write_text("of an older version")
    assert cli.main(["assignments", "grade", "ps1", "--course", course]) == 1
    assert not page.exists()
    assert "anna ps1: " in capsys.readouterr().out
    (place / "ps1.ipynb").rename(place / "anna.ipynb")
    assert cli.main(["assignments", "grade", "ps1", "--course", course]) == 1
    assert "has no ps1.ipynb (it has anna.ipynb)" in capsys.readouterr().out
    assert "traceback" not in (tmp_path / "grades.csv").read_text()
    assert "ben,ps0" in (tmp_path / "grades.csv").read_text()
    assert cli.main(["assignments", "grade", "--course", str(tmp_path / "nowhere")]) == 2
    assert "is no course" in capsys.readouterr().err


def test_no_cell_of_grades_is_a_formula_and_no_row_is_there_twice(tmp_path):
    assignments.release(["ps1"], tmp_path)
    for student in ('=HYPERLINK("http:__evil")', "@SUM(A1)", "+ben", "-carl", "dora"):
        (tmp_path / "submitted" / student / "ps1").mkdir(parents=True)
    for _ in range(2):
        rows = assignments.grade(["ps1"], tmp_path)
        assert [row["student"] for row in rows] == sorted(path.name for path in (tmp_path / "submitted").iterdir())
        with open(tmp_path / "grades.csv", newline="") as file:
            table = list(csv.reader(file))
        assert len(table) == 6
        assert {row[0] for row in table[1:]} == {"'" + row["student"] for row in rows if row["student"] != "dora"} | {
            "dora"
        }
        assert not any(cell.startswith(("=", "+", "-", "@")) for row in table for cell in row)


def test_what_a_teacher_changed_is_kept(tmp_path):
    (path,) = assignments.release(["ps2"], tmp_path)
    source = tmp_path / "source" / "ps2" / "ps2.ipynb"
    source.write_text(source.read_text().replace("About an hour", "Two hours"))
    assignments.release(["ps2"], tmp_path)
    assert "Two hours" in path.read_text()


@pytest.mark.parametrize("name", assignments.names())
def test_students_are_told_points_time_and_rules_and_get_hints_and_a_picture(name):
    notebook, points = source(name), points_of(name)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    told = [float(number) for number in re.findall(r"(?m)^## .*\(([\d.]+) points\)$", text)]
    assert sum(told) == sum(points.values())
    assert f"**{sum(points.values()):g} points.**" in text
    for words in ("**Time.**", "**Working together, and AI helpers.**", f"## {len(told)}. The experiment"):
        assert words in text
    assert text.count("<summary>Hint</summary>") == len(told)
    figure = cells(notebook)["experiment"].source
    assert ("plots.grid(" in figure, "plt.subplots(" in figure) == (True, True)
    for key, cell in cells(notebook).items():
        if cell.metadata.nbgrader.solution and cell.cell_type == "code":
            taught = re.findall(r"(?m)^def .*:\n    \"\"\"", cell.source)
            assert len(taught) == len(re.findall(r"(?m)^def ", cell.source)), key
            assert f"{key}-seen" in points


def test_every_exercise_of_the_notebooks_has_a_solution_that_students_lack():
    page = (assignments.SOURCE.parent / "solutions.md").read_text(encoding="utf-8")
    answered = {part[:2]: re.findall(r"(?m)^(\d)\. ", part) for part in page.split("\n## ")[1:]}
    asked = {}
    for path in sorted((assignments.PROJECT / "notebooks").glob("*.ipynb")):
        text = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
        asked[path.stem[:2]] = re.findall(r"(?m)^(\d)\. \*\((?:easy|medium|open)\)", text.partition("## Exercises")[2])
    assert asked == answered

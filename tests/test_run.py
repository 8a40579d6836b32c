"""The running machinery, on tiny notebooks that papermill really executes."""

import json
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from faceadv import cli, plots
from faceadv.course import notebook, page, profiles, run

PARAMETERS = """profile: str = "orl"  # which
seed: int = 0
steps: int = 5  # how many
lr: float = 0.1
eps: list[float] = [1.0, 2.0]
fast: bool = False
free = None
results_dir: str = "../results\""""
INTRODUCTION = r"""# A title & more

You will see *this*. And then more, with $\|x\|_2 \le \epsilon$ and [the next](01_b.ipynb).

$$\begin{aligned} a &= b \\ c &= \frac12 \end{aligned}$$

$$\begin{cases} 1 \end{cases}$$
"""
WORKING = """import os, sys
from pathlib import Path
folder = Path(results_dir) / profile
folder.mkdir(parents=True, exist_ok=True)
_ = (folder / "00_a.json").write_text('{"numbers": []}')
print(steps, os.environ["MALLOC_TRIM_THRESHOLD_"], os.environ["PYTHONHASHSEED"], Path.cwd().name)
assert Path(sys.prefix).samefile(PREFIX)""".replace("PREFIX", repr(sys.prefix))


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A folder with notebooks in place of the course's; returns a function that adds one."""
    folder = tmp_path / "notebooks"
    (folder / "profiles").mkdir(parents=True)
    (folder / "profiles" / "orl.yaml").write_text("all: {profile: orl}\n00_a: {steps: 3}\n")
    monkeypatch.setattr(profiles, "NOTEBOOKS", folder)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(run, "_package", lambda: "the package as it is")

    def add(name, *code, tags=(), parameters=PARAMETERS):
        cells = [
            new_markdown_cell(INTRODUCTION),
            new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        ]
        cells += [new_code_cell(source, metadata={"tags": list(tags)}) for source in code]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
        return folder / f"{name}.ipynb"

    return add


def printed(path):
    cells = json.loads(path.read_text())["cells"]
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))


def faceadv_metadata(path):
    return json.loads(path.read_text())["metadata"]["faceadv"]


def test_run_keeps_a_copy_reuses_it_and_runs_again_when_something_changed(course, tmp_path):
    out = tmp_path / "o{u}t"  # papermill would take the braces for a parameter
    path = course("00_a", WORKING)
    [first] = run.run(["00"], out=out, quiet=True)
    assert (first.status, first.error, first.cell) == ("ran", "", None)
    assert first.path == out / "orl" / "00_a.ipynb"
    assert printed(first.path) == "3 2147483647 0 notebooks\n"
    meta = faceadv_metadata(first.path)
    assert meta["status"] == "finished"
    assert meta["record"]
    assert 20 < meta["peak_mib"] < 2000
    assert (out / "results" / "orl" / "00_a.json").exists()

    [second] = run.run(["00_a"], out=out, quiet=True)
    assert (second.status, second.seconds) == ("reused", first.seconds)

    assert run._finished(first.path, meta["key"], out)
    (out / "results" / "orl" / "00_a.json").unlink()
    assert run._finished(first.path, meta["key"], out) is None

    course("00_a", WORKING, "print('changed')")
    [third] = run.run("all", out=out, overrides={"steps": "4"}, quiet=True)
    assert third.status == "ran"
    assert printed(third.path).startswith("4 ")
    assert printed(third.path).endswith("changed\n")
    assert "outputs" not in json.loads(path.read_text())["cells"][0]  # the source was left alone
    assert printed(path) == ""


def test_key_knows_sources_parameters_and_data(course, monkeypatch):
    path = course("00_a", "1")
    key = run._key(path, {"steps": 1})
    assert run._key(path, {"steps": 1}) == key
    assert run._key(path, {"steps": 2}) != key
    monkeypatch.setenv("FACEADV_DATA", "elsewhere")
    assert run._key(path, {"steps": 1}) != key
    monkeypatch.delenv("FACEADV_DATA")
    monkeypatch.setattr(run, "_package", lambda: "another")
    assert run._key(path, {"steps": 1}) != key
    monkeypatch.undo()


def test_package_is_hashed_by_source_and_by_size_of_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("a = 1")
    (tmp_path / "w.safetensors").write_text("12")
    before = run._package()
    (tmp_path / "w.safetensors").write_text("34")
    assert run._package() == before
    (tmp_path / "a.py").write_text("a = 2")
    assert run._package() != before


def test_failures_leave_copies_that_do_not_look_finished(course, tmp_path, capsys):
    course("00_a", "1 / 0", "print('later')")
    course("01_b", "import sys; sys.exit(0)", "print('later')")
    course("02_c", "import os; os._exit(1)", "print('later')")
    assert cli.main(["run", "all", "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().out
    assert "00_a: cell [3]: ZeroDivisionError: division by zero" in told
    assert "01_b: it stopped before its last cell" in told
    assert "02_c: the kernel died" in told
    for path in sorted((tmp_path / "out" / "orl").glob("*.ipynb")):
        meta, cells = faceadv_metadata(path), json.loads(path.read_text())["cells"]
        assert meta["status"] == "failed"
        assert cells[-1]["metadata"]["papermill"]["status"] == "pending"
        assert run._finished(path, meta["key"], tmp_path / "out") is None
    index = (tmp_path / "out" / "index.html").read_text()
    assert "failed" in index
    assert "ZeroDivisionError" in index


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"stesp": 3}, r"00_a has no parameter \"stesp\" \(did you mean steps\?\)"),
        ({"steps": "many"}, "steps of 00_a must be of type int, not str"),
        ({"steps": 1.5}, "must be of type int, not float"),
        ({"steps": True}, "must be of type int, not bool"),
        ({"fast": "1"}, "must be of type bool, not int"),
        ({"lr": "8/255"}, "must be of type float"),
        ({"eps": "3"}, "must be of type list, not int"),
        ({"eps": "[1, x]"}, "an item of eps of 00_a must be of type float"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(course, tmp_path, overrides, told):
    course("00_a", "1")
    with pytest.raises(ValueError, match=told):
        run.run("all", overrides=overrides, out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_parameters_from_the_command_line_get_the_type_of_the_notebook(course):
    path = course("00_a", "1")
    texts = {"lr": "1e-3", "steps": "7", "eps": "[1, 1e-3]", "fast": "true", "profile": "112", "free": "[1]"}
    values = profiles.parameters("orl", path, texts)
    expected = {"lr": 0.001, "steps": 7, "eps": [1.0, 0.001], "fast": True, "profile": "112", "free": [1]}
    assert values == expected
    assert profiles.parameters("orl", path, {"lr": 1}) == {"profile": "orl", "steps": 3, "lr": 1.0}


@pytest.mark.parametrize(
    ("yaml", "told"),
    [
        ("00_a: {lr: 1e-3}", r"lr of 00_a must be a float, and YAML reads 1e-3 as text: write 1\.0e-3"),
        ("00_a: {lr: 1e3}", r"write 1\.0e\+3"),
        ("00_a: {steps: '3'}", "must be of type int, not str"),
        ("00_a: {sed: 3}", r"did you mean seed\?"),
        ("00_aa: {seed: 3}", r"nothing for 00_a \(did you mean 00_aa\?\)"),
        ("00_a: 3", "must map notebooks to their parameters"),
        ("00_a: [", "is not YAML"),
    ],
)
def test_mistakes_in_a_profile_are_told(course, yaml, told):
    path = course("00_a", "1")
    (path.parent / "profiles" / "orl.yaml").write_text(yaml)
    with pytest.raises(ValueError, match=told):
        profiles.parameters("orl", path)


def test_unknown_names_are_refused_with_the_nearest(course):
    course("00_faces", "1")
    with pytest.raises(ValueError, match=r'no notebook "00_face" \(did you mean 00_faces\?\)'):
        run.select(["00_face"])
    with pytest.raises(ValueError, match=r'no profile "olr" \(did you mean orl\?\)'):
        profiles.load("olr")


def test_one_cell_must_be_tagged_parameters(course):
    path = course("00_a", "1", tags=["parameters"])
    with pytest.raises(ValueError, match="2 cells tagged parameters"):
        profiles.declared(path)
    path.write_text("<html>")
    with pytest.raises(ValueError, match=r"00_a\.ipynb is not a notebook"):
        profiles.declared(path)


def test_an_interrupted_run_leaves_no_kernel_and_is_continued(course, tmp_path):
    course("00_a", WORKING)
    marker = tmp_path / "started"
    course("01_b", f"from pathlib import Path; import time; m = Path({str(marker)!r}); again = m.exists()",
           "m.touch(); time.sleep(0 if again else 60)", "print('done')")  # fmt: skip
    out = tmp_path / "out"
    code = (
        "import signal, sys; from pathlib import Path; from faceadv import cli, profiles, run;"
        # a shell that started the tests in the background had it ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"profiles.NOTEBOOKS = Path({str(profiles.NOTEBOOKS)!r});"
        "run._package = lambda: 'the package as it is';"
        f"sys.exit(cli.main(['run', 'all', '--out', {str(out)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "faceadv: interrupted."
    assert "Traceback" not in told
    assert kernels
    assert not [kernel for kernel in kernels if kernel.is_running()]
    assert faceadv_metadata(out / "orl" / "01_b.ipynb")["status"] == "interrupted"
    again = run.run("all", out=out, quiet=True)
    assert [result.status for result in again] == ["reused", "ran"]
    assert printed(again[1].path) == "done\n"


def test_update_writes_outputs_and_records_but_no_path_of_this_machine(course, tmp_path):
    source = course("00_a", WORKING, "6 * 7")
    private = course("01_b", "import os; print('in', os.path.abspath(results_dir))")
    before = nbformat.read(source, as_version=4)
    with pytest.raises(ValueError, match=r"01_b\.ipynb was not updated: cell \[2\] prints .*out, a folder of this"):
        run.update("all", out=tmp_path / "out", quiet=True)
    assert printed(source) == printed(private) == ""

    [result] = run.update("00", out=tmp_path / "out", quiet=True)
    assert result.status == "reused"
    after = nbformat.read(source, as_version=4)
    assert [cell.source for cell in after.cells] == [cell.source for cell in before.cells]
    assert [cell.get("execution_count") for cell in after.cells] == [None, 1, 2, 3]
    assert after.cells[-1].outputs[0].data["text/plain"] == "42"
    assert after.cells[-1].outputs[0].execution_count == 3
    assert set(after.metadata) == {"faceadv", "kernelspec", "language_info"}
    assert set(after.metadata.faceadv) == {"profile", "source_sha256", "seconds", "peak_mib"}
    assert not any("papermill" in cell.metadata for cell in after.cells)
    assert str(tmp_path) not in source.read_text()
    assert (tmp_path / "committed" / "orl" / "00_a.json").exists()
    assert notebook.is_current(source)
    after.cells[-1].source = "6 * 8"
    nbformat.write(after, source)
    assert not notebook.is_current(source)
    assert not notebook.is_current(private)


class Loads(HTMLParser):
    """Everything a page would load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "link", "iframe", "object", "embed"):
            self.found.append(tag)
        self.found += [attributes[name] for name in ("src", "srcset", "data", "poster") if name in attributes]


def test_pages_load_nothing_and_show_the_main_table_and_figure(tmp_path):
    def shown(mime, data, tags=(), **output):
        output = nbformat.v4.new_output("display_data", {mime: data, **output})
        return new_code_cell("show()", outputs=[output], execution_count=1, metadata={"tags": list(tags)})

    still = {"output_type": "display_data", "metadata": {}, "data": {"image/png": "U1RJTEw="}}
    state = {
        "box": {"state": {"children": ["IPY_MODEL_area"]}},
        "area": {"state": {"outputs": [still]}},
    }
    cells = [
        new_markdown_cell(INTRODUCTION),
        shown("text/html", "<table><tr><td>first</td></tr></table>"),
        shown("text/html", "<table><tr><td>main</td></tr></table>", ["main-table"]),
        shown("image/png", "Rk9P"),
        shown("image/png", "TUFJTg==", ["main-figure"]),
        shown(page.WIDGET, {"model_id": "box", "version_major": 2, "version_minor": 0}, **{"text/plain": "i()"}),
        shown("application/javascript", "fetch('https://example.org')"),
    ]
    notebook = new_notebook(cells=cells)
    notebook.metadata["widgets"] = {page.STATE: {"state": state, "version_major": 2, "version_minor": 0}}
    notebook.metadata["faceadv"] = {"status": "finished", "seconds": 12.3, "peak_mib": 456}
    (tmp_path / "orl").mkdir()
    nbformat.write(notebook, tmp_path / "orl" / "00_a.ipynb")
    index, single = page.write_index(tmp_path, "orl"), tmp_path / "orl" / "00_a.html"
    for path in (index, single):
        text, parser = path.read_text(), Loads()
        parser.feed(text)
        assert [load for load in parser.found if not load.startswith("data:")] == []
        assert not re.search(r"@import|url\((?!data:|['\"]?data:)|example\.org", text)
        assert "prefers-color-scheme: dark" in text

    text = index.read_text()
    assert '<a href="orl/00_a.html">A title &amp; more</a>' in text
    assert "<p>You will see <em>this</em>.</p>" in text
    assert "finished · 12 s · 456 MiB" in text
    assert "<td>main</td>" in text
    assert "<td>first</td>" not in text
    assert "TUFJTg==" in text
    assert "Rk9P" not in text

    text = single.read_text()
    assert "U1RJTEw=" in text  # the widget as the figure it showed
    assert 'href="01_b.html"' in text
    assert text.count('<svg aria-label="') == 3  # inline, and two rows
    assert r"<code>\begin{cases} 1 \end{cases}</code>" in text  # beyond Matplotlib: readable as TeX


@pytest.mark.parametrize("profile", ["smoke", "orl", "lfw", "paper"])
def test_every_profile_fits_every_notebook(profile):
    for path in sorted(profiles.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
        assert {"profile", "seed", "results_dir"} <= profiles.declared(path).keys()
        assert profiles.parameters(profile, path).get("profile", profile) == profile


def test_the_kernel_is_this_interpreter_whatever_is_installed(tmp_path):
    with run._kernel() as (manager, peak):
        spec = manager(kernel_name="python3").kernel_spec
    assert Path(spec.argv[0]) == Path(sys.executable)
    assert peak == [0]


RECORDING = """from faceadv import records
made = [records.number("twice the steps", 2 * steps, low=steps, high=3 * steps, unit="steps")]
place = records.place(results_dir, profile, "00_a")
_ = records.write(place, notebook="00_a", profile=profile, seed=seed, numbers=made)
"""


def test_several_values_make_one_run_each_and_one_table(course, tmp_path, capsys):
    course("00_a", RECORDING)
    out = tmp_path / "out"
    given = {"steps": "2, 8,3", "eps": "[1.0, 4.0]", "lr": [0.1, 0.2]}
    table, results = run.sweep("00", "orl", given, out, quiet=True)
    assert [result.status for result in results] == ["ran"] * 6
    assert list(table["steps"]) == ["2", "2", "8", "8", "3", "3"]
    assert list(table["lr"]) == [0.1, 0.2] * 3
    assert list(table["value"]) == [4, 4, 16, 16, 6, 6]
    assert (out / "steps=8_eps=[1.0, 4.0]_lr=0.2" / "orl" / "00_a.ipynb").exists()
    assert len((out / "sweep.csv").read_text().splitlines()) == 7
    assert not (out / "sweep.png").exists()  # two parameters vary
    assert results[0].name == "steps=2_eps=[1.0, 4.0]_lr=0.1 00_a"
    axis = plots.sweep(table[table["lr"] == 0.1], "steps", ["twice the steps"]).axes[0]
    assert axis.lines[0].get_xdata().tolist() == [2, 3, 8]
    assert axis.get_ylabel() == "steps"
    # what ran already is not run again, and a mistake is found before anything runs
    _, again = run.sweep("00", "orl", given, out, quiet=True)
    assert [result.status for result in again] == ["reused"] * 6
    with pytest.raises(ValueError, match="did you mean steps"):
        run.sweep("00", "orl", {"setps": "1,2"}, tmp_path / "other")
    with pytest.raises(ValueError, match="must be of type int"):
        run.sweep("00", "orl", {"steps": "1,two"}, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert cli.main(["run", "00", "-p", "steps", "2,3", "--out", str(tmp_path / "cli")]) == 0
    said = capsys.readouterr().out
    assert "sweep.csv" in said
    assert "steps=3 00_a" in said
    assert (tmp_path / "cli" / "sweep.png").stat().st_size > 1000
    assert cli.main(["run", "00", "--workers", "2", "--out", str(tmp_path / "cli")]) == 2
    assert "for several values" in capsys.readouterr().err


def test_a_sweep_on_a_cluster_gives_the_same_table(tmp_path):
    given = {"steps": "1,2", "pairs_per_kind": 3, "eps_grid_255": [8.0]}
    alone, _ = run.sweep("01", "smoke", given, tmp_path / "alone", quiet=True)
    spread, results = run.sweep("01", "smoke", given, tmp_path / "spread", "local", workers=1, quiet=True)
    assert [result.status for result in results] == ["ran"] * 2
    assert list(alone["name"]) == list(spread["name"])
    assert (alone["value"] - spread["value"]).abs().median() < 0.01  # another number of threads flips a few signs
    assert (tmp_path / "spread" / "sweep.csv").exists()

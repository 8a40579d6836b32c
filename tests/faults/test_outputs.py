"""What others wrote is shown or listed, never run: in feedback pages, in the site's notebooks, and in tables."""

import re
import runpy

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from faceadv.benchmark import tables
from faceadv.course import assignments, page, run
from faceadv.store.paths import PROJECT

ATTACK = "<script>steal()</script><img src=x onerror='steal()'><a href='javascript:steal()'>a</a>"
TABLE = "<table><thead><tr><th>kept</th></tr></thead></table>"


def notebook():
    def shown(mime, data):
        return new_output("display_data", {mime: data})

    outputs = [shown("text/html", TABLE + ATTACK), shown("text/markdown", f"**bold** {ATTACK}")]
    outputs += [shown("application/javascript", "steal()"), new_output("stream", text=ATTACK)]
    note = {"grade_id": "words", "grade": True, "solution": True, "locked": False, "points": 2, "task": False}
    note |= {"schema_version": 3, "comment": f"well done {ATTACK}", "score": 1}
    told = f"An answer with $x_1$ and $$y$$\n\n- a < b & c\n\n<details><summary>more</summary></details>\n\n{ATTACK}"
    cells = [new_code_cell("show()", outputs=outputs), new_markdown_cell(told, metadata={"nbgrader": note})]
    return new_notebook(cells=cells)


def test_feedback_runs_nothing_that_a_student_wrote(tmp_path):
    from nbgrader.converters import GenerateFeedback

    with assignments._nbgrader(tmp_path) as (config, _):
        converter = GenerateFeedback(config=config)
        exporter = converter.exporter_class(parent=converter, config=converter.config)
        resources = {"nbgrader": {"notebook": "tiny", "score": 1, "max_score": 2, "late_penalty": 0}}
        text, _ = exporter.from_notebook_node(notebook(), {**resources, "metadata": {"path": str(tmp_path)}})
    live = re.findall(r"<script[^>]*>[^<]*steal|<[^>]*onerror|<[^>]*javascript:|<script[^>]*>\s*steal", text)
    assert live == []
    for kept in ("<th>kept</th>", "<strong>bold</strong>", "<math", "<summary>more</summary>", "a &lt; b &amp; c"):
        assert kept in text
    assert "&lt;script&gt;steal()" in text  # what was printed, or is the text of an answer, can be read


def test_the_sites_notebooks_run_nothing_that_a_cell_made(tmp_path, monkeypatch):
    space = runpy.run_path(str(PROJECT / "docs" / "build.py"), run_name="build")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "alt.yaml").write_text("00_a: []\n")
    nbformat.write(notebook(), tmp_path / "notebooks" / "00_a.ipynb")
    monkeypatch.setitem(space["notebooks"].__globals__, "PROJECT", tmp_path)
    monkeypatch.setitem(space["notebooks"].__globals__, "DOCS", tmp_path)
    monkeypatch.setitem(space["notebooks"].__globals__, "SOURCE", tmp_path / "source")
    space["notebooks"](None)
    outputs = nbformat.read(tmp_path / "source" / "notebooks" / "00_a.ipynb", 4).cells[0].outputs
    data = [text for output in outputs for text in output.get("data", {}).values()]
    assert not any(re.search("steal|onerror|javascript", text) for text in data)
    assert "<th>kept</th>" in data[0]
    assert "**bold**" in data[1]


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1"])
def test_no_cell_of_grades_begins_a_formula(tmp_path, name):
    assignments._write(tmp_path / "grades.csv", [{"student": name, "assignment": name, "error": name}], [])
    lines = (tmp_path / "grades.csv").read_text().splitlines()
    assert lines[1].replace('"', "") == ",".join(["'" + name] * 3)


def test_the_index_page_runs_nothing(tmp_path):
    (tmp_path / "orl").mkdir()
    nbformat.write(notebook(), tmp_path / "orl" / "00_a.ipynb")
    page.write_index(tmp_path, "orl")
    for path in (tmp_path / "index.html", tmp_path / "orl" / "00_a.html"):
        assert not re.search(r"<script|<[^>]*onerror|<[^>]*javascript:", path.read_text())


@pytest.mark.parametrize("name", ["=1+1", "+1+1", "-1+1", "@SUM(A1)"])
def test_no_cell_of_a_sweep_begins_a_formula(name):
    table = pd.DataFrame({name: ["-1", "2"], "name": [name, "rate"], "value": [-0.5, None], "unit": ["%", name]})
    lines = run._safe(table).to_csv(index=False).splitlines()
    assert lines == [f"'{name},name,value,unit", f"-1,'{name},-0.5,%", f"2,rate,,'{name}"]


def test_no_cell_of_the_long_table_begins_a_formula(tmp_path):
    name = "dlib, dodging, =1+1, none, static, 2/255"
    record = {
        "numbers": [{"name": name, "value": 1, "low": 0, "high": 2, "n": 3}],
        "profile": "-1",
        "seed": 0,
        "data": {"faces": "@SUM(A1)"},
    }
    head, line = tables.write([record], tmp_path)[0].read_text().splitlines()
    assert line == "'-1,'@SUM(A1),0,dlib,dodging,'=1+1,none,static,2.0,,1.0,0.0,2.0,3"
    assert head == ",".join(tables.COLUMNS)


def test_nobody_else_writes_tables():
    """A new writer of CSV needs ``csv_safe``, and a test like those above."""
    folders = [PROJECT / folder for folder in ("faceadv", "benchmarks", "docs", "notebooks", "assignments")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".ipynb"}]
    writers = {path.name for path in files if re.search(r"to_csv\(|csv\.\w*[wW]riter|to_excel", path.read_text())}
    assert writers == {"assignments.py", "deidentify.py", "exchange.py", "run.py", "tables.py"}

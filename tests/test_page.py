"""Pages of executed notebooks: they load nothing, run nothing, and show formulas, tables and figures."""

import re
import shutil
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from faceadv.course import page, run

INTRODUCTION = r"""# A title & more

You will see *this*. And then more, with $\|x\|_2 \le \epsilon$ and [the next](01_b.ipynb).

$$\begin{aligned} a &= b \\ c &= \frac12 \end{aligned}$$

$$\begin{cases} 1 \end{cases} \neverheardof{x}$$
"""
MAY_STAND_ALONE = {"br", "col", "hr", "img", "meta"}
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
WIDGET = "application/vnd.jupyter.widget-view+json"


class Parsed(HTMLParser):
    """What a page would load or run, its elements, and whether each is closed."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.runs, self.tags, self.open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in MAY_STAND_ALONE:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster", "background") and not value.startswith("data:image/"):
                self.loads.append(value)
            self.loads += re.findall(r"url\(.*", value or "") if name == "style" else []
            if name.startswith("on") or re.match(r"\s*(javascript|vbscript|data:text)", value or "", re.I):
                self.runs.append(f"{name}={value}")
        self.loads += [tag] * (tag in ("link", "iframe", "object", "embed", "base", "form"))
        self.runs += [tag] * (tag in ("script", "svg", "template", "noscript"))

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.loads += re.findall(r"@import.*|url\(.*", data)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def shown(mime, data, tags=(), **others):
    output = new_output("display_data", {mime: data, **others})
    return new_code_cell("show()", outputs=[output], execution_count=1, metadata={"tags": list(tags)})


def pages(folder, cells, **meta):
    """The index page and the page of one notebook, as texts and parsed, and nothing to load or to run in either."""
    notebook = new_notebook(cells=cells)
    notebook.metadata["faceadv"] = {"status": "finished", "seconds": 12.3, "peak_mib": 456, **meta}
    (folder / "orl").mkdir(exist_ok=True)
    nbformat.write(notebook, folder / "orl" / "00_a.ipynb")
    texts = [path.read_text() for path in (page.write_index(folder, "orl"), folder / "orl" / "00_a.html")]
    for text in texts:
        parsed = Parsed(text)
        assert parsed.open == []
        assert parsed.loads == []
        assert parsed.runs == []
        assert "prefers-color-scheme: dark" in text
    return texts


def test_pages_show_the_main_table_and_figure(tmp_path):
    cells = [
        new_markdown_cell(INTRODUCTION),
        shown("text/html", "<table><tr><td>first</td></tr></table>"),
        shown("text/html", "<table><tr><td>main</td></tr></table>", ["main-table"]),
        shown("image/png", "Rk9P"),
        shown("image/png", "TUFJTg==", ["main-figure"]),
        shown(WIDGET, {"model_id": "box", "version_major": 2, "version_minor": 0}, **{"image/png": "U1RJTEw="}),
        shown("image/svg+xml", "<svg xmlns='http://www.w3.org/2000/svg' onload='steal()'></svg>"),
    ]
    index, single = pages(tmp_path, cells)
    assert '<a href="orl/00_a.html">A title &amp; more</a>' in index
    assert "<p>You will see <em>this</em>.</p>" in index
    assert "finished · 12 s · 456 MiB" in index
    assert "<td>main</td>" in index
    assert "<td>first</td>" not in index
    assert "TUFJTg==" in index
    assert "Rk9P" not in index
    assert "show()" not in index
    for told in ("U1RJTEw=", "show", "data:image/svg+xml;base64,", 'href="01_b.html"', "Figure of cell 1"):
        assert told in single  # U1RJTEw= is a widget as the figure that it showed
    # inline, and an equation of two rows; TeX that is not understood can still be read
    assert single.count("<math") == 2
    assert single.count("<mtr>") == 2
    assert "<mo>≤</mo>" in single or "<mo>&#x02264;</mo>" in single
    assert r"\neverheardof{x}</code>" in single


ATTACKS = [
    "<script src='https://example.org/a.js'></script>",
    "<SCRIPT>steal()</SCRIPT>",
    "<script>steal()",
    "<img src='data:image/png;base64,AAAA' onerror='steal()'>",
    "<img src='https://example.org/a.png'>",
    "<a href='javascript:steal()'>a</a>",
    "<a href='java&#x0A;script&colon;steal()'>a</a>",
    "<a href='data:text/html,<script>steal()</script>'>a</a>",
    "<a href='da&#9;ta:text/html,steal()'>a</a>",
    "<svg onload='steal()'><script>steal()</script></svg>",
    "<math><mtext><style><img src=x onerror=steal()></style></mtext></math>",
    "<math href='javascript:steal()'><mi xlink:href='javascript:steal()'>x</mi></math>",
    "<iframe srcdoc='<script>steal()</script>'></iframe><object data='https://example.org'></object>",
    "<p style='background: url(https://example.org/a.png); color: red'>p</p>",
    "<style>@import 'https://example.org/a.css';</style><link rel='stylesheet' href='https://example.org/a.css'>",
    "<form action='https://example.org'><input onfocus='steal()' autofocus></form><base href='https://example.org'>",
    "<!--><script>steal()</script>-->",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_script_reaches_a_page(tmp_path, attack):
    table = f"<table><tr><td>main</td><td>{attack}</td></tr></table>"
    cells = [
        new_markdown_cell(f"# Title {attack}\n\nSentence {attack}.\n\n{attack}\n\n$x {attack}$"),
        shown("text/html", table, ["main-table"]),
        shown("text/markdown", attack),
        shown("text/latex", attack),
        shown("application/javascript", "steal()"),
        shown("image/png", f"AAAA'\"{attack}"),
        new_code_cell("x", outputs=[new_output("stream", text=attack)], execution_count=2),
    ]
    index, single = pages(tmp_path, cells, status="failed", error=attack)
    assert "<td>main</td>" in index
    assert "<td>main</td>" in single


def test_what_a_course_shows_survives(tmp_path):
    import pandas as pd

    frame = pd.DataFrame({"a": [1.5], "b": ["<x>"]}, index=pd.MultiIndex.from_tuples([("p", "q")], names=["m", "n"]))
    html = frame.to_html()
    figure = f"![A picture](data:image/png;base64,{PNG})"
    _, single = pages(tmp_path, [new_markdown_cell(f"# T\n\n{figure}\n\n<b>old</b>"), shown("text/html", html)])
    assert single.count("<th>") + single.count("<th ") == html.count("<th>") + html.count("<th ")
    assert "text-align: right" in single
    assert "&lt;x&gt;" in single
    assert PNG in single
    assert "<b>old</b>" in single


@pytest.mark.parametrize(
    ("tex", "holds"),
    [
        (r"\bar z", 'stretchy="false"'),
        (r"\lVert x \rVert^2", 'stretchy="false"'),
        (r"\kappa \sim \mathcal U", "&#x0223C;"),
        (r"\mathcal L", "ℒ"),
        (r"\max_{x} f", "<munder><mo>max</mo>"),
        (r"\arg\max_x f", "arg"),
    ],
)
def test_formulas_are_what_browsers_set_well(tex, holds):
    made = page._formula(tex, "block")
    assert made.startswith("<math")
    assert holds in made.replace("&#x02112;", "ℒ")


def test_pages_are_written_again_when_they_are_older_or_empty(tmp_path):
    pages(tmp_path, [new_markdown_cell("# One")])
    single = tmp_path / "orl" / "00_a.html"
    written = single.read_text()
    for spoilt in ("", None):
        single.unlink() if spoilt is None else single.write_text(spoilt)
        page.write_index(tmp_path, "orl")
        assert single.read_text() == written
    _, second = pages(tmp_path, [new_markdown_cell("# Two")])
    assert "Two" in second
    (tmp_path / "orl" / "01_b.ipynb").write_text('{"cells": [')  # of a run that was killed
    assert "01_b" not in page.write_index(tmp_path, "orl").read_text()


def test_every_committed_notebook_makes_a_page(tmp_path, caplog):
    (tmp_path / "orl").mkdir()
    paths = run.select("all")
    for path in paths:
        shutil.copy(path, tmp_path / "orl")
    page.write_index(tmp_path, "orl")
    assert caplog.text == ""
    for path in paths:
        text = (tmp_path / "orl" / f"{path.stem}.html").read_text()
        tags = Parsed(text).tags
        assert tags.count("math") > 5
        assert {"table", "img"} <= set(tags)
        assert not re.search(r"<code>[^<]*\\[a-z]", text)  # no formula was left as TeX

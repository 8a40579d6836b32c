"""The site builds from what is committed, without a network, a warning or a broken link (docs/build.py checks them)."""

import os
import re
import runpy
import subprocess
import sys

import pytest

from faceadv.store.paths import PROJECT


def build(place):
    return subprocess.run(
        [sys.executable, str(PROJECT / "docs" / "build.py"), str(place)],
        env=os.environ | {"FACEADV_REPOSITORY": "https://github.com/somebody/faceadv"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_site_builds_and_every_notebook_can_be_opened_elsewhere(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / ".made-by-docs-build").touch()
    (tmp_path / "site" / "old.html").write_text("of an earlier build")
    built = build(tmp_path)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    assert not (tmp_path / "site" / "old.html").exists()
    site = tmp_path / "site"
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        page = (site / "notebooks" / f"{path.stem}.html").read_text()
        assert f"https://colab.research.google.com/github/somebody/faceadv/blob/main/notebooks/{path.name}" in page
        assert f"https://mybinder.org/v2/gh/somebody/faceadv/main?urlpath=lab/tree/notebooks/{path.name}" in page
        assert f"jupyter lab notebooks/{path.name}" in re.sub("<[^>]+>", "", page)
    for path in site.rglob("*.html"):  # nothing is loaded from the network
        assert not re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=.https?://[^>]+>", path.read_text()), path.name
    chapter = (site / "notebooks" / "01_attacks.html").read_text()
    assert re.search("<h1>1 · ", chapter)
    assert len(re.findall('<form class="bd-search', chapter)) == 1  # the one that the button above opens
    assert "MIT licence for code and text; data and weights" in chapter
    assert "Copyright" not in re.sub("<[^>]+>", "", chapter)
    assert "pre { overflow-x: auto" in (site / "_static" / "custom.css").read_text()
    assert "RECORDS = [{" in (site / "_static" / "records.js").read_text()
    rooms = (site / "api" / "index.html").read_text()
    for name in ("attacks", "networks.dlib", "store.cache", "training.loop"):
        assert f'href="{name}.html"' in rooms
        assert f'id="module-faceadv.{name}"' in (site / "api" / f"{name}.html").read_text()


def test_the_readme_is_one_screen_and_all_pages_lead_somewhere():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert readme.count("\n") <= 90
    found = readme.partition("## What was found")[2].partition("\n## ")[0]
    assert len([line for line in found.splitlines() if line.startswith("- ")]) <= 12
    for page in [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")]:
        links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
        lost = [link for link in links if "actions/" not in link and not (page.parent / link).exists()]
        assert not lost, page.name  # the badges' links are of GitHub
    for page in (PROJECT / "docs").glob("*.md"):
        assert page.name in readme or page.stem == "explorer", page.name


def test_the_locks_two_parts_are_one_and_torch_is_in_one_of_them():
    parts = {path.stem: path.read_text(encoding="utf-8") for path in (PROJECT / "requirements").glob("*.txt")}
    names = {stem: set(re.findall(r"(?m)^([\w.-]+)==", text)) for stem, text in parts.items()}
    assert {"torch", "torchvision", "triton"} <= names["torch"]
    assert not [name for name in names["rest"] if re.match("torch$|torchvision|triton|nvidia|cuda", name)]
    pins = dict(re.findall(r"(?m)^(facenet-pytorch|torchattacks)==([\w.]+)", parts["rest"]))
    assert pins == {"facenet-pytorch": "2.5.3", "torchattacks": "3.3.0"}  # later ones pin what nobody can install
    top = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    assert {f"-r requirements/{stem}.txt" for stem in parts} <= set(top.splitlines())


@pytest.mark.parametrize("folder", ["site", "site-source"])
def test_nobody_elses_folder_is_deleted(tmp_path, folder, monkeypatch):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "mine.html").write_text("years of work")
    monkeypatch.setattr(sys, "argv", ["build.py", str(tmp_path)])
    monkeypatch.setenv("FACEADV_REPOSITORY", "")
    with pytest.raises(SystemExit, match=rf"^{tmp_path / folder} was not made by docs/build\.py"):
        runpy.run_path(str(PROJECT / "docs" / "build.py"), run_name="__main__")
    assert (tmp_path / folder / "mine.html").read_text() == "years of work"

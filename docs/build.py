"""Build the site into build/site: `make site`, or python docs/build.py [ELSEWHERE]. No network, nothing is executed.

The source is put together in build/site-source: the README as the first page, those of this folder, the notebooks with
alternative texts, the data page, model cards, a page for each record and each module, and the chart with its data.
"""

import ast
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import plotly
import yaml
from sphinx.cmd.build import main as sphinx

from faceadv import records
from faceadv.benchmark import grid, statistics
from faceadv.course.page import KINDS, clean
from faceadv.store.paths import PROJECT

DOCS, BUILD = PROJECT / "docs", Path(*sys.argv[1:2] or [PROJECT / "build"]).resolve()
SOURCE, SITE = BUILD / "site-source", BUILD / "site"
COLAB = (  # its own torch stays
    "git clone {where} course && cd course && pip install -q --no-deps -r requirements/rest.txt"
    " && pip install -q --no-deps -e ."
)
USED = ("installing", "reruns", "gpu", "teaching", "deidentify", "networks", "package", "guarantees")
PAGES = ("explorer", "leaderboard", "measured", *USED)
MARK = ".made-by-docs-build"  # in each folder that may be deleted by the next build


def repository():
    """Where the repository lies, for the links of Colab and Binder: FACEADV_REPOSITORY, or git's origin, or None."""
    given = os.environ.get("FACEADV_REPOSITORY")
    if given is None and shutil.which("git"):
        asked = subprocess.run(
            ["git", "remote", "get-url", "origin"], cwd=PROJECT, capture_output=True, text=True, check=False
        )
        found = re.fullmatch(r"(?:https://|git@)github\.com[/:]([\w.-]+/[\w.-]+?)(?:\.git)?", asked.stdout.strip())
        given = found and f"https://github.com/{found[1]}"
    return given or None


def fresh(folder):
    """Make an empty folder, in place of what an earlier build left there. Nobody else's folder is deleted."""
    ours = (folder / MARK).exists() or folder.is_relative_to(PROJECT / "build")
    if folder.is_symlink() or (folder.exists() and not ours):
        raise SystemExit(f"{folder} was not made by docs/build.py: move it away, or build elsewhere.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def write(name, text):
    """Write a page of the source."""
    (SOURCE / name).parent.mkdir(parents=True, exist_ok=True)
    (SOURCE / name).write_text(text, encoding="utf-8")


def notebooks(where):
    """Copy the notebooks, each figure with its alternative text, and how to open it below the title."""
    alt = yaml.safe_load((DOCS / "alt.yaml").read_text(encoding="utf-8"))
    for path in sorted((PROJECT / "notebooks").glob("*.ipynb")):
        notebook, texts = nbformat.read(path, as_version=4), list(alt[path.stem])
        for cell in notebook.cells:
            cell.source = re.sub(r"\]\(\.\./data/README\.md(#[\w-]+)?\)", "](../data.md)", cell.source)
            cell.source = re.sub(r"\]\(\.\./docs/([\w-]+\.md)", r"](../\1", cell.source)
            for output in cell.get("outputs", []):
                data = {kind: text for kind, text in output.get("data", {}).items() if kind in KINDS}
                for kind in data.keys() & {"text/html", "text/markdown"}:
                    data[kind] = clean(data[kind])
                if "data" in output:
                    output["data"] = data
            pictures = [o for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
            if pictures:
                # one text serves a cell: those of several figures are joined
                text = " Then: ".join(texts.pop(0) if texts else "" for _ in pictures)
                if not text:
                    raise SystemExit(f"docs/alt.yaml has too few texts for {path.name}: a figure would have none.")
                cell.metadata["mystnb"] = {"image": {"alt": text}}
        if texts:
            raise SystemExit(f"docs/alt.yaml has {len(texts)} texts too many for {path.name}.")
        notebook.cells[0].source = re.sub(r"\A# ", f"# {int(path.stem[:2])} · ", notebook.cells[0].source)
        links = f"Open it: `jupyter lab notebooks/{path.name}`"
        if where:
            name = where.removeprefix("https://github.com/")
            links += f" · [Colab](https://colab.research.google.com/github/{name}/blob/main/notebooks/{path.name})"
            links += f" · [Binder](https://mybinder.org/v2/gh/{name}/main?urlpath=lab/tree/notebooks/{path.name})"
            links += f"\n\nIn Colab run this first, then restart the kernel: `!{COLAB.format(where=where)}`"
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(links))
        place = SOURCE / "notebooks" / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, place)
    return sorted(path.stem for path in (PROJECT / "notebooks").glob("*.ipynb"))


def text_pages(where):
    """Write the README as the first page, and those of this folder, their links led to the pages of the site.

    Gives the first page's text.
    """
    pages = {"CONTRIBUTING": PROJECT / "CONTRIBUTING.md"} | {page: DOCS / f"{page}.md" for page in PAGES}
    for name in ("attacks.png", "sweep.png"):
        shutil.copyfile(DOCS / name, SOURCE / name)
    shutil.copytree(PROJECT / "results" / "tables", SOURCE / "_static", dirs_exist_ok=True)

    def text(path):
        kept = re.sub(r"\A\[!.*\n\n", "", path.read_text(encoding="utf-8"))  # badges come from the network
        kept = re.sub(r"\]\(([^)\s]+)\)", lambda link: f"]({led(link[1])})", kept)
        return kept.replace("https://github.com/OWNER/REPOSITORY", where or "https://github.com/OWNER/REPOSITORY")

    for page, path in pages.items():
        write(f"{page}.md", text(path))
    return text(PROJECT / "README.md")


def led(link):
    """Where a link of the README, or of a page of this folder, leads on the site."""
    link = link.removeprefix("../").removeprefix("docs/").replace("results/tables/", "_static/")
    return {
        "data/README.md": "data.md",
        "results": "results/index.md",
        "results/": "results/index.md",
        "faceadv/models": "models/index.md",
    }.get(link, link)


def toctree(pages, caption="", hidden=True):
    """A directive that lists pages."""
    options = [f":caption: {caption}"] if caption else []
    options += [":hidden:"] if hidden else [":maxdepth: 1"]
    return "\n".join(["```{toctree}", *options, "", *pages, "```", ""]) + "\n"


def cards():
    """The model cards."""
    names = []
    for path in sorted((PROJECT / "faceadv" / "models").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        for file in re.findall(r"\]\(([\w.-]+\.(?:png|jsonl))\)", text):
            (SOURCE / "models").mkdir(exist_ok=True)
            shutil.copyfile(path.parent / file, SOURCE / "models" / file)
        write(f"models/{path.name}", text)
        names.append(path.stem)
    write("models/index.md", "# What ships: model cards\n\n" + toctree(names, hidden=False))


def record_pages():
    """A page for each record, and the benchmark's lines as the chart's data."""
    names, lines, costs = [], [], {}
    for path in sorted((PROJECT / "results").rglob("*.json")):
        if path.name in ("gpu.json", "datapackage.json"):  # rates of one machine, in docs/gpu.md; a dictionary
            continue
        record = records.read(path)
        name = "_".join(path.relative_to(PROJECT / "results").with_suffix("").parts)
        run, data = record["run"], json.dumps(record["data"], ensure_ascii=False, indent=1)
        text = f"# {record['notebook']}, profile {record['profile']}{name.split(record['notebook'])[-1]}\n\n"
        text += f"Seed {record['seed']}, {run['created']}, {run['device']}, {run['seconds']:.0f} s.\n\n"
        text += f"```json\n{data}\n```\n\n" + records.markdown(record)
        write(f"results/{name}.md", text)
        names.append(name)
        if record["notebook"] == grid.NOTEBOOK:
            table = statistics.lines(record).assign(profile=record["profile"], main_eps=record["data"]["eps of 255"])
            lines += table.to_dict("records")
            costs[record["profile"]] = run["timings"]["ms an image"]["defences"]
    write("results/index.md", "# Result records\n\nEvery number, as measured.\n\n" + toctree(names, hidden=False))
    data = {"RECORDS": lines, "COSTS": costs}
    script = "".join(f"const {name} = {json.dumps(value, ensure_ascii=False)};\n" for name, value in data.items())
    write("_static/records.js", script)


def modules():
    """A page for each module of the package, and a list of them by rooms."""
    rooms, names = {"": "The science, which notebooks import, and what all rooms share."}, {}
    for path in sorted((PROJECT / "faceadv").rglob("*.py")):
        *room, module = path.relative_to(PROJECT / "faceadv").with_suffix("").parts
        if module != "__init__":
            name = ".".join([*room, module])
            names.setdefault(".".join(room), []).append(name)
            directive = f".. automodule:: faceadv.{name}\n   :members:\n"
            write(f"api/{name}.md", f"# faceadv.{name}\n\n```{{eval-rst}}\n{directive}```\n")
        elif room:
            rooms[".".join(room)] = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).split("\n")[0]
    lists = [
        f"## faceadv{room and '.' + room}\n\n{what}\n\n" + toctree(names[room], hidden=False)
        for room, what in rooms.items()
    ]
    write("api/index.md", "# The package\n\n" + "\n".join(lists))


class _Links(html.parser.HTMLParser):
    """The links, ids and pictures of a page."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.without_text = [], {""}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids.update(filter(None, (found.get("id"), found.get("name"))))
        self.links += filter(None, (found.get("href"), found.get("src")))
        if tag == "img" and not found.get("alt"):
            self.without_text.append(found.get("src"))


def broken(site=SITE):
    """Links within the site that lead nowhere, and pictures without a text: a list of sentences."""
    pages = {
        path.resolve(): _Links(path.read_text(encoding="utf-8"))
        for path in Path(site).rglob("*.html")
        if "_static" not in path.parts
    }
    found = []
    for path, page in pages.items():
        name = path.relative_to(Path(site).resolve())
        found += [f"{name}: {picture} has no alternative text" for picture in page.without_text]
        for link in page.links:
            place, anchor = urldefrag(link)
            if re.match(r"\w+:|//", place):
                continue
            target = (path.parent / unquote(place.split("?")[0])).resolve() if place else path
            if not target.exists():
                found.append(f"{name}: {link} leads nowhere")
            elif target in pages and unquote(anchor) not in pages[target].ids:
                found.append(f"{name}: {link} has no such place")
    return sorted(set(found))


def main():
    """Put the source together and build; warnings and broken links are errors."""
    where = repository()
    if where:
        os.environ["FACEADV_REPOSITORY"] = where
    else:
        print("FACEADV_REPOSITORY is not set: no links to Colab and Binder.")
    fresh(SOURCE)
    fresh(SITE)
    shutil.copytree(DOCS / "_static", SOURCE / "_static")
    shutil.copyfile(DOCS / "conf.py", SOURCE / "conf.py")
    shutil.copyfile(
        Path(plotly.__file__).parent / "package_data" / "plotly.min.js", SOURCE / "_static" / "plotly.min.js"
    )
    write("data.md", (PROJECT / "data" / "README.md").read_text(encoding="utf-8"))
    cards()
    record_pages()
    modules()
    stems = notebooks(where)
    trees = toctree([f"notebooks/{stem}" for stem in stems], "The course")
    trees += toctree(["leaderboard", "explorer", "measured", "results/index"], "Results")
    trees += toctree([*USED, "data", "models/index", "api/index", "CONTRIBUTING"], "Use it")
    write("index.md", text_pages(where) + "\n" + trees)
    status = sphinx(["-W", "--keep-going", "-q", "-b", "html", str(SOURCE), str(SITE)])
    problems = broken() if status == 0 else []
    print("\n".join(problems) or (f"Open {SITE / 'index.html'}" if status == 0 else "The site was not built."))
    return status or int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

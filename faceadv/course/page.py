"""OUT/index.html and the executed notebooks as HTML: pages that open from disk with no network."""

import html
import re
from pathlib import Path

import nbformat
from jinja2 import pass_context
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path as Outline
from matplotlib.textpath import TextPath
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter

from faceadv.course import notebook as notebooks
from faceadv.store.paths import replacing

WIDGET = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
CSS = """
:root { color-scheme: light dark; --text: #1c1e21; --back: #fff; --soft: #f3f4f6;
  --line: #d5d8dc; --link: #0b57d0; --bad: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6e9; --back: #16181b; --soft: #22252a; --line: #3a3f46;
    --link: #8ab4f8; --bad: #ff8a80 } }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.55 system-ui, sans-serif;
  color: var(--text); background: var(--back) }
a { color: var(--link) } a.anchor-link { display: none }
h1, h2, h3 { line-height: 1.25 }
pre, code { font: 0.875rem/1.45 ui-monospace, monospace }
pre { overflow-x: auto; margin: 0.4rem 0; white-space: pre-wrap }
.input pre, .text_cell pre {
  background: var(--soft); border-radius: 4px; padding: 0.6rem 0.8rem; white-space: pre }
.output_stderr pre, .output_error pre { border-left: 3px solid var(--bad); padding-left: 0.6rem }
.prompt, .failed { color: var(--bad) } .prompt { display: none }
table { border: 0; border-collapse: collapse; display: block; overflow-x: auto; margin: 0.8rem 0;
  font-size: 0.9rem }
th, td { border: 0; border-bottom: 1px solid var(--line); padding: 0.25rem 0.6rem; text-align: right }
th:first-child, td:first-child, .text_cell td, .text_cell th { text-align: left }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px }
svg.math { vertical-align: middle; fill: currentColor; max-width: 100% }
span.math { display: block; text-align: center; margin: 1rem 0 }
article { border-top: 1px solid var(--line); margin-top: 1.5rem } article img { max-height: 26rem }
.status { color: inherit; opacity: 0.8 }
"""
# TeX that mathtext does not know, in words that it does
SYNONYMS = (
    (r"\\operatorname\*", r"\\operatorname"),
    (r"\\[td]frac\b", r"\\frac"),
    (r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}"),
    (r"\\[lr]Vert\b", r"\\|"),
    (r"\\([lr]vert|mid)\b", "|"),
    (r"\\le\b", r"\\leq"),
    (r"\\ge\b", r"\\geq"),
    (r"\\ne\b", r"\\neq"),
    (r"\\lt\b", "<"),
    (r"\\gt\b", ">"),
    (r"\\[bB]igg?[lrm]?(?![a-zA-Z])", ""),
    (r"\\(nonumber|displaystyle|limits)\b|\\label\{[^}]*\}", ""),
)


def write_index(out, profile):
    """Write OUT/index.html for the executed notebooks in OUT/PROFILE, and a page for each."""
    out = Path(out)
    parts = []
    for path in sorted((out / profile).glob("*.ipynb")):
        try:
            notebook = notebooks.read(path)
        except ValueError:  # a run was killed while it was being written
            continue
        notebook = _still(notebook)
        target = path.with_suffix(".html")
        newest = max(path.stat().st_mtime, Path(__file__).stat().st_mtime)
        if not target.exists() or target.stat().st_mtime < newest:
            with replacing(target) as part:
                part.write_text(_page(_title(notebook), _body(notebook, path.parent)), encoding="utf-8")
        parts.append(_entry(notebook, f"{profile}/{target.name}"))
    head = f"<h1>Adversarial faces</h1>\n<p>Executed notebooks, profile {html.escape(profile)}.</p>\n"
    with replacing(out / "index.html") as part:
        part.write_text(_page("Adversarial faces", head + "\n".join(parts)), encoding="utf-8")
    return out / "index.html"


def _page(title, body):
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    style = f"{CSS}{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n.highlight {{ background: none }}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _body(notebook, folder):
    """The notebook's cells as HTML, without the scripts that nbconvert fetches from the network."""
    exporter = HTMLExporter(template_name="basic")
    exporter.register_filter("markdown2html", _markdown)
    body, _ = exporter.from_notebook_node(notebook, {"metadata": {"path": str(folder)}})
    return re.sub(r'(href="[^":]*)\.ipynb(?=["#])', r"\1.html", body)


@pass_context
def _markdown(context, source):
    attachments = context.get("cell", {}).get("attachments", {})
    path = context.get("resources", {}).get("metadata", {}).get("path", "")
    renderer = _Renderer(escape=False, attachments=attachments, embed_images=True, path=path)
    return MarkdownWithMath(renderer=renderer).render(source)


class _Renderer(IPythonRenderer):
    def block_math(self, body):
        return _display(body)

    def latex_environment(self, name, body):
        return _display(rf"\begin{{{name}}}{body}\end{{{name}}}")

    def inline_math(self, body):
        return _svg(body, 14) or f"<code>{html.escape(body)}</code>"

    def block_mermaidjs(self, code):
        return f"<pre>{html.escape(code)}</pre>"


def _display(tex):
    """A displayed equation; the rows of an aligned one below each other."""
    bare = re.sub(r"\\(begin|end)\{(aligned|align|equation|gather|gathered|split)\*?\}", "", tex)
    rows = [
        _svg(row.replace("&", ""), 15, display=True) for row in re.split(r"\\\\(?:\[[^\]]*\])?", bare) if row.strip()
    ]
    inner = "<br>".join(rows) if all(rows) else f"<code>{html.escape(tex.strip())}</code>"
    return f'<span class="math">{inner}</span>'


def _svg(tex, size, display=False):
    """An equation drawn by Matplotlib as outlines (MathJax comes from the network), or None if it cannot."""
    simple = " ".join(tex.split())
    for pattern, word in SYNONYMS:
        simple = re.sub(pattern, word, simple)
    if display:
        simple = simple.replace(r"\frac", r"\dfrac")
    font = FontProperties(math_fontfamily="stix")
    try:
        outline = TextPath((0, 0), f"${simple.strip()}$", size=size * 4 / 3, prop=font)
    except ValueError:  # TeX beyond mathtext: shown as it is written
        return None
    if not len(outline.vertices):
        return ""
    letters = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C"}
    drawn = []
    for points, code in outline.iter_segments(curves=True, simplify=False):
        pairs = " ".join(f"{x:.1f} {-y:.1f}" for x, y in points.reshape(-1, 2))
        drawn.append("Z" if code == Outline.CLOSEPOLY else letters[code] + pairs)
    (left, bottom), (right, top) = outline.get_extents().get_points()
    width, height = f"{right - left + 2:.1f}", f"{top - bottom + 2:.1f}"
    below = f"{min(bottom - 1, 0):.1f}px"  # what hangs below the line of text
    return (
        f'<svg class="math" role="img" aria-label="{html.escape(simple)}" width="{width}" height="{height}" '
        f'viewBox="{left - 1:.1f} {-top - 1:.1f} {width} {height}" style="vertical-align: {below}">'
        f'<path d="{"".join(drawn)}"/></svg>'
    )


def _still(notebook):
    """The notebook with every widget replaced by the figures it showed, and no script."""
    models = notebook.metadata.pop("widgets", {}).get(STATE, {}).get("state", {})
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        outputs = []
        for output in cell.outputs:
            data = output.get("data", {})
            data.pop("application/javascript", None)
            shown = _shown(data.pop(WIDGET, {}).get("model_id"), models)
            outputs += shown or ([output] if data or output.output_type in ("stream", "error") else [])
        cell.outputs = outputs
        cell.metadata.setdefault("alt", f"Figure of cell {cell.execution_count}")
    return notebook


def _shown(model, models):
    """What the output areas inside a widget hold."""
    state = models.get(model, {}).get("state", {})
    found = [nbformat.from_dict(output) for output in state.get("outputs", [])]
    for child in state.get("children", []):
        found += _shown(child.removeprefix("IPY_MODEL_"), models)
    return found


def _title(notebook):
    found = re.search(r"^# +(.+)$", _prose(notebook), re.M)
    return found[1].strip() if found else "Notebook"


def _sentence(notebook):
    """The first sentence below the title."""
    below = re.sub(r"^.*?^# .+?$", "", _prose(notebook), count=1, flags=re.M | re.S)
    paragraphs = re.split(r"\n\s*\n", below)
    plain = (paragraph.strip() for paragraph in paragraphs)
    first = " ".join(next((p for p in plain if p and (p[0] not in "#|!<$-*>" or p[:2] == "**")), "").split())
    found = re.match(r".*?[.!?](?=\s|$)", first)
    return found[0] if found else first


def _prose(notebook):
    tag = "papermill-error-cell-tag"
    cells = [c for c in notebook.cells if c.cell_type == "markdown" and tag not in c.metadata.get("tags", [])]
    return "\n\n".join(cell.source for cell in cells)


def _entry(notebook, link):
    meta = notebook.metadata.get("faceadv", {})
    status = meta.get("status", "unknown")
    words = f"{status} · {meta.get('seconds', 0):.0f} s · {meta.get('peak_mib', 0)} MiB at most"
    if meta.get("error"):
        words += f" · {'cell [' + str(meta['cell']) + ']: ' if meta.get('cell') else ''}{meta['error']}"
    sentence = MarkdownWithMath(renderer=_Renderer(escape=False)).render(_sentence(notebook))
    shown = "status" if status == "finished" else "failed"
    return (
        f'<article>\n<h2><a href="{html.escape(link)}">{html.escape(_title(notebook))}</a></h2>\n{sentence}'
        f'<p class="{shown}">{html.escape(words)}</p>\n{_table(notebook)}\n{_figure(notebook)}\n</article>'
    )


def _table(notebook):
    for output in _tagged_first(notebook, "main-table"):
        data = output.get("data", {})
        if "<table" in data.get("text/html", ""):
            return re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.S)
        if "text/markdown" in data and re.search(r"^\|[\s:|-]+\|$", data["text/markdown"], re.M):
            return MarkdownWithMath(renderer=_Renderer(escape=False)).render(data["text/markdown"])
    return ""


def _figure(notebook):
    for output in _tagged_first(notebook, "main-figure"):
        for kind in ("image/png", "image/jpeg"):
            if kind in output.get("data", {}):
                code = "".join(output["data"][kind].split())
                return f'<img alt="Main figure" src="data:{kind};base64,{code}">'
        if "image/svg+xml" in output.get("data", {}):
            return re.sub(r"^.*?(?=<svg)", "", output["data"]["image/svg+xml"], flags=re.S)
    return ""


def _tagged_first(notebook, tag):
    """All outputs, those of the cell with this tag first."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    cells.sort(key=lambda cell: tag not in cell.metadata.get("tags", []))
    return [output for cell in cells for output in cell.outputs]

"""OUT/index.html and the executed notebooks as HTML: pages without any script that open from disk, with no network."""

import functools
import html
import re
from pathlib import Path
from urllib.parse import quote

import bleach
import nbformat
from bleach.css_sanitizer import CSSSanitizer
from jinja2 import pass_context
from jinja2.runtime import Context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from faceadv.course import notebook as notebooks
from faceadv.store.paths import replacing

__all__ = ["KINDS", "clean", "markdown", "write_index"]

STYLE = Path(__file__).with_suffix(".css")
PICTURES = ["image/svg+xml", "image/png", "image/jpeg"]
KINDS = ["text/html", "text/markdown", *PICTURES, "text/latex", "text/plain"]  # for a widget, the picture beside it
# What a page may contain. It must not contain elements whose content a browser takes for text (style, title, …),
# because within a formula they could hide a script from the sanitiser.
TAGS = """
a abbr article b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6
hr i img kbd li mark ol p pre s small span strong sub summary sup table tbody td tfoot th thead tr u ul math mfrac mi mn
mo mover mpadded mphantom mroot mrow mspace msqrt mstyle msub msubsup msup mtable mtd mtext mtr munder munderover"""
ATTRIBUTES = """
align alt class colspan height href id open rowspan src start style title valign width accent columnalign columnspacing
display displaystyle fence form linethickness lspace mathvariant maxsize minsize rowspacing rspace scriptlevel separator
stretchy"""
PROTOCOLS = {"http", "https", "mailto", "data"}
SYNONYMS = (  # TeX that latex2mathml does not know, or sets wrongly, in words that it sets rightly
    (r"(\\(?:begin|end)){(?:aligned|split|gathered)}", r"\1{align*}"),
    (r"\\operatorname\*", r"\\mathrm"),
    (r"\\arg(?![a-zA-Z])", r"\\operatorname{arg}"),
    (r"\\(mathcal|mathbb|mathbf)\s+(\w)", r"\\\1{\2}"),
    (r"\\(log|exp|sin|cos|tanh)\s+(?=[a-zA-Z])", r"\\\1\\,"),
)
REPAIRS = (  # the MathML of \bar, \overline, \lVert and \sim: what stretches, and the right character
    ('<mo stretchy="true">&#x000AF;', '<mo stretchy="false">&#x000AF;'),
    ('<mo accent="true">&#x02015;', '<mo accent="true" stretchy="true">&#x0203E;'),
    ("<mo>&#x02016;", '<mo stretchy="false">&#x02016;'),
    ("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>"),
)


def write_index(out: str | Path, profile: str) -> Path:
    """Write OUT/index.html about the executed notebooks in OUT/PROFILE, and a page for each; return the index."""
    out, head = Path(out), f"# Adversarial faces\n\nExecuted notebooks, profile {html.escape(profile)}."
    others = [path.parent.name for path in sorted(out.glob("*=*/index.html"))]
    head += "".join(f"\n\nWith {html.escape(name)}: [its own page](<{quote(name)}/index.html>)." for name in others)
    cells = [nbformat.v4.new_markdown_cell(head)]
    for path in sorted((out / profile).glob("*.ipynb")):
        try:
            notebook = notebooks.read(path)
        except ValueError:  # a run was killed while it was being written
            continue
        target, told = path.with_suffix(".html"), _changes(notebook)
        _write(target, _about(notebook)[0], (f'<p class="status">{told}</p>' if told else "") + _body(notebook))
        cells += _entry(notebook, f"{profile}/{target.name}")
    body = _body(nbformat.v4.new_notebook(cells=cells), exclude_input=True)
    return _write(out / "index.html", "Adversarial faces", f"<article>{body}</article>")


def _write(path, title, body):
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    colours = f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n.highlight {{ background: none }}"
    with replacing(path) as part:
        part.write_text(
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n<style>{STYLE.read_text(encoding='utf-8')}{colours}</style>\n"
            f"</head>\n<body>\n{clean(body)}\n</body>\n</html>\n",
            encoding="utf-8",
        )
    return path


def clean(text: str) -> str:
    """HTML without anything that could run or load something."""
    text = re.sub(r"<(script|style)\b.*?</\1\s*>", "", text, flags=re.S | re.I)  # or their content would be shown
    return bleach.clean(text, set(TAGS.split()), _harmless, PROTOCOLS, strip=True, css_sanitizer=CSSSanitizer())


def _harmless(tag, name, value):
    """Whether a page may have this attribute: pictures lie in the page itself, and links are no ``data:``."""
    if name in ("src", "href"):  # the sanitiser then refuses javascript: and the like
        inside = re.sub(r"[\0- ]", "", html.unescape(value)).lower().startswith("data:")
        return inside and tag == "img" if name == "src" else not inside
    return name in ATTRIBUTES.split()


def _body(notebook, **options):
    for cell in notebook.cells:
        cell.metadata.setdefault("alt", f"Figure of cell {cell.get('execution_count')}")
        if "outputs" in cell:  # a widget or a script alone is nothing that can be shown
            cell.outputs = [output for output in cell.outputs if not {*output.get("data", KINDS)}.isdisjoint(KINDS)]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/html" in data:  # cleaned here as well, or half an element would swallow the next cells
                data["text/html"] = clean(data["text/html"])
    made, _ = _exporter(**options).from_notebook_node(notebook)
    return re.sub(r'(href="[^":]*)\.ipynb(?=["#])', r"\1.html", made)


@functools.cache  # its templates are compiled anew for each exporter
def _exporter(**options):
    config = Config(NbConvertBase={"display_data_priority": KINDS})
    exporter = HTMLExporter(config=config, template_name="basic", **options)
    exporter.register_filter("markdown2html", markdown)
    return exporter


@pass_context
def markdown(context: Context, source: str) -> str:
    """Markdown as HTML, cleaned, for templates of nbconvert, which give the context."""
    renderer = _Renderer(escape=False, attachments=context.get("cell", {}).get("attachments", {}))
    return clean(MarkdownWithMath(renderer=renderer).render(source))


class _Renderer(IPythonRenderer):
    """Markdown with formulas as MathML: MathJax is a script, and comes from the network."""

    def inline_math(self, body):
        return _formula(body, "inline")

    def block_math(self, body):
        return _formula(body, "block")

    def latex_environment(self, name, body):
        return _formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


def _formula(tex, display):
    """TeX as MathML, or as it is written where latex2mathml does not understand it."""
    known = tex.strip()
    for pattern, word in SYNONYMS:
        known = re.sub(pattern, word, known)
    if display == "block":
        known = re.sub(r"\\(min|max|sup|inf|lim)\s*_", r"\\\1\\limits_", known)
    try:
        made = convert(known, display=display)
    except Exception:  # it has a dozen exceptions of its own, and IndexErrors
        made = "\\"
    for wrong, right in REPAIRS:
        made = made.replace(wrong, right)
    return f"<code>{html.escape(tex.strip())}</code>" if re.search(r"\\|<m.>&(?:amp;)?</m", made) else made


def _about(notebook):
    """The title of a notebook and the first sentence below it."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    prose = [c.source for c in cells if "papermill-error-cell-tag" not in c.metadata.get("tags", [])]
    parts = re.split(r"^# +(.+)$", "\n\n".join(prose), maxsplit=1, flags=re.M)
    title, below = parts[1:] or ("Notebook", "")
    first = re.search(r"^(?:\*\*|[^\s#|!<$*>-]).*?(?:[.!?](?=\s)|(?=\n\s*\n)|\Z)", below, re.M | re.S)
    return title.strip(), first[0] if first else ""


def _changes(notebook):
    """What was changed against the profile, as HTML, or nothing."""
    meta = notebook.metadata.get("faceadv", {})
    values = ", ".join(f"{name} = {value}" for name, value in meta.get("changed", {}).items())
    return html.escape(f"Not profile {meta.get('profile')} as it is: {values}.") if values else ""


def _entry(notebook, link):
    """Cells of the index page about a notebook: title, first sentence, status, main table and main figure."""
    meta, (title, sentence) = notebook.metadata.get("faceadv", {}), _about(notebook)
    status = meta.get("status", "unknown")
    words = f"{status} · {meta.get('seconds', 0):.0f} s · {meta.get('peak_mib', 0)} MiB at most"
    if meta.get("error"):
        words += f" · cell [{meta['cell']}]: {meta['error']}" if meta.get("cell") else f" · {meta['error']}"
    state, found = f'<p class="{"status" if status == "finished" else "failed"}">{html.escape(words)}</p>', []
    wanted = {
        "main-table": lambda data: "<table" in data.get("text/html", ""),
        "main-figure": lambda data: data.keys() & PICTURES,
    }
    for tag, fits in wanted.items():
        cells = sorted(notebook.cells, key=lambda cell: tag not in cell.metadata.get("tags", []))
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        found += [output for output in outputs if fits(output.get("data", {}))][:1]
    told = f"{_changes(notebook)}\n\n"
    text = nbformat.v4.new_markdown_cell(f"## [{title}](<{link}>)\n\n{told}{sentence}\n\n{state}")
    return [text, nbformat.v4.new_code_cell(outputs=found, metadata={"alt": "Main figure"})]

"""The package's shape: which room may import which, no circles, and what every module must have."""

import ast
import importlib
import inspect
import io
import pkgutil
import tokenize
from pathlib import Path

import pytest

import faceadv

PACKAGE = Path(faceadv.__file__).parent
ARROWS = {
    **{
        "errors": set(),
        "precision": {"errors", "store"},
        "store": {"store", "errors"},
        "images": {"errors"},
        "metrics": {"errors", "images"},
    },
    **{"plots": {"images"}, "parallel": {"errors", "store"}},
}
BASE = set(ARROWS)
MIDDLE = BASE | {"networks", "faces", "align", "pairs"}
SCIENCE = MIDDLE | {
    *("adaptive", "attacks", "classic", "classifiers", "cloaks", "ddnm", "deidentify", "measures", "objectives"),
    *("purifiers", "recognisers", "records", "smooth", "trackers", "transfer", "verification"),
}
MAY_IMPORT = {
    **ARROWS,
    **dict.fromkeys(MIDDLE - BASE, MIDDLE),
    **dict.fromkeys(SCIENCE - MIDDLE, SCIENCE),
    "training": SCIENCE | {"training"},
    "benchmark": SCIENCE | {"benchmark"},
    # it runs notebooks, and knows nothing of what is in them
    "course": {"course", "errors", "store", "precision", "plots", "records", "parallel"},
    "cli": SCIENCE | {"training", "benchmark", "course", "cli"},
    "__main__": {"cli"},
}


def modules():
    """Each module by its dotted name below the package, with the modules of the package that it imports."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name == "__init__":
            continue
        imports = set()
        for node in ast.walk(ast.parse(path.read_text())):
            assert not getattr(node, "level", 0), "imports name the whole way"
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "faceadv":
                inside = node.module.partition(".")[2]
                for alias in node.names:
                    whole = f"{inside}.{alias.name}".strip(".")
                    imports.add(whole if is_module(whole) else inside)
            elif isinstance(node, ast.Import):
                imports |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("faceadv.")}
        found[name] = imports - {""}
    return found


def is_module(name):
    path = PACKAGE.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


def room(name):
    return name.split(".")[0]


def test_imports_run_one_way():
    wrong = [
        f"{name} imports {other}"
        for name, others in modules().items()
        for other in others
        if room(other) not in MAY_IMPORT[room(name)]
    ]
    assert wrong == []


def test_no_circles():
    arrows, done = modules(), set()

    def walk(name, way):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in arrows.get(name, ()):
                walk(other, [*way, name])
            done.add(name)

    for name in arrows:
        walk(name, [])


@pytest.mark.parametrize("name", [m.name for m in pkgutil.walk_packages(faceadv.__path__, "faceadv.") if not m.ispkg])
def test_every_module_names_what_is_public_and_every_public_function_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for public in module.__all__:
        thing = getattr(module, public)
        if getattr(thing, "__module__", None) == name:
            assert thing.__doc__, public


def public_functions():
    """Each public function and method of the package, by a name for messages."""
    for info in pkgutil.walk_packages(faceadv.__path__, "faceadv."):
        module = importlib.import_module(info.name)
        for public in getattr(module, "__all__", ()):
            thing = getattr(module, public)
            if getattr(thing, "__module__", None) != info.name:
                continue
            for name, part in vars(thing).items() if inspect.isclass(thing) else [(public, thing)]:
                if inspect.isfunction(part) and part.__module__ == info.name and not name.startswith("_"):
                    yield f"{info.name}.{part.__qualname__}", part


def test_public_functions_tell_what_they_take_and_give():
    bare = []
    for name, function in public_functions():
        taken = inspect.signature(function).parameters.values()
        plain = [p for p in taken if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        said = function.__doc__ or ""
        if not {p.name for p in plain} | {"return"} <= function.__annotations__.keys():
            bare.append(f"{name} lacks a type hint")
        if len(plain) > 2 and "Parameters\n" not in said:
            bare.append(f"{name} does not list its parameters")
        if stale := listed(said) - {p.name for p in taken}:
            bare.append(f"{name} lists what it does not take: {sorted(stale)}")
    assert not bare, "\n".join(bare)


def listed(said):
    """The parameters that a docstring's section explains."""
    section = inspect.cleandoc(said).partition("Parameters\n")[2].partition("\n\n")[0]
    lines = [line for line in section.splitlines()[1:] if " : " in line and not line.startswith(" ")]
    return {name.strip(" *") for line in lines for name in line.partition(" : ")[0].split(",")}


def test_texts_are_read_and_written_in_utf_8():
    """Windows has another encoding by default."""
    bare = []
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "docs").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                given = {keyword.arg for keyword in node.keywords}
                bare += [] if "encoding" in given else [f"{path.name}, line {node.lineno}"]
    assert bare == []


def test_functions_are_short():
    long, many = [], []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = [a.arg for a in taken if a.arg != "self"]
                if node.end_lineno - node.lineno >= 60:
                    long.append(f"{path.stem}.{node.name}: {node.end_lineno - node.lineno + 1} lines")
                if len(names) > 8:
                    many.append(f"{path.stem}.{node.name}: {len(names)} parameters")
    assert long == []
    assert many == []


def test_the_package_stays_small():
    """Lines of code: neither blank nor a comment nor a part of a docstring."""
    count, no_code = 0, (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for path in PACKAGE.rglob("*.py"):
        source, lines = path.read_text(), set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type not in no_code and token.string:
                lines |= set(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
                lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        count += len(lines)
    assert count < 6550

"""Within the kernel that grades a submission: runs the teacher's cells as they are, and proves that it did.

A student's code shares the interpreter with the tests. What it replaces there is found by comparison with what was
there before; whoever looks for the key in the memory of the interpreter will find it.
"""

import ast
import builtins
import contextlib
import gc
import hmac
import inspect
import linecache
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import CodeType

from IPython import get_ipython
from IPython.core.inputtransformer2 import TransformerManager

__all__ = ["KEY", "begin", "proof", "runner", "without"]

KEY = Path(".key")
# what tests rest on
MODULES = ("builtins", "math", "operator", "numpy", "numpy.linalg", "numpy.testing", "torch", "torch.linalg")
MODULES += ("torch.nn.functional", "torch.testing", "torch.testing._comparison")
OTHERS = {"builtins.input", "torch.manual_seed"}  # which ipykernel and torch._dynamo replace
LIES = {"__eq__", "__torch_function__", "__array_function__", "__array_ufunc__"}


def proof(key: bytes, source: str) -> str:
    """What a cell prints when it was run to its end as it is."""
    return hmac.new(key, source.encode(), "sha256").hexdigest()


def begin() -> None:
    """Before the first cell: take the key from its file, and put ``run`` into this module."""
    globals()["run"] = runner(get_ipython().user_ns, KEY.read_bytes())
    KEY.unlink()


def runner(space: dict, key: bytes) -> Callable[[str], object]:
    """A function that runs a cell of the teacher in a namespace, prints its ``proof``, and returns its last value.

    It raises ``RuntimeError`` if anything that tests rest on was replaced, or what an earlier such cell has imported.
    """
    before, given = _state(), {name: thing for name, thing in vars(builtins).items() if name not in {"_", *space}}
    execute, evaluate, compiled, show, translate = exec, eval, compile, print, TransformerManager().transform_cell

    def run(source):
        name, old, tree = "<test>", dict(space), ast.parse(translate(source))
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # for tracebacks
        _honest(before, given, space)
        last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        execute(compiled(tree, name, "exec"), space)
        value = evaluate(compiled(last, name, "eval"), space) if last else None
        _honest(before, {}, space)
        given.update({name: thing for name, thing in space.items() if old.get(name) is not thing and _fixed(thing)})
        show("\n" + proof(key, source))
        return value

    return run


def _state():
    """Every attribute of what tests rest on, by its name."""
    modules = [import_module(name) for name in MODULES]
    classes = [thing for thing in vars(modules[-1]).values() if inspect.isclass(thing)]
    holders = [*modules, *classes, sys.modules["torch"].Tensor]
    return {f"{one.__name__}.{name}": inspect.getattr_static(one, name, None) for one in holders for name in dir(one)}


def _honest(before, given, space):
    now = _state()
    found = [name for name in before.keys() - OTHERS if callable(before[name]) and now.get(name) is not before[name]]
    changed = {name: space[name] for name, old in given.items() if space.get(name, old) is not old}
    found += [name for name, new in changed.items() if callable(new) or inspect.ismodule(given[name])]
    if found:
        raise RuntimeError(f"This notebook replaces {', '.join(found[:3])}, so its tests do not count.")
    for thing in gc.get_objects():
        if issubclass(type(thing), type) and thing.__module__ == "__main__" and LIES & vars(thing).keys():
            raise RuntimeError(f"{thing.__name__} of this notebook says itself what it is equal to: no test counts.")


def _fixed(thing):
    """Whether it is a module, or a function or class that was defined in none of the notebook's functions."""
    return inspect.ismodule(thing) or "." not in getattr(thing, "__qualname__", ".")


@contextlib.contextmanager
def without(*functions: Callable) -> Iterator[None]:
    """A context in which a call of one of these functions is an ``AssertionError``, under whatever name it is called.

    For tests of answers that shall not be one call of what is asked for. A copy of the function's text is not noticed.
    """
    codes, called = {}, []
    for function in functions:
        parts = [function.__code__]
        for part in parts:  # and the functions that it makes
            codes[part] = function.__qualname__
            parts += [inner for inner in part.co_consts if isinstance(inner, CodeType)]

    def watch(frame, event, _):
        if event == "call" and frame.f_code in codes:
            called.append(codes[frame.f_code])

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(before)
    if called:
        raise AssertionError(f"This answer calls faceadv's own {called[0]}: write it yourself.")

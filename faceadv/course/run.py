"""Run the notebooks with papermill: checked parameters, kept copies, nothing done twice."""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import psutil
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import DeadKernelError

from faceadv import parallel, precision, records
from faceadv.course import notebook as notebooks
from faceadv.course import page, profiles
from faceadv.errors import Invalid, Missing, sentence, whole
from faceadv.store import cache, datasets, progress, threads, weights
from faceadv.store.paths import PROJECT, alone, meant, nearest, replacing, settle
from faceadv.store.tables import csv_safe

__all__ = ["KERNEL_ENVIRONMENT", "RESULTS", "Result", "folder", "kernel", "run", "select", "summary", "sweep", "update"]

PACKAGE = Path(__file__).parents[1]
RESULTS = PROJECT / "results"
PROCESSES = 500  # of a kernel, at a time: whoever starts more is a fork bomb
# these are read with the outputs of profile lfw, all others with those of orl
ON_LFW = ("00_faces_and_recognisers", "01_attacks", "02_deidentification")
KERNEL_ENVIRONMENT = {
    **threads.ENVIRONMENT,
    "PYTHONHASHSEED": "0",
    "FACEADV_QUIET": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # the caller's Agg would show nothing
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
Names = str | Sequence[str]  # one or several of 00, 00_faces, all


@dataclasses.dataclass
class Result:
    """What became of one notebook: ``status`` is ran, reused or failed; ``path`` is its executed copy."""

    name: str
    status: str
    seconds: float
    peak_mib: int
    path: Path
    cell: int | None = None
    error: str = ""


def select(names: Names) -> list[Path]:
    """The notebooks meant by ``00``, ``0``, ``00_faces`` or ``all``. Raises ``Invalid`` for an unknown one."""
    paths = sorted(profiles.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    chosen = set()
    for name in [names] if isinstance(names, str) else names:
        found = [path for path in paths if name == "all" or profiles.meets(name, path.stem)]
        if not found:
            stems = [path.stem for path in paths]
            raise Invalid(f'There is no notebook "{name}"{nearest(name, stems)}; there are {", ".join(stems)}, all.')
        chosen.update(found)
    return [path for path in paths if path in chosen]


def run(
    names: Names,
    profile: str = "orl",
    overrides: dict | None = None,
    out: str | Path = "build",
    fresh: bool = False,
    jobs: int = 1,
) -> list[Result]:
    """Run notebooks and keep the executed copies as OUT/PROFILE/NAME.ipynb; OUT/index.html shows them.

    A run with overrides has a folder of its own in OUT, ``folder``; page and record say what was changed. All names,
    parameters and folders of photos are checked before the first notebook runs. A notebook that fails is in the
    results.

    Parameters
    ----------
    names : one or several of 00, 0, 00_faces, all
    profile : the named set of parameters, or a file of them
    overrides : other parameters, name to value; a relative folder is meant from the current one
    out : the folder to write into
    fresh : run also what finished before and depends on nothing that has changed since; otherwise its copy is kept
    jobs : how many notebooks run at a time, each with its share of the cores

    Raises
    ------
    Invalid : for unknown names, and for wrong parameters
    Missing : if a folder of photos is not there, or LFW
    Failed : if ``out`` cannot be written, or if another run is writing into it
    """
    out, label, todo, results, jobs = folder(out, overrides), profiles.label(profile), [], [], whole("jobs", jobs, 1)
    for path in select(names):
        values, known = profiles.parameters(profile, path, overrides), profiles.declared(path)
        _there(values)
        given = {"profile": label, "results_dir": str(out / "results")}
        todo.append((path, {name: value for name, value in given.items() if name in known} | values))
    if any("\ud800" <= letter <= "\udfff" for letter in str(out)):  # notebooks are Unicode, and tell where they are
        raise Invalid(f"The name of {str(out).encode(errors='backslashreplace').decode()} is no Unicode: name another.")
    with alone(out / ".run.lock"):
        talks, count = progress.log.isEnabledFor(logging.INFO), itertools.count(1)
        options = {"copies": out / label, "here": _surroundings(), "changed": overrides or {}, "fresh": fresh}
        options["bars"] = talks and jobs == 1 and sys.stderr.isatty()
        where = ("local", jobs) if jobs > 1 else ("single", None)
        for _, result in parallel.compute(_one, todo, *where, **options):
            results.append(result)
            if talks:
                words = f"{result.status} in {result.seconds:.0f} s" + (f", {result.error}" if result.error else "")
                words = "nothing changed, executed copy reused" if result.status == "reused" else words
                print(f"{next(count)}/{len(todo)} {result.name}: {words}", file=sys.stderr)
        results.sort(key=lambda result: result.name)
        with _or_failed(results, "index.html", out / "index.html"):
            page.write_index(out, label)
    return results


def folder(out: str | Path, overrides: dict | None) -> Path:
    """Where in ``out`` a run keeps all that it makes: a folder named after the overrides, or ``out`` without any."""
    words = "_".join(f"{name}={value}" for name, value in (overrides or {}).items())
    safe = re.sub(r"[^\w.,=+\[\] -]", "-", words)[:100].strip()  # a value may be a path, or as long as it likes
    return Path(out).resolve() / (safe if safe == words else f"{safe}-{cache.key(words)[:6]}")


def _there(values):
    """Raise ``Missing`` unless the photos that the parameters name are there."""
    for name, value in values.items():
        if name.endswith(profiles.FACES) and value:
            datasets.lfw_folder() if value == "lfw" else datasets.photos(value)


def _one(job, copies, here, changed, fresh, bars):
    """Run one notebook, or find that its copy in the folder ``copies`` is as it would be."""
    (path, values), results = job, []
    copy, key, out = copies / path.name, _key(path, values, here), copies.parent
    old = None if fresh else _finished(copy, key, out)
    if old:
        return Result(path.stem, "reused", old["seconds"], old["peak_mib"], copy)
    bar = {"desc": path.stem, "leave": False, "disable": not bars}
    with _or_failed(results, path.stem, copy):
        results.append(_run_one(path, values, copy, key, changed, bar))
    return results[0]


@contextlib.contextmanager
def _or_failed(results, name, path):
    """A context whose error of the disk, a full one, say, becomes a failed result: those before it are not lost."""
    try:
        yield
    except OSError as e:
        results.append(Result(name, "failed", 0.0, 0, path, error=sentence(e, path)))


def sweep(
    names: Names,
    profile: str = "orl",
    overrides: dict | None = None,
    out: str | Path = "build",
    scheduler: str = "single",
    workers: int | None = None,
    fresh: bool = False,
) -> tuple[pd.DataFrame, list[Result]]:
    """``run`` for every combination of listed values: ``{"eps_255": [1, 2, 4]}`` makes three runs.

    If one parameter varies and is a number,
    OUT/sweep.png shows the first numbers that have intervals.

    Parameters
    ----------
    names, profile, overrides, out, fresh : as for ``run``, with its errors
    scheduler, workers : as for ``parallel.compute``; workers on another disk send only the records back

    Returns
    -------
    table : all numbers of all records (``records.collect``), also written to OUT/sweep.csv
    results : of all runs, each named with its folder
    """
    out, paths = Path(out).resolve(), select(names)
    points = profiles.spread(paths, overrides)
    for path in paths:
        for values in points:
            checked = profiles.parameters(profile, path, values)
            if scheduler in ("single", "local"):  # elsewhere, the photos are the other machines'
                _there(checked)
    folders = {folder(out, values).relative_to(out).as_posix(): values for values in points}
    profile = profile if profiles.label(profile) == profile else str(meant(profile))
    arguments = {"names": [path.stem for path in paths], "profile": profile, "points": folders, "out": str(out)}
    results, places = [], {}
    with alone(out / ".sweep.lock"):
        for point, (found, texts) in parallel.compute(_point, folders, scheduler, workers, **arguments, fresh=fresh):
            results += [dataclasses.replace(result, name=f"{point} {result.name}") for result in found]
            for stem, text in texts.items():
                place = records.place(out / point / "results", profiles.label(profile), stem)
                with replacing(place) as part:  # the worker's file may be on another machine
                    part.write_text(text, encoding="utf-8")
                places.setdefault(point, []).append(place)
        table = records.collect([(folders[point], place) for point in folders for place in places.get(point, [])])
        with _or_failed(results, "sweep.csv", out / "sweep.csv"):
            with replacing(out / "sweep.csv") as part:
                _safe(table).to_csv(part, index=False)
            _draw(table, points, out / "sweep.png")
    return table, results


def _point(point, names, profile, points, out, fresh):
    """One run of a sweep: its results, and the records as texts."""
    results = run(names, profile, points[point], out, fresh)
    fine = [result.name for result in results if result.status != "failed"]
    made = Path(out) / point / "results"
    places = {name: records.place(made, profiles.label(profile), name) for name in fine}
    return results, {name: place.read_text(encoding="utf-8") for name, place in places.items() if place.exists()}


def _safe(table):
    """The table for a spreadsheet program. A number from the command line is a text, and -1 shall stay a number."""
    table = table.rename(columns=csv_safe)
    for name in table:
        with contextlib.suppress(ValueError, TypeError):
            table[name] = pd.to_numeric(table[name])
    return table.map(csv_safe)


def _draw(table, points, path):
    """A figure of the first numbers of one unit that have intervals, if exactly one parameter varies, a number."""
    varied = [name for name in points[0] if len({str(values[name]) for values in points}) > 1]
    shown = table if table.empty else table.dropna(subset=["low", "high"])
    # what came from the command line is a text
    if len(varied) == 1 and len(shown) and pd.to_numeric(table[varied[0]], errors="coerce").notna().all():
        from faceadv import plots  # takes a second

        names = shown[shown["unit"] == shown["unit"].iloc[0]]["name"].unique()[: len(plots.MARKERS)]
        with replacing(path) as part:
            plots.sweep(table, varied[0], list(names)).savefig(part, format="png")


def summary(results: Sequence[Result]) -> str:
    """A table of what became of the notebooks, and one line about each that failed."""
    kept = {"notebook": "name", "status": "status", "seconds": "seconds", "peak MiB": "peak_mib"}
    rows = [{title: getattr(result, name) for title, name in kept.items()} for result in results]
    failed = [result for result in results if result.status == "failed"]
    told = [f"{result.name}: {f'cell [{result.cell}]: ' if result.cell else ''}{result.error}" for result in failed]
    return "\n".join([pd.DataFrame(rows).to_string(index=False), *told])


def _key(path, values, here):
    """What an executed copy depends on, as one hash: its cells, its parameters, photos that they name, and ``here``."""
    photos = []
    for value in values.values():
        if isinstance(value, str) and value and (path.parent / value).is_dir():  # as the notebook will look for it
            with contextlib.suppress(Missing):  # a folder of something else
                photos.append(datasets.fingerprint(path.parent / value))
    return cache.key([[cell.cell_type, cell.source] for cell in notebooks.read(path).cells], values, photos, here)


def _surroundings():
    """What every copy depends on, as one hash: code, weights and data by their content, the device, and libraries."""
    files = sorted(path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    package, data, device = [[str(path.relative_to(PACKAGE)), path] for path in files], {}, precision.device()
    for name in ("orl", "lfw"):
        with contextlib.suppress(Missing):
            data[name] = datasets.fingerprint(name)
    versions, half = cache.versions(), precision.has_bfloat16(device)
    return cache.key(package, weights.fetched(), data, datasets.lfw_lists(), str(device), half, versions)


def _note(copy):
    """Where it is written that a copy finished: its key, and the SHA-256 of the copy and of its record."""
    return copy.with_name(f".{copy.stem}.json")


def _finished(copy, key, out):
    """The note about a copy that finished under this key, if it and its record are as they were written, or None."""
    note = cache.read_json(_note(copy))
    if not note or note["key"] != key:
        return None
    for name, digest in note["files"].items():
        if not (out / name).is_file() or cache.sha256(out / name) != digest:
            progress.log.warning("%s is not as it was written: %s runs again.", name, copy.stem)
            return None
    return note


def _run_one(path, values, copy, key, changed, bar):
    """Run a notebook and keep its copy; if it finished, also the note by which ``_finished`` knows it."""
    out = copy.parents[1]
    source, started = notebooks.read(path), time.perf_counter()
    for cell in source.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # on disk before the first cell, so that a run that is killed does not look finished
    source.metadata["faceadv"] = {"profile": copy.parent.name, "status": "interrupted", "changed": changed}
    cache.write_json(_note(copy), None)  # a folder in its place is removed, too
    _save(source, copy)
    with kernel() as (manager, peak):
        number, error = _execute(copy, values, path.parent, manager, bar)
    try:
        executed = notebooks.read(copy)
    except Invalid:  # it failed in the middle of papermill's own writing
        executed = source
    skipped = [c for c in executed.cells if c.cell_type == "code" and c.source and not c.execution_count]
    for cell in skipped:  # papermill calls them completed
        cell.metadata.get("papermill", {})["status"] = "pending"
    if skipped and not error:
        error = "it stopped before its last cell (sys.exit?)"
    facts = {"seconds": round(time.perf_counter() - started, 1), "peak_mib": round(peak[0] / 2**20)}
    status = {"status": "failed" if error else "finished", "cell": number, "error": error}
    executed.metadata["faceadv"] = source.metadata["faceadv"] | status | facts
    _save(executed, copy)
    if not error:
        place = values.get("results_dir", out / "results"), values.get("profile", copy.parent.name)
        record = records.place(*place, copy.stem)
        if changed and record.exists():
            content = json.loads(record.read_text(encoding="utf-8")) | {"changed": changed}
            with replacing(record) as part:
                part.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        files = [copy, record]
        digests = {Path(os.path.relpath(file, out)).as_posix(): cache.sha256(file) for file in files if file.exists()}
        cache.write_json(_note(copy), {"key": key, "files": digests, **facts})
    return Result(path.stem, "failed" if error else "ran", path=copy, cell=number, error=error, **facts)


def _execute(copy, values, folder, manager, bar):
    """Run a copy where it is. Returns the number of the cell that failed, if one did, and the error or ""."""
    place = re.sub(r"[{}]", r"\g<0>\g<0>", str(copy))  # papermill formats paths
    kernel = {"kernel_name": "python3", "kernel_manager_class": manager, "cwd": str(folder)}
    try:
        for left in reversed(range(3)):
            try:
                papermill.execute_notebook(place, place, values, progress_bar=bar, record_timing=False, **kernel)
                break
            except RuntimeError as e:  # jupyter_client: before the first cell
                if not (left and re.match("Kernel (didn't respond|died before replying)", str(e))):
                    raise  # otherwise another program took a port that was free a moment ago: nothing has run yet
    except papermill.PapermillExecutionError as e:
        return e.exec_count, _one_line(f"{e.ename}: {e.evalue}")
    except KeyboardInterrupt:
        # nbclient leaves its task behind, and asyncio would print a traceback for it
        ensure_event_loop().set_exception_handler(lambda loop, context: None)
        raise
    except DeadKernelError:
        return None, "the kernel died (out of memory?)"
    except Exception as e:  # no kernel, a full disk, …: this notebook failed, the next may not
        return None, _one_line(f"{type(e).__name__}: {sentence(e, copy) if isinstance(e, OSError) else e}")
    return None, ""


def _save(notebook, path):
    with replacing(path) as part:
        nbformat.write(notebook, part)


def _one_line(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()[0][:300]


@contextlib.contextmanager
def kernel(
    prefix: Sequence[str] = (), memory: float = math.inf, seconds: float = math.inf
) -> Iterator[tuple[type[AsyncKernelManager], list[int]]]:
    """Yield a class of kernel managers that starts this interpreter, and a list with peak memory in bytes.

    The memory of the kernel and its children is sampled meanwhile. At the end none of them is left. More than
    ``PROCESSES`` of them at a time are killed at once.

    Parameters
    ----------
    prefix : a command that is to run the kernel
    memory, seconds : bytes of the kernel and its children, and time, after which they are killed
    """
    settle()
    end = time.monotonic() + seconds
    managers, peak, family, stop = [], [0], set(), threading.Event()
    path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [*prefix, sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    command.append("--log-level=50")  # the kernel's own log; what cells print and raise is in their outputs

    class Manager(AsyncKernelManager):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            managers.append(self)

        @property
        def kernel_spec(self):  # a kernel that the user installed as "python3" may be another interpreter
            env = {**KERNEL_ENVIRONMENT, "PYTHONPATH": path}
            return KernelSpec(argv=command, env=env, display_name="Python 3", language="python")

    def sample():
        while not stop.wait(0.1):
            used, alive = 0, 0
            for pid in filter(None, [getattr(manager.provisioner, "pid", None) for manager in managers]):
                with contextlib.suppress(psutil.Error):  # one of them has just ended
                    tree = [kernel := psutil.Process(pid), *kernel.children(recursive=True)]
                    family.update(tree)  # before any of them has ended
                    alive += len(tree)
                    for process in tree:
                        with contextlib.suppress(psutil.Error):
                            used += process.memory_info().rss
            peak[0] = max(peak[0], used)
            if used > memory or alive > PROCESSES or time.monotonic() > end:
                _end(family)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield Manager, peak
    finally:
        stop.set()
        thread.join()
        _end(family)
        psutil.wait_procs(family, timeout=5)


def _end(family):
    """Kill processes and their children. All stand still first: a child whose parent has ended would not be found."""
    new = set(family)
    while new:
        family.update(new)
        found = set()
        for process in new:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        for process in new:
            with contextlib.suppress(psutil.Error):
                found.update(process.children())
        new = found - family
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()  # psutil makes sure that the id is still the same process


def update(names: Names, profile: str = "orl", out: str | Path = "build", fresh: bool = False) -> list[Result]:
    """Run notebooks; records go into results/, outputs into the committed notebooks that are read in this profile.

    Sources stay as they are.

    Parameters
    ----------
    names, out, fresh : as for ``run``, with its errors
    profile : "orl" or "lfw"

    Raises
    ------
    Invalid : if an output names a folder of this machine; nothing is written then
    """
    out = Path(out).resolve()
    results = run(names, profile, out=out, fresh=fresh)
    done = [result for result in results if result.status != "failed"]
    shown = [result for result in done if (result.name in ON_LFW) == (profile == "lfw")]
    ready = [_with_outputs(result.path, out) for result in shown]
    for result, notebook in zip(shown, ready):
        _save(notebook, profiles.NOTEBOOKS / result.path.name)
    for result in done:
        record = records.place(out / "results", profile, result.name)
        if record.exists():
            with replacing(records.place(RESULTS, profile, result.name)) as part:
                part.write_bytes(record.read_bytes())
    return results


def _with_outputs(executed, out):
    """An executed copy as it is committed: the cells of its source with their outputs, and nothing of this machine."""
    notebook, count = notebooks.read(executed), 0
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for cell, own in zip(notebook.cells, notebooks.read(profiles.NOTEBOOKS / executed.name).cells, strict=True):
        cell.metadata = own.metadata  # papermill adds empty tags
        for key in ("execution", "papermill"):
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            count += bool(cell.source)
            cell.execution_count = count if cell.source else None
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = cell.execution_count
                if "image/png" in output.get("data", {}):  # without a kernel the still figure is better
                    output.data.pop("application/vnd.jupyter.widget-view+json", None)
    meta = notebook.metadata["faceadv"] | {"source_sha256": notebooks.source_sha256(notebook)}
    notebook.metadata["faceadv"] = {key: meta[key] for key in ("profile", "source_sha256", "seconds", "peak_mib")}
    notebook.metadata["language_info"] = {"name": "python"}  # the rest is this machine's Python
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    local = (PROJECT, Path(os.path.expanduser("~")), out, Path(sys.prefix))
    patterns = [re.escape(str(folder)) + r"(?![\w-])" for folder in local if len(folder.parts) > 1]
    patterns.append(re.escape(str(Path(tempfile.gettempdir(), "ipykernel_"))))  # where warnings say that a cell is
    for cell in notebook.cells:
        text = json.dumps(cell.get("outputs", []), ensure_ascii=False).replace(r"\\", "\\")
        if found := re.search("|".join(patterns), text):
            what = f"cell [{cell.execution_count}] prints {found[0]}"
            raise Invalid(f"{executed.name} was not updated: {what}, a folder of this machine.")
    return notebook

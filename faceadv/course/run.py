"""Run the notebooks with papermill: checked parameters, kept copies, nothing done twice."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import papermill
import psutil
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import DeadKernelError

from faceadv import parallel, records
from faceadv.course import notebook as notebooks
from faceadv.course import page, profiles
from faceadv.errors import Invalid
from faceadv.store.paths import PROJECT, nearest, replacing

PACKAGE = Path(__file__).parents[1]
RESULTS = PROJECT / "results"
KERNEL_ENVIRONMENT = {
    # glibc gives freed memory back at once and page-faults on the next tensor: up to three times slower
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2147483647",
    "PYTHONHASHSEED": "0",
    "FACEADV_QUIET": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # the caller's Agg would show nothing
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}


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


def select(names):
    """The notebooks meant by ``00``, ``00_faces`` or ``all``. Raises ``ValueError`` for an unknown one."""
    paths = sorted(profiles.NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    chosen = set()
    for name in names:
        found = [path for path in paths if name in ("all", path.stem, path.stem[:2], path.name)]
        if not found:
            stems = [path.stem for path in paths]
            raise Invalid(f'There is no notebook "{name}"{nearest(name, stems)}; there are {", ".join(stems)}, all.')
        chosen.update(found)
    return [path for path in paths if path in chosen]


def run(names, profile="orl", overrides=None, out="build", fresh=False, quiet=False):
    """Run notebooks and keep the executed copies as OUT/PROFILE/NAME.ipynb; OUT/index.html shows them.

    A copy that finished is used again if nothing it depends on has changed, unless ``fresh``. All names and
    parameters are checked before the first notebook runs (``ValueError``); one that fails is in the results.
    """
    out = Path(out).resolve()
    jobs = []
    for path in select([names] if isinstance(names, str) else names):
        values = profiles.parameters(profile, path, overrides)
        known = profiles.declared(path)
        defaults = {"profile": profile, "results_dir": str(out / "results")}
        jobs.append((path, {name: value for name, value in defaults.items() if name in known} | values))
    results = []
    for number, (path, values) in enumerate(jobs, 1):
        copy, key = out / profile / path.name, _key(path, values)
        label = f"{number}/{len(jobs)} {path.stem}"
        old = None if fresh else _finished(copy, key, out)
        if old:
            result = Result(path.stem, "reused", old["seconds"], old["peak_mib"], copy)
        else:
            result = _run_one(path, values, copy, {"key": key, "profile": profile}, label, quiet, out)
        results.append(result)
        if not quiet:
            print(f"{label}: {_status(result)}", file=sys.stderr)
    page.write_index(out, profile)
    return results


def sweep(names, profile="orl", overrides=None, out="build", scheduler="single", workers=None, **options):
    """``run`` for every combination of listed values: ``{"eps_255": [1, 2, 4]}`` makes three runs.

    Each has a folder of its own in ``out``, called after its values. Returns ``(table, results)``: all numbers of all
    records (``records.collect``), also written to OUT/sweep.csv, and the results of all runs, named with their folders.
    If one parameter varies and is a number, OUT/sweep.png shows the first numbers that have intervals. scheduler,
    workers: as for ``parallel.compute``; its workers need not share a disk, only records come back then. Errors as in
    ``run``, before anything runs.
    """
    out, paths = Path(out).resolve(), select([names] if isinstance(names, str) else names)
    points = profiles.spread(paths, overrides)
    for path in paths:
        for values in points:
            profiles.parameters(profile, path, values)
    folders = {"_".join(f"{name}={value}" for name, value in values.items()) or ".": values for values in points}
    arguments = {"names": [path.stem for path in paths], "profile": profile, "points": folders, "out": str(out)}
    results, entries = [], []
    for folder, (found, texts) in parallel.compute(_point, folders, scheduler, workers, **arguments, **options):
        results += [dataclasses.replace(result, name=f"{folder} {result.name}") for result in found]
        for stem, text in texts.items():
            place = records.place(out / folder / "results", profile, stem)
            with replacing(place) as part:  # a worker's may be on another machine
                part.write_text(text, encoding="utf-8")
            entries.append((list(folders).index(folder), folders[folder], place))
    table = records.collect([(values, place) for _, values, place in sorted(entries, key=lambda entry: entry[0])])
    with replacing(out / "sweep.csv") as part:
        table.to_csv(part, index=False)
    _draw(table, points, out / "sweep.png")
    return table, results


def _draw(table, points, path):
    """A figure of the first numbers of one unit that have intervals, if exactly one parameter varies, a number."""
    varied = [name for name in points[0] if len({str(values[name]) for values in points}) > 1]
    try:
        _ = [float(values[varied[0]]) for values in points]  # from the command line they are texts
    except (ValueError, TypeError, IndexError):
        return
    if len(varied) > 1:
        return
    shown = table.dropna(subset=["low", "high"])
    names = list(dict.fromkeys(shown[shown["unit"] == shown["unit"].iloc[0]]["name"])) if len(shown) else []
    if names:
        from faceadv import plots  # takes a second

        with replacing(path) as part:
            plots.sweep(table, varied[0], names[: len(plots.MARKERS)]).savefig(part, format="png")


def _point(folder, names, profile, points, out, **options):
    """One run of a sweep: its results, and the records as texts."""
    results = run(names, profile, points[folder], Path(out) / folder, **options)
    fine = [result.name for result in results if result.status != "failed"]
    places = {name: records.place(Path(out) / folder / "results", profile, name) for name in fine}
    return results, {name: place.read_text(encoding="utf-8") for name, place in places.items() if place.exists()}


def _status(result):
    if result.status == "reused":
        return "nothing changed, executed copy reused"
    return f"{result.status} in {result.seconds:.0f} s" + (f", {result.error}" if result.error else "")


def summary(results):
    """A table of what became of the notebooks, and a line on each that failed."""
    width = max([8, *(len(result.name) for result in results)])
    lines = [f"{'notebook':{width}}  status  {'time':>8}  peak memory"]
    for result in results:
        memory = f"{result.peak_mib} MiB"
        lines.append(f"{result.name:{width}}  {result.status:6}  {result.seconds:6.1f} s  {memory:>11}")
    for result in results:
        if result.status == "failed":
            cell = f"cell [{result.cell}]: " if result.cell else ""
            lines.append(f"{result.name}: {cell}{result.error}")
    return "\n".join(lines)


def _key(path, values):
    """What an executed copy depends on, as one hash."""
    cells = [[cell.cell_type, cell.source] for cell in notebooks.read(path).cells]
    versions = [importlib.metadata.version(name) for name in ("torch", "numpy")]
    parts = [cells, values, _package(), versions, os.environ.get("FACEADV_DATA")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _package():
    """The package's sources, hashed, and its weights, by name and size."""
    files = sorted(file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return [
        [
            file.relative_to(PACKAGE).as_posix(),
            hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix == ".py" else file.stat().st_size,
        ]
        for file in files
    ]


def _finished(copy, key, out):
    """The metadata of an executed copy that finished under this key and still has its record, or None."""
    try:
        meta = json.loads(copy.read_text(encoding="utf-8"))["metadata"]["faceadv"]
    except (OSError, ValueError, KeyError):  # none, or cut off while it was written
        return None
    if meta.get("status") != "finished" or meta.get("key") != key:
        return None
    record = records.place(out / "results", meta["profile"], copy.stem)
    return meta if record.exists() or not meta["record"] else None


def _run_one(path, values, copy, meta, label, quiet, out):
    notebook = notebooks.read(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    # "running" is on disk before the first cell, so a run that is killed does not look finished
    notebook.metadata["faceadv"] = {**meta, "status": "running"}
    _save(notebook, copy)
    bar = {"desc": label, "leave": False, "disable": quiet or not sys.stderr.isatty()}
    started, before = time.perf_counter(), time.time()
    number, error, status = None, "", "interrupted"
    with _kernel() as (manager, peak):
        try:
            place = re.sub(r"[{}]", r"\g<0>\g<0>", str(copy))  # papermill formats paths
            papermill.execute_notebook(
                place,
                place,
                values,
                kernel_name="python3",
                cwd=str(path.parent),
                progress_bar=bar,
                kernel_manager_class=manager,
                record_timing=False,
            )
            status = "finished"
        except papermill.PapermillExecutionError as e:
            status, number, error = "failed", e.exec_count, _one_line(f"{e.ename}: {e.evalue}")
        except KeyboardInterrupt:
            # nbclient leaves its task behind, and asyncio would print a traceback for it
            ensure_event_loop().set_exception_handler(lambda loop, context: None)
            raise
        except DeadKernelError:
            status, error = "failed", "the kernel died (out of memory?)"
        except Exception as e:  # no kernel, a full disk, …: this notebook failed, the next may not
            status, error = "failed", _one_line(f"{type(e).__name__}: {e}")
        finally:
            executed = _read_executed(copy, notebook)
            code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source]
            skipped = [cell for cell in code if not cell.execution_count]
            for skip in skipped:  # papermill calls them completed
                skip.metadata.get("papermill", {})["status"] = "pending"
            if status == "finished" and skipped:
                status, error = "failed", "it stopped before its last cell (sys.exit?)"
            record = records.place(out / "results", meta["profile"], copy.stem)
            executed.metadata["faceadv"] = {
                **meta,
                "status": status,
                "cell": number,
                "error": error,
                "seconds": round(time.perf_counter() - started, 1),
                "peak_mib": round(peak[0] / 2**20),
                "record": record.exists() and record.stat().st_mtime >= before - 2,  # some disks count in 2 s
            }
            _save(executed, copy)
    meta = executed.metadata["faceadv"]
    word = "ran" if status == "finished" else "failed"
    return Result(path.stem, word, meta["seconds"], meta["peak_mib"], copy, number, error)


def _save(notebook, path):
    with replacing(path) as part:
        nbformat.write(notebook, part)


def _read_executed(copy, otherwise):
    try:
        return notebooks.read(copy)
    except ValueError:  # interrupted in the middle of papermill's own writing
        return otherwise


def _one_line(text):
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).strip()
    return text.splitlines()[0][:300] if text else "no message"


@contextlib.contextmanager
def _kernel():
    """Yield a class of kernel managers that starts this interpreter, and a list with peak memory in bytes.

    The memory of the kernel and its children is sampled meanwhile. At the end none of them is left.
    """
    managers, peak, family, stop = [], [0], set(), threading.Event()
    path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
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
            pids = [getattr(manager.provisioner, "pid", None) for manager in managers if manager.provisioner]
            now = [process for pid in pids if pid for process in _tree(pid)]
            family.update(now)
            peak[0] = max(peak[0], sum(map(_memory, now)))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield Manager, peak
    finally:
        stop.set()
        thread.join()
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()  # psutil makes sure that the id is still the same process
        psutil.wait_procs(family, timeout=5)


def _tree(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _memory(process):
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.memory_info().rss
    return 0


def update(names, out="build", fresh=False, quiet=False):
    """Run notebooks under profile orl; outputs go into the committed notebooks, records into results/.

    Sources stay as they are. Nothing is written if an output names a folder of this machine: ``ValueError``.
    """
    out = Path(out).resolve()
    results = run(names, "orl", out=out, fresh=fresh, quiet=quiet)
    done = [result for result in results if result.status != "failed"]
    ready = [_with_outputs(profiles.NOTEBOOKS / result.path.name, result.path, out) for result in done]
    for result, notebook in zip(done, ready):
        _save(notebook, profiles.NOTEBOOKS / result.path.name)
        record = records.place(out / "results", "orl", result.name)
        if record.exists():
            with replacing(records.place(RESULTS, "orl", result.name)) as part:
                part.write_bytes(record.read_bytes())
    return results


def _with_outputs(source, executed, out):
    """The notebook ``source`` with the outputs of its executed copy, and nothing else of it."""
    notebook, copy = notebooks.read(source), notebooks.read(executed)
    ran = [cell for cell in copy.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    count = 0
    for cell, other in zip(notebook.cells, ran, strict=True):
        if cell.cell_type == "code":
            count += bool(cell.source)
            cell.outputs, cell.execution_count = other.outputs, count if cell.source else None
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = cell.execution_count
                if "image/png" in output.get("data", {}):  # without a kernel the still figure is better
                    output.data.pop("application/vnd.jupyter.widget-view+json", None)
        cell.metadata.pop("execution", None)
        cell.metadata.pop("papermill", None)
    notebook.metadata.pop("papermill", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # the rest is this machine's Python
    _refuse_machine_paths(notebook, source.name, out)
    meta = copy.metadata["faceadv"]
    notebook.metadata["faceadv"] = {
        "profile": meta["profile"],
        "source_sha256": notebooks.source_sha256(notebook),
        "seconds": meta["seconds"],
        "peak_mib": meta["peak_mib"],
    }
    return notebook


def _refuse_machine_paths(notebook, name, out):
    local = (PROJECT, Path.home(), out, Path(sys.prefix))
    folders = {re.escape(str(folder)) + r"(?![\w-])" for folder in local if len(folder.parts) > 1}
    # where warnings say that a cell is
    folders.add(re.escape(str(Path(tempfile.gettempdir(), "ipykernel_"))) + r"\d+")
    outputs = [(f"cell [{c.execution_count}]", c.outputs) for c in notebook.cells if c.cell_type == "code"]
    for where, part in [*outputs, ("its widgets", notebook.metadata.get("widgets", {}))]:
        text = json.dumps(part, ensure_ascii=False)
        found = re.search("|".join(sorted(folders)), text.replace(r"\\", "\\"))
        if found:
            raise Invalid(f"{name} was not updated: {where} prints {found[0]}, a folder of this machine.")

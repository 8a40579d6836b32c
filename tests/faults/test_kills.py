"""``kill -9`` at any moment: before each change that a task makes to the disk, it is killed once, and then repeated.

What a file holds while it is written needs no moments of its own: it has another name until it is renamed, and its last
kill here is the one before that. Each child process dies by itself, in an audit hook of Python.
"""

import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output

from faceadv import align, cloaks, deidentify, faces, recognisers, training
from faceadv.benchmark import cell, grid
from faceadv.course import assignments, profiles, run
from faceadv.store import cache
from faceadv.training import loop

CONTEXT = multiprocessing.get_context("forkserver")  # its children have all modules at once, and no threads
CONTEXT.set_forkserver_preload(["faceadv.benchmark.grid", "faceadv.course.assignments", "faceadv.training.loop"])
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "shutil.rmtree"}
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def child(folder, count, task, arguments):
    """In a process of its own: a task, killed before its change number ``count`` of what is in a folder."""
    made = itertools.count(1)

    def hook(event, given):
        if event in CHANGES and isinstance(given[0], (str, bytes, os.PathLike)):
            writes = event != "open" or (given[2] or 0) & WRITE
            if writes and os.fsdecode(given[0]).startswith(str(folder)) and next(made) == count:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    if task not in REAL:  # which need the chips of ORL
        os.environ["FACEADV_CACHE"] = str(folder)
    folder.mkdir(exist_ok=True)
    sys.addaudithook(hook)
    task(folder, *arguments)


def done(folder, count, task, arguments):
    process = CONTEXT.Process(target=child, args=(folder, count, task, arguments))
    process.start()
    process.join(400)
    return process.exitcode


def outputs(folder):
    """The files that have their final names, and what is in them."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    shown = [path for path in paths if not any(part[0] == "." for part in path.relative_to(folder).parts)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in shown if path.parent.name != "locks"}


@pytest.fixture(params=[7, pytest.param(1, marks=pytest.mark.long)])
def every(request):
    """Each change, or, in the suite, each seventh one."""
    return request.param


def survives(tmp_path, every, task, *arguments, results=outputs):
    """Kill a task before every so-manieth change, repeat it, and compare with what nobody disturbed."""
    assert done(tmp_path / "whole", 0, task, arguments) == 0
    expected = results(tmp_path / "whole")
    assert expected
    for count in itertools.count(1, every):
        folder = tmp_path / str(count)
        code = done(folder, count, task, arguments)
        found = results(folder)
        assert found.items() <= expected.items(), f"half a file after {count - 1} changes"
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert done(folder, 0, task, arguments) == 0
        assert results(folder) == expected, f"another result after a kill before change {count}"
    assert count > 3  # it was killed at all


CHIPS = np.random.default_rng(0).integers(0, 256, (3, 3, 112, 112)).astype(np.uint8)


class Means(torch.nn.Module):
    """A network of a few numbers."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.linspace(-1, 1, 48).reshape(48, 1))

    def forward(self, x):
        x = torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(1)
        return torch.cat([x @ self.weights, x[:, :2]], 1)


def alignment(folder, photos):
    def read(paths):
        return [(np.full((3, 112, 112), len(path.read_bytes()) % 251, np.uint8), np.eye(3)[:2], 1) for path in paths]

    align.align = read
    faces.load(photos)


def means():
    return recognisers.Recogniser("means", Means(), 0.6).eval()


def embedding(folder):
    recognisers.embed_faces(means(), SimpleNamespace(chips=CHIPS))


def cloak(folder):
    images, extractor = torch.from_numpy(CHIPS[:1]).float() / 255, means()
    cloaks.cached("fawkes", lambda x: cloaks.fawkes(x, [extractor], steps=2), images, [extractor])


def hidden(folder, photos):
    """Photos without a face, which are copied."""
    deidentify.align.find_every_face = lambda photos: [[]] * len(photos)
    deidentify.recognisers.load = lambda name, *args: SimpleNamespace(name=name)
    deidentify.folder(photos, folder)


@pytest.fixture
def photos(orl, tmp_path):
    """Three people with a photo each, of which nothing will change."""
    for i, name in enumerate(("ann", "bob", "cid")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        align.Image.open(orl.files[10 * i]).save(tmp_path / "photos" / name / "a.png")
    return tmp_path / "photos"


def entries(folder):
    return {name: content for name, content in outputs(folder).items() if not name.startswith("digests")}


def test_alignment(tmp_path, every, photos):
    survives(tmp_path, every, alignment, photos, results=entries)


@pytest.mark.parametrize("task", [embedding, cloak])
def test_embeddings_and_cloaks(task, tmp_path, every):
    survives(tmp_path, every, task)


def test_deidentified_photos(tmp_path, every, photos):
    def results(folder):
        """The photos, and the report, once it has a line for each."""
        made = outputs(folder)
        return {name: content for name, content in made.items() if name != "report.csv" or content.count(b"\n") == 4}

    survives(tmp_path, every, hidden, photos, results=results)


def notebooks(folder, course):
    """Two notebooks, without a kernel and without pages: what they would write is written."""

    def execute(copy, *rest):
        made = nbformat.read(copy, 4)
        for number, one in enumerate(made.cells, 1):
            one.update(outputs=[new_output("stream", text="1\n")], execution_count=number)
        run._save(made, copy)
        (folder / "results" / "orl").mkdir(parents=True, exist_ok=True)
        cache.write_json(folder / "results" / "orl" / f"{copy.stem}.json", [1])
        return None, ""

    run._execute = execute
    run.page.write_index = lambda out, profile: cache.write_json(out / "index.html", profile)
    kernels(folder, course)


def kernels(folder, course):
    profiles.NOTEBOOKS = course
    run._surroundings = lambda: "all as it is"
    assert all(result.status != "failed" for result in run.run("all", out=folder))


def finished(folder):
    """What finished notebooks printed, and the records; a copy that was interrupted says so."""
    made = {name: content for name, content in outputs(folder).items() if name.endswith(".json")}
    for path in (folder / "orl").glob("[!.]*.ipynb"):
        notebook = nbformat.read(path, 4)
        if notebook.metadata["faceadv"]["status"] == "finished":
            made[path.name] = [str(cell.get("outputs")) for cell in notebook.cells]
    return {name: str(content) for name, content in made.items()}


@pytest.fixture
def course(tmp_path):
    folder = tmp_path / "notebooks"
    (folder / "profiles").mkdir(parents=True)
    (folder / "profiles" / "orl.yaml").write_text("all: {}\n")
    for name in ("00_a", "01_b"):
        cells = [new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}), new_code_cell("print(1)")]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
    return folder


def test_notebooks(tmp_path, every, course):
    survives(tmp_path, every, notebooks, course, results=finished)


@pytest.mark.long
def test_notebooks_with_their_kernels(tmp_path, course):
    survives(tmp_path, 5, kernels, course, results=finished)


CELLS = [cell.Cell("none", "none", "dlib", goal) for goal in cell.GOALS]
TINY = cell.Settings(pair_count=4, slow_pair_count=1, steps=1, seeds=(0,))


def bench(folder):
    """A benchmark that measures nothing, and notes beside its folder whatever it measures."""

    def measure(one, **options):
        with open(folder.with_suffix(".measured"), "a") as file:
            file.write(f"{one.goal}\n")
        return dataclasses.asdict(one) | {"right": [1], "seconds": 0}

    grid.measure, grid.version = measure, lambda one, *rest: cache.key(dataclasses.asdict(one))
    before = [one.goal for one in CELLS if len(grid.read([one], TINY, folder))]
    noted = folder.with_suffix(".measured")
    already = noted.read_text().split() if noted.exists() else []
    grid.run(CELLS, TINY, folder)
    again = noted.read_text().split()[len(already) :]
    assert not set(before) & set(again)


def real_bench(folder):
    grid.run(CELLS, TINY, folder)


def rows(folder):
    found = {name: json.loads(content.splitlines()[0])["row"] for name, content in outputs(folder).items()}
    return {name: str(row | {"seconds": 0}) for name, row in found.items()}


def test_the_benchmark_and_no_finished_cell_is_computed_twice(tmp_path, every):
    survives(tmp_path, every, bench, results=rows)


@pytest.mark.long
def test_the_benchmark_with_its_networks(tmp_path):
    survives(tmp_path, 3, real_bench, results=rows)


def two_at_once(tmp_path, task):
    started = [CONTEXT.Process(target=child, args=(tmp_path / "both", 0, task, ())) for _ in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
    assert [process.exitcode for process in started] == [0, 0]
    assert done(tmp_path / "whole", 0, task, ()) == 0


def test_two_benchmarks_at_once_in_one_folder(tmp_path):
    two_at_once(tmp_path, bench)
    assert rows(tmp_path / "both") == rows(tmp_path / "whole")


def test_two_processes_share_a_cache(tmp_path):
    two_at_once(tmp_path, cloak)
    assert outputs(tmp_path / "both") == outputs(tmp_path / "whole")


def lesson(folder):
    """Four steps of a tiny network, with a checkpoint after each second one."""
    network = Means()
    optimiser = torch.optim.Adam(network.parameters())

    def step(number, draw):
        loss = network(torch.rand(2, 3, 8, 8, generator=draw)).square().mean()
        loop.descend(optimiser, loss)
        return {"loss": loss.item()}

    loop.EVERY = 2
    parts = {"modules": {"means": network}, "optimisers": {"adam": optimiser}}
    loop.train(loop.Plan("tiny", {"steps": 4, "lr": 0.1}, (CHIPS,), step=step, **parts), folder, resume=True)


SMALL = {
    "resgn": {"blocks": 1, "width": 8},
    "puface": {"widths": (8, 16, 24)},
    "a3gn": {"blocks": 2, "width": 8},
    "prior": {"side": 16, "widths": (16, 32)},
}


def recipe(folder, name):
    """The same with one of the recipes, on ten people of ORL."""
    import importlib

    loop.EVERY = 2
    data = faces.load("orl")[:100]
    chips, dlib = np.array(data.chips), recognisers.load("dlib")
    given = {"resgn": (data, dlib), "a3gn": (data, dlib), "prior": (chips,), "puface": (chips, chips // 8 * 8, [dlib])}
    settings = SMALL[name] | {"steps": 4, "batch": 2}
    importlib.import_module(f"faceadv.training.{name}").train(*given[name], settings, out=folder, resume=True)


REAL = (real_bench, recipe)


def trained(folder):
    """The last checkpoint, once all steps are made; any other can be read."""
    if not (folder / loop.CHECKPOINT).exists():
        return {}
    state = loop.checkpoint(folder)
    if state["step"] < 4:
        return {}
    assert [row["step"] for row in loop.read_log(folder / loop.LOG)] == [1, 2, 3, 4]
    return {"state": cache.key({key: state[key] for key in ("modules", "optimisers", "extra", "run")})}


def test_training(tmp_path, every):
    survives(tmp_path, every, lesson, results=trained)


@pytest.mark.long
@pytest.mark.parametrize("name", training.RECIPES)
def test_trainings_of_all_networks(name, tmp_path):
    survives(tmp_path, 4, recipe, name, results=trained)


def grading(folder, made):
    """One student's solution of one problem set. The course comes first, each of its folders whole or not at all."""
    for path in made.iterdir():
        if not (folder / path.name).exists():
            shutil.rmtree(folder / ".part", ignore_errors=True)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, folder / ".part")
            (folder / ".part").rename(folder / path.name)
    assignments.grade(["tiny"], folder)


def grades(folder):
    table = folder / "grades.csv"
    page = folder / "feedback" / "zoe" / "tiny" / "tiny.html"
    text = re.sub(r"<h4>.*?</h4>", "", page.read_text(), flags=re.S) if table.exists() else ""
    return {"table": table.read_text(), "page": len(text) > 1000} if table.exists() else {}


@pytest.mark.long
def test_grading(tmp_path):
    from test_students import RIGHT, hand_in

    hand_in(tmp_path / "made", {"zoe": RIGHT})
    survives(tmp_path, 12, grading, tmp_path / "made", results=grades)

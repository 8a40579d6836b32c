"""The running machinery, on tiny notebooks that papermill really executes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dask
import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from faceadv import cli, errors, plots
from faceadv.course import notebook, profiles, run
from faceadv.store import cache, datasets, threads, weights

PARAMETERS = """profile: str = "orl"  # which
seed: int = 0
steps: int = 5  # how many
lr: float = 0.1
eps: list[float] = [1.0, 2.0]
fast: bool = False
free = None
results_dir: str = "../results\""""
WORKING = """import os, sys
from pathlib import Path
folder = Path(results_dir) / profile
folder.mkdir(parents=True, exist_ok=True)
_ = (folder / "00_a.json").write_text('{"numbers": []}')
print(steps, os.environ["GOMP_SPINCOUNT"], os.environ["PYTHONHASHSEED"], Path.cwd().name)
assert Path(sys.prefix).samefile(PREFIX)""".replace("PREFIX", repr(sys.prefix))


def test_unknown_notebooks_are_refused_with_the_nearest(course):
    course("00_faces", "1")
    with pytest.raises(run.Invalid, match=r'no notebook "00_face" \(did you mean 00_faces\?\)'):
        run.select(["00_face"])


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A folder with notebooks in place of the course's; returns a function that adds one."""
    folder = tmp_path / "notebooks"
    (folder / "profiles").mkdir(parents=True)
    (folder / "profiles" / "orl.yaml").write_text("all: {profile: orl}\n00_a: {steps: 3}\n")
    monkeypatch.setattr(profiles, "NOTEBOOKS", folder)
    monkeypatch.setattr(run, "RESULTS", tmp_path / "committed")
    monkeypatch.setattr(run, "_surroundings", lambda: "all as it is")  # other sessions may edit the package meanwhile

    def add(name, *code, tags=(), parameters=PARAMETERS):
        cells = [
            new_markdown_cell("# A title"),
            new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        ]
        cells += [new_code_cell(source, metadata={"tags": list(tags)}) for source in code]
        nbformat.write(new_notebook(cells=cells), folder / f"{name}.ipynb")
        return folder / f"{name}.ipynb"

    return add


def printed(path):
    cells = json.loads(path.read_text())["cells"]
    return "".join("".join(output.get("text", "")) for cell in cells for output in cell.get("outputs", []))


def faceadv_metadata(path):
    return json.loads(path.read_text())["metadata"]["faceadv"]


def test_run_keeps_a_copy_reuses_it_and_runs_again_when_something_changed(course, tmp_path):
    out = tmp_path / "o{u}t"  # papermill would take the braces for a parameter
    path = course("00_a", WORKING)
    [first] = run.run(["00"], out=out)
    assert (first.status, first.error, first.cell) == ("ran", "", None)
    assert first.path == out / "orl" / "00_a.ipynb"
    assert printed(first.path) == f"3 {threads.ENVIRONMENT['GOMP_SPINCOUNT']} 0 notebooks\n"
    meta = faceadv_metadata(first.path)
    assert meta["status"] == "finished"
    assert 20 < meta["peak_mib"] < 2000
    assert (out / "results" / "orl" / "00_a.json").exists()

    [second] = run.run(["00_a"], out=out)
    assert (second.status, second.seconds) == ("reused", first.seconds)

    first.path.write_text("")
    [again] = run.run("00", out=out)
    assert again.status == "ran"
    assert printed(again.path) == f"3 {threads.ENVIRONMENT['GOMP_SPINCOUNT']} 0 notebooks\n"

    course("00_a", WORKING, "print('changed')")
    [third] = run.run("all", out=out, overrides={"steps": "4"})
    assert third.status == "ran"
    assert printed(third.path).startswith("4 ")
    assert printed(third.path).endswith("changed\n")
    assert "outputs" not in json.loads(path.read_text())["cells"][0]  # the source was left alone
    assert printed(path) == ""


def spoil_copy(copy, record):
    copy.write_bytes(copy.read_bytes()[:-100])


def empty_copy(copy, record):
    copy.write_bytes(b"")


def edit_copy(copy, record):
    copy.write_text(copy.read_text().replace("3 ", "4 "))


def cut_record(copy, record):
    record.write_bytes(record.read_bytes()[:-3])


def empty_record(copy, record):
    record.write_bytes(b"")


def lose_record(copy, record):
    record.unlink()


def cut_note(copy, record):
    note = copy.with_name(".00_a.json")
    note.write_bytes(note.read_bytes()[:-10])


@pytest.mark.parametrize("spoil", [spoil_copy, empty_copy, edit_copy, cut_record, empty_record, lose_record, cut_note])
def test_a_finished_copy_or_record_that_was_changed_is_not_reused(course, tmp_path, caplog, spoil):
    course("00_a", "1")
    copy, record = tmp_path / "orl" / "00_a.ipynb", tmp_path / "results" / "orl" / "00_a.json"
    for path, text in ((copy, '{"cells": [], "text": "3 4"}' + " " * 200), (record, '{"numbers": []}')):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    files = {str(path.relative_to(tmp_path)): cache.sha256(path) for path in (copy, record)}
    cache.write_json(run._note(copy), {"key": "k", "files": files, "seconds": 1.0, "peak_mib": 2})
    assert run._finished(copy, "k", tmp_path)["seconds"] == 1.0
    assert run._finished(copy, "another", tmp_path) is None
    assert caplog.text == ""
    spoil(copy, record)
    assert run._finished(copy, "k", tmp_path) is None
    assert "00_a" in caplog.text  # one line says so


def test_key_knows_cells_and_parameters(course):
    path = course("00_a", "1")
    key = run._key(path, {"steps": 1}, "here")
    assert run._key(course("00_a", "1"), {"steps": 1}, "here") == key
    assert run._key(path, {"steps": 2}, "here") != key
    assert run._key(path, {"steps": 1}, "there") != key
    assert run._key(course("00_a", "2"), {"steps": 1}, "here") != key
    content = nbformat.read(course("00_a", "1"), as_version=4)
    content.cells[0].source += " with another word"
    nbformat.write(content, path)
    assert run._key(path, {"steps": 1}, "here") != key


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A small package and a small ORL in place of the real ones, and no LFW; returns their folder."""
    (tmp_path / "package" / "models").mkdir(parents=True)
    (tmp_path / "package" / "a.py").write_text("a = 1")
    (tmp_path / "package" / "models" / "w.safetensors").write_bytes(bytes(1000))
    (tmp_path / "orl" / "s1").mkdir(parents=True)
    (tmp_path / "orl" / "s1" / "1.pgm").write_bytes(b"photo")
    monkeypatch.setattr(run, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(datasets, "orl_folder", lambda: tmp_path / "orl")
    monkeypatch.setattr(weights, "fetched", dict)
    monkeypatch.setenv("FACEADV_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path / "cache"))
    return tmp_path


def flip(path):
    """Change one byte, and nothing else that a listing shows but the time."""
    content, before = bytearray(path.read_bytes()), path.stat()
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


def test_surroundings_are_hashed_by_content(place, monkeypatch):
    seen = [run._surroundings()]
    assert run._surroundings() == seen[0]
    (place / "package" / "__pycache__").mkdir()
    (place / "package" / "__pycache__" / "a.pyc").write_text("a")
    os.utime(place / "package" / "a.py", (1, 1))
    assert run._surroundings() == seen[0]
    for path in ("package/a.py", "package/models/w.safetensors", "orl/s1/1.pgm"):
        flip(place / path)
        seen.append(run._surroundings())
    (place / "package" / "a.py").rename(place / "package" / "b.py")
    seen.append(run._surroundings())
    monkeypatch.setattr(weights, "fetched", lambda: {"facenet": "0" * 64})
    seen.append(run._surroundings())
    (place / "data" / "lfw" / "lfw-deepfunneled" / datasets.SOMEBODY).mkdir(parents=True)
    (place / "data" / "lfw" / "lfw-deepfunneled" / datasets.SOMEBODY / "a_0001.jpg").write_bytes(b"photo")
    seen.append(run._surroundings())
    (place / "data" / "lfw" / "pairs.txt").write_text("10 300")  # who is compared with whom
    seen.append(run._surroundings())
    monkeypatch.setattr(run.precision, "device", lambda: "meta")
    monkeypatch.setattr(run.precision, "has_bfloat16", lambda device: False)
    seen.append(run._surroundings())
    monkeypatch.setattr(run.precision, "has_bfloat16", lambda device: True)
    seen.append(run._surroundings())
    versions = dict.fromkeys(cache.LIBRARIES, "1")
    monkeypatch.setattr(cache.metadata, "version", versions.get)
    for library in cache.LIBRARIES:
        versions[library] = "2"
        seen.append(run._surroundings())
    assert len(set(seen)) == len(seen) == 19


def test_key_knows_the_photos_of_a_folder_that_is_a_parameter(course, tmp_path):
    path = course("00_a", "1")
    person = tmp_path / "own" / "ann"
    person.mkdir(parents=True)
    (person / "1.jpg").write_bytes(b"photo")
    seen = [run._key(path, {"own_folder": str(tmp_path / "own")}, "")]
    (person / "2.jpg").write_bytes(b"another")
    seen.append(run._key(path, {"own_folder": str(tmp_path / "own")}, ""))
    (person / "2.jpg").write_bytes(b"a third")
    seen.append(run._key(path, {"own_folder": str(tmp_path / "own")}, ""))
    assert len(set(seen)) == 3
    assert run._key(path, {"own_folder": str(tmp_path)}, "") != run._key(path, {"own_folder": ""}, "")


def test_folders_of_photos_are_looked_for_before_anything_runs(course, tmp_path, monkeypatch, capsys):
    course("00_a", "print(own_folder)", parameters=f'own_folder: str = ""\nfaces_name: str = "orl"\n{PARAMETERS}')
    (tmp_path / "mine" / "ann").mkdir(parents=True)
    (tmp_path / "mine" / "ann" / "1.jpg").write_bytes(b"photo")
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACEADV_DATA", "no")
    for name, value, told in (
        ("own_folder", "elsewhere", f'"{tmp_path}/elsewhere" is neither "orl" nor "lfw" nor a folder'),
        ("own_folder", "bare", f"{tmp_path}/bare holds no photos"),
        ("faces_name", "lfw", f"LFW is not under {tmp_path}/no"),
        ("faces_name", "orl,lfw", f"LFW is not under {tmp_path}/no"),
    ):
        assert cli.main(["run", "0", "-p", name, value, "--out", "out"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"faceadv: {told}")
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert cli.main(["run", "0", "-p", "own_folder", "mine", "--out", "out"]) == 0
    (copy,) = (tmp_path / "out").glob("own_folder=*/orl/00_a.ipynb")  # a folder of its own, though its name has slashes
    assert printed(copy) == f"{tmp_path}/mine\n"


def test_a_kernel_finds_the_folders_that_were_meant_where_the_command_was_typed(course, tmp_path, monkeypatch):
    course("00_a", 'import os; print(os.environ["FACEADV_DATA"], os.environ["FACEADV_CACHE"])')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACEADV_DATA", "data")
    monkeypatch.setenv("FACEADV_CACHE", "./cache")
    (result,) = run.run("00", out="out")
    assert printed(result.path) == f"{tmp_path}/data {tmp_path}/cache\n"


def test_a_run_with_other_parameters_has_a_folder_of_its_own_and_says_what_is_other(course, tmp_path, capsys):
    course("00_a", RECORDING)
    out = tmp_path / "out"
    run.run("00", out=out)
    plain = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "index.html"}
    assert cli.main(["run", "0", "-p", "steps", "8", "-p", "lr", "1e-3", "--out", str(out)]) == 0
    assert "steps=8_lr=1e-3/index.html" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in plain} == plain
    own, told = out / "steps=8_lr=1e-3", "Not profile orl as it is: lr = 1e-3, steps = 8."
    record = json.loads((own / "results" / "orl" / "00_a.json").read_text())
    assert record["changed"] == {"steps": "8", "lr": "1e-3"}
    assert record["numbers"][0]["value"] == 16
    assert "changed" not in json.loads((out / "results" / "orl" / "00_a.json").read_text())
    for page in (own / "index.html", own / "orl" / "00_a.html"):
        assert told in page.read_text()
    assert "Not profile" not in (out / "orl" / "00_a.html").read_text()
    again = run.run("00", out=out)
    assert [result.status for result in again] == ["reused"]
    assert 'href="steps%3D8_lr%3D1e-3/index.html"' in (out / "index.html").read_text()
    _, results = run.sweep("00", "orl", {"steps": ["8", "9"], "lr": "1e-3"}, out)
    assert [result.status for result in results] == ["reused", "ran"]  # a sweep knows what ran alone


def test_the_folder_of_a_run_is_a_name_that_a_disk_takes(tmp_path):
    assert run.folder(tmp_path, {}) == run.folder(tmp_path, None) == tmp_path
    long, path = (run.folder(tmp_path, given) for given in ({"eps": list(range(300))}, {"own": "/a/../b:c*"}))
    assert long.parent == path.parent == tmp_path
    assert len(long.name) < 120
    assert path != run.folder(tmp_path, {"own": "/a/../b:c?"})


def test_an_own_profile_names_folder_and_record(course, tmp_path, monkeypatch, capsys):
    course("00_a", RECORDING)
    (tmp_path / "mine.yaml").write_text("0: {steps: 010}")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "0", "--profile", "mine.yaml", "--out", "out"]) == 0
    record = json.loads((tmp_path / "out" / "results" / "mine" / "00_a.json").read_text())
    assert record["numbers"][0]["value"] == 20
    assert cli.main(["run", "0", "--profile", "mine.yaml", "-p", "lr", "1,2", "--out", "out"]) == 0
    assert (tmp_path / "out" / "lr=2" / "results" / "mine" / "00_a.json").exists()


def test_several_notebooks_at_a_time(course, tmp_path):
    waiting = """from pathlib import Path; import time; end = time.time() + 100; here = Path(PLACE)
(here / NAME).touch()
while len(list(here.glob("0*"))) < 2: assert time.time() < end"""
    for name in ("00_a", "01_b"):
        course(name, waiting.replace("PLACE", repr(str(tmp_path))).replace("NAME", repr(name)))
    results = run.run("all", out=tmp_path / "out", jobs=2)
    assert [result.error for result in results] == ["", ""]
    assert [result.name for result in results] == ["00_a", "01_b"]
    assert [result.status for result in run.run("all", out=tmp_path / "out")] == ["reused"] * 2
    with pytest.raises(ValueError, match="jobs must be a whole number of at least 1, not 0"):
        run.run("all", out=tmp_path / "out", jobs=0)


def test_libraries_that_make_numbers_are_in_the_key():
    assert {"torch", "numpy", "diffusers", "torchmetrics", "torchvision"} <= set(cache.LIBRARIES)


def test_a_folder_that_cannot_be_written_is_told(course, tmp_path):
    course("00_a", "1")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.Failed, match="cannot be written"):
        run.run("00", out=tmp_path / "file")


def test_failures_leave_copies_that_do_not_look_finished(course, tmp_path, capsys):
    course("00_a", "1 / 0", "print('later')")
    course("01_b", "import sys; sys.exit(0)", "print('later')")
    course("02_c", "import os; os._exit(1)", "print('later')")
    assert cli.main(["run", "all", "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().out
    assert "00_a: cell [3]: ZeroDivisionError: division by zero" in told
    assert "01_b: it stopped before its last cell" in told
    assert "02_c: the kernel died" in told
    for path in sorted((tmp_path / "out" / "orl").glob("*.ipynb")):
        meta, cells = faceadv_metadata(path), json.loads(path.read_text())["cells"]
        assert meta["status"] == "failed"
        assert cells[-1]["metadata"]["papermill"]["status"] == "pending"
        assert cache.read_json(run._note(path)) is None
    index = (tmp_path / "out" / "index.html").read_text()
    assert "failed" in index
    assert "ZeroDivisionError" in index


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"stesp": 3}, r"00_a has no parameter \"stesp\" \(did you mean steps\?\)"),
        ({"steps": "many"}, "steps of 00_a must be of type int, not str"),
        ({"steps": 1.5}, "must be of type int, not float"),
        ({"steps": True}, "must be of type int, not bool"),
        ({"fast": "1"}, "must be of type bool, not int"),
        ({"lr": "8/255"}, "must be of type float"),
        ({"eps": "3"}, "must be of type list, not int"),
        ({"lr": "nan"}, "must be a number of at least 0, not nan"),
        ({"eps": "[1, x]"}, "an item of eps of 00_a must be of type float"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_runs(course, tmp_path, overrides, told):
    course("00_a", "1")
    with pytest.raises(ValueError, match=told):
        run.run("all", overrides=overrides, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_run_leaves_no_kernel_and_is_continued(course, tmp_path):
    course("00_a", WORKING)
    marker = tmp_path / "started"
    course("01_b", f"from pathlib import Path; import time; m = Path({str(marker)!r}); again = m.exists()",
           "m.touch(); time.sleep(0 if again else 60)", "print('done')")  # fmt: skip
    out = tmp_path / "out"
    code = (
        "import signal, sys; from pathlib import Path; from faceadv import cli;"
        "from faceadv.course import profiles, run;"
        # a shell that started the tests in the background had it ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"profiles.NOTEBOOKS = Path({str(profiles.NOTEBOOKS)!r});"
        "run._surroundings = lambda: 'all as it is';"
        f"sys.exit(cli.main(['run', 'all', '--out', {str(out)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    kernels = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 130
    assert told.splitlines()[-1] == "faceadv: interrupted."
    assert "Traceback" not in told
    assert kernels
    assert not [kernel for kernel in kernels if kernel.is_running()]
    assert faceadv_metadata(out / "orl" / "01_b.ipynb")["status"] == "interrupted"
    again = run.run("all", out=out)
    assert [result.status for result in again] == ["reused", "ran"]
    assert printed(again[1].path) == "done\n"


def test_update_writes_outputs_and_records_but_no_path_of_this_machine(course, tmp_path):
    source = course("00_a", WORKING, "6 * 7")
    private = course("01_b", "import os; print('in', os.path.abspath(results_dir))")
    before = nbformat.read(source, as_version=4)
    with pytest.raises(ValueError, match=r"01_b\.ipynb was not updated: cell \[2\] prints .*out, a folder of this"):
        run.update("all", out=tmp_path / "out")
    assert printed(source) == printed(private) == ""

    [result] = run.update("00", out=tmp_path / "out")
    assert result.status == "reused"
    after = nbformat.read(source, as_version=4)
    for name in ("source", "metadata", "id", "cell_type"):
        assert [cell[name] for cell in after.cells] == [cell[name] for cell in before.cells]
    assert (after.nbformat, after.nbformat_minor) == (before.nbformat, before.nbformat_minor)
    assert [cell.get("execution_count") for cell in after.cells] == [None, 1, 2, 3]
    assert after.cells[-1].outputs[0].data["text/plain"] == "42"
    assert after.cells[-1].outputs[0].execution_count == 3
    assert set(after.metadata) == {"faceadv", "kernelspec", "language_info"}
    assert set(after.metadata.faceadv) == {"profile", "source_sha256", "seconds", "peak_mib"}
    assert not any("papermill" in cell.metadata for cell in after.cells)
    assert str(tmp_path) not in source.read_text()
    assert (tmp_path / "committed" / "orl" / "00_a.json").exists()
    assert after.metadata.faceadv.source_sha256 == notebook.source_sha256(before)
    after.cells[-1].source = "6 * 8"
    assert after.metadata.faceadv.source_sha256 != notebook.source_sha256(after)


def test_update_writes_each_record_and_the_outputs_of_the_profile_that_is_read(course, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ON_LFW", ("00_a",))
    (profiles.NOTEBOOKS / "profiles" / "lfw.yaml").write_text("all: {profile: lfw}\n")
    on_lfw, on_orl = (course(name, WORKING.replace("00_a", name)) for name in ("00_a", "01_b"))
    run.update("all", out=tmp_path / "out")
    assert (printed(on_lfw), "notebooks" in printed(on_orl)) == ("", True)
    before = on_orl.read_bytes()
    run.update("all", "lfw", out=tmp_path / "out")
    assert "notebooks" in printed(on_lfw)
    assert on_orl.read_bytes() == before
    written = {path.relative_to(tmp_path / "committed").as_posix() for path in (tmp_path / "committed").rglob("*.json")}
    assert written == {f"{profile}/{name}.json" for profile in ("orl", "lfw") for name in ("00_a", "01_b")}


def test_the_kernel_is_this_interpreter_whatever_is_installed(tmp_path):
    with run.kernel() as (manager, peak):
        spec = manager(kernel_name="python3").kernel_spec
    assert Path(spec.argv[0]) == Path(sys.executable)
    assert peak == [0]


def test_a_kernel_that_did_not_start_is_started_again(course, tmp_path, monkeypatch):
    left, real = ["Kernel didn't respond in 60 seconds", "Kernel died before replying to kernel_info"], run.papermill

    class Papermill:
        PapermillExecutionError = real.PapermillExecutionError

        @staticmethod
        def execute_notebook(*args, **kwargs):
            if left:
                raise RuntimeError(left.pop())
            real.execute_notebook(*args, **kwargs)

    monkeypatch.setattr(run, "papermill", Papermill)
    course("00_a", WORKING)
    assert [result.status for result in run.run(["00"], out=tmp_path / "build")] == ["ran"]
    left += ["Kernel didn't respond in 60 seconds"] * 3
    (result,) = run.run(["00"], out=tmp_path / "build", fresh=True)
    assert (result.status, result.error) == ("failed", "RuntimeError: Kernel didn't respond in 60 seconds")


# as records.write does, whose import takes longer than all the rest
RECORDING = """import json, pathlib
made = {"name": "twice the steps", "value": 2 * steps, "low": steps, "high": 3 * steps, "n": None, "unit": "steps"}
place = pathlib.Path(results_dir) / profile / "00_a.json"
place.parent.mkdir(parents=True)
_ = place.write_text(json.dumps({"notebook": "00_a", "numbers": [made]}))
"""


def test_several_values_make_one_run_each_and_one_table(course, tmp_path, capsys):
    course("00_a", RECORDING)
    out = tmp_path / "out"
    given = {"steps": "8,3", "eps": "[1.0, 4.0]", "lr": [0.1, 0.2]}
    table, results = run.sweep("00", "orl", given, out)
    assert [result.status for result in results] == ["ran"] * 4
    assert list(table["steps"]) == ["8", "8", "3", "3"]
    assert list(table["lr"]) == [0.1, 0.2] * 2
    assert list(table["value"]) == [16, 16, 6, 6]
    assert (out / "steps=8_eps=[1.0, 4.0]_lr=0.2" / "orl" / "00_a.ipynb").exists()
    assert len((out / "sweep.csv").read_text().splitlines()) == 5
    assert not (out / "sweep.png").exists()  # two parameters vary
    assert results[0].name == "steps=8_eps=[1.0, 4.0]_lr=0.1 00_a"
    axis = plots.sweep(table[table["lr"] == 0.1], "steps", ["twice the steps"]).axes[0]
    assert axis.lines[0].get_xdata().tolist() == [3, 8]
    assert axis.get_ylabel() == "steps"
    # what ran already is not run again, and a mistake is found before anything runs
    _, again = run.sweep("00", "orl", given, out)
    assert [result.status for result in again] == ["reused"] * 4
    with pytest.raises(ValueError, match="did you mean steps"):
        run.sweep("00", "orl", {"setps": "1,2"}, tmp_path / "other")
    with pytest.raises(ValueError, match="must be of type int"):
        run.sweep("00", "orl", {"steps": "1,two"}, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert cli.main(["run", "00", "-p", "steps", "2,3", "--out", str(tmp_path / "cli")]) == 0
    said = capsys.readouterr().out
    assert "sweep.csv" in said
    assert "steps=3 00_a" in said
    assert (tmp_path / "cli" / "sweep.png").stat().st_size > 1000
    assert cli.main(["run", "00", "--workers", "2", "--out", str(tmp_path / "cli")]) == 2
    assert "for several values" in capsys.readouterr().err


def test_a_sweep_of_which_every_run_fails_has_an_empty_table(course, tmp_path):
    course("00_a", "1 / 0")
    table, results = run.sweep("00", "orl", {"steps": "1,2"}, tmp_path)
    assert [result.status for result in results] == ["failed"] * 2
    assert table.empty
    assert "ZeroDivisionError" in run.summary(results)


def test_a_sweep_on_a_cluster_gives_the_same_table(course, tmp_path):
    course("00_a", RECORDING)
    preload = tmp_path / "preload.py"  # a worker is another process, which has the course's own notebooks
    preload.write_text(
        "from pathlib import Path\nfrom faceadv.course import profiles, run\n"
        f"profiles.NOTEBOOKS = Path({str(profiles.NOTEBOOKS)!r})\nrun._surroundings = lambda: 'all as it is'\n"
    )
    given = {"steps": "1,2"}
    with dask.config.set({"distributed.worker.preload": [str(preload)]}):
        spread, results = run.sweep("00", "orl", given, tmp_path / "out", "local", workers=1)
    assert [result.status for result in results] == ["ran"] * 2
    made = (tmp_path / "out" / "sweep.csv").read_text()
    alone, results = run.sweep("00", "orl", given, tmp_path / "out")  # nothing but the table is made anew
    assert [result.status for result in results] == ["reused"] * 2
    assert spread["value"].tolist() == [2, 4]
    assert spread.equals(alone)
    assert (tmp_path / "out" / "sweep.csv").read_text() == made


def test_two_runs_do_not_write_into_one_folder(course, tmp_path, capsys):
    course("00_a", "1")
    out = tmp_path / "out"
    for file, values in ((".run.lock", []), (".sweep.lock", ["-p", "steps", "1,2"])):
        with run.alone(out / file):  # as the first run does
            began = time.monotonic()
            assert cli.main(["run", "00", "--out", str(out), *values]) == 2
            assert time.monotonic() - began < 20
        told = capsys.readouterr()
        assert told.err == f"faceadv: Another run is writing into {out}: wait for its end, or choose another folder.\n"
        assert told.out == ""
    assert sorted(path.name for path in out.iterdir()) == [".run.lock", ".sweep.lock"]
    assert cli.main(["run", "00", "--out", str(out)]) == 0


def test_a_folder_in_the_place_of_a_note(course, tmp_path):
    path = course("00_a", "1")
    copy = tmp_path / "orl" / path.name
    run._note(copy).mkdir(parents=True)
    (run._note(copy) / "mine").touch()
    assert [result.status for result in run.run("00", out=tmp_path)] == ["ran"]
    assert [result.status for result in run.run("00", out=tmp_path)] == ["reused"]

"""Every notebook runs in the profile smoke, a replay gives the same numbers, and what is committed is current."""

import os
import shutil
import subprocess
import sys

import nbformat
import pytest

from faceadv import records
from faceadv.course import notebook as notebooks
from faceadv.course import profiles, run
from faceadv.store.paths import PROJECT

NOTEBOOKS = run.select(["all"])


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def executed(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param.stem)
    (result,) = run.run([request.param.stem], "smoke", out=out)
    assert result.status == "ran", result.error
    return result, out


def test_runs_silently_and_replays_to_the_same_numbers(executed):
    result, out = executed
    notebook = nbformat.read(result.path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", {}) for o in outputs)
    path = records.place(out / "results", "smoke", result.name)
    first = records.read(path)
    assert first["numbers"]
    path.unlink()
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)  # the benchmark would find its cells finished
    # nbval runs the copy again and compares the cells tagged nbval-check-output
    replay = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(out)),
            *("--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600", str(result.path)),
        ],
        env=os.environ | run.KERNEL_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert replay.returncode == 0, replay.stdout[-3000:]
    assert any("nbval-check-output" in cell.metadata.get("tags", []) for cell in notebook.cells)
    assert records.differences(first, records.read(path)) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_of_this_source_and_profile_orl(path):
    notebook = nbformat.read(path, as_version=4)
    edited = f"{path.name} was edited after it ran: make update"
    assert notebook.metadata["faceadv"]["source_sha256"] == notebooks.source_sha256(notebook), edited
    assert notebook.metadata["faceadv"]["profile"] == "orl"
    assert notebook.metadata["faceadv"]["seconds"] < 600  # three minutes on two cores that are idle
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error"]
    record = records.read(records.place(PROJECT / "results", "orl", path.stem))
    assert record["profile"] == "orl"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_profile_fits_the_notebook(path):
    assert {"profile", "seed", "results_dir"} <= profiles.declared(path).keys()
    for profile in profiles.names():
        assert profiles.parameters(profile, path).get("profile", profile) == profile
        assert profiles.parameters(profile, path) | profiles.load(profile)[path.stem]

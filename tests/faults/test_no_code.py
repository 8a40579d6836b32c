"""No code runs from weights, checkpoints, arrays or YAML: each holds some here, which leaves a file where it runs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline

from faceadv.course import profiles
from faceadv.errors import Failed, Invalid, Missing, UserError
from faceadv.networks import dlib, prior
from faceadv.store import cache, weights
from faceadv.store.paths import PROJECT
from faceadv.training import loop


class Trap:
    """Whoever unpickles it writes a file."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return open, (self.place, "w")


@pytest.fixture
def trap(tmp_path):
    """A trap, of which it is sure that it works, and that nothing has run into."""
    place = tmp_path / "ran"
    torch.save([Trap(place)], tmp_path / "sure.pt")
    torch.load(tmp_path / "sure.pt", weights_only=False)[0].close()
    place.unlink()
    yield Trap(place)
    assert not place.exists()


def test_weights(trap, tmp_path):
    torch.save({"weight": trap}, tmp_path / "fetched.pt")
    with pytest.raises(Failed, match="does not hold network weights"):
        weights.read_state(tmp_path / "fetched.pt")
    torch.save(trap, tmp_path / "dlib.dat")
    with pytest.raises(Invalid, match="not dlib's face recognition network"):
        dlib.read_dat(tmp_path / "dlib.dat")


def test_a_diffusion_model_in_the_form_of_2022(trap, tmp_path):
    unet, schedule = prior.load()
    folder = tmp_path / "model"
    DDPMPipeline(unet, schedule).save_pretrained(folder, safe_serialization=False)
    prior.load(folder)
    (file,) = folder.rglob("*.bin")
    torch.save({name: trap for name in unet.state_dict()}, file)
    file.with_name(file.name + ".sha256").unlink()  # as if this were its first use
    with pytest.raises((Missing, Invalid)):
        prior.load(folder)


def test_a_checkpoint(trap, tmp_path):
    parts = ("step", "run", "extra", "modules", "optimisers")
    torch.save(dict.fromkeys(parts, trap), tmp_path / loop.CHECKPOINT)
    with pytest.raises(Failed, match="is damaged, or of an earlier version"):
        loop.checkpoint(tmp_path)


def test_an_array_in_the_cache(trap, tmp_path, monkeypatch):
    """Even one whose note is in order, as whoever may write into the cache can make it."""
    monkeypatch.setenv("FACEADV_CACHE", str(tmp_path))
    cache.array("room", "name", "key", lambda: np.zeros(1))
    file = tmp_path / "room" / "name-key" / "array.npy"
    np.save(file, np.array([trap], dtype=object), allow_pickle=True)
    facts = {"bytes": file.stat().st_size, "sha256": cache.sha256(file)}
    note = {"version": cache.VERSION, "files": {"array.npy": facts}}
    file.with_name("entry.json").write_text(json.dumps(note))
    with pytest.raises(ValueError, match="allow_pickle"):
        cache.array("room", "name", "key", lambda: np.zeros(1))


def test_yaml(trap, tmp_path, monkeypatch):
    code = f'!!python/object/apply:builtins.open ["{trap.place}", "w"]'
    yaml.unsafe_load(code).close()
    Path(trap.place).unlink()
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "orl.yaml").write_text(f"all: {code}\n")
    monkeypatch.setattr(profiles, "NOTEBOOKS", tmp_path)
    with pytest.raises(UserError, match="orl"):
        profiles.parameters("orl", tmp_path / "00_a.ipynb")
    with pytest.raises(Invalid):  # of a value on the command line
        profiles._checked(code, "int", None, False, "steps", text=True)


def test_nothing_else_reads_what_could_hold_code():
    wrong = r"weights_only=False|allow_pickle=True|yaml\.(load|unsafe|full)(?!.*_Loader\))|pickle\.loads?\("
    wrong += r"|\beval\(|joblib|hub\.load"
    files = [path for path in (PROJECT / "faceadv").rglob("*.py") if path.name != "guard.py"]  # runs tests of teachers
    assert [path.name for path in files if re.search(wrong, path.read_text().replace(".eval(", ""))] == []
    assert issubclass(profiles._Loader, yaml.SafeLoader)
    loads = [call for path in files for call in re.findall(r"torch\.load\([^\n]*", path.read_text())]
    assert len(loads) == 2
    assert all("weights_only=True" in call for call in loads)

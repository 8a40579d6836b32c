"""The training loop: what a kill, a damaged file, a full disk and another run's checkpoint do; what ship writes."""

import errno
import importlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from faceadv import errors, training
from faceadv.networks import a3gn, prior, puface, resgn
from faceadv.store import weights
from faceadv.training import loop
from faceadv.training import prior as train_prior

SMALL = {
    "resgn": {"steps": 8, "batch": 2, "blocks": 1, "width": 8},
    "puface": {"steps": 8, "batch": 2, "widths": (8, 16, 24)},
    "a3gn": {"steps": 8, "batch": 2, "blocks": 2, "width": 8},
    "prior": {"steps": 8, "batch": 2, "side": 16, "widths": (16, 32)},
}


@pytest.fixture
def trained(orl, dlib, monkeypatch):
    """``trained(name, out, settings…)``: a small training on ten people of ORL, a checkpoint every three steps."""
    data = orl[:100]
    chips = np.array(data.chips)
    inputs = {
        "resgn": (data, dlib),
        "puface": (chips, np.where(np.arange(112) % 4 < 2, chips, chips // 8 * 8), [dlib]),
        "a3gn": (data, dlib),
        "prior": (chips,),
    }
    monkeypatch.setattr(loop, "EVERY", 3)

    def train(name, out, resume=False, seed=0, **settings):
        recipe = importlib.import_module(f"faceadv.training.{name}")
        network, log = recipe.train(*inputs[name], SMALL[name] | settings, out=out, resume=resume, seed=seed)
        return (network[0] if name == "resgn" else network), log

    return train


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("name", training.RECIPES)
def test_a_killed_and_resumed_training_ends_with_the_same_weights(name, trained, tmp_path, killed_after):
    whole, log = trained(name, tmp_path / "whole")
    assert [row["step"] for row in log] == list(range(1, 9))
    assert not whole.training
    assert not any(p.requires_grad for p in whole.parameters())
    killed_after(5)
    with pytest.raises(KeyboardInterrupt):
        trained(name, tmp_path / "cut")
    assert loop.checkpoint(tmp_path / "cut")["step"] == 3
    assert not (tmp_path / "cut" / "log.jsonl").read_text().endswith("\n")  # torn
    resumed, rest = trained(name, tmp_path / "cut", resume=True)
    assert same(whole, resumed)
    assert [row["step"] for row in rest] == list(range(1, 9))
    texts = [(tmp_path / run / "log.jsonl").read_text() for run in ("whole", "cut")]
    assert texts[0] == texts[1]
    untrained, log = trained(name, None, steps=0)
    assert log == []
    assert not same(whole, untrained)


def test_a_second_training_in_the_same_folder_is_refused_at_once(trained, tmp_path, monkeypatch):
    append, told = loop.append, []

    def second(path, row):
        append(path, row)
        if row["step"] == 4 and not told:
            told.append("about to be told")
            with ThreadPoolExecutor(1) as pool:
                told.append(pool.submit(trained, "prior", tmp_path, resume=True).exception())
                told.append(pool.submit(loop.run, "prior", "smoke", out=tmp_path).exception())

    monkeypatch.setattr(loop, "append", second)
    monkeypatch.setattr(train_prior, "photos", lambda *_: pytest.fail("it loads photos before it looks"))
    first, _ = trained("prior", tmp_path)
    for error in told[1:]:
        assert isinstance(error, errors.Failed)
        assert str(error) == f"Another training is at work in {tmp_path}: wait for its end, or name another folder."
    again, log = trained("prior", tmp_path, resume=True)  # nobody is at work any more
    assert same(first, again)
    assert [row["step"] for row in log] == list(range(1, 9))


def test_a_process_that_is_killed_while_it_writes_a_checkpoint(orl, tmp_path):
    chips, settings = np.asarray(orl.chips[:9]), SMALL["prior"]
    code = (  # the other recipes take longer to import
        "import os, signal, sys\nfrom pathlib import Path\nfrom faceadv import faces\n"
        "from faceadv.training import loop, prior\n"
        "def write(path, content):\n"
        "    with open(path, 'wb') as file:\n"
        "        file.write(content if not (path.parent / 'last.pt').exists() else content[:1000])\n"
        "    if (path.parent / 'last.pt').exists():\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.write_bytes, loop.EVERY = write, 3\n"
        f"prior.train(faces.load('orl').chips[:9], {settings!r}, out=Path(sys.argv[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path / "cut"], check=False).returncode == -9
    assert len(list((tmp_path / "cut").glob(".last.pt.*"))) == 1  # half a checkpoint
    assert loop.checkpoint(tmp_path / "cut")["step"] == 3
    resumed, _ = train_prior.train(chips, settings, out=tmp_path / "cut", resume=True)
    assert same(resumed, train_prior.train(chips, settings)[0])


@pytest.mark.parametrize(
    ("other", "said"), [({"seed": 1}, "another seed:"), ({"steps": 9}, "another steps:"), ({"lr": 1e-5}, "another lr:")]
)
def test_another_runs_checkpoint_is_refused(trained, tmp_path, other, said):
    first, _ = trained("prior", tmp_path)
    with pytest.raises(errors.Invalid, match=said) as caught:
        trained("prior", tmp_path, resume=True, **other)
    assert "\n" not in str(caught.value)
    again, log = trained("prior", tmp_path, resume=True)  # it was left as it was
    assert same(first, again)
    assert len(log) == 8


def test_a_forgotten_option_deletes_no_checkpoint(trained, tmp_path, monkeypatch):
    trained("prior", tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(errors.Invalid, match="resume it, name another folder, or delete it"):
        trained("prior", tmp_path)
    monkeypatch.setattr(train_prior, "photos", lambda *_: pytest.fail("photos were aligned first"))
    with pytest.raises(errors.Invalid, match="is of an earlier run"):
        loop.run("prior", "smoke", out=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_of_other_data_or_another_network_is_refused(trained, orl, tmp_path):
    trained("prior", tmp_path)
    with pytest.raises(errors.Invalid, match="another data:"):
        train_prior.train(np.array(orl.chips[50:150]), SMALL["prior"], out=tmp_path, resume=True)
    with pytest.raises(errors.Invalid, match="another recipe, "):
        trained("puface", tmp_path, resume=True)
    with pytest.raises(errors.Invalid, match="holds a training of prior, not of puface"):
        loop.ship("puface", out=tmp_path)


def test_a_fresh_start_removes_the_old_run(trained, tmp_path, killed_after):
    trained("a3gn", tmp_path)
    assert len(list(tmp_path.glob("sheet-*.png"))) == 3
    with Image.open(tmp_path / "sheet-000008.png") as sheet:
        assert sheet.size == (2 * 114 + 2, 4 * 114 + 2)
    (tmp_path / "last.pt").unlink()  # as the error tells one to
    killed_after(2)  # before its first checkpoint
    with pytest.raises(KeyboardInterrupt):
        trained("a3gn", tmp_path, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert [row["step"] for row in loop.read_log(tmp_path / "log.jsonl")] == [1]


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "another"])
def test_a_damaged_checkpoint_is_one_sentence_and_stops_no_fresh_start(trained, tmp_path, damage):
    trained("prior", tmp_path, steps=2)
    path = tmp_path / "last.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[:-1000], "flipped": content, "text": b"<html>", "empty": b""}.get(damage, whole))
    if damage == "another":
        torch.save({"step": 8, "network": {}}, path)  # as an earlier version wrote them
    (tmp_path / "log.jsonl").write_text("neither\nis this\n")
    with pytest.raises(errors.Failed, match="is damaged, or of an earlier version") as caught:
        trained("prior", tmp_path, resume=True, steps=2)
    assert "\n" not in str(caught.value)
    path.unlink()
    trained("prior", tmp_path, steps=2)
    assert len(loop.read_log(tmp_path / "log.jsonl")) == 2


def test_a_full_disk_leaves_what_the_next_resume_repairs(trained, tmp_path, monkeypatch):
    whole, _ = trained("prior", tmp_path / "whole")

    def full(path, mode, encoding):
        if not path.exists() or len(path.read_text().splitlines()) < 4:
            return open(path, mode, encoding=encoding)
        path.write_text(path.read_text() + '{"step": 5, "lo')
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "open", full, raising=False)
        with pytest.raises(errors.Failed, match=r"No space left on device.*make room") as caught:
            trained("prior", tmp_path / "full")
    assert "\n" not in str(caught.value)
    log = tmp_path / "full" / "log.jsonl"
    assert log.read_text().endswith('{"step": 5, "lo')
    assert [row["step"] for row in loop.read_log(log)] == [1, 2, 3, 4]  # it can be read meanwhile
    resumed, _ = trained("prior", tmp_path / "full", resume=True)
    assert same(whole, resumed)
    assert log.read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_a_folder_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.Failed, match="cannot be written"):
        trained("prior", tmp_path / "file" / "run")


def test_logs(tmp_path):
    path = tmp_path / "log.jsonl"
    for step in range(1, 6):
        loop.append(path, {"step": step, "a": step / 3, **({"b": 1.0} if step == 5 else {})})
    assert path.read_text().splitlines()[0] == '{"step": 1, "a": 0.333333}'
    means = loop.read_log(path, every=3)
    assert [row["step"] for row in means] == [3, 5]
    assert means[0]["a"] == pytest.approx(2 / 3, abs=1e-6)
    assert means[1] == {"step": 5, "a": 1.5, "b": 1.0}
    for torn in ('{"step": 6', '{"step": 6, "a": 2.0}', "\0\0\0"):
        path.write_text(path.read_text() + torn)
        assert [row["step"] for row in loop.read_log(path)] == [1, 2, 3, 4, 5]
        loop.write_log(path, loop.read_log(path))
    path.write_text('{"step": 1, "a": \n{"step": 2, "a": 1}\n')
    with pytest.raises(errors.Failed, match="is damaged"):
        loop.read_log(path)


def test_the_rate_never_exceeds_its_peak():
    for steps in range(1, 200):
        assert max(loop.one_cycle(step, steps, 1e-3) for step in range(steps)) <= 1e-3
    rates = [loop.one_cycle(step, 100, 1.0) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10:] == pytest.approx(0.5 + 0.5 * np.cos(np.pi * np.arange(90) / 90))
    assert (loop.one_cycle(0, 6, 1), loop.one_cycle(0, 1, 1), loop.one_cycle(2, 25, 1)) == (1, 1, 1)


# that of resgn has three parts; a training of one step is shipped by another test for each recipe
@pytest.mark.parametrize(("name", "steps"), [("resgn", 1), ("resgn", 2), ("resgn", 3), ("prior", 2)])
def test_very_short_trainings(name, steps, trained):
    assert len(trained(name, None, steps=steps)[1]) == steps


def test_unknown_names(trained):
    with pytest.raises(errors.Invalid, match=r'no setting "step".*did you mean steps'):
        trained("prior", None, step=3)
    with pytest.raises(errors.Invalid, match="did you mean resgn"):
        loop.run("regsn")
    with pytest.raises(errors.Invalid, match='prior has no profile "lwf"; there are lfw'):
        loop.run("prior", "lwf")
    with pytest.raises(errors.Missing, match="There is no checkpoint"):
        loop.ship("prior", "smoke", out="/nowhere")


LOAD = {
    "resgn": resgn.load,
    "puface": puface.load,
    "a3gn": a3gn.load,
    "prior": lambda: prior.load()[0],
}


@pytest.fixture
def as_lfw(orl, monkeypatch):
    """ORL in LFW's place, which takes minutes to align; the list of all roots that it was asked for."""
    roots, few = [], orl.people(orl.names[:20])
    monkeypatch.setattr("faceadv.faces.load", lambda name, root=None: roots.append(root) or few)
    monkeypatch.setattr("faceadv.pairs.lfw_people", lambda faces, which: faces.names)
    return roots


@pytest.mark.parametrize("name", training.RECIPES)
def test_the_command_trains(name, as_lfw, tmp_path, monkeypatch):
    settings = importlib.import_module(f"faceadv.training.{name}").SETTINGS
    monkeypatch.setitem(settings, "smoke", settings["smoke"] | {"steps": 2, "batch": 2})
    assert loop.run(name, "smoke", seed=3, root="/photos", out=tmp_path) == tmp_path
    assert set(as_lfw) == {"/photos"}
    state = loop.checkpoint(tmp_path)
    assert (state["step"], state["run"]["seed"]) == (2, 3)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize("profile", ["smoke", "lfw", "paper"])
@pytest.mark.parametrize("name", training.RECIPES)
def test_what_ships_can_be_loaded_whatever_the_profile(name, profile, trained, as_lfw, tmp_path, monkeypatch):
    recipe = importlib.import_module(f"faceadv.training.{name}")
    settings = recipe.SETTINGS[profile] | {"steps": 1, "batch": 2}
    settings |= {"texture": "recogniser"} if name == "resgn" else {}
    monkeypatch.setitem(SMALL, name, settings)
    if profile != "smoke":  # the sizes count, and a step of the large networks takes seconds
        train = loop.train

        def idle(plan, *rest):
            plan.step, plan.sheet = lambda number, draw: {"loss": 0.0}, None
            return train(plan, *rest)

        monkeypatch.setattr(loop, "train", idle)
    network, _ = trained(name, tmp_path / "run")
    models = tmp_path / "models"
    models.mkdir()
    monkeypatch.setattr(weights, "SHIPPED", models)
    monkeypatch.setattr(train_prior.ddnm, "sample", lambda *_: torch.rand(2, 3, 8, 8))
    path = loop.ship(name, profile, tmp_path / "run", root="/photos")
    assert as_lfw == []
    assert path == models / ("prior" if name == "prior" else f"{name}.safetensors")
    assert weights.check_one(name) == (True, f"{name}: SHA-256 as shipped")
    assert loop.read_log(models / f"{name}.log.jsonl") == loop.read_log(tmp_path / "run" / "log.jsonl")
    loaded, expected = LOAD[name]().state_dict(), network.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.allclose(loaded[k].float(), v, atol=1e-3) for k, v in expected.items() if v.is_floating_point())
    sizes = {"a3gn": ["width", "blocks"], "puface": ["widths"], "resgn": ["blocks", "width", "shrink"]}
    for size in sizes.get(name, []):
        assert torch.equal(load_file(path)[size], torch.tensor(settings[size])), size


def test_an_unfinished_training_does_not_ship(trained, tmp_path, killed_after):
    killed_after(5)
    with pytest.raises(KeyboardInterrupt):
        trained("prior", tmp_path)
    with pytest.raises(errors.Invalid, match="has made 3 of 8 steps: resume it first"):
        loop.ship("prior", out=tmp_path)

"""Everything on a GPU that is not there (see emulated_gpu/emulated.py): the same numbers as on the CPU, no mixing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from faceadv import (
    adaptive,
    align,
    attacks,
    classic,
    classifiers,
    cli,
    cloaks,
    ddnm,
    deidentify,
    errors,
    faces,
    images,
    metrics,
    objectives,
    pairs,
    plots,
    precision,
    purifiers,
    recognisers,
    trackers,
    verification,
)
from faceadv.benchmark import cell
from faceadv.networks import a3gn, prior
from faceadv.training import a3gn as train_a3gn
from faceadv.training import loop
from faceadv.training import prior as train_prior
from faceadv.training import puface as train_puface
from faceadv.training import resgn as train_resgn

WHERE = os.environ.get("FACEADV_TEST_DEVICE", "emulated")  # benchmarks/gpu.py runs these tests on a real one
if WHERE == "emulated":  # known to torch, it would break the backward pass on a real one
    sys.path.insert(0, str(Path(__file__).parent / "emulated_gpu"))
    import emulated

# how far a real GPU's numbers, and its pixels, may be from the CPU's
LOOSE = {} if WHERE == "emulated" else {"rtol": 1e-4, "atol": 1e-5}
NEAR = 1e-4 if WHERE == "emulated" else 1e-3
only_emulated = pytest.mark.skipif(WHERE != "emulated", reason="about the emulated device")


@pytest.fixture(autouse=True)
def device():
    if WHERE != "emulated":
        yield torch.device(WHERE, 0)
        return
    with emulated.Device():
        yield emulated.DEVICE


@pytest.fixture(scope="module")
def chips(orl):
    """Two photos of each of four people, and photos to compare with."""
    return orl[np.arange(8) * 5].images, orl[np.arange(8) * 5 + 1].images


def pair(device):
    """dlib's recogniser on the CPU, and on the device, both in float32."""
    return recognisers.load("dlib", precision="float32"), recognisers.load("dlib", device, "float32")


ATTACKS = {
    "FGSM": lambda x, o: attacks.fgsm(x, o, eps=4 / 255),
    "I-FGSM": lambda x, o: attacks.ifgsm(x, o, eps=4 / 255, alpha=1 / 255, steps=2, keep_best=True),
    "I-FGVM": lambda x, o: attacks.ifgvm(x, o, eps=4 / 255, alpha=1.0, steps=2),
    "P-FGVM": lambda x, o: attacks.pfgvm(x, o, alpha=0.5, lam=0.1, steps=2),
    "PGD": lambda x, o: attacks.pgd(x, o, eps=4 / 255, steps=3, stop_early=True, batch=3),
    "PGD, L2": lambda x, o: attacks.pgd(x, o, eps=2.0, steps=2, norm="l2"),
    "MI-FGSM": lambda x, o: attacks.mifgsm(x, o, eps=4 / 255, steps=2),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_give_what_they_give_on_the_cpu(attack, chips, device):
    x, references = chips[0][:4], chips[1][:4]
    made = []
    for where, recogniser in zip(("cpu", device), pair(device)):
        known = recognisers.embed_all(recogniser, references)
        for goal in (objectives.dodging, objectives.impersonation):
            objective = goal(recogniser, known, 0.4)
            attacked = ATTACKS[attack](x.to(where), objective)
            assert attacked.device.type == torch.device(where).type
            made.append((attacked.cpu(), objectives.success(objective, attacked)))
    for (cpu, won), (gpu, won_there) in zip(made[:2], made[2:]):
        # a sign can turn where a gradient is 0 up to rounding
        assert ((cpu - gpu).abs() > NEAR).float().mean() < 0.01
        assert torch.equal(won, won_there)


@only_emulated
def test_an_attack_does_not_wait_for_the_device_in_its_loop(chips, device):
    recogniser = pair(device)[1]
    objective = objectives.dodging(recogniser, recognisers.embed_all(recogniser, chips[1][:2]))
    through = adaptive.through(purifiers.load("resgn", device), objective)
    x, waits = chips[0][:2].to(device), []
    for goal in (objective, through):
        for options in ({}, {"keep_best": True}):
            for steps in (1, 3):
                before = emulated.waits
                attacks.pgd(x, goal, eps=4 / 255, steps=steps, **options)
                waits.append(emulated.waits - before)
            assert waits[-1] == waits[-2], "each step waits"


def test_a_gradient_that_is_not_finite_is_still_found(chips, device):
    def nothing(x, rows, exact=False):
        return (x.sum((1, 2, 3)) * 0 + 1).log().sqrt() * x.sum((1, 2, 3)), torch.zeros(len(x), dtype=bool).to(x.device)

    for where in ("cpu", device):
        with pytest.raises(errors.Failed, match="not finite"):
            attacks.pgd(chips[0][:2].to(where), nothing, eps=4 / 255, steps=2)


@pytest.fixture(scope="module")
def small_prior():
    torch.manual_seed(0)
    unet = prior.build(16, (16, 32)).eval().requires_grad_(False)
    return unet, prior.load()[1]


def purifier(name, where, small_prior):
    if name in ("two-stage", "super-resolution", "colourisation"):
        stages = "both" if name == "two-stage" else name
        return ddnm.TwoStage(*small_prior, steps=1, stages=stages).to(where).eval()
    if name == "diffpure":
        return ddnm.DiffPure(*small_prior, steps=1).to(where).eval()
    return purifiers.load(name, where)


def test_an_own_defence_has_its_gradient_wherever_its_network_lies(device, monkeypatch):
    """Before, one on the GPU was taken for one without a gradient, and met a weaker attacker."""
    monkeypatch.setenv("FACEADV_DEVICE", device.type)
    for where in ("cpu", device):
        weight = torch.full((1,), 0.5, device=where)
        assert adaptive.differentiable(lambda x, weight=weight: x * weight.reshape(1, 1, 1, 1).expand_as(x))
    assert not adaptive.differentiable(lambda x: (x * 255).round() / 255)
    assert not adaptive.differentiable(lambda x: x.detach())


@pytest.mark.parametrize("name", purifiers.PURIFIERS)
def test_purifiers_plain_adaptive_and_by_bpda(name, chips, device, small_prior):
    x, seen = chips[0][:2], []
    for where in ("cpu", device):
        with torch.no_grad():
            seen.append(purifier(name, where, small_prior)(x.to(where)).cpu())
    torch.testing.assert_close(*seen, atol=0.02 if "stage" in name or name == "diffpure" else 1e-3, rtol=0)
    recogniser, defence = pair(device)[1], purifier(name, device, small_prior)
    objective = objectives.dodging(recogniser, recognisers.embed_all(recogniser, chips[1][:2]))
    ways = [adaptive.straight_through(defence)]
    if name not in ("jpeg", "bit-depth"):
        ways.append(defence)
    if isinstance(defence, ddnm.TwoStage):
        ways = [ddnm.measured(defence), ddnm.Shortened(defence, steps=1).eval()]
    for way in ways:
        made = attacks.pgd(x.to(device), adaptive.through(way, objective), eps=4 / 255, steps=1)
        assert made.device == device
        assert 0 < (made.cpu() - x).abs().max() <= 4 / 255 + 1e-6


def test_cloaks(chips, device):
    x = chips[0][:2]
    for where, e in zip(("cpu", device), pair(device)):
        own = cloaks.features(e, x.to(where))
        public = cloaks.features(e, chips[1].to(where))
        shifts = cloaks.target_shifts([own], [public], torch.arange(8) // 2)
        made = [
            cloaks.fawkes(x.to(where), [e], steps=2),
            cloaks.fawkes_targeted(x.to(where), [e], shifts, mode="low", steps=2),
            cloaks.lowkey(x.to(where), [e], steps=2),
            cloaks.fawkes(x.to(where), [adaptive.purified(e, purifiers.load("puface", where))], steps=1),
        ]
        if where == "cpu":
            expected = made
    for a, b in zip(expected, made):
        assert b.device == device
        assert ((a - b.cpu()).abs() > 0.002).float().mean() < 0.01
    again = cloaks.cached("devices", lambda z: z.flip(3), x.to(device), [e])
    torch.testing.assert_close(again.cpu(), x.flip(3), atol=0.003, rtol=0)


def test_classifiers_and_trackers(orl, device):
    few = orl.people(orl.names[:4])
    few.__dict__.pop("images", None)
    x, y = few.images.to(device), few.labels
    assert x.device == device
    recogniser = pair(device)[1]
    _, losses = classifiers.model_a(x, y, 4, epochs=2)
    assert losses[-1] < losses[0]
    model_b, _ = classifiers.model_b(x, y, 4, recogniser.network, epochs=20)
    scores = classifiers.logits(model_b, x)
    assert (scores.argmax(1) == y).float().mean() > 0.9
    targets = classifiers.targets(scores, y, "second")
    for rule in ("random", "second", "farthest"):
        chosen = classifiers.targets(scores.to(device), y.to(device), rule)
        assert torch.equal(chosen.cpu(), classifiers.targets(scores, y, rule))
    for goal, labels in ((objectives.targeted, targets), (objectives.untargeted, y)):
        made = attacks.pgd(x[:4], goal(model_b, labels[:4], fast=False), eps=8 / 255, steps=2)
        assert made.device == device
    embeddings = recognisers.embed_all(recogniser, x)
    head = classifiers.linear_head(embeddings.to(device), y)
    assert (head(embeddings.to(device)).argmax(1).cpu() == y).float().mean() > 0.9
    train = trackers.split(y)
    for tracker in (trackers.nearest_neighbour, trackers.logistic_regression):
        success, normal = trackers.judge(tracker, embeddings, embeddings.flip(1), embeddings, y, train, [0])
        assert normal.nanmean() > 0.9
        there = trackers.judge(
            tracker, embeddings.to(device), embeddings.flip(1).to(device), embeddings.to(device), y, train, [0]
        )
        torch.testing.assert_close((success, normal), there, rtol=0, atol=0, equal_nan=True)
    small = torch.nn.functional.avg_pool2d(x, 4)
    trackers.judge(lambda *data: trackers.end_to_end(*data, epochs=1), small, small.flip(3), small, y, train, [[0, 1]])


def test_what_leads_to_numbers_and_pictures_takes_any_device(orl, chips, device):
    x, moved = chips[0].to(device), images.quantise(chips[0] * 0.9).to(device)
    for measure in (metrics.l2, metrics.linf, metrics.ssim):
        value = measure(x, moved)
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, measure(x.cpu(), moved.cpu()), **LOOSE)
    assert metrics.rate(x[:, 0, 0, 0] > 0, x[:, 0, 0, 0] > 0.5)[0] == 1
    assert images.jpeg(x, 75).device == device
    assert all(method(x, strength).device == device for method, strength in classic.METHODS.values())
    plots.grid(x, columns=8)
    plots.attacks(x[:2], moved[:2], x[:2], [("", "")] * 2)
    assert plots.array(x[0, 0]).shape == (112, 112)
    recogniser = pair(device)[1]
    there = faces.load("orl", device=device)[:20]
    assert there.images.device == device
    assert there.people(there.names[:2]).images.device == device
    found = recognisers.embed_faces(recogniser, there)
    every = pairs.all_pairs(there)
    d = verification.pair_distances(recogniser, found.to(device), every)
    np.testing.assert_allclose(d, verification.pair_distances(recogniser, found, every), atol=1e-5)


def test_a3gn(chips, device):
    recogniser = pair(device)[1]
    wanted = recognisers.embed_all(recogniser, chips[1])
    there = a3gn.load().to(device)(chips[0].to(device), wanted)
    torch.testing.assert_close(there.cpu(), a3gn.load()(chips[0], wanted), atol=1e-3, rtol=0)


def recipes(orl, dlib):
    """Each recipe with what it learns from, the recogniser on a device."""
    data = orl[:40]
    photos = np.array(data.chips)
    cloaked = photos // 8 * 8
    small = {"steps": 2, "batch": 2}
    return {
        "resgn": (train_resgn, lambda e: (data, e), small | {"blocks": 1, "width": 8}),
        "puface": (train_puface, lambda e: (photos, cloaked, [e]), small | {"widths": (8, 16, 24)}),
        "a3gn": (train_a3gn, lambda e: (data, e), small | {"blocks": 2, "width": 8}),
        "prior": (train_prior, lambda e: (photos,), small | {"side": 16, "widths": (16, 32)}),
    }


@pytest.mark.parametrize("name", ["resgn", "puface", "a3gn", "prior"])
def test_a_training_begun_on_the_device_ends_on_the_cpu(name, orl, dlib, device, tmp_path, monkeypatch, killed_after):
    recipe, data, settings = recipes(orl, dlib)[name]
    monkeypatch.setattr(loop, "EVERY", 1)
    killed_after(2)
    with pytest.raises(KeyboardInterrupt):
        recipe.train(*data(pair(device)[1]), settings, out=tmp_path, seed=1, device=device)
    network, log = recipe.train(*data(pair(device)[0]), settings, out=tmp_path, seed=1, resume=True)
    assert [row["step"] for row in log] == [1, 2]
    network = network[0] if name == "resgn" else network
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("attack", "defence", "goal", "way"),
    [
        ("PGD", "none", "dodging", "static"),
        ("noise", "jpeg", "impersonation", "bpda"),
        ("P-FGVM", "resgn", "dodging", "gradient"),
        ("A3GN", "randomization", "impersonation", "static"),
        ("PGD", "two-stage", "dodging", "measured"),
    ],
)
def test_cells_of_the_benchmark(attack, defence, goal, way, device, small_prior, monkeypatch):
    monkeypatch.setattr(cell, "_prior", lambda: small_prior)
    for cached in (cell._pairs, cell._recogniser, cell._enrolled, cell._made):
        cached.cache_clear()
    one = cell.Cell(attack, defence, "dlib", goal, way)
    settings = {"pair_count": 2, "slow_pair_count": 1, "seeds": (0,), "steps": 2, "slow_steps": 1}
    settings |= {"sampling_steps": 1, "surrogate_steps": 1, "eot_samples": 1}
    rows = [cell.measure(one, cell.Settings(**settings, device=str(where))) for where in ("cpu", device)]
    assert rows[0]["right"] == rows[1]["right"]
    np.testing.assert_allclose(rows[0]["distance"], rows[1]["distance"], atol=0.05)
    versions = {cell.version(one, cell.Settings(**settings, device=str(where))) for where in ("cpu", device)}
    assert len(versions) == 2


def test_distances_of_embeddings_from_two_devices(chips, device):
    recogniser = pair(device)[1]
    a, b = recognisers.embed_all(recogniser, chips[0]), recognisers.embed_all(recogniser, chips[1])
    there = recogniser.distance(a.to(device), b)
    assert there.device == device
    torch.testing.assert_close(there.cpu(), recogniser.distance(a, b.to(device)))


def test_photos_to_train_resgn_on_of_people_who_have_no_other(chips, device):
    x, labels = chips[0].to(device), torch.arange(8)  # whoever dodges has only the own mirror image
    recogniser = pair(device)[1]
    known, draw = recognisers.embed_all(recogniser, x), torch.Generator().manual_seed(0)
    made = train_resgn.adversarial(x, labels, known, torch.arange(8), recogniser, draw)
    assert made.device == device
    assert 1 / 255 < (made - x).abs().max().item() <= 10.01 / 255


def test_photos_to_train_puface_on(orl, device, monkeypatch):
    monkeypatch.setattr("faceadv.faces.load", lambda name, root=None: orl)
    monkeypatch.setattr("faceadv.pairs.lfw_people", lambda faces, which: faces.names[:10])
    few = {"photos": 3, "cloak_steps": 1}
    monkeypatch.setitem(train_puface.SETTINGS, "smoke", train_puface.SETTINGS["smoke"] | few)
    natural, cloaked, extractors = train_puface.photos("smoke", device=device)
    assert (natural != cloaked).any()
    assert all(recognisers.device_of(extractor) == device for extractor in extractors)


def test_deidentify(orl, device):
    recogniser = pair(device)[1]
    photo = align.read_photo(orl.files[0])
    after = deidentify.protect(photo, orl.matrices[0], [recogniser], steps=2)
    assert after.shape == photo.shape
    assert (after != photo).any()


@only_emulated
def test_a_device_that_is_not_there_is_one_sentence(device, monkeypatch):
    assert precision.device("emulated").type == "emulated"
    for name in ("cuda:9", "cpu:7", "gpu", ""):
        with pytest.raises(errors.UserError, match="no device"):
            precision.device(name)
    monkeypatch.setenv("FACEADV_DEVICE", "cuda")
    with pytest.raises(errors.Missing, match="from FACEADV_DEVICE"):
        precision.device()


@only_emulated
def test_the_command_line_says_so_too(monkeypatch, capsys):
    monkeypatch.setenv("FACEADV_DEVICE", "cuda:3")
    assert cli.main(["run", "00", "--profile", "smoke"]) == 2
    assert "cuda:3" in capsys.readouterr().err


@only_emulated
def test_the_benchmark_of_a_gpu_runs_and_leaves_out_what_is_missing(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    (tmp_path / "diffusers.py").write_text("raise ImportError(name='diffusers')")  # as on a bare machine
    environment = os.environ | {
        "FACEADV_DEVICE": "emulated",
        "PYTHONPATH": str(script.parents[1] / "tests/emulated_gpu"),
    }
    command = [sys.executable, str(script), "--device", "emulated", "--small"]
    (tmp_path / "gpu.json").write_text('{"machine": {"name": "another"}, "tests": {"said": "of another machine"}}')
    seen = []
    for parts, more in ((["PGD", "DDNM", "training"], ""), (["DDNM"], f"{os.pathsep}{tmp_path}")):
        environment["PYTHONPATH"] += more
        done = subprocess.run(
            [*command, "--out", str(tmp_path / "gpu.json"), "--only", *parts],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        seen.append(json.loads((tmp_path / "gpu.json").read_text()))
    assert {"ours", "a plain loop", "torchattacks"} <= seen[0]["PGD"].keys()
    assert seen[0]["PGD"]["ours"]["accuracy left"] < 1
    assert seen[0]["DDNM"]["64 pixels"]["images a minute"] > 0
    assert all(row["steps a second"] > 0 for row in seen[0]["training"].values())
    assert "tests" not in seen[0]
    assert seen[1]["DDNM"] == {"left out": "no package diffusers"}
    assert seen[1]["PGD"] == seen[0]["PGD"]  # it was not asked for again


def test_the_readme_shows_the_record_of_a_gpu(script):
    root, gpu = Path(__file__).parents[1], script("gpu")
    record = json.loads((root / "results" / "gpu.json").read_text())
    assert f"<!-- gpu -->\n{gpu.table(record)}<!-- /gpu -->\n" in (root / "docs" / "gpu.md").read_text(encoding="utf-8")


@only_emulated
def test_the_emulated_device_refuses_what_a_gpu_refuses(device):
    there = torch.ones(3, device=device)
    for wrong in (
        lambda: there + torch.ones(3),
        lambda: there.numpy(),
        lambda: np.asarray(there),
        lambda: torch.ones(3)[there.long()],
        lambda: torch.rand(3, generator=torch.Generator(), device=device),
    ):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
    assert (there + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert there[torch.tensor([0, 1])].device == device
    before = emulated.waits
    there.sum().item()
    there[there > 0]
    assert emulated.waits - before == 2

"""Profile paper from start to end, small: on files in the published formats, under their names and in their places.

They are made here, from ORL's photos and random weights: an LFW of eight people, both FaceNets, a narrow VGG-Face, an
AlexNet, and a tiny diffusion model in the hub's cache. Nobody should pay for a GPU to find out that a notebook stops.
"""

import copy
import itertools
import os

import matplotlib.pyplot as plt
import numpy as np
import pooch
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from facenet_pytorch import InceptionResnetV1
from huggingface_hub import constants
from IPython.display import display
from PIL import Image
from test_prior import as_of_2022
from test_vgg_face import vgg
from torchvision.models import alexnet

from faceadv import records
from faceadv.course import notebook, profiles, run
from faceadv.errors import Missing
from faceadv.networks import lpips, prior
from faceadv.store import datasets, weights
from faceadv.training import puface

# with these names all people of the test half are to be reported (``pairs.lfw_people``)
PEOPLE = [datasets.SOMEBODY, *(f"Person_{letter}" for letter in "ABDEFGJ")]
# fewer of everything; what a profile is about (networks, data, methods) stays
SMALL = {
    "00_faces_and_recognisers": {"far": 0.3},
    "01_attacks": {"far": 0.3, "pairs_per_kind": 4, "steps": 2, "eps_grid_255": [8.0], "transfer_steps": 1},
    "02_deidentification": {
        **{"epochs_a": 1, "steps": 2, "attack_all": False, "tuning_photos": 3, "most_settings": 1, "far": 0.5},
    },
    "03_resgn": {
        **{"far": 0.4, "pairs_per_kind": 2, "eps_grid_255": [8.0], "pgd_steps": 2, "passes": 2, "ablation_steps": 2},
        **{"adaptive_pairs": 1, "adaptive_steps": 1, "eot_samples": 2, "adaptive_eps_255": [8.0]},
    },
    "04_puface": {
        **{"users": 2, "most_photos": 10, "fawkes_steps": 1, "lowkey_steps": 1, "unseen_steps": 1, "modes": ["mid"]},
        **{"own_network_epochs": 0, "adaptive_users": 1, "adaptive_steps": 1, "ablation_steps": 1},
    },
    "05_a3gn": {
        **{"pair_count": 6, "pgd_steps": 1, "pgd_eps_255": [4.0], "scales": [1.0], "curve_pairs": 4, "live_steps": 1},
        **{"quick_steps": [1], "levels": [0.9], "ablation_steps": 4, "far": 0.4},
    },
    "06_two_stage": {
        **{"photos": 3, "eps_grid_255": [8.0], "pgd_steps": 1, "sampling_steps": 1, "spare_photos": 2},
        **{"search_eps_255": [1.0], "timed_photos": 1, "steps_grid": [1, 2], "adaptive_photos": 2, "adaptive_steps": 1},
    },
    "07_benchmark": {
        "far": 0.02,
        **{"pair_count": 2, "slow_pair_count": 1, "repeats": 1, "attack_names": ["none", "PGD"], "steps": 1},
        **{"simple_names": [], "paper_names": ["resgn", "two-stage"], "slow_steps": 1, "sampling_steps": 1},
        **{"eot_samples": 1, "restarts": 1, "queries": 5, "curve_eps_255": [1.0], "sign_defences": ["resgn"]},
    },
}


@pytest.fixture(scope="module")
def published(orl, tmp_path_factory):
    """The folders that FACEADV_DATA, FACEADV_CACHE and HF_HOME name, after all fetches of docs/networks.md."""
    home = tmp_path_factory.mktemp("paper")
    _lfw(orl, home / "data" / "lfw")
    folder = home / "cache" / "weights"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for name, classes in (("facenet-vggface2", 8631), ("facenet-casia", 10575)):
        torch.save(_facenet(orl, classes), folder / weights.DOWNLOADS[name]["file"])
    torch.save(vgg()[1], folder / weights.DOWNLOADS["vgg-face"]["file"])
    state = {key: value for key, value in alexnet().state_dict().items() if key.startswith("features")}
    torch.save(state, folder / weights.DOWNLOADS["alexnet"]["file"])
    pipeline = DDPMPipeline(prior.build(16, (16, 32)), DDPMScheduler())
    as_of_2022(pipeline, home / "hub")
    return home


def _lfw(orl, folder):
    """Eight people; the paper on P-FGVM takes those of 30 photos, so each photo of some is there in three lights."""
    for i, name in enumerate(PEOPLE):
        place = folder / "lfw_funneled" / name
        place.mkdir(parents=True)
        lights = (1.0, 0.85, 0.7) if i in (0, 1, 3, 5) else (1.0,)
        photos = [(file, light) for file in orl.files[10 * i : 10 * i + 10] for light in lights]
        for number, (file, light) in enumerate(photos, 1):
            face = Image.open(file).convert("RGB").resize((184, 224)).point(lambda v, k=light: int(k * v))
            photo = Image.new("RGB", (250, 250), (90, 90, 90))
            photo.paste(face, (33, 13))
            photo.save(place / f"{name}_{number:04d}.jpg")
    for file, people in (("DevTrain", sorted(PEOPLE)[::2]), ("DevTest", sorted(PEOPLE)[1::2]), ("", sorted(PEOPLE))):
        same = [f"{name}\t{i}\t{j}" for name in people for i, j in itertools.combinations(range(1, 9), 2)][:100]
        other = [f"{a}\t{i}\t{b}\t{i}" for a, b in itertools.combinations(people, 2) for i in range(1, 11)][:60]
        other += [row.replace("\t1", "\t2") for row in other]
        rows = [*same, *other[:100]] if file else [*same[:50], *other[:50], *same[50:], *other[50:100]]
        header = "100" if file else "2\t50"  # folds with their same pairs before their different ones
        (folder / f"pairs{file}.txt").write_text("\n".join([header, *rows]) + "\n")


def _facenet(orl, classes):
    """The state of an InceptionResnetV1 whose random features are centred by its own batch normalisation."""
    network = InceptionResnetV1(pretrained=None, dropout_prob=0.0).train()
    for layer in network.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.momentum = None  # the mean of all batches
    x = torch.nn.functional.interpolate(orl.images[:240:10], (160, 160))
    with torch.no_grad():
        network(2 * x - 1)
    nothing = torch.zeros(1)  # the head that nobody reads takes no room in the file
    return network.state_dict() | {
        "logits.weight": nothing.expand(classes, 512),
        "logits.bias": nothing.expand(classes),
    }


@pytest.fixture
def paper(published, monkeypatch):
    """The world after ``faceadv weights fetch all`` and ``faceadv data fetch lfw``: its folder."""
    monkeypatch.setenv("FACEADV_DATA", str(published / "data"))
    monkeypatch.setenv("FACEADV_CACHE", str(published / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(published / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for row in weights.DOWNLOADS.values():  # those whose published hash is known
        if row.get("file") in weights.PUBLISHED:
            hash_here = pooch.file_hash(published / "cache" / "weights" / row["file"])
            monkeypatch.setitem(weights.PUBLISHED, row["file"], hash_here)
    halves = {"train": sorted(PEOPLE)[::2], "test": sorted(PEOPLE)[1::2]}
    monkeypatch.setattr("faceadv.pairs.dev_people", lambda names, which: halves[which])
    monkeypatch.setitem(puface.SETTINGS, "lfw", puface.SETTINGS["lfw"] | {"photos": 64, "cloak_steps": 1})
    lpips._network.cache_clear()
    yield published
    lpips._network.cache_clear()
    plt.close("all")


def execute(path, values):
    """Run the cells of a notebook in a row, with these parameters, as papermill would."""
    space, here = {"display": display}, os.getcwd()
    os.chdir(path.parent)
    try:
        for i, cell in enumerate(c for c in notebook.read(path).cells if c.cell_type == "code"):
            exec(compile(cell.source, f"{path.stem} [{i + 1}]", "exec"), space)
            if "parameters" in cell.metadata.get("tags", []):
                space |= copy.deepcopy(values)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("path", run.select("all"), ids=lambda path: path.stem)
def test_profile_paper_runs_from_start_to_end(paper, tmp_path, path):
    chosen = profiles.parameters("paper", path, SMALL[path.stem])
    execute(path, chosen | {"profile": "paper", "results_dir": str(tmp_path), "device": "cpu"})
    record = records.read(records.place(tmp_path, "paper", path.stem))
    assert record["profile"] == "paper"
    assert len(record["numbers"]) >= 4
    assert record["data"]["faces"] == "lfw"
    assert all(np.isfinite(entry["value"]) for entry in record["numbers"])


def fetched(stem):
    """The weights to fetch that a notebook's parameters name in profile paper."""
    values = profiles.parameters("paper", *run.select(stem)).values()
    named = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return sorted({name for name in named if name in weights.DOWNLOADS})


# the benchmark is left out: it goes on with the recognisers that are here, and says so
NEEDED = [(path.stem, name) for path in run.select("all")[:-1] for name in fetched(path.stem)]


@pytest.mark.parametrize(("stem", "name"), NEEDED)
def test_missing_weights_are_told_before_anything_is_loaded(tmp_path, monkeypatch, stem, name):
    find = weights.find

    def without(asked):
        if asked == name:
            raise Missing("gone")
        return tmp_path if asked in weights.DOWNLOADS else find(asked)

    monkeypatch.setattr(weights, "find", without)
    monkeypatch.setattr("faceadv.faces.load", lambda *_, **__: pytest.fail("photos were loaded first"))
    (path,) = run.select(stem)
    values = profiles.parameters("paper", path) | {"results_dir": str(tmp_path), "device": "cpu"}
    with pytest.raises(Missing, match=f"faceadv weights fetch {name}"):
        execute(path, values)

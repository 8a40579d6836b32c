"""What this package does on a GPU, for about eight minutes: python benchmarks/gpu.py

Runs the tests of devices on CUDA, each notebook in profile smoke, PGD beside a plain loop and torchattacks, DDNM at 64
and 256 pixels, and some steps of each training; prints what it finds and writes results/gpu.json. A part whose packages
or weights are missing is left out and says why; the others run. ``--device`` names another device than CUDA.
"""

import argparse
import contextlib
import copy
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))  # a bare machine has no installation of it
PATH = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])  # of the processes started here
BUDGET = 480  # seconds
BESIDE = 8  # notebooks at a time
PARTS = ("PGD", "DDNM", "training", "notebooks", "tests")
PROCESSES = ("notebooks", "tests")  # they run in processes of their own, side by side


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=PROJECT / "results" / "gpu.json")
    parser.add_argument("--small", action="store_true", help="a few seconds' worth of each part, to test this script")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="these parts")
    parser.add_argument("--table", action="store_true", help="write the table of docs/gpu.md from the record as it is")
    options = parser.parse_args()
    if options.table:
        from faceadv import records

        records.insert(PROJECT / "docs" / "gpu.md", "gpu", table(json.loads(options.out.read_text())))
        return False
    os.environ["FACEADV_DEVICE"], os.environ["FACEADV_QUIET"] = options.device, "1"
    started, found, old = time.perf_counter(), {"machine": machine(options.device)}, {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        old = json.loads(options.out.read_text())
    if old.get("machine") == found["machine"]:
        found = old  # parts that are not asked for stay as they were
    print(json.dumps(found["machine"]))
    parts = dict(zip(PARTS, (pgd, ddnm, training, notebooks, tests)))
    alone = [name for name in options.only if name not in PROCESSES]  # they are timed
    with ThreadPoolExecutor(2) as pool:
        for names in filter(None, [*([name] for name in alone), [n for n in options.only if n in PROCESSES]]):
            left = BUDGET - (time.perf_counter() - started)
            if left < 20:
                found |= {name: {"left out": f"the {BUDGET} seconds were over"} for name in names}
            else:
                each = pool.map if names[0] in PROCESSES else map  # an emulated device is there in this thread alone
                done = each(lambda n, left=left: attempt(parts[n], options.device, left, options.small), names)
                found |= dict(zip(names, done))
            for name in names:
                print(name, json.dumps(found[name]), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n")  # so that a kill loses little
    return any("failed" in str(found[name]) for name in options.only)


def machine(device):
    facts = {"device": device, "torch": torch.__version__, "cores": os.cpu_count()}
    if device.startswith("cuda"):
        facts |= {"name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def table(found):
    """The record's rates as the table of docs/gpu.md."""
    rows = {f"PGD, 20 steps on 256 chips: {name}": row for name, row in found["PGD"].items()}
    for name, row in found["DDNM"].items():
        rate = {"images a second": round(row["images a minute"] / 60, 1)}
        rows[f"two-stage restoration, 2 × 20 steps, {name}"] = row | rate
    lines = [f"| on {found['machine']['name']} | images a second | MiB |", "|---|---|---|"]
    lines += [f"| {name} | {row['images a second']:,} | {row['MiB']:,} |" for name, row in rows.items()]
    steps = [f"{name} {row['steps a second']:g}" for name, row in found["training"].items()]
    lines.append(f"| training, steps a second of 16 images | {', '.join(steps)} | |")
    return "\n".join(lines) + "\n"


def attempt(part, *arguments):
    """What a part returns, or why there is nothing."""
    try:
        return part(*arguments)
    except ImportError as e:
        return {"left out": f"no package {e.name}"}
    except FileNotFoundError as e:
        return {"left out": str(e)}
    except Exception as e:  # the other parts shall run
        return {"failed": f"{type(e).__name__}: {str(e)[:500]}"}


def wait(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(function, device, turns=3):
    """Median seconds of some turns, after one that is not counted; and the peak of the GPU's memory in MiB."""
    function()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(turns):
        wait(device)
        began = time.perf_counter()
        function()
        wait(device)
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.startswith("cuda") else 0.0
    return statistics.median(seconds), round(peak)


def pgd(device, left, small):
    """Images a second of PGD-20 against dlib's network with a head over ORL's people."""
    from torch import nn

    from faceadv import attacks, classifiers, faces, objectives, recognisers

    count, steps = (4, 2) if small else (256, 20)
    data, recogniser = faces.load("orl", device=device), recognisers.load("dlib", device)
    head = classifiers.linear_head(recognisers.embed_all(recogniser, data), data.labels).to(device)
    data = data[:count]
    model = nn.Sequential(recogniser.network, head).eval().requires_grad_(False)
    x, labels = data.images, data.labels.to(device)
    options = {"eps": 8 / 255, "alpha": 2 / 255, "steps": steps}

    def plain():
        z = x.clone()
        for _ in range(steps):
            z.requires_grad_(True)
            (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(z), labels), z)
            z = torch.min(torch.max(z.detach() + 2 / 255 * g.sign(), x - 8 / 255), x + 8 / 255).clamp(0, 1)
        return z

    found, exact = {}, objectives.untargeted(model, labels, fast=False)
    ways = {
        "ours": lambda: attacks.pgd(x, objectives.untargeted(model, labels), batch=count, **options),
        "ours, float32": lambda: attacks.pgd(x, exact, batch=count, **options),
        "a plain loop": plain,
    }
    with contextlib.suppress(ImportError):
        from torchattacks import PGD

        theirs = PGD(copy.deepcopy(model).to(memory_format=torch.contiguous_format), **options)
        theirs.device = torch.device(device)
        ways["torchattacks"] = lambda: theirs(x, labels)
    for name, way in ways.items():
        seconds, peak = timed(way, device)
        right = (classifiers.logits(model, way()).argmax(1) == data.labels).float().mean().item()
        found[name] = {"images a second": round(count / seconds, 1), "MiB": peak, "accuracy left": round(right, 3)}
    return found


def ddnm(device, left, small):
    """Images a minute of two-stage restoration, 2 x 20 steps: our prior, one of google/ddpm-celebahq-256's size."""
    from diffusers import UNet2DModel

    from faceadv import ddnm
    from faceadv.networks import prior

    unet, schedule = prior.load()
    priors = {"64 pixels": (unet, 4 if small else 64)}
    if not small:
        torch.manual_seed(0)
        big = UNet2DModel(
            sample_size=256,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
        )
        priors["256 pixels, random weights"] = (big, 8)
    found = {}
    for name, (network, count) in priors.items():
        side = network.config.sample_size
        network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        two_stage = ddnm.TwoStage(network, schedule, steps=2 if small else 20).to(device).eval()
        x = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.no_grad():
            seconds, peak = timed(lambda x=x, two_stage=two_stage: two_stage(x), device, turns=1)
        found[name] = {"images a minute": round(60 * count / seconds, 1), "MiB": peak}
    return found


def training(device, left, small):
    """Steps a second of each recipe at the size of profile lfw, on ORL's chips."""
    import numpy as np

    from faceadv import faces, recognisers
    from faceadv.training import RECIPES

    data, recogniser, found = faces.load("orl")[:200], recognisers.load("dlib", device), {}
    photos = np.array(data.chips)
    inputs = {
        "resgn": (data, recogniser),
        "puface": (photos, photos // 8 * 8, [recogniser]),
        "a3gn": (data, recogniser),
    }
    inputs["prior"] = (photos,)
    few, many = (1, 2) if small else (5, 25)
    for name in sorted(inputs.keys() & set(RECIPES)):
        recipe = importlib.import_module(f"faceadv.training.{name}")
        settings = recipe.SETTINGS["smoke" if small else "lfw"]
        recipe.train(*inputs[name], settings | {"steps": few}, device=device)  # kernels are chosen in the first steps
        seconds = []
        for steps in (few, many):
            wait(device)
            began = time.perf_counter()
            recipe.train(*inputs[name], settings | {"steps": steps}, device=device)
            wait(device)
            seconds.append(time.perf_counter() - began)
        found[name] = {"steps a second": round((many - few) / max(seconds[1] - seconds[0], 1e-9), 2)}
    return found


def notebooks(device, left, small):
    """Seconds of each notebook in profile smoke: by papermill if it is here, else its cells are executed in a row."""
    paths = sorted((PROJECT / "notebooks").glob("0*.ipynb"))[: 1 if small else None]

    def one(path):
        began = time.perf_counter()
        problem = attempt(execute, path, Path(out), device)
        return problem or {"seconds": round(time.perf_counter() - began, 1)}

    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(min(BESIDE, os.cpu_count())) as pool:
        return dict(zip((path.stem for path in paths), pool.map(one, paths)))


def execute(path, out, device):
    """Run a notebook in profile smoke; None, or what was wrong."""
    with contextlib.suppress(ImportError):
        from faceadv.course import run

        (result,) = run.run([path.stem], "smoke", {"device": device}, out=out / path.stem, fresh=True)
        return {"failed": result.error} if result.error else None
    cells = json.loads(path.read_text())["cells"]
    profile = yaml.safe_load((path.parent / "profiles" / "smoke.yaml").read_text())
    values = (profile.get("all") or {}) | (profile.get(path.stem) or {}) | {"device": device}
    script = ["import matplotlib", "matplotlib.use('Agg')", "display = print"]
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        script.append("".join(cell["source"]))
        if "parameters" in cell["metadata"].get("tags", []):
            script += [f"{name} = {value!r}" for name, value in values.items()]
    script = "\n\n".join(script)
    options = {"cwd": path.parent, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": PATH}, **options)
    return {"failed": done.stderr.strip().splitlines()[-1]} if done.returncode else None


def tests(device, left, small):
    """The suite's tests of devices, on the real one."""
    import pytest  # noqa: F401  (is it here?)

    picked = ["-k", "numbers_and_pictures"] if small else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_devices.py", *picked]
    environment = os.environ | {"FACEADV_TEST_DEVICE": device, "FACEADV_DEVICE": "cpu", "PYTHONPATH": PATH}
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False, timeout=left
    )
    said = {"said": (done.stdout.strip() or "nothing").splitlines()[-1]}
    return said | ({"failed": (done.stdout + done.stderr)[-1500:]} if done.returncode else {})


if __name__ == "__main__":
    sys.exit(main())

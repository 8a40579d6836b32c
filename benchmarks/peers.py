"""Our PGD beside torchattacks, foolbox and ART, and DDNM beside a plain loop: python benchmarks/peers.py

All attack the same network (a recogniser with a linear head over ORL's 40 people) with the same steps on the same
chips. The libraries get it in torch's own memory layout, as a user would give it; ours has it in channels-last, as
recognisers are loaded here. They take turns in one process. Times are medians, and ratios are medians of the turns'
ratios, with the smallest and the largest. There are three networks because the gain depends on how much of the time
goes into convolutions. Writes results/peers.json and the table in docs/measured.md.
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from facenet_pytorch import InceptionResnetV1
from safetensors.torch import save_file
from torch import nn

from faceadv import attacks, classifiers, ddnm, faces, objectives, recognisers, records, trackers
from faceadv.benchmark import grid
from faceadv.networks import facenet, prior
from faceadv.precision import has_bfloat16
from faceadv.store import progress
from faceadv.store.paths import PROJECT

NETWORKS = ("dlib", "mobilefacenet", "facenet-vggface2")
PGD = tuple(f"PGD on {name}" for name in NETWORKS)
RECORD = PROJECT / "results" / "peers.json"


def classifier_and_chips(name, count):
    """A network with logits for ORL's people, ``count`` test chips, and the labels that it gives them.

    FaceNet's weights are random where the published ones are not here, which changes no time.
    """
    data = faces.load("orl")
    try:
        recogniser = recognisers.load(name)
    except FileNotFoundError:
        recogniser = random_facenet(data[: 2 * count].images)
    embeddings, train = recognisers.embed_faces(recogniser, data), trackers.split(data.labels)
    head = classifiers.linear_head(embeddings[train], data.labels[train], C=10.0)
    model = nn.Sequential(recogniser.network, head).eval().requires_grad_(False)
    x = data[torch.where(~train)[0][:count].numpy()].images
    return model, x, classifiers.logits(model, x).argmax(1)


@torch.no_grad()
def random_facenet(chips):
    """FaceNet's architecture with random weights; only the statistics of its normalisations are those of the chips."""
    torch.manual_seed(0)
    network = InceptionResnetV1(pretrained=None)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            layer.momentum = 1.0
    network.train()(F.interpolate(chips, (160, 160)) * 2 - 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        save_file(network.state_dict(), path)
        return recognisers.Recogniser("facenet-random", facenet.FaceNet(path), 1.1, unit=True)


def contestants(model, x, labels, eps, alpha, steps):
    """By name, functions without arguments that return the attacked images."""
    import foolbox  # these three are for developers
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    def ours(fast, stop_early=False):
        objective = objectives.untargeted(model, labels, fast=fast)
        options = {"eps": eps, "alpha": alpha, "steps": steps, "seed": None, "stop_early": stop_early}
        return lambda: attacks.pgd(x, objective, **options)

    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    with_torchattacks = torchattacks.PGD(plain, eps=eps, alpha=alpha, steps=steps, random_start=False)
    with_foolbox = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=steps, random_start=False)
    seen_by_foolbox = foolbox.PyTorchModel(plain, bounds=(0, 1), device="cpu")
    seen_by_art = PyTorchClassifier(
        plain, nn.CrossEntropyLoss(), x.shape[1:], model[-1].out_features, clip_values=(0, 1), device_type="cpu"
    )
    with_art = ProjectedGradientDescent(
        seen_by_art, norm="inf", eps=eps, eps_step=alpha, max_iter=steps, batch_size=len(x), verbose=False
    )
    return {
        "faceadv": ours(fast=True),
        "faceadv, float32": ours(fast=False),
        "faceadv, stopping early": ours(fast=True, stop_early=True),
        "torchattacks": lambda: with_torchattacks(x, labels),
        "foolbox": lambda: with_foolbox(seen_by_foolbox, x, labels, epsilons=eps)[1],
        "ART": lambda: torch.from_numpy(with_art.generate(x.numpy(), labels.numpy())),
    }


def plain_ddnm(measured, operator, unet, schedule, steps, eta=0.85):
    """DDNM as in the paper: one image after the other, in float32, in the layout that diffusers gives the network."""
    A, inverse = operator
    sums, skip, made = schedule.alphas_cumprod, len(schedule.alphas_cumprod) // steps, []
    for row, y in enumerate(measured.split(1)):
        draw = torch.Generator().manual_seed(row)
        shape = inverse(y).shape[1:]
        x = torch.randn(shape, generator=draw)[None]
        for t in reversed(range(steps)):
            now, then = sums[t * skip], sums[(t - 1) * skip] if t else torch.tensor(1.0)
            e = unet(x, t * skip).sample
            x0 = ((x - (1 - now).sqrt() * e) / now.sqrt()).clamp(-1, 1)
            x0 = x0 - inverse(A(x0) - y)
            x = then.sqrt() * x0
            if t:
                noise = torch.randn(shape, generator=draw)[None]
                x = x + (1 - then).sqrt() * (eta * noise + (1 - eta**2) ** 0.5 * e)
        made.append(x)
    return torch.cat(made)


def timed(functions, repeats):
    """The seconds of each turn by name. Every function has a first turn that does not count."""
    seconds = {name: [] for name in functions}
    for turn in progress.bar(range(repeats + 1), desc="turns"):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def entries(seconds, ours, what, rest):
    """Numbers of the record: the median time of each library, and how many times as long as ours it took."""
    found = []
    for name, times in seconds.items():
        value = (statistics.median(times), min(times), max(times))
        found.append(
            records.number(f"{what}: {name}", *value, n=len(times), unit="s", how="median, least, most", **rest[name])
        )
        for base in ours:
            if name not in ours:
                ratios = [theirs / mine for theirs, mine in zip(times, seconds[base])]
                value = (statistics.median(ratios), min(ratios), max(ratios))
                how = "median, least, most of the turns' ratios"
                found.append(records.number(f"{what}: {name} / {base}", *value, n=len(ratios), how=how))
    return found


def measure(chips=32, steps=20, repeats=5, restored=8, sampling_steps=20, networks=NETWORKS, path=RECORD):
    """Run the comparison and write the record."""
    eps, alpha = 8 / 255, 2 / 255
    numbers = []
    for network in networks:
        model, x, labels = classifier_and_chips(network, chips)
        functions = contestants(model, x, labels, eps, alpha, steps)
        rest = {}
        for name, function in functions.items():
            y = function()
            assert (y - x).abs().max() <= eps + 1e-5, name
            success = 100 * (classifiers.logits(model, y).argmax(1) != labels).float().mean().item()
            rest[name] = {"note": f"success {success:.1f} %"}
        ours = ("faceadv", "faceadv, float32")
        label = network if grid.present([network]) else f"{network} (random weights)"
        numbers += entries(timed(functions, repeats), ours, f"PGD on {label}", rest)

    unet, schedule = prior.load()
    images = ddnm.resized(x[:restored], unet.config.sample_size) * 2 - 1
    operator = ddnm.super_resolution(2)
    y = operator[0](images)
    options = {"steps": sampling_steps}
    with torch.no_grad():
        restorers = {
            "faceadv": lambda: ddnm.ddnm(y, operator, unet, schedule, **options),
            "plain loop": lambda: plain_ddnm(y, operator, unet, schedule, **options),
        }
        apart = (restorers["faceadv"]() - restorers["plain loop"]()).abs().mean().item() / 2
        same = {"note": f"images differ by {apart:.4f} of the range on average"}
        numbers += entries(timed(restorers, repeats), ("faceadv",), "DDNM", dict.fromkeys(restorers, same))
    data = {
        "faces": "orl",
        "chips": len(x),
        "PGD": f"{steps} steps of 2/255 within 8/255, no random start",
        "DDNM": f"super-resolution by 2, {len(y)} images, {sampling_steps} steps",
        "threads": torch.get_num_threads(),
        "bfloat16": has_bfloat16("cpu"),
    }
    return records.write(path, notebook="peers", profile="orl", seed=0, numbers=numbers, data=data)


def table(record):
    """The record as the table of docs/measured.md: one line per library, one column per network that there still is."""
    by_name = {entry["name"]: entry for entry in record["numbers"]}
    by_name = {name: entry for name, entry in by_name.items() if name.startswith(("DDNM", *PGD))}
    columns = list(dict.fromkeys(name.split(": ")[0] for name in by_name))
    libraries = list(dict.fromkeys(name.split(": ")[1] for name in by_name if " / " not in name))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for library in libraries:
        cells = []
        for column in columns:
            entry = by_name.get(f"{column}: {library}")
            ratio = by_name.get(f"{column}: {library} / faceadv")
            plain = by_name.get(f"{column}: {library} / faceadv, float32")
            cell = f"{entry['value']:.2f} s" if entry else ""
            cell += "; {value:.2f} × [{low:.2f}, {high:.2f}]".format(**ratio) if ratio else ""
            cells.append(cell + (f"; {plain['value']:.2f} ×" if plain else ""))
        lines.append(f"| {library} | {' | '.join(cells)} |")
    notes = {entry["note"] for name, entry in by_name.items() if name.startswith("PGD") and entry["note"]}
    return "\n".join(lines) + f"\n\nAll of PGD: {', '.join(sorted(notes))}.\n"


def main():
    """Measure, or with --table only write the table again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="turns of each (5)")
    parser.add_argument("--table", action="store_true", help="write the table from the record as it is")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers'
    record = records.read(RECORD) if args.table else measure(repeats=args.repeats)
    records.insert(PROJECT / "docs" / "measured.md", "peers", table(record))
    print(table(record))


if __name__ == "__main__":
    main()

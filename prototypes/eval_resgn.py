"""Evaluate ResGNs on LFW's test people, on the selection half and on the report half.

python eval_resgn.py [--out FILE.json] [--halves selection,report] [--few N] WEIGHTS… ; WEIGHTS is a safetensors file, or
"shipped". Without a defence is always the first row. Attacks are made once and kept (FACEADV_CACHE, room eval_resgn).
"""
import argparse, json, pathlib, sys, time
sys.path.insert(0, ".")
import numpy as np, torch
from safetensors.torch import load_file
from faceadv import attacks, faces, metrics, objectives, pairs, purifiers, recognisers
from faceadv.networks.resgn import ResGN
from faceadv.store import cache

ap = argparse.ArgumentParser()
ap.add_argument("--out"); ap.add_argument("--halves", default="selection,report"); ap.add_argument("--few", type=int, default=0)
ap.add_argument("--device", default="cpu"); ap.add_argument("--per-person", type=int, default=1); ap.add_argument("--attacks", default="FGSM 4,FGSM 8,PGD-40 4,PGD-40 8")
ap.add_argument("weights", nargs="*")
a = ap.parse_args()
if a.device == "cpu": torch.set_num_threads(1)
dev = torch.device(a.device)
dlib = recognisers.load("dlib", dev)
others = {}
for name in ("mobilefacenet", "mobilenet-vggface2"):
    try: others[name] = recognisers.load(name, dev)
    except Exception as e: print("without", name, e)
data = faces.load("lfw")
people = sorted(pairs.lfw_people(data, "test"))
order = torch.randperm(len(people), generator=torch.Generator().manual_seed(25)).tolist()
halves = {"selection": [people[i] for i in order[: len(people) // 2]], "report": [people[i] for i in order[len(people) // 2 :]]}


def problems(half):
    """All same pairs of the half's people, at most ``--per-person`` of each, and as many pairs of different people,
    drawn by seed."""
    names = {n: i for i, n in enumerate(data.names)}
    labels = data.labels.numpy()
    draw = np.random.default_rng(25)
    same, photo = [], {}
    for n in halves[half]:
        rows = np.where(labels == names[n])[0]
        photo[n] = rows
        found = [(i, j) for k, i in enumerate(rows) for j in rows[k + 1 :]]
        if len(found) > a.per_person: found = [found[k] for k in draw.choice(len(found), a.per_person, replace=False)]
        same += found
    firsts = [photo[n] for n in halves[half]]
    different = []
    while len(different) < len(same):
        p, q = draw.choice(len(firsts), 2, replace=False)
        different.append((draw.choice(firsts[p]), draw.choice(firsts[q])))
    if a.few: same, different = same[: a.few], different[: a.few]
    return {"dodging": np.array(same), "impersonation": np.array(different)}


def embed(r, chips): return recognisers.embed_all(r, chips, batch=128 if dev.type == "cuda" else 32)


ready, table = {}, {}
for half in a.halves.split(","):
    for goal, both in problems(half).items():
        first, second = (np.asarray(data.chips[np.array(both[:, k])]) for k in (0, 1))
        key = cache.key("eval", first, second, dlib.threshold, recognisers.fingerprint(dlib), dev.type)
        e1, e2 = (torch.from_numpy(cache.array("eval_resgn", f"e-{half}-{goal}", cache.key(key, k), lambda c=c: embed(dlib, c).numpy())) for k, c in (("1", first), ("2", second)))
        right = (dlib.distance(e1, e2) < dlib.threshold) == (goal == "dodging")
        rows = torch.where(right)[0].numpy()
        x = torch.from_numpy(first[rows]).float() / 255
        objective = getattr(objectives, goal)(dlib, e2[rows])
        moved = {"legitimate": x}
        for which in a.attacks.split(","):
            kind, eps = which.split()
            def make(kind=kind, eps=int(eps) / 255):
                t = time.time()
                y = x.to(dev)
                z = attacks.fgsm(y, objective, eps=eps) if kind == "FGSM" else attacks.pgd(y, objective, eps=eps, alpha=eps / 4, steps=40, batch=256 if dev.type == "cuda" else 64)
                print("made", half, goal, kind, len(x), round(time.time() - t), flush=True)
                return z.cpu().numpy().astype(np.float16)
            moved[which] = torch.from_numpy(cache.array("eval_resgn", f"{half}-{goal}-{kind}-{eps}", cache.key(key, kind, eps, 40), make)).float()
        wanted = {n: torch.from_numpy(cache.array("eval_resgn", f"{n}-{half}-{goal}", cache.key(key, n, recognisers.fingerprint(r)), lambda r=r: embed(r, second[rows]).numpy())) for n, r in others.items()}
        person = data.labels.numpy()[both[rows, 0]]
        # all pairs, those that dlib has wrong too: needed for the legitimate ones only
        ready[half, goal] = {"x": x, "r": e2[rows], "moved": moved, "other": wanted, "person": person,
                             "all": (torch.from_numpy(first).float() / 255, e2)}


def network(path):
    if path == "shipped": return purifiers.load("resgn").to(dev)
    state = load_file(path)
    net = ResGN(**{k: int(state.pop(k)) for k in ("blocks", "width", "shrink")})
    wrong = net.load_state_dict(state, strict=False)
    assert not wrong.unexpected_keys and all(k.endswith("num_batches_tracked") for k in wrong.missing_keys), wrong
    return net.eval().requires_grad_(False).to(dev)


def clean(net, images):
    with torch.no_grad(): return torch.cat([net(p.to(dev)).cpu() for p in images.split(256 if dev.type == "cuda" else 50)])


def judge(net):
    found = {}
    for (half, goal), q in ready.items():
        same = goal == "dodging"
        for which, z in q["moved"].items():
            c = clean(net, z) if net else z
            hits = ((dlib.distance(embed(dlib, c), q["r"]) < dlib.threshold) == same).numpy()
            cell = {"n": len(hits), "dlib": [round(100 * v, 2) for v in metrics.rate(hits, q["person"], 0)]}
            if which != "legitimate":
                cell["error left"] = round(((c - q["x"]).square().sum() / (z - q["x"]).square().sum()).item(), 4)
            else:
                cell["rms of 255"] = round(255 * (c - q["x"]).square().mean().sqrt().item(), 3)
            for n, r in others.items():
                d = r.distance(embed(r, c), q["other"][n])
                cell[n] = round(100 * ((d < r.threshold) == same).float().mean().item(), 2)
                cell[n + " d"] = round(d.mean().item(), 3)
            found[f"{half}: {which} {goal}"] = cell
    return found


for path in ["none", *a.weights]:
    t = time.time()
    name = path if path in ("none", "shipped") else pathlib.Path(path).stem
    table[name] = judge(None if path == "none" else network(path))
    print(name, round(time.time() - t), "s", flush=True)
    if a.out: pathlib.Path(a.out).write_text(json.dumps(table, indent=1))
for half in a.halves.split(","):
    kinds = ["legitimate", *a.attacks.split(",")]
    for what in ("dlib", "error left", *others):
        print(f"\n{half}: {what}, dodging / impersonation   n = {len(ready[half, 'dodging']['x'])} / {len(ready[half, 'impersonation']['x'])}")
        print(" " * 26 + "".join(f"{k:>18}" for k in kinds))
        for name, cells in table.items():
            line = ""
            for k in kinds:
                two = [cells[f"{half}: {k} {g}"].get(what, "") for g in ("dodging", "impersonation")]
                line += f"{' / '.join(str(v[0] if isinstance(v, list) else v) for v in two):>18}"
            print(f"{name:26}{line}")

"""Judge generators of A3GN on people of LFW that nothing was trained on.

python prototypes/eval_a3gn.py FILE.safetensors|old ... [--pairs 1000] [--out FOLDER] [--report] [--no-judge]

Half of the test people are for selection (default), half for the report (--report). Thresholds at FAR 1e-3 come from
strangers among the training people. The judge mobilenet-vggface2 is only measured with --report.
"""
import argparse, json, sys, time
sys.path[:0] = ["prototypes", "."]
import net
import numpy as np
import torch
from safetensors.torch import load_file
from torchvision.utils import make_grid, save_image
from faceadv import faces, metrics, pairs, recognisers, verification
from faceadv.networks import a3gn as shipped_now

p = argparse.ArgumentParser()
p.add_argument("files", nargs="+"); p.add_argument("--pairs", type=int, default=1000); p.add_argument("--out", default="build/a3eval")
p.add_argument("--report", action="store_true"); p.add_argument("--judge", action="store_true"); p.add_argument("--batch", type=int, default=16)
p.add_argument("--maps", type=int, default=200); p.add_argument("--far", type=float, default=1e-3)
p.add_argument("--set", default="lfw", choices=["lfw", "orl"]); p.add_argument("--scale", type=float, default=1.0, help="multiply the change")
a = p.parse_args()
import pathlib
out = pathlib.Path(a.out); out.mkdir(parents=True, exist_ok=True)
NAMES = ["dlib", "mobilefacenet"] + (["mobilenet-vggface2"] if a.report or a.judge else [])
lfw = faces.load("lfw")
attackers = {n: recognisers.load(n) for n in NAMES}

# thresholds: photos of all training people (embeddings are kept in the cache), five million pairs of strangers
from faceadv.training import loop
students = loop.students()
between = torch.randint(len(students), (2, 5_000_000), generator=torch.Generator().manual_seed(0))
between = between[:, students.labels[between[0]] != students.labels[between[1]]]
thresholds = {}
for n, r in attackers.items():
    e = recognisers.embed_faces(r, students)
    d = torch.cat([r.distance(e[one], e[two]) for one, two in zip(*(b.split(100_000) for b in between))]).numpy()
    thresholds[n] = verification.threshold_at_far(d, a.far)
print("thresholds", {n: round(t, 4) for n, t in thresholds.items()}, flush=True)

if a.set == "lfw":
    test = sorted(pairs.lfw_people(lfw, "test"))
    half = np.random.default_rng(1).permutation(test)
    half = sorted(half[len(half) // 2:].tolist() if a.report else half[: len(half) // 2].tolist())
    data = lfw.people(half).first_photos(6)
else:
    data = faces.load("orl")
labels = data.labels
draw = torch.Generator().manual_seed(2)
several = torch.tensor([i for i in range(len(data)) if (labels == labels[i]).sum() > 1])
T = several[torch.randint(len(several), (a.pairs,), generator=draw)]
S = torch.empty_like(T); O = torch.empty_like(T)
for i, t in enumerate(T.tolist()):
    s = t
    while labels[s] == labels[t]: s = torch.randint(len(data), (1,), generator=draw).item()
    same = torch.where(labels == labels[t])[0]; same = same[same != t]
    S[i] = s; O[i] = same[torch.randint(len(same), (1,), generator=draw)]
img = lambda rows: torch.from_numpy(np.array(data.chips[rows.numpy()])).float() / 255
emb = {n: recognisers.embed_faces(r, data) for n, r in attackers.items()}
groups = labels[T].numpy()

def judged(name, images):
    r = attackers[name]
    e = torch.cat([r.embed(x) for x in images.split(32)])
    dist = {"same": r.distance(e, emb[name][T]), "other": r.distance(e, emb[name][O]), "source": r.distance(e, emb[name][S])}
    return {k: (v < thresholds[name]).numpy() for k, v in dist.items()}, {k: round(v.mean().item(), 4) for k, v in dist.items()}

def show(hits): m, lo, hi = metrics.rate(hits, groups); return f"{100 * m:.1f} [{100 * lo:.1f}, {100 * hi:.1f}]"

@torch.no_grad()
def make(network, old):
    done = []
    for rows in torch.arange(a.pairs).split(a.batch):
        x, y = img(S[rows]), img(T[rows])
        if old: made = network(x, emb["dlib"][T[rows]])
        else:
            e = torch.cat([emb["dlib"][T[rows]], emb["mobilefacenet"][T[rows]]], 1) if len(network.mean) else None
            made = network(x, y, e)
        made = (x + a.scale * (made - x)).clamp(0, 1)
        done.append((made * 255).round() / 255)  # as it would be stored
    return torch.cat(done)

class Off:  # attention left out ("zero") or looking everywhere alike ("uniform")
    def __init__(self, network, how): self.n, self.how = network, how
    def __enter__(self):
        if self.how == "zero": self.h = [l.register_forward_hook(lambda m, i, o: i[0]) for l in self.n.attention.values()]
        else:
            self.t = [l.temperature.data.clone() for l in self.n.attention.values()]
            for l in self.n.attention.values(): l.temperature.data.fill_(-30.0)
    def __exit__(self, *_):
        if self.how == "zero": [h.remove() for h in self.h]
        else: [l.temperature.data.copy_(t) for l, t in zip(self.n.attention.values(), self.t)]

@torch.no_grad()
def eyes(network):
    """Left-to-left rate: queries at the source's eyes (places of the template), the map's mass nearer to the same eye than to the other."""
    L, R = (33.0, 46.0), (79.0, 46.0)  # eyes' places in dlib's chips of 112, about (x, y); see align.TEMPLATE
    try:
        from faceadv import align
        pts = np.asarray(align.TEMPLATE, float)
        pts = pts * (align.SIZE if pts.max() <= 2 else 1)
        if len(pts) >= 2: L, R = tuple(pts[0][:2]), tuple(pts[1][:2])
    except Exception as e: print("template", repr(e))
    g = 28; ij = lambda pnt: (int(pnt[1] / 4), int(pnt[0] / 4))
    yy, xx = torch.meshgrid(torch.arange(g) * 4 + 2.0, torch.arange(g) * 4 + 2.0, indexing="ij")
    near = lambda pnt: (((xx - pnt[0]) ** 2 + (yy - pnt[1]) ** 2) < 10 ** 2).flatten()
    best, mass, peak, flipped = [], [], [], []
    for rows in torch.arange(min(a.pairs, a.maps)).split(8):
        m = network.maps(img(S[rows]), img(T[rows])); mf = network.maps(img(S[rows]), img(T[rows]).flip(3))
        for own, other in ((L, R), (R, L)):
            q = ij(own)[0] * g + ij(own)[1]
            one = m[:, :, q]
            a_, b_ = one[..., near(own)].sum(-1), one[..., near(other)].sum(-1)
            mass.append((a_ / (a_ + b_ + 1e-9)).mean(1)); best.append((a_ > b_).float().mean(1))
            peak.append(near(own)[one.mean(1).argmax(1)].float())
    return {"same eye gets more, share of heads and pairs": round(torch.cat(best).mean().item(), 3), "share of mass": round(torch.cat(mass).mean().item(), 3),
            "peak within 10 pixels": round(torch.cat(peak).mean().item(), 3), "chance of the peak": round(near(L).float().mean().item(), 4),
            "entropy (of ln 784 = 6.66)": round((-(m.clamp_min(1e-9).log() * m).sum(-1)).mean().item(), 2)}

results = {"thresholds": thresholds, "half": "report" if a.report else "selection", "people": int(len(set(groups.tolist()))), "pairs": a.pairs}
with torch.no_grad():
    x = img(S); y = img(T)
    base = {n: judged(n, x)[0]["other"] for n in NAMES}; natural = {n: (r.distance(emb[n][T], emb[n][O]) < thresholds[n]).numpy() for n, r in attackers.items()}
    for n in NAMES: print(n, "untouched accepted", show(base[n]), "| two photos of the target", show(natural[n]), flush=True)
    for f in a.files:
        old = f == "old"; name = pathlib.Path(f).stem
        network = shipped_now.load() if old else net.A3GN()
        if not old:
            s = {k: v.float() for k, v in load_file(f).items()}
            network = net.build(s); network.load_state_dict(s); network.eval().requires_grad_(False)
        t = time.time(); made = make(network, old); dt = time.time() - t
        row = {"ssim": round(metrics.ssim(made, x).mean().item(), 4), "L1": round((made - x).abs().mean().item(), 4), "ms an image": round(1000 * dt / a.pairs, 1)}
        hits = {}
        for n in NAMES:
            hits[n], far = judged(n, made)
            row[n] = {"same": show(hits[n]["same"]), "other": show(hits[n]["other"]), "still the source": show(hits[n]["source"]), "distance": far}
        if not old and len(network.attention):
            for how in ("zero", "uniform"):
                with Off(network, how): without = make(network, old)
                row[f"attention {how}"] = {"ssim": round(metrics.ssim(without, x).mean().item(), 4)}
                for n in NAMES[:2]:
                    h, _ = judged(n, without)
                    row[f"attention {how}"][n] = {k: f"{100 * (h[k] != hits[n][k]).mean():.1f} % of verdicts change, accepted {100 * h[k].mean():.1f}" for k in ("same", "other")}
            row["maps"] = eyes(network)
        print(name, json.dumps(row, indent=1), flush=True)
        results[name] = row
        k = slice(0, 8)
        save_image(make_grid(torch.cat([x[k], made[k], (0.5 + 5 * (made[k] - x[k])).clamp(0, 1), y[k], img(O)[k]]), 8), out / f"{name}.png")
json.dump(results, open(out / f"{'report' if a.report else 'selection'}-{a.set}.json", "w"), indent=1)

"""Several PuFaces side by side in one process. python .gpu/puface_arms.py none-image-0 mild-image-0 …"""
import json, math, os, pathlib, sys, time
import numpy as np, torch
import torch.nn.functional as F
from safetensors.torch import save_file
from faceadv import cloaks, recognisers
from faceadv.networks.puface import PuFace
from faceadv.precision import autocast
from faceadv.store import cache
from faceadv.training import loop, puface

names = sys.argv[1:]
device = torch.device(os.environ.get("JOB_DEVICE", "cuda"))
steps, batch, lr = int(os.environ.get("JOB_STEPS") or 8000), 16, 1e-3
N, CLOAK = int(os.environ.get("JOB_FEW") or 2400), int(os.environ.get("JOB_CLOAK") or 0)
out, deadline = pathlib.Path(os.environ["JOB_OUT"]), float(os.environ.get("JOB_DEADLINE", "inf"))
torch.set_num_threads(1)
if device.type == "cuda": torch.backends.cudnn.benchmark = True
began = time.time()
people = loop.students()
counts = torch.bincount(people.labels)
many = torch.where(counts >= 6)[0]
held = many[torch.randperm(len(many), generator=torch.Generator().manual_seed(0))[:60]]
rest = torch.where(~torch.isin(people.labels, held))[0]
rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))[:N]].sort().values
chips = np.array(people.chips[rest.numpy()])
natural = torch.from_numpy(chips).to(device)
extractors = [recognisers.load(name, device) for name in ("dlib", "mobilefacenet")]
print(len(held), "held out", len(natural), "photos", flush=True)

def make():
    def eight(x): return (x * 255).round().byte().cpu().numpy()
    parts, more = list(torch.arange(len(natural)).chunk(4)), ({"steps": CLOAK} if CLOAK else {})
    fawkes, lowkey = [], []
    for k, part in enumerate(parts):  # Fawkes: low and mid, made on either network
        x = natural[part.to(device)].float() / 255
        fawkes.append(eight(cloaks.fawkes(x, [extractors[k % 2]], mode=("low", "mid")[k // 2], seed=10_000 + k, **more)))
        print("fawkes", k, round(time.time() - began, 1), flush=True)
        lowkey.append(eight(cloaks.lowkey(x, extractors, seed=20_000 + k, steps=CLOAK or 40)))
        print("lowkey", k, round(time.time() - began, 1), flush=True)
    return np.stack([np.concatenate(fawkes), np.concatenate(lowkey)])

cloaked = torch.from_numpy(np.array(cache.array("cloaks", "arms", cache.key(chips, N, CLOAK, "low mid / lowkey"), make))).to(device)
flat = natural.float().div(255)
with torch.no_grad():
    wanted = [torch.stack([torch.cat([e.embed(p) for p in z.split(100)]) for z in (flat, flat.flip(3))]).float() for e in extractors]
del flat
prepared = time.time()
print("prepared", round(prepared - began, 1), flush=True)
TOP = {"none": (1.0, 1.0), "mild": (2.0, 2.0), "paper": (4.0, 2.0)}
networks, optimisers, draws = {}, {}, {}
for a in names:
    torch.manual_seed(int(a.split("-")[2]))
    networks[a] = PuFace((48, 96, 192)).to(device, memory_format=torch.channels_last).train()
    optimisers[a] = torch.optim.Adam(networks[a].parameters(), lr, **({"fused": True} if device.type == "cuda" else {}))
    draws[a] = torch.Generator(device=device).manual_seed(int(a.split("-")[2]))
losses = {a: {t: torch.zeros((), device=device) for t in ("image", "feature")} for a in names}
rows, count, done, t0, progress = [], 0, 0, time.time(), 0.0

def save(done, tag=""):
    for a in names:
        file = out / f"puface-{a}{tag}.safetensors"
        save_file({k: v.detach().half().cpu().contiguous() for k, v in networks[a].state_dict().items()} | {"widths": torch.tensor([48, 96, 192])}, str(file) + ".part")
        os.replace(str(file) + ".part", file)
        (out / f"puface-{a}.json").write_text(json.dumps({"arm": a, "steps": done, "of": steps, "batch": batch, "lr": lr, "photos": N, "seconds": round(time.time() - t0, 1), "progress": round(progress, 4)}))
        (out / f"puface-{a}.jsonl").write_text("".join(json.dumps({"step": r["step"]} | r[a]) + "\n" for r in rows))

for number in range(steps):
    if number % 25 == 0:
        now = time.time()
        if now > deadline - 10: break
        if deadline < 1e12 and number > 300: progress = max(progress, (now - t0) / (deadline - 12 - t0))
    progress = max(progress, number / steps)
    rate = loop.one_cycle(min(progress, 1.0) * 1000, 1000, lr)
    xs, outputs, targets = {}, {}, []
    with autocast(device):
        for a in names:
            draw, top = draws[a], TOP[a.split("-")[0]]
            chosen = torch.randint(len(natural), (batch,), generator=draw, device=device)
            which = torch.randint(2, (batch,), generator=draw, device=device)
            u, coin, flip = torch.rand(3, batch, generator=draw, device=device)
            flip = flip < 0.5
            ramp = min(1.0, progress / 0.5) if a.startswith("paper") else 1.0
            factor = 1 + u * ramp * (torch.where(which == 0, top[0], top[1]) - 1)
            factor = torch.where(coin < 0.5, torch.zeros_like(factor), factor)
            x, c = natural[chosen].float().div_(255), cloaked[which, chosen].float().div_(255)
            m = puface.amplify(x, c, factor)
            f = flip[:, None, None, None]
            x, m = torch.where(f, x.flip(3), x), torch.where(f, m.flip(3), m)
            xs[a], outputs[a] = x, networks[a](m)
            targets.append((flip.long(), chosen))
        both = torch.cat(list(outputs.values()))
        feature = 0
        for e, w in zip(extractors, wanted):
            t = torch.cat([w[f, c] for f, c in targets])
            feature = feature + (1 - F.cosine_similarity(e.embed(both, fast=True), t)) / 2
        feature = feature.view(len(names), batch).mean(1)
        total = feature.sum()
        for k, a in enumerate(names):
            image = (outputs[a] - xs[a]).abs().mean()
            if a.split("-")[1] == "image": total = total + image
            losses[a]["image"] += image.detach(); losses[a]["feature"] += feature[k].detach()
    for a in names: optimisers[a].zero_grad(set_to_none=True)
    total.backward()
    for a in names:
        for group in optimisers[a].param_groups: group["lr"] = rate
        optimisers[a].step()
    count, done = count + 1, number + 1
    if done in (10, 100):
        bad = [a for a in names if not all(math.isfinite(v.item()) for v in losses[a].values())]
        print(done, "steps", round(time.time() - t0, 1), "s", "NOT FINITE " + str(bad) if bad else "finite", flush=True)
        if bad: sys.exit(1)
    if done % 100 == 0:
        rows.append({"step": done} | {a: {t: round((v / count).item(), 6) for t, v in losses[a].items()} for a in names})
        for a in names:
            for v in losses[a].values(): v.zero_()
        count = 0
    if done in (2000, 4000): save(done, f"@{done}"); print(done, round(time.time() - t0, 1), flush=True)
save(done)
print("end", done, "steps", round(time.time() - t0, 1), "s", json.dumps(rows[-1:])[:500], flush=True)

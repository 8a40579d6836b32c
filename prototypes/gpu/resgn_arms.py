"""Several ResGNs side by side in one process: the same batches for all, one pass of the recogniser for all.
python .gpu/resgn_arms.py ARM ARM … ; JOB_OUT, JOB_DEVICE, JOB_DEADLINE, JOB_STEPS, JOB_FEW"""
import json, math, os, pathlib, sys, time
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import numpy as np, torch
import torch.nn.functional as F
from safetensors.torch import save_file
from faceadv import recognisers
from faceadv.precision import autocast
from faceadv.training import loop
import resgn_recipe as recipe

P, T, V = "pixel", "texture", "verification"
W = {P: 1000.0, T: 80.0, V: 20.0}
LIGHT = {P: 1000.0, T: 20.0, V: 5.0}
def arm(names, weights=W, clean=0.15, texture="recogniser", **sizes):
    return {"factors": {n: weights[n] for n in names}, "clean": clean, "texture": texture} | {"blocks": 8, "width": 48, "shrink": 2} | sizes
ARMS = {"pixel": arm((P,)), "texture": arm((T,)), "verification": arm((V,)), "pixel+texture": arm((P, T)),
        "pixel+verification": arm((P, V)), "texture+verification": arm((T, V)), "joint": arm((P, T, V)),
        "joint-light": arm((P, T, V), LIGHT), "joint-x0.1": arm((P, T, V), W | {P: 100.0}), "joint-x10": arm((P, T, V), W | {P: 10000.0}),
        "joint-noclean": arm((P, T, V), clean=0.0), "pixel-noclean": arm((P,), clean=0.0),
        "joint-mfn": arm((P, T, V), W | {T: 3.5}, texture="mobilefacenet"),
        "joint-64": arm((P, T, V), width=64), "joint-light-64": arm((P, T, V), LIGHT, width=64),
        "joint-full": arm((P, T, V), blocks=16, width=64, shrink=1)}
names = sys.argv[1:]
device = torch.device(os.environ.get("JOB_DEVICE", "cuda"))
steps, batch, lr, clip = int(os.environ.get("JOB_STEPS") or 9000), 16, 1e-3, 2.0  # clip: at so many running means of the norm
out, deadline = pathlib.Path(os.environ["JOB_OUT"]), float(os.environ.get("JOB_DEADLINE", "inf"))
torch.set_num_threads(1)
if device.type == "cuda":
    torch.backends.cudnn.benchmark = True
began = time.time()
data = loop.students()
if os.environ.get("JOB_FEW"): data = data[: int(os.environ["JOB_FEW"])]
recogniser = recognisers.load("dlib", device)
examples = recipe.stored(data, recogniser, int(os.environ.get("JOB_STORED") or 6))
n, kinds = len(data), len(examples)
everything = torch.stack([torch.from_numpy(np.array(a)).to(device) for a in [*examples, data.chips]])
prepared = time.time()
print("prepared", round(prepared - began, 1), len(data), flush=True)
networks = {a: recipe.build(ARMS[a], 0).to(device).train() for a in names}
optimisers = {a: torch.optim.Adam(networks[a].parameters(), lr, **({"fused": True} if device.type == "cuda" else {})) for a in names}
mfn = recipe.texture_network("mobilefacenet", device) if any(ARMS[a]["texture"] == "mobilefacenet" for a in names) else None
draw = torch.Generator(device=device).manual_seed(0)
need = [a for a in names if set(ARMS[a]["factors"]) - {P}]
losses = {a: {t: torch.zeros((), device=device) for t in ARMS[a]["factors"]} for a in names}
rows, count, done, t0, progress, means = [], 0, 0, time.time(), 0.0, {}

def state_of(net): return {k: v.detach().half().cpu().contiguous() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
def save(done):
    for a in names:
        file = out / f"resgn-{a}.safetensors"
        save_file(state_of(networks[a]) | {k: torch.tensor(ARMS[a][k]) for k in ("blocks", "width", "shrink")}, str(file) + ".part")
        os.replace(str(file) + ".part", file)
        info = {"arm": a, "steps": done, "of": steps, "batch": batch, "lr": lr, "clip": clip, "seconds": round(time.time() - t0, 1), "settings": ARMS[a], "progress": round(progress, 4)}
        (out / f"resgn-{a}.json").write_text(json.dumps(info))
        (out / f"resgn-{a}.jsonl").write_text("".join(json.dumps({"step": r["step"], "lr": r["lr"]} | r[a]) + "\n" for r in rows))

for number in range(steps):
    if number % 25 == 0:
        now = time.time()
        if now > deadline - 10: break
        if deadline < 1e12 and number > 300: progress = max(progress, (now - t0) / (deadline - 12 - t0))
    progress = max(progress, number / steps)
    rate = loop.one_cycle(min(progress, 1.0) * 1000, 1000, lr)
    chosen = torch.randint(n, (batch,), generator=draw, device=device)
    which = torch.randint(kinds, (batch,), generator=draw, device=device)
    coin = torch.rand(batch, generator=draw, device=device)
    flip = (torch.rand(batch, generator=draw, device=device) < 0.5)[:, None, None, None]
    def eight(w):
        z = everything[w, chosen]
        return torch.where(flip, z.flip(3), z).float().div_(255)
    x, attacked, outputs = eight(torch.full_like(which, kinds)), {}, {}
    for share in {ARMS[a]["clean"] for a in names}:
        attacked[share] = eight(torch.where(coin < share, torch.full_like(which, kinds), which))
    totals = {}
    with autocast(device):
        for a in names:
            outputs[a] = networks[a](attacked[ARMS[a]["clean"]])
        if need:
            with torch.no_grad():
                target = recogniser.network.maps(x)
                wanted = recogniser.network.embedding(target).float()
                target_m = mfn(x) if mfn else None
            maps = recogniser.network.maps(torch.cat([outputs[a] for a in need]))
            embeddings = recogniser.network.embedding(maps).float().split(batch)
            maps = maps.split(batch)
        for a in names:
            value = {}
            if P in ARMS[a]["factors"]: value[P] = F.mse_loss(outputs[a].float(), x)
            if a in need:
                k = need.index(a)
                if T in ARMS[a]["factors"]:
                    value[T] = F.mse_loss(maps[k].float(), target.float()) if ARMS[a]["texture"] == "recogniser" else F.mse_loss(mfn(outputs[a]).float(), target_m.float())
                if V in ARMS[a]["factors"]:
                    same = 1 - recipe.different((embeddings[k] - wanted).square().sum(1), recogniser.threshold**2)
                    value[V] = -same.clamp_min(1e-6).log().mean()
            totals[a] = sum(f * value[t] for t, f in ARMS[a]["factors"].items())
            for t in value: losses[a][t] += value[t].detach()
    for a in names: optimisers[a].zero_grad(set_to_none=True)
    sum(totals.values()).backward()  # the networks share nothing: each gets its own gradient
    for a in names:
        grads = [p.grad for p in networks[a].parameters()]
        norm = torch.nn.utils.get_total_norm(grads)
        means[a] = norm.clone() if a not in means else torch.lerp(means[a], torch.minimum(norm, clip * means[a]), 0.02)
        torch._foreach_mul_(grads, (clip * means[a] / (norm + 1e-12)).clamp(max=1.0))
        for group in optimisers[a].param_groups: group["lr"] = rate
        optimisers[a].step()
    count, done = count + 1, number + 1
    if done in (10, 100):
        bad = [a for a in names if not all(math.isfinite(v.item()) for v in losses[a].values())]
        print(done, "steps", round(time.time() - t0, 1), "s", "NOT FINITE " + str(bad) if bad else "finite", flush=True)
        if bad: sys.exit(1)
    if done % 100 == 0:
        rows.append({"step": done, "lr": round(rate, 6)} | {a: {t: round((v / count).item(), 7) for t, v in losses[a].items()} for a in names})
        for a in names:
            for v in losses[a].values(): v.zero_()
        count = 0
    if done % 3000 == 0:
        save(done); print(done, round(time.time() - t0, 1), flush=True)
save(done)
print("end", done, "steps", round(time.time() - t0, 1), "s", json.dumps(rows[-1:])[:600], flush=True)

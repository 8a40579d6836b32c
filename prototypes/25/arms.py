"""Seven ResGNs side by side on stored attacks, resumable on any machine: python arms.py OUT [STEPS]
Needs FACEADV_DATA (LFW) and resgn_recipe.py beside it. One pass of the recogniser for all networks."""
import json, math, os, pathlib, sys, time
sys.path.insert(0, str(pathlib.Path(__file__).parent))
import numpy as np, torch
import torch.nn.functional as F
from faceadv import recognisers
from faceadv.precision import autocast
from faceadv.training import loop
import resgn_recipe as recipe

P, T, V = recipe.TERMS
W = recipe.WEIGHTS
ARMS = {"+".join(n): n for n in ((P,), (T,), (V,), (P, T), (P, V), (T, V), (P, T, V))}
SIZE = {"blocks": 4, "width": 32, "shrink": 2}
PHOTOS, STORED, CLEAN, CLIP = 1600, 6, 0.15, 2.0
out = pathlib.Path(sys.argv[1]); out.mkdir(parents=True, exist_ok=True)
steps, batch, lr, seed = int(sys.argv[2]) if len(sys.argv) > 2 else 9000, 16, 1e-3, 0
data = loop.students()
rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:PHOTOS].sort().values
data = data[rows.numpy()]
recogniser = recognisers.load("dlib")
t0 = time.time()
examples = recipe.stored(data, recogniser, STORED)
print("stored", len(data), round(time.time() - t0), flush=True)
sources = [*examples, np.asarray(data.chips)]
networks = {a: recipe.build(SIZE, seed).train() for a in ARMS}
optimisers = {a: torch.optim.Adam(networks[a].parameters(), lr) for a in ARMS}
means, start, log = {}, 0, []
if (out / "last.pt").exists():
    state = torch.load(out / "last.pt", weights_only=True)
    start, means = state["step"], state["means"]
    for a in ARMS:
        networks[a].load_state_dict(state["networks"][a]); optimisers[a].load_state_dict(state["optimisers"][a])
    log = [json.loads(l) for l in open(out / "log.jsonl")][: start // 50]
need = [a for a in ARMS if ARMS[a] != (P,)]
sums, count = {}, 0
def save(done):
    state = {"step": done, "means": means, "networks": {a: n.state_dict() for a, n in networks.items()}, "optimisers": {a: o.state_dict() for a, o in optimisers.items()}}
    torch.save(state, out / "last.part"); os.replace(out / "last.part", out / "last.pt")
    (out / "log.part").write_text("".join(json.dumps(r) + "\n" for r in log)); os.replace(out / "log.part", out / "log.jsonl")
t0 = time.time()
for number in range(start, steps):
    draw = loop.generator(seed, number)
    chosen = torch.randint(len(data), (batch,), generator=draw).numpy()
    which = torch.randint(STORED, (batch,), generator=draw)
    which[torch.rand(batch, generator=draw) < CLEAN] = STORED
    mirrored = torch.rand(batch, 1, 1, 1, generator=draw) < 0.5
    attacked = torch.from_numpy(np.stack([sources[i][r] for i, r in zip(which.tolist(), chosen)])).float().div_(255)
    x = torch.from_numpy(sources[-1][chosen]).float().div_(255)
    attacked, x = (torch.where(mirrored, z.flip(3), z) for z in (attacked, x))
    with autocast("cpu"):
        outputs = {a: networks[a](attacked) for a in ARMS}
        with torch.no_grad():
            target = recogniser.network.maps(x); wanted = recogniser.network.embedding(target).float()
        maps = recogniser.network.maps(torch.cat([outputs[a] for a in need]))
        found = recogniser.network.embedding(maps).float().split(batch)
        maps = maps.float().split(batch)
        total = 0
        for a, names in ARMS.items():
            value = {}
            if P in names: value[P] = F.mse_loss(outputs[a].float(), x)
            if T in names: value[T] = F.mse_loss(maps[need.index(a)], target.float())
            if V in names:
                same = 1 - recipe.different((found[need.index(a)] - wanted).square().sum(1), recogniser.threshold**2)
                value[V] = -same.clamp_min(1e-6).log().mean()
            total = total + sum(W[t] * v for t, v in value.items())
            for t, v in value.items(): sums[f"{a}: {t}"] = sums.get(f"{a}: {t}", 0) + v.item()
    for a in ARMS: optimisers[a].zero_grad(set_to_none=True)
    total.backward()
    rate = loop.one_cycle(number, steps, lr)
    for a in ARMS:
        grads = [p.grad for p in networks[a].parameters()]
        norm = torch.nn.utils.get_total_norm(grads).item()
        assert math.isfinite(norm), (number, a)
        means[a] = norm if a not in means else 0.98 * means[a] + 0.02 * min(norm, CLIP * means[a])
        torch._foreach_mul_(grads, min(1.0, CLIP * means[a] / (norm + 1e-12)))
        for group in optimisers[a].param_groups: group["lr"] = rate
        optimisers[a].step()
    count += 1
    if (number + 1) % 50 == 0:
        log.append({"step": number + 1} | {k: round(v / count, 6) for k, v in sums.items()}); sums, count = {}, 0
        save(number + 1)
        print(number + 1, round((time.time() - t0) / (number + 1 - start), 2), "s a step", {k: v for k, v in log[-1].items() if "+" not in k.split(":")[0] or "pixel+texture+verification" in k}, flush=True)

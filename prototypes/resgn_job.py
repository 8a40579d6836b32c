"""ResGN on stored attacks: python .gpu/jobs/resgn_me.py ARM"""
import json, os, pathlib, sys, time
sys.path.insert(0, ".gpu")
import numpy as np, torch
from gpudata import students
from safetensors.torch import save_file
from faceadv import recognisers
from faceadv.training import loop, resgn

P, T, V = "pixel", "texture", "verification"
ARMS = {
    "pixel": {"terms": (P,)}, "texture": {"terms": (T,)}, "verification": {"terms": (V,)},
    "pixel+texture": {"terms": (P, T)}, "pixel+verification": {"terms": (P, V)}, "texture+verification": {"terms": (T, V)},
    "joint": {"terms": (P, T, V)},
    "joint-noclean": {"clean": 0.0}, "pixel-noclean": {"terms": (P,), "clean": 0.0},
    "joint-x0.1": {"px": 0.1}, "joint-x10": {"px": 10.0}, "joint-mfn": {"texture": "mobilefacenet"},
}
arm = sys.argv[1]
s = resgn.SETTINGS["lfw"] | resgn.ABLATION | {"px": 1.0, "steps": 6000, "batch": 32, "terms": (P, T, V)} | ARMS[arm]
device = torch.device(os.environ.get("JOB_DEVICE", "cpu"))
steps, batch = int(os.environ.get("JOB_STEPS") or s["steps"]), int(os.environ.get("JOB_BATCH") or s["batch"])
out = pathlib.Path(os.environ["JOB_OUT"])
deadline = float(os.environ.get("JOB_DEADLINE", "inf"))
began = time.time()
data = students()
if os.environ.get("JOB_FEW"):
    data = data[: int(os.environ["JOB_FEW"])]
recogniser = recognisers.load("dlib", device)
examples = resgn.stored(data, recogniser, s["stored"])
n, kinds = len(data), len(examples)
everything = torch.stack([torch.from_numpy(np.array(a)).to(device) for a in [*examples, data.chips]])
prepared = time.time()
print("prepared", round(prepared - began, 1), flush=True)
network = resgn.build(s, 0).to(device)
optimiser = torch.optim.Adam(network.parameters(), s["lr"], **({"fused": True} if device.type == "cuda" else {}))
factors = {name: resgn.WEIGHTS[name] * (s["px"] if name == P else 1) for name in s["terms"]}
if s["texture"] in getattr(resgn, "TEXTURES", {}) and T in factors:
    factors[T] = resgn.TEXTURES[s["texture"]]
learn = resgn.learner(network, optimiser, recogniser, resgn.texture_network(s["texture"], device), factors, device)
draw = torch.Generator(device=device).manual_seed(0)
sums, rows, count, done, t0, progress = {}, [], 0, 0, time.time(), 0.0
for number in range(steps):
    if number % 25 == 0:
        if time.time() > deadline - 8:
            break
        if deadline < 1e12 and number > 200:
            progress = max(progress, (time.time() - t0) / (deadline - 10 - t0))
    progress = max(progress, number / steps)
    for group in optimiser.param_groups:
        group["lr"] = loop.one_cycle(progress * 1000, 1000, s["lr"])
    chosen = torch.randint(n, (batch,), generator=draw, device=device)
    which = torch.randint(kinds, (batch,), generator=draw, device=device)
    clean = torch.rand(batch, generator=draw, device=device) < s["clean"]
    which = torch.where(clean, torch.full_like(which, kinds), which)
    flip = (torch.rand(batch, generator=draw, device=device) < 0.5)[:, None, None, None]
    a, x = everything[which, chosen], everything[kinds, chosen]
    a, x = (torch.where(flip, z.flip(3), z).float().div_(255) for z in (a, x))
    for name, loss in learn(a, x).items():
        sums[name] = sums.get(name, 0) + loss
    count += 1
    done = number + 1
    if done % 50 == 0:
        rows.append({"step": done} | {name: round((v / count).item(), 6) for name, v in sums.items()})
        sums, count = {}, 0
seconds = time.time() - t0
state = {k: v.detach().half().cpu().contiguous() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
save_file(state | {k: torch.tensor(s[k]) for k in ("blocks", "width", "shrink")}, str(out / f"resgn-{arm}.safetensors"))
(out / f"resgn-{arm}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
info = {"arm": arm, "steps": done, "of": steps, "progress": round(progress, 3), "batch": batch, "seconds": round(seconds, 1), "prepared": round(prepared - began, 1),
        "steps a second": round(done / seconds, 2), "factors": factors, "settings": {k: v for k, v in s.items() if k != "losses"}, "last": rows[-1:]}
(out / f"resgn-{arm}.json").write_text(json.dumps(info))
print(json.dumps(info), flush=True)

"""PuFace's arms: python .gpu/jobs/puface_me.py ARM, for example curr-image-0, none-noimage-1, rednet-image-0"""
import fcntl, json, os, pathlib, sys, time
sys.path.insert(0, ".gpu")
import numpy as np, torch
from torch import nn
import torch.nn.functional as F
from gpudata import students
from safetensors.torch import save_file
from faceadv import cloaks, recognisers
from faceadv.networks.puface import PuFace
from faceadv.precision import autocast
from faceadv.training import loop, puface

arm = sys.argv[1]
kind, image, seed = arm.split("-"); seed = int(seed)
device = torch.device(os.environ.get("JOB_DEVICE", "cpu"))
steps, batch, lr, beta = int(os.environ.get("JOB_STEPS") or 4500), int(os.environ.get("JOB_BATCH") or 32), 1e-3, 1.0
out, shared = pathlib.Path(os.environ["JOB_OUT"]), pathlib.Path(os.environ["JOB_SHARED"])
deadline = float(os.environ.get("JOB_DEADLINE", "inf"))
N, CLOAK = int(os.environ.get("JOB_FEW") or 2400), int(os.environ.get("JOB_CLOAK") or 0)
began = time.time()
people = students()
counts = torch.bincount(people.labels)
many = torch.where(counts >= 6)[0]
held = many[torch.randperm(len(many), generator=torch.Generator().manual_seed(0))[:60]]
held_out = torch.isin(people.labels, held)
rest = torch.where(~held_out)[0]
rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))[:N]].sort().values
natural = torch.from_numpy(np.array(people.chips[rest.numpy()])).to(device)
print(len(held), "held out", len(natural), "photos", flush=True)
extractors = [recognisers.load(name, device) for name in ("dlib", "mobilefacenet")]

def make(path):
    cloaks.BATCH = 240
    made = []
    def eight(x): return (x * 255).round().byte().cpu().numpy()
    parts = list(torch.arange(len(natural)).chunk(4))  # Fawkes: low and mid, made on either network
    fawkes = []
    for k, part in enumerate(parts):
        x = natural[part.to(device)].float() / 255
        more = {"steps": CLOAK} if CLOAK else {}
        fawkes.append(eight(cloaks.fawkes(x, [extractors[k % 2]], mode=("low", "mid")[k // 2], seed=10_000 + k, **more)))
        print("fawkes", k, round(time.time() - began, 1), flush=True)
    made.append(np.concatenate(fawkes))
    lowkey = []
    for k, part in enumerate(parts):
        x = natural[part.to(device)].float() / 255
        lowkey.append(eight(cloaks.lowkey(x, extractors, seed=20_000 + k, steps=CLOAK or 40)))
        print("lowkey", k, round(time.time() - began, 1), flush=True)
    made.append(np.concatenate(lowkey))
    np.save(path.with_suffix(".part.npy"), np.stack(made))
    os.replace(path.with_suffix(".part.npy"), path)

store = shared / f"cloaks-{len(natural)}.npy"
with open(shared / "cloaks.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not store.exists():
        make(store)
cloaked = torch.from_numpy(np.load(store)).to(device)
prepared = time.time()

class REDNet(nn.Module):
    """Convolutions down, transposed convolutions up, symmetric skips that are added (Mao, Shen and Yang 2016)."""
    def __init__(self, widths=(64, 112, 176)):
        super().__init__()
        a, b, c = widths
        self.fold, self.unfold = nn.PixelUnshuffle(2), nn.PixelShuffle(2)
        def conv(i, o, s=1): return nn.Sequential(nn.Conv2d(i, o, 3, s, 1), nn.GroupNorm(8, o), nn.ReLU(inplace=True))
        def back(i, o, s=1): return nn.Sequential(nn.ConvTranspose2d(i, o, 3 if s == 1 else 4, s, 1), nn.GroupNorm(8, o))
        self.down = nn.ModuleList([conv(12, a), conv(a, a), conv(a, b, 2), conv(b, b), conv(b, c, 2), conv(c, c)])
        self.up = nn.ModuleList([back(c, c), back(c, b, 2), back(b, b), back(b, a, 2), back(a, a)])
        self.tail = nn.ConvTranspose2d(a, 12, 3, 1, 1)
        nn.init.zeros_(self.tail.weight); nn.init.zeros_(self.tail.bias)
    def forward(self, images):
        x = self.fold(images.contiguous(memory_format=torch.channels_last) * 2 - 1)
        seen = []
        for layer in self.down:
            x = layer(x); seen.append(x)
        seen.pop()
        for layer in self.up:
            x = F.relu(layer(x) + seen.pop())
        return (images + self.unfold(self.tail(x)).float()).clamp(0, 1)

torch.manual_seed(seed)
network = (REDNet() if kind == "rednet" else PuFace((48, 96, 192))).to(device, memory_format=torch.channels_last).train()
optimiser = torch.optim.Adam(network.parameters(), lr, **({"fused": True} if device.type == "cuda" else {}))
draw = torch.Generator(device=device).manual_seed(seed)
TOP = {"none": (1.0, 1.0), "paper": (4.0, 2.0), "curr": (4.0, 2.0), "mild": (2.0, 2.0), "rednet": (2.0, 2.0)}[kind]
sums, rows, count, done, t0, progress = {}, [], 0, 0, time.time(), 0.0
snapshots = {1000: None, 2000: None} if arm in ("none-image-0", "mild-image-0") else {}
def save(name):
    state = {k: v.detach().half().cpu().contiguous() for k, v in network.state_dict().items()}
    save_file(state | {"widths": torch.tensor([48, 96, 192])}, str(out / f"puface-{name}.safetensors"))
for number in range(steps):
    if number % 25 == 0:
        if time.time() > deadline - 8: break
        progress = max(progress, (time.time() - t0) / (deadline - 10 - t0)) if deadline < 1e12 else progress
    progress = max(progress, number / steps)
    for group in optimiser.param_groups:
        group["lr"] = loop.one_cycle(progress * 1000, 1000, lr)
    chosen = torch.randint(len(natural), (batch,), generator=draw, device=device)
    which = torch.randint(2, (batch,), generator=draw, device=device)
    x = natural[chosen].float().div_(255)
    c = cloaked[which, chosen].float().div_(255)
    ramp = min(1.0, progress / 0.6) if kind == "curr" else 1.0
    top = torch.where(which == 0, 1 + ramp * (TOP[0] - 1), 1 + ramp * (TOP[1] - 1))
    factor = 1 + (top - 1) * torch.rand(batch, generator=draw, device=device)
    factor = torch.where(torch.rand(batch, generator=draw, device=device) < 0.5, torch.zeros_like(factor), factor)
    flip = (torch.rand(batch, generator=draw, device=device) < 0.5)[:, None, None, None]
    a = puface.amplify(x, c, factor)
    x, a = torch.where(flip, x.flip(3), x), torch.where(flip, a.flip(3), a)
    with autocast(device):
        value = puface.terms(network(a), x, extractors)
        total = value["feature"] * beta + (value["image"] if image == "image" else 0)
    optimiser.zero_grad(set_to_none=True)
    total.backward()
    optimiser.step()
    for name, loss in value.items():
        sums[name] = sums.get(name, 0) + loss.detach()
    count += 1; done = number + 1
    if done % 50 == 0:
        rows.append({"step": done} | {name: round((v / count).item(), 6) for name, v in sums.items()})
        sums, count = {}, 0
    if done in snapshots:
        save(f"{arm}@{done}")
seconds = time.time() - t0
save(arm)
info = {"arm": arm, "steps": done, "of": steps, "progress": round(progress, 3), "batch": batch, "seconds": round(seconds, 1), "prepared": round(prepared - began, 1),
        "steps a second": round(done / seconds, 2), "photos": len(natural), "held out people": [people.names[i] for i in held.tolist()][:3], "parameters": sum(p.numel() for p in network.parameters()), "last": rows[-1:]}
(out / f"puface-{arm}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
(out / f"puface-{arm}.json").write_text(json.dumps(info))
print(json.dumps(info), flush=True)

"""The diffusion prior: python .gpu/jobs/prior.py prior64"""
import json, os, sys, time
sys.path.insert(0, ".gpu")
import numpy as np, torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from gpudata import students
from safetensors.torch import save_file
from faceadv.networks import prior as network
from faceadv.training import loop

ARMS = {
    "prior64": {"side": 64, "widths": (64, 128, 192), "batch": 128, "lr": 4e-4, "steps": 12000},
    "prior112": {"side": 112, "widths": (48, 96, 144, 192), "batch": 64, "lr": 4e-4, "steps": 8000},
}
arm = sys.argv[1]
s = ARMS[arm]
device = torch.device(os.environ.get("JOB_DEVICE", "cpu"))
steps, out = int(os.environ.get("JOB_STEPS") or s["steps"]), os.environ["JOB_OUT"]
deadline = float(os.environ.get("JOB_DEADLINE", "inf"))
began = time.time()
chips = np.asarray(students().chips)
side, batch = s["side"], s["batch"]
with torch.no_grad():  # the pictures once, small, on the device
    parts = []
    for i in range(0, len(chips), 512):
        x = torch.from_numpy(np.array(chips[i:i + 512])).to(device).float().div_(127.5) - 1
        if side != 112:
            x = F.interpolate(x, side, mode="bilinear", antialias=True, align_corners=False)
        parts.append(x.to(torch.float16 if device.type == "cuda" else torch.float32))
    photos = torch.cat(parts)
torch.manual_seed(0)
unet = network.build(side, s["widths"]).to(device, memory_format=torch.channels_last).train()
mean = [p.detach().clone() for p in unet.parameters()]
parameters = list(unet.parameters())
optimiser = torch.optim.AdamW(parameters, s["lr"], weight_decay=0, fused=device.type == "cuda")
alphas = DDPMScheduler().alphas_cumprod.to(device)
draw = torch.Generator(device=device).manual_seed(0)
rows, total, count, done, t0 = [], torch.zeros((), device=device), 0, 0, time.time()
for number in range(steps):
    if number % 50 == 0 and time.time() > deadline - 12:
        break
    rate = loop.one_cycle(number, steps, s["lr"])
    for g in optimiser.param_groups:
        g["lr"] = rate
    x = photos[torch.randint(len(photos), (batch,), generator=draw, device=device)].float()
    flip = torch.rand(batch, 1, 1, 1, generator=draw, device=device) < 0.5
    x = torch.where(flip, x.flip(3), x)
    noise = torch.randn(x.shape, generator=draw, device=device)
    t = torch.randint(1000, (batch,), generator=draw, device=device)
    a = alphas[t].view(-1, 1, 1, 1)
    noisy = (a.sqrt() * x + (1 - a).sqrt() * noise).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        guess = unet(noisy, t).sample
    loss = F.mse_loss(guess.float(), noise)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimiser.step()
    decay = min(0.999, (1 + number) / (10 + number))
    torch._foreach_lerp_(mean, [p.detach() for p in parameters], 1 - decay)
    total += loss.detach()
    count += 1
    done = number + 1
    if done % 50 == 0:
        rows.append({"step": done, "loss": round((total / count).item(), 6)})
        total.zero_(); count = 0
seconds = time.time() - t0
with torch.no_grad():
    for p, m in zip(parameters, mean):
        p.copy_(m)
state = {k: v.detach().half().cpu().contiguous() for k, v in unet.state_dict().items()}
save_file(state, f"{out}/{arm}.safetensors")
open(f"{out}/{arm}.jsonl", "w").write("".join(json.dumps(r) + "\n" for r in rows))
print(json.dumps({"arm": arm, "steps": done, "of": steps, "batch": batch, "seconds": round(seconds, 1), "prepared": round(t0 - began, 1),
                  "steps a second": round(done / seconds, 2), "parameters": sum(p.numel() for p in parameters), "last": rows[-1:]}), flush=True)

"""A3GN with cross-attention, four arms: python .gpu/jobs/a3gn.py pure|safe|bounded|tight"""

import json
import os
import signal
import sys
import time

sys.path[:0] = [".gpu", ".gpu/a3gn"]
import net

import faceadv.networks

# until the network takes the old one's place in the package, the recipe finds it here
sys.modules["faceadv.networks.a3gn"] = faceadv.networks.a3gn = net

import recipe
import torch
from gpudata import students
from safetensors.torch import save_file
from torchvision.utils import save_image

from faceadv import recognisers
from faceadv.training import loop

ARMS = {
    "pure": {},
    "safe": {"known": True},
    "bounded": {"known": True, "bound": 0.12},
    "tight": {"known": True, "ssim": 0.88},
}
RESERVE = 12  # seconds before the deadline
began = time.time()
arm = sys.argv[1]
settings = recipe.SETTINGS["lfw"] | ARMS[arm]
device = torch.device(os.environ.get("JOB_DEVICE", "cpu"))
steps, out = int(os.environ.get("JOB_STEPS") or 40_000), os.environ["JOB_OUT"]
settings |= {"steps": steps, "batch": int(os.environ.get("A3_BATCH") or settings["batch"])}
settings |= json.loads(os.environ.get("A3_MORE", "{}"))
deadline = float(os.environ.get("JOB_DEADLINE", "inf")) - RESERVE
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
os.makedirs(out, exist_ok=True)
data = students()
if os.environ.get("A3_PHOTOS"):  # to try it on a CPU
    data = data[: int(os.environ["A3_PHOTOS"])]
attacked = [recognisers.load(name, device) for name in recipe.ATTACKED]
work = recipe.prepare(data, attacked, settings, 0, device)
rows, sums, done, start, batch = [], None, 0, time.time(), settings["batch"]
print(arm, "prepared", round(start - began, 1), "s", flush=True)


def write():
    state = {k: v.half().contiguous() for k, v in recipe.state(work.modules["generator"], settings).items()}
    save_file(state, f"{out}/{arm}.part")
    os.replace(f"{out}/{arm}.part", f"{out}/{arm}.safetensors")
    with open(f"{out}/{arm}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    if done:
        save_image(work.sheet(), f"{out}/{arm}.png")


while done < steps and not stopped:
    now = time.time()
    if now > deadline:
        break
    # the schedule follows the clock if the deadline comes before the steps are done, so that it ends whatever the speed
    share = max(done / steps, (now - start) / max(1.0, deadline - start))
    rate = loop.one_cycle(int(share * 1_000_000), 1_000_000, settings["lr"])
    for group in (g for optimiser in work.optimisers.values() for g in optimiser.param_groups):
        group["lr"] = rate
    value = work.step(share, torch.Generator(device).manual_seed(1_000_003 + done), batch)
    sums = torch.stack([v.float() for v in value.values()]) + (0 if sums is None else sums)
    done += 1
    if done % loop.MEAN == 0 or done == steps:
        count = done % loop.MEAN or loop.MEAN
        rows.append({"step": done} | {k: round(v / count, 5) for k, v in zip(value, sums.tolist())})
        rows[-1] |= {"share": round(share, 4), "seconds": round(time.time() - start, 1)}
        sums = None
        if done == 150:  # on a busy GPU rather many steps than large ones
            pace = (rows[-1]["seconds"] - rows[0]["seconds"]) / 100
            if (deadline - time.time()) / pace < 6000 and batch > 32:
                batch = 32
            print(arm, "seconds a step", pace, "batch from now on", batch, flush=True)
        if done % 500 == 0:
            print(json.dumps(rows[-1]), flush=True)
        if done % 2500 == 0:  # should the machine be taken away
            write()
seconds = time.time() - start
write()
print(json.dumps({"arm": arm, "steps": done, "of": steps, "ended": "stopped" if stopped else "deadline" if done < steps else "done",
                  "share": round(max(done / steps, seconds / (deadline - start)), 3), "batch": batch,
                  "seconds": round(seconds, 1), "prepared": round(start - began, 1), "steps a second": round(done / seconds, 2),
                  "parameters": sum(p.numel() for p in work.modules["generator"].parameters()), "last": rows[-1:]}), flush=True)  # fmt: skip

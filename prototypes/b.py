"""Everything for the GPU, side by side, until a deadline; the results come back in parts of a tar file."""
import json, os, pathlib, subprocess, sys, tarfile, time
began = time.time()
SECONDS = float(os.environ.get("B_SECONDS", "365"))
device = os.environ.get("JOB_DEVICE", "cuda")
out = pathlib.Path(os.environ["OUT"]); work = pathlib.Path(os.environ.get("B_WORK", "/tmp/b")); work.mkdir(parents=True, exist_ok=True)
env = os.environ | {"JOB_DEVICE": device, "JOB_PACKED": "1", "JOB_SHARED": str(work / "shared"), "JOB_OUT": str(work / "results"),
                    "FACEADV_CACHE": str(work / "cache"), "FACEADV_QUIET": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
                    "JOB_DEADLINE": str(began + SECONDS)}
for name in ("shared", "results", "logs"): (work / name).mkdir(exist_ok=True)
def say(*a): print(round(time.time() - began, 1), *a, flush=True)
def run(command, name, **more):
    return subprocess.Popen(command, env=env | more, stdout=open(work / "logs" / f"{name}.log", "w"), stderr=subprocess.STDOUT)
py = sys.executable
unpack = run([py, "-c", "import sys; sys.path.insert(0, '.gpu'); from gpudata import students; print(len(students()))"], "unpack")
if device == "cuda":  # alone, before MPS
    try: subprocess.run([py, ".gpu/micro.py"], env=env, stdout=open(work / "logs/micro.log", "w"), stderr=subprocess.STDOUT, timeout=32)
    except subprocess.TimeoutExpired: say("micro timed out")
say("micro done")
if device == "cuda" and not os.environ.get("B_NO_MPS"):
    mps = {"CUDA_MPS_PIPE_DIRECTORY": "/tmp/mps", "CUDA_MPS_LOG_DIRECTORY": "/tmp/mpslog"}
    for d in mps.values(): os.makedirs(d, exist_ok=True)
    try:
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=env | mps, timeout=10, check=True)
        test = subprocess.run([py, "-c", "import torch;x=torch.ones(1000,1000,device='cuda');print((x@x).sum().item())"], env=env | mps, capture_output=True, text=True, timeout=40)
        say("mps", test.stdout.strip(), test.stderr[-300:])
        if test.returncode == 0: env |= mps
    except Exception as e: say("no mps", repr(e))
unpack.wait()
say("chips", (work / "logs/unpack.log").read_text())
jobs = [tuple(line.split()) for line in open(".gpu/jobs.txt") if line.strip() and line[0] != "#"]
running = {}
for name, arm in jobs:
    more = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "35"} if name == "a3gn" else {}
    running[f"{name}-{arm}"] = run([py, f".gpu/jobs/{name}.py", arm], f"{name}-{arm}", **more)
bench = run(["nice", py, "benchmarks/gpu.py", "--device", device, "--only", "notebooks", "tests", "--out", str(work / "results" / "gpu2.json")], "gpu", FACEADV_CACHE=str(work / "cache2")) if os.environ.get("B_BENCH", "1") == "1" else None
while any(p.poll() is None for p in running.values()) and time.time() < began + SECONDS + 14:
    time.sleep(1)
for name, p in running.items():
    if p.poll() is None: say("still running", name); p.kill()
if bench and bench.poll() is None: say("bench still running"); bench.kill()
for name in running:
    log = (work / "logs" / f"{name}.log").read_text(errors="replace").strip().splitlines()
    say(name, running[name].returncode, (log[-1] if log else "")[:400])
tar = work / "all.tar"
with tarfile.open(tar, "w") as t:
    t.add(work / "results", "results"); t.add(work / "logs", "logs")
data = tar.read_bytes(); size = 15_500_000
for i in range(0, min(len(data), 8 * size), size):
    (out / f"all.tar.{i // size}").write_bytes(data[i:i + size])
say("done", len(data))

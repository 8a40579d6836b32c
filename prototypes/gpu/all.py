"""Everything on the GPU machine, in the background: python .gpu/all.py SECONDS; state in /tmp/w."""
import json, os, pathlib, subprocess, sys, tarfile, time
began = time.time(); SECONDS = float(sys.argv[1])
w = pathlib.Path("/tmp/w"); repo = pathlib.Path.cwd()
for d in ("logs", "out", "lfw"): (w / d).mkdir(parents=True, exist_ok=True)
py = sys.executable
env = os.environ | {"FACEADV_QUIET": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "FACEADV_DATA": "/tmp/data", "FACEADV_CACHE": "/tmp/cache",
                    "JOB_OUT": str(w / "out"), "JOB_DEADLINE": str(began + SECONDS)}
def say(*a): print(round(time.time() - began, 1), *a, flush=True)
def start(name, command, **more):
    return subprocess.Popen(command, env=env | more, stdout=open(w / "logs" / f"{name}.log", "w"), stderr=subprocess.STDOUT)
def tail(name, n=300):
    try: return (w / "logs" / f"{name}.log").read_text(errors="replace").strip()[-n:]
    except OSError: return ""
cores = os.cpu_count()
gpu = start("gpu", ["taskset", "-c", f"0-{cores - 5}", py, "benchmarks/gpu.py", "--out", str(w / "gpu.json")], FACEADV_CACHE="/tmp/cache_gpu", FACEADV_DATA="/tmp/none")
cpu = start("cpu", ["taskset", "-c", f"{cores - 2},{cores - 1}", "bash", "-c", f"{py} benchmarks/recognisers.py && {py} benchmarks/peers.py"],
            FACEADV_DEVICE="cpu", OMP_NUM_THREADS="2", FACEADV_CACHE="/tmp/cache_cpu", FACEADV_DATA="/tmp/none", GOMP_SPINCOUNT="5000")
unpack = start("unpack", ["taskset", "-c", f"{cores - 4}-{cores - 3}", py, ".gpu/s/unpack.py", "/tmp/base"], FACEADV_DEVICE="cpu")
while unpack.poll() is None and time.time() < began + 200: time.sleep(0.3)
say("unpack", tail("unpack"))
while "\ntraining" not in "\n" + tail("gpu", 9000) and gpu.poll() is None and time.time() < began + 150: time.sleep(0.3)
say("timed parts are done:", tail("gpu", 900))
mps = {"CUDA_MPS_PIPE_DIRECTORY": "/tmp/mps", "CUDA_MPS_LOG_DIRECTORY": "/tmp/mpslog"}
if os.environ.get("JOB_MPS", "1") == "1":
    for d in mps.values(): os.makedirs(d, exist_ok=True)
    try:
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=env | mps, timeout=10, check=True)
        t = subprocess.run([py, "-c", "import torch;x=torch.ones(1000,1000,device='cuda');print((x@x).sum().item())"], env=env | mps, capture_output=True, text=True, timeout=40)
        say("mps", t.stdout.strip(), t.stderr[-200:])
        if t.returncode == 0: env |= mps
    except Exception as e: say("no mps", repr(e))
jobs = {}
for n in ("07", "04", "02", "05", "01", "03", "06", "00"):
    jobs[f"lfw{n}"] = start(f"lfw{n}", [py, ".gpu/s/lfw.py", n, str(w / "lfw" / n)], OMP_NUM_THREADS="2")
for k, arms in enumerate(("pixel texture verification pixel+texture", "pixel+verification texture+verification joint", "joint-light joint-x0.1 joint-x10 joint-noclean", "pixel-noclean joint-mfn joint-64")):
    jobs[f"resgn{k}"] = start(f"resgn{k}", [py, ".gpu/s/resgn_arms.py", *arms.split()])
for k, arms in enumerate(("none-image-0 mild-image-0 none-noimage-0", "none-image-1 mild-image-1 mild-noimage-0", "none-image-2 mild-image-2 paper-image-0")):
    jobs[f"puface{k}"] = start(f"puface{k}", [py, ".gpu/s/puface_arms.py", *arms.split()])
jobs |= {"gpu": gpu, "cpu": cpu}
told = set()
while any(p.poll() is None for p in jobs.values()) and time.time() < began + SECONDS + 12:
    for n, p in jobs.items():
        if p.poll() is not None and n not in told:
            told.add(n); say(n, p.returncode, tail(n, 400 if p.returncode else 150))
    time.sleep(0.5)
for n, p in jobs.items():
    if p.poll() is None: say("still running:", n, tail(n, 150)); p.kill()
say("over")

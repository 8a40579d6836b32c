"""One notebook in profile lfw: by papermill, or its cells in a row. python .gpu/lfw.py NAME OUT"""
import json, os, subprocess, sys, time
from pathlib import Path
import yaml
name, out = sys.argv[1], Path(sys.argv[2]).resolve()
profile = os.environ.get("JOB_PROFILE", "lfw")
path = next(Path("notebooks").resolve().glob(f"{name}*.ipynb"))
began = time.time()
try:
    from faceadv.course import run
    (result,) = run.run([path.stem], profile, {}, out=out, fresh=True)
    print(result, round(time.time() - began), flush=True)
    if not result.error or time.time() - began > 100: sys.exit(bool(result.error))
except Exception as e:
    print("no papermill:", type(e).__name__, e, flush=True)
values = yaml.safe_load((path.parent / "profiles" / f"{profile}.yaml").read_text())
values = (values.get("all") or {}) | (values.get(path.stem) or {}) | {"profile": profile, "results_dir": str(out / "results")}
script = ["import matplotlib", "matplotlib.use('Agg')", "display = print"]
for cell in (c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"):
    script.append("".join(cell["source"]))
    if "parameters" in cell["metadata"].get("tags", []):
        script += [f"{k} = {v!r}" for k, v in values.items()]
env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
done = subprocess.run([sys.executable, "-c", "\n\n".join(script)], cwd=path.parent, env=env)
print("plain", path.stem, done.returncode, round(time.time() - began), flush=True)

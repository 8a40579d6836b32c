"""LFW on the GPU machine: crops of its JPEGs under FACEADV_DATA, and their chips in the cache."""
import io, json, os, pathlib, sys, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np, torch
from PIL import Image
from faceadv import align, faces
from faceadv.store import cache, datasets
base = pathlib.Path(sys.argv[1])  # has meta.npz, blob0.bin, blob1.bin, lists/
torch.set_num_threads(1)
began = time.time()
root = pathlib.Path(os.environ["FACEADV_DATA"]) / "lfw"
folder = root / "lfw-deepfunneled"
meta = dict(np.load(base / "meta.npz"))
files = [f.decode() for f in meta["files"]]
blob = (base / "blob0.bin").read_bytes() + (base / "blob1.bin").read_bytes()
ends = meta["ends"]; starts = np.concatenate([[0], ends[:-1]])
order = datasets.photos
for f in files: (folder / f).parent.mkdir(parents=True, exist_ok=True)
def one(i):
    b = blob[starts[i]:ends[i]]
    (folder / files[i]).write_bytes(b)
    return align.cut(np.asarray(Image.open(io.BytesIO(b)).convert("RGB")), meta["matrices"][i])
with ThreadPoolExecutor(14) as pool:
    chips = np.stack(list(pool.map(one, range(len(files)))))
for f in (base / "lists").iterdir(): (root / f.name).write_bytes(f.read_bytes())
assert datasets.photos("lfw")[1] == files, "another order"
def make(home):
    np.save(home / "chips.npy", chips); np.save(home / "matrices.npy", meta["matrices"]); np.save(home / "counts.npy", meta["counts"])
    (home / "index.json").write_text(json.dumps({"files": files, "skipped": []}))
cache.entry("chips", folder.resolve().name, faces.fingerprint("lfw"), make)
d = faces.load("lfw")
print("unpacked", d.chips.shape, len(d.names), round(time.time() - began, 1), "s", flush=True)

"""Pack what the training people's chips are cut from: their photos' JPEGs, cropped without recoding (jpegtran)."""
import io, pathlib, subprocess
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from PIL import Image
from faceadv import align
from faceadv.training import loop
from faceadv import faces
data = faces.load("lfw")
out = pathlib.Path(".gpu/chips"); out.mkdir(exist_ok=True)
for f in out.glob("*"): f.unlink()
def one(i):
    m = data.matrices[i]; inv = align.inverse(m)
    corners = np.array([[-.5, -.5, 1], [111.5, -.5, 1], [-.5, 111.5, 1], [111.5, 111.5, 1]]) @ inv.T
    lo = np.floor(corners.min(0)) - 3; hi = np.ceil(corners.max(0)) + 3
    x0, y0 = np.clip(lo, 0, 249).astype(int); x1, y1 = np.clip(hi, 1, 250).astype(int)
    x0, y0 = x0 // 16 * 16, y0 // 16 * 16
    b = subprocess.run(["jpegtran", "-copy", "none", "-progressive", "-optimize", "-crop", f"{x1-x0}x{y1-y0}+{x0}+{y0}", str(data.files[i])], capture_output=True, check=True).stdout
    moved = m.copy(); moved[:, 2] += m[:, :2] @ [x0, y0]
    photo = np.asarray(Image.open(io.BytesIO(b)).convert("RGB"))
    diff = np.abs(align.cut(photo, moved).astype(int) - data.chips[i]).max() if i % 20 == 0 else 0
    return b, moved, diff
with ThreadPoolExecutor(2) as pool:
    rows = list(pool.map(one, range(len(data))))
blob = b"".join(r[0] for r in rows)
ends = np.cumsum([len(r[0]) for r in rows])
half = len(blob) * 3 // 4
for i in range(2):  # 3/4 and 1/4
    (out / f"blob{i}").mkdir(); (out / f"blob{i}" / "blob.bin").write_bytes(blob[:half] if i == 0 else blob[half:])
np.savez_compressed(out / "meta.npz", ends=ends, matrices=np.stack([r[1] for r in rows]), files=np.array(["/".join(f.parts[-2:]) for f in data.files], dtype="S"))
d = np.array([r[2] for r in rows])[::20]
print(len(ends), "photos", len(blob) / 1e6, "MB; checked", len(d), "different", (d > 0).sum(), "max", d.max())

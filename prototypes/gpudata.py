"""LFW's training people: here from the cache, on the GPU machine from a packed file of JPEGs (with JOB_PACKED=1)."""
import io
import os
import pathlib
import time

import numpy as np
import torch
from PIL import Image

PACK = pathlib.Path(__file__).resolve().parent / "chips"


def students():
    """The FaceSet of the training people. The chips are a memory map."""
    from faceadv.faces import FaceSet

    if os.environ.get("JOB_RANDOM"):  # to try a job on a machine without photos
        n = 2000
        chips = np.random.default_rng(0).integers(0, 256, (n, 3, 112, 112), dtype=np.uint8)
        names, files = [f"p{i}" for i in range(n // 2)], [pathlib.Path(f"p{i // 2}/{i}.jpg") for i in range(n)]
        return FaceSet("random", chips, torch.arange(n) // 2, names, files, np.zeros((n, 2, 3)), np.ones(n, int), [])
    if not os.environ.get("JOB_PACKED"):
        from faceadv.training import loop

        return loop.students()
    done = pathlib.Path(os.environ["JOB_SHARED"]) / "chips.npy"
    meta = np.load(PACK / "meta.npz", allow_pickle=False)
    if not done.exists():
        from concurrent.futures import ThreadPoolExecutor

        from faceadv import align

        meta = dict(meta.items())
        torch.set_num_threads(1)

        parts = sorted(PACK.glob("blob*/blob.bin"))
        blob, ends = b"".join(part.read_bytes() for part in parts), meta["ends"]
        starts = np.concatenate([[0], ends[:-1]])

        def one(i):
            photo = np.asarray(Image.open(io.BytesIO(blob[starts[i] : ends[i]])).convert("RGB"))
            return align.cut(photo, meta["matrices"][i])

        began = time.time()
        with ThreadPoolExecutor(16) as pool:
            chips = np.stack(list(pool.map(one, range(len(ends)))))
        done.parent.mkdir(parents=True, exist_ok=True)
        part = done.with_name(f"{os.getpid()}.part.npy")
        np.save(part, chips)
        os.replace(part, done)
        print("unpacked", chips.shape, round(time.time() - began, 1), "s", flush=True)
    chips = np.load(done, mmap_mode="r")
    names = [n.decode() for n in meta["names"]]
    files = [pathlib.Path(f.decode()) for f in meta["files"]]
    n = len(files)
    found = FaceSet("lfw", chips, torch.from_numpy(meta["labels"]), names, files,
                    np.zeros((n, 2, 3)), np.ones(n, int), [])
    return found[: int(os.environ["JOB_TINY"])] if os.environ.get("JOB_TINY") else found

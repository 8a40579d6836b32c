"""What the recognisers reach on LFW, the thresholds of the converted ones, and what our chips cost.

    python benchmarks/thresholds.py

A threshold accepts 0.1 % of the pairs of different people among those whom trainings may see. MobileFaceNet's crops
reach beyond our chips: what shall stand there is chosen on View 1's training pairs. Crops that are cut out of the
photo, and means over a face and its mirror image, show what one chip for all networks costs. Needs LFW; half an hour.
Writes results/thresholds.json.
"""

import numpy as np
import torch
import torch.nn.functional as F

from faceadv import align, faces, pairs, recognisers, records, verification
from faceadv.networks import mobilefacenet
from faceadv.store.paths import PROJECT

RECORD = PROJECT / "results" / "thresholds.json"
FAR = 1e-3
# what may stand beyond the chip, as grid_sample calls it
BEYOND = {"grey": "zeros", "the border, repeated": "border", "the picture, mirrored": "reflection"}


def accepted(distances, same):
    """The threshold at ``FAR``, and the share of the pairs of one person that it accepts."""
    same = np.asarray(same)
    threshold = verification.threshold_at_far(distances[~same], FAR)
    return threshold, (distances[same] < threshold).mean()


def of_people(embeddings, labels):
    """Distances of all pairs of unit embeddings, and which show one person, a block at a time: 45 million on LFW."""
    near, same = [], []
    for i in range(0, len(embeddings), 1024):
        block, rest = embeddings[i : i + 1024], embeddings[i:]
        rows, columns = torch.triu_indices(len(block), len(rest), 1)
        near.append((2 - 2 * block @ rest.T).clamp(min=0).sqrt()[rows, columns].numpy())
        same.append((labels[i + rows] == labels[i + columns]).numpy())
    return np.concatenate(near), np.concatenate(same)


@torch.no_grad()
def from_photos(embed, data, index, side, inside):
    """Embeddings (N, D) of crops that are cut out of the photos. inside: (2, 3), from the crop to our chip."""
    made = []
    for i in index.tolist():
        back = align.inverse(data.matrices[i])
        photo, matrix = align.reduce(
            align.read_photo(data.files[i]),
            align.inverse(np.c_[back[:, :2] @ inside[:, :2], back @ [*inside[:, 2], 1]]),
        )
        places = align.grid(align.inverse(matrix), (side, side), photo.shape)
        photo = torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1)))[None].float() / 255
        made.append(embed(F.grid_sample(photo, places, padding_mode="border", align_corners=False).clamp(0, 1)))
    return torch.cat(made)


def measure(data, path=RECORD):
    """Measure and write the record. data: all of LFW."""
    people = torch.isin(data.labels, torch.tensor([data.names.index(n) for n in pairs.lfw_people(data, "train")]))
    train, test, view2 = pairs.lfw_view1(data, "train"), pairs.lfw_view1(data, "test"), pairs.lfw_view2(data)
    needed = {view: torch.cat([view.first, view.second]).unique() for view in (train, view2)}
    numbers = []

    def note(name, value, error=None, n=None, unit="%"):
        scale = 100 if unit == "%" else 1
        bounds = [None if error is None else scale * (value + sign * 1.96 * error) for sign in (-1, 1)]
        numbers.append(records.number(name, scale * value, *bounds, n, unit=unit))

    def distances(recogniser, view, part):
        """Of the pairs of a view, from the embeddings of the photos that it needs."""
        whole = torch.zeros(len(data), part.shape[1])
        whole[needed[view]] = part
        return verification.pair_distances(recogniser, whole, view)

    def folds(name, d):
        note(f"{name}, View 2: accuracy", *verification.ten_folds(d, view2.same, view2.fold)[:2], len(view2))

    for name in ("mobilefacenet", "mobilenet-vggface2"):
        recogniser = recognisers.load(name)
        embeddings = recognisers.embed_faces(recogniser, data)
        near, same = of_people(F.normalize(embeddings[people]), data.labels[people])
        threshold, share = accepted(near, same)
        note(f"{name}, training people: threshold", threshold, n=int((~same).sum()), unit="")
        note(f"{name}, training people: pairs of one person accepted", share, n=int(same.sum()))
        d = verification.pair_distances(recogniser, embeddings, test)
        best = {"the best": verification.best_threshold(d, test.same), "its own": recogniser.threshold}
        for which, threshold in best.items():
            reached = verification.accuracy(d, test.same, threshold)
            note(f"{name}, View 1 test: accuracy at {which} threshold", reached, n=len(test))
        d = verification.pair_distances(recogniser, embeddings, view2)
        folds(name, d)
        note(f"{name}, View 2: pairs of one person accepted", accepted(d, view2.same)[1], n=len(view2) // 2)
        note(f"{name}, View 2: area under the ROC", verification.roc(d, view2.same)[2], n=len(view2), unit="")

    dlib, chips = recognisers.load("dlib"), data.chips[needed[view2].numpy()]
    ours = recognisers.embed_faces(dlib, data)[needed[view2]]
    folds("dlib", distances(dlib, view2, ours))
    mirrored = recognisers.embed_all(dlib, np.ascontiguousarray(chips[..., ::-1]))
    folds("dlib, mean with the mirror image", distances(dlib, view2, (ours + mirrored) / 2))
    scale = align.SIZE / 150
    larger = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2]])
    folds(
        "dlib, 150 pixels out of the photo",
        distances(dlib, view2, from_photos(dlib.embed, data, needed[view2], 150, larger)),
    )

    recogniser = recognisers.load("mobilefacenet")
    network, crop = recogniser.network, align.similarity(mobilefacenet.TEMPLATE)

    def embed(x):
        return F.normalize(network.embedding(network.layers((255 * x - 127.5) / 128)))

    whole = from_photos(embed, data, needed[view2], mobilefacenet.SIDE, crop)
    folds("mobilefacenet, its crop out of the photo", distances(recogniser, view2, whole))
    for label, network.padding in BEYOND.items():
        part = recognisers.embed_all(recogniser, data.chips[needed[train].numpy()])
        d = distances(recogniser, train, part)
        reached = verification.accuracy(d, train.same, verification.best_threshold(d, train.same))
        note(f"mobilefacenet, {label}, View 1 train: accuracy at the best threshold", reached, n=len(train))
        note(
            f"mobilefacenet, {label}, View 1 train: pairs of one person accepted",
            accepted(d, train.same)[1],
            n=len(train) // 2,
        )
    data_used = {"faces": "lfw", "far": FAR, "threads": torch.get_num_threads()}
    return records.write(path, notebook="thresholds", profile="lfw", seed=0, numbers=numbers, data=data_used)


if __name__ == "__main__":
    for number in measure(faces.load("lfw"))["numbers"]:
        print("{name}: {value} [{low}, {high}] {unit}".format(**number))

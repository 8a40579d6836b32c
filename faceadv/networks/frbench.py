"""The recognisers of frbench, 45 networks of 25 architectures, fetched by that package into its own cache.

Source: Wang, FRBench (github.com/HKU-TASR/FRBench, MIT); an extra: ``pip install "faceadv[frbench]"``.
"""

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from faceadv import align
from faceadv.errors import Failed, Invalid, Missing
from faceadv.store import weights

__all__ = ["PREFIX", "FRBench", "file"]

PREFIX = "frbench:"  # of the names, as in "frbench:irse-50_arcface_ms1m": backbone, loss, data set


def file(name: str) -> Path:
    """The file of weights, fetched if it is not there. Raises ``Missing``, ``Failed`` or ``Invalid`` as ``FRBench``."""
    try:
        import frbench
    except ImportError as e:
        raise Missing('The recognisers "frbench:…" need a package: run `pip install "faceadv[frbench]"`.') from e
    try:
        with frbench.configure_scoped(update_check=False):
            asset = frbench.get_asset(name.removeprefix(PREFIX))
    except frbench.FRBenchAssetNotFoundError as e:
        raise Invalid(f'There is no recogniser "{name}": `frbench-download --list-models` lists them.') from e
    except frbench.FRBenchDownloadError as e:
        raise Failed(f"{name} could not be downloaded: {e}.") from e
    return Path(asset["path"]) / asset["contents"]["weight"]


class FRBench(nn.Module):
    """A network of frbench, by its name, without frbench's detector: chips are warped to its template inside.

    Input: (N, 3, H, W) float32 RGB in [0, 1]; ``Recogniser.embed`` checks it. Output: (N, D), not of unit length;
    differentiable. Raises ``Missing`` without the package, ``Failed`` if a download fails, ``Invalid`` for an unknown
    name and for weights that have changed since they were first used.
    """

    def __init__(self, name: str):
        super().__init__()
        with weights.remembered([file(name)]):
            import frbench

            with frbench.configure_scoped(update_check=False):
                made = frbench.FR(*name.removeprefix(PREFIX).rsplit("_", 2), eager_load=True)
        self.network, self.before = made.backbone.eval().requires_grad_(False), made.preprocessor
        template = align.similarity(self.before.template.double().numpy())
        places = align.grid(template, self.before.size, (align.SIZE, align.SIZE))
        self.register_buffer("places", places, persistent=False)
        self.padding = "zeros"  # as an attribute it is in the keys of caches

    def forward(self, images: Tensor) -> Tensor:
        x = images.flip(1) if self.before.channel == "bgr" else images
        x = (x - self.before.mean) / self.before.std
        places = self.places.expand(len(images), -1, -1, -1)
        return self.network(F.grid_sample(x, places, padding_mode=self.padding, align_corners=False))

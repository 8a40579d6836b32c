"""The face diffusion prior: a UNet of diffusers that predicts noise, or what the noise follows from."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from faceadv.errors import Invalid, Missing
from faceadv.store import weights

if TYPE_CHECKING:  # takes seconds, so it is imported where it is used
    from diffusers import SchedulerMixin, UNet2DModel

__all__ = ["build", "load", "prediction", "side"]

# what a UNet may predict: the noise e, the image x0, or v = sqrt(a) e - sqrt(1 - a) x0 (Salimans and Ho 2022)
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def build(side: int, widths: Sequence[int]) -> "UNet2DModel":
    """A UNet of diffusers for RGB images of that side: a level with one block for each width, attention on the last."""
    from diffusers import UNet2DModel

    plain = len(widths) - 1
    return UNet2DModel(
        sample_size=side,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        attention_head_dim=32,
        norm_num_groups=16,
    )


def side(unet: nn.Module) -> int:
    """The side S of the square images (N, 3, S, S) of a UNet. Raises ``Invalid`` if they are not square."""
    size = unet.config.sample_size
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    if len(sides) != 1 or None in sides:
        raise Invalid(f"The prior must be for square images, and its sample size is {size}.")
    return sides.pop()


def prediction(schedule: "SchedulerMixin | None") -> str:
    """What a UNet with this scheduler of diffusers predicts, one of ``PREDICTIONS``. ``Invalid`` for anything else."""
    kind = getattr(getattr(schedule, "config", None), "prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise Invalid(f'The prior must predict one of {", ".join(PREDICTIONS)}, and it predicts "{kind}".')
    return kind


def load(name: str | Path = "shipped") -> "tuple[UNet2DModel, SchedulerMixin]":
    """A diffusion prior, ``(unet, schedule)``: "shipped", one to fetch, a folder, or a name on the Hugging Face hub.

    It may be any model of square RGB images without classes that diffusers' ``DDPMPipeline.from_pretrained`` loads. It
    comes frozen and in float32. Raises ``Missing`` if there is none, ``Invalid`` for a model of another kind.
    """
    from diffusers import DDPMPipeline, UNet2DModel
    from diffusers.utils import logging

    if name == "shipped":
        name = weights.checked("prior")
    name = weights.DOWNLOADS.get(name, {}).get("hub", name)
    logging.disable_progress_bar()  # it would flash up, in the notebooks too
    try:
        with torch.random.fork_rng(devices=[]):  # as in ``common.shipped``
            folder = Path(name) if Path(name).is_dir() else Path(DDPMPipeline.download(name))
            # Models of 2022 are pickles, which diffusers reads with weights_only=True, and only without safetensors.
            safe = any(folder.rglob("*.safetensors"))
            with weights.remembered([] if safe else sorted(folder.rglob("*.bin"))):
                # the last option asks for accelerate, which is not here
                pipeline = DDPMPipeline.from_pretrained(folder, use_safetensors=safe, low_cpu_mem_usage=False)
    except Invalid:
        raise
    except (OSError, ValueError) as e:
        said = f'"{name}" is no diffusion model here: give a folder that diffusers wrote, or a name on its hub.'
        raise Missing(said) from e
    unet, schedule = pipeline.unet, pipeline.scheduler
    config, sums = unet.config, getattr(schedule, "alphas_cumprod", None)
    of_classes = config.get("class_embed_type") or config.get("num_class_embeds")
    if not isinstance(unet, UNet2DModel) or config.in_channels != 3 or config.out_channels not in (3, 6) or of_classes:
        raise Invalid(f'"{name}" is not a model of RGB images without classes.')
    if sums is None or not (sums > 0).all():
        raise Invalid(f'"{name}" has no schedule that keeps something of the image at every time.')
    prediction(schedule)
    unet.register_to_config(sample_size=side(unet))  # one number, also where the file has two
    return unet.float().eval().requires_grad_(False), schedule

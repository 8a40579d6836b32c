"""The face diffusion prior: a UNet of diffusers that predicts noise."""

from diffusers import DDPMPipeline, UNet2DModel
from diffusers.utils import logging

from faceadv.errors import Missing
from faceadv.store import weights


def build(side, widths):
    """A UNet of diffusers for RGB images of ``side``, one block a level, attention on the lowest one."""
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


def load(name="shipped"):
    """A diffusion prior: ``(unet, schedule)`` of "shipped", a folder, or a name on the Hugging Face hub.

    Anything that diffusers' ``DDPMPipeline.from_pretrained`` loads, frozen, in float32. Raises ``FileNotFoundError``
    if there is none.
    """
    if name == "shipped":
        name = weights.checked("prior")
    logging.disable_progress_bar()  # it would show for a blink, in the notebooks too
    try:
        # the last option asks for accelerate, which is not here
        pipeline = DDPMPipeline.from_pretrained(name, use_safetensors=True, low_cpu_mem_usage=False)
    except (OSError, ValueError) as e:
        raise Missing(
            f'"{name}" is no diffusion model here: give a folder that diffusers wrote, or a name on its hub.'
        ) from e
    return pipeline.unet.float().eval().requires_grad_(False), pipeline.scheduler

"""Ways from noise to image; `base` has the loop, each other file one step."""

from diffusion.samplers.base import Hook, Sampler, Step
from diffusion.samplers.ddim import DDIM
from diffusion.samplers.ddpm import DDPM

__all__ = ["DDIM", "DDPM", "Hook", "Sampler", "Step"]

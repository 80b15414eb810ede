"""Ways from noise to image; `base` has the loop, `grids` the times, each other file one step."""

from diffusion.samplers.base import Hook, Project, Sampler, Step
from diffusion.samplers.ddim import DDIM
from diffusion.samplers.ddpm import DDPM
from diffusion.samplers.dpmpp import DPMpp
from diffusion.samplers.heun import Heun

__all__ = ["DDIM", "DDPM", "DPMpp", "Heun", "Hook", "Project", "Sampler", "Step"]

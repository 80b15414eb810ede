"""The experiments of published models hold the published numbers, and where they differ, what they document."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion.build import build

CONF = Path(__file__).resolve().parents[2] / "conf"
SEED001 = {
    "parameters": 34_122_243,
    "T": 400,
    "betas": (1e-4, 0.02),
    "target": "eps",
    "loss": "mse",
    "lr": 1e-4,
    "batch": 128,
    "epochs": 200,
    "drop_prob": 0.1,
    "clipping": 1.0,
    "plateau": (0.5, 15, 5e-5),
    "ema": None,
    "times": "uniform",
    "sampler": ("DDPM", None, "beta_prev", False),
}
DEFAULTS = {"ema": 0.9999, "times": "stratified"}
COURSE = {"parameters": 44_900_355, "epochs": 100, "clipping": None, "plateau": None}
DIGITS = {"parameters": 2_115_841, "T": 300, "loss": "huber", "lr": 1e-3, "epochs": 50, "drop_prob": None}
EXPERIMENTS = {
    "flowers_seed001": SEED001,
    "flowers": SEED001 | DEFAULTS | {"sampler": ("DDPM", None, "posterior", True)},
    "flowers_course": SEED001 | COURSE,
    # Its rate was never reduced.
    "mnist": SEED001 | DEFAULTS | DIGITS | {"plateau": None, "sampler": ("DDIM", 50, None, True)},
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_experiment_is_the_published_one(experiment: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [f"experiment={experiment}"])
    module = OmegaConf.to_container(config.module, resolve=True)
    assert isinstance(module, dict)
    with torch.device("meta"):
        network = build(module["denoiser"]["network"])
    schedule = build(module["denoiser"]["schedule"])
    assert torch.equal(schedule.betas, torch.linspace(1e-4, 0.02, config["T"], dtype=torch.float64))
    assert network.T == schedule.T
    assert module["optimizer"]["_target_"] == "torch.optim.Adam"
    plateau, sampler, ema = module["scheduler"], module["sampler"], config.callbacks.get("ema")
    found = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "T": schedule.T,
        "betas": (float(schedule.betas[0]), float(schedule.betas[-1])),
        "target": module["denoiser"]["target"],
        "loss": module["denoiser"]["loss"],
        "lr": module["optimizer"]["lr"],
        "batch": config.data.batch_size,
        "epochs": config.trainer.max_epochs,
        "drop_prob": module.get("drop_prob"),
        "clipping": config.trainer.gradient_clip_val,
        "plateau": plateau and (plateau["factor"], plateau["patience"], plateau["min_lr"]),
        "ema": ema and ema.decay,
        "times": module["times"],
        "sampler": (
            sampler["_target_"].rpartition(".")[2],
            sampler["steps"],
            sampler.get("variance"),
            sampler["clip"],
        ),
    }
    assert found == EXPERIMENTS[experiment]
    assert config.trainer.max_steps == -1
    assert plateau is None or plateau["_target_"] == "diffusion.modules.learning_rate.plateau"
    assert module["denoiser"]["weighting"] == {"_target_": "diffusion.weighting.unit", "_partial_": True}


@pytest.mark.parametrize("base", ["linear", "scaled_linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("experiment", ["demo", "flowers"])
def test_any_schedule_may_end_in_noise_alone(experiment: str, base: str) -> None:
    words = [f"experiment={experiment}", "schedule=zero_terminal_snr", f"schedule@schedule.schedule={base}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        schedule = build(OmegaConf.to_container(compose("train", words).schedule, resolve=True))
        plain = build(OmegaConf.to_container(compose("train", [words[0], f"schedule={base}"]).schedule, resolve=True))
    first, last = torch.tensor([1 / schedule.T, 1.0], dtype=torch.float64)
    assert schedule.snr(last) == 0
    assert torch.isclose(schedule.snr(first), plain.snr(first))

"""What two defaults buy: stratified times, and averaged weights; on a trained checkpoint, drawn with equal batches.

python -m benchmarks.training_choices [checkpoint]     default: the one that `make demo` leaves
"""

import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.where import print_where
from diffusion import checkpoint
from diffusion.build import build
from diffusion.modules.diffusion import Diffusion, draw_times
from diffusion.rng import generator

DEMO = Path(__file__).resolve().parents[1] / "runs" / "demo" / "checkpoints" / "last.ckpt"
BATCHES = 60


def validation_loss(module: Diffusion, batches: list[dict[str, Tensor]]) -> float:
    """Mean over the fixed grid of times and noise, as in training."""
    return torch.cat([module.validation_losses(batch)[1] for batch in batches]).mean().item()


def batch_losses(module: Diffusion, batches: list[dict[str, Tensor]], spread: str) -> list[float]:
    """Mean loss of each batch under fresh times; the noise is the same for both ways of spreading them."""
    losses = []
    for k, batch in enumerate(batches):
        x_0 = batch["image"]
        t = draw_times(len(x_0), module.denoiser.schedule.T, spread, generator(1, k))  # type: ignore[arg-type]
        eps = torch.randn(x_0.shape, generator=generator(2, k))
        losses.append(module.denoiser.loss(x_0, t, eps, module.validation_condition(batch)).mean().item())
    return losses


@torch.no_grad()
def main() -> None:
    print_where()
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO
    saved = checkpoint.read(path)
    data = build(saved["config"]["data"])
    data.prepare_data()
    data.setup("fit")
    module = build(saved["config"]["module"]).eval()
    module.conditioner.prepare(data.table)
    train = [batch for batch, _ in zip(data.train_dataloader(), range(BATCHES), strict=False)]
    val = list(data.val_dataloader())

    module.load_state_dict(saved["state_dict"])
    live = validation_loss(module, val)
    module.denoiser.network.load_state_dict(saved["ema"]["network"])
    averaged = validation_loss(module, val)
    print(f"{path}, step {saved['global_step']}")
    print(f"validation loss   live weights {live:.5f}   averaged {averaged:.5f}   ratio {averaged / live:.4f}")
    spread = {name: batch_losses(module, train, name) for name in ("uniform", "stratified")}
    deviation = {name: statistics.stdev(values) for name, values in spread.items()}
    for name, values in spread.items():
        print(f"{name:12} times: loss of a batch {statistics.mean(values):.4f} ± {deviation[name]:.4f}")
    print(f"variance of the loss, uniform over stratified: {(deviation['uniform'] / deviation['stratified']) ** 2:.1f}")


if __name__ == "__main__":
    main()

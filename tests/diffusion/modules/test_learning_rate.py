"""The sequences of rates that the schedules give."""

import pytest
import torch

from diffusion.modules.learning_rate import plateau


def test_the_plateau_halves_the_rate_down_to_its_floor():
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    config = plateau(optimizer, total_steps=0, factor=0.5, patience=2, min_lr=3e-5)
    assert (config["monitor"], config["interval"]) == ("val/loss", "epoch")
    rates = []
    for _ in range(12):
        config["scheduler"].step(0.1)
        rates.append(optimizer.param_groups[0]["lr"])
    # The first loss is the best; the third after it that is no better lowers the rate.
    assert rates == pytest.approx([1e-4] * 3 + [5e-5] * 3 + [3e-5] * 6)

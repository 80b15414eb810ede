"""The sequences of rates that the schedules give."""

import pytest
import torch

from diffusion.modules.learning_rate import plateau, retune


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


def test_a_group_with_a_value_of_its_own_keeps_it():
    old, new = ({"_target_": "torch.optim.AdamW", "_partial_": True, "weight_decay": w} for w in (0.05, 0.1))
    groups = [{"lr": 1e-3, "weight_decay": 0.05}, {"lr": 1e-3, "weight_decay": 0.0}]
    checkpoint = {
        "config": {"module": {"optimizer": old}},
        "optimizer_states": [{"param_groups": groups}],
        "lr_schedulers": [],
    }
    retune(checkpoint, {"module": {"optimizer": new}})
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_a_checkpoint_of_before_the_optimizer_was_chosen_is_left_alone():
    checkpoint = {"config": {"module": {"lr": 1e-3}}, "optimizer_states": [{"param_groups": []}], "lr_schedulers": []}
    retune(checkpoint, {"module": {"optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True}}})
    assert checkpoint["optimizer_states"] == [{"param_groups": []}]

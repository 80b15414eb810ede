"""When the callbacks that act every few epochs do so."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

from callbacks.measure import due
from tests.callbacks.tiny_training import Dots, module, trainer


class Watch(Callback):
    """Notes at which steps an act every n epochs is due."""

    def __init__(self, n: int) -> None:
        self.n, self.steps = n, []  # type: ignore[var-annotated]

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if due(trainer, self.n):
            self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("options", "n", "steps"),
    [
        pytest.param({}, 2, [8, 16, 24], id="each epoch is validated"),
        pytest.param({"check_val_every_n_epoch": 2}, 3, [16, 24], id="every second one is"),
        pytest.param({"check_val_every_n_epoch": 3}, 1, [12, 24], id="fewer are than asked for"),
        pytest.param({"check_val_every_n_epoch": None, "val_check_interval": 3}, 2, [9, 18, 24], id="by steps"),
        pytest.param({"check_val_every_n_epoch": None, "val_check_interval": 12}, 1, [12, 24], id="by many steps"),
        pytest.param({"val_check_interval": 0.5}, 2, [6, 8, 14, 16, 22, 24], id="within epochs"),
    ],
)
def test_an_act_is_due_at_the_first_validation_after_so_many_epochs(
    options: dict[str, Any], n: int, steps: list[int], tmp_path: Path
) -> None:
    watch = Watch(n)
    trainer(tmp_path, watch, max_epochs=6, **options).fit(module(), datamodule=Dots())
    assert watch.steps == steps

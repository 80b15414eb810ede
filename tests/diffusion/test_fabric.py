"""What one rank does while the others wait, and the trainer's settings without the trainer."""

from typing import Any

import pytest
import torch

from diffusion.errors import AntherError
from diffusion.fabric import make_fabric, on_rank_zero


class Ranks:
    """The two calls that are made of a Fabric, one rank after the other."""

    def __init__(self) -> None:
        self.said: Any = None
        self.is_global_zero = True

    def broadcast(self, value: Any) -> Any:
        if self.is_global_zero:
            self.said = value
        return self.said


def on_both(work: Any) -> list[Any]:
    ranks, found = Ranks(), []
    for is_zero in (True, False):
        ranks.is_global_zero = is_zero
        try:
            found.append(on_rank_zero(ranks, work))  # type: ignore[arg-type]
        except Exception as error:
            found.append(error)
    return found


def test_rank_0_alone_works() -> None:
    calls: list[int] = []
    assert on_both(lambda: calls.append(1) or "done") == ["done", None]
    assert calls == [1]


@pytest.mark.parametrize("fault", [AntherError("no such file."), ZeroDivisionError("x")])
def test_its_fault_is_one_of_all(fault: Exception) -> None:
    def work() -> None:
        raise fault

    zero, other = on_both(work)
    assert zero is fault
    assert isinstance(other, AntherError)
    assert str(other) == f"rank 0: {fault}"


def test_options_of_ddp_are_the_trainers_alone() -> None:
    strategy = {"_target_": "lightning.pytorch.strategies.DDPStrategy", "static_graph": True}
    fabric = make_fabric({"accelerator": "cpu", "devices": 2, "strategy": strategy, "max_steps": 3})
    assert type(fabric.strategy).__name__ == "DDPStrategy"
    with pytest.raises(AntherError, match="trainer=cpu"):
        make_fabric({"accelerator": "cpu", "devices": 1, "precision": "17"})


def test_float32_is_not_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    # No GPU is asked for: what cuDNN would do there is torch's own default, and it is global.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    make_fabric({"accelerator": "cpu", "devices": 1, "precision": "32-true"})
    assert not torch.backends.cudnn.allow_tf32

"""A killed training goes on to the bit: weights, averages, optimizer, schedule, order, log and scores."""

from pathlib import Path

import pytest

from diffusion import checkpoint
from tests.faults.forks import Forks
from tests.faults.small import TRAIN, difference, log, trained

LIMITS = {
    "max_steps": ["trainer.max_steps=20"],
    "max_epochs": ["trainer.max_steps=-1", "trainer.max_epochs=3"],
    "accumulation": ["trainer.max_steps=20", "trainer.accumulate_grad_batches=2", "data.batch_size=4"],
}
SCHEDULERS = {
    "warmup_cosine": ["scheduler.warmup_steps=3"],
    # With this patience it lowers the rate after each epoch.
    "plateau": ["scheduler=plateau", "scheduler.patience=-1", "scheduler.min_lr=0"],
}


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("limit", LIMITS)
def test_a_killed_run_goes_on_to_the_bit(limit: str, scheduler: str, forks: Forks, whole: Path, tmp_path: Path) -> None:
    # Seven steps an epoch: the twelfth is in the middle of the second one, and the checkpoint two steps before it.
    of_ours = [word for word in TRAIN if not word.startswith(("trainer.max_steps", "callbacks.last", "scheduler"))]
    words = [*of_ours, "data.n_train=56", *LIMITS[limit], *SCHEDULERS[scheduler], "callbacks.last.every_n_steps=5"]
    words += ["callbacks.last.share=1.0"]
    one, other = (f"hydra.run.dir={tmp_path / name}" for name in ("one", "other"))
    assert (ended := forks.run("train.py", *words, one)).status == 0, ended.printed
    assert forks.run("train.py", *words, other, at_step=12).status == -9
    last = checkpoint.read(tmp_path / "other" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 10
    assert 0 < last["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["batches"] < 14
    assert (ended := forks.run("train.py", *words, other)).status == 0, ended.printed
    assert "last.ckpt" in ended.printed.split("goes on from")[1].splitlines()[0]
    assert difference(trained(tmp_path / "one"), trained(tmp_path / "other")) is None
    rates = {row["lr"] for row in log(tmp_path / "one") if row["lr"]}
    assert len(rates) > 1, "the schedule does nothing, so the test says nothing about it"


@pytest.mark.slow
def test_two_ranks_are_killed_and_stopped_and_go_on_to_the_bit(forks: Forks, whole: Path, tmp_path: Path) -> None:
    """Rank 0 alone gets the signals; rank 1 is a process that Lightning started."""
    words = ["train.py", *TRAIN, "trainer=ddp_sim", "scheduler.warmup_steps=3"]
    one, other = (f"hydra.run.dir={tmp_path / name}" for name in ("one", "other"))
    assert (ended := forks.run(*words, one)).status == 0, ended.printed
    assert forks.run(*words, other, at_step=7).status == -9
    rare = "callbacks.last.every_n_steps=1000"
    ended = forks.run(*words, rare, other, at_step=12, number=15)
    assert ended.status == 143, ended.printed
    assert "stopped by SIGTERM" in ended.printed
    last = checkpoint.read(tmp_path / "other" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 13
    assert all(len(rows) == 2 for rows in last["epoch_means"].values())
    assert (ended := forks.run(*words, other)).status == 0, ended.printed
    assert difference(trained(tmp_path / "one"), trained(tmp_path / "other")) is None

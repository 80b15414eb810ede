"""A killed training goes on to the bit: weights, averages, optimizer, schedule, order, log and scores."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion import checkpoint
from tests.faults.forks import ROOT, Forks
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
def test_dropout_of_a_killed_run_goes_on_where_it_was(forks: Forks, whole: Path, tmp_path: Path) -> None:
    network = "network=adm network.channels=32 network.channel_mult=[1] network.num_blocks=1 network.head_channels=16"
    of_ours = [word for word in TRAIN if not word.startswith("network.down_chs")]
    words = [*of_ours, *network.split(), "network.attention_resolutions=[]", "network.dropout=0.3"]
    words += ["network.c_embed_dim=64", "trainer.max_steps=10", "trainer.accumulate_grad_batches=2"]
    one, other = (f"hydra.run.dir={tmp_path / name}" for name in ("one", "other"))
    assert (ended := forks.run("train.py", *words, one)).status == 0, ended.printed
    assert forks.run("train.py", *words, other, at_step=7).status == -9
    assert (ended := forks.run("train.py", *words, other)).status == 0, ended.printed
    assert difference(trained(tmp_path / "one"), trained(tmp_path / "other")) is None


@pytest.mark.slow
def test_two_ranks_are_killed_and_stopped_and_go_on_to_the_bit(tmp_path: Path) -> None:
    words = [*TRAIN, "trainer=ddp_sim", "trainer.max_steps=60", "scheduler.warmup_steps=3"]
    one, other = tmp_path / "one", tmp_path / "other"
    assert finish(start(words, one)) == (0, "")
    killed = start(words, other)
    wait_for_step(7, other, killed)
    killed.kill()  # the command; its ranks end with it
    killed.communicate(timeout=60)
    stopped = start(words, other)
    wait_for_step(25, other, stopped)
    stopped.terminate()
    status, said = finish(stopped)
    assert status == 143
    assert "stopped by SIGTERM: the same command" in said
    assert 25 <= step(other) < 60
    assert finish(start(words, other)) == (0, "")
    assert difference(trained(one), trained(other)) is None


def start(words: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "train.py", *words, f"hydra.run.dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its status, and what it said of faults."""
    _, printed = process.communicate(timeout=280)
    return process.returncode, "".join(line for line in printed.splitlines(True) if "error: " in line or "stop" in line)


def step(folder: Path) -> int:
    last = folder / "checkpoints" / "last.ckpt"
    return int(checkpoint.read(last)["global_step"]) if last.exists() else 0


def wait_for_step(wanted: int, folder: Path, process: subprocess.Popen[str]) -> None:
    while step(folder) < wanted:
        assert process.poll() is None, finish(process)
        time.sleep(0.02)

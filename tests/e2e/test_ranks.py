"""Several processes, however they are started, are one run: one folder, one sweep, the values of one job."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusion import checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "experiment=demo",
    "data.n_train=64",
    "data.n_val=15",
    "data.batch_size=8",
    "network.down_chs=[32,32,32]",
    "callbacks=fit",
    "trainer=ddp_sim",
    "trainer.max_steps=3",
]
Start = Callable[..., None]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def check(processes: list[subprocess.Popen[str]]) -> None:
    results = [process.communicate(timeout=280) for process in processes]
    for process, (out, err) in zip(processes, results, strict=True):
        assert process.returncode == 0, out + err


def by_lightning(words: list[str]) -> None:
    check([_popen([sys.executable, "train.py", *words], environment())])


def by_torchrun(words: list[str]) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    check([_popen([*torchrun, "train.py", *words], environment())])


def by_srun(words: list[str]) -> None:
    """What srun would set in the environment of two tasks on this machine."""
    task = {
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": str(10_000 + os.getpid()),
        "SLURM_NODELIST": "127.0.0.1",
    }
    started = []
    for rank in ("1", "0"):
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        started.append(_popen([sys.executable, "train.py", *words], environment(**task, **own)))
    check(started)


def _popen(words: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def losses(folder: Path) -> list[str]:
    with (folder / "logs" / "metrics.csv").open() as file:
        return [row["val/loss"] for row in csv.DictReader(file) if row["val/loss"]]


@pytest.mark.slow
@pytest.mark.parametrize("start", [by_lightning, by_torchrun, by_srun])
def test_a_sweep_on_two_ranks_is_one_sweep_with_each_jobs_own_values(start: Start, tmp_path: Path) -> None:
    # The time is part of the folder's name: ranks that composed it themselves would make several.
    folder = f"hydra.sweep.dir={tmp_path}/${{now:%f}}"
    start(["-m", *TINY, "optimizer.lr=1e-4,1e-2", folder])
    (sweep,) = tmp_path.iterdir()
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "multirun.yaml"}
    rates = [checkpoint.read(sweep / job / "checkpoints" / "last.ckpt")["config"]["optimizer"]["lr"] for job in "01"]
    assert rates == [1e-4, 1e-2]
    assert len(losses(sweep / "0")) == len(losses(sweep / "1")) == 1
    assert losses(sweep / "0") != losses(sweep / "1")


@pytest.mark.slow
def test_ranks_and_accumulation_train_the_same_network(tmp_path: Path) -> None:
    """Twelve samples a step: on one process, on two, on three, and gathered over two batches."""
    ways = {
        "one": ["trainer.devices=1", "data.batch_size=12"],
        "two": ["trainer.devices=2", "data.batch_size=6"],
        "three": ["trainer.devices=3", "data.batch_size=4"],
        "gathered": ["trainer.devices=1", "data.batch_size=6", "trainer.accumulate_grad_batches=2"],
    }
    states = {}
    for name, words in ways.items():
        # Five steps an epoch in all of them: no batch is left over.
        # Adam makes steps of a bias whose gradient is only rounding, before a norm; its eps takes those out.
        whole = ["data.n_train=60", "+optimizer.eps=1e-3", "trainer.max_steps=7", f"hydra.run.dir={tmp_path / name}"]
        by_lightning([*TINY, *words, *whole])
        states[name] = checkpoint.read(tmp_path / name / "checkpoints" / "last.ckpt")
    first = states["one"]["state_dict"]
    for name, state in states.items():
        assert state["global_step"] == 7, name
        for key, value in state["state_dict"].items():
            torch.testing.assert_close(value, first[key], rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


@pytest.mark.slow
def test_a_fault_of_rank_0_ends_the_others(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "train.py", *TINY, "network=nothing", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode != 0
    assert done.stderr.count("error: ") >= 1
    assert not list(tmp_path.rglob("*.ckpt"))

"""Several processes, however they are started, are one run: one folder, one sweep, the values of one job."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from diffusion import checkpoint
from tests.slurm import pretend_slurm

ROOT = Path(__file__).resolve().parents[2]
REPORT = {"sweep.csv", "sweep.png"}
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
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
Refused = Callable[..., str]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def check(processes: list[subprocess.Popen[str]]) -> None:
    results = [process.communicate(timeout=900) for process in processes]
    for process, (out, err) in zip(processes, results, strict=True):
        assert process.returncode == 0, out + err


def by_lightning(words: list[str]) -> None:
    check([_popen([sys.executable, "train.py", *words], environment())])


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


def one_sweep(folder: Path) -> Path:
    """The sweep below a folder whose name has the time in it: ranks that composed it themselves would make several."""
    (sweep,) = folder.iterdir()
    return sweep


def rates(sweep: Path, jobs: str) -> list[float]:
    """What each job was really trained with, by its checkpoint."""
    paths = [sweep / job / "checkpoints" / "last.ckpt" for job in jobs]
    states = [checkpoint.read(path) for path in paths]
    for state in states:
        # Adam's own number, not only what the config says.
        assert state["optimizer_states"][0]["param_groups"][0]["initial_lr"] == state["config"]["optimizer"]["lr"]
    return [state["config"]["optimizer"]["lr"] for state in states]


def losses(folder: Path) -> list[str]:
    with (folder / "logs" / "metrics.csv").open() as file:
        return [row["val/loss"] for row in csv.DictReader(file) if row["val/loss"]]


@pytest.mark.slow
def test_every_rank_of_a_trial_has_its_values(tmp_path: Path) -> None:
    """Without a seed of its own Optuna would give a rank that swept for itself other values."""
    search = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    kept = "hydra.sweeper.storage='sqlite:///${hydra.sweep.dir}/study.db'"
    by_lightning(
        ["-m", *TINY, *search, kept, "optimizer.lr=interval(1e-4,1e-2)", f"hydra.sweep.dir={tmp_path}/${{now:%f}}"]
    )
    sweep = one_sweep(tmp_path)
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "study.db", "optimization_results.yaml", *REPORT}
    import optuna

    trials = optuna.load_study(study_name=None, storage=f"sqlite:///{sweep}/study.db").trials
    assert rates(sweep, "01") == [trial.params["optimizer.lr"] for trial in trials]
    objectives = [json.loads((sweep / job / "result.json").read_text())["objective"] for job in "01"]
    assert objectives == [trial.value for trial in trials]
    assert objectives[0] != objectives[1]
    best = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert best["best_value"] == min(objectives)
    # Ranks with other values would have trained apart: their loss would not be that of the checkpoint.
    assert [float(losses(sweep / job)[0]) for job in "01"] == pytest.approx(objectives)


@pytest.mark.slow
def test_a_failed_job_does_not_end_a_sweep_of_torchrun(tmp_path: Path) -> None:
    words = ["-m", *TINY, "optimizer.lr=1e-4,-1,1e-2", f"hydra.sweep.dir={tmp_path}/${{now:%f}}"]
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "train.py"]
    process = _popen([*torchrun, *words], environment())
    out, err = process.communicate(timeout=900)
    assert process.returncode != 0, out + err
    sweep = one_sweep(tmp_path)
    assert rates(sweep, "02") == [1e-4, 1e-2]
    assert "Invalid learning rate" in json.loads((sweep / "1" / "failed.json").read_text())["error"]
    assert "error: 1 of 3 jobs failed" in err
    assert losses(sweep / "0") != losses(sweep / "2")


@pytest.mark.slow
def test_ranks_of_srun_are_one_sweep(tmp_path: Path) -> None:
    by_srun(["-m", *TINY, "optimizer.lr=1e-4,1e-2", f"hydra.sweep.dir={tmp_path}/${{now:%f}}"])
    sweep = one_sweep(tmp_path)
    assert {path.name for path in sweep.iterdir()} == {"0", "1", "multirun.yaml", *REPORT}
    assert rates(sweep, "01") == [1e-4, 1e-2]
    assert len(losses(sweep / "0")) == len(losses(sweep / "1")) == 1
    assert losses(sweep / "0") != losses(sweep / "1")


@pytest.mark.slow
def test_tasks_of_submitit_are_the_ranks_of_a_job(tmp_path: Path) -> None:
    path = pretend_slurm(tmp_path / "bin")
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2", "optimizer.lr=1e-4,1e-2"]
    words = ["train.py", "-m", *TINY, *slurm, f"hydra.sweep.dir={tmp_path}/sweeps/${{now:%f}}"]
    check([_popen([sys.executable, *words], environment(PATH=path))])
    sweep = one_sweep(tmp_path / "sweeps")
    assert rates(sweep, "01") == [1e-4, 1e-2]
    for job in "01":
        out = "".join(path.read_text() for path in sweep.glob(f".submitit/*_{job}/*_0_log.out"))
        assert "2 x cpu" in out


@pytest.mark.slow
def test_two_machines_are_one_run(tmp_path: Path) -> None:
    """Two agents of torchrun that meet over the loopback, each with a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for node in ("0", "1"):
        meet = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", node, "--master-addr", "127.0.0.1"]
        words = ["train.py", *TINY, "trainer.devices=1", "trainer.num_nodes=2"]
        words = [*TORCHRUN, *meet, "--master-port", str(port), *words, f"hydra.run.dir={tmp_path}/runs/${{now:%f}}"]
        agents.append(_popen(words, environment()))
    check(agents)
    run = one_sweep(tmp_path / "runs")
    assert checkpoint.read(run / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert len(losses(run)) == 1


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


def ranks_of(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """The processes of a job by their rank, when all are there."""
    everybody = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in everybody if "diffusion.ranks" in child.cmdline()]
    return {int(child.environ().get("LOCAL_RANK", "0")): child for child in ranks}


def kill_a_rank(words: list[str], rank: int, when: Callable[[], bool]) -> str:
    """Kills one rank of a command, sees to it that it ends soon, with nobody left, and returns what it said."""
    process = _popen([sys.executable, *words], environment())
    until = time.monotonic() + 900
    while not when():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    ranks = ranks_of(process)
    ranks[rank].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    out, err = process.communicate(timeout=300)
    assert time.monotonic() - killed < 120
    assert process.returncode == 1, out + err
    assert psutil.wait_procs(list(ranks.values()), timeout=60)[1] == []
    (sentence,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return sentence


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_training_with_a_killed_rank_ends_and_goes_on(rank: int, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["train.py", *TINY, *LONG, f"hydra.run.dir={folder}"]
    last = folder / "checkpoints" / "last.ckpt"
    sentence = kill_a_rank(words, rank, last.exists)
    assert "ended from outside" in sentence
    assert "the same command goes on" in sentence
    assert checkpoint.read(last)["global_step"] < 40
    by_lightning(words[1:])
    ours, theirs = (checkpoint.read(path / "checkpoints" / "last.ckpt") for path in (folder, whole))
    assert ours["global_step"] == theirs["global_step"] == 40
    for key, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key
    assert losses(folder) == losses(whole)


LONG = ["trainer.max_steps=40", "callbacks.last.every_n_steps=1", "callbacks.last.share=1.0"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training on two ranks that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    by_lightning([*TINY, *LONG, f"hydra.run.dir={folder}"])
    return folder


@pytest.mark.slow
def test_a_fault_of_rank_0_ends_the_others(tmp_path: Path) -> None:
    torchrun = [*TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "train.py", *TINY, "network=nothing", f"hydra.run.dir={tmp_path / 'run'}"]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode != 0
    assert done.stderr.count("error: ") >= 1
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("word", ["trainer=fsdp", "trainer=deepspeed", "trainer.strategy=fsdp", "trainer.strategy=xla"])
def test_what_is_not_ddp_is_refused_before_any_work(word: str, refused: Refused, tmp_path: Path) -> None:
    for script, more in (("train.py", TINY), ("evaluate.py", ["ckpt=nowhere.ckpt"])):
        more = [item for item in more if not item.startswith("trainer=")]
        sentence = refused(script, *more, word, folder=tmp_path / script)
        assert f"{word} is not supported" in sentence
        assert "trainer=ddp" in sentence

"""Processes of a job: who starts them, what becomes of them, and what is said about it; what trains is in tests/e2e."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from diffusion import ranks
from diffusion.errors import AntherError

ROOT = Path(__file__).resolve().parents[2]
TWO = {"devices": 2, "num_nodes": 1, "strategy": "ddp"}


@pytest.fixture(autouse=True)
def _nobody_started_this(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_", "TORCHELASTIC_"))]:
        monkeypatch.delenv(name)


def run(job: str, folder: Path, **config: Any) -> Any:
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    return ranks.Leader().run(f"tests.diffusion.rank_jobs.{job}", {"trainer": TWO, **config}, folder)


def ended(folder: Path) -> bool:
    """Whether no rank of the job is left, a moment later."""
    pids = [int(path.read_text()) for path in folder.glob("pid?")]
    assert len(pids) == 2
    until = time.monotonic() + 20
    while alive := [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]:
        if time.monotonic() > until:
            return not alive
        time.sleep(0.05)
    return True


def test_rank_0_gives_the_value(tmp_path: Path) -> None:
    assert run("answers", tmp_path, x=3.5) == 3.5
    assert ended(tmp_path)
    # The second job of a sweep finds nothing of the first.
    assert run("answers", tmp_path / "second", x=1) == 1
    assert not {"LOCAL_RANK", "MASTER_ADDR", ranks.FILE} & set(os.environ)


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ("refuses", "^x is a bad value.$"),
        ("breaks", "rank 0 broke off with ZeroDivisionError: x is a surprise"),
        ("is_killed", r"ended from outside \(SIGKILL.*the same command goes on"),
        ("follower_refuses", "^rank 1 has seen a bad value.$"),
    ],
)
def test_what_a_rank_died_of_is_said_and_nobody_is_left(job: str, says: str, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(AntherError, match=says):
        run(job, tmp_path)
    assert time.monotonic() - started < 60
    if (tmp_path / "pid0").exists():
        assert ended(tmp_path)


def test_a_reason_is_that_of_this_time(tmp_path: Path) -> None:
    with pytest.raises(AntherError, match="bad value"):
        run("refuses", tmp_path)
    with pytest.raises(AntherError, match="SIGKILL"):
        run("is_killed", tmp_path)


COMMAND = """
import sys
from pathlib import Path
from diffusion import cli, ranks
folder = Path(sys.argv[1])
cli.run(lambda: ranks.leader.run("tests.diffusion.rank_jobs.waits", {"trainer": {"devices": 2}}, folder))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_every_rank(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", COMMAND, str(tmp_path)], cwd=ROOT)
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("waits?"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    status = process.wait(timeout=60)
    assert ended(tmp_path)
    stopped = {path.name for path in tmp_path.glob("stopped?")}
    if number == signal.SIGTERM:
        assert status == 128 + signal.SIGTERM
        assert stopped == {"stopped0", "stopped1"}
    else:
        assert status == -signal.SIGKILL
        assert stopped == set()  # nobody could tell them; they saw that they were alone


AGENT = """
import os, subprocess, sys, time
own = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
wait = "import time; from diffusion import cli; cli.run(lambda: print('begun', flush=True) or time.sleep(600), True)"
process = subprocess.Popen([sys.executable, "-c", wait], env={**os.environ, **own}, stdout=subprocess.PIPE)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(600)
"""


def test_processes_of_torchrun_do_not_outlive_it() -> None:
    agent = subprocess.Popen([sys.executable, "-c", AGENT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None
    rank = psutil.Process(int(agent.stdout.readline()))
    assert rank.is_running()
    agent.kill()
    agent.wait()
    assert psutil.wait_procs([rank], timeout=30)[1] == []


def test_the_log_of_the_run_is_hydras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = {"class": "logging.FileHandler", "filename": str(tmp_path / "run.log")}
    settings = {"version": 1, "handlers": {"file": file}, "root": {"level": "INFO", "handlers": ["file"]}}
    monkeypatch.setattr(ranks, "_logging", lambda: settings)
    run("logs", tmp_path / "run")
    assert "this goes to the log of the run" in (tmp_path / "run.log").read_text()


def test_one_device_stays_in_this_process(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    job = "tests.diffusion.rank_jobs.refuses"
    with pytest.raises(AntherError) as caught:
        ranks.Leader().run(job, {"trainer": {"devices": 1}}, tmp_path)
    assert caught.traceback[-1].name == "refuses"


@pytest.mark.parametrize(
    "strategy", ["fsdp", "deepspeed_stage_2", "ddp_spawn", "ddp_fork", "xla", {"_target_": "os.x"}]
)
def test_other_strategies_are_refused_with_the_reason(strategy: Any) -> None:
    name = strategy if isinstance(strategy, str) else "os.x"
    with pytest.raises(AntherError, match=rf"trainer.strategy={name} is not supported: .*trainer=ddp"):
        ranks.check({**TWO, "strategy": strategy})


@pytest.mark.parametrize("strategy", ["auto", "ddp", {"_target_": ranks.DDP, "static_graph": True}])
def test_ddp_in_its_forms_is_not(strategy: Any) -> None:
    ranks.check({**TWO, "strategy": strategy})


BY_TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
BY_SRUN = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2", "SLURM_PROCID": "1"}


@pytest.mark.parametrize("environment", [BY_TORCHRUN, BY_SRUN], ids=["torchrun", "srun"])
@pytest.mark.parametrize(
    ("devices", "nodes", "fits"), [(2, 2, True), ("auto", 2, True), ([0, 1], 2, True), (4, 2, False), (2, 1, False)]
)
def test_counts_are_those_of_who_started_the_processes(
    environment: dict[str, str], devices: Any, nodes: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.rank() == 1
    assert ranks.is_follower()
    trainer = {"devices": devices, "num_nodes": nodes, "strategy": "ddp"}
    if fits:
        ranks.check(trainer)
    else:
        with pytest.raises(AntherError, match=r"trainer.devices=2 trainer.num_nodes=2"):
            ranks.check(trainer)


def test_other_machines_need_somebody_who_starts_them() -> None:
    with pytest.raises(AntherError, match="torchrun or srun"):
        ranks.check({**TWO, "num_nodes": 2})


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_a_shell_on_a_node_of_slurm_has_started_nobody(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {**BY_SRUN, "SLURM_JOB_NAME": name}.items():
        monkeypatch.setenv(key, value)
    assert ranks.rank() == 0


def test_the_settings_of_a_folder_are_known(tmp_path: Path) -> None:
    config = {"seed": 0, "module": {"lr": 0.1}, "data": {"path": "a", "size": 8}, "trainer": {"devices": 1}}
    assert ranks.changed(tmp_path, config) == ""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ranks.RECORD).write_text(json.dumps({"config": config}))
    assert ranks.changed(tmp_path, {**config, "data": {"path": "b", "size": 8}, "trainer": {}}) == ""
    assert ranks.changed(tmp_path, {**config, "module": {"lr": 0.2}}) == "module.lr = 0.1 there and 0.2 here"
    assert "data.size" in ranks.changed(tmp_path, {**config, "data": {"size": 9}})
    (tmp_path / ranks.RECORD).write_text("{")
    with pytest.raises(AntherError, match="damaged"):
        ranks.changed(tmp_path, config)

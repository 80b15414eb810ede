"""Sweeps by Hydra's own sweeper, Optuna and submitit: what fails is recorded, what was broken off goes on.

A real Hydra application with the entry points' own parts; only the job is a small one, which needs no torch.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.slurm import pretend_slurm

ROOT = Path(__file__).resolve().parents[2]

APP = """
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from diffusion import cli
from diffusion.ranks import leader

@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(cfg):
    folder = Path(HydraConfig.get().runtime.output_dir)
    config = OmegaConf.to_container(cfg, resolve=True)
    if (record := cli.read_result(folder, config)) is not None:
        return record["objective"]
    return leader.run("jobs.job", config, folder)

if __name__ == "__main__":
    cli.run(main, several=True)
"""
JOBS = """
import os
import time
from pathlib import Path
from diffusion import cli, ranks
from diffusion.errors import AntherError

def job(config, folder):
    x = config["module"]["x"]
    with Path("begun").open("a") as file:
        file.write(f"{x}\\n")
    (folder / f"rank{ranks.rank()}").write_text(str(x))
    # As in a training, no rank is through before the others have begun.
    while Path("begun").read_text().splitlines().count(str(x)) % int(os.environ.get("SLURM_NTASKS", "1")):
        time.sleep(0.05)
    while Path("hold").exists() and Path("hold").read_text() == str(x):
        time.sleep(0.05)
    if x == config["fails"]:
        raise AntherError(f"{x} is a bad value.")
    if x == config["breaks"]:
        raise ZeroDivisionError(x)
    if ranks.rank() == 0:
        record = config | {"objective": "loss"}
        cli.write_result(folder, record, (x - 2) ** 2, steps=1, epochs=1, parameters=1, seconds=1.0)
    return (x - 2) ** 2
"""
CONFIG = """
defaults: [_self_]
seed: 0
fails: null
breaks: null
trainer: {max_steps: 1, devices: 1, num_nodes: 1, strategy: auto}
data: {}
module: {x: 0}
hydra:
  run: {dir: run}
  sweep: {dir: sweep, subdir: "${hydra.job.num}"}
  callbacks: {sweep_jobs: {_target_: diffusion.sweeps.SweepJobs}}
"""
SEARCH = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.n_trials=5", "module.x=interval(0.0,4.0)"]
KEPT = "hydra.sweeper.storage='sqlite:///${hydra.sweep.dir}/study.db'"


@pytest.fixture
def app(tmp_path: Path) -> Path:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "app.yaml").write_text(CONFIG)
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "jobs.py").write_text(JOBS)
    return tmp_path


def start(app: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "app.py", "-m", *words],
        cwd=app,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(app: Path, *words: str, fails: bool = False, **environment: str) -> str:
    """What it printed to stderr."""
    process = start(app, *words, **environment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == (1 if fails else 0), out + err
    return err


def begun(app: Path) -> list[float]:
    return [float(line) for line in (app / "begun").read_text().splitlines()]


def values(sweep: Path) -> list[float]:
    """What each job was asked for, by Hydra's own records."""
    jobs = sorted((path for path in sweep.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name))
    return [yaml.safe_load((job / ".hydra" / "config.yaml").read_text())["module"]["x"] for job in jobs]


def kill_while_it_holds(app: Path, process: subprocess.Popen[str], jobs: int) -> None:
    until = time.monotonic() + 240
    while not (app / "begun").exists() or len(begun(app)) < jobs:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_failed_jobs_are_named_at_the_end_and_tried_again(app: Path) -> None:
    said = run(app, "module.x=0,1,2,3", "fails=1", "breaks=2", fails=True)
    assert begun(app) == [0, 1, 2, 3]
    assert "error: 2 of 4 jobs failed" in said
    assert f"hydra.sweep.dir={app / 'sweep'}" in said
    assert "  1: 1 is a bad value." in said
    assert "  2: ZeroDivisionError: 2" in said
    assert said.count("Traceback") == 1  # of the fault that nobody foresaw
    record = json.loads((app / "sweep" / "1" / "failed.json").read_text())
    assert record["error"] == "1 is a bad value."
    assert "module.x=1" in record["overrides"]
    assert not (app / "sweep" / "0" / "failed.json").exists()
    # The same jobs again, with what was wrong mended: only those that failed are begun.
    assert run(app, "module.x=0,1,2,3", "breaks=null") == ""
    assert begun(app) == [0, 1, 2, 3, 1, 2]
    assert not list((app / "sweep").glob("*/failed.json"))


def test_a_sweep_of_other_values_in_the_same_folder_is_refused(app: Path) -> None:
    run(app, "module.x=0,1")
    said = run(app, "module.x=0,3", fails=True)
    assert "1 of 2 jobs failed" in said
    assert "module.x = 1 there and 3 here" in said
    assert begun(app) == [0, 1]
    # The folder of a single run of that job, which ends well, is whole again.
    job = app / "sweep" / "1"
    assert (job / "failed.json").exists()
    assert (job / ".hydra" / "finished.yaml").read_text() == "- module.x=1\n"
    subprocess.run(
        [sys.executable, "app.py", "module.x=1", f"hydra.run.dir={job}"],
        cwd=app,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert not (job / "failed.json").exists()


def test_a_job_is_told_of_the_folder_that_a_sweep_lets_it_choose(app: Path) -> None:
    (app / "jobs.py").write_text(
        "from diffusion.errors import AntherError\n"
        "def job(config, folder):\n"
        "    raise AntherError('give the same settings, or another hydra.run.dir.')\n"
    )
    said = run(app, "module.x=0,1", fails=True)
    assert said.count("or another hydra.sweep.dir.") == 4  # each job when it fails, and at the end
    assert "hydra.run.dir" not in said


@pytest.mark.slow
@pytest.mark.parametrize("storage", [[], [KEPT]], ids=["none", "sqlite"])
def test_a_search_goes_on_to_the_same_trials(app: Path, storage: list[str]) -> None:
    run(app, *SEARCH, *storage, "hydra.sweep.dir=whole")
    asked = values(app / "whole")
    assert len(set(asked)) == 5
    results = (app / "whole" / "optimization_results.yaml").read_text()
    assert yaml.safe_load(results)["best_value"] == min((x - 2) ** 2 for x in asked)
    (app / "begun").unlink()
    (app / "hold").write_text(str(asked[3]))
    kill_while_it_holds(app, start(app, *SEARCH, *storage), 4)
    (app / "hold").unlink()
    run(app, *SEARCH, *storage)
    assert values(app / "sweep") == asked
    # Nothing that was finished is done twice.
    assert begun(app) == [*asked[:4], *asked[3:]]
    assert (app / "sweep" / "optimization_results.yaml").read_text() == results
    if storage:
        import optuna

        study = optuna.load_study(study_name=None, storage=f"sqlite:///{app / 'sweep' / 'study.db'}")
        assert [trial.params["module.x"] for trial in study.trials] == asked
        assert {trial.state.name for trial in study.trials} == {"COMPLETE"}


@pytest.mark.slow
def test_a_failed_trial_does_not_end_a_search(app: Path) -> None:
    # Not the grid sampler, which Hydra's plugin cannot tell of a failure in the last trial.
    search = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=random", "module.x=choice(0,1,3)"]
    said = run(app, *search, "hydra.sweeper.n_jobs=1", "hydra.sweeper.n_trials=8", "fails=1", fails=True)
    tried = begun(app)
    assert len(tried) == 8
    assert set(tried) == {0, 1, 3}
    assert f"error: {tried.count(1)} of 8 jobs failed" in said
    assert "1 is a bad value." in said
    assert yaml.safe_load((app / "sweep" / "optimization_results.yaml").read_text())["best_value"] == 1.0


@pytest.mark.slow
def test_a_search_in_which_all_fails_says_why(app: Path) -> None:
    said = run(app, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1", "module.x=choice(1,1)", "fails=1", fails=True)
    assert "error: 1 of 1 jobs failed" in said
    assert said.count("1 is a bad value.") == 2  # as it happens, and at the end


def test_jobs_of_submitit_are_recorded_and_go_on(app: Path) -> None:
    local = ["hydra/launcher=submitit_local", "module.x=0,1,2", "trainer.devices=2"]
    said = run(app, *local, "fails=1", fails=True)
    assert sorted(begun(app)) == [0, 1, 2]
    assert values(app / "sweep") == [0, 1, 2]
    assert "error: 1 of 3 jobs failed" in said
    assert "  1: 1 is a bad value." in said
    run(app, *local, "fails=null")
    assert sorted(begun(app)) == [0, 1, 1, 2]


def test_several_tasks_of_submitit_on_this_machine_are_refused(app: Path) -> None:
    said = run(app, "hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2", "module.x=0", fails=True)
    assert "trainer.devices=2" in said
    assert not (app / "begun").exists()


def test_tasks_of_submitit_under_slurm_are_the_ranks(app: Path) -> None:
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2", "trainer.devices=2", "module.x=0,1"]
    path = pretend_slurm(app / "bin")
    said = run(app, *slurm, "fails=1", fails=True, PATH=path)
    assert sorted(begun(app)) == [0, 0, 1, 1]
    for k in ("0", "1"):
        assert [(app / "sweep" / k / f"rank{rank}").read_text() for rank in (0, 1)] == [k, k]
    assert "error: 1 of 2 jobs failed" in said
    assert "  1: 1 is a bad value." in said
    run(app, *slurm, PATH=path)
    assert sorted(begun(app)) == [0, 0, 1, 1, 1, 1]


def test_other_numbers_of_tasks_than_devices_are_refused(app: Path) -> None:
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.tasks_per_node=2", "module.x=0,1"]
    said = run(app, *slurm, fails=True, PATH=pretend_slurm(app / "bin"))
    assert "trainer.devices=2" in said
    assert not (app / "begun").exists()

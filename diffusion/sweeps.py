"""Sweeps of any command: a job that fails is recorded and the others go on, and so does a sweep that was broken off.

A sweep goes on by its own command with its own `hydra.sweep.dir`: job k has the same settings again, a job that is
finished says so and returns what it returned, and one that was broken off goes on where it stopped. This holds for a
search by Optuna, too, whose sampler, told the same results, asks for the same trials, if it has a seed.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode

from diffusion import ranks, secrecy
from diffusion.files import atomic

if TYPE_CHECKING:
    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

FAILED = "failed.json"
ASKED = Path(".hydra") / "overrides.yaml"
"""In the folder of a job: what it was asked for last. Hydra writes it before the job begins."""
FINISHED = Path(".hydra") / "finished.yaml"
"""The same of the last time that it was not broken off: what the results in the folder are of."""
SQLITE = "sqlite:///"

_sweep: list[Path] = []  # the folder of the sweep that this process started, if it did


class SweepJobs(Callback):
    """Hydra's callback for the sweeps of every command."""

    def on_multirun_start(self, config: "DictConfig", **kwargs: Any) -> None:
        """Prepares the folder and, for Optuna, the study."""
        folder = Path(config.hydra.sweep.dir).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        for run in runs(folder):
            (run / FAILED).unlink(missing_ok=True)  # it is tried again
        _sweep[:] = [folder]
        # Launchers such as submitit start jobs in processes of their own, wherever that is.
        os.environ["PYTHONPATH"] = ranks.python_path()
        if str(config.hydra.sweeper._target_).endswith(".OptunaSweeper"):
            _prepare_study(config, folder)

    def on_job_end(self, config: "DictConfig", job_return: "JobReturn", **kwargs: Any) -> None:
        """Records how it ended and lets the sweeper go on; to Optuna a job without a value is a failed trial."""
        folder = Path(config.hydra.runtime.output_dir)
        if job_return.status == JobStatus.COMPLETED and ranks.rank() == 0 and (folder / ASKED).exists():
            with atomic(folder / FINISHED) as temporary:
                shutil.copyfile(folder / ASKED, temporary)
            (folder / FAILED).unlink(missing_ok=True)  # a single run in a job's folder mends it, too
        if config.hydra.mode != RunMode.MULTIRUN or job_return.status != JobStatus.FAILED:
            return
        from diffusion import cli

        error = job_return._return_value  # what would raise it
        sentence = cli.sentence(error)
        if sentence is None:
            traceback.print_exception(error)
            sentence = secrecy.hidden(f"{type(error).__name__}: {error}")
        # The job's own folder is the sweep's to choose.
        sentence = sentence.replace("another hydra.run.dir", "another hydra.sweep.dir")
        job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        if ranks.rank() > 0:
            return
        print(f"job {config.hydra.job.num} failed: {sentence}", file=sys.stderr)
        record = {
            "job": config.hydra.job.num,
            "error": sentence,
            "overrides": list(job_return.overrides or ()),
            "trace": secrecy.hidden("".join(traceback.format_exception(error))),
        }
        with atomic(folder / FAILED) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")


def in_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def runs(folder: Path) -> Iterator[Path]:
    """The folders of the jobs in that of their sweep."""
    for path, folders, _ in os.walk(folder):
        if ".hydra" in folders:
            yield Path(path)
            folders.clear()


def failure(run: Path) -> str | None:
    """Why a job of a sweep failed; None where it did not."""
    try:
        return str(json.loads((run / FAILED).read_text())["error"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError):
        return f"its {FAILED} is damaged"


def is_of_other_settings(run: Path) -> bool:
    """Whether the results in the folder of a job are of what it was asked for before it was refused or broken off."""
    return (run / FINISHED).exists() and (run / FINISHED).read_bytes() != (run / ASKED).read_bytes()


def report_failures() -> bool:
    """Names the jobs that failed in the sweep of this process, at its end, if there are any."""
    if not _sweep:
        return False
    folder = _sweep.pop()
    everything = sorted(runs(folder), key=lambda run: (len(run.name), run.name))
    failed = [(run, why) for run in everything if (why := failure(run)) is not None]
    if not failed:
        return False
    print(
        f"error: {len(failed)} of {len(everything)} jobs failed, and the same command with hydra.sweep.dir={folder} "
        "tries them again:",
        file=sys.stderr,
    )
    for run, why in failed:
        print(f"  {run.relative_to(folder)}: {why}", file=sys.stderr)
    return True


def _prepare_study(config: "DictConfig", folder: Path) -> None:
    """Sees to it that a search which was broken off asks for the same trials again.

    What is known of a trial lies in its job's folder. So a study that is kept in the sweep's own folder is made anew
    from there; Optuna would go on with trials that begin at job 0, where another one lies.
    """
    from omegaconf import open_dict, read_write

    sweeper = config.hydra.sweeper
    with read_write(config.hydra), open_dict(config.hydra):
        if "seed" in sweeper.sampler and sweeper.sampler.seed is None:
            sweeper.sampler.seed = config.seed
    storage = str(sweeper.storage or "")
    if storage.startswith(SQLITE):
        path = Path(storage.removeprefix(SQLITE)).absolute()
        if folder in path.parents:
            path.unlink(missing_ok=True)

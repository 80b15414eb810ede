"""One job on several processes: the config is composed once, and every rank works with it in one folder.

    who starts the processes     what rank 0 is                 how the others learn of the job
    nobody                       `python -m diffusion.ranks`    Lightning starts them with the file of the job
    torchrun, srun               the command itself             at a store on rank 0's machine
    submitit, as tasks of srun   a task                         each task brought it along

So `${now:}` is taken once, a sweep is swept once, and what a sweeper chose is what all ranks work with. Where nobody
starts processes, the command that composed the config stays outside of the job: it waits for it, says how it ended and
goes on with its sweep, whatever became of the ranks.
"""

import json
import logging.config
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.differences import differences
from diffusion.errors import AntherError, Stopped
from diffusion.files import atomic
from diffusion.lock import locked

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

FILE = "ANTHER_JOB"
"""In the environment of the processes of a job: the file with it."""

RECORD = Path(".hydra") / "job.json"
"""In the folder of a run: the job as it was started last."""

_ROOT = Path(__file__).resolve().parents[1]
_ENDS = "ends"  # beside the record: how each rank ended
_KEY, _END = "anther/job", "end"
_LONGEST = timedelta(days=7)  # what a follower waits for the next job of a sweep
_TOGETHER = 30.0  # seconds in which all ranks must have left a job that failed, for the sweep to go on
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What Lightning leaves in the environment of the process that started others; the next job must not find it.
_LEFT = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false")
DDP = "lightning.pytorch.strategies.DDPStrategy"
UNSUPPORTED = (
    "the averaged weights and the checkpoints here are whole networks, which fit on one device: set trainer=ddp, where "
    "every device holds the network and takes a share of the batch, and more trainer.accumulate_grad_batches or "
    "trainer.precision=bf16-mixed where memory is short"
)


class Leader:
    """Who composed the config: hands jobs over, one after the other."""

    def __init__(self) -> None:
        self._store: TCPStore | None = None
        self._handed = 0

    def run(self, job: str, config: Mapping[str, Any], folder: Path) -> Any:
        """Runs a job on all the ranks that its trainer asks for.

        Args:
            job: name of a function (config, folder) -> value that every rank calls.
            config: resolved, plain.
            folder: of the run.

        Returns:
            What it returns on rank 0.

        Raises:
            AntherError: the trainer asks for what cannot be had here, another process works in the folder, or any fault
                of the job.
            Stopped: a signal ended the job.
        """
        check(config["trainer"])
        folder = folder.absolute()
        task = json.dumps({"job": job, "config": config, "folder": str(folder), "logging": _logging()})
        with locked(folder) if rank() == 0 else nullcontext(), _stoppable(folder):
            if rank() == 0:
                with atomic(folder / RECORD) as temporary:
                    temporary.write_text(task)
            if _launcher() is None and _several(config["trainer"]):
                return _outside(folder)
            if _launcher() is None or "SUBMITIT_EXECUTOR" in os.environ:
                return _call(task)
            self._store = self._store or _make_store(leads=True)
            self._store.set(f"{_KEY}/{self._handed}", task)
            self._handed += 1
            return _take_part(self._store, self._handed - 1, task)

    def end(self) -> None:
        """Lets the other ranks go."""
        if self._store is not None:
            self._store.set(f"{_KEY}/{self._handed}", _END)


leader = Leader()


@contextmanager
def _stoppable(folder: Path) -> Iterator[None]:
    """Adds to a `Stopped`, which Ctrl-C becomes too, how the run goes on."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    try:
        try:
            yield
        except KeyboardInterrupt:
            raise Stopped(signal.SIGINT) from None
    except Stopped as stop:
        word = f"hydra.run.dir={folder}"
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            word = f"hydra.sweep.dir={HydraConfig.get().sweep.dir}"
        stop.again = f": the same command with {word} goes on where it stopped."
        raise


def check(trainer: Mapping[str, Any]) -> None:
    """Refuses what no rank could do, before any of them starts.

    Args:
        trainer: config of the trainer.

    Raises:
        AntherError: another strategy than DDP, or other numbers of processes than were started.
    """
    strategy = trainer.get("strategy", "auto")
    name = strategy.get("_target_") if isinstance(strategy, Mapping) else strategy
    if name not in (*STRATEGIES, DDP):
        raise AntherError(f"trainer.strategy={name} is not supported: {UNSUPPORTED}.")
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    if int(os.environ.get("SUBMITIT_LOCAL_NTASKS", 1)) > 1:
        raise AntherError(
            "hydra/launcher=submitit_local starts one task for a job: leave hydra.launcher.tasks_per_node=1 and set "
            f"trainer=ddp trainer.devices={os.environ['SUBMITIT_LOCAL_NTASKS']}."
        )
    if _launcher() is None:
        if nodes != 1:
            raise AntherError(
                f"trainer.num_nodes={nodes} wants processes on other machines, which somebody has to start: run this "
                "by torchrun or srun, see docs/scaling.md."
            )
        return
    started, machines = _started()
    counted = str(devices).isdecimal()
    if (counted and started is not None and int(devices) != started) or nodes != machines:
        raise AntherError(
            f"{started or 'some'} processes were started on each of {machines} machines, and trainer.devices={devices} "
            f"trainer.num_nodes={nodes} asks for others: set trainer=ddp trainer.devices={started or 'N'} "
            f"trainer.num_nodes={machines}."
        )


def changed(folder: Path, config: Mapping[str, Any]) -> str:
    """Where the settings that make a training another differ from those that the folder was started with last.

    Empty where they do not, or where nobody knows.
    """
    path = folder / RECORD
    if not path.exists():
        return ""
    try:
        before = json.loads(path.read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise AntherError(f"{path} is damaged: choose another hydra.run.dir, or delete that file.") from error
    return differences(learnt(before), learnt(json.loads(json.dumps(config))))


def learnt(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make a training another."""
    elsewhere = ("path", "num_workers")  # where the data lie, and how fast they come
    data = {key: value for key, value in (config.get("data") or {}).items() if key not in elsewhere}
    # A module that tells of no seed of its own is of before it had one.
    module = {"seed": config.get("seed"), **(config.get("module") or {})}
    return {"seed": config.get("seed"), "data": data, "module": module}


# Nobody starts processes ----------------------------------------------------------------------------------------------


def _several(trainer: Mapping[str, Any]) -> bool:
    return str(trainer.get("devices", 1)) != "1"


def _outside(folder: Path) -> Any:
    """Starts rank 0, which starts the others; waits, and says how it ended."""
    ends = folder / RECORD.parent / _ENDS
    shutil.rmtree(ends, ignore_errors=True)
    ends.mkdir()
    environment = {**os.environ, FILE: str(folder / RECORD), "PYTHONPATH": python_path()}
    sys.stdout.flush()
    # Its own group, so that all of it can be ended; Ctrl-C in the terminal then reaches us alone, and is passed on.
    process = subprocess.Popen([sys.executable, "-m", "diffusion.ranks"], env=environment, start_new_session=True)
    code, told = _wait(process)
    if told is not None:
        raise Stopped(told)
    if code != 0:
        raise AntherError(_what_happened(ends, code, folder))
    value = json.loads((ends / "0.json").read_text())["value"]
    shutil.rmtree(ends, ignore_errors=True)
    return value


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, int | None]:
    """Its status, and the signal that was passed on meanwhile, if any; afterwards nothing of it is left."""
    told: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        told.append(number)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    # Only the main thread may; and submitit answers signals itself.
    here = threading.current_thread() is threading.main_thread() and "SUBMITIT_EXECUTOR" not in os.environ
    before = {number: signal.signal(number, forward) for number in _FORWARDED if here}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() != 0:
            # One that waits for a rank that is gone would do so for ever.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, told[0] if told else None


def _what_happened(ends: Path, code: int, folder: Path) -> str:
    """One sentence from what the ranks left: the first fault is the cause, those of the ranks it stopped are not."""
    records = sorted((json.loads(path.read_text()) for path in ends.glob("*.json")), key=lambda end: end["time"])
    faults = [end for end in records if "error" in end]
    for end in faults:
        if end["known"]:
            return str(end["error"])
    for end in faults:
        if not end["lost"]:
            return f"rank {end['rank']} broke off with {end['error']}; its trace is in its output."
    how = f"{signal.Signals(-code).name}" if code < 0 else "its peer is gone"
    return (
        f"a process of the run in {folder} was ended from outside ({how}; a lack of memory does that, too), so all "
        "were: the same command goes on from what is on disk."
    )


def main() -> None:
    """A process of a job that nobody else started: rank 0 by `_outside`, the others by Lightning."""
    end_with_parent()
    from diffusion import cli

    task = Path(os.environ[FILE]).read_text()
    ends = Path(os.environ[FILE]).parent / _ENDS
    number = int(os.environ.get("LOCAL_RANK", "0"))
    signal.signal(signal.SIGTERM, stop)
    if number == 0 and (settings := json.loads(task)["logging"]) is not None:
        logging.config.dictConfig(settings)
    try:
        end = {"value": _call(task)}
    except (Stopped, KeyboardInterrupt) as stopped:
        # Lightning kills rank 0 if another process ends with a status; one that ends with all others has none.
        together = isinstance(stopped, Stopped) and stopped.together
        sys.exit(0 if number > 0 and together else 128 + getattr(stopped, "number", signal.SIGINT))
    except Exception as error:
        sentence = cli.sentence(error)
        lost = is_lost(error)
        known = sentence is not None and not lost
        end = {"error": sentence or f"{type(error).__name__}: {error}", "known": known, "lost": lost}
        if sentence is None:
            traceback.print_exc()
    with atomic(ends / f"{number}.json") as temporary:
        temporary.write_text(json.dumps({**end, "rank": number, "time": time.time()}))
    sys.exit("error" in end)


def stop(number: int, _frame: Any) -> None:
    """The handler of a signal that ends a run."""
    raise Stopped(number)


def end_with_parent() -> None:
    """No rank outlives the process that started it, even if that one was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


# torchrun and srun ----------------------------------------------------------------------------------------------------


def is_of_torchrun() -> bool:
    """Whether torchrun started this process."""
    return _launcher() == "RANK"


def is_follower() -> bool:
    """Whether this process is told by rank 0 what to do."""
    return rank() > 0


def rank() -> int:
    """Of this process among those that torchrun or srun started; 0 where nobody did."""
    launcher = _launcher()
    return 0 if launcher is None else int(os.environ[launcher])


def follow() -> None:
    """Does what rank 0 says: each job that comes to the store, until rank 0 is through.

    Raises:
        AntherError: rank 0 is gone.
    """
    from diffusion import cli

    store = _make_store(leads=False)
    number = 0
    while (task := _next(store, number)) != _END:
        try:
            _take_part(store, number, task)
        except Exception as error:
            # All have left the job, so there may be another. Rank 0 says what it was, unless it was this rank's alone.
            print(f"rank {rank()}: {cli.sentence(error) or traceback.format_exc()}", file=sys.stderr)
        number += 1


def _next(store: "TCPStore", number: int) -> str:
    from torch.distributed import DistError

    try:
        return bytes(store.get(f"{_KEY}/{number}")).decode()
    except DistError as error:
        raise AntherError("rank 0 has ended without a word: its own output says why.") from error


def _take_part(store: "TCPStore", number: int, task: str) -> Any:
    """The job on this rank. A fault is raised if all ranks leave the job; else the others wait for this one."""
    from diffusion import cli

    ended, world = f"{_KEY}/{number}/ended", _world()
    try:
        value = _call(task)
    except Exception as error:
        store.add(ended, 1)
        until = time.monotonic() + (0 if is_lost(error) else _TOGETHER)
        while store.add(ended, 0) < world:
            if time.monotonic() > until:
                # Whoever started us ends the others.
                sys.exit(f"error: rank {rank()}: {cli.sentence(error) or traceback.format_exc()}")
            time.sleep(0.1)
        raise
    store.add(ended, 1)
    return value


def _launcher() -> str | None:
    """The variable that says this process's rank, where torchrun or srun started it; None where nobody did."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "RANK"
    # As Lightning tells: a shell on a node of SLURM has started nobody.
    by_srun = "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    return "SLURM_PROCID" if by_srun and int(os.environ["SLURM_NTASKS"]) > 1 else None


def _world() -> int:
    return int(os.environ["WORLD_SIZE" if _launcher() == "RANK" else "SLURM_NTASKS"])


def _started() -> tuple[int | None, int]:
    """How many processes were started on each machine, where that is known, and on how many machines."""
    if _launcher() == "RANK":
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return here, _world() // here
    here_text = os.environ.get("SLURM_NTASKS_PER_NODE")
    return None if here_text is None else int(here_text), int(os.environ.get("SLURM_NNODES", 1))


def _make_store(leads: bool) -> "TCPStore":
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if _launcher() == "RANK":
        # torchrun's own process serves this store as long as the ranks live.
        return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_LONGEST)
    slurm = SLURMEnvironment()
    # The port itself is the process group's.
    return TCPStore(slurm.main_address, slurm.main_port + 1, is_master=leads, timeout=_LONGEST, wait_for_workers=False)


# The job --------------------------------------------------------------------------------------------------------------


def _call(task: str) -> Any:
    content = json.loads(task)
    module, _, name = content["job"].rpartition(".")
    job = getattr(import_module(module), name)
    with _cleaned():
        return job(content["config"], Path(content["folder"]))


def is_lost(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone."""
    if "torch" not in sys.modules:
        return False
    from torch import distributed

    if distributed.is_available() and isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def _logging() -> dict[str, Any] | None:
    """How Hydra set up the logging of the job: to the console and into the run folder."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return None
    settings = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def python_path() -> str:
    """PYTHONPATH for processes that must find this project."""
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))


@contextmanager
def _cleaned() -> Iterator[None]:
    """Leaves the process as if the job had not had other processes, so that the next one can."""
    before = {name: os.environ.get(name) for name in _LEFT}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


if __name__ == "__main__":
    main()

"""One job on several processes: rank 0 composes the config and decides the folder, and the others are told.

Only rank 0 runs Hydra, whoever starts the processes. Those that Lightning starts find the job in a file that their
environment names; those of torchrun and srun wait for it at a store on rank 0's machine. So `${now:}` is taken once, a
sweep is swept once, and what a sweeper chose on rank 0 is what all ranks work with.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.errors import AntherError, Stopped
from diffusion.files import atomic
from diffusion.lock import locked

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

Job = Callable[[dict[str, Any], Path], Any]

FILE = "ANTHER_JOB"
"""In the environment of processes that Lightning starts: the file with their job."""

_KEY, _END = "anther/job", "end"
_LONGEST = timedelta(days=7)  # what a follower waits for the next job of a sweep
# What Lightning leaves in the environment of the process that started others; the next job must not find it.
_LEFT = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", FILE)


class Leader:
    """Rank 0's side: hands jobs over, one after the other."""

    def __init__(self) -> None:
        self._store: TCPStore | None = None
        self._handed = 0

    def run(self, job: Job, config: Mapping[str, Any], folder: Path) -> Any:
        """Tells the other ranks, if there are any, and runs the job itself.

        Args:
            job: what every rank does.
            config: resolved, plain.
            folder: of the run.

        Raises:
            AntherError: another process works in the folder, or what the job raises.
            Stopped: a signal ended the job.
        """
        text = json.dumps({"config": config, "folder": str(folder.absolute())})
        if _launcher() is not None:
            self._store = self._store or _store(leads=True)
        with locked(folder), _cleaned(), _stoppable(folder):
            if self._store is not None:
                self._store.set(f"{_KEY}/{self._handed}", text)
                self._handed += 1
            else:
                path = folder / ".hydra" / "job.json"
                with atomic(path) as temporary:
                    temporary.write_text(text)
                os.environ[FILE] = str(path.absolute())
            return job(dict(config), folder)

    def end(self) -> None:
        """Lets the other ranks go."""
        if self._store is not None:
            self._store.set(f"{_KEY}/{self._handed}", _END)


leader = Leader()


def is_follower() -> bool:
    """Whether this process is told by rank 0 what to do."""
    if FILE in os.environ:
        return os.environ.get("LOCAL_RANK", "0") != "0"
    return _launcher() is not None and int(os.environ[f"{_launcher()}"]) > 0


def follow(job: Job) -> None:
    """Does what rank 0 says: the job of the file, or each that comes to the store until rank 0 is through.

    Raises:
        AntherError: rank 0 is gone.
    """
    if FILE in os.environ:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
        job(*_read(Path(os.environ[FILE]).read_text()))
        return
    store = _store(leads=False)
    number = 0
    while (text := _next(store, number)) != _END:
        with _cleaned():
            job(*_read(text))
        number += 1


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone; whoever runs the command again is alone then."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


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


def _read(text: str) -> tuple[dict[str, Any], Path]:
    content = json.loads(text)
    return content["config"], Path(content["folder"])


def _next(store: "TCPStore", number: int) -> str:
    from torch.distributed import DistError

    try:
        return bytes(store.get(f"{_KEY}/{number}")).decode()
    except DistError as error:
        raise AntherError("rank 0 has ended without a word: its own output says why.") from error


def _launcher() -> str | None:
    """The variable that says this process's rank, where torchrun or srun started it; None where nobody did."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "RANK"
    # As Lightning tells: a shell on a node of SLURM has started nobody.
    by_srun = "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    return "SLURM_PROCID" if by_srun and int(os.environ["SLURM_NTASKS"]) > 1 else None


def _store(leads: bool) -> "TCPStore":
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if _launcher() == "RANK":
        # torchrun's own process serves this store as long as the ranks live.
        return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_LONGEST)
    slurm = SLURMEnvironment()
    # The port itself is the process group's.
    return TCPStore(slurm.main_address, slurm.main_port + 1, is_master=leads, timeout=_LONGEST, wait_for_workers=False)


@contextmanager
def _cleaned() -> Iterator[None]:
    """Leaves the process as if the job had not had other processes, so that the next one can."""
    before = {name: os.environ.get(name) for name in _LEFT}
    try:
        yield
    finally:
        from torch import distributed

        # Processes that others started stay for the next job, and so does their group: a second one would find the
        # addresses of the first at the launcher's store.
        if _launcher() is None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

"""What the entry points share before they import torch: how they end, and whether there is anything left to do."""

import errno
import json
import locale
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType
from typing import Any

from diffusion import ranks
from diffusion.errors import AntherError, Stopped
from diffusion.files import atomic

RESULT = "result.json"

# Faults of the folder of a run, which Hydra makes before we are asked.
FOLDER_FAULTS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)


def run(main: Callable[[], Any], job: ranks.Job | None = None) -> None:
    """Runs an entry point; a fault that the user can mend ends it with one sentence and status 1.

    With HYDRA_FULL_ERROR=1 in the environment the whole trace is shown instead. SIGTERM and Ctrl-C end it with a
    sentence that says how it goes on, and status 143 or 130.

    Args:
        main: composes the config and hands the job over; rank 0 alone runs it.
        job: what the other ranks do; None for commands of one process.
    """
    _speak_utf8()
    follower = job is not None and ranks.is_follower()
    if job is not None and follower:
        main = partial(ranks.follow, job)
    listens = current_thread() is main_thread()
    handler = signal.signal(signal.SIGTERM, _stop) if listens else None
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print the trace itself and end the process
    try:
        main()
    except Stopped as stop:
        if not follower:
            print(f"stopped by {signal.Signals(stop.number).name}{stop.again}", file=sys.stderr)
        # Lightning kills rank 0 if another process ends with a status; one that ends with all others has none.
        sys.exit(0 if follower and stop.together else 128 + stop.number)
    except Exception as error:
        message = None if before == "1" else _sentence(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
        ranks.leader.end()
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _speak_utf8() -> None:
    """Begins anew in Python's UTF-8 mode where the locale has another encoding.

    Prompts, captions and names of files have any letters; Python would read and write them in the locale's encoding,
    which in many containers is ASCII. What the terminal cannot show is printed as an escape.
    """
    if sys.flags.utf8_mode or os.environ.get("PYTHONUTF8") == "1" or locale.getencoding().lower() in ("utf-8", "utf8"):
        return
    os.environ |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": f"{sys.stdout.encoding}:backslashreplace"}
    words = [word.encode("utf-8", "surrogateescape") for word in sys.orig_argv[1:]]
    os.execv(sys.executable, [os.fsencode(sys.executable), *words])


def _sentence(error: BaseException) -> str | None:
    """What to tell the user, or None for a fault that is ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, AntherError):
            return str(cause)
    for cause in chain:
        if isinstance(cause, HydraException | OmegaConfBaseException):
            return " ".join(str(cause).split())
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in FOLDER_FAULTS:
            return f"cannot write {cause.filename}: {cause.strerror}; free it or choose another hydra.run.dir."
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def read_result(folder: Path, trainer: Mapping[str, Any]) -> float | None:
    """The objective of a run that has nothing left to do, else None.

    Args:
        folder: of the run.
        trainer: its config; a run is finished when it made the steps or epochs that are asked for now.

    Raises:
        AntherError: the record cannot be read.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        steps, epochs, objective = record["steps"], record["epochs"], record["objective"]
    except (OSError, ValueError, KeyError) as error:
        raise AntherError(f"{path} is damaged: delete it to go on from the run's last checkpoint.") from error
    wanted_steps, wanted_epochs = trainer.get("max_steps", -1), trainer.get("max_epochs")
    by_steps = wanted_steps is not None and 0 <= wanted_steps <= steps
    by_epochs = wanted_epochs is not None and 0 <= wanted_epochs <= epochs
    if not (by_steps or by_epochs):
        return None
    print(
        f"{folder} is finished: {steps} steps, {epochs} epochs, {record['metric']} = {objective:.4g}. To train longer "
        "raise trainer.max_steps or trainer.max_epochs; to train anew choose another hydra.run.dir."
    )
    return float(objective)


def write_result(folder: Path, metric: str, objective: float, steps: int, epochs: int, parameters: int) -> None:
    """Records that a run is finished, and the numbers in its network."""
    record = {"metric": metric, "objective": objective, "steps": steps, "epochs": epochs, "parameters": parameters}
    with atomic(folder / RESULT) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")

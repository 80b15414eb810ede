"""What the entry points share before they import torch: how they end, and whether there is anything left to do."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffusion import ranks, secrecy
from diffusion.build import closest
from diffusion.errors import AntherError
from diffusion.files import atomic

RESULT = "result.json"
SECONDS = "seconds"

# Faults of the folder of a run, which Hydra makes before we are asked.
FOLDER_FAULTS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


def run(main: Callable[[], Any], job: ranks.Job | None = None) -> None:
    """Runs an entry point; a fault that the user can mend ends it with one sentence and status 1.

    With HYDRA_FULL_ERROR=1 in the environment the whole trace is shown instead.

    Args:
        main: composes the config and hands the job over; rank 0 alone runs it.
        job: what the other ranks do; None for commands of one process.
    """
    if job is not None and ranks.is_follower():
        main = partial(ranks.follow, job)
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print the trace itself and end the process
    try:
        secrecy.check_words(sys.argv[1:])
        main()
    except Exception as error:
        message = None if before == "1" else _sentence(error)
        if message is None:
            raise
        print(f"error: {secrecy.hidden(message)}", file=sys.stderr)
        sys.exit(1)
    finally:
        ranks.leader.end()
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


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
            return _of_hydra(cause)
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in FOLDER_FAULTS:
            return f"cannot write {cause.filename}: {cause.strerror}; free it or choose another hydra.run.dir."
    return None


def _of_hydra(error: Exception) -> str:
    """What Hydra and OmegaConf say, in one line, with the key that was perhaps meant."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue

    lines = [line.strip() for line in str(error).splitlines()]
    # The rest is of Hydra's own pages and search paths.
    useless = ("See https://", "full_key:", "object_type=", "Config search path:", "provider=", "To append to your")
    text = " ".join(line for line in lines if line and not line.startswith(useless))
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read {error.override!r} ({text}): write KEY=VALUE, and quote it as in 'prompts=[a rose, a lily]'."
        )
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return f"there is no {group}/{name}{closest(name, error.options)}: choose {', '.join(error.options)}."
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set: give {error.full_key}=…; --help says more."
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None and cause.full_key:
        parent = cause.full_key.rpartition(".")[0]
        known = [
            str(key) for key in (cause.parent_node if OmegaConf.is_dict(cause.parent_node) else ()) if key != "hydra"
        ]
        has = f"{parent or 'the config'} has {', '.join(k for k in known if k[:1] != '_') or 'no parts'}"
        return (
            f"there is no setting {cause.full_key}{closest(str(cause.key), known)}: {has}; what a part takes beyond "
            "these is added with +KEY=VALUE."
        )
    where = getattr(error, "full_key", None)
    return f"{where}: {text}" if where else text


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
    by_steps = isinstance(wanted_steps, int) and 0 <= wanted_steps <= steps
    by_epochs = isinstance(wanted_epochs, int) and 0 <= wanted_epochs <= epochs
    if not (by_steps or by_epochs):
        return None
    print(
        f"{folder} is finished: {steps} steps, {epochs} epochs, {record['metric']} = {objective:.4g}. To train longer "
        "raise trainer.max_steps or trainer.max_epochs; to train anew choose another hydra.run.dir."
    )
    return float(objective)


def write_result(
    folder: Path, metric: str, objective: float, steps: int, epochs: int, parameters: int, seconds: float | None = None
) -> None:
    """Records that a run is finished, the numbers in its network, and how long the command that ended it trained."""
    counts = {"steps": steps, "epochs": epochs, "parameters": parameters}
    record = {
        "metric": metric,
        "objective": objective,
        **counts,
        SECONDS: None if seconds is None else round(seconds, 1),
    }
    with atomic(folder / RESULT) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")

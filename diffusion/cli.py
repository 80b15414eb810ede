"""What the entry points share before they import torch: how they end, and whether there is anything left to do."""

import errno
import hashlib
import json
import locale
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import current_thread, main_thread
from typing import TYPE_CHECKING, Any

from diffusion import ranks, secrecy, sweeps
from diffusion.allocator import keep_freed_memory
from diffusion.build import closest
from diffusion.errors import AntherError, Stopped
from diffusion.files import atomic
from diffusion.threads import wait_passively

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).parents[1] / "conf"
RESULT = "result.json"
SECONDS = "seconds"
UNTIL = "limits_sha256"

# What others call this and do otherwise.
UNSUPPORTED = ("trainer/fsdp", "trainer/deepspeed", "trainer/ddp_spawn")

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


def run(main: Callable[[], Any], several: bool = False) -> None:
    """Runs an entry point; a fault that the user can mend ends it with one sentence and status 1.

    With HYDRA_FULL_ERROR=1 in the environment the whole trace is shown instead. SIGTERM and Ctrl-C end it with a
    sentence that says how it goes on, and status 143 or 130.

    Args:
        main: composes the config and hands the job over; rank 0 alone runs it.
        several: whether it may be started as several ranks; the others then do what rank 0 says.
    """
    _speak_utf8()
    _list_groups_in_help()
    keep_freed_memory()
    wait_passively()
    if several and ranks.is_of_torchrun():
        ranks.end_with_parent()  # torchrun ends its processes, but not if it is killed
    follower = several and ranks.is_follower()
    if follower:
        main = ranks.follow
    listens = current_thread() is main_thread()
    handler = signal.signal(signal.SIGTERM, ranks.stop) if listens else None
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print the trace itself and end the process
    try:
        secrecy.check_words(sys.argv[1:])
        _check_folders(sys.argv[1:])
        main()
    except Stopped as stop:
        if not follower:
            print(f"stopped by {signal.Signals(stop.number).name}{stop.again}", file=sys.stderr)
        # Lightning kills rank 0 if another process ends with a status; one that ends with all others has none.
        sys.exit(0 if follower and stop.together else 128 + stop.number)
    except Exception as error:
        message = None if before == "1" else sentence(error)
        if sweeps.report_failures():
            sys.exit(1)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    else:
        if sweeps.report_failures():
            sys.exit(1)
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
        ranks.leader.end()
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _check_folders(words: Sequence[str]) -> None:
    """Refuses an empty folder, as of a variable of the shell that is not set: Hydra takes it for the current one."""
    for word in words:
        key, given, value = word.lstrip("+").partition("=")
        if key in ("hydra.run.dir", "hydra.sweep.dir") and given and not value.strip("'\" "):
            raise AntherError(f"{key}= is empty: name a folder for the run, or leave it out.")


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


def sentence(error: BaseException) -> str | None:
    """What to tell the user, without tokens and passwords, or None for a fault that is ours."""
    text = _sentence(error)
    return None if text is None else secrecy.hidden(text)


def _sentence(error: BaseException) -> str | None:
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, AntherError):
            return str(cause)
    for cause in chain:
        if isinstance(cause, MissingConfigException) and cause.missing_cfg_file in UNSUPPORTED:
            return f"{str(cause.missing_cfg_file).replace('/', '=')} is not supported: {ranks.UNSUPPORTED}."
        if isinstance(cause, HydraException | OmegaConfBaseException):
            return _of_hydra(cause)
        if str(cause).startswith("Config group override must be"):  # a ValueError, which does not say of which one
            return _of_group(next(filter(None, map(_nameless, sys.argv[1:])), None))
        if ranks.is_lost(cause):
            return "another process of this run has ended: its own output says why."
        if type(cause).__module__.startswith("submitit."):
            return f"submitit has no result of a job: {' '.join(str(cause).split())}"
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
    if (found := re.match("Could not override '(.+?)'. No match", text)) is not None:
        return _of_group(found[1])
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").rpartition("/")
        return f"there is no {group}/{name}{closest(name, error.options)}: choose {', '.join(error.options)}."
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is not set: give {error.full_key}=…; --help says more."
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None and cause.full_key:
        found = re.match(r"Could not override '(\w+)\.(\w+)'", text)
        if found and cause.full_key == found[1] and (said := _of_nothing_chosen(*found.groups())) is not None:
            return said
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


def _nameless(word: str) -> str | None:
    """The group that a word of the command line sets to null, a number or the like."""
    import yaml

    key, _, value = word.lstrip("+").partition("=")
    try:
        named = isinstance(yaml.safe_load(value), str | list | dict)
        return key if (CONF / key.partition("@")[0]).is_dir() and not named else None
    except (OSError, yaml.YAMLError):  # another word, which is not that one
        return None


def _of_group(key: str | None) -> str:
    """What to give in place of a group that there is not, or that was set to no name; None where nobody knows which."""
    from omegaconf import DictConfig

    command = Path(sys.argv[0]).stem
    group, at, place = (key or "").partition("@")
    if at and (CONF / group).is_dir():
        names = ", ".join(_options(group))
        otherwise = f"{place}=null for none" if group == "augment" else "leave it out"
        return f"{key} is chosen by a name: give {key}= one of {names}, or {otherwise}."
    if key is None or not (CONF / f"{command}.yaml").exists():
        return f"{key or 'a group'} cannot be set like this, but by one of the names that --help lists."
    config, groups = _composed(command)
    if key in groups:
        names = ", ".join(_options(key))
        otherwise = "~scheduler for none" if key == "scheduler" else "leave it out"
        return f"{key} is chosen by a name: give {key}= one of {names}, or {otherwise}."
    if isinstance(parts := config.get(key), DictConfig):
        parts_of = " or ".join(f"{key}.{part}=…" for part in map(str, parts))
        return f"{key} is no group of {command}.py and cannot be set as a whole: set {parts_of}, or leave it out."
    return f"{key} is no group of {command}.py: leave it out, or choose from {', '.join(groups)}."


def _of_nothing_chosen(group: str, setting: str) -> str | None:
    """What to give where a setting of a group was given and nothing chosen from it; None where it has no such one."""
    import yaml

    command = Path(sys.argv[0]).stem
    if not (CONF / f"{command}.yaml").exists() or group not in _composed(command)[1]:
        return None
    files = {path.stem: path.read_text("utf-8") for path in sorted((CONF / group).glob("*.yaml"))}
    # What is of the whole config, as an experiment, has no settings under its own name.
    options = {name: yaml.safe_load(text) for name, text in files.items() if not text.startswith("# @package _global_")}
    names = [name for name, option in options.items() if setting in (option or {})]
    if not names:
        return None
    return (
        f"{group}.{setting} is set and no {group} is named: name it too, as in {group}={names[0]} "
        f"{group}.{setting}=…; {group}= with {setting} is one of {', '.join(names)}."
    )


def _composed(command: str) -> "tuple[DictConfig, list[str]]":
    """The config of a command as it is by itself, and the groups that there are."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(command, return_hydra_config=True)
    return config, _groups(config)


def _groups(config: "DictConfig") -> list[str]:
    """The groups that a composed config chooses from; Hydra itself would list all folders, of every command."""
    return sorted(group for group in config.hydra.runtime.choices if not group.startswith("hydra"))


def _list_groups_in_help() -> None:
    """Makes `${groups:}` in the text of a command's help the groups that it takes, each with its options."""
    from omegaconf import OmegaConf

    def groups(*, _root_: "DictConfig") -> str:
        options = {group: _options(group) for group in _groups(_root_)}
        return "".join(f"{group}: {', '.join(names)}\n" for group, names in options.items() if names)

    OmegaConf.register_new_resolver("groups", groups, replace=True)


def _options(group: str) -> list[str]:
    """The names that a group, perhaps with the place that it is chosen for, may be set to."""
    return sorted(path.stem for path in (CONF / group.partition("@")[0]).glob("*.yaml"))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def read_result(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `write_result` recorded of a run that has nothing left to do, else None.

    Args:
        folder: of the run.
        config: resolved; a run is finished when it made the steps or epochs that its trainer is asked for now, or when
            it ended before, by its time or a callback, and is asked for nothing else.

    Raises:
        AntherError: the record cannot be read, or belongs to a run with other settings.
    """
    path, trainer = folder / RESULT, config["trainer"]
    if sweeps.in_sweep() and (found := ranks.changed(folder, config)):
        raise AntherError(f"{folder} is a job with other settings: {found}; choose another hydra.sweep.dir.")
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        steps, epochs, objective = record["steps"], record["epochs"], record["objective"]
    except (OSError, ValueError, KeyError) as error:
        raise AntherError(f"{path} is damaged: delete it to go on from the run's last checkpoint.") from error
    wanted_steps, wanted_epochs = trainer.get("max_steps", -1), trainer.get("max_epochs")
    by_steps = isinstance(wanted_steps, int) and 0 <= wanted_steps <= steps
    by_epochs = isinstance(wanted_epochs, int) and 0 <= wanted_epochs <= epochs
    by_itself = not (by_steps or by_epochs) and record.get(UNTIL) == _until(config, folder)
    if not (by_steps or by_epochs or by_itself):
        return None
    if found := ranks.changed(folder, config):
        raise AntherError(f"{folder} is finished, with other settings: {found}; choose another hydra.run.dir.")
    value = "null" if objective is None else f"{objective:.4g}"
    longer = "raise trainer.max_steps or trainer.max_epochs"
    if by_itself:
        longer = "change what ended it, trainer.max_time or a callback, or set trainer.max_epochs"
    print(
        f"{folder} is finished: {steps} steps, {epochs} epochs, {record['metric']} = {value}. To train longer "
        f"{longer}; to train anew choose another hydra.run.dir."
    )
    return record


def _until(config: Mapping[str, Any], folder: Path) -> str:
    """A hash of what ends a training: its limits, and its callbacks, which may stop it early; not of where it lies."""
    limits = {key: value for key, value in config["trainer"].items() if key.startswith(("max_", "min_"))}
    told = json.dumps([limits, config.get("callbacks")], sort_keys=True).replace(json.dumps(str(folder))[1:-1], "")
    return hashlib.sha256(told.encode()).hexdigest()


def write_result(
    folder: Path,
    config: Mapping[str, Any],
    objective: float | None,
    steps: int,
    epochs: int,
    parameters: int,
    seconds: float | None = None,
) -> None:
    """Records that a run of a config is finished, the numbers in its network, and how long its last command trained."""
    counts = {"steps": steps, "epochs": epochs, "parameters": parameters}
    record = {
        "metric": config["objective"],
        "objective": objective,
        **counts,
        SECONDS: None if seconds is None else round(seconds, 1),
        UNTIL: _until(config, folder),
    }
    with atomic(folder / RESULT) as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")

"""From config nodes to objects: parts that are meant to be configured, from our own packages and a few others only.

Hydra's `instantiate` is not used on purpose: it makes an OmegaConf of what it is given, which resolves whatever
interpolations the texts in it hold, and a config may come with a checkpoint from somebody else.
"""

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from diffusion import typed
from diffusion.errors import AntherError

OWN = ("diffusion.", "datamodules.", "callbacks.")

# Where the classes are defined that a config of a run may name.
PARTS = (
    *OWN,
    "torch.optim.",
    "lightning.pytorch.trainer.trainer.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.profilers.",
    "lightning.pytorch.plugins.",
    "lightning.pytorch.strategies.",
    "lightning.fabric.plugins.",
)

# And one that came with a checkpoint: what a model and its data are made of, none of which writes a file or asks a host
# that the data set does not name.
PARTS_OF_MODELS = (
    "diffusion.conditioning.",
    "diffusion.denoiser.",
    "diffusion.guidance.",
    "diffusion.modules.",
    "diffusion.networks.",
    "diffusion.samplers.",
    "diffusion.schedules.",
    "diffusion.weighting.",
    "datamodules.",
    "torch.optim.",
)

# A function can do anything, so those that are parts are named one by one.
FUNCTIONS_OF_MODELS = (
    "diffusion.weighting.unit",
    "diffusion.modules.learning_rate.plateau",
    "diffusion.modules.learning_rate.warmup_cosine",
)
FUNCTIONS = (*FUNCTIONS_OF_MODELS, "diffusion.loggers.wandb_logger", "callbacks.progress.progress")

# Groups of conf/ that meet in `module`; who sets them knows them by these names.
_GROUPS = ("network", "schedule", "weighting", "conditioner", "sampler", "optimizer", "scheduler")


def build(node: Mapping[str, Any], where: str = "", /, **extra: Any) -> Any:
    """Calls the `_target_` of a config node, inner nodes first.

    `_partial_: true` gives a function that makes the object from what is still missing.

    Args:
        node: a plain dict with `_target_`.
        where: path of the node in the config, for messages.
        **extra: further keywords, as they are.

    Raises:
        AntherError: a target that is no part, none at all, or one that does not take these settings.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise AntherError(
            f"{_path(where)} has no _target_, the class that its settings are of: name one too, as in "
            f"{where.partition('.')[0] or 'GROUP'}=NAME; --help lists the names."
        )
    return _build(node, where, PARTS, FUNCTIONS, extra)


def rebuild(node: Mapping[str, Any], where: str = "") -> Any:
    """As `build`, for the config of a checkpoint, which somebody else may have written: parts of models and data alone.

    Args:
        node: a plain dict with `_target_`.
        where: path of the node in the config, for messages.

    Raises:
        AntherError: as `build`.
    """
    return _build(node, where, PARTS_OF_MODELS, FUNCTIONS_OF_MODELS)


def construct(call: Callable[..., Any], settings: Any, where: str, given: Iterable[str] = ()) -> Any:
    """Calls with the settings of a config node, whose names and kinds are checked first.

    Args:
        call: a class or function with type hints.
        settings: its keywords.
        where: path of the node in the config.
        given: keywords that do not come from the config and are not checked.

    Raises:
        AntherError: an unknown or missing setting, a value of another kind, or one that the call refuses.
    """
    if not isinstance(settings, Mapping):
        raise AntherError(f"{where} = {typed.short(settings)} does not fit: give a mapping of its settings.")
    check_settings(call, settings, where, frozenset(given))
    return _call(call, where, **settings)


def check_settings(
    call: Callable[..., Any], settings: Mapping[str, Any], where: str, given: frozenset[str] = frozenset()
) -> None:
    """Whether a call takes these keywords, by its signature and type hints.

    Args:
        call: a class or function.
        settings: keywords.
        where: path of the node in the config.
        given: keywords that are not checked.

    Raises:
        AntherError: naming the first setting that is unknown or of another kind.
    """
    known = typed.parameters(call)
    for name, value in settings.items():
        if name in given:
            continue
        if name not in known.hints and not known.open_ended:
            raise AntherError(
                f"{_path(where)} has no setting {name!r}{closest(name, known.hints)}: {_title(call)} takes "
                f"{', '.join(known.hints) or 'none'}."
            )
        hint = known.hints.get(name, Any)
        if not typed.fits(value, hint):
            raise AntherError(misfit(f"{where}.{name}" if where else name, value, hint))


def misfit(path: str, value: Any, hint: Any) -> str:
    """The sentence about a setting of the wrong kind."""
    return f"{path} = {typed.short(value)} does not fit: give {typed.words(hint)}."


def closest(name: str, known: Iterable[str]) -> str:
    """A question about the name that was perhaps meant; empty where none is near."""
    found = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {found[0]}?)" if found else ""


def _build(
    node: Any, where: str, parts: tuple[str, ...], functions: tuple[str, ...], extra: Mapping[str, Any] | None = None
) -> Any:
    if isinstance(node, list | tuple):
        return [_build(value, f"{where}[{k}]", parts, functions) for k, value in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    target = None if "_target_" not in node else _resolve(node["_target_"], where, parts, functions)
    built = {
        key: _build(value, _inner(where, key, value), parts, functions)
        for key, value in node.items()
        if not str(key).startswith("_")
    }
    if target is None:
        return built
    if odd := [key for key in node if str(key).startswith("_") and key not in ("_target_", "_partial_")]:
        raise AntherError(
            f"{_path(where)} has {odd[0]}, which is refused: _target_ and _partial_ alone are understood."
        )
    settings = {**built, **(extra or {})}
    check_settings(target, settings, where, frozenset(extra or ()))
    if node.get("_partial_"):
        return functools.partial(_call, target, where, **settings)
    lacking = [name for name in typed.parameters(target).needed if name not in settings]
    if lacking:
        raise AntherError(f"{_path(where)} lacks {', '.join(lacking)}, which {_title(target)} needs: set it.")
    return _call(target, where, **settings)


def _call(call: Callable[..., Any], where: str, /, *args: Any, **settings: Any) -> Any:
    try:
        return call(*args, **settings)
    except AntherError:
        raise
    # Whatever a part raises about its settings; HYDRA_FULL_ERROR=1 shows where.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise AntherError(f"cannot build {_path(where)} ({_title(call)}): {reason}; change its settings.") from error


def _resolve(target: Any, where: str, parts: tuple[str, ...], functions: tuple[str, ...]) -> Callable[..., Any]:
    """What a `_target_` names: a public name of a module, defined in one of the parts."""
    module, _, name = str(target).rpartition(".")
    tops = {part.partition(".")[0] for part in parts}
    refused = AntherError(
        f"the config wants {_path(where)} to call {target!r}, which is no part that a config may name: it is refused; "
        f"use a class of {', '.join(sorted(tops))}."
    )
    if module.partition(".")[0] not in tops:
        raise refused
    try:
        # The whole of what stands before the name is a module: nothing is reached through what a module imported.
        holder = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
            raise AntherError(f"{target} needs {error.name}, which is not installed: install it.") from error
        raise refused from None
    found = getattr(holder, name, None)
    if found is None or name.startswith("_"):
        public = [key for key, value in vars(holder).items() if inspect.isclass(value)]
        raise AntherError(f"{_path(where)} wants {target!r}, which there is not{closest(name, public)}: it is refused.")
    home = f"{getattr(found, '__module__', '')}."
    if inspect.isclass(found) and home.startswith(parts):
        return found
    if f"{home}{getattr(found, '__qualname__', '')}" in functions:
        return found  # type: ignore[no-any-return]
    raise refused


def _inner(where: str, key: Any, value: Any) -> str:
    if where.partition(".")[0] in ("module", "denoiser") and key in _GROUPS and isinstance(value, Mapping):
        return str(key)
    return f"{where}.{key}" if where else str(key)


def _path(where: str) -> str:
    return where or "the config"


def _title(call: Callable[..., Any]) -> str:
    return f"{call.__module__}.{call.__qualname__}"

"""What the commands themselves read of their configs, and the check of it, before anything heavy is imported.

What belongs to a part is checked where the part is built; see `diffusion.build`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args, get_type_hints, is_typeddict

from diffusion import typed
from diffusion.build import closest, misfit
from diffusion.errors import AntherError
from diffusion.secrecy import check_config

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Guidance(TypedDict):
    """See conf/train.yaml."""

    weight: float | None
    interval: list[Any] | None
    rescale: float | None


class SamplingGuidance(Guidance):
    """See conf/sample.yaml."""

    negative: str | int | None
    bad: str | None


class Train(TypedDict):
    """conf/train.yaml."""

    name: str | int | None
    seed: int
    ckpt: str | None
    objective: str
    T: int
    target: Literal["eps", "x0", "v", "flow"]
    loss: Literal["mse", "l1", "huber"]
    guidance: Guidance


class Sample(TypedDict):
    """conf/sample.yaml."""

    name: str | int | None
    ckpt: str
    model: str | None
    prompts: list[Any] | str | int | None
    num_images: int
    seed: int
    batch_size: int
    guidance: SamplingGuidance
    image: str | None
    mask: str | None
    strength: float | None
    gif: bool


class Data(TypedDict):
    """See conf/evaluate.yaml, as what follows."""

    path: str | None
    exclude: str | None


class Clip(TypedDict):  # noqa: D101
    model: str
    pretrained: str


class Inception(TypedDict):  # noqa: D101
    weights: str | None
    split: str
    few_images: Literal["refuse", "allow"]
    one_channel: Literal["refuse", "repeat"]
    missing: Literal["refuse", "leave_out"]


class Nearest(TypedDict):  # noqa: D101
    space: Literal["inception", "pixels"]
    split: str


class Classifier(TypedDict):  # noqa: D101
    weights: str
    threshold: float | None
    split: str


class Dataset(TypedDict):  # noqa: D101
    name: str | None


class Publish(TypedDict):  # noqa: D101
    repo_id: str | None
    dry_run: bool
    private: bool
    licence: str


class Evaluate(TypedDict):
    """conf/evaluate.yaml; `embedding` is checked where it is built."""

    name: str | int | None
    ckpt: str
    model: str | None
    prompts: list[Any] | str | None
    reconstruct: str | None
    num_images: int
    seed: int
    batch_size: int
    guidance: SamplingGuidance
    data: Data
    clip: Clip | None
    inception: Inception | None
    nearest: Nearest | None
    classifier: Classifier | None
    dataset: Dataset | None
    app: bool
    publish: Publish
    objective: str | None


def read(cfg: "DictConfig", kind: type) -> dict[str, Any]:
    """The composed config of a command as plain values, resolved and checked.

    Args:
        cfg: as Hydra composed it.
        kind: what the command expects of it, one of the classes above.

    Raises:
        AntherError: see `check`.
    """
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(config, dict)
    plain = {str(key): value for key, value in config.items()}
    check(plain, kind)
    return plain


def check(config: Mapping[str, Any], kind: type, where: str = "") -> None:
    """Holds a config against what a command expects of it; groups, which `kind` does not name, are left alone.

    Args:
        config: resolved, plain.
        kind: one of the classes above.
        where: path of the config in the whole one.

    Raises:
        AntherError: naming the first setting that is missing, unknown or of another kind, or holds a token.
    """
    if not where:
        check_config(config)
    hints = get_type_hints(kind)
    if where and (unknown := sorted(set(map(str, config)) - set(hints))):
        raise AntherError(
            f"there is no setting {where}.{unknown[0]}{closest(unknown[0], hints)}: {where} has {', '.join(hints)}."
        )
    for name, hint in hints.items():
        path = f"{where}.{name}" if where else name
        if name not in config:
            raise AntherError(f"the config has no {path}: give it a value, as in conf/, instead of deleting it.")
        value, inner = config[name], _record(hint)
        if inner is None:
            if not typed.fits(value, hint):
                raise AntherError(misfit(path, value, hint))
        elif isinstance(value, Mapping):
            check(value, inner, path)
        elif value is not None or not typed.fits(None, hint):
            raise AntherError(f"{path} = {typed.short(value)} does not fit: set its parts, as in {path}.…=…")


def _record(hint: Any) -> Any:
    """The TypedDict that a hint speaks of, if it does."""
    return next((part for part in (hint, *get_args(hint)) if is_typeddict(part)), None)

"""Checkpoints: what one is, whether it fits, and the model inside."""

import json
import math
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from diffusion.build import rebuild
from diffusion.differences import differences
from diffusion.errors import AntherError
from diffusion.files import sha256
from diffusion.guidance import Guidance
from diffusion.modules.diffusion import Diffusion
from diffusion.modules.generator import Generator
from diffusion.networks.unet import UNet
from diffusion.networks.upstream import load_upstream, read_state
from diffusion.ranks import learnt

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""Of a run: the checkpoint that it goes on from, and the one before."""

_BATCHES = ("devices", "num_nodes", "accumulate_grad_batches")  # of the trainer: how many batches make one step

_FILES = ("path", "prompts", "pretrained")  # settings of conditioners that may name a file


def read(path: Path | str) -> dict[str, Any]:
    """A checkpoint as the dict that was saved; nothing in it is executed, tensors stay on the CPU.

    Raises:
        AntherError: there is no such file, it is damaged, it holds more than plain data, or no config.
    """
    checkpoint = _content(path)
    if not _is_ours(checkpoint):
        raise AntherError(
            f"{path} was not written by train.py (it has no config inside): use a checkpoint of a run, or tell "
            "sample.py or evaluate.py which experiment describes the weights, as in model=flowers_course."
        )
    assert isinstance(checkpoint, dict)
    return checkpoint


def _content(path: Path | str) -> Any:
    path = Path(path)
    if not path.is_file():
        raise AntherError(
            f"there is no checkpoint at {path}: give ckpt= the path of a file such as checkpoints/last.ckpt."
        )
    while True:
        version = _version(path)
        try:
            archive = zipfile.is_zipfile(path)  # older files are none, can not be mapped, and are read whole
            if archive:
                _check_sums(path)
            content, fault = torch.load(path, map_location="cpu", weights_only=True, mmap=archive), None
        except Exception as error:  # torch raises a dozen types here, all of them meaning the same to the user
            content, fault = None, error
        if version == _version(path):
            break
        # A training has put its next checkpoint there. torch opens a file that it maps more than once, and what it
        # read is of both.
    if fault is not None:
        raise AntherError(
            f"{path} is not a whole checkpoint (truncated, changed, of another kind, or with more than plain data in "
            f"it): {_instead(path)}."
        ) from fault
    return content


def _version(path: Path) -> tuple[int, int]:
    """What differs when another file has taken a name; inodes alone are used again."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def _check_sums(path: Path) -> None:
    """Holds every record of an archive against the checksum that was written with it, which torch does not."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is another")


def _instead(path: Path) -> str:
    previous = path.with_name(PREVIOUS)
    if path.name != LAST or not previous.exists():
        return "use another one"
    move = shlex.join(["mv", str(previous), str(path)])
    return f"to go on from the one before it, type `{move}` and the same command again"


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and "config" in content and "state_dict" in content


def check_fits(checkpoint: Mapping[str, Any], config: Mapping[str, Any], path: Path | str) -> None:
    """Refuses to go on with a checkpoint whose model is not the one that the config describes.

    Raises:
        AntherError: naming what differs.
    """
    if found := differences(model_settings(checkpoint["config"]), model_settings(config)):
        raise AntherError(
            f"{path} holds another model: {found}; give the same settings, or another hydra.run.dir or ckpt."
        )


def check_goes_on(before: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> None:
    """Refuses to go on in a folder with a training that is another than its checkpoint's.

    Args:
        before: config of the folder's last checkpoint.
        config: of now; what it says of the optimizer is taken over, see `modules.learning_rate.retune`.
        folder: of the run.

    Raises:
        AntherError: naming what differs.
    """
    there, here = (_trained(json.loads(json.dumps(settings))) for settings in (before, config))
    # A best checkpoint is chosen by FID, which is another one against other reals.
    reals = [((settings.get("callbacks") or {}).get("fid") or {}).get("split") for settings in (before, config)]
    if None not in reals:
        there["callbacks.fid.split"], here["callbacks.fid.split"] = reals
    if any(before["trainer"].get(key) != config["trainer"].get(key) for key in _BATCHES):
        # To train the same on other numbers of devices, the batch of each is made another.
        sizes = [_images_per_step(parts, settings) for parts, settings in ((there, before), (here, config))]
        if None not in sizes:
            there["images per step"], here["images per step"] = sizes
    if found := differences(there, here):
        raise AntherError(
            f"{folder} holds a run with other settings: {found}; give the same settings, or choose another "
            "hydra.run.dir."
        )


def _images_per_step(parts: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """Takes the batch size out of the parts; how many images it makes of one step, where the config tells."""
    factors = [parts["data"].pop("batch_size", None), *(config["trainer"].get(key, 1) for key in _BATCHES)]
    # A list names the devices; "auto" and -1 are as many as there are.
    numbers = [len(factor) if isinstance(factor, list) else factor for factor in factors]
    return math.prod(numbers) if all(isinstance(n, int) and n > 0 for n in numbers) else None


def _trained(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change what is learnt from here on, but those of the optimizer."""
    parts = learnt(config)
    # Which images there are is known from the images themselves.
    drawn = {"module": ("optimizer", "sampler", "weight", "interval", "rescale")}
    drawn["data"] = ("val_batch_size", "name", "split", "split_seed", "exclude")
    return parts | {part: {k: v for k, v in parts[part].items() if k not in drawn[part]} for part in drawn}


def _located(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The module of a config, with files of its conditioner that are not here where they lay in training."""
    module: Mapping[str, Any] = config["module"]
    conditioner, began = module.get("conditioner") or {}, config.get("working_directory")
    if began is None:
        return module
    paths = {key: Path(value).expanduser() for key in _FILES if isinstance(value := conditioner.get(key), str)}
    found = {key: str(Path(began, p)) for key, p in paths.items() if not p.is_file() and Path(began, p).is_file()}
    return {**module, "conditioner": {**conditioner, **found}} if found else module


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make one model another, of the config of a training."""
    module = config["module"]
    parts = {
        key: module[key] for key in ("_target_", "denoiser", "network", "conditioner", "augment_dim") if key in module
    }
    # These change what is learnt, not what the weights mean.
    parts["denoiser"] = {k: v for k, v in parts.get("denoiser", {}).items() if k not in ("loss", "weighting")}
    return {"module": parts}


def load_model(path: Path | str, config: Mapping[str, Any] | None = None) -> Generator:
    """The trained model of a file.

    Args:
        path: a checkpoint, from whose own config the model is rebuilt, with EMA weights where it has them; or the
            state dict of a network, from anywhere.
        config: for a state dict: the resolved config of a run, whose `module` is built. Weights of a `UNet` are read
            by the rules of `networks.upstream`; those of any other network must have its keys, and what has no
            parameters, such as an activation, is believed.

    Raises:
        AntherError: the file holds no weights of a model that draws, they do not fit the config, or a config is given
            for a checkpoint that has its own.
    """
    if config is None:
        checkpoint = read(path)
        module = _generator(checkpoint["config"], path)
        with _fitting(path, "its own config"):
            module.load_state_dict(checkpoint["state_dict"])
            if "ema" in checkpoint:
                module.trained.load_state_dict(checkpoint["ema"]["network"])
        return module
    state = _content(path)
    if _is_ours(state):
        raise AntherError(f"{path} has its own config, and the model inside may not be overridden: leave model= out.")
    module = _generator(config, path)
    network = module.trained
    if isinstance(network, UNet):
        published = load_upstream(path, network.T, network.img_size)
        if published.family != network.family:
            raise AntherError(
                f"{path} holds a network of the family {published.family} and the config describes {network.family}: "
                f"set network.family={published.family}, or give the config that belongs to the file."
            )
        state = published.state_dict()
    else:
        state = read_state(path)[0]
    with _fitting(path, "the given config"):
        network.load_state_dict(state)
    return module


def load_guidance(node: Mapping[str, Any], model: Generator) -> Guidance:
    """All about guidance but its weight, as a config has it; what it leaves open is the model's own.

    Args:
        node: `interval`, `rescale`, `negative`, and `bad`, the path of a worse model's checkpoint; each may be None.
        model: that is guided; a bad one is loaded on its device.

    Raises:
        AntherError: see `Guidance` and `load_model`; the model is not guided at all, or the bad model is no diffusion
            model or has other images, conditions or noise levels.
    """
    if not isinstance(model, Diffusion):
        if asked := [f"guidance.{key}" for key in ("interval", "rescale", "negative", "bad") if node[key] is not None]:
            raise AntherError(f"this model draws in one call, which cannot be guided: leave {', '.join(asked)} out.")
        return Guidance()
    own, bad = model.guidance, node["bad"]
    interval = own.interval if node["interval"] is None else node["interval"]
    rescale = own.rescale if node["rescale"] is None else node["rescale"]
    negative = None if node["negative"] is None else str(node["negative"])
    if bad is None:
        return Guidance(interval, rescale, negative=negative)
    other = _load_worse(str(bad), sha256(bad)) if Path(bad).is_file() else load_model(bad)
    if not isinstance(other, Diffusion):
        raise AntherError(f"{bad} cannot guide this model as guidance.bad: it is no diffusion model; give one.")
    if found := differences(_world(other), _world(model)):
        raise AntherError(
            f"{bad} cannot guide this model as guidance.bad: {found}; give a checkpoint with the same images, "
            "condition and schedule."
        )
    return Guidance(interval, rescale, other.to(model.device).denoiser, negative)


# For the jobs of a sweep, which follow each other in one process.
@lru_cache(maxsize=1)
def _load_worse(path: str, digest: str) -> Generator:
    return load_model(path)


def _world(model: Diffusion) -> dict[str, Any]:
    """What two models share that may meet in one walk."""
    module = model.config["module"]
    return {
        "image_shape": list(model.image_shape),
        "schedule": module["denoiser"]["schedule"],
        "conditioner": module.get("conditioner"),
        "augment_dim": model.augment_dim,
    }


def _generator(config: Mapping[str, Any], path: Path | str) -> Generator:
    if "module" not in config:
        raise AntherError(f"the config for {path} describes no module: give the config of a run of train.py.")
    module = rebuild(_located(config), "module")
    if not isinstance(module, Generator):
        raise AntherError(
            f"{path} holds a {type(module).__name__}, which draws no images: use a checkpoint of a model that does."
        )
    module.config = dict(config)
    return module.eval()


@contextmanager
def _fitting(path: Path | str, config: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, KeyError, TypeError) as error:
        raise AntherError(f"the weights in {path} do not fit {config}: {' '.join(str(error).split())}") from error

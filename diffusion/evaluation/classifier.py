"""Trained classifiers: the two that the project ships, and the compact file they ship as."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.errors import AntherError
from diffusion.files import atomic, sha256
from diffusion.networks.classifier import LeNet

SHIPPED = {
    name: Path(__file__).parent / "weights" / f"{name}.safetensors" for name in ("mnist_idk", "mnist_classifier")
}
"""Written by `python train.py experiment=NAME`; the metadata inside says how well each does."""

_FORMAT = "anther.classifier"


@dataclass(frozen=True)
class Classifier:
    """A classifier and what its calibration found.

    Attributes:
        name: of the file or the shipped classifier.
        network: in evaluation mode.
        temperature: that its logits are divided by.
        threshold: confidence below which it declines; None where nobody fitted one.
        sha256: of the file.
        facts: how it was trained, fitted and tested; empty for weights from elsewhere.
    """

    name: str
    network: LeNet
    temperature: float
    threshold: float | None
    sha256: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def get_classifier(source: str | Path = "mnist_idk") -> LeNet:
    """A trained network, ready to be called with images (B, 1, 28, 28) in [-1, 1].

    Args:
        source: see `load_classifier`.

    Raises:
        AntherError: see `load_classifier`.
    """
    return load_classifier(source).network


def load_classifier(source: str | Path = "mnist_idk") -> Classifier:
    """A trained classifier.

    Args:
        source: `mnist_idk` (11 classes) or `mnist_classifier` (10), which are shipped; a `classifier.safetensors` that
            a training wrote; or a state dict of `LeNet` with seed 001's keys, as `torch.save` wrote it.

    Raises:
        AntherError: there is no such file, or it holds no weights of a `LeNet`.
    """
    path = SHIPPED.get(str(source), Path(source))
    if not path.is_file():
        raise AntherError(f"there is no classifier {source}: give one of {', '.join(SHIPPED)}, or the path of a file.")
    if path.suffix == ".safetensors":
        state, facts = _read_own(path)
    else:
        state, facts = _read_state(path), {}
    network = _network(state, path)
    threshold = facts.get("threshold")
    name = str(source) if str(source) in SHIPPED else path.name
    temperature = float(facts.get("temperature", 1.0))
    return Classifier(name, network, temperature, None if threshold is None else float(threshold), sha256(path), facts)


def export_classifier(network: LeNet, facts: Mapping[str, Any], path: Path) -> None:
    """Writes a classifier as safetensors, with the facts as metadata.

    Args:
        network: whose weights are written.
        facts: plain values; `temperature` and `threshold` are what `load_classifier` reads.
        path: the file, replaced as a whole.
    """
    from safetensors.torch import save

    tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    with atomic(path) as temporary:
        temporary.write_bytes(save(tensors, {_FORMAT: "1", "facts": json.dumps(facts, sort_keys=True)}))


def _read_own(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise AntherError(f"{path} is not a whole safetensors file ({error}); train or fetch it again.") from error
    try:
        return state, dict(json.loads(metadata["facts"])) if _FORMAT in metadata else {}
    except (ValueError, KeyError, TypeError) as error:
        raise AntherError(f"{path} has damaged metadata ({error}); train or fetch it again.") from error


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types here, all of them meaning the same to the user
        raise AntherError(f"{path} is not a state dict (truncated, or with more than tensors in it).") from error
    for key in ("state_dict", "model_state_dict"):
        content = content.get(key, content) if isinstance(content, dict) else {}
    return {str(key).removeprefix("_orig_mod.").removeprefix("network."): value for key, value in content.items()}


def _network(state: Mapping[str, Tensor], path: Path) -> LeNet:
    last = state.get("fc2.weight")
    if last is None or last.ndim != 2 or len(last) not in (10, 11):
        raise AntherError(
            f"{path} holds no LeNet of 10 or 11 classes: its keys are {', '.join(list(state)[:4]) or 'none'}."
        )
    network = LeNet(classes=len(last))
    try:
        network.load_state_dict({key: value.float() for key, value in state.items()})
    except RuntimeError as error:
        raise AntherError(f"{path} holds another network than LeNet: {' '.join(str(error).split())[:300]}") from error
    return network.eval()

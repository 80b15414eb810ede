"""CLIP through open_clip: one loader for the hub's weights, local files and the small CLIP shipped with the project.

Reference: Radford et al., 2021, arXiv:2103.00020; Ilharco et al., open_clip, 2021.
"""

import difflib
import functools
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusion.assets import Asset, AssetError, cache_dir, resolve
from diffusion.conditioning import onednn
from diffusion.errors import AntherError
from diffusion.files import sha256

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

EMBEDDED = {"anther-flowers-32": Path(__file__).parent / "weights" / "flowers_clip.safetensors"}
"""Models whose weights are part of the project; chosen with `pretrained: embedded`."""

_FORMAT = "anther.clip"  # The metadata key that marks a file of the project's own format.
_HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_TIMEOUT = 5.0  # Seconds that the hub may take to answer before it counts as out of reach.
_BATCH = 64


@dataclass(frozen=True)
class ClipSource:
    """Which CLIP, where its weights lie, and how its inputs are prepared: all that is known without loading it.

    Attributes:
        name: for people: `ViT-B-32/openai`.
        model: open_clip's name of the architecture, or the name in a file of the project's format.
        path: the weights.
        config: open_clip's model configuration, with `quick_gelu` as the weights need it.
        preprocess: open_clip's preprocessing: size, mean, std, interpolation, resize_mode.
        own: the file is in the project's format: configuration inside, embedding rows of a small vocabulary only.
    """

    name: str
    model: str
    path: Path
    config: dict[str, Any]
    preprocess: dict[str, Any]
    own: bool

    @functools.cached_property
    def weights_hash(self) -> str:
        """sha256 of the weights file."""
        return sha256(self.path)

    @property
    def identity(self) -> dict[str, Any]:
        """All that the embeddings of this CLIP depend on, as JSON values: part of the key of every cache of them."""
        return {
            "model": self.model,
            "weights": self.weights_hash,
            "config": self.config,
            "preprocess": self.preprocess,
        }


class ClipModel:
    """A frozen CLIP in float32. Not a module, so it cannot enter anybody's state dict."""

    def __init__(
        self,
        source: ClipSource,
        network: nn.Module,
        tokenizer: Any,
        token_ids: Tensor | None,
        device: torch.device,
        setting: str = "conditioner",
    ) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.source = source
        self.name = source.name
        self.dim = int(source.config["embed_dim"])
        self.image_size = source.preprocess["size"]
        self.device = device
        self._setting = setting
        self._network: Any = network.eval().requires_grad_(False).float().to(device)
        if onednn.pays():
            onednn.by_onednn(self._network)
        self._tokenizer = tokenizer
        self._known = None if token_ids is None else frozenset(token_ids.tolist())
        self._transform = image_transform_v2(PreprocessCfg(**source.preprocess), is_train=False)

    @property
    def weights_hash(self) -> str:
        """sha256 of the weights file."""
        return self.source.weights_hash

    def encode_images(self, images: Sequence["Image.Image"]) -> Tensor:
        """Image embeddings (n, dim), float32, on the model's device, not normalised.

        Args:
            images: of any size and mode; converted to RGB, then prepared as the weights were trained.
        """
        pixels = (self._transform(image.convert("RGB")) for image in images)
        return self._encode(self._network.encode_image, pixels)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings (n, dim), float32, on the model's device, not normalised.

        Raises:
            AntherError: the model has a small vocabulary and a text uses words outside it.
        """
        self._check_words(texts)
        return self._encode(self._network.encode_text, self._tokenizer(list(texts)) if texts else ())

    def to(self, device: torch.device | str) -> "ClipModel":
        """Moves the weights; returns self."""
        self.device = torch.device(device)
        self._network.to(self.device)
        return self

    def _encode(self, tower: Any, inputs: Iterable[Tensor]) -> Tensor:
        rows, waiting = [torch.zeros(0, self.dim, device=self.device)], []
        # Callers may be under autocast; embeddings are float32 wherever they are made.
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            for item in inputs:
                waiting.append(item)
                if len(waiting) == _BATCH:
                    rows.append(tower(torch.stack(waiting).to(self.device)).float())
                    waiting = []
            if waiting:
                rows.append(tower(torch.stack(waiting).to(self.device)).float())
        return torch.cat(rows)

    def _check_words(self, texts: Sequence[str]) -> None:
        if self._known is None:
            return
        tokenizer = self._tokenizer
        unknown: dict[str, None] = {}
        for text in texts:
            for word in tokenizer.pat.findall(tokenizer.clean_fn(text)):
                if not self._known.issuperset(tokenizer.encode(word)):
                    unknown[word] = None
        if unknown:
            words = _own_metadata(self.source.path)["words"]
            raise AntherError(
                f"{self.name} does not know {', '.join(repr(word) for word in unknown)}; it knows only: "
                f"{', '.join(words)}. Use these, or a full CLIP: {self._setting}.model=ViT-B-32 "
                f"{self._setting}.pretrained=openai."
            )


def load_clip(
    model: str, pretrained: str, device: torch.device | str = "cpu", setting: str = "conditioner"
) -> ClipModel:
    """Loads a frozen CLIP.

    Args:
        model: an open_clip architecture (`ViT-B-32`), or one shipped with the project (`anther-flowers-32`).
        pretrained: a tag of open_clip (`openai`, `laion2b_s34b_b79k`), a file (.safetensors, .bin, .pt: a state dict,
            read without running code), or `embedded` for the project's own.
        device: where it runs.
        setting: the part of a config that names it, for messages; any but `conditioner` may be left out with null.

    Raises:
        AntherError: unknown names; weights that are missing, damaged, or of another architecture.
    """
    source = find_clip(model, pretrained, setting)
    try:
        network, token_ids = _own_network(source) if source.own else (_hub_network(source), None)
        tokenizer = _tokenizer(source)
    except _load_errors() as error:
        raise AntherError(_misfit(source, error)) from error
    return ClipModel(source, network, tokenizer, token_ids, torch.device(device), setting)


def clip_config(model: str, pretrained: str, setting: str = "conditioner") -> dict[str, Any]:
    """open_clip's configuration of a model (`embed_dim`, `vision_cfg`, `text_cfg`), read without its weights.

    Args:
        model: see `load_clip`, as the others.
        pretrained: tells the project's own models from open_clip's.
        setting: for messages.

    Raises:
        AntherError: the name is unknown, or that of a model of the project with weights from elsewhere.
    """
    from open_clip import get_model_config, list_models

    own = _own_file(model, pretrained)
    if own is not None:
        return dict(_own_metadata(own)["model_cfg"])
    if model in EMBEDDED:
        raise AntherError(
            f"the CLIP {model} is part of the project and has no weights {pretrained!r}: set "
            f"{setting}.pretrained=embedded."
        )
    # Names with a scheme (hf-hub:...) would ask the network.
    config = None if ":" in model else get_model_config(model)
    if config is None:
        raise AntherError(f"unknown CLIP model {model!r}{_close(model, [*EMBEDDED, *list_models()])}")
    return dict(config)


def find_clip(model: str, pretrained: str, setting: str = "conditioner") -> ClipSource:
    """Finds the weights: a local file, the caches, or the hub, asked once and briefly; see `load_clip`.

    Raises:
        AntherError: unknown names, or weights that are nowhere; says where they were looked for and how to get them.
    """
    from dataclasses import asdict

    from open_clip import list_pretrained_tags_by_model
    from open_clip.pretrained import get_pretrained_cfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    config = clip_config(model, pretrained, setting)
    own = _own_file(model, pretrained)
    preprocess = asdict(PreprocessCfg(size=config["vision_cfg"]["image_size"]))
    if own is not None:
        metadata = _own_metadata(own)
        if metadata["name"] != model:
            raise AntherError(
                f"{own} holds the CLIP {metadata['name']!r}, not {model!r}; set {setting}.model={metadata['name']}."
            )
        preprocess = merge_preprocess_dict(preprocess, metadata["preprocess"])
        return ClipSource(f"{model}/{Path(pretrained).name}", model, own, config, _plain(preprocess), own=True)
    tag = get_pretrained_cfg(model, pretrained)
    path = Path(pretrained).expanduser()
    if tag:
        path = resolve_open_clip(model, pretrained, setting)
        preprocess = merge_preprocess_dict(preprocess, tag)
    elif not path.is_file():
        if path.suffix in {".pt", ".pth", ".bin", ".safetensors"} or len(path.parts) > 1:
            raise AntherError(f"the CLIP weights {path} do not exist; give the path of a file, or a tag of {model}.")
        tags = list_pretrained_tags_by_model(model)
        raise AntherError(f"{model} has no weights called {pretrained!r}{_close(pretrained, tags)}")
    # OpenAI trained with the quick GELU; open_clip only warns when architecture and weights disagree about it.
    if tag.get("quick_gelu") or _openai_archive(path):
        config["quick_gelu"] = True
    elif "openai" in str(path).lower() and not config.get("quick_gelu"):
        log.warning("%s looks like OpenAI's weights: those need %s.model=%s-quickgelu", path, setting, model)
    name = f"{model}/{pretrained if tag else path.name}"
    return ClipSource(name, model, path, config, _plain(preprocess), own=False)


def resolve_open_clip(model: str, tag: str, setting: str = "conditioner") -> Path:
    """The weights of an open_clip tag: the project's cache, the hub's cache, OpenAI's cache, the hub, OpenAI.

    Raises:
        AntherError: they are nowhere and the hub cannot be reached, or may not be (HF_HUB_OFFLINE).
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from open_clip.pretrained import get_pretrained_cfg

    weights = get_pretrained_cfg(model, tag)
    repo, _, filename = weights["hf_hub"].rpartition("/")
    names = (str(Path(filename).with_suffix(".safetensors")), filename) if filename else _HUB_FILES
    ours = [cache_dir() / "open_clip" / f"{model}-{tag}{suffix}" for suffix in (".safetensors", ".bin", ".pt")]
    openai = Path("~/.cache/clip").expanduser() / (Path(weights["url"]).name or "none")
    for path in ours:
        if path.is_file():
            return path
    if openai.is_file() and _openai_archive(openai):
        return openai
    for name in names:
        hit = try_to_load_from_cache(repo, name)
        if isinstance(hit, str):
            return Path(hit)
    try:
        return _download(repo, names, setting)
    except AntherError:
        raise
    except Exception as error:  # The hub's client raises its own errors, its transport's and the system's.
        lines = str(error).strip().splitlines() or [""]
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{type(error).__name__}: {lines[0]}"
    # OpenAI's own address has the checksum of the file in it.
    if not constants.HF_HUB_OFFLINE and (digest := re.search("/([0-9a-f]{64})/", weights["url"])):
        kept, official = f"open_clip/{openai.name}", (weights["url"],)
        try:
            return resolve(Asset(f"OpenAI's CLIP {model}", kept, 0, "MIT", digest[1], official))
        except AssetError:
            reason += f", nor did {weights['url']}"
    file = f"{setting}.pretrained=/path/to/{names[0]}"
    if weights.get("quick_gelu") and not model.endswith("-quickgelu"):
        file = f"{setting}.model={model}-quickgelu {file}"
    without = "" if setting == "conditioner" else f", or leave it out: {setting}=null"
    raise AntherError(
        f"the weights {tag!r} of the CLIP {model} are missing: not at {ours[0]}, not in the hub's cache "
        f"{constants.HF_HUB_CACHE} ({repo}), not in {openai.parent}, and the hub did not give them ({reason}); "
        f"on a machine with the hub run `hf download {repo} {names[0]}` and copy the file to the first of these "
        f"places, or give a file: {file}, or use the CLIP of the project: {setting}.model={next(iter(EMBEDDED))} "
        f"{setting}.pretrained=embedded{without}."
    )


def _download(repo: str, names: Sequence[str], setting: str) -> Path:
    """The first of the files that a hub repository has, held against the sha256 that the hub has of it.

    Without Xet the hub's client looks at the size alone.

    Raises:
        AntherError: the file is another; it is removed from the cache.
    """
    from huggingface_hub import hf_hub_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.file_download import get_hf_file_metadata

    missing = EntryNotFoundError(f"{repo} has none of {', '.join(names)}")
    for name in names:
        try:
            # One question without retries: hf_hub_download alone would try for half a minute where there is no network.
            expected = get_hf_file_metadata(hf_hub_url(repo, name), timeout=_TIMEOUT).etag
            path = Path(hf_hub_download(repo, name))
        except EntryNotFoundError:
            continue
        # Of small files, which lie in git itself, the hub has another hash.
        if expected is not None and re.fullmatch("[0-9a-f]{64}", expected) and (found := sha256(path)) != expected:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise AntherError(
                f"{name} came from the hub ({repo}) with the sha256 {found[:12]} in place of {expected[:12]} and was "
                f"removed: start again to fetch it anew, or give a file: {setting}.pretrained=/path/to/it."
            )
        return path
    raise missing


def _own_file(model: str, pretrained: str) -> Path | None:
    """The path of a file in the project's format, or None for everything else."""
    if pretrained == "embedded":
        if model not in EMBEDDED:
            raise AntherError(f"no embedded CLIP is called {model!r}; there is: {', '.join(EMBEDDED)}.")
        if not EMBEDDED[model].is_file():
            raise AntherError(f"the embedded CLIP {EMBEDDED[model]} is missing; install the project again.")
        return EMBEDDED[model]
    path = Path(pretrained).expanduser()
    return path if path.suffix == ".safetensors" and path.is_file() and _own_metadata(path) else None


def _own_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file in the project's format, decoded; empty for other safetensors files."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            raw = file.metadata() or {}
    except SafetensorError as error:
        raise AntherError(f"{path} is not a whole safetensors file ({error}); fetch it again.") from error
    if _FORMAT not in raw:
        return {}
    try:
        return {"name": raw["name"], **{key: json.loads(raw[key]) for key in ("model_cfg", "preprocess", "words")}}
    except (KeyError, json.JSONDecodeError) as error:
        raise AntherError(f"the metadata of {path} are damaged ({error}); fetch the file again.") from error


def _own_network(source: ClipSource) -> tuple[nn.Module, Tensor]:
    """A full-size CLIP with the stored embedding rows at their places, and the token ids of those rows."""
    from open_clip import CLIP
    from safetensors.torch import load_file

    state = load_file(source.path)
    token_ids = state.pop("token_ids")
    rows = state["token_embedding.weight"].float()
    # The full height is needed beyond the lookup: the text tower finds the end of the text by the largest token id.
    vocabulary = source.config["text_cfg"]["vocab_size"]
    weight = torch.zeros(vocabulary, rows.shape[1])
    if not {vocabulary - 2, vocabulary - 1}.issubset(token_ids.tolist()):
        raise ValueError("token_ids lack the start or the end of a text")
    weight[token_ids] = rows
    network: nn.Module = CLIP(**deepcopy(source.config))
    network.load_state_dict({**state, "token_embedding.weight": weight})
    return network, token_ids


def _hub_network(source: ClipSource) -> nn.Module:
    from open_clip import create_model

    archive = _is_torchscript(source.path)
    if archive and not _openai_archive(source.path):
        raise AntherError(
            f"{source.path} is a TorchScript archive, which is code; only the archives that OpenAI published are read: "
            "save the state dict of this model as .safetensors."
        )
    network: nn.Module = create_model(
        source.model,
        pretrained=str(source.path),
        force_quick_gelu=bool(source.config.get("quick_gelu")),
        weights_only=not archive,
    )
    return network


def _tokenizer(source: ClipSource) -> Any:
    from open_clip import SimpleTokenizer, get_tokenizer

    if source.own:
        return SimpleTokenizer(context_length=source.config["text_cfg"].get("context_length", 77))
    return get_tokenizer(source.model)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


@functools.lru_cache
def _openai_archive(path: Path) -> bool:
    """Whether a file is one of OpenAI's TorchScript archives, by the checksums in their addresses."""
    from open_clip.pretrained import get_pretrained_url, list_pretrained

    urls = (get_pretrained_url(model, tag) for model, tag in list_pretrained() if tag == "openai")
    published = {url.split("/")[-2] for url in urls if url}
    return _is_torchscript(path) and sha256(path) in published


def _load_errors() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError

    return (RuntimeError, ValueError, KeyError, EOFError, OSError, pickle.UnpicklingError, SafetensorError)


def _misfit(source: ClipSource, error: Exception) -> str:
    """One sentence from torch's report of several lines: the missing and unexpected keys, the sizes that differ."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    misfits = [line for line in lines if line.startswith(("Missing key", "Unexpected key", "size mismatch"))]
    if misfits:
        what = "; ".join(line if len(line) < 400 else line[:400] + " ..." for line in misfits[:6])
        return f"the weights {source.path} are not of the architecture {source.model}: {what}."
    return (
        f"the CLIP {source.name} cannot be loaded from {source.path}: {type(error).__name__} "
        f"({lines[0][:200] if lines else 'no reason given'}); fetch the file again, or save "
        "its state dict as .safetensors."
    )


def _close(name: str, known: Sequence[str]) -> str:
    hits = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or list(known[:10])
    return f"; did you mean {', '.join(hits)}?" if hits else "."


def _plain(preprocess: dict[str, Any]) -> dict[str, Any]:
    """Tuples as lists, so that the value equals what comes back from JSON."""
    return dict(json.loads(json.dumps(preprocess)))

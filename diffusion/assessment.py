"""The functions that the course's assessment asks for by name, so that a notebook made of its lines runs.

They do one image, one set or one list of prompts at a time. `evaluate.py` does all of it, on files, with the protocol
of every number beside it; docs/assessment.md has both, line by line of the rubric.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffusion.checkpoint import load_model
from diffusion.conditioning.openclip import ClipModel, load_clip
from diffusion.errors import AntherError
from diffusion.evaluation.embeddings import capture
from diffusion.modules.generator import Generator
from diffusion.rng import check_seed
from diffusion.samplers import Sampler, Step

DEMO = "runs/demo/checkpoints/last.ckpt"
"""What `make demo` leaves."""

embeddings_storage: dict[str, Tensor] = {}
"""What the hooks of `get_embedding_hook` saw last, by the name they were made with."""


def calculate_clip_score(
    image_path: Path | str, text_prompt: str, model: str = "ViT-B-32", pretrained: str = "laion2b_s34b_b79k"
) -> float:
    """Cosine of the CLIP embeddings of an image file and a text, in [-1, 1]; higher is closer.

    score = E_image(x) . E_text(p) / (|E_image(x)| |E_text(p)|)

    The CLIP is loaded at the first call and kept for the life of the process. Scores of different CLIPs do not compare.

    Args:
        image_path: an image of any size and mode; it is scored as RGB.
        text_prompt: the text.
        model: see `load_clip`; `anther-flowers-32` needs no download and knows the words of the demo only.
        pretrained: see `load_clip`; `embedded` for that model.

    Raises:
        AntherError: the file is no image, or the CLIP cannot be loaded.

    Reference: Hessel et al., 2021, arXiv:2104.08718, without its factor 2.5 and its clipping at 0.
    """
    from PIL import Image, UnidentifiedImageError

    clip = _clip(model, pretrained)
    try:
        with Image.open(image_path) as image:
            features = clip.encode_images([image])
    except (UnidentifiedImageError, OSError) as error:
        raise AntherError(f"{image_path} cannot be read as an image ({error}): give the path of a PNG.") from error
    return float((normalize(features) * normalize(clip.encode_texts([text_prompt]))).sum())


@functools.cache
def _clip(model: str, pretrained: str) -> ClipModel:
    return load_clip(model, pretrained, _device())


def calculate_fid(real_embeddings: ArrayLike, gen_embeddings: ArrayLike) -> float:
    """Fréchet distance of the Gaussians fitted to two sets of embeddings; lower is closer.

    FID = |mu_1 - mu_2|^2 + Tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), with the unbiased covariances of `np.cov`

    With S_i = X_i^T X_i, X_i the centred rows over sqrt(N_i - 1), the trace of the root is the sum of the singular
    values of X_1 X_2^T. No covariance is formed and no root of a singular matrix is taken, so the value is real and
    finite for fewer rows than columns too, where the guide's `sqrtm` is not. It is biased there all the same: compare
    values of equal N only.

    Args:
        real_embeddings: (N_1, D), N_1 at least 2, e.g. D = 2048 features of an Inception v3.
        gen_embeddings: (N_2, D), N_2 at least 2.

    Raises:
        AntherError: other shapes, or values that are not finite.

    Reference: Heusel et al., 2017, arXiv:1706.08500.
    """
    real, generated = _rows("real_embeddings", real_embeddings), _rows("gen_embeddings", gen_embeddings)
    if real.shape[1] != generated.shape[1]:
        raise AntherError(
            f"calculate_fid: real_embeddings have {real.shape[1]} columns and gen_embeddings {generated.shape[1]}: "
            "take both from one extractor."
        )
    (mu_1, x_1), (mu_2, x_2) = _mean_and_factor(real), _mean_and_factor(generated)
    root = np.linalg.norm(x_1 @ x_2.T, "nuc")
    # Rounding may leave a negative zero of size 1e-12 for equal sets; a squared distance has none.
    return max(0.0, float(((mu_1 - mu_2) ** 2).sum() + (x_1**2).sum() + (x_2**2).sum() - 2 * root))


def _rows(name: str, embeddings: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(embeddings, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2 or not np.isfinite(rows).all():
        raise AntherError(
            f"calculate_fid: {name} of shape {rows.shape} must be finite numbers (N, D), one row per image and at "
            "least 2 rows: flatten them, or score more images."
        )
    return rows


def _mean_and_factor(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean (D,), and some X (k, D) with X^T X = the covariance, k = min(N, D)."""
    mean: NDArray[np.float64] = rows.mean(0)
    x: NDArray[np.float64] = (rows - mean) / np.sqrt(len(rows) - 1)
    if len(x) > x.shape[1]:
        x = np.asarray(np.linalg.qr(x, mode="r"))
    return mean, x


def get_embedding_hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    """A forward hook that keeps what a layer gives out in `embeddings_storage[name]`, each call replacing the last.

        model.down2.register_forward_hook(get_embedding_hook("down2"))

    where `model` is a U-Net; that of a loaded checkpoint is `load_model(ckpt).trained`. The rows are those of
    the call: under guidance a layer behind the condition (`up1`, `up2`, `out`) sees 2 n rows, the n conditional ones
    first. `sample_flowers` keeps one row per image whatever the layer.
    """

    def hook(model: nn.Module, input: Any, output: Tensor) -> None:
        embeddings_storage[name] = output.detach()

    return hook


def sample_flowers(
    text_prompts: Sequence[str],
    ckpt: Path | str | Generator = DEMO,
    guidance_weight: float | None = None,
    seed: int = 0,
    sampler: Sampler | None = None,
    layer: str = "down2",
    batch_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Draws one image per prompt and keeps the embeddings of the last step.

        generated_images, _ = sample_flowers(text_prompts)
        extracted_embeddings = embeddings_storage["down2"]

    Row i of images, frames and embeddings belongs to prompt i. The course's function reads model, diffusion and CLIP
    from the notebook's globals and draws seven guidance weights per prompt; here all of them come from the checkpoint,
    and one call draws one weight.

    Args:
        text_prompts: n prompts.
        ckpt: a checkpoint of train.py, or the model that `load_model` made of one.
        guidance_weight: w of e = (1 + w) e_c - w e_u; None takes the model's own.
        seed: image i is drawn with seed + i, in any batch split.
        sampler: instead of the model's own.
        layer: of the network, whose output goes to `embeddings_storage[layer]`, (n, ...), float32, on the CPU; the
            conditional branch's under guidance (at w = -1 there is none, and it is the other's).
        batch_size: images at a time.

    Returns:
        The images (n, C, H, W), and the frames on the way (F, n, C, H, W): as in the course x_t after every tenth step
        and after each of the last ten, counted from the end. Both on the CPU, the images clamped to [-1, 1].

    Raises:
        AntherError: no prompts, no such checkpoint, a model without a condition, an unknown layer.
    """
    prompts = [text_prompts] if isinstance(text_prompts, str) else list(text_prompts)
    if not prompts:
        raise AntherError("sample_flowers was given no prompts: name at least one.")
    if batch_size < 1:
        raise AntherError(f"batch_size = {batch_size} must be 1 or more.")
    check_seed(seed)
    model = ckpt if isinstance(ckpt, Generator) else load_model(ckpt).to(_device())
    images, frames, rows = [], [], []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        seeds = range(seed + start, seed + start + len(part))
        kept: list[Tensor] = []
        with capture(model.trained, layer) as captured:
            drawn = model.sample(part, seeds, guidance_weight, sampler, functools.partial(_keep_frame, kept))
        images.append(drawn.float().cpu().clamp(-1, 1))
        frames.append(torch.stack(kept))
        rows.append(captured.rows(len(part)).float().cpu())
    embeddings_storage[layer] = torch.cat(rows)
    return torch.cat(images), torch.cat(frames, 1)


def _keep_frame(kept: list[Tensor], step: Step) -> None:
    left = step.steps - 1 - step.number
    if left % 10 == 0 or left < 10:
        kept.append(step.x_s.float().cpu())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"

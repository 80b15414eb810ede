"""How near images that come back are to those that went in."""

import math

from diffusion.evaluation.rows import parts
from diffusion.images import Images

_PART = 256  # images in float64 at a time
_WINDOW = 11  # pixels, of SSIM


def fidelity(images: Images, originals: Images) -> dict[str, list[float]]:
    """Peak signal-to-noise ratio and structural similarity of each image with its original, by torchmetrics.

    psnr = 10 log10(255^2 / mean squared error) in dB, infinite for equal images; ssim in [-1, 1], over the places where
    the Gaussian window of 11 pixels lies inside the image, as its authors and scikit-image have it, and torchmetrics
    alone has not.

    Args:
        images: uint8 (N, C, H, W).
        originals: uint8 (N or more, C, H, W), of which the first N are meant.

    Returns:
        N values each under "psnr" and "ssim"; NaN where an image is smaller than the window.

    Reference: Wang et al., 2004, doi 10.1109/TIP.2003.819861.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    psnr: list[float] = []
    ssim: list[float] = []
    for part in parts(len(images), _PART):
        ours, theirs = images[part].double(), originals[part].double()
        psnr += peak_signal_noise_ratio(ours, theirs, data_range=255.0, reduction="none", dim=(1, 2, 3)).tolist()
        if min(ours.shape[-2:]) < _WINDOW:
            ssim += [math.nan] * len(ours)
            continue
        _, places = structural_similarity_index_measure(
            ours, theirs, data_range=255.0, reduction="none", return_full_image=True
        )
        border = _WINDOW // 2
        ssim += places[..., border:-border, border:-border].flatten(1).mean(1).tolist()
    return {"psnr": psnr, "ssim": ssim}

"""A run folder of evaluate.py without a model: pictures, records and made-up scores."""

import numpy as np
import pandas as pd
from PIL import Image

from diffusion.evaluation.metric import Result

PROMPTS = ("a red rose", "two white daisies", "a yellow sunflower")
CLIP = "ViT-B-32/laion2b_s34b_b79k"

RUN = {
    "experiment": "flowers",
    "checkpoint": "runs/flowers/checkpoints/last.ckpt",
    "checkpoint_sha256": "ab" * 32,
    "validation_loss": 0.0888,
    "parameters": 34122243,
    "T": 400,
    "image_shape": [3, 8, 8],
    "prompts": list(PROMPTS),
    "num_images": 30,
    "seed": 0,
    "guidance_weight": 3.0,
    "sampler": {"_target_": "diffusion.samplers.ddim.DDIM", "steps": 50, "eta": 0.0},
    "steps": 50,
    "embedding": {"layer": "down2", "form": "pooled", "when": "last"},
    "data": "cropped_flowers",
    "data_digest": "cd" * 32,
    "conditioner": "CLIP ViT-B/32",
    "versions": {"torch": "2.13.0", "torchmetrics": "1.9.0"},
    "seconds": 12.5,
    "made": "2025-01-02T03:04:05",
}


def flat(k):
    """A picture of one colour that says which it is."""
    return np.full((8, 8, 3), (10 + 5 * k, 250 - 5 * k, (37 * k) % 256), np.uint8)


def make_run(folder, n=30, prompts=PROMPTS, picture=flat, **columns):
    """Writes images, records and embeddings; returns the records.

    Scores are in an order that is neither that of the images nor its reverse, so that a mix-up shows.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    ids = [f"{k:06d}" for k in range(n)]
    for k, name in enumerate(ids):
        Image.fromarray(picture(k)).save(folder / "images" / f"{name}.png")
    frame = pd.DataFrame(
        {
            "id": ids,
            "prompt": pd.Series([prompts[k % len(prompts)] if prompts else None for k in range(n)], dtype=object),
            "label": pd.Series([None] * n, dtype=object),
            "seed": range(100, 100 + n),
            "guidance_weight": 3.0,
            "sampler": "DDIM",
            "steps": 50,
            "checkpoint": "ab" * 32,
            "file": [f"images/{name}.png" for name in ids],
        }
    )
    scores = {
        "clip_score": 0.2 + 0.1 * rng.permutation(n) / n,
        "nearest_distance": 10 + rng.permutation(n) / 2,
        "nearest_row": rng.permutation(n),
        "nearest_real": [f"daisy/{k}.jpg" for k in range(n)],
        "uniqueness": rng.permutation(n) / n,
        "representativeness": rng.permutation(n) / n,
        "representativeness_closeness": rng.permutation(n) / n,
    }
    for name, values in {**scores, **columns}.items():
        if values is not None:
            frame[name] = values
    frame.to_parquet(folder / "records.parquet")
    np.save(folder / "embeddings.npy", rng.normal(size=(n, 16)).astype(np.float32))
    return frame


def results(frame, n=30):
    """Metrics of such a run, with the keys that evaluate.py gives them."""
    mean = float(frame["clip_score"].mean())
    return {
        f"clip_score_{n}/{CLIP}": Result(mean, "higher", note="not the CLIP that conditions", protocol={"N": n}),
        f"clip_score_100_{n}/{CLIP}": Result(100 * mean, "higher", protocol={"N": n}),
        f"clip_score_std_{n}/{CLIP}": Result(float(frame["clip_score"].std(ddof=0)), None),
        f"fid_{n}": Result(87.50031, "lower", "poor (50 or more)", "N is small", {"N": n, "extractor": "inception"}),
        f"kid_{n}": Result(0.0123, "lower", "excellent (below 0.02)", None, {"N": n, "subset_size": 10}),
        f"kid_std_{n}": Result(0.002, None),
        f"is_{n}": Result(None, "higher", None, "the weights have no fc layer"),
        f"nearest_distance_{n}": Result(20.0, None, protocol={"distance": "L2 of pixels in [0, 1]"}),
        f"uniqueness_{n}": Result(float(frame["uniqueness"].mean())),
    }

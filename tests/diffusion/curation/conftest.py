"""A run's folder to curate, and FiftyOne on a database of the test session's own."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from diffusion.evaluation.distribution import without_fc
from diffusion.evaluation.metric import Result

MakeRun = Callable[..., Path]

PROMPTS = ("a red rose", "two white daisies", "a sunflower")
LABELS = ("roses", "daisy", "sunflowers")


@pytest.fixture(scope="session")
def make_run() -> MakeRun:
    """(folder, n, seed, weight, shape of an embedding or None, scored, prompted) -> the folder of a finished run."""

    def make(
        folder: Path,
        n: int = 24,
        seed: int = 0,
        weight: float | None = 3.0,
        shape: tuple[int, ...] | None = (2, 2, 2),
        scored: bool = True,
        prompted: bool = True,
    ) -> Path:
        import pandas as pd
        from PIL import Image

        rng = np.random.default_rng(seed)
        (folder / "images").mkdir(parents=True)
        rows = []
        for k in range(n):
            file = f"images/{k:06d}.png"
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / file)
            row = {
                "id": f"{k:06d}",
                "prompt": PROMPTS[k % 3] if prompted else None,
                "label": LABELS[k % 3] if prompted and k != 1 else None,
                "seed": 100 + k,
                "guidance_weight": weight,
                "sampler": "DDIM",
                "steps": 7,
                "checkpoint": "ab" * 32,
                "file": file,
            }
            if scored:
                row |= {
                    "clip_score": float(rng.uniform(0.1, 0.4)),
                    "nearest_distance": float(rng.uniform(1, 9)),
                    "nearest_real": f"daisy/{k}.jpg",
                    "nearest_row": k,
                    "realism": float("nan") if k == 2 else float(rng.uniform(0, 2)),
                    "inception_entropy": float(rng.uniform(0, 3)),
                    "pseudo_label": str(k % 10),
                    "final_label": "IDK" if k % 4 == 0 else str(k % 10),
                    "rejection_type": ("soft", "none", "none", "none")[k % 4],
                    "is_idk": k % 4 == 0,
                    "classifier_confidence": float(rng.uniform(0.3, 1)),
                    "runner_up": str((k + 1) % 10),
                    "margin": float(rng.uniform(0, 1)),
                }
            rows.append(row)
        pd.DataFrame(rows).to_parquet(folder / "records.parquet")
        if shape is not None:
            np.save(folder / "embeddings.npy", rng.normal(size=(n, *shape)).astype(np.float32))
        facts = {
            "run": {"experiment": "tiny", "seed": 100, "guidance_weight": weight, "versions": {"torch": "2.x"}},
            "metrics": {
                # A key may have a dot or a slash in it.
                f"clip_score_{n}/ViT-B-32.v2/laion2b": Result(0.25, "higher", protocol={"N": n}).record(),
                f"is_{n}": Result(None, "higher", note=without_fc(SimpleNamespace(weights_hash="ab" * 32))).record(),
            },
        }
        (folder / "metrics.json").write_text(json.dumps(facts))
        return folder

    return make


@pytest.fixture(scope="session")
def fiftyone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """FiftyOne with a real MongoDB in a folder of this session, whatever the user's own is."""
    assert "fiftyone" not in sys.modules, (
        "FiftyOne reads its environment when it is imported: ask for this fixture first"
    )
    from diffusion.curation import database

    folder = tmp_path_factory.mktemp("fiftyone")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FIFTYONE_DATABASE_URI", "FIFTYONE_PRIVATE_DATABASE_PORT"):
            patch.delenv(name, raising=False)
        patch.setenv("FIFTYONE_DATABASE_DIR", str(folder / "db"))
        patch.setenv("FIFTYONE_CONFIG_PATH", str(folder / "config.json"))
        patch.setenv("FIFTYONE_APP_CONFIG_PATH", str(folder / "app.json"))
        patch.setenv("FIFTYONE_DEFAULT_DATASET_DIR", str(folder))
        patch.setenv("FIFTYONE_DATABASE_NAME", "tests")
        yield database.ready()


@pytest.fixture(scope="session")
def built(make_run: MakeRun, fiftyone: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 images whose dataset `built` is in the database. Look, don't touch."""
    from diffusion.curation.dataset import build_dataset

    folder = make_run(tmp_path_factory.mktemp("runs") / "built")
    assert build_dataset(folder, "built") == "built"
    return folder

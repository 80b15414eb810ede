import json
import math
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.nn.functional import cosine_similarity, normalize

from datamodules.drawn import COUNTS, PAINT, PLURALS, SPECIES, DrawnFlowers, caption, draw, everything, meaning
from diffusion.build import build
from diffusion.conditioning.openclip import EMBEDDED, ClipModel, load_clip
from diffusion.errors import AntherError
from diffusion.modules.contrastive import Contrastive, export_clip, rescale, soft_contrastive_loss, tokenize
from diffusion.modules.learning_rate import warmup_cosine

NAME = "anther-flowers-32"
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16, "layers": 1},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
CONF = Path(__file__).parents[3] / "conf"
HELD_OUT = 2_000_000  # neither trained nor validated on, whatever the sizes of the splits
FLOORS = {"species": 0.95, "colour": 0.95, "count": 0.90, "caption": 0.80}


@pytest.fixture
def data(tmp_path, monkeypatch) -> DrawnFlowers:
    monkeypatch.setenv("ANTHER_CACHE", str(tmp_path / "cache"))
    return DrawnFlowers(n_train=64, n_val=16, batch_size=16, seed=0, partial=0.3)


def fit(data: DrawnFlowers, folder: Path, steps: int = 3, lr: float = 1e-3, scheduler=None) -> Contrastive:
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    module = Contrastive(model_cfg=TINY, optimizer=optimizer, scheduler=scheduler)
    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    return module


# --- the loss ---


def vectors(n: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_the_loss_of_distinct_captions_is_that_of_open_clip():
    from open_clip.loss import ClipLoss

    image, text, scale = vectors(6, 0), vectors(6, 1), torch.tensor(7.0)
    ours = soft_contrastive_loss(image, text, torch.eye(6, dtype=torch.bool), scale)
    assert ours.shape == (6,)
    torch.testing.assert_close(ours.mean(), ClipLoss()(image, text, scale))


def test_equal_captions_share_the_target():
    image, scale = vectors(5, 0), torch.tensor(3.0)
    caption_of = torch.tensor([0, 1, 0, 2, 0])
    text = vectors(3, 1)[caption_of]
    ours = soft_contrastive_loss(image, text, caption_of[:, None] == caption_of, scale)
    for i in range(5):
        positives = [k for k in range(5) if caption_of[k] == caption_of[i]]
        expected = 0.0
        for logits in (scale * (text @ image[i]), scale * (image @ text[i])):
            expected -= sum(float(logits.log_softmax(0)[k]) for k in positives) / len(positives) / 2
        assert ours[i].item() == pytest.approx(expected, abs=1e-5)


# --- training and export ---


def test_a_fit_writes_a_file_that_the_loader_reads_as_the_same_model(data, tmp_path):
    module = fit(data, tmp_path)
    path = tmp_path / "flowers_clip.safetensors"
    loaded = load_clip(NAME, str(path))
    prompts = [meaning(0, i).caption for i in range(8)]
    with torch.no_grad():
        texts = module.clip.encode_text(tokenize(prompts, TINY))
        images = module.clip.encode_image(torch.stack([view["image"] for view in rows(data)]))
    torch.testing.assert_close(loaded.encode_texts(prompts), texts, rtol=0, atol=0.02)
    pictures = [data.table.original(int(row)) for row in data.splits["val"]]
    torch.testing.assert_close(loaded.encode_images(pictures), images, rtol=0, atol=0.02)
    # Networks are conditioned on these: entries near ±1.
    captions = sorted({data.table.captions[row] for row in data.splits["train"]})
    for embeddings in (images, loaded.encode_texts(captions)):
        assert embeddings.square().sum(1).mean().sqrt().item() == pytest.approx(math.sqrt(16), rel=0.01)


def rows(data: DrawnFlowers):
    dataset = data.val_dataloader().dataset
    return [dataset[i] for i in range(len(dataset))]


def test_the_file_holds_the_training_vocabulary_only(data, tmp_path):
    from safetensors import safe_open

    fit(data, tmp_path)
    with safe_open(tmp_path / "flowers_clip.safetensors", "pt") as file:
        token_ids, metadata = file.get_tensor("token_ids"), file.metadata()
        assert len(file.get_tensor("token_embedding.weight")) == len(token_ids) < 150
        assert file.get_tensor("token_embedding.weight").dtype == torch.float16
    captions = [data.table.captions[row] for row in data.splits["train"]]
    assert {*token_ids.tolist()} == {*tokenize(captions, TINY).flatten().tolist()}
    assert json.loads(metadata["model_cfg"]) == TINY
    assert "tulip" in json.loads(metadata["words"])
    with pytest.raises(AntherError, match="dragon"):
        load_clip(NAME, str(tmp_path / "flowers_clip.safetensors")).encode_texts(["a red dragon"])


def test_rescaling_leaves_cosines_alone(data):
    from open_clip import CLIP

    torch.manual_seed(0)
    clip, tokens, images = CLIP(**TINY).eval(), tokenize(["a red rose", "two tulips"], TINY), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        before = clip(images, tokens)[:2]
        rescale(clip, images, tokens)
        after = clip(images, tokens)[:2]
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)


def test_it_learns(data, tmp_path):
    module = fit(data, tmp_path, steps=60, lr=3e-3)
    metrics = module.trainer.callback_metrics
    assert metrics["val/retrieval"] > 0.25  # chance is about 1/15
    assert metrics["val/loss"] < math.log(16)


def test_the_learning_rate_warms_up_and_ends_at_zero(data, tmp_path):
    data.setup()
    module = fit(data, tmp_path, steps=20, scheduler=partial(warmup_cosine, warmup_steps=5))
    factor = module.lr_schedulers().lr_lambdas[0]
    assert [factor(step) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factor(20) == pytest.approx(0)
    assert factor(12) > factor(13)


def test_only_matrices_that_are_no_embeddings_decay(data, tmp_path):
    module = fit(data, tmp_path)
    matrices, others = module.optimizers().param_groups
    assert (matrices["weight_decay"], others["weight_decay"], matrices["lr"], others["lr"]) == (0.05, 0, 1e-3, 1e-3)
    names = {p: n for n, p in module.clip.named_parameters()}
    found = {names[p] for p in others["params"]}
    assert {"logit_scale", "token_embedding.weight", "ln_final.bias"} < found
    assert {names[p] for p in matrices["params"]} == set(names.values()) - found > {"text_projection", "visual.proj"}


def test_images_of_another_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHER_CACHE", str(tmp_path))
    with pytest.raises(AntherError, match=r"data\.size"):
        fit(DrawnFlowers(size=16, n_train=16, n_val=4, batch_size=8, seed=0), tmp_path)


# --- the shipped file ---


def score(clip: ClipModel, n: int = 400) -> dict[str, float]:
    """Zero-shot accuracies on freshly drawn pictures; a class is the mean of its prompts."""
    from PIL import Image

    pairs = [draw(0, HELD_OUT + i, 32) for i in range(n)]
    pictures = normalize(clip.encode_images([Image.fromarray(p.transpose(1, 2, 0)) for p, _ in pairs]), dim=1)
    flowers = [f for _, f in pairs]

    def accuracy(classes: list[list[str]], truth: list[int]) -> float:
        texts = torch.stack([normalize(clip.encode_texts(prompts), dim=1).mean(0) for prompts in classes])
        found = (pictures @ normalize(texts, dim=1).T).argmax(1)
        return (found == torch.tensor(truth)).float().mean().item()

    colours, all_of_them = list(PAINT), everything()
    return {
        "species": accuracy(
            [[f"one {s}", f"two {PLURALS[s]}", f"three {PLURALS[s]}"] for s in SPECIES],
            [SPECIES.index(f.species) for f in flowers],
        ),
        "colour": accuracy(
            [[f"one {c} flower", f"two {c} flowers", f"three {c} flowers"] for c in colours],
            [colours.index(f.colour) for f in flowers],
        ),
        "count": accuracy([[f"{n} flower{'s' * (n != 'one')}"] for n in COUNTS], [f.count - 1 for f in flowers]),
        "caption": accuracy([[f.caption] for f in all_of_them], [all_of_them.index(f) for f in flowers]),
    }


@pytest.fixture(scope="module")
def shipped() -> ClipModel:
    return load_clip(NAME, "embedded")


def test_the_shipped_clip_tells_the_drawn_flowers_apart(shipped):
    found = score(shipped)
    assert all(found[key] >= floor for key, floor in FLOORS.items()), found


def test_an_untrained_clip_and_one_that_says_the_same_of_everything_fail_every_floor(shipped, tmp_path):
    from open_clip import CLIP

    config = shipped.source.config
    torch.manual_seed(0)
    clip = CLIP(**config).eval()
    captions = [f.caption for f in everything()] + [
        f"{n} {c} flower{s}" for n in COUNTS for c in PAINT for s in ("", "s")
    ]
    captions += [f"{n} {s}" for n in COUNTS for s in (*PLURALS.keys(), *PLURALS.values())]
    export_clip(clip, config, captions, tmp_path / "untrained.safetensors", NAME)
    with torch.no_grad():
        clip.visual.proj.zero_()[:, 0] = clip.visual.ln_post.bias + 1
        clip.text_projection.zero_()[:, 0] = 1
    export_clip(clip, config, captions, tmp_path / "constant.safetensors", NAME)
    for name in ("untrained", "constant"):
        found = score(load_clip(NAME, str(tmp_path / f"{name}.safetensors")), n=200)
        assert all(found[key] < floor for key, floor in FLOORS.items()), (name, found)


def test_the_shipped_clip_is_small_and_is_what_the_experiment_makes(shipped):
    assert EMBEDDED[NAME].stat().st_size <= 2 * 2**20
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["experiment=clip_flowers"])
    module = build(OmegaConf.to_container(config.module, resolve=True))
    assert isinstance(module, Contrastive)
    assert shipped.source.config == module.model_cfg
    assert shipped.name.startswith(module.name)
    assert shipped.dim == 64


def test_the_shipped_clip_knows_every_word_of_every_caption(shipped):
    import numpy as np

    rng = np.random.default_rng(5)
    shipped.encode_texts([caption(meaning(1, i), rng, partial=0.3) for i in range(600)])
    shipped.encode_texts(["Two Blue Roses", "a photo of a daisy", "flowers", "some violet blossoms in the grass."])


def test_other_words_for_the_same_mean_the_same(shipped):
    plain = [f.caption for f in everything()]
    anchor = shipped.encode_texts(plain)
    other = cosine_similarity(anchor[:, None], anchor[None], dim=2).fill_diagonal_(-1).amax(1)
    for frame in ("a photo of {}", "{} in a garden", "{}."):
        same = cosine_similarity(anchor, shipped.encode_texts([frame.format(text) for text in plain]), dim=1)
        assert (same > other).float().mean() > 0.98


def test_shipped_embeddings_have_entries_near_one(shipped):
    norms = shipped.encode_texts([f.caption for f in everything()]).norm(dim=1)
    assert 6 < norms.min() < norms.max() < 10.5

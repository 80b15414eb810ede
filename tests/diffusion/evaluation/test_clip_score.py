from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from callbacks.clip import GenerationClipScore
from diffusion.errors import AntherError
from diffusion.evaluation.clip_score import ClipScore
from diffusion.images import save_png

PROMPTS = ["a red rose", "two white daisies", "a red rose", "a photo of a rose", "white daisies"]


@pytest.fixture
def images():
    return torch.rand(5, 3, 20, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1


def by_hand(reference, images, prompts, folder):
    """`calculate_clip_score` of the assessment: open_clip on a PNG, normalised dot product, one image at a time."""
    _, encode_images, encode_texts = reference
    scores = []
    for k, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        save_png(image, folder / f"{k}.png")
        features = encode_images([Image.open(folder / f"{k}.png").convert("RGB")])
        text = encode_texts([prompt])
        features /= features.norm(dim=-1, keepdim=True)
        text /= text.norm(dim=-1, keepdim=True)
        scores.append((features @ text.T).item())
    return torch.tensor(scores)


@pytest.mark.parametrize("channels", [3, 1])
def test_equals_the_assessments_function_on_the_png(reference, images, tmp_path, channels):
    images = images[:, :channels]
    expected = by_hand(reference, images, PROMPTS, tmp_path)
    metric = ClipScore("tiny", str(reference[0]))
    metric.update(images[:2], PROMPTS[:2])
    metric.update(images[2:], PROMPTS[2:])
    torch.testing.assert_close(metric.last, expected[2:], rtol=0, atol=1e-6)
    torch.testing.assert_close(metric.score(images, PROMPTS), expected, rtol=0, atol=1e-6)
    assert metric.compute().item() == pytest.approx(expected.mean().item(), abs=1e-6)
    assert metric.percent == pytest.approx(100 * expected.mean().item(), abs=1e-4)
    metric.reset()
    metric.update(images[:1], PROMPTS[:1])
    assert metric.compute().item() == pytest.approx(expected[0].item(), abs=1e-6)


def test_the_model_is_named_and_stays_out_of_the_state(reference, images):
    metric = ClipScore("tiny", str(reference[0]))
    assert metric.name.startswith("tiny/")
    metric.update(images, PROMPTS)
    assert not metric.state_dict()
    assert not list(metric.parameters())
    assert not list(metric.children())


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x * 1.5,
        lambda x: x.clamp(max=0) * 1.5,
        lambda x: (x + 1) * 127.5,
        lambda x: torch.full_like(x, torch.nan),
        lambda x: ((x + 1) * 127).to(torch.uint8),
        lambda x: x[:4],
        lambda x: x[0],
    ],
)
def test_other_ranges_and_counts_are_refused(reference, images, bad):
    metric = ClipScore("tiny", str(reference[0]))
    with pytest.raises(AntherError, match="CLIP score"):
        metric.update(bad(images), PROMPTS)
    assert metric.count == 0


def test_shards_of_different_size_merge_to_the_mean_of_all(reference, images):
    one, first, second = (ClipScore("tiny", str(reference[0])) for _ in range(3))
    one.update(images, PROMPTS)
    first.update(images[:4], PROMPTS[:4])
    second.update(images[4:], PROMPTS[4:])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(one.compute().item(), abs=1e-6)


@pytest.mark.parametrize("setting", ["clip", "callbacks.clip"])
def test_missing_weights_are_told_by_the_scorers_own_setting(setting, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ANTHER_CACHE", str(tmp_path / "cache"))
    arguments = ("ViT-B-32", "openai")
    scorer = ClipScore(*arguments) if setting == "clip" else GenerationClipScore(["a rose"], [1.0], *arguments).scorer
    with pytest.raises(AntherError) as refusal:
        scorer.load()
    said = str(refusal.value)
    assert f"give a file: {setting}.model=ViT-B-32-quickgelu {setting}.pretrained=/path/to/" in said
    assert f"{setting}.model=anther-flowers-32 {setting}.pretrained=embedded" in said
    assert said.endswith(f"or leave it out: {setting}=null.")
    assert "conditioner" not in said
    embedded = ClipScore("anther-flowers-32", "embedded", setting)
    with pytest.raises(AntherError, match=f"a full CLIP: {setting}.model=ViT-B-32 {setting}.pretrained=openai"):
        embedded.load().encode_texts(["a zeppelin"])


def _rank(rank, path, images, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metric = ClipScore("tiny", path)
    shard = range(5)[rank::2]
    metric.update(images[list(shard)], [PROMPTS[k] for k in shard])
    torch.save(metric.compute(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_shards_of_different_size_give_the_exact_mean(reference, images, tmp_path):
    path = str(reference[0])
    mp.spawn(_rank, (path, images, str(tmp_path)), nprocs=2)
    one = ClipScore("tiny", path)
    one.update(images, PROMPTS)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert got.item() == pytest.approx(one.compute().item(), abs=1e-6)

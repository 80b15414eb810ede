"""The assessment's functions against the assessment's own guide and against arithmetic of 60 digits."""

import functools
import re
import shlex
from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from diffusion import assessment
from diffusion.assessment import (
    calculate_clip_score,
    calculate_fid,
    embeddings_storage,
    get_embedding_hook,
    sample_flowers,
)
from diffusion.assets import AssetError
from diffusion.build import build
from diffusion.conditioning.labels import Labels
from diffusion.denoiser import Denoiser
from diffusion.errors import AntherError
from diffusion.evaluation.inception import load_extractor
from diffusion.images import save_png, to_uint8
from diffusion.modules.diffusion import ClassifierFreeDiffusion, Diffusion
from diffusion.networks.unet import UNet
from diffusion.samplers import DDPM
from diffusion.schedules import Linear

ROOT = Path(__file__).resolve().parents[2]
T = 25
PROMPTS = ["daisy", "rose", "daisy"]


# CLIP score ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    save_png(torch.rand(3, 20, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1, path)
    return path


@pytest.mark.parametrize("prompt", ["a red rose", "two white daisies"])
def test_clip_score_equals_the_guides_function(reference, picture, prompt):
    weights, encode_images, encode_texts = reference
    image_features = encode_images([Image.open(picture).convert("RGB")])
    text_features = encode_texts([prompt])
    image_features /= image_features.norm(dim=-1, keepdim=True)
    text_features /= text_features.norm(dim=-1, keepdim=True)
    expected = (image_features @ text_features.T).item()
    score = calculate_clip_score(picture, prompt, "tiny", str(weights))
    assert isinstance(score, float)
    assert score == pytest.approx(expected, abs=1e-6)
    assert calculate_clip_score(image_path=str(picture), text_prompt=prompt, model="tiny", pretrained=str(weights)) == (
        score
    )


def test_clip_is_loaded_once(reference, picture):
    weights = reference[0]
    first = calculate_clip_score(picture, "a red rose", "tiny", str(weights))
    weights.unlink()
    assert calculate_clip_score(picture, "a red rose", "tiny", str(weights)) == first


def test_clip_score_of_what_is_no_image(reference, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(AntherError, match=name):
            calculate_clip_score(tmp_path / name, "a red rose", "tiny", str(reference[0]))


# FID ----------------------------------------------------------------------------------------------------------------


def guide(real_embeddings, gen_embeddings):
    """`calculate_fid` of the assessment's guide."""
    mu1, sigma1 = real_embeddings.mean(axis=0), np.cov(real_embeddings, rowvar=False)
    mu2, sigma2 = gen_embeddings.mean(axis=0), np.cov(gen_embeddings, rowvar=False)
    covmean = scipy.linalg.sqrtm(sigma1.dot(sigma2))
    if np.iscomplexobj(covmean):
        covmean = covmean.real
    return np.sum((mu1 - mu2) ** 2) + np.trace(sigma1 + sigma2 - 2.0 * covmean)


def exact(real, generated):
    """The definition with 60 digits: the trace of the root is the sum of the roots of the eigenvalues of S_1 S_2."""
    with mpmath.workdps(60):

        def moments(rows):
            rows = mpmath.matrix(rows.tolist())
            n = rows.rows
            mean = mpmath.ones(1, n) * rows / n
            centred = rows - mpmath.ones(n, 1) * mean
            return mean, centred, n - 1

        (mu_1, a, n_1), (mu_2, b, n_2) = moments(real), moments(generated)
        s_1, s_2 = a.T * a / n_1, b.T * b / n_2
        eigenvalues = mpmath.eig(s_1 * s_2, left=False, right=False)
        root = sum(mpmath.sqrt(abs(mpmath.re(value))) for value in eigenvalues)
        trace = sum(s_1[i, i] + s_2[i, i] for i in range(s_1.rows))
        return float(mpmath.norm(mu_1 - mu_2) ** 2 + trace - 2 * root)


def sets(n_1, n_2, d, seed=0):
    rng = np.random.default_rng(seed)
    mix_1, mix_2 = rng.normal(size=(2, d, d))
    return rng.normal(size=(n_1, d)) @ mix_1 + rng.normal(size=d), rng.normal(size=(n_2, d)) @ mix_2


@pytest.mark.parametrize(("n_1", "n_2", "d"), [(200, 150, 32), (400, 90, 64), (60, 60, 5), (33, 40, 32)])
def test_fid_equals_the_guides_formula_where_that_is_stable(n_1, n_2, d):
    real, generated = sets(n_1, n_2, d)
    fid = calculate_fid(real, generated)
    assert isinstance(fid, float)
    assert fid == pytest.approx(guide(real, generated), rel=1e-6)
    assert calculate_fid(real_embeddings=generated, gen_embeddings=real) == pytest.approx(fid, rel=1e-10)


@pytest.mark.parametrize(("n_1", "n_2", "d"), [(4, 12, 10), (12, 4, 10), (4, 3, 10), (2, 2, 7), (10, 10, 10)])
def test_fid_of_fewer_rows_than_columns_is_exact(n_1, n_2, d):
    real, generated = sets(n_1, n_2, d)
    assert calculate_fid(real, generated) == pytest.approx(exact(real, generated), rel=1e-10)


def low_rank(real, generated):
    """For few rows: the eigenvalues of S_1 S_2 that are not zero are those of a matrix of N_2 x N_2."""
    real, generated = np.asarray(real, float), np.asarray(generated, float)
    a, b = real - real.mean(0), generated - generated.mean(0)
    a, b = a / np.sqrt(len(a) - 1), b / np.sqrt(len(b) - 1)
    with mpmath.workdps(40):
        values = mpmath.eigsy(mpmath.matrix((b @ a.T @ a @ b.T).tolist()), eigvals_only=True)
        root = float(sum(mpmath.sqrt(abs(value)) for value in values))
    return ((real.mean(0) - generated.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * root


def test_fid_of_the_size_of_seed_000(recwarn):
    """500 real images against 10 generated ones, 2048 features."""
    rng = np.random.default_rng(0)
    real, generated = rng.gamma(0.5, size=(500, 2048)), rng.gamma(0.6, size=(10, 2048))
    assert calculate_fid(real, generated) == pytest.approx(low_rank(real, generated), rel=1e-7)
    assert not recwarn


def test_fid_of_gaussians_along_common_axes():
    """Covariances diag(p^2) and diag(q^2), made exactly: |mu|^2 + sum (p - q)^2."""
    p, q, shift = np.array([1.0, 2.0, 0.0, 3.0]), np.array([2.0, 2.0, 1.0, 0.5]), np.array([0.0, 1.0, 2.0, 0.0])

    def made(n, deviations, seed):
        rows = np.random.default_rng(seed).normal(size=(n, 4))
        axes = np.linalg.qr(rows - rows.mean(0))[0]
        return axes * np.sqrt(n - 1) * deviations

    assert calculate_fid(made(30, p, 0), made(7, q, 1) + shift) == pytest.approx(5 + ((p - q) ** 2).sum(), rel=1e-12)


def test_fid_of_a_set_with_itself_is_zero_and_never_negative():
    for n, d in ((300, 20), (10, 100)):
        rows = sets(n, n, d)[0]
        assert 0 <= calculate_fid(rows, rows[::-1]) < 1e-9 * (rows**2).sum()


def test_fid_takes_single_precision_and_tensors_as_they_are():
    real, generated = (rows.astype(np.float32) for rows in sets(50, 40, 8))
    fid = calculate_fid(real, generated)
    assert fid == calculate_fid(torch.from_numpy(real), torch.from_numpy(generated))
    assert fid == pytest.approx(guide(real.astype(float), generated.astype(float)), rel=1e-9)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (np.zeros((1, 4)), "2 rows"),
        (np.zeros(4), "shape"),
        (np.zeros((5, 2, 2)), "shape"),
        (np.full((5, 4), np.nan), "finite"),
        (np.zeros((5, 3)), "columns"),
    ],
)
def test_fid_refuses_what_has_no_covariance(bad, says):
    with pytest.raises(AntherError, match=says):
        calculate_fid(np.eye(4), bad)


# Hook and sampling --------------------------------------------------------------------------------------------------


def test_the_assessments_lines_for_the_network():
    """Verbatim, but for the name of the module that has the network."""
    from diffusion.networks import unet as UNet_utils  # noqa: N812

    device = torch.device("cpu")
    model = UNet_utils.UNet(T=400, img_ch=3, img_size=32, down_chs=(256, 256, 512), t_embed_dim=8, c_embed_dim=512).to(
        device
    )
    model.eval()
    model.down2.register_forward_hook(get_embedding_hook("down2"))
    with torch.no_grad():
        model.encode(torch.zeros(1, 3, 32, 32))
    assert embeddings_storage["down2"].shape == (1, 512, 8, 8)


def test_hooks_keep_the_latest_output_by_name():
    layer = torch.nn.Linear(2, 3)
    layer.register_forward_hook(get_embedding_hook("first"))
    layer.register_forward_hook(get_embedding_hook("second"))
    for value in (0.0, 1.0):
        output = layer(torch.full((4, 2), value))
    assert torch.equal(embeddings_storage["first"], output.detach())
    assert torch.equal(embeddings_storage["second"], output.detach())
    assert output.requires_grad
    assert not embeddings_storage["first"].requires_grad


def make_model(conditional=True):
    torch.manual_seed(0)
    network = UNet(T=T, img_ch=3, img_size=8, down_chs=(32, 32, 32), c_embed_dim=2, family="handson")
    optimizer = functools.partial(torch.optim.Adam, lr=1e-3)
    if not conditional:
        return Diffusion(Denoiser(network, Linear(T=T)), DDPM(), optimizer)
    return ClassifierFreeDiffusion(
        Denoiser(network, Linear(T=T)), DDPM(), optimizer, Labels(["daisy", "rose"]), weight=1.5
    )


@pytest.fixture(autouse=True)
def _empty_storage():
    embeddings_storage.clear()


@pytest.mark.parametrize(("layer", "weight"), [("down2", None), ("up1", 2.0), ("up1", None), ("out", 0.0), ("up2", -1)])
def test_embeddings_are_those_of_the_last_step_one_conditional_row_per_image(layer, weight):
    """The rows equal a plain call of the network on x_t of the last step under each image's own prompt."""
    model = make_model()
    images, _ = sample_flowers(PROMPTS, model, weight, seed=3, layer=layer, batch_size=2)
    rows = embeddings_storage[layer]

    last = []
    model.sample(PROMPTS, [3, 4, 5], weight, hook=lambda step: last.append(step))
    network, seen = model.denoiser.network, []
    handle = getattr(network, layer).register_forward_hook(lambda module, inputs, output: seen.append(output))
    cond = torch.eye(2)[[0, 1, 0]] if weight != -1 else torch.zeros(3, 2)
    with torch.no_grad():
        network(last[-1].x_t, torch.full((3,), last[-1].t, dtype=torch.float64), cond)
    handle.remove()
    torch.testing.assert_close(rows, seen[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(images, last[-1].x_s.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rows[0], rows[2], atol=1e-3)


def test_frames_are_every_tenth_step_and_the_last_ten():
    model, steps = make_model(), []
    images, frames = sample_flowers(PROMPTS, model, seed=1, batch_size=2)
    model.sample(PROMPTS, [1, 2, 3], hook=lambda step: steps.append(step.x_s))
    assert frames.shape == (12, 3, 3, 8, 8)  # 25 steps: 20 and 10 before the end, and the last ten
    kept = [steps[T - 1 - left] for left in (20, 10, *range(9, -1, -1))]
    torch.testing.assert_close(frames, torch.stack(kept), rtol=1e-4, atol=1e-5)
    assert torch.equal(frames[-1].clamp(-1, 1), images)


def test_a_hook_of_the_user_and_sample_flowers_agree():
    model = make_model()
    model.denoiser.network.down2.register_forward_hook(get_embedding_hook("down2"))
    sample_flowers(PROMPTS, model, batch_size=2)
    assert embeddings_storage["down2"].shape == (3, 32, 2, 2)


def test_one_prompt_may_be_a_string():
    assert sample_flowers("rose", make_model())[0].shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"text_prompts": []}, "no prompts"),
        ({"text_prompts": ["tulip"]}, "tulip"),
        ({"layer": "down7"}, "down7"),
        ({"ckpt": "nowhere.ckpt"}, "nowhere.ckpt"),
        ({"seed": -1}, "seed"),
        ({"batch_size": 0}, "batch_size"),
        ({"ckpt": make_model(conditional=False)}, "without a condition"),
    ],
)
def test_bad_input(arguments, says):
    with pytest.raises(AntherError, match=says):
        sample_flowers(**{"text_prompts": PROMPTS, "ckpt": make_model(), **arguments})
    assert not embeddings_storage


def test_without_a_checkpoint_the_demos_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AntherError, match=assessment.DEMO):
        sample_flowers(PROMPTS)


# docs/assessment.md -------------------------------------------------------------------------------------------------


def blocks(page, language):
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def compose(name, overrides):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(name, overrides)


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """A project folder in which `make demo` trained a very small model."""
    from omegaconf import OmegaConf

    tiny = ["network.down_chs=[32,32,32]", "sampler.steps=12", "data.n_train=8", "data.n_val=4"]
    config = compose("train", ["experiment=demo", *tiny])
    parts = {key: OmegaConf.to_container(config[key], resolve=True) for key in ("module", "data")}
    torch.manual_seed(0)
    module = build(parts["module"])
    path = tmp_path / assessment.DEMO
    path.parent.mkdir(parents=True)
    torch.save({"config": parts, "state_dict": module.state_dict()}, path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_pages_code_runs_as_it_stands(demo):
    names = {}
    for block in blocks("assessment.md", "python"):
        if "load_extractor" not in block:
            exec(block, names)
    assert names["generated_images"].shape == (3, 3, 32, 32)
    assert names["extracted_embeddings"].shape == (3, 32, 8, 8)
    assert len(names["clip_scores"]) == 3
    assert all(-1 <= score <= 1 for score in names["clip_scores"])
    drawn = [np.asarray(Image.open(demo / "generated" / f"{i}.png")) for i in range(3)]
    expected = to_uint8(names["generated_images"]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(drawn), expected)
    # The two ways of the page to sample are one.
    first = {}
    for block in blocks("assessment.md", "python")[:2]:
        exec(block, first)
    torch.testing.assert_close(first["extracted_embeddings"], names["extracted_embeddings"])


@pytest.mark.slow
def test_the_pages_code_with_the_real_inception(demo):
    try:
        load_extractor()
    except AssetError as error:
        pytest.skip(str(error))
    names = {}
    for block in blocks("assessment.md", "python"):
        exec(block, names)
    assert names["real_embeddings"].shape == (4, 2048)
    assert names["gen_embeddings"].shape == (3, 2048)
    assert names["fid"] == pytest.approx(low_rank(names["real_embeddings"], names["gen_embeddings"]), rel=1e-6)


@pytest.mark.parametrize("page", ["assessment.md", "evaluation.md"])
def test_the_pages_commands_name_settings_that_exist(page):
    commands = [line.split("#")[0] for block in blocks(page, "bash") for line in block.splitlines()]
    evaluations = [shlex.split(c)[2:] for c in commands if c.startswith("python evaluate.py")]
    assert evaluations
    for overrides in evaluations:
        # Of a sweep, its first job.
        one = [re.sub(r",.*", "", o) for o in overrides if o != "-m"] if "-m" in overrides else overrides
        compose("evaluate", one)


def test_the_page_covers_the_rubric():
    rows = re.findall(r"^\| (\d+) \|.*$", (ROOT / "docs" / "assessment.md").read_text(), re.MULTILINE)
    assert rows == ["20", "15", "20", "25", "20"]

"""Training, drawing and scoring on a CUDA that is not there: no tensor is left on the host, and none is waited for."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.clip import GenerationClipScore
from callbacks.ema import EMA
from callbacks.embeddings import BottleneckEmbeddings
from callbacks.fid import GenerationFid
from callbacks.nan_guard import NanGuard
from callbacks.reconstructions import ReconstructionGrid
from callbacks.samples import SampleGrid
from callbacks.timestep_loss import TimestepLoss
from datamodules.base import ImageDataModule, ImageTable
from diffusion.conditioning.clip import Clip
from diffusion.conditioning.labels import Labels
from diffusion.conditioning.openclip import load_clip
from diffusion.denoiser import Denoiser
from diffusion.editing import Edit
from diffusion.evaluation import inception
from diffusion.evaluation.clip_score import ClipScore
from diffusion.evaluation.embeddings import Embedding, sample_embedded
from diffusion.guidance import Guidance
from diffusion.modules.autoencoder import VariationalAutoencoder
from diffusion.modules.classification import Classification
from diffusion.modules.contrastive import Contrastive
from diffusion.modules.diffusion import ClassifierFreeDiffusion, Diffusion
from diffusion.networks.adm import ADM
from diffusion.networks.annotated import AnnotatedUNet
from diffusion.networks.autoencoders import VAE, AutoencoderKL
from diffusion.networks.classifier import LeNet, infer
from diffusion.networks.unet import UNet
from diffusion.samplers import DDIM, DDPM, DPMpp, Heun
from diffusion.schedules import Cosine, Linear, Straight, ZeroTerminalSNR
from diffusion.weighting import MinSNR
from tests.callbacks.tiny_training import Corners, trainer
from tests.diffusion.conftest import CONFIG
from tests.diffusion.fake_cuda import CUDA, FakeCuda, on_cuda

T, CLASSES = 10, tuple("abcdefghij")
OPTIMIZER = functools.partial(torch.optim.AdamW, lr=1e-3)
PROMPTS = ["a", "b", "c"]


@pytest.fixture
def cuda(monkeypatch):
    # Autocast asks for a GPU, and what it can do.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    with FakeCuda() as fake:
        yield fake


class Pictures(ImageDataModule):
    """Random images of ten classes."""

    def __init__(self, shape=(3, 8, 8)):
        super().__init__(name="pictures", image_shape=shape, batch_size=4, seed=0, split={"train": 2 / 3, "val": 1 / 3})

    def load(self):
        images = np.random.default_rng(0).integers(0, 256, (12, *self.image_shape), dtype=np.uint8)
        labels = torch.arange(12) % len(CLASSES)
        names = tuple(f"{k:05d}" for k in range(12))
        return ImageTable(images, labels, CLASSES, names, ("a red rose", "two white daisies") * 6, "pictures")


class Hot(Callback):
    """What the device was waited for in the training steps."""

    def __init__(self, fake):
        self.fake, self.reads, self.waits = fake, [], []

    def on_train_batch_start(self, *_):
        self.fake.reads, self.fake.waits = [], []

    def on_train_batch_end(self, *_):
        self.reads += self.fake.reads
        self.waits += self.fake.waits


def fit(tmp_path, fake, module, data, *callbacks, precision="32-true", **options):
    hot = Hot(fake)
    options = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "gradient_clip_val": 1.0, **options}
    trainer(tmp_path, hot, *callbacks, **on_cuda(precision), **options).fit(module, datamodule=data)
    assert module.device == CUDA
    return hot


UNETS = {
    "course": lambda c: UNet(T, 3, 8, (32, 32, 32), c_embed_dim=c, family="course"),
    "handson": lambda c: UNet(T, 3, 8, (32, 32, 32), c_embed_dim=c, family="handson", self_attention=True),
    "convnext": lambda c: AnnotatedUNet(T, 3, 8, 8, (1, 2), "convnext", ("linear", "full"), "linear", c_embed_dim=c),
    "resnet": lambda c: AnnotatedUNet(T, 3, 8, 8, (1, 2), "resnet", (None, None), "full", "post", c_embed_dim=c),
    "adm": lambda c: ADM(T, 3, 8, 32, (1, 2), 1, (4,), 32, dropout=0.1, c_embed_dim=c),
}
NOISES = {
    "course": {"schedule": Linear(T)},
    "handson": {"schedule": Cosine(T), "target": "x0", "loss": "l1"},
    "convnext": {"schedule": ZeroTerminalSNR(Linear(T)), "target": "v"},
    "resnet": {"schedule": Linear(T), "loss": "huber", "weighting": MinSNR()},
    "adm": {"schedule": Straight(T), "target": "flow"},
}


def diffusion(name="course", conditional=True, conditioner=None, **options):
    conditioner = conditioner or Labels(CLASSES)
    denoiser = Denoiser(UNETS[name](conditioner.dim if conditional else 0), **NOISES[name])
    options = {"val_times": 1, **options}
    if conditional:
        return ClassifierFreeDiffusion(denoiser, DDIM(2), OPTIMIZER, conditioner, **options)
    return Diffusion(denoiser, DDIM(2), OPTIMIZER, **options)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "bf16-mixed") for name in UNETS), ("handson", "32-true"), ("adm", "32-true")]
)
def test_diffusion_trains_without_waiting(tmp_path, cuda, name, precision):
    module = diffusion(name)
    dtypes = []
    module.denoiser.network.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    hot = fit(tmp_path, cuda, module, Pictures(), EMA(), TimestepLoss(tmp_path), precision=precision)
    assert set(dtypes) == {torch.float32 if precision == "32-true" else torch.bfloat16}
    assert (hot.reads, hot.waits) == ([], [])


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (lambda: diffusion("adm", conditional=False), (3, 8, 8)),
        (lambda: VariationalAutoencoder(VAE(3, 16, 6, (8, 16)), OPTIMIZER), (3, 16, 16)),
        (lambda: VariationalAutoencoder(AutoencoderKL(3, 16, 32, (1, 1), 1, 2), OPTIMIZER, loss="l1"), (3, 16, 16)),
        (lambda: Classification(LeNet(10), OPTIMIZER), (1, 28, 28)),
        (lambda: Classification(LeNet(10), OPTIMIZER, loss="focal"), (1, 28, 28)),
    ],
    ids=["unconditional", "vae", "kl", "cross_entropy", "focal"],
)
def test_other_modules_train_without_waiting(tmp_path, cuda, module, shape):
    hot = fit(tmp_path, cuda, module(), Pictures(shape), precision="bf16-mixed")
    assert (hot.reads, hot.waits) == ([], [])


def test_only_the_guard_reads_in_a_step(tmp_path, cuda):
    parts = NanGuard(), EMA(), TimestepLoss(tmp_path, stage="train")
    hot = fit(tmp_path, cuda, diffusion(), Pictures(), *parts, limit_train_batches=2)
    assert [read.partition(":")[0] for read in hot.reads] == 4 * ["nan_guard.py"]


def test_a_clip_trains_and_is_exported(tmp_path, cuda):
    fit(tmp_path, cuda, Contrastive(model_cfg=CONFIG, optimizer=OPTIMIZER), Pictures((3, 16, 16)))
    assert (tmp_path / "flowers_clip.safetensors").exists()


# Drawing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["trailing", "logsnr", "karras"])
@pytest.mark.parametrize(
    "sampler",
    [
        lambda grid: DDIM(4, 0.5, True, grid),
        lambda grid: Heun(4, True, grid),
        lambda grid: DPMpp(4, False, grid=grid),
        lambda grid: DPMpp(4, True, "heun", grid=grid),
        lambda grid: DDPM(4, "beta") if grid == "trailing" else DDPM(None, "beta_prev"),
        lambda grid: DDIM(4, clip=0.9, grid=grid),
    ],
    ids=["ddim", "heun", "dpmpp", "sde", "ddpm", "dynamic"],
)
def test_samplers_do_not_wait(cuda, sampler, grid):
    module, steps = diffusion("course").to(CUDA), []
    cuda.waits.clear()
    images = module.sample(PROMPTS, [0, 1, 2], torch.tensor([0.0, 1.0, 2.0]), sampler(grid), steps.append)
    assert images.device == steps[0].x_0.device == CUDA
    assert images.shape == (3, 3, 8, 8)
    assert (cuda.reads, cuda.waits) == ([], [])


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_editing_does_not_wait(cuda, strength):
    module, drawn = diffusion("course").to(CUDA), torch.arange(8).expand(8, 8) >= 4
    cuda.waits.clear()
    images = module.sample(PROMPTS, [0, 1, 2], sampler=DDIM(4), edit=Edit(torch.zeros(3, 8, 8), strength, drawn))
    assert images.device == CUDA
    assert (cuda.reads, cuda.waits) == ([], [])


@pytest.mark.parametrize(("name", "bf16"), [("course", True), ("adm", False)])
@pytest.mark.parametrize(
    ("weight", "guidance"),
    [
        (2.0, {}),
        (0.0, {}),
        (-1.0, {}),
        (2.0, {"interval": (0.3, 5)}),
        (2.0, {"rescale": 0.7}),
        (2.0, {"negative": "b"}),
        (1.5, {"bad": True}),
    ],
    ids=["plain", "cond", "null", "interval", "rescale", "negative", "bad"],
)
def test_guidance_does_not_wait(cuda, name, weight, guidance, bf16):
    module, worse = diffusion(name).to(CUDA), diffusion(name).to(CUDA)
    cuda.waits.clear()
    guidance = Guidance(**{**guidance, **({"bad": worse.denoiser} if "bad" in guidance else {})})
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        images = module.sample(PROMPTS, [0, 1, 2], weight, guidance=guidance)
    assert (images.device, images.dtype) == (CUDA, torch.float32)
    assert (cuda.reads, cuda.waits) == ([], [])


@pytest.mark.parametrize("when", ["last", "clean", "trace"])
def test_embeddings_are_read_once_each(cuda, when):
    module = diffusion("adm").to(CUDA)
    steps = (0, 1) if when == "trace" else ()
    embedding = Embedding(module.bottleneck, when=when, steps=steps)
    images, rows = sample_embedded(module, embedding, PROMPTS, [0, 1, 2])
    assert images.device == CUDA
    assert rows.device.type == "cpu"
    assert len(cuda.reads) == max(1, len(steps))


# Callbacks and scores -------------------------------------------------------------------------------------------------


def test_callbacks_that_draw(tmp_path, cuda, monkeypatch, write_clip):
    monkeypatch.setattr("callbacks.fid.load_extractor", lambda *_: Corners())
    monkeypatch.setattr("callbacks.fid.check_number", lambda *_: None)
    # It asks the device how many images it has seen, which a fake does not know.
    total = "torchmetrics.image.fid.FrechetInceptionDistance.compute"
    monkeypatch.setattr(total, lambda self: (self.real_features_sum - self.fake_features_sum).sum())
    path, _ = write_clip()
    drawn = {"prompts": ["a rose", "two daisies"], "every_n_epochs": 1}
    callbacks = [
        EMA(),
        SampleGrid(tmp_path / "samples", weights=[0.0, 2.0], gif="last", **drawn),
        BottleneckEmbeddings(tmp_path / "drawn", weights=[1.0], **drawn),
        BottleneckEmbeddings(tmp_path / "seen", source="val", every_n_epochs=1),
        GenerationClipScore(weights=[1.0], model="tiny", pretrained=str(path), **drawn),
        GenerationFid(num_images=4, split="all", **drawn),
    ]
    module = diffusion("handson", conditioner=Clip("tiny", str(path)))
    fit(tmp_path, cuda, module, Pictures(), *callbacks)
    assert module.conditioner.device == CUDA
    for name in ("samples/step-000001.gif", "drawn/step-000001.npz", "seen/step-000001.npz"):
        assert (tmp_path / name).exists()


def test_a_grid_of_reconstructions(tmp_path, cuda):
    module = VariationalAutoencoder(VAE(3, 16, 6, (8, 16)), OPTIMIZER)
    fit(tmp_path, cuda, module, Pictures((3, 16, 16)), EMA(), ReconstructionGrid(tmp_path, every_n_epochs=1))
    assert (tmp_path / "step-000001.png").exists()
    images = module.sample(None, [0, 1])
    assert module.from_latents(module.to_latents(images)).device == CUDA


def test_clip_scores(cuda, write_clip):
    path, _ = write_clip()
    scorer = ClipScore("tiny", str(path)).to(CUDA)
    scorer.update(torch.zeros(2, 3, 16, 16, device=CUDA), ["a rose", "two daisies"])
    assert scorer.compute().device == scorer.load().device == CUDA
    assert load_clip("tiny", str(path), CUDA).encode_texts(["a rose"]).device == CUDA


def test_inception_features(tmp_path, cuda, monkeypatch):
    network = inception._empty_network().to_empty(device="cpu").eval()
    monkeypatch.setattr(inception, "load_network", lambda _: (network, True))
    (tmp_path / "weights").write_bytes(b"")
    extractor = inception.Extractor(tmp_path / "weights", CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        found = extractor.features(torch.full((2, 3, 8, 8), 200, dtype=torch.uint8))
    assert found.pool.shape == (2, 2048)
    assert found.logits.shape == (2, 1008)
    assert len(cuda.reads) == 2


def test_a_classifier_is_asked_on_the_device(cuda):
    logits, features = infer(LeNet(10).to(CUDA), torch.zeros(3, 1, 28, 28))
    assert logits.shape == (3, 10)
    assert {logits.device.type, features.device.type} == {"cpu"}


# What follows the trainer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_only_what_goes_to_cuda_is_pinned(monkeypatch, kind):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    data = Pictures()
    data.setup()
    strategy = SimpleNamespace(root_device=torch.device(kind))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, strategy=strategy)
    assert data.train_dataloader().pin_memory is data.val_dataloader().pin_memory is (kind == "cuda")


def test_clip_runs_where_the_model_does(monkeypatch, write_clip):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    path, _ = write_clip()
    module = diffusion(conditioner=Clip("tiny", str(path)))
    assert module.sample(["a red rose"], [0]).device.type == "cpu"


# What would be found --------------------------------------------------------------------------------------------------


def test_a_tensor_left_on_the_host_is_found(cuda):
    there, here = torch.arange(4, device="cuda"), torch.arange(4)
    for mixed in (lambda: there + here, lambda: here[there], lambda: torch.cat([there, here])):
        with pytest.raises(RuntimeError):
            mixed()
    assert (there + torch.tensor(1)).device == CUDA  # as on a GPU
    assert not cuda.reads
    assert float(there[0]) == 1
    assert there.cpu().tolist() == [0, 0, 0, 0]
    here.to("cuda")
    assert len(cuda.reads) == 2
    assert len(cuda.waits) == 1

import csv
import json

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

from callbacks.checkpoints import BestCheckpoint
from callbacks.clip import GenerationClipScore
from callbacks.drawing import cells, draw
from callbacks.ema import EMA
from callbacks.embeddings import BottleneckEmbeddings
from callbacks.samples import SampleGrid
from diffusion.errors import AntherError
from diffusion.evaluation.clip_score import ClipScore
from diffusion.evaluation.embeddings import capture, reduced
from diffusion.images import from_uint8
from diffusion.loggers import CSVLog
from diffusion.modules.diffusion import ClassifierFreeDiffusion
from tests.callbacks.tiny_training import CLASSES, Dots, module, same, trainer, weights

PROMPTS = ["a daisy", "two roses"]
WEIGHTS = [0.0, 2.0]


def cell_of(picture, record, rows, gap=6):
    """The pixels of a cell of a captioned sheet of 8-pixel images, by what its record says."""
    height = (picture.height - gap) // rows
    top, left = record["row"] * height + gap, record["column"] * (8 + gap) + gap
    return np.asarray(picture)[top : top + 8, left : left + 8]


def test_each_cell_of_the_picture_is_what_the_record_says(tmp_path):
    m = module()
    grid = SampleGrid(tmp_path, PROMPTS, WEIGHTS, per_prompt=2, seed=7, every_n_epochs=2, batch_size=3, scale=1)
    trainer(tmp_path, grid, max_epochs=2).fit(m, datamodule=Dots())
    assert grid.last_picture == tmp_path / "step-000008.png"
    record = json.loads((tmp_path / "step-000008.json").read_text())
    assert [(c["row"], c["prompt"], c["weight"]) for c in record["cells"]] == [
        (row, prompt, w) for row, w in enumerate(WEIGHTS) for prompt in PROMPTS for _ in range(2)
    ]
    assert [c["seed"] for c in record["cells"]] == [7, 8, 9, 10] * 2
    picture = Image.open(grid.last_picture)
    for cell in record["cells"]:
        alone = m.sample([cell["prompt"]], [cell["seed"]], cell["weight"]).clamp(-1, 1)
        got = torch.from_numpy(cell_of(picture, cell, len(WEIGHTS)).copy()).permute(2, 0, 1)
        assert (from_uint8(got) - alone[0]).abs().max() < 1.5 / 127.5


def test_pictures_come_every_n_epochs_and_the_animation_with_the_last(tmp_path):
    grid = SampleGrid(tmp_path, per_prompt=3, every_n_epochs=2, gif="last")
    trainer(tmp_path, grid, max_epochs=5, num_sanity_val_steps=1).fit(module(conditional=False), datamodule=Dots())
    assert sorted(p.name for p in tmp_path.glob("step*.png")) == [f"step-{s:06d}.png" for s in (8, 16, 20)]
    records = [json.loads((tmp_path / f"step-{s:06d}.json").read_text()) for s in (8, 16, 20)]
    assert [record["epoch"] for record in records] == [1, 3, 4]
    assert [p.name for p in tmp_path.glob("*.gif")] == ["step-000020.gif"]
    animation = Image.open(tmp_path / "step-000020.gif")
    assert animation.n_frames == 4  # 3 steps and the image
    assert animation.size == (2 * (3 * (16 + 2) + 2), 16 + 2 * 2)  # x_t and x_0 beside each other, magnified by 2
    assert json.loads((tmp_path / "step-000020.json").read_text())["cells"][2]["prompt"] is None


@pytest.mark.parametrize("steps", [6, 8])
def test_pictures_and_metrics_say_the_same_epoch(tmp_path, steps):
    grid, log = SampleGrid(tmp_path, every_n_epochs=2), CSVLog(tmp_path / "metrics.csv")
    trainer(tmp_path, grid, max_steps=steps, logger=log).fit(module(conditional=False), datamodule=Dots())
    log.finalize("success")
    with (tmp_path / "metrics.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    record = json.loads((tmp_path / f"step-{steps:06d}.json").read_text())
    assert (record["step"], record["epoch"]) == (steps, int(last["epoch"])) == (steps, 1)


def test_drawing_does_not_change_the_training(tmp_path):
    plain, drawn = module(), module()
    trainer(tmp_path).fit(plain, datamodule=Dots())
    callbacks = [
        SampleGrid(tmp_path, PROMPTS, WEIGHTS, every_n_epochs=1, gif="always"),
        BottleneckEmbeddings(tmp_path, prompts=PROMPTS, every_n_epochs=1),
    ]
    trainer(tmp_path, *callbacks).fit(drawn, datamodule=Dots())
    assert same(weights(plain), weights(drawn))
    assert drawn.training


@pytest.mark.parametrize(
    ("conditional", "prompts", "message"),
    [(True, None, "draws from prompts"), (False, ["a daisy"], "no condition"), (True, ["a cactus"], "names no class")],
)
def test_prompts_that_cannot_be_drawn_stop_the_run_before_it_begins(tmp_path, conditional, prompts, message):
    m = module(conditional)
    before = weights(m)
    with pytest.raises(AntherError, match=message):
        trainer(tmp_path, SampleGrid(tmp_path, prompts)).fit(m, datamodule=Dots())
    assert same(before, weights(m))


def embeddings(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("weights_used", [[0.0], [2.0], [0.0, 2.0]])
def test_row_i_is_the_layer_output_for_image_i(tmp_path, weights_used):
    m = module()
    saver = BottleneckEmbeddings(
        tmp_path,
        "down2",
        "raw",
        prompts=PROMPTS,
        weights=weights_used,
        per_prompt=2,
        seed=3,
        every_n_epochs=1,
        batch_size=3,
    )
    trainer(tmp_path, saver, max_epochs=1).fit(m, datamodule=Dots())
    saved = embeddings(tmp_path / "step-000004.npz")
    network = m.denoiser.network
    assert len(saved["ids"]) == 4 * len(weights_used)
    for i, name in enumerate(saved["ids"]):
        steps = []
        image = m.sample(
            [str(saved["prompts"][i])], [int(saved["seeds"][i])], float(saved["weights"][i]), hook=steps.append
        )
        with torch.no_grad():
            wanted = network.down2(network.down1(network.down0(steps[-1].x_t)))[0]
        torch.testing.assert_close(torch.from_numpy(saved["embeddings"][i]), wanted, rtol=1e-4, atol=1e-4)
        pixels = torch.from_numpy(np.asarray(Image.open(tmp_path / "step-000004" / f"{name}.png")).copy())
        assert (from_uint8(pixels.permute(2, 0, 1)) - image[0].clamp(-1, 1)).abs().max() < 1.5 / 127.5


def test_the_encoder_runs_once_per_image_under_guidance_and_the_decoder_twice(tmp_path):
    m = module()
    assert isinstance(m, ClassifierFreeDiffusion)
    with capture(m.denoiser.network, "down2") as down2, capture(m.denoiser.network, "up1") as up1:
        draw(m, cells(m, PROMPTS, [2.0], 1, 0), 8)
    assert down2.calls == up1.calls == 3
    assert (len(down2._latest), len(up1._latest)) == (2, 4)
    # of a layer behind the condition, the rows with the condition
    with capture(m.denoiser.network, "up1") as plain:
        draw(m, cells(m, PROMPTS, [2.0], 1, 0), 8)
        guided = plain.rows(2)
    with torch.no_grad(), capture(m.denoiser.network, "up1") as alone:
        steps = []
        m.sample(PROMPTS, [0, 1], 2.0, hook=steps.append)
        last = steps[-1]
        m.denoiser(last.x_t, torch.full((2,), last.t, dtype=torch.float64), m.conditioner.encode(PROMPTS))
        torch.testing.assert_close(guided, alone.rows(2), rtol=1e-4, atol=1e-4)


def test_validation_embeddings_carry_the_names_of_their_rows(tmp_path):
    m, data = module(), Dots()
    saver = BottleneckEmbeddings(tmp_path, "down2", "pooled", source="val", every_n_epochs=1)
    trainer(tmp_path, saver, max_epochs=1).fit(m, datamodule=data)
    saved = embeddings(tmp_path / "step-000004.npz")
    assert saved["ids"].tolist() == [data.table.names[i] for i in data.splits["val"]]
    network, schedule = m.denoiser.network, m.denoiser.schedule
    from diffusion.rng import generator

    for name, row in zip(saved["ids"], saved["embeddings"], strict=True):
        i = data.table.names.index(str(name))
        x_0 = from_uint8(torch.from_numpy(data.table.images[i].copy()))[None]
        t = torch.tensor([1 / schedule.T], dtype=torch.float64)
        eps = torch.randn(3, 8, 8, generator=generator(0, i))[None]
        with torch.no_grad():
            wanted = network.down2(network.down1(network.down0(m.denoiser.diffuse(x_0, t, eps))))
        torch.testing.assert_close(torch.from_numpy(row), wanted.mean((2, 3))[0], rtol=1e-4, atol=1e-4)


def test_forms_and_unknown_layers(tmp_path):
    features = torch.arange(24.0).view(2, 3, 2, 2)
    assert reduced(features, "pooled")[1].tolist() == [13.5, 17.5, 21.5]
    assert reduced(features, "flat").shape == (2, 12)
    assert reduced(features, "raw") is features
    with pytest.raises(AntherError, match=r"no layer 'dwn2'; did you mean .*down2"):
        trainer(tmp_path, BottleneckEmbeddings(tmp_path, "dwn2")).fit(module(), datamodule=Dots())
    with pytest.raises(AntherError, match="pooled, flat or raw"):
        trainer(tmp_path, BottleneckEmbeddings(tmp_path, form="mean")).fit(module(), datamodule=Dots())


def test_capture_sees_through_compilation():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    network.compile(backend="eager")
    x = torch.ones(1, 2)
    network(x)
    with capture(network, "0") as captured:
        network(x)
    assert captured.calls == 1


EMBEDDED_CLIP = {"model": "anther-flowers-32", "pretrained": "embedded"}


def test_clip_score_is_logged_when_due_and_the_best_is_kept(tmp_path):
    m = module()
    prompts = ["a photo of a daisy", "two roses"]
    scorer = GenerationClipScore(prompts, [0.5, 2.0], **EMBEDDED_CLIP, per_prompt=2, every_n_epochs=2, batch_size=3)
    seen = {}

    class Read(Callback):
        def on_validation_end(self, trainer, pl_module):
            if (trainer.current_epoch + 1) % 2 == 0:
                seen[trainer.global_step] = {k: float(v) for k, v in trainer.callback_metrics.items() if "clip" in k}

    best = BestCheckpoint(
        dirpath=tmp_path,
        filename="best_clip-epoch{epoch:04d}",
        monitor="val/clip_score",
        mode="max",
        auto_insert_metric_name=False,
    )
    ema = EMA()
    names = set(m.state_dict())
    trainer(tmp_path, best, Read(), scorer, ema, max_epochs=4).fit(m, datamodule=Dots())
    assert set(m.state_dict()) == names
    assert sum(p.numel() for p in m.parameters()) == sum(p.numel() for p in m.denoiser.network.parameters())
    assert list(seen) == [8, 16]
    values = seen[16]
    assert set(values) == {"val/clip_score", "val/clip_score_w0.5", "val/clip_score_w2"}
    metric = ClipScore(**EMBEDDED_CLIP)
    with ema.swapped(m):
        for w in (0.5, 2.0):
            texts = [p for p in prompts for _ in range(2)]
            images = m.sample(texts, [0, 1, 2, 3], w).clamp(-1, 1)
            assert values[f"val/clip_score_w{w:g}"] == pytest.approx(
                float(metric.score(images, texts).mean()), abs=2e-3
            )
    assert values["val/clip_score"] == pytest.approx((values["val/clip_score_w0.5"] + values["val/clip_score_w2"]) / 2)
    best_step = max(seen, key=lambda step: seen[step]["val/clip_score"])
    assert torch.load(best.best_model_path, weights_only=True)["global_step"] == best_step
    assert [p.name for p in tmp_path.glob("*.ckpt")] == [f"best_clip-epoch{best_step // 4 - 1:04d}.ckpt"]


def test_clip_score_of_a_model_without_a_condition_is_refused(tmp_path):
    with pytest.raises(AntherError, match="no condition"):
        trainer(tmp_path, GenerationClipScore(["a daisy"], **EMBEDDED_CLIP)).fit(module(False), datamodule=Dots())


def test_class_names_are_prompts():
    m = module()
    assert [c.prompt for c in cells(m, CLASSES, None, 1, 0)] == list(CLASSES)
    assert {c.weight for c in cells(m, CLASSES, None, 1, 0)} == {m.weight}

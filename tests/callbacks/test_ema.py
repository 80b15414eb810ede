import pytest
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from callbacks.ema import EMA, averaged
from callbacks.samples import SampleGrid
from tests.callbacks.tiny_training import Dots, module, same, trainer, weights


class Watch(Callback):
    """Keeps the weights at every moment that matters."""

    def __init__(self):
        self.steps, self.in_validation, self.after_validation = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > len(self.steps):
            self.steps.append(weights(pl_module))

    def on_validation_epoch_end(self, trainer, pl_module):
        self.in_validation.append(weights(pl_module))

    def on_train_epoch_end(self, trainer, pl_module):
        self.after_validation.append(weights(pl_module))


def by_hand(start, steps, decay):
    average = {name: tensor.double() for name, tensor in start.items()}
    for n, live in enumerate(steps):
        d = min(decay, (1 + n) / (10 + n))
        average = {name: d * average[name] + (1 - d) * live[name].double() for name in average}
    return average


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_is_the_recursion_over_optimizer_steps(tmp_path, accumulate):
    m, ema, watch = module(), EMA(0.3), Watch()
    start = weights(m)
    trainer(tmp_path, watch, ema, accumulate_grad_batches=accumulate).fit(m, datamodule=Dots())
    assert ema.updates == len(watch.steps) == 8 // accumulate
    wanted = by_hand(start, watch.steps, 0.3)
    with ema.swapped(m):
        for name, tensor in weights(m).items():
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6)


def test_validation_sees_the_average_and_training_goes_on_with_its_own_weights(tmp_path):
    m, ema, watch = module(), EMA(), Watch()
    trainer(tmp_path, watch, ema, num_sanity_val_steps=1).fit(m, datamodule=Dots())
    assert same(watch.after_validation[0], watch.steps[3])
    assert not same(watch.in_validation[-1], watch.steps[-1])
    assert same(weights(m), watch.steps[-1])
    other = module()
    trainer(tmp_path).fit(other, datamodule=Dots())
    assert same(weights(other), weights(m)), "the average must not change the training"


def test_checkpoints_hold_trained_weights_and_the_average_beside_them(tmp_path):
    m, ema, watch = module(), EMA(), Watch()
    best = BestCheckpoint(dirpath=tmp_path, filename="best", monitor="val/loss")
    # The wrong order on purpose.
    trainer(tmp_path, best, LastCheckpoint(tmp_path), watch, ema).fit(m, datamodule=Dots())
    checkpoint = torch.load(best.best_model_path, weights_only=True)
    live = {k.removeprefix("denoiser.network."): v for k, v in checkpoint["state_dict"].items()}
    assert same(live, watch.steps[checkpoint["global_step"] - 1])
    assert same(checkpoint["ema"]["network"], watch.in_validation[checkpoint["epoch"]])
    assert checkpoint["ema"]["updates"] == checkpoint["global_step"]


def test_a_checkpoint_written_during_validation_holds_trained_weights_too(tmp_path):
    class SaveInside(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    m, watch = module(), Watch()
    trainer(tmp_path, SaveInside(), watch, EMA(), max_epochs=1).fit(m, datamodule=Dots())
    checkpoint = torch.load(tmp_path / "inside.ckpt", weights_only=True)
    live = {k.removeprefix("denoiser.network."): v for k, v in checkpoint["state_dict"].items()}
    assert same(live, watch.steps[-1])
    assert same(checkpoint["ema"]["network"], watch.in_validation[-1])


def test_an_exception_in_validation_leaves_trained_weights(tmp_path):
    class Boom(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            raise RuntimeError("boom")

    m, watch = module(), Watch()
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, Boom(), watch, EMA(), LastCheckpoint(tmp_path)).fit(m, datamodule=Dots())
    assert same(weights(m), watch.steps[-1])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert same({k.removeprefix("denoiser.network."): v for k, v in saved.items()}, watch.steps[-1])


def test_swapped_restores_on_error_and_may_be_nested(tmp_path):
    m, ema = module(), EMA()
    t = trainer(tmp_path, ema, max_epochs=1)
    t.fit(m, datamodule=Dots())
    live = weights(m)
    with averaged(t, m):
        inside = weights(m)
        with ema.swapped(m):
            assert same(weights(m), inside)
        assert same(weights(m), inside)
    assert same(weights(m), live)

    def fail():
        with averaged(t, m):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert same(weights(m), live)
    assert not same(inside, live)


def test_pictures_are_drawn_with_the_average(tmp_path):
    m, ema = module(conditional=False), EMA()
    grid = SampleGrid(tmp_path / "samples", per_prompt=2, every_n_epochs=1, gif="never", scale=1)
    trainer(tmp_path, grid, ema, max_epochs=1).fit(m, datamodule=Dots())
    from PIL import Image

    from diffusion.images import sheet

    def picture() -> bytes:
        return sheet(m.sample(None, [0, 1]), ["seed 0", "seed 1"], 2, scale=1).tobytes()

    with ema.swapped(m):
        wanted = picture()
    assert Image.open(grid.last_picture).tobytes() == wanted
    assert picture() != wanted

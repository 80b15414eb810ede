"""The modules in a real Trainer, with a real network, and a denoiser that keeps what it was asked."""

import functools
import logging
import warnings
from types import SimpleNamespace

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from diffusion.conditioning.labels import Labels
from diffusion.denoiser import Denoiser
from diffusion.errors import AntherError
from diffusion.guidance import AutoGuidance, Guidance
from diffusion.modules.diffusion import ClassifierFreeDiffusion, Diffusion, draw_times, draw_training
from diffusion.networks.unet import UNet
from diffusion.rng import TRAINING, VALIDATION, ImageRNG, generator
from diffusion.samplers import DDIM, DDPM
from diffusion.schedules import Linear
from tests.callbacks.tiny_training import Dots, module, trainer

T, N, CLASSES = 20, 10, ("daisy", "roses", "tulips")


class Watched(Denoiser):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.asked = {True: [], False: []}

    def loss(self, x_0, t, eps, cond=None):
        losses = super().loss(x_0, t, eps, cond)
        self.asked[self.training].append((x_0, t, eps, cond, losses.detach()))
        return losses


class Images(lightning.LightningDataModule):
    def __init__(self, image_shape=(3, 8, 8), augment=0):
        super().__init__()
        self.image_shape = image_shape
        self.table = SimpleNamespace(class_names=CLASSES)
        rng = torch.Generator().manual_seed(0)
        images = torch.rand(N, *image_shape, generator=rng) * 2 - 1
        self.rows = [{"image": images[i], "index": torch.tensor(i), "label": torch.tensor(i % 3)} for i in range(N)]
        if augment:
            self.rows = [{**row, "augment": torch.full((augment,), 0.1 * i)} for i, row in enumerate(self.rows)]

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=4, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=3)


def build(kind=Diffusion, c_embed_dim=3, **options):
    torch.manual_seed(0)
    network = UNet(T, 3, 8, (32, 32, 32), c_embed_dim=c_embed_dim, family="handson")
    options = {"optimizer": functools.partial(torch.optim.SGD, lr=1e-3), "sampler": DDIM(3), **options}
    if issubclass(kind, ClassifierFreeDiffusion):
        options.setdefault("conditioner", Labels(CLASSES))
    return kind(denoiser=Watched(network, Linear(T)), **options)


class Reader(lightning.Callback):
    """Keeps what the module says of its last batch, as callbacks see it."""

    def __init__(self):
        self.read = {True: [], False: []}

    def on_train_batch_end(self, trainer, module, *args):
        self.read[True].append(module.last_losses)

    def on_validation_batch_end(self, trainer, module, *args):
        self.read[False].append(module.last_losses)


def train(module, epochs=2, data=None, callbacks=(), **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=list(callbacks),
            **options,
        )
        trainer.fit(module, datamodule=data or Images())
    return trainer


# Training -----------------------------------------------------------------------------------------------------------


def test_what_layers_draw_is_a_function_of_seed_step_part_and_rank():
    module = build()

    def drawn(seed=0, step=0, batch=0, rank=0, state=1):
        torch.manual_seed(state)  # another process, or one that goes on, has another
        module.seed = seed
        module._trainer = SimpleNamespace(accumulate_grad_batches=2, global_step=step, global_rank=rank)
        module.on_train_batch_start({"image": torch.zeros(1, 3, 8, 8)}, batch)
        return torch.rand(()).item()

    assert drawn(step=3, batch=1) == drawn(step=3, batch=1, state=2) == drawn(step=3, batch=3)
    assert len({drawn(), drawn(seed=1), drawn(step=1), drawn(batch=1), drawn(rank=1)}) == 5


def test_training_with_dropout_does_not_depend_on_the_process():
    def trained(state):
        module = build(seed=0)
        module.denoiser.network.out.append(torch.nn.Dropout(0.5))
        torch.manual_seed(state)
        train(module, epochs=1)
        return module.denoiser.network.out[3].weight

    assert torch.equal(trained(1), trained(2))


@pytest.mark.parametrize("seed", [0, 7])
def test_times_and_noise_are_a_function_of_seed_step_and_place(seed):
    module = build(seed=seed)
    torch.manual_seed(seed + 1)  # the global state must not matter
    train(module)
    asked = module.denoiser.asked[True]
    assert len(asked) == 4  # 2 epochs of 2 batches: the step goes on counting over epochs
    for step, (_, t, eps, _, _) in enumerate(asked):
        expected = draw_training((TRAINING, seed, step), 4, range(4), (3, 8, 8), T, "stratified")
        assert torch.equal(t, expected.t)
        assert torch.equal(eps, expected.eps)


def test_draws_of_a_place_do_not_depend_on_the_others():
    whole = draw_training((1, 2), 12, range(12), (3, 8, 8), T, "stratified")
    for places in ([0, 3, 6, 9], [7], [11, 2]):
        part = draw_training((1, 2), 12, places, (3, 8, 8), T, "stratified")
        for ours, theirs in zip(part, whole, strict=True):
            assert torch.equal(ours, theirs[places])
    # One time from each twelfth, in no order.
    assert sorted(((whole.t - 1e-9) * 12).floor().tolist()) != ((whole.t - 1e-9) * 12).floor().tolist()
    fine = draw_training((1, 2), 12, range(12), (1,), 1200, "stratified").t
    assert sorted(((fine - 1e-9) * 12).floor().tolist()) == list(range(12))
    assert len(whole.eps.flatten(1).unique(dim=0)) == len(whole.uniforms.unique()) == 12
    other = draw_training((1, 3), 12, range(12), (3, 8, 8), T, "stratified")
    assert not any(torch.equal(a, b) for a, b in zip(other, whole, strict=True))


def test_accumulated_batches_draw_as_one():
    module = build(ClassifierFreeDiffusion)
    train(module, epochs=1, accumulate_grad_batches=2)
    parts = module.denoiser.asked[True]
    expected = draw_training((TRAINING, 0, 0), 8, range(8), (3, 8, 8), T, "stratified")
    assert torch.equal(torch.cat([part[1] for part in parts]), expected.t)
    assert torch.equal(torch.cat([part[2] for part in parts]), expected.eps)


@pytest.mark.parametrize("n", [24, 27], ids=["a whole batch is left over", "a whole and a smaller one are"])
def test_a_step_of_fewer_batches_is_the_mean_over_its_samples(n, tmp_path):
    """An epoch of 16 or 18 images in steps of 12, whole and gathered over three batches of four."""

    def weights(batch_size, **options):
        data = Dots(n=n, batch_size=batch_size)
        data.drop_last = False
        trained = module(conditional=False)
        trained._make_optimizer = functools.partial(torch.optim.SGD, lr=0.1)
        done = trainer(tmp_path, max_epochs=1, limit_val_batches=0, **options)
        done.fit(trained, datamodule=data)
        assert done.global_step == 2
        return trained.denoiser.network.state_dict()

    gathered = weights(4, accumulate_grad_batches=3)
    for name, value in weights(12).items():
        torch.testing.assert_close(gathered[name], value, rtol=1e-4, atol=1e-5)


def test_a_step_keeps_its_losses_and_logs_their_mean():
    module, reader = build(), Reader()
    trainer = train(module, callbacks=[reader])
    losses = module.denoiser.asked[True][-1][4]
    assert trainer.callback_metrics["train/loss_step"].item() == pytest.approx(losses.mean().item(), rel=1e-6)
    epoch = torch.cat([entry[4] for entry in module.denoiser.asked[True][-2:]])
    assert trainer.callback_metrics["train/loss_epoch"].item() == pytest.approx(epoch.mean().item(), rel=1e-6)
    for read, (_, t, _, _, losses) in zip(reader.read[True], module.denoiser.asked[True], strict=True):
        assert torch.equal(read["t"], t)
        assert torch.equal(read["loss"], losses)
        assert not read["loss"].requires_grad


@pytest.mark.parametrize("spread", ["uniform", "stratified"])
@pytest.mark.parametrize("steps", [1, 7, 300])
def test_training_times_are_uniform_over_the_grid(spread, steps):
    draws = torch.stack([draw_times(50, steps, spread, generator(k)) for k in range(400)])
    assert draws.dtype == torch.float64
    entries = (draws * steps).round()
    torch.testing.assert_close(draws, entries / steps, rtol=0, atol=0)
    counts = torch.bincount(entries.long().flatten(), minlength=steps + 1)
    assert counts[0] == 0
    assert counts[1:].min() > 0
    expected = draws.numel() / steps
    chi2 = ((counts[1:] - expected) ** 2 / expected).sum().item()
    assert chi2 <= (steps - 1) + 5 * (2 * (steps - 1)) ** 0.5
    assert abs(draws.mean().item() - (steps + 1) / (2 * steps)) < 4 * 0.29 / draws.numel() ** 0.5


def test_stratified_times_take_one_from_each_part():
    t = draw_times(50, 1000, "stratified", generator(0))
    assert torch.equal(((t - 1e-9) * 50).floor(), torch.arange(50, dtype=torch.float64))
    uniform = draw_times(50, 1000, "uniform", generator(0))
    assert len(((uniform - 1e-9) * 50).floor().unique()) < 45
    means = {
        spread: torch.stack([draw_times(16, 1000, spread, generator(k)).mean() for k in range(300)]).std()
        for spread in ("uniform", "stratified")
    }
    assert means["stratified"] < means["uniform"] / 8  # sqrt(n) n-fold in theory: 16


def test_the_module_trains_with_the_times_it_is_told():
    module = build(times="uniform")
    train(module, epochs=1)
    expected = draw_training((TRAINING, 0, 0), 4, range(4), (3, 8, 8), T, "uniform")
    assert torch.equal(module.denoiser.asked[True][0][1], expected.t)


# Validation ---------------------------------------------------------------------------------------------------------


def test_the_validation_grid_is_the_same_in_two_epochs_and_any_batch():
    module = build(val_times=4)
    train(module)
    asked = module.denoiser.asked[False]
    assert len(asked) == 2 * 4 * 4  # epochs, batches of 3 + 3 + 3 + 1, times
    first, second = asked[:16], asked[16:]
    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
    assert not torch.equal(first[0][4], second[0][4])  # the network has moved
    together = module._validation_grid(torch.arange(N), (3, 8, 8))
    for i in (0, 3, 9):
        alone = module._validation_grid(torch.tensor([i]), (3, 8, 8))
        assert torch.equal(together[0][:, i], alone[0][:, 0])
        assert torch.equal(together[1][:, i], alone[1][:, 0])
        assert torch.equal(alone[1][:, 0], torch.randn(4, 3, 8, 8, generator=generator(VALIDATION, 0, i)))


def test_another_seed_validates_at_the_same_times_with_other_noise():
    (t, eps), (u, other) = (build(seed=seed)._validation_grid(torch.arange(N), (3, 8, 8)) for seed in (0, 1))
    assert torch.equal(t, u)
    assert not torch.equal(eps, other)


def test_the_validation_grid_covers_all_times_and_fresh_noise():
    t, eps = build(val_times=4)._validation_grid(torch.arange(500), (1, 2, 2))
    assert t.shape == (4, 500)
    assert eps.shape == (4, 500, 1, 2, 2)
    entries = (t * T).round()
    assert torch.equal(entries / T, t)
    assert ((entries - 1) // (T // 4) == torch.arange(4)[:, None]).all()  # each image has one in each quarter
    counts = torch.bincount(entries.long().flatten(), minlength=T + 1)
    assert counts[0] == 0
    assert (counts[1:] - 100).abs().max() <= 3
    assert len(eps.flatten().unique()) > 0.99 * eps.numel()


def test_validation_loss_is_the_mean_over_images_and_not_over_batches():
    module = build(val_times=3)
    trainer = train(module, epochs=1)
    losses = torch.cat([entry[4] for entry in module.denoiser.asked[False]])
    assert len(losses) == 3 * N
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(losses.mean().item(), rel=1e-5)


def test_last_losses_of_validation_belong_together():
    module, reader = build(val_times=2), Reader()
    train(module, epochs=1, callbacks=[reader])
    asked = module.denoiser.asked[False]
    for k, read in enumerate(reader.read[False]):
        (_, t1, _, _, loss1), (_, t2, _, _, loss2) = asked[2 * k : 2 * k + 2]
        assert torch.equal(read["t"], torch.cat([t1, t2]))
        assert torch.equal(read["loss"], torch.cat([loss1, loss2]))


# Conditions ---------------------------------------------------------------------------------------------------------


def test_whole_conditions_are_dropped_in_training_and_none_in_validation():
    module = build(ClassifierFreeDiffusion, drop_prob=0.5)
    train(module, epochs=12)
    one_hot = torch.eye(3)[torch.arange(N) % 3]
    dropped = []
    for k, (_, _, _, cond, _) in enumerate(module.denoiser.asked[True]):
        wanted = one_hot[4 * (k % 2) : 4 * (k % 2) + 4]
        gone = (cond == 0).all(1)
        assert torch.equal(cond, torch.where(gone[:, None], 0.0, wanted))
        dropped += gone.tolist()
    assert len(dropped) == 96
    assert abs(sum(dropped) / 96 - 0.5) < 4 * 0.5 / 96**0.5
    shown = torch.cat([cond for _, _, _, cond, _ in module.denoiser.asked[False][:16:4]])
    assert torch.equal(shown, one_hot)


@pytest.mark.parametrize(("drop_prob", "expected"), [(0.0, 0), (1.0, 16)])
def test_the_ends_of_drop_prob(drop_prob, expected):
    module = build(ClassifierFreeDiffusion, drop_prob=drop_prob)
    train(module)
    assert sum((cond == 0).all(1).sum().item() for _, _, _, cond, _ in module.denoiser.asked[True]) == expected


def test_labels_of_an_augmentation_travel_with_the_condition_and_are_never_dropped():
    module = build(ClassifierFreeDiffusion, c_embed_dim=5, augment_dim=2, drop_prob=1.0)
    train(module, epochs=1, data=Images(augment=2))
    cond = module.denoiser.asked[True][1][3]
    assert torch.equal(cond[:, :3], torch.zeros(4, 3))
    torch.testing.assert_close(cond[:, 3:], torch.tensor([0.4, 0.5, 0.6, 0.7])[:, None].expand(4, 2))
    assert torch.equal(module.sampling_condition(["a daisy"], 1), torch.tensor([[1.0, 0, 0, 0, 0]]))
    assert module.sample(["a daisy", "a tulip"], [0, 1]).shape == (2, 3, 8, 8)
    plain = build(Diffusion, c_embed_dim=2, augment_dim=2)
    train(plain, epochs=1, data=Images(augment=2))
    torch.testing.assert_close(plain.denoiser.asked[True][0][3][:, 0], torch.tensor([0.0, 0.1, 0.2, 0.3]))
    assert torch.equal(plain.sampling_condition(None, 2), torch.zeros(2, 2))


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(AntherError, match=r"width 4, the conditioner gives 3: set network.c_embed_dim=3"):
        build(ClassifierFreeDiffusion, c_embed_dim=4)
    with pytest.raises(AntherError, match=r"gives 3 and the augmentation 9: set network.c_embed_dim=12"):
        build(ClassifierFreeDiffusion, augment_dim=9)
    with pytest.raises(AntherError, match=r"drop_prob is a probability, not 1.5"):
        build(ClassifierFreeDiffusion, drop_prob=1.5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 12)])
def test_data_of_another_shape_are_refused_before_training(shape):
    module = build()
    with pytest.raises(AntherError, match=f"the data are {shape[0]} x {shape[1]} x {shape[1]} and the network takes 3"):
        train(module, data=Images(shape))
    assert module.denoiser.asked[True] == []


def test_only_the_network_is_saved_and_trained():
    module = build(ClassifierFreeDiffusion)
    module.config = {"seed": 3}
    assert all(key.startswith("denoiser.network.") for key in module.state_dict())
    train(module, epochs=1)
    trained = {id(p) for group in module.configure_optimizers().param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.denoiser.network.parameters()}
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["config"] == {"seed": 3}


# Sampling -----------------------------------------------------------------------------------------------------------

PROMPTS = ["a daisy", "two roses", "a tulip", "a rose", "daisies", "tulips"]
SEEDS = [4, 0, 9, 1, 33, 2]


@pytest.mark.parametrize("sampler", [DDPM(), DDIM(5, 1.0), DDIM(5)], ids=["ddpm", "ddim-1", "ddim-0"])
@pytest.mark.parametrize("kind", [Diffusion, ClassifierFreeDiffusion])
def test_seed_k_is_image_k_in_any_batch_split(kind, sampler):
    module, weight = build(kind), None
    if kind is ClassifierFreeDiffusion:
        weight = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 3.0])

    def draw(chosen):
        prompts = [PROMPTS[k] for k in chosen] if weight is not None else None
        w = weight[list(chosen)] if weight is not None else None
        return module.sample(prompts, [SEEDS[k] for k in chosen], w, sampler)

    together = draw(range(6))
    assert together.shape == (6, 3, 8, 8)
    for split in ([[k] for k in range(6)], [[0, 1], [2, 3, 4, 5]], [[5, 3, 1, 0, 2, 4]]):
        for chosen in split:
            # Convolutions of other batch sizes add in another order: float tolerance, to the bit in test_sampler_loop.
            torch.testing.assert_close(draw(chosen), together[list(chosen)], rtol=0, atol=2e-5)
    distances = torch.pdist(together.flatten(1))
    assert distances.min() > 1


def test_sampling_starts_from_the_images_seed_and_guides_with_the_modules_weight():
    module, steps = build(ClassifierFreeDiffusion, weight=2.0), []
    image = module.sample(PROMPTS[:2], [5, 6], hook=steps.append)
    assert torch.equal(steps[0].x_t[1], torch.randn(3, 8, 8, generator=generator(6)))
    assert len(steps) == 3
    assert torch.equal(image, module.sample(PROMPTS[:2], [5, 6], weight=2.0))
    assert not torch.allclose(image, module.sample(PROMPTS[:2], [5, 6], weight=0.0), atol=1e-4)
    null = module.sample(PROMPTS[:2], [5, 6], weight=-1.0)
    assert torch.equal(null, module.sample(PROMPTS[2:4], [5, 6], weight=-1.0))  # w = -1 does not read the prompt


def test_the_modules_own_guidance_is_the_default_and_may_be_replaced():
    plain = build(ClassifierFreeDiffusion, weight=2.0)
    module = build(ClassifierFreeDiffusion, weight=2.0, interval=[0.5, 3], rescale=0.7)
    assert module.guidance == Guidance([0.5, 3], 0.7)
    own = module.sample(PROMPTS[:2], [5, 6])
    assert torch.equal(own, plain.sample(PROMPTS[:2], [5, 6], guidance=Guidance([0.5, 3], 0.7)))
    assert not torch.allclose(own, plain.sample(PROMPTS[:2], [5, 6]), atol=1e-4)
    assert torch.equal(module.sample(PROMPTS[:2], [5, 6], guidance=Guidance()), plain.sample(PROMPTS[:2], [5, 6]))


@pytest.mark.parametrize("kind", [Diffusion, ClassifierFreeDiffusion])
def test_any_model_may_be_led_away_from_a_worse_one(kind):
    module, worse = build(kind), build(kind)
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter.mul_(0.9)
    prompts = PROMPTS[:2] if kind is ClassifierFreeDiffusion else None
    led = Guidance(bad=worse.denoiser)
    image = module.sample(prompts, [5, 6], weight=1.5, guidance=led)
    predictor = module.predictor(1.5, led)
    assert isinstance(predictor, AutoGuidance)
    rng = ImageRNG([5, 6])
    expected = DDIM(3)(predictor, rng.randn((3, 8, 8)), rng, module.sampling_condition(prompts, 2))
    assert torch.equal(image, expected)
    assert not torch.allclose(image, module.sample(prompts, [5, 6], weight=0.0, guidance=led), atol=1e-4)


def test_a_negative_prompt_is_in_the_place_of_the_missing_condition():
    module, w, away = build(ClassifierFreeDiffusion), 1.5, "daisy"
    image = module.sample(PROMPTS[:2], [5, 6], weight=w, guidance=Guidance(negative=away))

    class ByHand:
        """A doubled batch, as pipelines with a negative prompt have it; x_0 is affine in eps."""

        schedule = module.denoiser.schedule

        def __call__(self, x_t, t, cond):
            both = torch.cat([cond, module.conditioner.encode([away]).expand(len(cond), -1)])
            wanted, unwanted = module.denoiser(x_t.repeat(2, 1, 1, 1), t.repeat(2), both).chunk(2)
            return (1 + w) * wanted - w * unwanted

    rng = ImageRNG([5, 6])
    expected = DDIM(3)(ByHand(), rng.randn((3, 8, 8)), rng, module.sampling_condition(PROMPTS[:2], 2))
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(image, module.sample(PROMPTS[:2], [5, 6], weight=w), atol=1e-3)
    # Away from what is wanted is nowhere.
    same = module.sample([away], [5], weight=w, guidance=Guidance(negative=away))
    torch.testing.assert_close(same, module.sample([away], [5], weight=0.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"interval": (0.1, 1.0)}, {"rescale": 0.7}])
@pytest.mark.parametrize("augment_dim", [0, 2])
def test_away_from_nothing_is_classifier_free_guidance_to_the_bit(monkeypatch, augment_dim, settings):
    module = build(ClassifierFreeDiffusion, 3 + augment_dim, augment_dim=augment_dim)
    plain = module.sample(PROMPTS[:2], [5, 6], 1.5, guidance=Guidance(**settings))
    unguided = module.sample(PROMPTS[:2], [5, 6], 0.0)
    away = Guidance(**settings, negative="a tulip")
    assert not torch.allclose(module.sample(PROMPTS[:2], [5, 6], 1.5, guidance=away), plain, atol=1e-4)
    assert torch.equal(module.sample(PROMPTS[:2], [5, 6], 0.0, guidance=away), unguided)
    encode = module.conditioner.encode
    monkeypatch.setattr(module.conditioner, "encode", lambda p: encode(p) * (0 if p == ["a tulip"] else 1))
    assert torch.equal(module.sample(PROMPTS[:2], [5, 6], 1.5, guidance=away), plain)


def test_guidance_that_cannot_be_is_refused():
    module = build()
    with pytest.raises(AntherError, match=r'"a fern" names no class'):
        build(ClassifierFreeDiffusion).check_request(PROMPTS[:1], 1, None, Guidance(negative="a fern"))
    for guidance in (Guidance(rescale=0.5), Guidance(negative="a daisy")):
        with pytest.raises(
            AntherError, match=r"guidance.interval, guidance.rescale and guidance.negative do not apply"
        ):
            module.sample(None, [0], guidance=guidance)
    with pytest.raises(AntherError, match=r"guidance.negative holds no word"):
        Guidance(negative=" ")
    with pytest.raises(AntherError, match=r"leave one of them out"):
        Guidance(bad=build().denoiser, negative="a daisy")
    with pytest.raises(AntherError, match=r"set guidance.weight beside guidance.bad"):
        module.sample(None, [0], guidance=Guidance(bad=build().denoiser))
    with pytest.raises(AntherError, match=r"0 <= low < high"):
        build(ClassifierFreeDiffusion, interval=[3, 1])


@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_the_module_as_it_was(training):
    module = build().train(training)
    before = torch.get_rng_state()
    image = module.sample(None, [0])
    assert module.training is training
    assert not image.requires_grad
    assert torch.equal(torch.get_rng_state(), before)

    def fail(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        module.sample(None, [0], hook=fail)
    assert module.training is training


def test_a_model_without_condition_takes_no_prompts_and_no_weight():
    module = build()
    with pytest.raises(AntherError, match="takes no prompts"):
        module.sample(["a rose"], [0])
    with pytest.raises(AntherError, match=r"guidance.weight does not apply"):
        module.sample(None, [0], weight=0.0)


@pytest.mark.parametrize(("prompts", "given"), [(None, "none"), ([], "0"), (["a rose"], "1"), (["rose"] * 3, "3")])
def test_prompts_and_seeds_must_be_as_many(prompts, given):
    with pytest.raises(AntherError, match=f"2 images need 2 prompts and {given} were given"):
        build(ClassifierFreeDiffusion).sample(prompts, [0, 1])

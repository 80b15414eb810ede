"""Bad input, line by line: each ends its command with one sentence that says what, where and what to do."""

import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra._internal.hydra import Hydra
from hydra.types import RunMode

from diffusion import cli
from diffusion.curation import app
from diffusion.evaluation import results

TINY = [
    "experiment=demo",
    "data.n_train=16",
    "data.n_val=4",
    "data.batch_size=4",
    "network.down_chs=[32,32,32]",
    "sampler.steps=2",
    "trainer=cpu",
    "trainer.max_steps=1",
    "callbacks=fit",
]
FOLDER = ["experiment=flowers", "trainer=cpu", "callbacks=fit", "conditioner=labels", "network.c_embed_dim=3"]
FOLDER += ["network.down_chs=[32,32,32]", "trainer.max_steps=1", "data.batch_size=2"]
DIGITS = ["experiment=mnist", "trainer=cpu", "callbacks=fit", "network.down_chs=[32,32,32]", "trainer.max_steps=1"]
DRAW = ["ckpt={ckpt}", "trainer=cpu", "sampler.steps=1", "prompts=[a red rose]"]
SCORE = ["ckpt={ckpt}", "trainer=cpu", "sampler=ddim", "sampler.steps=1", "num_images=2", "prompts=[a red rose]"]
SCORE += ["clip=null", "inception=null", "nearest=null", "dataset=null", "embedding=null"]

# Command, overrides, and what the sentence must hold.
TRAIN: list[tuple[list[str], list[str]]] = [
    # Of the command line and of Hydra
    (["trainer.max_step=5"], ["trainer.max_step ", "did you mean max_steps"]),
    (["colour=red"], ["colour", "schedule, network"]),
    (["data.batch_size.x=3"], ["data.batch_size.x"]),
    (["experiment=flower"], ["experiment/flower", "did you mean flowers", "mnist_class"]),
    (["data=nothing"], ["data/nothing", "cropped_flowers"]),
    (["data=null"], ["data= one of", "cropped_flowers"]),
    (["data=5"], ["data= one of", "cropped_flowers"]),
    (["schedule=cosin"], ["schedule/cosin", "did you mean cosine"]),
    (["network=unet"], ["network/unet", "flowers_course"]),
    (["sampler=dddim"], ["sampler/dddim", "did you mean ddim"]),
    (["trainer=tpu"], ["trainer/tpu", "ddp_sim"]),
    (["sweep=lrr"], ["sweep/lrr", "did you mean lr"]),
    (["T"], ["'T'", "KEY=VALUE"]),
    (["callbacks.samples.prompts=[a red rose"], ["[a red rose", "quote"]),
    (["T=${{steps}}"], ["T: ", "steps"]),
    (["name=???"], ["name is not set", "name="]),
    (["~loss"], ["loss"]),
    (["trainer.devices=???"], ["trainer.devices is not set"]),
    # Kinds
    ([*TINY, "T=abc"], ["T = 'abc'", "a whole number"]),
    ([*TINY, "T=1.5"], ["T = 1.5", "a whole number"]),
    ([*TINY, "seed=0.5"], ["seed = 0.5", "a whole number"]),
    ([*TINY, "seed=true"], ["seed = True", "a whole number"]),
    ([*TINY, "ckpt=[a,b]"], ["ckpt = ['a', 'b']", "text"]),
    ([*TINY, "objective=5"], ["objective = 5", "text"]),
    ([*TINY, "optimizer.lr=fast"], ["optimizer.lr = 'fast'", "a number"]),
    ([*TINY, "optimizer.lr=null"], ["optimizer.lr = None", "a number"]),
    ([*TINY, "optimizer.lr=nan"], ["optimizer.lr = nan", "a number"]),
    ([*TINY, "trainer.max_steps=abc"], ["trainer.max_steps = 'abc'", "a whole number"]),
    ([*TINY, "trainer.max_steps=1.5"], ["trainer.max_steps = 1.5", "a whole number"]),
    ([*TINY, "trainer.gradient_clip_val=much"], ["trainer.gradient_clip_val = 'much'", "a number"]),
    ([*TINY, "trainer.precision=33-true"], ["trainer.precision = '33-true'", "32-true", "bf16-mixed"]),
    ([*TINY, "trainer.precision=bf16-true"], ["trainer.precision=bf16-true", "bf16-mixed"]),
    ([*TINY, "trainer.precision=16-true"], ["trainer.precision=16-true", "bf16-mixed"]),
    ([*TINY, "trainer.precision=64"], ["trainer.precision=64-true", "bf16-mixed"]),
    ([*TINY, "data.batch_size=1.5"], ["data.batch_size = 1.5", "a whole number"]),
    ([*TINY, "data.batch_size=many"], ["data.batch_size = 'many'", "a whole number"]),
    ([*TINY, "data.drop_last=maybe"], ["data.drop_last = 'maybe'", "true or false"]),
    ([*TINY, "network.down_chs=32"], ["network.down_chs = 32", "a list"]),
    ([*TINY, "network.down_chs=[32,32,big]"], ["network.down_chs", "whole number"]),
    ([*TINY, "network.family=mine"], ["network.family = 'mine'", "course, handson"]),
    ([*TINY, "guidance.weight=abc"], ["guidance.weight = 'abc'", "a number or null"]),
    ([*TINY, "guidance.weight=nan"], ["guidance.weight = nan"]),
    ([*TINY, "guidance.weight=inf"], ["guidance.weight = inf"]),
    ([*TINY, "guidance.weight=[1,2]"], ["guidance.weight = [1, 2]"]),
    ([*TINY, "guidance=3"], ["guidance", "weight"]),
    ([*TINY, "sampler.steps=few"], ["sampler.steps = 'few'", "a whole number"]),
    ([*TINY, "sampler.clip=3"], ["sampler.clip = 3", "0.995"]),
    ([*TINY, "sampler.clip=much"], ["sampler.clip = 'much'", "true or false or a number"]),
    ([*TINY, "module.times=random"], ["module.times = 'random'", "uniform, stratified"]),
    ([*TINY, "module.seed=x"], ["module.seed = 'x'", "a whole number"]),
    ([*TINY, "conditioner.training=both"], ["conditioner.training", "both"]),
    ([*TINY, "callbacks=default", "callbacks.ema.decay=slow"], ["callbacks.ema.decay = 'slow'"]),
    # Ranges
    ([*TINY, "T=0"], ["T = 0", "1 or more"]),
    ([*TINY, "T=-5"], ["T = -5", "1 or more"]),
    ([*TINY, "schedule=linear", "target=eps", "schedule.beta_end=2"], ["Linear", "(0, 1]"]),
    ([*TINY, "seed=-1"], ["-1", "whole number"]),
    ([*TINY, "seed=4294967296"], ["4294967296", "4294967295"]),
    ([*TINY, "data.batch_size=0"], ["data.batch_size=0", "at least 1"]),
    ([*TINY, "data.batch_size=-1"], ["data.batch_size=-1", "at least 1"]),
    ([*TINY, "data.batch_size=64"], ["data.batch_size=64", "16 training images"]),
    ([*TINY, "data.n_train=0"], ["data.n_train"]),
    ([*TINY, "data.partial=2"], ["data.partial=2", "0..1"]),
    ([*TINY, "data.num_workers=-1"], ["data.num_workers=-1", "0 or more"]),
    ([*TINY, "optimizer.lr=-1"], ["optimizer", "-1"]),
    ([*TINY, "optimizer.speed=3"], ["speed", "optimizer"]),
    ([*TINY, "+optimizer.weight_deca=3"], ["optimizer", "did you mean weight_decay"]),
    ([*TINY, "trainer.devices=0"], ["trainer", "0"]),
    ([*TINY, "trainer.max_steps=-5"], ["trainer", "-5"]),
    ([*TINY, "trainer.accelerator=abacus"], ["trainer", "abacus"]),
    ([*TINY, "trainer.accelerator=gpu"], ["trainer", "gpu"]),
    ([*TINY, "trainer.strategy=magic"], ["trainer", "magic"]),
    ([*TINY, "trainer.accumulate_grad_batches=0"], ["trainer", "accumulate_grad_batches"]),
    ([*TINY, "trainer.check_val_every_n_epoch=0"], ["trainer.check_val_every_n_epoch", "1 or more"]),
    ([*TINY, "trainer.limit_train_batches=0"], ["trainer.limit_train_batches=0", "nothing to train"]),
    ([*TINY, "trainer.limit_train_batches=0.01"], ["limit_train_batches", "Lightning"]),
    ([*TINY, "trainer.val_check_interval=100"], ["val_check_interval", "100", "Lightning"]),
    ([*TINY, "weighting=min_snr"], ["no signal at t = 1", "weighting=unit"]),
    ([*TINY, "module.drop_prob=2"], ["drop_prob", "[0, 1]"]),
    ([*TINY, "module.val_times=0"], ["module.val_times = 0", "1 or more"]),
    ([*TINY, "module.augment_dim=-1"], ["augment_dim"]),
    ([*TINY, "augment@data.augment=nonleaking"], ["7 numbers", "set module.augment_dim=7 network.c_embed_dim=71"]),
    ([*TINY, "augment@data.augment=null"], ["one of affine, flip, nonleaking, or data.augment=null"]),
    ([*TINY, "module=unconditional", "module.augment_dim=7"], ["set network.c_embed_dim=7"]),
    ([*TINY, "experiment.name=x"], ["there is no setting experiment: the config has"]),
    ([*TINY, "scheduler=null"], ["one of plateau, warmup_cosine, or ~scheduler for none"]),
    ([*TINY, "trainer.max_steps=-1", "trainer.max_time=00:01:00:00"], ["scheduler=warmup_cosine", "trainer.max_steps"]),
    ([*TINY, "sampler.steps=0"], ["steps"]),
    ([*TINY, "sampler.eta=2"], ["eta", "[0, 1]"]),
    ([*TINY, "weighting=min_snr", "weighting.gamma=-1"], ["gamma"]),
    ([*TINY, "weighting=p2", "weighting.k=0"], ["weighting.k"]),
    ([*TINY, "callbacks=default", "callbacks.ema.decay=1.5"], ["callbacks.ema.decay", "1.5"]),
    ([*TINY, "callbacks=default", "callbacks.samples.every_n_epochs=0"],
     ["callbacks.samples.every_n_epochs = 0", "1 or more", "callbacks.samples=null"]),
    ([*TINY, "callbacks=default", "callbacks.samples.per_prompt=0"], ["callbacks.samples.per_prompt = 0"]),
    ([*TINY, "callbacks=default", "callbacks.samples.weights=[]"], ["callbacks.samples.weights is empty"]),
    ([*TINY, "callbacks=default", "+callbacks.samples.batch_size=0"], ["callbacks.samples.batch_size = 0"]),
    ([*TINY, "callbacks=default", "+callbacks.samples.columns=0"], ["callbacks.samples.columns = 0"]),
    ([*TINY, "callbacks=default", "callbacks.last.every_n_steps=0"], ["callbacks.last.every_n_steps = 0"]),
    ([*TINY, "callbacks=default", "callbacks.last.share=0"], ["callbacks.last.share = 0", "(0, 1]"]),
    ([*TINY, "callbacks=default", "callbacks.timestep_loss.bins=0"], ["callbacks.timestep_loss.bins = 0"]),
    ([*TINY, "callbacks=text", "callbacks.clip.every_n_epochs=0"], ["callbacks.clip.every_n_epochs = 0"]),
    ([*TINY, "callbacks=text", "callbacks.clip.per_prompt=0"], ["callbacks.clip.per_prompt = 0"]),
    ([*TINY, "callbacks=text", "callbacks.embeddings.every_n_epochs=0"], ["callbacks.embeddings.every_n_epochs = 0"]),
    ([*TINY, "callbacks=text", "callbacks.embeddings.weights=[]"], ["callbacks.embeddings.weights is empty"]),
    ([*TINY, "callbacks=photos", "callbacks.fid.every_n_epochs=0"], ["callbacks.fid.every_n_epochs = 0"]),
    ([*TINY, "callbacks=photos", "callbacks.fid.num_images=0"], ["callbacks.fid.num_images = 0"]),
    ([*TINY, "scheduler.final=2"], ["final"]),
    ([*TINY, "scheduler.warmup_steps=-3"], ["warmup_steps"]),
    # What does not go together
    ([*TINY, "target=noise"], ["noise", "eps, x0, v, flow"]),
    ([*TINY, "loss=l2"], ["l2", "mse, l1, huber"]),
    ([*TINY, "target=eps"], ["eps", "no signal"]),
    ([*TINY, "network.T=300"], ["T = 300", "400"]),
    ([*TINY, "network.c_embed_dim=512"], ["512", "64", "network.c_embed_dim=64"]),
    ([*TINY, "network.img_ch=1"], ["3 x 32 x 32", "1 x 32 x 32"]),
    ([*TINY, "network.img_size=30"], ["network.img_size = 30", "divide by 4"]),
    ([*TINY, "network.down_chs=[30,60,90]"], ["[30, 60, 90]", "32"]),
    ([*TINY, "network.down_chs=[32,32]"], ["[32, 32]", "three"]),
    ([*TINY, "network.t_embed_dim=7"], ["network.t_embed_dim = 7", "even"]),
    ([*TINY, "conditioner.model=ViT-B-23", "conditioner.pretrained=openai"], ["ViT-B-23", "ViT-B-32"]),
    ([*TINY, "callbacks=default", "callbacks.samples.prompts=[a red helicopter]"], ["helicopter"]),
    ([*TINY, "callbacks=default", "callbacks.samples.gif=perhaps"], ["callbacks.samples.gif", "never, last, always"]),
    ([*TINY, "network._target_=os.system"], ["os.system", "refused"]),
    ([*TINY, "network._target_=diffusion.networks.unet.UNeet"], ["UNeet", "did you mean UNet"]),
    ([*TINY, "conditioner=table", "conditioner.path=nowhere.csv"], ["nowhere.csv", "conditioner.path"]),
    ([*TINY, "conditioner=table", "conditioner.path={bad}/text.csv"], ["text.csv", "e0, e1"]),
    ([*TINY, "conditioner=table", "conditioner.path={bad}/objects.npz"], ["objects.npz", "embedding"]),
    # Checkpoints
    ([*TINY, "ckpt=nowhere.ckpt"], ["nowhere.ckpt", "no checkpoint"]),
    ([*TINY, "ckpt={bad}"], ["no checkpoint at {bad}"]),
    ([*TINY, "ckpt={bad}/empty.txt"], ["empty.txt", "not a whole checkpoint"]),
    ([*TINY, "ckpt={bad}/text.csv"], ["text.csv", "not a whole checkpoint"]),
    ([*TINY, "ckpt={bad}/cut.ckpt"], ["cut.ckpt", "not a whole checkpoint"]),
    ([*TINY, "ckpt={bad}/foreign.ckpt"], ["foreign.ckpt", "train.py"]),
    ([*TINY, "ckpt={bad}/odd.ckpt"], ["odd.ckpt", "train.py"]),
    ([*TINY, "ckpt={ckpt}", "network.down_chs=[32,32,64]"], ["another model", "down_chs"]),
    # Data
    ([*FOLDER, "data.path=nowhere/flowers"], ["nowhere/flowers", "data.path"]),
    ([*FOLDER, "data.path={bad}/empty"], ["empty", "no class folders"]),
    ([*FOLDER, "data.path={bad}/text.csv"], ["text.csv", "no whole zip or tar"]),
    ([*FOLDER, "data.path={bad}/cut.zip"], ["cut.zip", "get it again"]),
    ([*FOLDER, "data.path={bad}/escape.zip"], ["escape.zip", "outside"]),
    ([*FOLDER, "data.path=ftp://127.0.0.1/x.zip"], ["ftp://127.0.0.1/x.zip"]),
    ([*FOLDER, "data.path={photos}", "data.classes=[daisy,roses,tulips]"], ["tulips", "data.classes"]),
    ([*FOLDER, "data.path={photos}", "data.classes=[daisy,roses,daisy]"], ["daisy", "data.classes", "twice"]),
    ([*FOLDER, "data.path={photos}", "data.classes=[]"], ["data.classes", "empty"]),
    ([*FOLDER, "data.path={photos}", "data.classes=daisy"], ["data.classes = 'daisy'", "a list"]),
    ([*FOLDER, "data.path={photos}", "data.classes=[daisy,roses,../..]"], ["../..", "data.classes"]),
    ([*FOLDER, "data.path={photos}", "data.split={{train: 0.5, val: 0.2}}"], ["data.split", "add up to 1"]),
    ([*FOLDER, "data.path={photos}", "data.split={{train: 1.5, val: -0.5}}"], ["data.split", "positive"]),
    ([*FOLDER, "data.path={photos}", "data.split={{train: x, val: y}}"], ["data.split"]),
    ([*FOLDER, "data.path={photos}", "data.split={{train: 0.001, val: 0.999}}"], ["data.split", "too few"]),
    ([*FOLDER, "data.path={photos}", "data.split.test=0.1"], ["data.split", "add up to 1"]),
    ([*FOLDER, "data.path={photos}", "data.captions='a {{colour}} flower'"], ["data.captions", "noun"]),
    ([*FOLDER, "data.path={photos}", "data.on_corrupt=cry"], ["data.on_corrupt", "refuse, skip"]),
    ([*FOLDER, "data.path={photos}", "data.short_side=8"], ["data.short_side=8", "data.size=32"]),
    ([*FOLDER, "data.path={photos}", "data.size=0"], ["data.size=0"]),
    ([*FOLDER, "data.path={photos}", "data.augment.flip=3"], ["flip"]),
    ([*FOLDER, "data.path={bad}/bomb"], ["bomb.png", "on_corrupt"]),
    ([*DIGITS, "data.path=nowhere/mnist"], ["nowhere/mnist"]),
    ([*DIGITS, "data.path={bad}/idx"], ["idx"]),
    # Secrets
    ([*FOLDER, "data.path=https://me:hunter22@127.0.0.1/x.zip"], ["data.path holds a password", "netrc"]),
    ([*TINY, "+logger.wandb.api_key=0123456789abcdef"], ["logger.wandb.api_key", "WANDB_API_KEY"]),
]  # fmt: skip
SAMPLE: list[tuple[list[str], list[str]]] = [
    ([], ["ckpt is not set", "ckpt="]),
    (["ckpt=nowhere.ckpt"], ["nowhere.ckpt", "no checkpoint"]),
    (["ckpt={bad}/foreign.ckpt"], ["foreign.ckpt", "train.py", "model=flowers_course"]),
    (["ckpt={bad}/cut.ckpt"], ["cut.ckpt", "not a whole checkpoint"]),
    (["ckpt={bad}/evil.ckpt"], ["evil.ckpt", "not a whole checkpoint"]),
    ([*DRAW, "num_images=0"], ["num_images", "1 or more"]),
    ([*DRAW, "num_images=two"], ["num_images = 'two'", "a whole number"]),
    ([*DRAW, "batch_size=0"], ["batch_size", "1 or more"]),
    ([*DRAW, "seed=-1"], ["seed = -1"]),
    ([*DRAW, "gif=always"], ["gif = 'always'", "true or false"]),
    ([*DRAW, "prompts=[]"], ["prompts", "empty"]),
    ([*DRAW, "prompts=['']"], ["prompts", "no text"]),
    ([*DRAW, "prompts=[[a,b]]"], ["prompts", "no text"]),
    ([*DRAW, "prompts=null"], ["prompts"]),
    ([*DRAW, "prompts=[a purple helicopter]"], ["helicopter"]),
    ([*DRAW, "guidance.weight=much"], ["guidance.weight = 'much'"]),
    ([*DRAW, "guidance.weight=nan"], ["guidance.weight = nan"]),
    ([*DRAW, "guidance.negative=''"], ["guidance.negative holds no word"]),
    ([*DRAW, "guidance.negative=[a,b]"], ["guidance.negative = ['a', 'b']", "text"]),
    ([*DRAW, "guidance.negative=a purple helicopter"], ["helicopter"]),
    ([*DRAW, "sampler.steps=-1"], ["sampler.steps"]),
    ([*DRAW, "sampler.eta=hot"], ["sampler.eta = 'hot'", "a number"]),
    ([*DRAW, "sampler=ddpm", "sampler.variance=big"], ["variance", "beta_prev"]),
    ([*DRAW, "trainer.accelerator=gpu"], ["trainer.accelerator=gpu", "trainer=cpu"]),
    ([*DRAW, "trainer.precision=8"], ["precision 8"]),
    ([*DRAW, "trainer.precision=bf16-true"], ["trainer.precision=bf16-true", "bf16-mixed"]),
    ([*DRAW, "model=flowers"], ["has its own config"]),
    ([*DRAW, "image=nowhere.png"], ["no image at nowhere.png", "image="]),
    ([*DRAW, "image={bad}"], ["no image at"]),
    ([*DRAW, "image={bad}/text.csv"], ["text.csv cannot be read as an image", "image="]),
    ([*DRAW, "image={bad}/bomb/roses/bomb.png"], ["bomb.png cannot be read as an image"]),
    ([*DRAW, "image=5"], ["image = 5", "text"]),
    ([*DRAW, "mask={bad}/white.png"], ["white.png is about an image", "set image="]),
    ([*DRAW, "strength=0.5"], ["strength = 0.5 is about an image", "set image="]),
    ([*DRAW, "image={bad}/white.png", "mask=nowhere.png"], ["no mask at nowhere.png", "mask="]),
    ([*DRAW, "image={bad}/white.png", "mask={bad}/text.csv"], ["text.csv cannot be read as an image", "mask="]),
    ([*DRAW, "image={bad}/white.png", "mask={bad}/wide.png"], ["12 x 8 pixels and the image 8 x 8", "image's size"]),
    ([*DRAW, "image={bad}/white.png", "mask={bad}/black.png"], ["black all over", "make white"]),
    ([*DRAW, "image={bad}/white.png", "strength=1.5"], ["strength lies in [0, 1], not at 1.5"]),
    ([*DRAW, "image={bad}/white.png", "strength=-0.1"], ["strength lies in [0, 1], not at -0.1"]),
    ([*DRAW, "image={bad}/white.png", "strength=1e-9"], ["strength = 1e-09 is less than 1 / ", "or 0"]),
    ([*DRAW, "image={bad}/white.png", "strength=nan"], ["strength = nan"]),
    ([*DRAW, "image={bad}/white.png", "strength=much"], ["strength = 'much'", "a number"]),
    ([*DRAW, "image={bad}/white.png", "strength=0", "gif=true"], ["strength = 0", "leave gif= out"]),
]
EVALUATE: list[tuple[list[str], list[str]]] = [
    ([], ["ckpt is not set"]),
    ([*SCORE, "ckpt=nowhere.ckpt"], ["nowhere.ckpt"]),
    ([*SCORE, "ckpt={bad}/cut.ckpt"], ["cut.ckpt", "not a whole checkpoint"]),
    ([*SCORE, "ckpt={bad}/evil.ckpt"], ["evil.ckpt", "not a whole checkpoint"]),
    ([*SCORE, "ckpt={bad}/hostile.ckpt"], ["os.system", "refused"]),
    ([*SCORE, "model=flowers"], ["has its own config", "leave model= out"]),
    ([*SCORE, "model=flower"], ["flower"]),
    ([*SCORE, "model=nowhere.yaml"], ["nowhere.yaml"]),
    ([*SCORE, "ckpt={bad}/foreign.ckpt", "model={bad}/list.yaml"], ["list.yaml", "module"]),
    (["ckpt={ckpt}", "protocol.num_images=5"], ["there is no setting protocol"]),
    (["ckpt={ckpt}", "data=null"], ["data is no group", "set data.path=… or data.exclude=…"]),
    (["ckpt={ckpt}", "data=flowers102"], ["data is no group", "set data.path=… or data.exclude=…"]),
    (["ckpt={ckpt}", "network=flowers"], ["network is no group", "sampler, sweep, trainer"]),
    (["ckpt={ckpt}", "sampler.steps=5"], ["sampler=ddim sampler.steps=…", "of ddim, ddpm, dpmpp, "]),
    (["ckpt={ckpt}", "sampler.eta=1"], ["as in sampler=ddim sampler.eta=…", "one of ddim, euler."]),
    (["ckpt={ckpt}", "sampler.stepz=5"], ["there is no setting sampler"]),
    (["ckpt={ckpt}", "network.steps=5"], ["there is no setting network"]),
    ([*SCORE[:2], *SCORE[4:], "+sampler.steps=5"], ["sampler has no _target_", "sampler=NAME"]),
    (["ckpt={ckpt}", "sampler=null"], ["sampler= one of ddim, ddpm", "leave it out"]),
    ([*SCORE, "num_images=0"], ["num_images", "from 1 on"]),
    ([*SCORE, "num_images=1e3"], ["num_images = 1000.0", "a whole number"]),
    ([*SCORE, "batch_size=-1"], ["batch_size", "from 1 on"]),
    ([*SCORE, "seed=x"], ["seed = 'x'"]),
    ([*SCORE, "prompts=[]"], ["prompts", "empty"]),
    ([*SCORE, "prompts=[5]"], ["5", "no text"]),
    ([*SCORE, "prompts=nowhere.txt"], ["nowhere.txt"]),
    ([*SCORE, "prompts={bad}/empty.txt"], ["empty.txt", "empty list"]),
    ([*SCORE, "prompts={bad}/latin.txt"], ["latin.txt", "UTF-8"]),
    ([*SCORE, "prompts={bad}/folder.txt"], ["folder.txt"]),
    ([*SCORE, "prompts={bad}/broken.yaml"], ["broken.yaml"]),
    ([*SCORE, "prompts={bad}/list.yaml"], ["list.yaml", "list of prompts"]),
    ([*SCORE, "prompts=fourr"], ["fourr", "three"]),
    ([*SCORE, "embedding={{layer: middle, form: pooled, when: last, steps: []}}"], ["middle", "down2"]),
    ([*SCORE, "embedding={{layer: down2, form: round, when: last}}"], ["embedding.form = 'round'", "pooled, flat"]),
    ([*SCORE, "embedding={{layer: down2, form: flat, when: soon}}"], ["embedding.when = 'soon'", "trace"]),
    ([*SCORE, "embedding={{layer: down2, form: flat, when: trace, steps: []}}"], ["embedding.steps"]),
    ([*SCORE, "embedding={{layer: down2, form: flat, when: trace, steps: [7]}}"], ["embedding.steps", "7"]),
    ([*SCORE, "embedding={{layer: down2, colour: red}}"], ["embedding", "'colour'"]),
    ([*SCORE, "embedding=down2"], ["embedding = 'down2'"]),
    ([*SCORE, "clip={{model: ViT-B-23, pretrained: openai}}"], ["ViT-B-23", "did you mean"]),
    ([*SCORE, "clip=ViT-B-32"], ["clip = 'ViT-B-32'"]),
    ([*SCORE, "+clip.pretraind=x"], ["clip"]),
    (["ckpt={ckpt}", "inception.few_images=perhaps"], ["inception.few_images = 'perhaps'", "refuse, allow"]),
    (["ckpt={ckpt}", "inception.weights=5"], ["inception.weights = 5"]),
    (["ckpt={ckpt}", "inception.splitt=val"], ["inception.splitt", "did you mean split"]),
    (["ckpt={ckpt}", "nearest.space=mind"], ["nearest.space = 'mind'", "inception, pixels"]),
    ([*SCORE, "nearest={{space: pixels, split: holdout}}"], ["holdout", "train, val"]),
    ([*SCORE, "nearest={{space: inception, split: train}}"], ["nearest.space"]),
    ([*SCORE, "nearest={{space: pixels, split: train}}", "data.path={bad}"], ["data.path"]),
    ([*SCORE, "classifier={{weights: nowhere.safetensors, threshold: null, split: val}}"], ["nowhere.safetensors"]),
    ([*SCORE, "dataset={{name: null}}", "publish.repo_id=noslash"], ["noslash", "namespace/name"]),
    ([*SCORE, "dataset={{name: null}}", "publish.repo_id=a/b/c"], ["a/b/c", "namespace/name"]),
    ([*SCORE, "dataset={{name: null}}", "publish.repo_id='me/<b>x</b>'"], ["<b>x</b>", "namespace/name"]),
    ([*SCORE, "publish.repo_id=me/flowers"], ["dataset=null"]),
    ([*SCORE, "publish.licence=5"], ["publish.licence = 5", "text"]),
    ([*SCORE, "publish.dry_run=no"], ["publish.dry_run = 'no'", "true or false"]),
    ([*SCORE, "publish.tokn=x"], ["publish.tokn", "repo_id"]),
    ([*SCORE, "+publish.token=hf_0123456789abcdef"], ["publish.token", "HF_TOKEN"]),
    ([*SCORE, "objective=5"], ["objective = 5"]),
    ([*SCORE, "objective=beauty"], ["objective", "beauty"]),
    ([*SCORE, "trainer.precision=8"], ["precision 8"]),
    ([*SCORE, "trainer.precision=bf16-true"], ["trainer.precision=bf16-true", "bf16-mixed"]),
]  # fmt: skip
APP: list[tuple[list[str], list[str]]] = [
    ([], ["RUN_FOLDER"]),
    (["nowhere/run"], ["nowhere/run", "evaluate.py"]),
    (["{bad}/empty", "--port", "x"], ["--port", "x"]),
    (["{bad}/empty", "--port", "70000"], ["70000", "--port"]),
    (["{bad}/empty", "--colour", "red"], ["--colour"]),
]
RESULTS: list[tuple[list[str], list[str]]] = [
    (["nowhere"], ["no run below nowhere"]),
    (["{bad}/empty"], ["no run below"]),
    (["{bad}/text.csv"], ["no run below"]),
    (["{bad}/empty", "--cvs", "x"], ["--cvs"]),
    (["{runs}", "--csv", "{bad}/text.csv/x.csv"], ["text.csv/x.csv"]),
]
TABLE = [
    (command, *row)
    for command, rows in {
        "train.py": TRAIN,
        "sample.py": SAMPLE,
        "evaluate.py": EVALUATE,
        "diffusion.curation.app": APP,
        "diffusion.evaluation.results": RESULTS,
    }.items()
    for row in rows
]


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of files that are not what they are given for."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("eine schöne Rose".encode("latin-1"))
    (folder / "folder.txt").mkdir()
    (folder / "empty").mkdir()
    (folder / "text.csv").write_text("neither,a,table\nnor,an,archive\n")
    (folder / "broken.yaml").write_text("a: [")
    (folder / "list.yaml").write_text("name: x\n")
    np.savez(folder / "objects.npz", path=np.array([object()]), embedding=np.ones((1, 2)))
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    torch.save([1, 2], folder / "odd.ckpt")
    torch.save({"fn": os.system}, folder / "evil.ckpt")
    torch.save(
        {"config": {"module": {"_target_": "os.system", "command": "true"}}, "state_dict": {}}, folder / "hostile.ckpt"
    )
    (folder / "cut.ckpt").write_bytes((folder / "foreign.ckpt").read_bytes()[:100])
    with zipfile.ZipFile(folder / "cut.zip", "w") as archive:
        archive.writestr("rose/a.png", os.urandom(4000))
    (folder / "cut.zip").write_bytes((folder / "cut.zip").read_bytes()[:2000])
    with zipfile.ZipFile(folder / "escape.zip", "w") as archive:
        archive.writestr("../../escaped.png", b"x")
    Image.new("L", (8, 8), "white").save(folder / "white.png")
    Image.new("L", (8, 8), "black").save(folder / "black.png")
    Image.new("L", (12, 8), "white").save(folder / "wide.png")
    for name in ("daisy", "roses", "sunflowers"):
        (folder / "bomb" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "bomb" / name / "fine.png")
    bomb = bytearray((folder / "bomb" / "roses" / "fine.png").read_bytes())
    bomb[16:24] = (50_000).to_bytes(4, "big") * 2  # the size that its header declares
    import zlib

    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (folder / "bomb" / "roses" / "bomb.png").write_bytes(bomb)
    (folder / "idx").mkdir()
    (folder / "idx" / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08 not gzip")
    return folder


@pytest.fixture
def places(bad: Path, trained: Path, photos: Path) -> dict[str, Path]:
    return {"bad": bad, "ckpt": trained, "photos": photos, "runs": trained.parents[1]}


Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Hydra composes everything twice, the first time to learn that this is no sweep.
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)


@pytest.mark.parametrize(("script", "overrides", "says"), TABLE, ids=[f"{c}-{o[-1] if o else ''}" for c, o, _ in TABLE])
def test_one_sentence(
    script: str,
    overrides: list[str],
    says: list[str],
    call: Callable[..., Path],
    places: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words, folder = [word.format(**places) for word in overrides], tmp_path / "run"
    before = set(places["bad"].parent.glob("bad*/**"))
    capfd.readouterr()
    others = {"diffusion.curation.app": app.main, "diffusion.evaluation.results": results.main}
    if script in others:
        run = partial(cli.run, partial(others[script], words))
    else:
        run = partial(call, script, *words, folder=folder)
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code in (1, 2)
    printed = capfd.readouterr()
    lines = [line for line in printed.err.splitlines() if "error: " in line]
    assert len(lines) == 1, printed.err
    assert "Traceback" not in printed.out + printed.err
    for fragment in says:
        assert fragment.format(**places) in lines[0], lines[0]
    # Hydra's own notes are all that lies there.
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert left <= {".hydra", "train.log", "sample.log", "evaluate.log", "splits.json"}, left
    assert set(places["bad"].parent.glob("bad*/**")) == before


def test_the_table_is_long() -> None:
    assert len(TABLE) >= 100
    assert len({(command, *overrides) for command, overrides, _ in TABLE}) == len(TABLE)

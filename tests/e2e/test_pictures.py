"""The commands of diffusion.pictures that need a trained model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from diffusion.errors import AntherError
from diffusion.pictures import main
from tests.e2e.test_train import DRAWN


@pytest.mark.parametrize("conditional", [False, True])
def test_pictures_of_a_model(conditional: bool, call: Callable[..., Path], trained: Path, tmp_path: Path) -> None:
    checkpoint, prompts = trained, ["--prompts", "a red rose", "two white daisies"]
    if not conditional:
        tiny = [*DRAWN, "data.size=16", "network.dim=16", "trainer.accelerator=cpu", "sampler.steps=4", "T=10"]
        run = call("train.py", "experiment=flowers102_seed004", *tiny, "trainer.max_epochs=2", "callbacks.last.share=1")
        checkpoint, prompts = run / "checkpoints" / "last.ckpt", ["-n", "2"]
        main(["progress", str(run), "--out", str(tmp_path)])
        assert Image.open(tmp_path / "progress.png").height > 100
        main(["attention", str(checkpoint), "-n", "1", "--out", str(tmp_path)])
        assert Image.open(tmp_path / "attention.png").width == (2 + 6) * 134 + 6
    main(["denoise", str(checkpoint), "-n", "2", "--out", str(tmp_path)])
    assert Image.open(tmp_path / "denoise.png").width == 5 * 134 + 6
    main(["reverse", str(checkpoint), *prompts, "--sampler", "ddim", "--steps", "4", "--out", str(tmp_path)])
    assert Image.open(tmp_path / "reverse.png").width == 5 * 134 + 6
    # The model's own sampler, shortened: its four, or fifty, steps would be more columns.
    main(["reverse", str(checkpoint), *prompts, "--steps", "2", "--out", str(tmp_path)])
    assert Image.open(tmp_path / "reverse.png").width == 3 * 134 + 6
    main(["reverse", str(checkpoint), *prompts, "--sampler", "heun", "--steps", "3", "--out", str(tmp_path)])
    assert Image.open(tmp_path / "reverse.png").width == 4 * 134 + 6
    for words, says in ((["--steps", "0"], "1 step or more, not 0"), (["--sampler", "plms"], "no sampler 'plms'")):
        with pytest.raises(AntherError, match=says):
            main(["reverse", str(checkpoint), *prompts, *words, "--out", str(tmp_path)])
    if conditional:
        with pytest.raises(AntherError, match="has no attention"):
            main(["attention", str(checkpoint), "--out", str(tmp_path)])
        with pytest.raises(AntherError, match="need 4 prompts"):
            main(["reverse", str(checkpoint), "--out", str(tmp_path)])

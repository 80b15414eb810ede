import hashlib
import json
import logging
import os
import shutil
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.conditioning import openclip
from diffusion.conditioning.openclip import clip_config, find_clip, load_clip, resolve_open_clip
from diffusion.errors import AntherError
from diffusion.files import sha256


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    sizes = [(20, 20), (40, 24), (18, 30), (16, 16), (25, 25)]
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    return [*images, images[0].convert("L")]


def test_images_and_texts_equal_plain_open_clip(reference, pictures):
    path, images, texts = reference
    clip = load_clip("tiny", str(path))
    assert (clip.dim, clip.image_size, clip.name) == (12, 16, f"tiny/{path.name}")
    torch.testing.assert_close(clip.encode_images(pictures), images([p.convert("RGB") for p in pictures]))
    prompts = ["a photo of a red rose", "Two  white daisies", "", "rose, rose, rose"]
    torch.testing.assert_close(clip.encode_texts(prompts), texts(prompts))
    assert clip.encode_texts(prompts).dtype == torch.float32
    norms = clip.encode_texts(prompts).norm(dim=1)
    assert (norms - 1).abs().min() > 1e-3, "embeddings must not be normalised"


def test_batches_are_cut_and_put_together_in_order(reference, pictures, monkeypatch):
    path, images, _ = reference
    monkeypatch.setattr(openclip, "_BATCH", 4)
    torch.testing.assert_close(load_clip("tiny", str(path)).encode_images(pictures[:5]), images(pictures[:5]))
    assert load_clip("tiny", str(path)).encode_images([]).shape == (0, 12)
    assert load_clip("tiny", str(path)).encode_texts([]).shape == (0, 12)


def test_frozen_float32_and_usable_in_training_and_under_autocast(reference):
    clip = load_clip("tiny", str(reference[0]))
    assert not any(p.requires_grad for p in clip._network.parameters())
    assert not clip._network.training
    with torch.autocast("cpu", torch.bfloat16):
        rows = clip.encode_texts(["a red rose"])
    assert torch.equal(rows, clip.encode_texts(["a red rose"]))
    torch.nn.Linear(12, 1)(rows).sum().backward()  # would fail on inference tensors


def test_hash_is_of_the_file(write_clip):
    path, _ = write_clip()
    other, _ = write_clip(seed=1)
    assert load_clip("tiny", str(path)).weights_hash == sha256(path)
    assert find_clip("tiny", str(path)).identity != find_clip("tiny", str(other)).identity


def test_half_precision_files_are_read_as_float32(write_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    path, _ = write_clip()
    state = {k: v.half() if v.is_floating_point() else v for k, v in load_file(path).items()}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(state, tmp_path / "half.safetensors", metadata=metadata)
    half = load_clip("tiny", str(tmp_path / "half.safetensors"))
    rows = half.encode_texts(["a red rose"])
    assert rows.dtype == torch.float32
    assert next(half._network.parameters()).dtype == torch.float32
    torch.testing.assert_close(rows, load_clip("tiny", str(path)).encode_texts(["a red rose"]), rtol=0.02, atol=0.02)


def test_words_outside_the_vocabulary_are_named(reference):
    clip = load_clip("tiny", str(reference[0]))
    with pytest.raises(AntherError) as error:
        clip.encode_texts(["a red rose", "a blue TULIP and a rose"])
    message = str(error.value)
    assert all(f"'{word}'" in message for word in ("blue", "tulip", "and"))
    assert "'rose'" not in message
    assert "daisies" in message, "the known words are listed"


def test_the_name_must_be_the_files(reference):
    with pytest.raises(AntherError, match=r"set conditioner\.model=tiny"):
        load_clip("ViT-B-32", str(reference[0]))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_local_state_dicts_of_open_clips_own_architectures(tmp_path, suffix, caplog, monkeypatch):
    # A registered architecture, small enough for a test.
    import open_clip
    from safetensors.torch import save_file

    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "Test-16", config)
    torch.manual_seed(0)
    model = open_clip.CLIP(**json.loads(json.dumps(config))).eval()
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(model.state_dict(), path)

    clip = load_clip("Test-16", str(path))
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer("Test-16")(["any tulip at all"]))
    torch.testing.assert_close(clip.encode_texts(["any tulip at all"]), expected)
    assert clip.source.preprocess["mean"][0] == pytest.approx(0.48145466)

    # The same weights under a tag that was trained with the quick GELU are used with it.
    tags = {"openai": {**open_clip.pretrained._PRETRAINED["ViT-B-32"]["openai"]}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Test-16", tags)
    kept = openclip.cache_dir() / "open_clip" / f"Test-16-openai{suffix}"
    kept.parent.mkdir()
    path.rename(kept)
    quick = open_clip.CLIP(**json.loads(json.dumps(config)), quick_gelu=True).eval()
    quick.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected_quick = quick.encode_text(open_clip.get_tokenizer("Test-16")(["any tulip at all"]))
    assert not torch.allclose(expected, expected_quick)
    torch.testing.assert_close(load_clip("Test-16", "openai").encode_texts(["any tulip at all"]), expected_quick)

    with caplog.at_level(logging.WARNING):
        find_clip("Test-16", str(kept))
    assert "quickgelu" in caplog.text

    # Weights of another architecture.
    state = model.state_dict()
    state["strange.weight"] = state.pop("ln_final.weight")
    save(state, kept)
    with pytest.raises(AntherError, match=r"Missing.*ln_final.weight.*Unexpected.*strange.weight"):
        load_clip("Test-16", str(kept))
    state = {**model.state_dict(), "text_projection": torch.zeros(16, 5)}
    save(state, kept)
    with pytest.raises(AntherError, match="size mismatch for text_projection"):
        load_clip("Test-16", str(kept))


def test_damaged_and_dangerous_files_are_one_sentence(tmp_path, write_clip):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "noise.bin").write_bytes(b"not a checkpoint")
    (tmp_path / "noise.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json, not jso")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    for name in ("evil.pt", "noise.bin", "noise.safetensors", "script.pt"):
        with pytest.raises(AntherError) as error:
            load_clip("ViT-S-32-alt", str(tmp_path / name))
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()

    path, _ = write_clip()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(AntherError, match="fetch it again"):
        load_clip("tiny", str(path))


@pytest.mark.parametrize(
    ("model", "pretrained", "hint"),
    [
        ("ViT-B-33", "openai", "ViT-B-32"),
        ("anther-flower-32", "openai", "anther-flowers-32"),
        ("ViT-B-32", "laion2b_s34b_b79", "laion2b_s34b_b79k"),
        ("ViT-B-32", "/nowhere/weights.pt", "/nowhere/weights.pt"),
        ("ViT-B-32", "embedded", "anther-flowers-32"),
        ("hf-hub:some/repo", "openai", "unknown CLIP model"),
    ],
)
def test_unknown_names_give_a_hint(model, pretrained, hint):
    with pytest.raises(AntherError, match=hint):
        load_clip(model, pretrained)


def test_width_is_known_without_weights():
    assert clip_config("ViT-B-32", "openai")["embed_dim"] == 512
    assert clip_config("ViT-L-14", "whatever")["embed_dim"] == 768


def test_openai_archives_are_recognised_by_their_published_checksum(tmp_path, monkeypatch):
    import open_clip

    path = tmp_path / "ViT.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ViT/constants.pkl", b"")
    assert not openclip._openai_archive(path)
    cfg = {
        **open_clip.pretrained._PRETRAINED["ViT-B-32"]["openai"],
        "url": f"https://host/models/{sha256(path)}/ViT.pt",
    }
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED["ViT-B-32"], "openai", cfg)
    openclip._openai_archive.cache_clear()
    assert openclip._openai_archive(path)
    openclip._openai_archive.cache_clear()


@pytest.mark.parametrize("offline", [True, False])
def test_missing_weights_are_one_sentence_within_seconds(tmp_path, offline, monkeypatch):
    from huggingface_hub import constants

    without_a_hub(monkeypatch, tmp_path, f"http://127.0.0.1:9/{'0' * 64}/ViT-B-32.pt")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    clip_config("ViT-B-32", "openai")  # imports are not what is timed
    start = time.monotonic()
    with pytest.raises(AntherError) as error:
        load_clip("ViT-B-32", "openai")
    assert time.monotonic() - start < 5
    message = str(error.value)
    assert "\n" not in message
    for part in ("ViT-B-32", "openai", str(tmp_path), "hf download timm/vit_base_patch32_clip_224.openai", "embedded"):
        assert part in message
    assert ("HF_HUB_OFFLINE" in message) == offline
    assert ("refused" in message) != offline
    assert ("nor did http://127.0.0.1:9/" in message) != offline


def without_a_hub(monkeypatch, folder, url):
    """Neither hub nor caches, and OpenAI's weights at an address of ours."""
    import open_clip
    from huggingface_hub import constants

    # Port 9 refuses at once: what a closed network does for names it cannot resolve.
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("ANTHER_CACHE", str(folder / "cache"))
    tags = open_clip.pretrained._PRETRAINED["ViT-B-32"]
    monkeypatch.setitem(tags, "openai", {**tags["openai"], "url": url})


def test_openais_own_address_is_tried_where_the_hub_is_out_of_reach(tmp_path, monkeypatch):
    published = tmp_path / hashlib.sha256(b"the weights").hexdigest() / "ViT-B-32.pt"
    published.parent.mkdir()
    published.write_bytes(b"the weights")
    without_a_hub(monkeypatch, tmp_path, published.as_uri())
    assert resolve_open_clip("ViT-B-32", "openai") == tmp_path / "cache" / "assets" / "open_clip" / "ViT-B-32.pt"
    published.unlink()
    assert resolve_open_clip("ViT-B-32", "openai").read_bytes() == b"the weights"
    shutil.rmtree(tmp_path / "cache")
    published.write_bytes(b"the weighst")
    with pytest.raises(AntherError, match=r"nor did file://"):
        resolve_open_clip("ViT-B-32", "openai")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_the_hubs_cache_is_used_without_a_network(tmp_path, monkeypatch):
    from huggingface_hub import constants

    repo = tmp_path / "models--laion--CLIP-ViT-B-32-laion2B-s34B-b79K"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "snapshots" / "abc" / "open_clip_pytorch_model.bin").write_bytes(b"weights")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    found = resolve_open_clip("ViT-B-32", "laion2b_s34b_b79k")
    assert found.read_bytes() == b"weights"
    assert time.monotonic() - start < 2


class Files(BaseHTTPRequestHandler):
    """A hub with one file, as far as the real client asks one: `etag` is the sha256 that it claims."""

    content, etag = b"the weights", ""

    def do_HEAD(self):
        name = self.path.rsplit("/", 1)[-1]
        if name != "open_clip_pytorch_model.bin":
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{self.etag}"')
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()

    def do_GET(self):
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    handler = type("Handler", (Files,), {"etag": hashlib.sha256(Files.content).hexdigest()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield handler
        server.shutdown()
        thread.join()


def test_what_the_hub_sends_is_held_against_its_sha256(hub, tmp_path):
    hub.content = b"the weighst"  # as long as they should be, which is all that the client looks at
    with pytest.raises(AntherError) as error:
        resolve_open_clip("ViT-B-32", "laion2b_s34b_b79k")
    message = str(error.value)
    assert "\n" not in message
    for part in ("open_clip_pytorch_model.bin", hub.etag[:12], hashlib.sha256(hub.content).hexdigest()[:12]):
        assert part in message
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == hub.content]
    hub.content = Files.content
    assert resolve_open_clip("ViT-B-32", "laion2b_s34b_b79k").read_bytes() == b"the weights"


def test_a_file_in_git_itself_has_another_hash(hub):
    hub.etag = "0" * 40
    assert resolve_open_clip("ViT-B-32", "laion2b_s34b_b79k").read_bytes() == b"the weights"


def test_the_embedded_clip_loads_and_is_small():
    path = openclip.EMBEDDED["anther-flowers-32"]
    assert path.stat().st_size <= 4 * 2**20
    clip = load_clip("anther-flowers-32", "embedded")
    assert clip.image_size == 32
    assert clip.encode_texts(["a red rose", "two white daisies"]).shape == (2, clip.dim)
    with pytest.raises(AntherError, match="zeppelin"):
        clip.encode_texts(["a zeppelin"])

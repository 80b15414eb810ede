"""Tokens appear nowhere: not in a run's files, not in what is sent, not in what is printed."""

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.diffusion.curation.hub_server import Hub, running_hub

ROOT = Path(__file__).resolve().parents[2]
SECRETS = {
    "HF_TOKEN": "hf_canaryOneOneOneOneOneOneOneOneOne",
    "WANDB_API_KEY": "c0ffee0canary0two0c0ffee0c0ffee0c0ffee00",
    "MY_STORE_SECRET": "canaryThreeThreeThree",
}
PASSWORD = "canaryFourFourFour"

TINY = ["experiment=demo", "data.n_train=16", "data.n_val=8", "data.batch_size=8", "network.down_chs=[32,32,32]"]
TINY += ["trainer=cpu", "trainer.max_steps=2", "sampler.steps=2", "callbacks.samples.per_prompt=1"]
SCORE = ["prompts=[a red rose,two white daisies]", "num_images=20", "trainer=cpu", "sampler=ddim", "sampler.steps=2"]
SCORE += ["clip.model=anther-flowers-32", "clip.pretrained=embedded", "inception=null", "nearest.space=pixels"]

Start = Callable[..., subprocess.CompletedProcess[str]]


def contents(path: Path) -> Iterator[bytes]:
    """A file as it is, and what is packed inside it."""
    yield path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield archive.read(name)


def told(folder: Path) -> list[str]:
    """Files below a folder that hold a secret, by name or content, in any of the encodings that files use."""
    texts = [*SECRETS.values(), PASSWORD]
    forms = {form for text in texts for form in (text.encode(), text.encode("utf-16-le"))}
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert paths
    found = [str(path) for path in paths if any(form in content for content in contents(path) for form in forms)]
    return found + [str(path) for path in paths if any(text in str(path) for text in texts)]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Runs a command with every secret in its environment; what it prints must hold none of them."""
    netrc = tmp_path / "home" / ".netrc"
    netrc.parent.mkdir()
    netrc.write_text(f"machine 127.0.0.1 login me password {PASSWORD}\n")
    netrc.chmod(0o600)

    def run(*words: str, fails: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_"))},
                **SECRETS,
                "NETRC": str(netrc),
                "HF_HOME": str(tmp_path / "hf"),
                "WANDB_MODE": "offline",
                "WANDB_DIR": str(tmp_path / "wandb"),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert (done.returncode != 0) == fails, done.stderr
        for text in (*SECRETS.values(), PASSWORD):
            assert text not in done.stdout + done.stderr
        return done

    return run


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub(SECRETS["HF_TOKEN"], "me") as running:
        yield running


@pytest.mark.slow
def test_a_training_an_evaluation_and_a_publication_tell_no_token(start: Start, hub: Hub, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    trained, evaluated = runs / "trained", runs / "evaluated"
    start("train.py", *TINY, "logger=wandb", f"hydra.run.dir={trained}")
    assert list((trained / "logs" / "wandb").rglob("*.wandb"))
    publish = ["publish.repo_id=me/flowers", "publish.dry_run=false", "dataset.name=tokens"]
    start(
        "evaluate.py",
        f"ckpt={trained / 'checkpoints' / 'last.ckpt'}",
        *SCORE,
        "logger=wandb",
        *publish,
        f"hydra.run.dir={evaluated}",
        HF_ENDPOINT=hub.url,
        HF_HUB_DISABLE_XET="1",
        FIFTYONE_DATABASE_DIR=str(tmp_path / "db"),
        FIFTYONE_CONFIG_PATH=str(tmp_path / "fiftyone.json"),
        FIFTYONE_DEFAULT_DATASET_DIR=str(tmp_path / "fiftyone"),
    )
    assert (evaluated / "published.json").exists()
    assert told(runs) == []
    sent = hub.repos["me/flowers"].files()
    assert sent
    for path, content in sent.items():
        for text in (*SECRETS.values(), PASSWORD):
            assert text.encode() not in content, path
            assert text not in path


def test_the_search_finds_what_is_packed(tmp_path: Path) -> None:
    import torch

    torch.save({"config": {"x": SECRETS["HF_TOKEN"]}}, tmp_path / "a.ckpt")
    (tmp_path / "b.txt").write_text(f"https://me:{PASSWORD}@host")
    (tmp_path / "c.txt").write_text("nothing")
    assert sorted(map(os.path.basename, told(tmp_path))) == ["a.ckpt", "b.txt"]


@pytest.mark.parametrize(
    "word",
    [
        f"data.path=https://me:{PASSWORD}@127.0.0.1:9/x.zip",
        f"data.path=https://127.0.0.1:9/x.zip?token={PASSWORD}",
        f"+publish.token={PASSWORD}",
        f"name={SECRETS['WANDB_API_KEY']}",
    ],
)
def test_a_token_on_the_command_line_is_refused_before_anything_is_written(
    word: str, start: Start, tmp_path: Path
) -> None:
    done = start("train.py", "experiment=flowers", word, f"hydra.run.dir={tmp_path / 'run'}", fails=True)
    assert len(re.findall(r"^error: ", done.stderr, flags=re.M)) == 1
    assert not (tmp_path / "run").exists()


def test_a_variable_in_a_config_is_refused(start: Start, tmp_path: Path) -> None:
    word = "++logger.csv.path=${oc.env:HF_TOKEN}"
    done = start("train.py", "experiment=demo", word, f"hydra.run.dir={tmp_path / 'run'}", fails=True)
    assert "logger.csv.path holds the value of HF_TOKEN" in done.stderr
    assert told(tmp_path / "run") == []


def test_a_host_that_wants_a_password_is_told_it_from_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import base64
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    from diffusion.assets import AssetError, download

    heard: list[str | None] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.headers.get("Authorization"))
            if self.path == "/away":  # another host, which must not hear it
                self.send_response(302)
                self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/x")
                self.end_headers()
                return
            self.send_response(200 if self.path == "/x" else 401)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {PASSWORD}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    base = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        download(f"{base}/x", tmp_path / "x")
        basic = "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()
        assert heard == [basic]
        download(f"{base}/away", tmp_path / "y")
        assert heard == [basic, basic, None]
        with pytest.raises(AssetError) as error:
            download(f"{base}/no?token={PASSWORD}", tmp_path / "z")
        assert PASSWORD not in str(error.value)
    finally:
        server.shutdown()

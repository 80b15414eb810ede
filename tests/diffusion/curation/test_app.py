"""The App on a run's dataset: which dataset it is, and what a browser shows."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from diffusion.curation import app
from diffusion.curation.dataset import SCORES, build_dataset
from diffusion.curation.export import export_fiftyone
from diffusion.errors import AntherError

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def run(make_run, fiftyone, tmp_path):
    """A run whose dataset `mine` is in the database and exported."""
    folder = make_run(tmp_path / "run", n=3, shape=None)
    build_dataset(folder, "mine")
    export_fiftyone("mine", folder)
    yield folder
    for name in fiftyone.list_datasets():
        if name != "built":
            fiftyone.delete_dataset(name)


def test_takes_the_dataset_that_the_database_has(fiftyone, run):
    ids = fiftyone.load_dataset("mine").values("id")
    assert app.dataset_of(run) == "mine"
    assert app.dataset_of("mine") == "mine"
    assert fiftyone.load_dataset("mine").values("id") == ids


def test_loads_the_export_where_the_database_has_none(fiftyone, run):
    fiftyone.delete_dataset("mine")
    assert app.dataset_of(run) == "mine"
    assert fiftyone.load_dataset("mine").first().filepath == str(run / "dataset" / "data" / "000000.png")


def test_another_run_of_the_same_name_is_neither_shown_nor_replaced(fiftyone, run, make_run, tmp_path):
    other = make_run(tmp_path / "other", n=2, shape=None)
    build_dataset(other, "mine")
    name = app.dataset_of(run)
    assert re.fullmatch(r"mine [0-9a-f]{6}", name)
    assert app.dataset_of(run) == name
    assert (len(fiftyone.load_dataset(name)), len(fiftyone.load_dataset("mine"))) == (3, 2)


def test_builds_where_there_is_no_export(fiftyone, run):
    shutil.rmtree(run / "dataset")
    assert app.dataset_of(run) == "run"
    assert fiftyone.load_dataset("run").first().filepath == str(run / "images" / "000000.png")


def test_refuses_what_is_no_run(fiftyone, tmp_path, run):
    with pytest.raises(AntherError, match="no folder"):
        app.open_app(tmp_path / "absent")
    with pytest.raises(AntherError, match="neither a folder nor a dataset"):
        app.dataset_of("absent")
    (run / "dataset" / "metadata.json").write_text("{")
    with pytest.raises(AntherError, match=r"metadata\.json is damaged"):
        app.dataset_of(run)


def test_refuses_a_port_that_is_taken(tmp_path):
    (tmp_path / "a run").mkdir()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(AntherError, match=f"port {port} is taken") as error:
            app.open_app(tmp_path / "a run", port=port)
        # Who came here from evaluate.py has no --port there.
        assert f"`python -m diffusion.curation.app '{tmp_path / 'a run'}' --port N`" in str(error.value)
    app._check_port(port, "")


@pytest.mark.skipif(sys.platform != "linux", reason="screens are told by DISPLAY on Linux only")
def test_no_browser_without_a_screen(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(app.webbrowser, "get", lambda: "a browser")
    assert not app.has_browser()
    monkeypatch.setenv("DISPLAY", ":0")
    assert app.has_browser()
    monkeypatch.setenv("SSH_CONNECTION", "1.2.3.4 5 6.7.8.9 22")
    assert not app.has_browser()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_fields_and_images(make_run, tmp_path):
    """The command as a person gives it, on a run that only has files; what headless Chromium then shows."""
    folder = make_run(tmp_path / "roses")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = ("FIFTYONE_", "DISPLAY", "WAYLAND_DISPLAY")
    env = {key: value for key, value in os.environ.items() if not key.startswith(names)}
    env |= {
        "FIFTYONE_DATABASE_DIR": str(tmp_path / "db"),
        "FIFTYONE_CONFIG_PATH": str(tmp_path / "config.json"),
    }
    command = [sys.executable, "-m", "diffusion.curation.app", str(folder), "--port", str(port)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith(f"FiftyOne's App shows 'roses' at http://localhost:{port}/datasets/roses; from"), (
                line
            )
            listening = [c.laddr.ip for c in psutil.net_connections("tcp") if c.laddr.port == port and not c.raddr]
            assert set(listening) <= {"127.0.0.1", "::1"}, "the App must not be open to other machines"
            shown = look(f"http://localhost:{port}/datasets/roses", tmp_path / "app.png")
        finally:
            process.terminate()
    assert {"prompt", "label", "clip_score", "guidance_weight", "nearest_distance", *SCORES} <= set(shown["fields"])
    assert shown["images"] == 24
    assert shown["problems"] == []


def look(address: str, screenshot: Path, seconds: float = 120) -> dict:
    """What the App's page shows once its images are there."""
    from playwright.sync_api import sync_playwright

    quiet = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking")
    arguments = [f"--{name}" for name in ("no-sandbox", *quiet, "disable-component-update", "disable-sync")]
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1400, "height": 1200})
        media: list[str] = []

        def loaded(response):
            if "/media" in response.url and ".png" in response.url:
                media.append(response.url)
                if not response.ok:
                    problems.append(f"{response.status} {response.url}")

        page.on("response", loaded)
        page.goto(address, wait_until="domcontentloaded")
        deadline = time.monotonic() + seconds
        shown: dict = {}
        while time.monotonic() < deadline:
            page.wait_for_timeout(1000)
            text = page.inner_text("body")
            shown = {"fields": re.findall(r"^[a-z_]+$", text, re.MULTILINE), "images": len(set(media))}
            if "uniqueness" in shown["fields"] and shown["images"] >= 24:
                break
        page.wait_for_timeout(2000)
        page.screenshot(path=str(screenshot))
        browser.close()
    return shown | {"problems": problems}

import hashlib
import json
import logging
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from diffusion.curation import publish as module
from diffusion.curation.export import export_imagefolder
from diffusion.curation.publish import ATTEMPTS, check, publish
from diffusion.errors import AntherError
from tests.diffusion.curation.hub_server import running_hub

TOKEN = "hf_thisIsTheSecretOfTheTest"
REPO = "me/flowers"
PROMPTS = ("a rose | a lily", "line\nline", "---\n: {x} 'y' \"z\"", "маки", "2026-01-02")
N = 10


@pytest.fixture
def run(tmp_path):
    """A finished run whose prompts are hostile, with a file that is still being written."""
    folder = tmp_path / "runs" / "mine"
    for name in ("images", "plots", "dataset/data", "dataset/brain"):
        (folder / name).mkdir(parents=True)
    rows = []
    for k in range(N):
        file = f"images/{k:06d}.png"
        pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / file)
        (folder / f"dataset/data/{k:06d}.png").hardlink_to(folder / file)
        row = {"id": f"{k:06d}", "prompt": PROMPTS[k % len(PROMPTS)], "label": None, "seed": 7 + k, "file": file}
        rows.append(row | {"guidance_weight": 3.0, "clip_score": None if k == 3 else k / 7, "steps": 5})
    pd.DataFrame(rows).to_parquet(folder / "records.parquet")
    samples = [{"_id": {"$oid": f"{k:024x}"}, "filepath": f"data/{k:06d}.png"} for k in range(N)]
    (folder / "dataset/samples.json").write_text(json.dumps({"samples": samples}))
    (folder / "dataset/metadata.json").write_text('{"media_type": "image"}')
    (folder / "dataset/brain/umap.json").write_text("{}")
    np.save(folder / "embeddings.npy", np.random.default_rng(0).normal(size=(N, 3, 6, 6)).astype(np.float32))
    (folder / "metrics.csv").write_text("key,value,verdict,note\nfid_10,87.5,,\n")
    facts = {"checkpoint": "/home/me/best.ckpt", "seed": 7, "guidance_weight": 3.0, "image_shape": [3, 8, 8]}
    metrics = {"fid_10": {"value": 87.5, "better": "lower", "verdict": "poor", "note": "small | N", "protocol": {}}}
    (folder / "metrics.json").write_text(json.dumps({"run": facts, "metrics": metrics}))
    (folder / "plots/histogram.png").write_bytes(b"histogram" * 600)
    (folder / "plots/.histogram-x8.png").write_bytes(b"half of it")
    export_imagefolder(folder)
    return folder


@pytest.fixture
def slept(monkeypatch):
    """Seconds that were waited, ours and the client's, without waiting."""
    seconds, sleep = [], time.sleep
    # Threads that other tests left behind wait as ever: else they would spin and fill the memory.
    strangers = set(threading.enumerate()) - {threading.current_thread()}

    def wait(duration):
        if threading.current_thread() in strangers:
            sleep(duration)
        else:
            seconds.append(duration)

    monkeypatch.setattr(time, "sleep", wait)
    return seconds


@pytest.fixture
def hub(monkeypatch, tmp_path, slept):
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "login"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.delenv("HF_OIDC_RESOURCE", raising=False)
    disable_progress_bars()
    with running_hub(TOKEN, "me") as hub:
        yield hub
    enable_progress_bars()


def send(run, hub, **keywords):
    return publish(run, REPO, dry_run=False, licence="cc-by-4.0", endpoint=hub.url, **keywords)


def expected(run):
    """What has to be in the repository, from the brief and not from the code: path -> file of the run."""
    paths = {name: run / name for name in ("metrics.csv", "records.parquet", "embeddings.npy")}
    paths["plots/histogram.png"] = run / "plots/histogram.png"
    for name in ("samples.json", "metadata.json", "brain/umap.json"):
        paths[f"test/{name}"] = run / "dataset" / name
    for k in range(N):
        paths[f"test/data/{k:06d}.png"] = run / f"images/{k:06d}.png"
    paths["test/data/metadata.parquet"] = run / "imagefolder/test/metadata.parquet"
    return paths


def check_repository(run, hub):
    files = dict(hub.repos[REPO].files())
    assert files.pop(".gitattributes")
    # The path of the checkpoint on this machine stays here.
    ours, theirs = json.loads((run / "metrics.json").read_text()), json.loads(files.pop("metrics.json"))
    assert theirs["run"] == {**ours["run"], "checkpoint": "best.ckpt"}
    assert theirs["metrics"] == ours["metrics"]
    readme, picture = files.pop("README.md").decode(), files.pop("preview.png")
    assert files == {path: file.read_bytes() for path, file in expected(run).items()}
    data = yaml.safe_load(readme.split("---\n")[1])
    assert data["dataset_info"]["configs"][0]["data_files"][0]["path"] in files
    assert data["license"] == "cc-by-4.0"
    assert picture.startswith(b"\x89PNG")
    assert re.search(r"!\[.*\]\(preview.png\)", readme)
    # Two images may be equal, blobs are sent by content.
    assert set(Counter(hub.received).values()) == {1}


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_dry_run_lists_what_a_real_one_sends(run, hub, capsys, monkeypatch):
    before = tree(run)
    monkeypatch.delenv("HF_TOKEN")

    def refuse(*args, **keywords):
        raise AssertionError("a dry run needs no network")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        assert publish(run, REPO, licence="cc-by-4.0", endpoint=hub.url) is None
    assert hub.requests == []
    assert hub.repos == {}
    assert tree(run) == before
    text = capsys.readouterr().out
    listed = re.findall(r"^ *([\d,]+)  (\S.*)$", text, re.MULTILINE)
    assert f"the private dataset repository {REPO}" in text
    publish(run, REPO, private=False)
    assert f"the public dataset repository {REPO}" in capsys.readouterr().out

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    send(run, hub)
    sent = {path: content for path, content in hub.repos[REPO].files().items() if path != ".gitattributes"}
    assert {path: int(size.replace(",", "")) for size, path in listed} == {path: len(c) for path, c in sent.items()}
    assert f"{len(sent)} files, {sum(map(len, sent.values())):,} bytes" in text


def test_publish(run, hub, capsys):
    before = tree(run)
    url = send(run, hub)
    assert url == f"{hub.url}/datasets/{REPO}"
    check_repository(run, hub)
    repo = hub.repos[REPO]
    assert repo.private
    assert len(repo.commits) == 2  # the hub's own and ours
    assert hub.count("PUT /storage/[0-9a-f]+/2$") > 0  # in parts
    text = capsys.readouterr().out
    assert "one commit" in text
    assert text.splitlines()[-1] == f"published: {url}"
    record = json.loads((run / "published.json").read_text())
    assert record["repo"] == REPO
    assert record["commit"] == repo.head
    assert record["url"] == url
    assert record["private"] is True
    assert record["time"].startswith("20")
    after = tree(run)
    del after[run / "published.json"]
    assert after == before

    # The same command again: nothing to send, the same repository.
    arrived = len(hub.received)
    send(run, hub)
    assert len(hub.received) == arrived
    assert len(repo.commits) == 2
    assert json.loads((run / "published.json").read_text())["commit"] == repo.head


def test_public_by_name_only(run, hub):
    send(run, hub, private=False)
    assert not hub.repos[REPO].private
    commits = len(hub.repos[REPO].commits)
    with pytest.raises(AntherError, match=r"is public, but a private one was asked for, so nothing was sent"):
        send(run, hub)
    assert len(hub.repos[REPO].commits) == commits


def test_a_private_repository_stays_private_and_is_recorded_so(run, hub, capsys):
    send(run, hub)
    send(run, hub, private=False)
    assert f"{hub.url}/datasets/{REPO} exists and is private and stays so" in capsys.readouterr().out
    assert hub.repos[REPO].private
    assert json.loads((run / "published.json").read_text())["private"] is True


def test_foreign_files_are_not_mixed_with_ours(run, hub):
    send(run, hub)
    hub.repos[REPO].commit("by hand", hub.repos[REPO].files() | {"test/data/999999.png": b"x", "notes.txt": b"y"})
    with pytest.raises(AntherError, match=r"1 files in test/ that this run does not have \(first: test/data/999999"):
        send(run, hub)
    assert len(hub.repos[REPO].commits) == 3


def test_another_run_in_the_repository_is_named_before_it_is_replaced(run, hub, capsys):
    path, repo = run / "metrics.json", f"{hub.url}/datasets/{REPO}"
    document = json.loads(path.read_text())
    for made in ("yesterday", "today"):
        document["run"]["made"] = made
        path.write_text(json.dumps(document))
        send(run, hub)
    assert "another run" not in capsys.readouterr().out
    document["run"]["guidance_weight"] = 7.5
    path.write_text(json.dumps(document))
    send(run, hub)
    text = capsys.readouterr().out
    said = f"{repo} holds another run, which this one replaces: guidance_weight = 3.0 there and 7.5 here.\n"
    assert text.index(said) < text.index("one commit")
    hub.repos[REPO].commit("by hand", hub.repos[REPO].files() | {"metrics.json": b"[1]"})
    send(run, hub)
    assert f"{repo} holds another run" in capsys.readouterr().out


STEPS = {
    "create": "POST /api/repos/create",
    "info": rf"GET /api/datasets/{REPO}$",
    "list": rf"GET /api/datasets/{REPO}/tree",
    "card": "POST /api/validate-yaml",
    "ask": rf"POST /api/datasets/{REPO}/preupload",
    "batch": r"POST /datasets/.*/objects/batch",
    "blob": "PUT /storage",
    "verify": "POST /api/verify",
    "commit": rf"POST /api/datasets/{REPO}/commit",
}


@pytest.mark.parametrize("status", [429, 504, 0], ids=["429", "504", "reset"])
@pytest.mark.parametrize("step", STEPS)
def test_what_passes_by_itself_is_tried_again(run, hub, slept, step, status):
    # The hub answers in JSON, the gateway before it in HTML.
    answer = {"headers": {"Retry-After": "3"}, "body": b'{"error": "slower"}'} if status == 429 else {}
    fault = hub.fail(STEPS[step], status, times=2, **answer)
    send(run, hub)
    assert fault.times == 0
    assert hub.count(STEPS[step], status) == 2
    check_repository(run, hub)
    assert len(hub.repos[REPO].commits) == 2
    assert slept
    if status == 429:
        assert min(slept) >= 3


@pytest.mark.parametrize("status", [504, 0])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(run, hub, status):
    hub.fail(STEPS["commit"], status, times=1, lost_answer=True)
    send(run, hub)
    check_repository(run, hub)
    assert len(hub.repos[REPO].commits) == 2
    assert json.loads((run / "published.json").read_text())["commit"] == hub.repos[REPO].head


@pytest.mark.parametrize("status", [429, 504, 0])
def test_attempts_are_bounded_and_counted(run, hub, slept, capsys, status):
    hub.fail(STEPS["commit"], status)
    with pytest.raises(AntherError) as error:
        send(run, hub)
    assert hub.count(STEPS["commit"], status) == ATTEMPTS
    message = str(error.value)
    assert f"in {ATTEMPTS} attempts" in message
    assert f"0 of {len(expected(run)) + 3} files are committed" in message
    assert "run the same command again" in message
    assert "\n" not in message
    assert f"attempt {ATTEMPTS} of {ATTEMPTS} in 16 s" in capsys.readouterr().out
    assert sum(slept) <= 60
    assert not (run / "published.json").exists()


def test_a_hub_that_is_not_there(run, hub):
    with pytest.raises(AntherError, match=r"could not create the repository in 5 attempts .*nothing was sent"):
        publish(run, REPO, dry_run=False, endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": "0"}, 0),
        ({"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 55),
        ({"RateLimit": '"api";r=9;t=55'}, 2),
        ({}, 2),
    ],
)
def test_the_hub_says_how_long_to_wait(run, hub, slept, headers, seconds):
    hub.fail(STEPS["create"], 429, times=1, headers=headers)
    send(run, hub)
    assert slept == [seconds]


def test_dates_are_waited_for_and_long_waits_are_told(run, hub, slept):
    from email.utils import formatdate

    hub.fail(STEPS["create"], 429, times=1, headers={"Retry-After": formatdate(time.time() + 30, usegmt=True)})
    send(run, hub)
    assert 25 <= slept[0] <= 30
    del slept[:]
    hub.fail(STEPS["create"], 429, headers={"Retry-After": "3600"})
    with pytest.raises(AntherError, match=r"in 1 attempts .*the hub asks to wait 3600 s"):
        send(run, hub)
    assert slept == []


@pytest.mark.parametrize("status", [504, 0])
def test_the_same_command_goes_on(run, hub, status):
    fault = hub.fail("PUT /storage/[0-9a-f]{64}$", status, after=4)
    with pytest.raises(AntherError, match=r"run the same command again, it sends what is missing"):
        send(run, hub)
    arrived = list(hub.received)
    assert 4 <= len(arrived) < N
    assert not (run / "published.json").exists()
    assert len(hub.repos[REPO].commits) == 1
    fault.times = 0
    send(run, hub)
    check_repository(run, hub)  # every blob arrived once
    assert hub.received[: len(arrived)] == arrived
    assert len(hub.repos[REPO].commits) == 2
    assert (run / "published.json").exists()


def test_many_files_are_several_commits_and_a_failure_costs_one(run, hub, monkeypatch, capsys):
    monkeypatch.setattr(module, "LARGE_FILES", 9)
    monkeypatch.setattr(module, "FILES_PER_COMMIT", 4)
    total = len(expected(run)) + 3
    fault = hub.fail(STEPS["commit"], 504, after=2)
    with pytest.raises(AntherError, match=rf"could not send commit 3 of 6 .*; 8 of {total} files are committed"):
        send(run, hub)
    fault.times = 0
    send(run, hub)
    check_repository(run, hub)
    messages = [message for _, message, _ in hub.repos[REPO].commits]
    assert messages == ["initial commit", *(f"Publish the evaluation, part {k} of 6" for k in range(1, 7))]
    assert json.loads((run / "published.json").read_text())["commit"] == hub.repos[REPO].head
    assert "above 9 files or 1,000,000,000 bytes: 6 commits of up to 4 files" in capsys.readouterr().out


def test_many_bytes_are_several_commits(run, hub, monkeypatch):
    monkeypatch.setattr(module, "LARGE_BYTES", 9_000)
    monkeypatch.setattr(module, "FILES_PER_COMMIT", 10)
    send(run, hub)
    check_repository(run, hub)
    assert len(hub.repos[REPO].commits) == 4


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("step", ["create", "blob", "commit"])
def test_no_right_to_write(run, hub, step, status):
    hub.fail(STEPS[step], status, body=json.dumps({"error": f"no rights for {TOKEN}"}).encode())
    with pytest.raises(AntherError) as error:
        send(run, hub)
    message = str(error.value)
    assert f"HTTP status {status}: no rights for [token]" in message
    assert "make a token with the right to write to me/flowers" in message
    assert "\n" not in message
    assert hub.count(STEPS["create"]) == 1  # no second attempt
    assert hub.count(STEPS["ask"]) <= 1
    assert not (run / "published.json").exists()


def test_a_namespace_of_others_and_a_wrong_token(run, hub, monkeypatch):
    with pytest.raises(AntherError, match=r"403: You don't have the rights to create a dataset under the namespace"):
        publish(run, "others/flowers", dry_run=False, endpoint=hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(AntherError, match=r"HTTP status 401: Invalid credentials"):
        send(run, hub)
    assert hub.repos == {}


def test_refused_metadata_is_told_before_anything_is_sent(run, hub):
    body = json.dumps({"errors": [{"message": '"license" must be one of [mit]'}], "warnings": []}).encode()
    hub.fail(STEPS["card"], 400, body=body)
    with pytest.raises(AntherError, match=r"400: \"license\" must be one of .*; 0 of .* files are committed: mend"):
        send(run, hub)
    assert hub.received == []
    assert hub.count(STEPS["card"]) == 1


def test_no_token(run, hub, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    for call in (lambda: send(run, hub), lambda: check(REPO, dry_run=False)):
        with pytest.raises(AntherError, match=r"no token .* nothing was sent: log in with `hf auth login`"):
            call()
    assert hub.requests == []
    check(REPO)
    (tmp_path / "login").write_text(f"{TOKEN}\n")  # what `hf auth login` writes
    send(run, hub)
    check_repository(run, hub)


def test_offline(run, hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AntherError, match="HF_HUB_OFFLINE is set"):
        send(run, hub)
    assert publish(run, REPO) is None


@pytest.mark.parametrize(
    "repo_id", ["flowers", "a/b/c", "me/", "/x", "me/fl owers", "me/-x", "me/a--b", "", "me/x.git"]
)
def test_names_are_checked_before_anything(tmp_path, hub, repo_id):
    for dry_run in (True, False):
        with pytest.raises(AntherError, match=r"is no name of a repository .*: write namespace/name"):
            publish(tmp_path / "nowhere", repo_id, dry_run=dry_run, endpoint=hub.url)
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    [
        "records.parquet",
        "metrics.json",
        "dataset/samples.json",
        "dataset/data/000004.png",
        "imagefolder/test/metadata.parquet",
    ],
)
def test_missing_files_are_named(run, hub, name):
    (run / name).unlink()
    for dry_run in (True, False):
        with pytest.raises(AntherError, match=re.escape(Path(name).name)):
            publish(run, REPO, dry_run=dry_run, endpoint=hub.url)
    assert hub.requests == []


def test_the_token_is_nowhere(run, hub, capfd, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    # Its own handler writes to the stderr of whichever test came first.
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "handlers", [])
    caplog.set_level(logging.DEBUG, "huggingface_hub")
    seen = []
    echo = json.dumps({"error": f"bad Bearer {TOKEN}"}).encode()
    publish(run, REPO, endpoint=hub.url)
    for step in ("create", "card", "batch", "blob", "commit"):
        for status in (401, 429, 0):
            hub.repos.clear()
            hub.blobs.clear()
            fault = hub.fail(STEPS[step], status, body=echo, headers={"X-Error-Message": f"for {TOKEN}"})
            with pytest.raises(AntherError) as error:
                send(run, hub)
            fault.times = 0
            seen.extend(traceback.format_exception(error.value))
            # The entry points look at causes and contexts too.
            assert error.value.__cause__ is None
            assert error.value.__context__ is None
    send(run, hub)
    captured = capfd.readouterr()
    seen += [captured.out, captured.err, caplog.text]
    assert "[token]" in "".join(seen)  # it was echoed, so the test can see it
    assert TOKEN not in "".join(seen)
    stored = [*tree(run.parent).values(), *hub.repos[REPO].files().values()]
    assert not any(TOKEN.encode() in content for content in stored)


LOAD = """
import json, sys
from datasets import load_dataset
from huggingface_hub import snapshot_download

repo, local = sys.argv[1:]
answer = {"folder": snapshot_download(repo, repo_type="dataset")}
for name in (repo, local):
    dataset = load_dataset(name, split="test")
    answer[name] = [
        {**row, "image": [row["image"].mode, row["image"].size, list(row["image"].tobytes())]} for row in dataset
    ]
json.dump(answer, sys.stdout)
"""


def environment(hub, tmp_path, **others):
    import os

    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    root = str(Path(module.__file__).parents[2])
    return (
        kept
        | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "PYTHONPATH": root}
        | others
    )


def test_the_published_layout_loads_as_the_card_says(run, hub, tmp_path):
    """By `datasets` from the hub and from a copy on disk, where the card's two keys of configs stand side by side."""
    send(run, hub)
    local = tmp_path / "copy"
    for path, content in hub.repos[REPO].files().items():
        (local / path).parent.mkdir(parents=True, exist_ok=True)
        (local / path).write_bytes(content)
    command = [sys.executable, "-c", LOAD, REPO, str(local)]
    done = subprocess.run(command, env=environment(hub, tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    records = pd.read_parquet(run / "records.parquet")
    embeddings = np.load(run / "embeddings.npy")
    for name in (REPO, str(local)):
        rows = answer[name]
        assert [row["prompt"] for row in rows] == records["prompt"].tolist()
        assert [row["id"] for row in rows] == records["id"].tolist()
        assert [row["clip_score"] for row in rows] == [None if k == 3 else k / 7 for k in range(N)]
        for k, row in enumerate(rows):
            image = Image.open(run / f"images/{k:06d}.png")
            assert row["image"] == [image.mode, list(image.size), list(image.tobytes())]
            np.testing.assert_array_equal(np.float32(row["unet_embedding"]), embeddings[k].ravel())
    snapshot = Path(answer["folder"])
    for path, file in expected(run).items():
        assert (snapshot / path).read_bytes() == file.read_bytes()


def test_the_printed_command_sends_it_by_xet_too(run, hub, tmp_path, capsys):
    pytest.importorskip("hf_xet")
    publish(run, REPO, private=True, licence="cc-by-4.0", endpoint=hub.url, title='it\'s a "title"')
    command = shlex.split(capsys.readouterr().out.partition("To send it: ")[2])
    assert command[0] == "python"
    hub.xet_folder = str(tmp_path / "storage")
    files = list(expected(run).values())
    hub.by_xet = {hashlib.sha256(file.read_bytes()).hexdigest(): file.read_bytes() for file in files}
    from diffusion.curation import card

    card.preview(run).save(tmp_path / "preview.png")
    picture = (tmp_path / "preview.png").read_bytes()
    hub.by_xet[hashlib.sha256(picture).hexdigest()] = picture
    done = subprocess.run(
        [sys.executable, *command[1:]], env=environment(hub, tmp_path), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert hub.count("PUT /storage") == 0
    check_paths = {path: content for path, content in hub.repos[REPO].files().items() if path in expected(run)}
    assert check_paths == {path: file.read_bytes() for path, file in expected(run).items()}
    assert 'pretty_name: it\'s a "title"' in hub.repos[REPO].files()["README.md"].decode()
    assert sum(path.stat().st_size for path in Path(hub.xet_folder).rglob("*") if path.is_file()) > 4000
    assert TOKEN not in done.stdout + done.stderr
    assert (run / "published.json").exists()


def test_another_command_can_be_printed(run, capsys):
    publish(run, REPO, command="python evaluate.py publish.dry_run=false")
    assert capsys.readouterr().out.endswith("To send it: python evaluate.py publish.dry_run=false\n")


@pytest.mark.slow
def test_fiftyone_loads_what_was_published(built, fiftyone, hub, tmp_path):
    from huggingface_hub import snapshot_download

    from diffusion.curation.export import export_fiftyone

    folder = tmp_path / "run"
    shutil.copytree(built, folder)
    export_fiftyone("built", folder)
    export_imagefolder(folder)
    send(folder, hub)
    copy = snapshot_download(REPO, repo_type="dataset", endpoint=hub.url, cache_dir=tmp_path / "cache")
    # The card's own line.
    dataset = fiftyone.Dataset.from_dir(dataset_dir=f"{copy}/test", dataset_type=fiftyone.types.FiftyOneDataset)
    frame = pd.read_parquet(folder / "records.parquet")
    assert len(dataset) == len(frame)
    for sample in dataset:
        row = frame[frame["file"] == f"images/{Path(sample.filepath).name}"].iloc[0]
        assert sample.clip_score == row["clip_score"]
        assert sample.prompt.label == row["prompt"]
        assert Path(sample.filepath).read_bytes() == (folder / row["file"]).read_bytes()
        assert Path(sample.filepath).is_relative_to(copy)
        raw = np.load(folder / "embeddings.npy")[row.name]
        np.testing.assert_allclose(np.float32(sample.unet_embedding), raw.ravel(), rtol=1e-6)
    dataset.delete()

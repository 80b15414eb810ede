"""The numbers of an evaluation: written, read, printed, and everything on one page."""

import csv
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffusion.errors import AntherError
from diffusion.evaluation.metric import Result
from diffusion.evaluation.plots import SCORES, number
from diffusion.files import atomic

GALLERY = 2000  # images on the page; a browser scrolls these without a stutter

# What a metric is called, and one line about what it says.
TITLES: Mapping[str, tuple[str, str]] = {
    "clip_score_100": ("CLIP score × 100", "does the image show what its prompt says"),
    "fid": ("FID", "distance of the generated to the real images, by mean and covariance of Inception features"),
    "kid": ("KID", "the same by a kernel, without FID's bias for small N"),
    "is": ("Inception Score", "sharp and varied, by ImageNet's classes"),
    "precision": ("precision", "share of generated images that could be real ones"),
    "recall": ("recall", "share of real images that could be generated"),
    "classifier_fd": ("Fréchet distance, classifier", "as FID, in the features of the classifier of digits"),
    "classifier_kd": ("kernel distance, classifier", "as KID, in the features of the classifier of digits"),
    "classifier_confidence": ("classifier confidence", "mean probability of what the classifier predicts"),
    "classifier_declined": ("declined", "share of images that the classifier does not want to name"),
    "classifier_accuracy": ("classifier accuracy", "share of accepted images that are what was asked for"),
    "psnr": ("PSNR", "of reconstructions, in dB: mean over the images"),
    "ssim": ("SSIM", "of reconstructions: mean structural similarity, 1 at best"),
    "diversity": ("diversity, random pairs", "mean distance between them, as the project seed 004 computed it"),
    "diversity_pairs": ("diversity, all pairs", "mean distance over every pair"),
    "clip_score": ("CLIP score", "mean cosine of image and prompt"),
    "nearest_distance": ("nearest training image", "mean distance to it; small for a model that memorises"),
    "realism": ("realism", "mean; above 1 an image lies inside the manifold of the real ones"),
    "inception_entropy": ("Inception entropy", "mean over the images, in nats"),
    "uniqueness": ("uniqueness", "mean over the images"),
    "representativeness": ("representativeness, Brain", "mean; 1 is farthest from its cluster's centre"),
    "representativeness_closeness": ("representativeness, closeness", "mean; 1 is closest to its cluster's centre"),
}
FILES: Mapping[str, str] = {
    "images": "the images, lossless PNG, named by id",
    "records.parquet": "a row per image: prompt, seed, guidance weight, sampler, checkpoint, file and every score",
    "embeddings.npy": "the network's embeddings, row i of image i",
    "metrics.json": "every metric with verdict, note and protocol",
    "metrics.csv": "the same numbers as a table",
    "plots": "the pictures of this page",
    "dataset": "the FiftyOne dataset (FiftyOneDataset export)",
    "imagefolder": "the same for Hugging Face datasets",
    "protocol.json": "what this folder was made with",
}


@dataclass(frozen=True)
class Key:
    """A metric's key in its parts: `clip_score_500/ViT-B-32/openai` is clip_score, 500, ViT-B-32/openai."""

    name: str
    n: int | None = None
    scorer: str | None = None

    @property
    def title(self) -> str:
        """What a person calls it."""
        for suffix, said in ((None, ""), ("_std", ", deviation")):
            stem = self.name if suffix is None else self.name.removesuffix(suffix)
            if stem in TITLES:
                return TITLES[stem][0] + said
        return self.name.replace("_", " ")


def split_key(key: str) -> Key:
    """The parts of a metric's key."""
    found = re.fullmatch(r"(?P<name>.+?)_(?P<n>\d+)(?:/(?P<scorer>.+))?", key)
    return Key(found["name"], int(found["n"]), found["scorer"]) if found else Key(key)


# Files ----------------------------------------------------------------------------------------------------------------


def write_metrics(folder: Path, run: Mapping[str, Any], results: Mapping[str, Result]) -> None:
    """Writes `metrics.json` and the same numbers as `metrics.csv`.

    JSON has no NaN and no infinity: such a value becomes null, and a metric's note then says what it was.

    Args:
        folder: of the evaluation.
        run: the facts of the generation.
        results: by key.

    Raises:
        AntherError: the folder cannot be written.
    """
    finite = {key: _finite(result) for key, result in results.items()}
    with atomic(folder / "metrics.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "value", "verdict", "note"])
        writer.writerows([key, result.value, result.verdict, result.note] for key, result in finite.items())
    # The last one: where it is, the stage is over.
    with atomic(folder / "metrics.json") as temporary:
        temporary.write_text(document(run, finite), "utf-8")


def public(run: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a generation as strangers may read them: of the checkpoint's path, only the name."""
    return {**run, "checkpoint": Path(str(run["checkpoint"])).name} if run.get("checkpoint") else dict(run)


def document(run: Mapping[str, Any], results: Mapping[str, Result]) -> str:
    """The content of `metrics.json`; values must be finite."""
    content = {"run": run, "metrics": {key: result.record() for key, result in results.items()}}
    return json.dumps(_plain(content), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_metrics(folder: Path) -> tuple[dict[str, Any], dict[str, Result]]:
    """The facts of the generation, and the metrics by key.

    Raises:
        AntherError: there is no `metrics.json`, or it is damaged.
    """
    path = folder / "metrics.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        results = {key: Result(**record) for key, record in content["metrics"].items()}
        if not all(result.value is None or math.isfinite(result.value) for result in results.values()):
            raise ValueError("a value that is no number")
        return dict(content["run"]), results
    except FileNotFoundError as error:
        raise AntherError(f"there is no {path}: give the folder of a finished run of evaluate.py.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AntherError(f"{path} is damaged: delete it and run evaluate.py again with this hydra.run.dir.") from error


def _finite(result: Result) -> Result:
    if result.value is None:
        return result
    value = float(result.value)
    if math.isfinite(value):
        return replace(result, value=value)
    return replace(result, value=None, note="; ".join(filter(None, [result.note, f"the computation gave {value}"])))


def _plain(value: Any) -> Any:
    """The same in what JSON has."""
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)  # NumPy and torch, or a path


# For people -----------------------------------------------------------------------------------------------------------


def print_metrics(results: Mapping[str, Result]) -> None:
    """Prints every metric with its direction and verdict, and below them each note once."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    notes = list(dict.fromkeys(result.note for result in results.values() if result.note))
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("metric", "value", "", "verdict", "note"):
        table.add_column(title, no_wrap=True, justify="right" if title == "value" else "left")
    for key, result in results.items():
        value = "none" if result.value is None else number(result.value)
        note = f"[{notes.index(result.note) + 1}]" if result.note else ""
        # Text, since a note in brackets is no markup.
        cells = [key, value, _arrow(result), result.verdict or "", note]
        table.add_row(*[Text(cell) for cell in cells], style="dim" if result.value is None else "")
    console = Console()
    # No narrower than it is: a key that is cut cannot be looked for.
    width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.width = max(width, console.width)
    console.print(table)
    for place, note in enumerate(notes, 1):
        console.print(Text(f"[{place}] {note}", style="dim"), soft_wrap=True)
    if any(result.better for result in results.values()):
        console.print(
            "↑ higher is better, ↓ lower is better; the number in a key is N, the images it is from", style="dim"
        )


def _arrow(result: Result) -> str:
    return {"higher": "↑", "lower": "↓", None: ""}[result.better]


def write_report(folder: Path, app_command: str | None = None) -> Path:
    """Writes `report.html`: metrics, pictures, the images with their scores, the protocol and where every file is.

    The page needs nothing but its folder: it links to `images/` and `plots/` by relative paths.

    Args:
        folder: of the evaluation, with `metrics.json` and `records.parquet`.
        app_command: opens the FiftyOne App on the dataset; None leaves it out.

    Returns:
        The page.

    Raises:
        AntherError: a file that it needs is missing or damaged.
    """
    from jinja2 import Environment, StrictUndefined

    from diffusion.curation.records import read

    run, results = read_metrics(folder)
    frame = read(folder)
    scores = [name for name in SCORES if name in frame]
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {"number": number, "url": quote, "shown": _shown}
    text = page.from_string(PAGE).render(
        run=run,
        headlines=_headlines(results),
        rows=[_row(key, result) for key, result in results.items()],
        plots=[name for name in PLOTS if (folder / "plots" / f"{name}.png").exists()],
        captions=PLOTS,
        images=[_image(row, scores) for row in frame.head(GALLERY).to_dict("records")],
        total=len(frame),
        prompts=list(dict.fromkeys(prompt for prompt in frame["prompt"] if prompt is not None)),
        scores={name: SCORES[name] for name in scores},
        small=max(run.get("image_shape") or [0]) < 128,
        files={name: (what, (folder / name).exists()) for name, what in FILES.items()},
        folder=folder,
        app_command=app_command,
    )
    path = folder / "report.html"
    with atomic(path) as temporary:
        temporary.write_text(text, "utf-8")
    return path


def _headlines(results: Mapping[str, Result]) -> list[dict[str, Any]]:
    """The metrics that a reader looks for first, each with the deviation that belongs to it."""
    cards = []
    parts = {key: split_key(key) for key in results}
    for name, (title, meaning) in TITLES.items():
        for key, part in parts.items():
            if part.name != name or (name == "clip_score" and any(p.name == "clip_score_100" for p in parts.values())):
                continue
            spread = next((k for k, p in parts.items() if p == replace(part, name=f"{name}_std")), None)
            cards.append(
                {
                    **_row(key, results[key]),
                    "title": title,
                    "meaning": meaning,
                    "part": part,
                    "std": results[spread].value if spread else None,
                }
            )
    return cards


def _row(key: str, result: Result) -> dict[str, Any]:
    word = (result.verdict or "").split(" ")[0].strip(",:;").lower()
    return {
        "key": key,
        "result": result,
        "arrow": _arrow(result),
        "tone": word if word in ("excellent", "good") else "plain",
    }


def _image(row: Mapping[str, Any], scores: list[str]) -> dict[str, Any]:
    known = {name: float(row[name]) for name in scores if row[name] is not None and math.isfinite(row[name])}
    # A reconstruction has no seed.
    made = f"of {row['original']}" if row.get("original") else f"seed {row.get('seed')}"
    return {**{name: row.get(name) for name in ("id", "prompt", "label", "file")}, "made": made, "scores": known}


def _shown(value: Any) -> str:
    """A leaf of the record."""
    return "none" if value is None else number(value) if isinstance(value, float) else str(value)


PLOTS: Mapping[str, str] = {
    "grid": "The first images",
    "best": "The best images",
    "worst": "The worst images",
    "nearest": "Generated images above their nearest training images",
    "reconstructions": "Real images above what the autoencoder gave back",
    "classes": "Digits by the classifier",
    "accepted": "Digits that the classifier accepts",
    "declined": "Digits that the classifier declines",
    "confused": "Digits that the classifier confuses",
    "prompts": "Score by prompt",
    "histograms": "Distribution of every score",
    "embedding_prompt": "Embeddings by prompt",
    "embedding_score": "Embeddings by score",
}

PAGE = """\
{% macro tree(node) %}
{% if node is mapping %}
<table class="tree">
{% for key, value in node.items() %}
<tr><th>{{ key }}</th><td>{{ tree(value) }}</td></tr>
{% endfor %}
</table>
{% elif node is iterable and node is not string %}
{% for value in node %}{{ tree(value) }}{{ ", " if not loop.last }}{% endfor %}
{% else %}{{ node | shown }}{% endif %}
{% endmacro %}
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Evaluation of {{ run.get("experiment") or "a model" }}</title>
<style>
  :root { --ink: #1d2733; --soft: #5d6b7a; --line: #dfe4ea; --back: #f5f7f9; --blue: #33658a; }
  * { box-sizing: border-box; }
  body { margin: 0 auto; max-width: 1240px; padding: 24px; color: var(--ink); background: white;
    font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
  h1 { margin: 0; font-size: 28px; } h2 { margin: 40px 0 12px; font-size: 20px; }
  p { margin: 4px 0; } .soft { color: var(--soft); } a { color: var(--blue); }
  nav a { margin-right: 16px; }
  code { background: var(--back); border: 1px solid var(--line); border-radius: 4px; padding: 1px 5px; font-size: 13px;
    overflow-wrap: anywhere; }
  .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 12px; }
  .card { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
  .card b { display: block; font-size: 26px; line-height: 1.3; } .card small { color: var(--soft); }
  .card p { font-size: 13px; line-height: 1.4; overflow-wrap: anywhere; }
  .badge { display: inline-block; border-radius: 10px; padding: 0 9px; font-size: 13px; }
  .excellent { background: #cfe8d5; color: #14532d; } .good { background: #dcecf7; color: #1c4966; }
  .plain { background: #f0e6d8; color: #6b4310; }
  .plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 24px; align-items: start; }
  .plots img { width: 100%; border: 1px solid var(--line); border-radius: 8px; }
  figure { margin: 0; }
  .controls { display: flex; flex-wrap: wrap; gap: 16px; margin-bottom: 12px; }
  #gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px; }
  #gallery img { width: 100%; border-radius: 4px; display: block; }
  {{ "#gallery img { image-rendering: pixelated; }" if small }}
  #gallery figcaption { font-size: 12px; line-height: 1.35; padding-top: 4px; overflow-wrap: anywhere; }
  #gallery span { color: var(--soft); white-space: nowrap; }
  table { border-collapse: collapse; font-size: 14px; }
  .all { width: 100%; } .all > tbody > tr > td, .all > thead > tr > th { border-bottom: 1px solid var(--line);
    padding: 5px 10px 5px 0; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
  .all .value { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
  .tree th { text-align: left; vertical-align: top; padding: 1px 14px 1px 0; color: var(--soft); font-weight: 400;
    white-space: nowrap; }
  .tree td { padding: 1px 0; overflow-wrap: anywhere; } summary { cursor: pointer; color: var(--blue); }
</style>

<h1>Evaluation of {{ run.get("experiment") or "a model" }}</h1>
<p class="soft">{{ total }} images
{%- if run.get("guidance_weight") is not none %}, guidance weight w = {{ run["guidance_weight"] }}{% endif %}
{%- if run.get("guidance_interval") %} at noise levels {{ run["guidance_interval"] | join(" to ") }}{% endif %}
{%- if run.get("guidance_rescale") %}, rescaled by {{ run["guidance_rescale"] }}{% endif %}
{%- if run.get("guidance_negative") %}, away from “{{ run["guidance_negative"] }}”{% endif %}
{%- if run.get("guidance_bad_sha256") %}, away from a worse model{% endif %}
{%- if run.get("steps") %}, {{ run["steps"] }} steps{% endif %}
{%- if run.get("data") %}; data: {{ run["data"] }}{% endif %}
{%- if run.get("made") %}; made {{ run["made"] }}{% endif %}</p>
<nav><a href="#metrics">Metrics</a><a href="#pictures">Pictures</a><a href="#images">Images</a>
<a href="#protocol">Protocol</a><a href="#files">Files</a></nav>

<h2 id="metrics">Metrics</h2>
<div class="cards">
{% for card in headlines %}
<div class="card">{{ card.title }} <small>{{ "N = %d" | format(card.part.n) if card.part.n }}</small>
{% if card.result.value is none %}<b class="soft">none</b>{% else %}
<b>{{ card.result.value | number }}{% if card.std is not none %} <small>± {{ card.std | number }}</small>{% endif %}</b>
{% endif %}
{% if card.result.verdict %}<span class="badge {{ card.tone }}">{{ card.result.verdict }}</span>{% endif %}
{% if card.result.better %}<p class="soft">{{ card.arrow }} {{ card.result.better }} is better</p>{% endif %}
<p>{{ card.meaning }}</p>
{% if card.part.scorer %}<p class="soft">by {{ card.part.scorer }}</p>{% endif %}
{% if card.result.note %}<p class="soft">{{ card.result.note }}</p>{% endif %}
</div>
{% endfor %}
</div>
<p></p>
<details><summary>Every metric under its key, with its protocol</summary>
<table class="all"><thead><tr><th>key</th><th class="value">value</th><th></th><th>verdict</th><th>note</th>
<th>protocol</th></tr></thead><tbody>
{% for row in rows %}
<tr><td><code>{{ row.key }}</code></td>
<td class="value">{{ "none" if row.result.value is none else row.result.value | number }}</td><td>{{ row.arrow }}</td>
<td>{{ row.result.verdict or "" }}</td><td>{{ row.result.note or "" }}</td><td>
{% if row.result.protocol %}<details><summary>protocol</summary>{{ tree(row.result.protocol) }}</details>{% endif %}
</td></tr>
{% endfor %}
</tbody></table></details>

<h2 id="pictures">Pictures</h2>
<div class="plots">
{% for name in plots %}
<figure><a href="plots/{{ name }}.png"><img src="plots/{{ name }}.png" alt="{{ captions[name] }}"></a>
<figcaption class="soft">{{ captions[name] }}</figcaption></figure>
{% endfor %}
</div>

<h2 id="images">Images</h2>
<p class="soft">{{ "All %d images." | format(total) if images | length == total else
"The first %d of %d images; all are in images/ and records.parquet." | format(images | length, total) }}
A click opens the file.</p>
<div class="controls">
<label>sort by <select id="by"><option value="id">id</option>
{% for name, score in scores.items() %}<option value="{{ name }}">{{ score.title }}</option>
{% endfor %}</select></label>
<label><input type="checkbox" id="down"> largest first</label>
{% if prompts %}<label>prompt <select id="of"><option value="">all</option>
{% for prompt in prompts %}<option>{{ prompt }}</option>
{% endfor %}</select></label>{% endif %}
</div>
<div id="gallery">
{% for image in images %}
<figure data-id="{{ loop.index0 }}" data-prompt="{{ image.prompt or "" }}"
{%- for name, value in image.scores.items() %} data-{{ name }}="{{ value }}"{% endfor %}>
<a href="{{ image.file | url }}"><img src="{{ image.file | url }}" loading="lazy" alt="image {{ image.id }}"></a>
<figcaption>{{ image.prompt or image.label or "" }}{{ "<br>" | safe if image.prompt or image.label }}
<span>{{ image.id }} · {{ image.made }}</span>
{% for name, value in image.scores.items() %}
<br><span title="{{ scores[name].title }}, {{ scores[name].unit }}">{{ scores[name].short }} {{ value | number }}</span>
{% endfor %}
</figcaption></figure>
{% endfor %}
</div>
<script>
  const gallery = document.getElementById("gallery"), by = document.getElementById("by");
  const down = document.getElementById("down"), of = document.getElementById("of");
  function arrange() {
    const value = (figure) => parseFloat(figure.getAttribute("data-" + by.value));
    const sign = down.checked ? -1 : 1;
    const last = (x) => Number.isNaN(x);  // images without the score stay at the end
    const order = (a, b) => last(value(a)) - last(value(b)) || sign * (value(a) - value(b)) || 0;
    [...gallery.children].sort(order).forEach((figure) => {
      figure.hidden = Boolean(of && of.value && figure.dataset.prompt !== of.value);
      gallery.append(figure);
    });
  }
  [by, down, of].forEach((control) => control && control.addEventListener("change", arrange));
  arrange();  // a browser remembers the controls of the last visit
</script>

<h2 id="protocol">Protocol</h2>
{{ tree(run) }}

<h2 id="files">Files</h2>
{% if app_command %}<p>The images in the FiftyOne App: <code>{{ app_command }}</code></p>{% endif %}
<p>Everything is in <code>{{ folder }}</code>:</p>
<table class="tree">
{% for name, (what, there) in files.items() %}
<tr><th><a href="{{ name | url }}">{{ name }}</a></th><td>{{ what }}
{%- if not there %} (not there when this page was written){% endif %}</td></tr>
{% endfor %}
</table>
</html>
"""

"""The card of a published dataset: README.md, from the files of a run alone."""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from diffusion.curation import records
from diffusion.evaluation.distribution import MINIMUM
from diffusion.evaluation.report import public, read_metrics
from diffusion.images import from_uint8, read_pngs, sheet

if TYPE_CHECKING:
    from PIL import Image

PREVIEW = "preview.png"
PREVIEW_IMAGES = 12
PREVIEW_COLUMNS = 4
PROMPTS_SHOWN = 40
PROMPTS_FILE = "prompts.yaml"
LONGEST_WORD = 2**17 - 1  # bytes of one word of a command, on Linux
SAMPLERS = Path(__file__).parents[2] / "conf" / "sampler"

# As the seeds' guide prints it; the FiftyOneDataset export lies at `test/` in the repository.
SEEDS_HEADER = """\
dataset_info:
  configs:
  - config_name: default
    data_files:
    - split: test
      path: "test/samples.json"
"""

SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (math.inf, "1M<n<10M"))


def card(folder: Path | str, repo_id: str, title: str, licence: str) -> str:
    """The README.md of a dataset repository.

    Its YAML header holds the seeds' `dataset_info`, which `datasets` passes over, and the `configs` by which
    `datasets` and the hub's viewer find the images in `test/data/`.

    Args:
        folder: of the run: `records.parquet`, `metrics.json` and `images/` are read.
        repo_id: "namespace/name" of the repository.
        title: in words.
        licence: of the images: an identifier of the hub such as "cc-by-4.0", or words.

    Raises:
        AntherError: a file of the run is missing or damaged.
    """
    folder = Path(folder)
    frame, (run, results) = records.read(folder), read_metrics(folder)
    run, metrics = public(run), {key: result.record() for key, result in results.items()}
    prompts = [prompt for prompt in frame["prompt"].tolist() if prompt] if "prompt" in frame else []
    overrides = list(_overrides(run, len(frame)))
    sections = (
        f"---\n{_header(len(frame), bool(prompts), title, licence)}---",
        f"# {text(title)}",
        f"![A sheet of images from this dataset]({PREVIEW})",
        _about(len(frame), frame.columns),
        "## Metrics",
        "\n".join(_table(("metric", "value", "better", "verdict", "note"), _metric_rows(metrics))),
        "The number of images is part of a metric's name: values of different numbers of images are not comparable.",
        "## How it was made",
        f"```bash\n{' '.join(['python', 'evaluate.py', *map(_shell, overrides)])}\n```",
        *_beside_the_command(run, overrides),
        "\n".join(_table(("", ""), _run_rows(run, frame))),
        *_prompts(prompts),
        "## How to load it",
        _loading(repo_id),
        "## Limitations",
        "\n".join(f"- {line}" for line in _limitations(run, metrics, len(frame), frame.columns)),
        "## Protocol",
        "How the images were made and how every number was computed, as recorded by the run.",
        f"<details><summary>Protocol</summary>\n\n```json\n{_protocol(run, metrics)}\n```\n\n</details>",
        "## Licence",
        _licence(licence),
    )
    return "\n\n".join(sections) + "\n"


def preview(folder: Path | str) -> "Image.Image":
    """A sheet of up to 12 images with their prompts, spread evenly over the run."""
    import numpy as np

    frame = records.read(folder)
    picked = frame.iloc[np.linspace(0, len(frame) - 1, min(PREVIEW_IMAGES, len(frame))).round().astype(int)]
    images = read_pngs([Path(folder) / name for name in picked["file"]])
    named = picked["prompt"].tolist() if "prompt" in picked else [None] * len(picked)
    captions = [shorten(_line(prompt or key), 70) for prompt, key in zip(named, picked["id"], strict=True)]
    scale = max(1, 144 // images.shape[-1])
    return sheet(from_uint8(images), captions, PREVIEW_COLUMNS, scale)


def text(value: object) -> str:
    """A value as one line of Markdown that shows it as it is, in a table too."""
    return re.sub(r"([\\`*_{}\[\]<>|~#$])", r"\\\1", _line(value).replace("&", "&amp;"))


def _line(value: object) -> str:
    return "".join(character for character in " ".join(str(value).split()) if character.isprintable())


def _header(count: int, has_prompts: bool, title: str, licence: str) -> str:
    import yaml

    identifier = licence.strip().lower()
    named = {"license": identifier}
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", identifier):
        named = {"license": "other", "license_name": re.sub(r"[^a-z0-9]+", "-", identifier).strip("-") or "unnamed"}
    data = {
        "configs": [{"config_name": "default", "data_files": [{"split": "test", "path": "test/data/*"}]}],
        "pretty_name": _line(title),
        **named,
        "task_categories": ["text-to-image" if has_prompts else "unconditional-image-generation"],
        "size_categories": [next(name for limit, name in SIZES if count < limit)],
        "tags": ["fiftyone", "image", "diffusion", "synthetic", "anther"],
    }
    return SEEDS_HEADER + yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)


def _table(head: Sequence[str], rows: Iterator[Sequence[object]]) -> Iterator[str]:
    for line in (head, ["---"] * len(head)):
        yield f"| {' | '.join(line)} |"
    for row in rows:
        yield f"| {' | '.join(map(text, row))} |"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _about(count: int, columns: Sequence[str]) -> str:
    scores = [name for name in columns if name not in ("id", "file", "checkpoint")]
    return (
        f"This dataset contains the FiftyOne export of the diffusion evaluation: {count} generated images.\n\n"
        "- **Split**: Test / Evaluation\n"
        "- **Format**: FiftyOneDataset, in `test/`; `test/data/metadata.parquet` lets `datasets` load the same images\n"
        f"- **Per image**: {', '.join(f'`{name}`' for name in scores)}\n"
        "- **Beside it**, where the run made them: `metrics.json`, `metrics.csv`, `plots/`, `records.parquet`, "
        "`embeddings.npy`; an image that `records.parquet` calls `images/NAME` is `test/data/NAME` here, and row i of "
        "the embeddings belongs to record i"
    )


def _metric_rows(metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[Sequence[object]]:
    for key, metric in metrics.items():
        words = (metric.get(name) or "" for name in ("better", "verdict", "note"))
        yield key, _number(metric.get("value")), *words


def _overrides(run: Mapping[str, Any], count: int) -> Iterator[str]:
    """The settings of evaluate.py that draw the images again and score them, whatever the model's own are."""
    if run.get("checkpoint"):
        yield f"ckpt={_value(run['checkpoint'])}"
    if run.get("prompts"):
        listed = f"prompts={_value(run['prompts'])}"
        fits = len(listed.encode()) <= LONGEST_WORD and "\0" not in listed
        yield listed if fits else f"prompts={PROMPTS_FILE}"
    yield f"num_images={count}"
    if run.get("reconstruct"):
        yield f"reconstruct={_value(run['reconstruct'])}"
    elif run.get("seed") is not None:
        yield f"seed={run['seed']}"
    if run.get("guidance_weight") is not None:
        # The record has None for everywhere and for no rescaling, and metrics.json for infinity.
        interval = run.get("guidance_interval") or [0, None]
        yield f"guidance.weight={run['guidance_weight']}"
        yield f"guidance.interval={_value([math.inf if level is None else level for level in interval])}"
        yield f"guidance.rescale={run.get('guidance_rescale') or 0}"
    if run.get("guidance_negative") is not None:
        yield f"guidance.negative={_value(run['guidance_negative'])}"
    if run.get("sampler"):
        yield from _sampler(run["sampler"])
    if run.get("batch_size") is not None:
        yield f"batch_size={run['batch_size']}"
    if "embedding" in run and run["embedding"] is None:
        yield "embedding=null"
    for key, value in (run.get("embedding") or {}).items():
        if value != []:
            yield f"embedding.{key}={_value(value)}"
    if run.get("precision") not in (None, "32-true"):
        yield f"trainer.precision={_value(run['precision'])}"
    yield from _scoring(run.get("scored_with") or {}, count)


def _scoring(scored: Mapping[str, Any], count: int) -> Iterator[str]:
    """The settings that score the images as they were scored; what scored none is left out, or it might refuse them."""
    if (clip := scored.get("clip")) is None:
        yield "clip=null"
    else:
        model, _, pretrained = clip["name"].rpartition("/")
        yield f"clip.model={_value(model)}"
        yield f"clip.pretrained={_value(pretrained)}"
    if (inception := scored.get("inception")) is None:
        # How many reals there were is not recorded then, so few are allowed.
        left_out = ("inception.missing=leave_out", "inception.few_images=allow")
        yield from left_out if scored.get("left_out") else ("inception=null",)
    else:
        yield f"inception.split={_value(inception['split'])}"
        yield f"inception.one_channel={_value(inception['one_channel'])}"
        if min(count, inception["N_real"]) < MINIMUM:
            yield "inception.few_images=allow"
    if (near := scored.get("nearest")) is None:
        yield "nearest=null"
    else:
        yield f"nearest.space={_value(near['space'])}"
        yield f"nearest.split={_value(near['split'])}"
    if (classifier := scored.get("classifier")) is not None:
        settings = {"weights": classifier["classifier"], **{key: classifier[key] for key in ("threshold", "split")}}
        yield f"classifier={_value(settings)}"


def _sampler(record: Mapping[str, Any]) -> Iterator[str]:
    """A sampler as the option of conf/sampler that has its settings, each named; as a mapping where none has."""
    import yaml

    options = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted(SAMPLERS.glob("*.yaml"))}
    fitting = {
        name: option
        for name, option in options.items()
        if option.get("_target_") == record.get("_target_") and option.keys() <= record.keys()
    }
    if not fitting:
        yield f"+sampler={_value(record)}"
        return
    name = max(fitting, key=lambda name: len(fitting[name]))
    yield f"sampler={name}"
    for key, value in record.items():
        if key != "_target_":
            yield f"{'' if key in fitting[name] else '+'}sampler.{key}={_value(value)}"


def _value(value: Any) -> str:
    """A plain value in the words of Hydra's overrides."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_value, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower()
    if re.fullmatch(r"(?!(?:null|true|false|inf|nan)$)[a-z_][\w./-]*", value, re.ASCII | re.IGNORECASE):
        return value
    from hydra.core.override_parser.types import Quote, QuotedString

    # OmegaConf, behind Hydra, reads ${ as the beginning of an interpolation.
    escaped = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", value)
    return QuotedString(escaped, Quote.double).with_quotes()


def _shell(word: str) -> str:
    """A word as bash reads it, on one line of the page whatever it holds."""
    if word.isprintable():
        return shlex.quote(word)
    plain = (c if c.isprintable() and c not in "\\'" else "".join(f"\\x{b:02x}" for b in c.encode()) for c in word)
    return f"$'{''.join(plain)}'"


def _beside_the_command(run: Mapping[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    """What belongs to the command and cannot stand in it."""
    if run.get("checkpoint") and not str(run["checkpoint"]).endswith(".ckpt"):
        yield "Weights without a config need `model=` too, the experiment or the config that describes them."
    if f"prompts={PROMPTS_FILE}" in overrides:
        yield f"`{PROMPTS_FILE}` stands for a file of the list `prompts` of the protocol, which no command holds."
    if (digest := run.get("guidance_bad_sha256")) is not None:
        yield f"Add `guidance.bad=`, the path of the worse model, whose sha256 is {text(digest)}."
    if run.get("reconstruct"):
        yield (
            f"The originals are of the training data, digest {text(run.get('data_digest'))}; `data.path=` says "
            "where these lie, if not where they lay in training."
        )
    scored = run.get("scored_with") or {}
    clip, inception, classifier = (scored.get(part) or {} for part in ("clip", "inception", "classifier"))
    if inception:
        digest = text(inception.get("weights_sha256"))
        yield f"The Inception is that with sha256 {digest}; `inception.weights=` takes a file of it."
    for name, digest in (
        (str(clip.get("name")).rpartition("/")[2], clip.get("weights")),
        (str(classifier.get("classifier")), classifier.get("weights_sha256")),
    ):
        if Path(name).suffix:
            yield f"{text(name)} stands for a file of weights, whose sha256 is {text(digest)}."


def _run_rows(run: Mapping[str, Any], frame: Any) -> Iterator[Sequence[object]]:
    seeds = frame["seed"].dropna().tolist() if "seed" in frame else []
    facts = {
        "experiment": run.get("experiment"),
        "checkpoint": run.get("checkpoint"),
        "checkpoint, sha256": run.get("checkpoint_sha256"),
        "validation loss": run.get("validation_loss"),
        "parameters": run.get("parameters"),
        "training data": run.get("data"),
        "training data, digest": run.get("data_digest"),
        "conditioner": run.get("conditioner"),
        "image shape": run.get("image_shape"),
        "images": len(frame),
        "reconstructions of the split": run.get("reconstruct"),
        "seeds": f"{min(seeds)} to {max(seeds)}, one per image" if seeds else None,
        "guidance weight": run.get("guidance_weight"),
        "guidance interval, sigma / alpha": run.get("guidance_interval"),
        "guidance rescale": run.get("guidance_rescale"),
        "guidance away from": run.get("guidance_negative"),
        "guidance away from, sha256": run.get("guidance_bad_sha256"),
        "sampler": run.get("sampler"),
        "steps": run.get("steps"),
        "T": run.get("T"),
        "embedding": run.get("embedding"),
        "versions": run.get("versions"),
        "made": run.get("made"),
    }
    for name, value in facts.items():
        if value is not None:
            yield name, json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else _number(value)


def _prompts(prompts: Sequence[str]) -> Iterator[str]:
    if not prompts:
        return
    counts = Counter(prompts)
    shown = list(counts.items())[:PROMPTS_SHOWN]
    yield "\n".join(_table(("prompt", "images"), iter(shown)))
    if len(counts) > len(shown):
        yield f"{len(counts) - len(shown)} more prompts are in `records.parquet`."


def _loading(repo_id: str) -> str:
    return f"""With [FiftyOne](https://docs.voxel51.com):

```python
import fiftyone as fo
from huggingface_hub import snapshot_download

folder = snapshot_download("{repo_id}", repo_type="dataset")
dataset = fo.Dataset.from_dir(dataset_dir=f"{{folder}}/test", dataset_type=fo.types.FiftyOneDataset)
session = fo.launch_app(dataset)
```

With [datasets](https://huggingface.co/docs/datasets):

```python
from datasets import load_dataset

dataset = load_dataset("{repo_id}", split="test")
```"""


def _limitations(
    run: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]], count: int, columns: Sequence[str]
) -> Iterator[str]:
    shape = run.get("image_shape")
    if shape:
        yield (
            f"The images have {shape[-1]} × {shape[-2]} pixels and {shape[0]} channel{'s' * (shape[0] > 1)}: at this "
            "resolution the model captures only a limited aspect of its subjects."
        )
    yield f"{count} images were made and scored; FID and its like are biased by this number."
    weight = run.get("guidance_weight")
    if weight is not None:
        yield (
            f"All images were made with the guidance weight w = {_number(weight)} (e = (1 + w) e_c − w e_u; the "
            "papers' scale is 1 + w): a higher weight follows the prompt more closely and makes the images more alike."
        )
    for note in dict.fromkeys(_line(metric["note"]) for metric in metrics.values() if metric.get("note")):
        keys = ", ".join(text(key) for key, metric in metrics.items() if _line(metric.get("note") or "") == note)
        yield f"{keys}: {text(note)}"
    if "nearest_distance" in columns:
        yield "A model may repeat its training images: `nearest_distance` and `nearest_real` say how close each comes."
    yield (
        "Every image has its own seed, but full determinism is not guaranteed: operations of GPUs differ between "
        "machines and versions, and so do times and memory."
    )


def _protocol(run: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> str:
    protocols = {key: metric["protocol"] for key, metric in metrics.items()}
    return json.dumps({"run": run, "metrics": protocols}, indent=2)


def _licence(licence: str) -> str:
    if licence.strip().lower() == "unknown":
        return "None was stated by the publisher."
    return f"The images: {text(licence)}."

"""One run of evaluate.py: generate, score, report, curate, publish; each stage is on disk before the next begins."""

import importlib.util
import shlex
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from diffusion.build import build, closest, construct
from diffusion.checkpoint import load_guidance
from diffusion.curation import publish
from diffusion.curation.export import DATASET, IMAGEFOLDER, export_fiftyone, export_imagefolder, exported_name
from diffusion.errors import AntherError, install
from diffusion.evaluation.embeddings import Embedding
from diffusion.evaluation.fidelity import fidelity
from diffusion.evaluation.generate import Made, Plan, assemble, check, claim, file_scores, generate
from diffusion.evaluation.metric import Result
from diffusion.evaluation.prompts import labels_of, read_prompts
from diffusion.evaluation.reals import Reals, read_reals
from diffusion.evaluation.report import TITLES, print_metrics, read_metrics, split_key, write_metrics, write_report
from diffusion.evaluation.scoring import Scorers
from diffusion.evaluation.subject import CONF, Subject, load_data, load_subject
from diffusion.fabric import make_fabric, on_rank_zero
from diffusion.files import sha256
from diffusion.images import PngFiles, from_uint8
from diffusion.modules.generator import Generator
from diffusion.samplers import Sampler

LIBRARIES = (
    *("torch", "torchvision", "lightning", "torchmetrics", "open_clip_torch", "torch-fidelity"),
    *("fiftyone", "fiftyone-brain", "scikit-learn"),
)


def evaluate(config: Mapping[str, Any], folder: Path) -> float | None:
    """Evaluates what the config describes, going on where an earlier run in the folder stopped.

    Args:
        config: that of conf/evaluate.yaml, resolved.
        folder: of the run.

    Returns:
        The metric named `objective`, where it was computed.

    Raises:
        AntherError: any fault that the user can mend.
    """
    _check_installed(config)
    _check_app(config, folder)
    _check_repository(config, folder)
    fabric = make_fabric(config["trainer"])
    fabric.launch()
    subject = load_subject(config["ckpt"], config["model"])
    subject.model.to(fabric.device)
    datamodule = load_data(subject.config, **config["data"]) if _needs_data(config, subject) else None
    plan = make_plan(config, subject, datamodule)
    check(subject.model, plan)

    def prepare() -> Scorers:
        # Weights and statistics come first: hours of drawing must not end in a file that is missing.
        # So do the database and the name in it.
        if _is_to_curate(config, folder):
            _dataset_name(config["dataset"]["name"], folder)
        scorers = Scorers(config, subject, datamodule, str(fabric.device))
        claim(folder, protocol(plan))
        _announce(subject, plan, scorers, folder)
        return scorers

    scorers = on_rank_zero(fabric, prepare)
    made = generate(subject.model, plan, folder, fabric.global_rank, fabric.world_size, fabric.autocast)
    fabric.barrier()
    if scorers is None:
        return None
    results = _score(scorers, subject, plan, made, folder, every=config["dataset"] is not None)
    if not (folder / "report.html").exists():
        _report(config, scorers, plan, folder)
    print_metrics(results)
    _track(config, folder)
    if config["dataset"] is not None:
        if _is_to_curate(config, folder):
            _curate(config["dataset"]["name"], folder)
        write_report(folder, app_command(folder))
    _publish(config, folder)
    _farewell(config, folder)
    if config["app"]:
        from diffusion.curation.app import open_app

        open_app(folder)
    return _objective(config["objective"], results)


def make_plan(config: Mapping[str, Any], subject: Subject, datamodule: Any) -> Plan:
    """What is drawn: the model's own settings, where the config does not choose others.

    Args:
        config: that of conf/evaluate.yaml, resolved.
        subject: whose images.
        datamodule: its data, for the names of classes; None where they are not needed.

    Raises:
        AntherError: the config asks for something that the model cannot do.
    """
    model = subject.model
    classes = tuple(datamodule.class_names if datamodule else subject.config.get("data", {}).get("classes") or ())
    captions = {name: datamodule.caption(name) for name in classes} if hasattr(datamodule, "caption") else {}
    asked = None if model.conditioner is None and config["prompts"] == "classes" else config["prompts"]
    prompts = read_prompts(asked, classes, captions)
    own, chosen = subject.config["module"].get("sampler"), config.get("sampler")
    sampler: Sampler | None = model.sampler if chosen is None else build(chosen, "sampler")
    record = own if chosen is None else chosen
    split = config["reconstruct"]
    weight, bad, wanted = config["guidance"]["weight"], config["guidance"]["bad"], config["embedding"]
    return Plan(
        prompts=None if prompts is None else tuple(prompts),
        labels=None if prompts is None else tuple(labels_of(prompts, classes, captions)),
        num_images=config["num_images"],
        first_seed=config["seed"],
        weight=model.weight if weight is None else weight,
        sampler=sampler,
        sampler_record=None if record is None else dict(record),
        T=model.T,
        batch_size=config["batch_size"],
        embedding=None if wanted is None else _embedding(wanted, model),
        checkpoint_sha256=subject.sha256,
        guidance=load_guidance(config["guidance"], model),
        bad_sha256=None if bad is None else sha256(bad),
        originals=None if split is None else read_reals(datamodule, split).spread(config["num_images"]),
        precision=str(config["trainer"]["precision"]),
        model_config_sha256=subject.model_config_sha256,
    )


def _embedding(node: Any, model: Generator) -> Embedding:
    if isinstance(node, Mapping) and node.get("layer") is None:
        node = {**node, "layer": model.bottleneck}
    embedding: Embedding = construct(Embedding, node, "embedding")
    return embedding


def protocol(plan: Plan) -> dict[str, Any]:
    """All that the images and embeddings of a folder depend on, as plain values."""
    return {
        "checkpoint_sha256": plan.checkpoint_sha256,
        "prompts": None if plan.prompts is None else list(plan.prompts),
        "num_images": plan.num_images,
        "seed": plan.first_seed,
        "guidance_weight": plan.weight,
        **plan.guidance.record(),
        "guidance_bad_sha256": plan.bad_sha256,
        "sampler": None if plan.sampler_record is None else dict(plan.sampler_record),
        "steps": plan.steps,
        "batch_size": plan.batch_size,
        "embedding": None if plan.embedding is None else asdict(plan.embedding),
        # Not there where nothing else was chosen: folders that were made before there was any choice go on.
        **({} if plan.precision == "32-true" else {"precision": plan.precision}),
        **({} if plan.model_config_sha256 is None else {"model_config_sha256": plan.model_config_sha256}),
        **({} if plan.originals is None else _reconstructed(plan.originals)),
    }


def _reconstructed(originals: Reals) -> dict[str, Any]:
    return {"reconstruct": originals.split, "originals_digest": originals.identity, "seed": None}


def _check_installed(config: Mapping[str, Any]) -> None:
    wanted = {
        "pandas": True,
        "pyarrow": True,
        "jinja2": True,
        "sklearn": config["embedding"] is not None,
        "umap": config["embedding"] is not None,
        "torch_fidelity": config["inception"] is not None or config["classifier"] is not None,
        "scipy": config["classifier"] is not None,
        "fiftyone": config["dataset"] is not None,
    }
    missing = [name for name, needed in wanted.items() if needed and importlib.util.find_spec(name) is None]
    if missing:
        raise AntherError(
            f"evaluating needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed: "
            f"{install('eval,offline')}."
        )
    if (name := config["objective"]) is not None and name.removesuffix("_std") not in TITLES:
        raise AntherError(f"objective={name} is no metric{closest(name, TITLES)}: choose one of {', '.join(TITLES)}.")
    if config["publish"]["repo_id"] is not None and config["dataset"] is None:
        raise AntherError("publish.repo_id publishes what dataset=null leaves out: drop one of the two.")
    if config["publish"]["repo_id"] is not None:
        publish.check(config["publish"]["repo_id"], config["publish"]["dry_run"])


def _check_app(config: Mapping[str, Any], folder: Path) -> None:
    if not config["app"]:
        return
    if config["dataset"] is None:
        raise AntherError(
            "app=true shows the data set that dataset=null leaves out: drop one of the two, or look at the run "
            f"afterwards with `{app_command(folder)}`."
        )
    if (sweep := config["sweep_dir"]) is not None:
        gather = shlex.join(["python", "-m", "diffusion.curation.gather", sweep])
        raise AntherError(
            "app=true would hold the sweep at this job until Ctrl-C: leave it out, and look at the job afterwards with "
            f"`{app_command(folder)}`, or gather all jobs into one data set with `{gather} --name NAME`."
        )


def _check_repository(config: Mapping[str, Any], folder: Path) -> None:
    sweep, repo_id = config["sweep_dir"], config["publish"]["repo_id"]
    if sweep is not None and repo_id is not None and _is_of_all_jobs(repo_id, Path(sweep)):
        raise AntherError(
            f"publish.repo_id={repo_id} is that of all jobs of the sweep, of which the last one's files alone would "
            f"stay there: leave it out, and publish one job afterwards with `{_sending(config, folder)}`."
        )


def _is_of_all_jobs(repo_id: str, sweep: Path) -> bool:
    # Hydra's sweeper leaves what it began with, before anything was swept. A search leaves nothing, and has no
    # repository for each of its trials.
    begun = sweep / "multirun.yaml"
    return not begun.exists() or yaml.safe_load(begun.read_text("utf-8"))["publish"]["repo_id"] == repo_id


def _needs_data(config: Mapping[str, Any], subject: Subject) -> bool:
    by_class = config["prompts"] == "classes" and subject.model.conditioner is not None
    return by_class or any(config[name] is not None for name in ("reconstruct", "inception", "nearest", "classifier"))


def _facts(subject: Subject, plan: Plan, made: Made, scorers: Scorers) -> dict[str, Any]:
    """Who drew the images, and how."""
    conditioner = subject.model.conditioner
    versions = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "experiment": subject.config.get("name"),
        "checkpoint": subject.path,
        "validation_loss": subject.validation_loss,
        "parameters": subject.parameters,
        "T": plan.T,
        "image_shape": list(subject.model.image_shape),
        "conditioner": "none" if conditioner is None else conditioner.describe(),
        "caution": _caution(subject, plan, scorers),
        "data": _data_name(subject),
        "data_digest": scorers.data_digest,
        "versions": versions,
        # Part of the images may have been there already; then nobody knows how long all of them took.
        "seconds": made.seconds if made.images == plan.num_images else None,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        **protocol(plan),
    }


def _caution(subject: Subject, plan: Plan, scorers: Scorers) -> str | None:
    """What a reader of the numbers must know: foreign weights under guidance, reals that are not those of training."""
    found: list[str] = []
    # A negative prompt needs no null condition.
    if plan.model_config_sha256 is not None and plan.weight and plan.guidance.negative is None:
        found += filter(None, [subject.config.get("guided_elsewhere")])
    if others := scorers.other_splits:
        found.append(f"the data are not those of the training: other images in {', '.join(others)}")
    return "; ".join(found) or None


def _data_name(subject: Subject) -> str | None:
    """What a person calls the data: their own name, else what `data=` calls the only config of their class."""
    node = subject.config.get("data", {})
    if name := node.get("name"):
        return str(name)
    target = str(node.get("_target_", ""))
    configs = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in sorted((CONF / "data").glob("*.yaml"))}
    # The class of a folder says nothing of what is in it: its configs have a `name`, which may be null.
    known = [stem for stem, config in configs.items() if config.get("_target_") == target and "name" not in config]
    return known[0] if len(known) == 1 else target.rpartition(".")[2] or None


def _score(
    scorers: Scorers, subject: Subject, plan: Plan, made: Made, folder: Path, *, every: bool
) -> Mapping[str, Result]:
    """The metrics of the folder's images, computed now or found as they were left.

    What later stages made of other metrics is removed, so that they begin anew although a kill may come in between.

    Args:
        scorers: the metrics.
        subject: who drew the images.
        plan: of the images.
        made: what was drawn by this process.
        folder: of the run.
        every: clusters are fitted to all embeddings however many there are, as FiftyOne will do; else to a choice of
            very many, which bounds memory.
    """
    from diffusion.curation import brain
    from diffusion.evaluation import embeddings

    metrics = folder / "metrics.json"
    before = read_metrics(folder) if metrics.exists() else None
    frame = assemble(plan, folder)
    rows = None if plan.embedding is None else embeddings.open_rows(folder)
    identity = scorers.identity
    if rows is not None and not every and not brain.fits_all(rows):
        identity["representativeness"] = "clusters of a choice of the embeddings"
    # Where the records had to be made anew, the file is gone by now.
    as_left = made.images == 0 and metrics.exists()
    if as_left and before is not None and before[0].get("scored_with") == identity:
        print(f"{folder} is scored already; to score anew delete {metrics}.")
        return before[1]
    run = {**_facts(subject, plan, made, scorers), "scored_with": identity}
    if before is not None and run["seconds"] is None:
        run["seconds"] = before[0].get("seconds")
    images = PngFiles([folder / name for name in frame["file"]])
    prompts = None if plan.prompts is None else list(frame["prompt"])
    labels = [label if isinstance(label, str) else None for label in frame["label"]]
    scores = scorers.score(images, prompts, labels, protocol(plan), folder)
    if plan.originals is not None:
        scores.add(fidelity(images, plan.originals.pixels), {"psnr": "higher", "ssim": "higher"}, protocol(plan))
    if rows is not None:
        for name, column in brain.scores(rows, every).items():
            scores.add({name: column}, {}, {"definition": brain.DEFINITIONS[name], **protocol(plan)})
    file_scores(plan, folder, scores.columns)
    (folder / "report.html").unlink(missing_ok=True)
    shutil.rmtree(folder / DATASET, ignore_errors=True)
    write_metrics(folder, run, scores.results)
    return scores.results


def _report(config: Mapping[str, Any], scorers: Scorers, plan: Plan, folder: Path) -> None:
    from diffusion.evaluation.plots import draw_plots

    training, originals = scorers.training, plan.originals
    draw_plots(
        folder,
        None if training is None else lambda row: from_uint8(training.image(row)),
        None if originals is None else lambda k: from_uint8(originals.pixels[k]),
    )
    export_imagefolder(folder)
    # The last one: where it is, the stage is over.
    write_report(folder, None if config["dataset"] is None else app_command(folder))


def _track(config: Mapping[str, Any], folder: Path) -> None:
    from diffusion.evaluation.track import track
    from diffusion.loggers import finish

    nodes = (config["logger"] or {}).items()
    if loggers := [build(node, f"logger.{name}") for name, node in nodes if node]:
        track(folder, loggers)
        finish(loggers)


def _is_to_curate(config: Mapping[str, Any], folder: Path) -> bool:
    if config["dataset"] is None:
        return False
    return (exported := exported_name(folder)) is None or config["dataset"]["name"] not in (None, exported)


def _curate(asked: str | None, folder: Path) -> None:
    from diffusion.curation.dataset import build_dataset

    name = _dataset_name(asked, folder)
    build_dataset(folder, name)
    export_fiftyone(name, folder)
    print(f"FiftyOne data set {name!r}, exported to {folder / DATASET}")


def _dataset_name(asked: str | None, folder: Path) -> str:
    from diffusion.curation import database
    from diffusion.curation.dataset import name_for

    with database.held():
        return name_for(folder, asked)


def _publish(config: Mapping[str, Any], folder: Path) -> None:
    settings = config["publish"]
    if settings["repo_id"] is None:
        return
    publish.publish(
        folder,
        settings["repo_id"],
        dry_run=settings["dry_run"],
        private=settings["private"],
        licence=settings["licence"],
        command=_sending(config, folder),
    )


def _sending(config: Mapping[str, Any], folder: Path) -> str:
    """The command that sends a run and does nothing else again: no sweep, no App, no loggers."""
    again = ("sweep=", "app=", "logger", "publish.repo_id=", "publish.dry_run=")
    words = [word for word in config["overrides"] if not word.lstrip("+").startswith(again)]
    words += [f"hydra.run.dir={folder}", f"publish.repo_id={config['publish']['repo_id']}", "publish.dry_run=false"]
    return shlex.join(["python", "evaluate.py", *words])


def _announce(subject: Subject, plan: Plan, scorers: Scorers, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    prompts = "none" if plan.prompts is None else f"{len(plan.prompts)}: {'; '.join(plan.prompts[:3])}"
    rows = {
        "model": f"{subject.config.get('name')}, {subject.parameters:,} parameters, {subject.path}",
        "images": f"{plan.num_images}, {_source(plan)}",
        "prompts": prompts + (" …" if plan.prompts and len(plan.prompts) > 3 else ""),
        "sampler": "none" if plan.sampler is None else f"{type(plan.sampler).__name__}, {plan.steps} steps",
        "guidance": "none" if plan.weight is None else f"w = {plan.weight}{plan.guidance.describe()}",
        **({} if (caution := _caution(subject, plan, scorers)) is None else {"caution": caution}),
        **scorers.describe(),
        "folder": str(folder),
    }
    table = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        table.add_row(Text(key, "bold"), Text(str(value)))
    Console(soft_wrap=True).print(table)


def _source(plan: Plan) -> str:
    if plan.originals is not None:
        return f"reconstructions of the split {plan.originals.split}"
    return f"seeds {plan.first_seed} to {plan.first_seed + plan.num_images - 1}"


def _farewell(config: Mapping[str, Any], folder: Path) -> None:
    print(f"everything   {folder}")
    print(f"report       {folder / 'report.html'}")
    print(f"pictures     {folder / 'images'}, {folder / 'plots'}")
    print(f"metrics      {folder / 'metrics.json'}, per image {folder / 'records.parquet'}")
    print(f"for datasets {folder / IMAGEFOLDER}")
    if config["dataset"] is not None:
        print(f"for FiftyOne {folder / DATASET}")
        print(f"look at it   {app_command(folder)}")


def app_command(folder: Path) -> str:
    """What opens the App on a run."""
    return f"python -m diffusion.curation.app {folder}"


def _objective(name: str | None, results: Mapping[str, Result]) -> float | None:
    for key, result in results.items():
        if split_key(key).name == name:
            return result.value
    return None

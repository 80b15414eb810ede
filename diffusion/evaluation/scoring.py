"""Scores of the images of a folder: per image as columns of the records, for the set as results."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from diffusion.assets import AssetError
from diffusion.errors import AntherError
from diffusion.evaluation.distribution import (
    DIRECTIONS,
    check_number,
    distribution_metrics,
    diversity_metrics,
    without_fc,
)
from diffusion.evaluation.inception import Extractor, Features, load_extractor
from diffusion.evaluation.metric import Result
from diffusion.evaluation.nearest import entropy, nearest, realism
from diffusion.evaluation.reals import Reals, read_reals
from diffusion.evaluation.reference import NEIGHBOURS, Reference, reference
from diffusion.evaluation.rows import Derived, Matrix, parts
from diffusion.evaluation.subject import Subject
from diffusion.images import Images, from_uint8

if TYPE_CHECKING:
    from diffusion.evaluation.classifier_score import ClassifierScore
    from diffusion.evaluation.clip_score import ClipScore

Array = np.ndarray
Direction = Literal["higher", "lower"] | None

BATCH = 64

LEFT_OUT = "left out: the Inception weights were found nowhere"
"""In files, which are published; where they were looked for on this machine is printed only."""


@dataclass
class Scores:
    """What a set of images got.

    Attributes:
        columns: per image, N values each, by the name of the column.
        results: for the set, by the name of the metric.
    """

    columns: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)

    def add(self, columns: Mapping[str, Any], directions: Mapping[str, Direction], protocol: Mapping[str, Any]) -> None:
        """Adds per-image scores, and the mean of each under its name and N.

        Args:
            columns: N numbers each, by name; NaN for an image that has none.
            directions: in which a score's mean improves; none for those that are not named.
            protocol: how they were computed.
        """
        for name, values in columns.items():
            numbers, n = np.asarray(values, np.float64), len(values)
            self.columns[name] = numbers.tolist()
            known = numbers[~np.isnan(numbers)]
            note = None if len(known) == n else f"the mean of {len(known)} images; the others have none"
            mean = float(known.mean()) if len(known) else None
            shared = {"N": n, "form": "mean over images", **protocol}
            self.results[f"{name}_{n}"] = Result(mean, directions.get(name), note=note, protocol=shared)


# Scorers stay loaded, with the embeddings of their prompts, for the next job of a sweep.
@lru_cache(maxsize=1)
def load_clip_scorer(model: str, pretrained: str, device: str) -> "ClipScore":
    """The CLIP that scores, loaded now: hours of work must not end in missing weights."""
    from diffusion.evaluation.clip_score import ClipScore

    scorer = ClipScore(model, pretrained).to(device)
    scorer.load()
    return scorer


@lru_cache(maxsize=1)
def load_classifier_scorer(
    weights: str, threshold: float | None, split: str, datamodule: Any, device: str
) -> "ClassifierScore":
    """The classifier that scores, and the features of the real images of a split."""
    from diffusion.evaluation.classifier_score import ClassifierScore

    return ClassifierScore(weights, threshold, read_reals(datamodule, split), device)


class Scorers:
    """Everything that scores the images of a run, loaded before the first image is drawn.

    Args:
        config: that of conf/evaluate.yaml, resolved.
        subject: whose images.
        datamodule: its data; None where the config needs none.
        device: where the scoring networks run.

    Attributes:
        training: the training images that the nearest is looked for among, or None.
        data_digest: of the data that the reals are from, or None.
        other_splits: those of the training in which the data have other images now.
        identity: all that the scores depend on beside the images, as plain values.

    Raises:
        AntherError: weights or data are missing, or the images are of a kind or number that is refused.
    """

    def __init__(self, config: Mapping[str, Any], subject: Subject, datamodule: Any, device: str) -> None:
        self._subject = subject
        self.data_digest: str | None = None if datamodule is None else datamodule.table.digest
        self.other_splits = [] if datamodule is None else subject.other_splits(datamodule)
        self._inception, self._nearest = config["inception"], config["nearest"]
        self._clip = None
        if config["clip"] is not None and subject.model.conditioner is not None:
            self._clip = load_clip_scorer(config["clip"]["model"], config["clip"]["pretrained"], device)
        self._classifier = None
        if config["classifier"] is not None:
            node = config["classifier"]
            self._classifier = load_classifier_scorer(
                node["weights"], node["threshold"], node["split"], datamodule, device
            )
        self.training: Reals | None = None
        self._extractor: Extractor | None = None
        self._reference: Reference | None = None
        self._training_features: Array | None = None
        self._left_out = ""
        if self._nearest is not None:
            self._check_nearest()
            self.training = read_reals(datamodule, self._nearest["split"])
        if self._inception is not None:
            reals = read_reals(datamodule, self._inception["split"])
            self._prepare_inception(reals, config["num_images"], device)
            if self._nearest is not None and self._nearest["space"] == "inception":
                self._training_features = self._find_training_features(reals)

    def _check_nearest(self) -> None:
        space = self._nearest["space"]
        if space not in ("inception", "pixels"):
            raise AntherError(f"nearest.space is inception or pixels, not {space!r}.")
        if space == "inception" and self._inception is None:
            raise AntherError(
                "nearest.space=inception needs Inception, which inception=null leaves out: set nearest.space=pixels or "
                "nearest=null."
            )

    def _prepare_inception(self, reals: Reals, num_images: int, device: str) -> None:
        check_number(num_images, len(reals.rows), self._inception["few_images"])
        try:
            extractor = load_extractor(self._inception["weights"], device, self._inception["one_channel"])
        except AssetError as error:
            if self._inception["missing"] != "leave_out":
                raise
            if self._nearest is not None and self._nearest["space"] == "inception":
                raise AntherError(
                    "nearest.space=inception needs Inception, whose weights were not found: set nearest.space=pixels "
                    f"or nearest=null. {error}"
                ) from error
            self._left_out = str(error)
            return
        self._extractor = extractor
        self._reference = reference(reals.pixels, reals.names, reals.digest, reals.split, extractor)

    @property
    def identity(self) -> dict[str, Any]:  # noqa: D102
        clip = None if self._clip is None else {"name": self._clip.name, "weights": self._clip.load().weights_hash}
        against = None
        if self._reference is not None:
            against = self._reference.record
        nearest = None
        if self.training is not None:
            nearest = {**self._nearest, "data_digest": self.training.digest, "reals": self.training.identity}
        classifier = None if self._classifier is None else self._classifier.identity
        return {
            "clip": clip,
            "inception": against,
            "left_out": LEFT_OUT if self._left_out else "",
            "nearest": nearest,
            "classifier": classifier,
        }

    def describe(self) -> dict[str, str]:
        """What a person wants to know before the run, by heading."""
        rows = {"scores": "none" if self._clip is None else f"CLIP {self._clip.name}"}
        if self._reference is not None:
            which = self._reference.split if self._reference.split != "all" else "all splits"
            rows["against"] = f"{len(self._reference)} real images ({which}) by {self._reference.protocol['extractor']}"
        if self._left_out:
            rows["left out"] = f"what Inception is needed for. {self._left_out}"
        if self._classifier is not None:
            found = self._classifier.identity
            rows["classifier"] = f"{found['classifier']}, declines below {found['threshold']:.4f}"
        if self.training is not None:
            rows["nearest"] = f"among {len(self.training.rows)} training images, in {self._nearest['space']}"
        return rows

    def score(
        self,
        images: Images,
        prompts: Sequence[str] | None,
        labels: Sequence[str | None],
        run_protocol: Mapping[str, Any],
        folder: Path,
    ) -> Scores:
        """Scores images, a part of them in memory at a time.

        Args:
            images: uint8 (N, C, H, W).
            prompts: one per image; None without a condition.
            labels: the class that each image was drawn as, where there is one.
            run_protocol: how the images were made, stored beside the protocol of every metric.
            folder: of the run; features lie there while they are needed.
        """
        scores = Scores()
        if self._clip is not None and prompts is not None:
            self._score_clip(scores, images, prompts, run_protocol)
        features = None
        if self._extractor is not None and self._reference is not None:
            features = self._extractor.filed_features(images, folder, "Inception features")
            scores.results |= distribution_metrics(
                features,
                self._reference,
                images,
                self._extractor,
                run_protocol,
                few_images=self._inception["few_images"],
            )
            protocol = {**self.identity["inception"], **run_protocol}
            if len(self._reference) > NEIGHBOURS:
                scores.add(
                    {"realism": realism(features.pool, self._reference.features, self._reference.radii)},
                    {"realism": "higher"},
                    {**protocol, "neighbours": NEIGHBOURS},
                )
            nats = {**protocol, "unit": "nats"}
            if features.logits is not None:
                scores.add({"inception_entropy": entropy(features.logits)}, {}, nats)
            else:
                why, nats = without_fc(self._extractor), {"N": len(images), **nats}
                scores.results[f"inception_entropy_{len(images)}"] = Result(None, note=why, protocol=nats)
        elif self._left_out:
            n = len(images)
            names: Mapping[str, Direction] = {**DIRECTIONS, "realism": "higher", "inception_entropy": None}
            for name, better in names.items():
                scores.results[f"{name}_{n}"] = Result(None, better, note=LEFT_OUT, protocol={"N": n, **run_protocol})
        if self._classifier is not None:
            columns, results = self._classifier.score(images, labels, run_protocol)
            scores.columns |= columns
            scores.results |= results
        scores.results |= diversity_metrics(images, run_protocol)
        if self.training is not None:
            self._score_nearest(scores, images, features, run_protocol)
        return scores

    def _score_clip(
        self, scores: Scores, images: Images, prompts: Sequence[str], run_protocol: Mapping[str, Any]
    ) -> None:
        assert self._clip is not None
        scorer, clip, n = self._clip, self._clip.load(), len(images)
        batches = parts(n, BATCH, "CLIP score")
        cosines = torch.cat([scorer.score(from_uint8(images[part]), prompts[part]) for part in batches]).double()
        flattered = scorer.conditions(self._subject.model.conditioner)
        note = "the scorer also conditions the model, which flatters it" if flattered else None
        protocol = {
            "N": n,
            "scorer": scorer.name,
            "weights_sha256": clip.weights_hash,
            "preprocess": clip.source.preprocess,
            "form": "cosine of the embeddings of image and prompt",
            **run_protocol,
        }
        scores.columns["clip_score"] = cosines.tolist()
        mean, deviation = float(cosines.mean()), float(cosines.std(correction=0))
        scores.results[f"clip_score_{n}/{scorer.name}"] = Result(mean, "higher", None, note, protocol)
        scores.results[f"clip_score_100_{n}/{scorer.name}"] = Result(100 * mean, "higher", None, note, protocol)
        scores.results[f"clip_score_std_{n}/{scorer.name}"] = Result(deviation, None, None, note, protocol)

    def _score_nearest(
        self, scores: Scores, images: Images, features: Features | None, run_protocol: Mapping[str, Any]
    ) -> None:
        assert self.training is not None
        training, space = self.training, self._nearest["space"]
        ours: Matrix
        theirs: Matrix
        how: dict[str, Any]
        if space == "pixels":
            ours, theirs = _as_vectors(images), _as_vectors(training.pixels)
            how = {"distance": "L2 of pixels in [0, 1]"}
        else:
            assert features is not None
            assert self._extractor is not None
            assert self._training_features is not None
            ours, theirs = features.pool, self._training_features
            how = {"distance": "L2 of Inception features", **self._extractor.protocol}
        distance, position = nearest(ours, theirs)
        protocol = {
            **how,
            "split": training.split,
            "N_real": len(training.rows),
            "data_digest": training.digest,
            "reals": training.identity,
            **run_protocol,
        }
        scores.add({"nearest_distance": distance}, {}, protocol)
        scores.columns["nearest_real"] = [training.names[k] for k in position]
        scores.columns["nearest_row"] = training.rows[position].tolist()

    def _find_training_features(self, reals: Reals) -> Array:
        """Inception features of the training images: rows of the reference where it has them."""
        assert self.training is not None
        assert self._extractor is not None
        assert self._reference is not None
        training = self.training
        if np.isin(training.rows, reals.rows).all():
            place = {row: k for k, row in enumerate(reals.rows)}
            chosen: Array = self._reference.features[[place[row] for row in training.rows]]
            return chosen
        return reference(training.pixels, training.names, training.digest, training.split, self._extractor).features


def _as_vectors(images: Images) -> Matrix:
    """(N, C H W) in [0, 1]."""
    return Derived(images, lambda part: part[:].flatten(1).float().div(255).numpy(), math.prod(images.shape[1:]))

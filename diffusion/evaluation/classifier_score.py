"""What a classifier says of drawn digits: which they are, whether it declines, and how far they are from real ones."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffusion.errors import AntherError
from diffusion.evaluation.classifier import load_classifier
from diffusion.evaluation.distribution import SEED, fid, kid, subset_size
from diffusion.evaluation.metric import Result
from diffusion.evaluation.reals import Reals
from diffusion.evaluation.reference import moments
from diffusion.evaluation.rows import parts
from diffusion.evaluation.selective import IDK, cascade
from diffusion.images import Images, from_uint8
from diffusion.networks.classifier import infer

Array = np.ndarray

BATCH = 1000  # images in memory at a time


class ClassifierScore:
    """A classifier that may decline, and the features of real images that drawn ones are held against.

    Args:
        weights: see `load_classifier`.
        threshold: confidence below which it declines, 0 to 1; None takes the classifier's own.
        reals: with pixels (M, 1, 28, 28).
        device: where it runs.

    Attributes:
        identity: all that the scores depend on beside the images, as plain values.

    Raises:
        AntherError: no such classifier, one without a threshold, or reals that it does not take.
    """

    def __init__(self, weights: str, threshold: float | None, reals: Reals, device: str) -> None:
        self.classifier = load_classifier(weights)
        self.network = self.classifier.network.to(device)
        chosen = self.classifier.threshold if threshold is None else threshold
        if chosen is None or not 0 <= chosen <= 1:
            raise AntherError(
                f"the classifier {weights} has no threshold: set classifier.threshold between 0 and 1."
                if chosen is None
                else f"classifier.threshold={chosen} is a probability: choose one between 0 and 1."
            )
        self.threshold = float(chosen)
        self.check(reals.pixels)
        self._reals = infer(self.network, from_uint8(reals.pixels[:]))[1].double().numpy()
        self.identity: dict[str, Any] = {
            "classifier": self.classifier.name,
            "weights_sha256": self.classifier.sha256,
            "temperature": self.classifier.temperature,
            "threshold": self.threshold,
            "split": reals.split,
            "data_digest": reals.digest,
            "N_real": len(self._reals),
            "reals": reals.identity,
        }

    def check(self, images: Images) -> None:
        """Refuses images of another shape than the classifier takes.

        Raises:
            AntherError: naming both.
        """
        if tuple(images.shape[1:]) != self.network.image_shape:
            raise AntherError(
                f"the classifier {self.classifier.name} takes images {self.network.image_shape} and these are "
                f"{tuple(images.shape[1:])}: set classifier=null."
            )

    def score(
        self, images: Images, labels: Sequence[str | None], run_protocol: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Result]]:
        """Columns of the records, and the metrics of the set.

        The columns: `pseudo_label` the best digit, `final_label` the same or IDK, `rejection_type` none, soft (not sure
        enough) or hard (the network's own IDK), `is_idk`, `classifier_confidence` the probability of the network's
        prediction, `runner_up` the second-best digit, and `margin` by how much less probable that is among digits.

        Args:
            images: uint8 (N, 1, 28, 28).
            labels: the digit that each image was drawn as, where there is one.
            run_protocol: how the images were made, stored beside the protocol of every metric.
        """
        self.check(images)
        n, digits, temperature = len(images), self.network.digits, self.classifier.temperature
        found = [infer(self.network, from_uint8(images[part])) for part in parts(n, BATCH)]
        logits, features = (torch.cat(rows).double() for rows in zip(*found, strict=True))
        decided = cascade(logits.numpy(), self.threshold, temperature, digits)
        best = (logits[:, :digits] / temperature).softmax(1).topk(2)
        final = decided.final
        columns = {
            "pseudo_label": [str(k) for k in decided.guess],
            "final_label": final,
            "rejection_type": [str(kind) for kind in decided.rejection],
            "is_idk": decided.declined.tolist(),
            "classifier_confidence": decided.confidence.tolist(),
            "runner_up": [str(k) for k in best.indices[:, 1].tolist()],
            "margin": (best.values[:, 0] - best.values[:, 1]).tolist(),
        }
        protocol = {"N": n, **self.identity, **run_protocol}
        counts = Counter(final)
        said = ", ".join(f"{name}: {counts[name]}" for name in [*map(str, range(digits)), IDK])
        declined = f"{(decided.rejection == 'hard').sum()} hard, {(decided.rejection == 'soft').sum()} soft; {said}"
        results = {
            f"classifier_confidence_{n}": Result(float(decided.confidence.mean()), protocol=protocol),
            f"classifier_declined_{n}": Result(float(decided.declined.mean()), note=declined, protocol=protocol),
        }
        for k in range(digits):
            results[f"digit_{k}_{n}"] = Result(float(counts[str(k)]), note="accepted images", protocol=protocol)
        if any(label is not None for label in labels):
            results |= self._agreement(final, labels, protocol)
        return columns, results | self._distances(features.numpy(), protocol)

    def _agreement(
        self, final: Sequence[str], labels: Sequence[str | None], protocol: Mapping[str, Any]
    ) -> dict[str, Result]:
        """How often the accepted digit is the one that was asked for."""
        pairs = [(a, b) for a, b in zip(final, labels, strict=True) if b is not None and a != IDK]
        right = float(np.mean([a == b for a, b in pairs])) if pairs else None
        note = f"of the {len(pairs)} accepted images: the digit is the one that was asked for"
        return {f"classifier_accuracy_{len(final)}": Result(right, "higher", note=note, protocol=protocol)}

    def _distances(self, features: Array, protocol: Mapping[str, Any]) -> dict[str, Result]:
        """Fréchet and kernel distance in the classifier's features: what FID and KID are in Inception's."""
        n, m = len(features), len(self._reals)
        shared = {**protocol, "features": f"{self.network.features_dim}, of the classifier's last layer but one"}
        note = "in the classifier's own features: not an FID, and compare only by the same classifier"
        if n < 2:
            return {f"classifier_fd_{n}": Result(None, "lower", note="one image has no covariance", protocol=shared)}
        mean, deviation = kid(features, self._reals)
        subsets = {**shared, "subsets": 100, "subset_size": subset_size(n, m), "scoring_seed": SEED}
        few = f"; covariance of rank {n - 1} of {self.network.features_dim}" if n <= self.network.features_dim else ""
        return {
            f"classifier_fd_{n}": Result(fid(features, *moments(self._reals)), "lower", None, note + few, shared),
            f"classifier_kd_{n}": Result(mean, "lower", None, note, subsets),
            f"classifier_kd_std_{n}": Result(deviation, None, None, note, subsets),
        }

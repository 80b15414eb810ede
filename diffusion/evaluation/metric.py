"""What a metric gives: a number, what it means, and how it came about."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Result:
    """One number of an evaluation.

    Attributes:
        value: None where it was asked for and cannot be had; `note` says why then.
        better: the direction in which models improve; None where there is none.
        verdict: seed 004's word for the value, such as "good (below 50)".
        note: what a reader must know before comparing the number.
        protocol: how it was computed: plain values for JSON.
    """

    value: float | None
    better: Literal["higher", "lower"] | None = None
    verdict: str | None = None
    note: str | None = None
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"protocol": dict(self.protocol)}

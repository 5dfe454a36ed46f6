"""How good a bundle says its models are: a figure with its 95 % interval for each, read with limits."""

from __future__ import annotations

from dataclasses import dataclass

from . import fields

_MOST_NAME = 200
_MOST_MAGNITUDE = 1e30
_MOST_SAMPLES = 1 << 40
_FIELDS = ("of", "metric", "value", "low", "high", "n", "is_share", "runtime")


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of which more is better. `of` is a model's path, or `dense`, the network all were made from.

    `n` evaluation samples were judged as `runtime` ran them; `low` and `high` bound the value at 95 %. Where
    `is_share`, 1 is the best there is.
    """

    of: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    is_share: bool = True
    runtime: str = ""


def read_metrics(content: fields.Object) -> tuple[Metric, ...]:
    """The field's figures; none where it is missing, as in older bundles. ValueError for what is no figure."""
    if "metrics" not in content:
        return ()
    return tuple(_metric(entry) for entry in fields.entries(content, "metrics"))


def _metric(entry: object) -> Metric:
    content = fields.as_object(entry, "a metric")
    fields.only(content, _FIELDS, "a metric")
    of, metric, runtime = (fields.text(content, key, most=_MOST_NAME) for key in ("of", "metric", "runtime"))
    value, low, high = (
        fields.number(content, key, least=-_MOST_MAGNITUDE, most=_MOST_MAGNITUDE) for key in ("value", "low", "high")
    )
    if low > high:
        raise ValueError(f"the interval of {fields.shown(metric)} begins at {low:g} and ends at {high:g}")
    samples = fields.whole(content, "n", least=1, most=_MOST_SAMPLES)
    return Metric(of, metric, value, low, high, samples, fields.flag(content, "is_share"), runtime)

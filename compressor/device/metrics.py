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
    return tuple(map(_metric, fields.entries(content, "metrics")))


def _metric(entry: object) -> Metric:
    content = fields.record(entry, _FIELDS, "a metric")
    metric = Metric(
        of=fields.text(content, "of", most=_MOST_NAME),
        metric=fields.text(content, "metric", most=_MOST_NAME),
        runtime=fields.text(content, "runtime", most=_MOST_NAME),
        value=_figure(content, "value"),
        low=_figure(content, "low"),
        high=_figure(content, "high"),
        n=fields.whole(content, "n", least=1, most=_MOST_SAMPLES),
        is_share=fields.flag(content, "is_share"),
    )
    if metric.low > metric.high:
        interval = f"begins at {metric.low:g} and ends at {metric.high:g}"
        raise ValueError(f"the interval of {fields.shown(metric.metric)} {interval}")
    return metric


def _figure(content: fields.Object, key: str) -> float:
    return fields.number(content, key, least=-_MOST_MAGNITUDE, most=_MOST_MAGNITUDE)

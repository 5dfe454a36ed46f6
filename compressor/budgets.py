"""The budget a recipe asks for: its text in, what may stay out. Knows no network and imports no torch.

So a budget that can't be meant is refused at once, before anything heavy is read. What is asked for as an amount
(`latency 8 ms`, `size 2 MB`) becomes a share once the dense network's cost is known.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, inf, log10
from typing import Literal, get_args

from .device.runtimes import REFERENCE, canonical_name, layer_timers, row_of, runtime_names
from .errors import BudgetError, InputError, RecipeError, did_you_mean
from .hosts.address import read_address

SLACK = 0.02
LATENCY_SLACK = 0.03
NONE = "none"
BYTES_PER_PARAMETER = 4  # float32

Kind = Literal["macs", "parameters", "size", "latency"]
_KINDS: tuple[Kind, ...] = get_args(Kind)
_KIND_OF: Mapping[str, Kind | Literal[""]] = {kind: kind for kind in _KINDS}
_SSH = "ssh:"
_FORMS = "'macs S', 'parameters S', 'size S' or 'latency S on RUNTIME'"
_AMOUNTS = "'macs 120 M', 'size 2 MB', 'latency 8 ms on onnxruntime' or '30 fps on onnxruntime'"

_COUNTS = {"k": 1e3, "M": 1e6, "G": 1e9}
_UNITS: Mapping[Kind, Mapping[str, float]] = {
    "macs": _COUNTS,
    "parameters": _COUNTS,
    "size": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9},
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3, "fps": 1e3},  # of fps, the milliseconds that images are counted in
}
_UNIT_OF = {unit.lower(): unit for units in _UNITS.values() for unit in units}
_SAYS_KIND: Mapping[str, Kind] = {unit: kind for kind in ("size", "latency") for unit in _UNITS[kind]}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)([a-z%]*)", re.IGNORECASE)
_DIGITS = 4  # of an amount that is named in place of another


@dataclass(frozen=True, slots=True)
class Budget:
    """`share` of the dense network's MACs, parameters, bytes of fp32 weights or latency that may stay.

    MACs, parameters and size may be missed from below, by more than `slack` with a warning; a measured latency by at
    most `slack` either way. Latency is that of `batch` images on `runtime` with `threads` (0: the runtime's own
    number), here or on the `host` that is named. Where an `amount` is asked for (MACs, parameters, bytes, milliseconds
    of a batch; 0: none is), the share is 1 until `of` is told the dense network's cost; `unit` is the one it is written
    in.
    """

    kind: Kind
    share: float
    slack: float = SLACK
    runtime: str = ""
    batch: int = 1
    threads: int = 0
    amount: float = 0.0
    unit: str = ""
    host: str = ""

    def __str__(self) -> str:
        figure = f"{self._in_unit(self.amount):.10g}" if self.amount else f"{round(self.share, 4):g}"
        return self._written(figure)

    def asking(self, share: float) -> str:
        """The same budget for another share, as it is written; of an amount four digits, rounded so that more stays."""
        if not self.amount:
            return self._written(f"{round(share, 4):g}")
        return self._written(f"{self._laxer(self._in_unit(self.amount * share / self.share)):.10g}")

    def at(self, share: float) -> Budget:
        """The same budget for another share, and of the same dense network's cost that share."""
        return replace(self, share=share, amount=self.amount * share / self.share)

    def of(self, dense: float) -> Budget:
        """The same budget once the dense network's cost is known, in the kind's unit: an amount becomes a share."""
        if not self.amount:
            return self
        return replace(self, share=self.amount / dense)

    def _in_unit(self, amount: float) -> float:
        """Of fps it counts images: a batch of 8 in 100 ms are 80 a second."""
        scale = _UNITS[self.kind][self.unit]
        if self.unit == "fps":
            return self.batch * scale / amount
        return amount / scale

    def _laxer(self, number: float) -> float:
        """Rounded to four digits: upwards, and the images of a second downwards."""
        step = 10.0 ** (floor(log10(number)) + 1 - _DIGITS)  # 0.1 for 123.45
        steps = number / step
        if self.unit == "fps":
            return step * floor(steps + 1e-6)
        return step * ceil(steps - 1e-6)

    def _written(self, figure: str) -> str:
        words = [figure]
        if self.unit:
            words.append(self.unit)
        if self.unit != "fps":  # which says by itself that it is of latency
            words.insert(0, self.kind)
        if self.kind == "latency":
            words.append(f"on {self._place}")
            if self.batch != 1:
                words.append(f"batch {self.batch}")
            if self.threads:
                words.append(f"threads {self.threads}")
        return " ".join(words)

    @property
    def _place(self) -> str:
        """The runtime, or the device with its runtime where that is not the usual one."""
        if not self.host:
            return self.runtime
        if self.runtime == REFERENCE:
            return f"{_SSH}{self.host}"
        return f"{_SSH}{self.host} runtime {self.runtime}"


def parse_budget(text: str) -> Budget:
    """One budget: `macs 0.5` -> half the MACs stay; `size 2 MB`, `30 fps on onnxruntime batch 8 threads 1`.

    Raises RecipeError for anything else, several budgets too.
    """
    return _budget_of(_read_words(text, text), text)


def parse_budgets(text: str) -> tuple[Budget, ...]:
    """All that a plan must meet: `macs 0.5, size 2 MB` are two, `none` is no budget at all.

    Raises RecipeError for a sweep, of which every point is a run of its own, and for what is no budget.
    """
    points = points_of(text)
    if len(points) > 1:
        raise RecipeError(
            f"budget '{text}' is a sweep of {len(points)} runs, and one run has one of them, such as '{points[0]}'; "
            "`compressor compress` and `compressor.compress` make them all"
        )
    if is_none(text):
        return ()
    budgets = tuple(_budget_of(words, text) for words in _read_all(text))
    kind, times = Counter(budget.kind for budget in budgets).most_common(1)[0]
    if times > 1:
        raise RecipeError(f"budget '{text}' asks for {kind} more than once; a run can meet one of a kind")
    return budgets


def is_none(text: str) -> bool:
    """Whether nothing is to be removed."""
    return text.strip().lower() == NONE


def points_of(text: str) -> tuple[str, ...]:
    """The budgets of a sweep's runs: `macs 0.7,0.5` are `macs 0.7` and `macs 0.5`. Any other budget is one point.

    Raises RecipeError for what is no sweep and no budget either.
    """
    if is_none(text):
        return (NONE,)
    if any(map(is_none, text.split(","))):
        raise RecipeError(f"budget '{text}' is '{NONE}' (nothing is removed) beside others; give one of the two")
    figures = _read_all(text)
    are_swept = [figure.continues(figures[0]) for figure in figures[1:]]
    if not any(are_swept):
        return (text,)
    if not all(are_swept):
        raise RecipeError(f"budget '{text}' is half a sweep and half several budgets at once; write one of the two")
    return tuple(map(str, _swept(figures, text)))


def _swept(figures: Sequence[_Words], text: str) -> list[Budget]:
    """A budget for each figure: all of the first's kind, and all on the runtime that one of them names."""
    kind = figures[0].asked_kind
    endings = {figure.ending for figure in figures} - {()}
    if len(endings) > 1:
        raise RecipeError(f"budget '{text}' is a sweep on different runtimes; name one of them, at the end")
    ending = next(iter(endings), ())
    budgets = [_budget_of(replace(figure, kind=kind, ending=ending), text) for figure in figures]
    if len(set(budgets)) < len(budgets):
        raise RecipeError(f"budget '{text}' is a sweep that names one figure twice")
    return budgets


def require_removal(budgets: Sequence[Budget]) -> None:
    """Raises BudgetError where the dense network meets all of them, each `of` its cost: nothing would go."""
    if budgets and all(budget.share >= 1 for budget in budgets):
        met = ", ".join(f"'{budget}' (it takes '{budget.asking(1.0)}')" for budget in budgets)
        raise BudgetError(
            f"the dense network meets budget {met} as it is, so nothing would be removed; ask for less, or give "
            f"--budget {NONE}, which exports and checks it as it is"
        )


@dataclass(frozen=True, slots=True)
class _Words:
    """A budget in words: `kind` is empty where none was named, `unit` where a share was; `ending` is all behind it."""

    kind: Kind | Literal[""]
    number: float
    unit: str
    ending: tuple[str, ...]

    @property
    def asked_kind(self) -> Kind | Literal[""]:
        """The kind that is named, or else that the unit says; empty where neither does."""
        return self.kind or _SAYS_KIND.get(self.unit, "")

    def continues(self, first: _Words) -> bool:
        """Whether this is one more figure of what the first asks for, and no budget of its own: the 0.5 of
        `macs 0.7,0.5`."""
        return not self.kind and self.asked_kind in ("", first.asked_kind)


def _read_all(text: str) -> list[_Words]:
    """What stands between the commas. Raises RecipeError as `_read_words` does."""
    return [_read_words(figure, text) for figure in text.split(",")]


def _read_words(figure: str, text: str) -> _Words:
    """`figure` is one of the whole `text`, which messages name. Raises RecipeError unless there is a kind (or a unit)
    and a number."""
    first, *words = figure.split() or [""]
    kind = _KIND_OF.get(first.lower(), "")
    figure_text = words.pop(0) if kind and words else first
    match = _NUMBER.fullmatch(figure_text)
    if match is None:
        raise _not_understood(text, first)
    number, unit = float(match[1]), match[2].lower()
    word_behind = words[0].lower() if words else ""
    if not unit and word_behind in (*_UNIT_OF, "%"):  # `2 MB` as well as `2MB`
        unit = word_behind
        del words[0]
    if unit == "%":
        number, unit = number / 100, ""
    if unit not in ("", *_UNIT_OF):
        raise RecipeError(f"budget '{text}': there is no unit {match[2]!r}; write {_AMOUNTS}")
    return _Words(kind, number, _UNIT_OF.get(unit, ""), tuple(words))


def _not_understood(text: str, kind: str) -> RecipeError:
    hint = "" if kind.lower() in _KINDS else did_you_mean(kind, [*_KINDS, NONE])
    return RecipeError(
        f"budget '{text}' is not understood; write {_FORMS} with the share S that stays, 0 < S < 1, such as "
        f"'macs 0.5', or an amount, such as {_AMOUNTS}; several with commas in between; or '{NONE}'.{hint}"
    )


def _budget_of(words: _Words, text: str) -> Budget:
    """What the words ask for; `text` is the whole that messages name."""
    kind = words.asked_kind
    if not kind:
        raise _not_understood(text, "")
    if words.unit not in ("", *_UNITS[kind]):
        units = ", ".join(_UNITS[kind])
        raise RecipeError(f"budget '{text}': {kind} is not counted in {words.unit}; there are {units}")
    most = inf if words.unit else 1
    if not 0 < words.number < most:
        raise _not_understood(text, kind)
    if kind != "latency" and words.ending:
        figure = "amount" if words.unit else "share"
        raise RecipeError(f"budget '{text}' goes on after its {figure} with '{' '.join(words.ending)}'; write {_FORMS}")
    budget = Budget(kind, 1.0 if words.unit else words.number)
    if kind == "latency":
        budget = _on_runtime(budget, text, words.ending)
    if not words.unit:
        return budget
    scale = _UNITS[kind][words.unit]
    amount = budget.batch * scale / words.number if words.unit == "fps" else scale * words.number
    return replace(budget, amount=amount, unit=words.unit)


def _on_runtime(budget: Budget, text: str, words: Sequence[str]) -> Budget:
    """`words` is what follows the figure: `on onnxruntime batch 8 threads 1`, in any order."""
    pairs = dict(zip(words[::2], words[1::2], strict=False))
    host, named = _host_of(pairs, text)
    runtime, timers = canonical_name(named), _timers(host)
    form = (
        f"write 'latency S on RUNTIME' (then 'batch N', 'threads N' if you like) with a RUNTIME of {', '.join(timers)}"
        ", or 'latency S on ssh:HOST' (then 'runtime RUNTIME')"
    )
    unknown = pairs.keys() - {"on", "batch", "threads"}
    if len(words) % 2 or unknown or not runtime:
        raise RecipeError(f"budget '{text}' is not understood; {form}")
    if runtime not in timers:
        reason = "no runtime of that name"
        if runtime in runtime_names():
            reason = row_of(runtime).untimed_layers or "on a device, files are timed"
        raise RecipeError(f"budget '{text}': {reason}; {form}.{did_you_mean(runtime, [*timers])}")

    batch = _whole_number(pairs, "batch", 1, text)
    threads = _whole_number(pairs, "threads", 0, text)
    return replace(budget, slack=LATENCY_SLACK, runtime=runtime, batch=batch, threads=threads, host=host)


def _whole_number(pairs: Mapping[str, str], name: str, least: int, text: str) -> int:
    """The number that a word names, `least` where it is not there."""
    number = pairs.get(name, str(least))
    if not number.isdigit() or int(number) < least:
        raise RecipeError(f"budget '{text}': {name} {number!r} is not a whole number above 0")
    return int(number)


def _host_of(pairs: dict[str, str], text: str) -> tuple[str, str]:
    """The device, empty for this machine, and the runtime as it was called; `runtime` leaves the pairs with it."""
    place = pairs.get("on", "")
    if not place.startswith(_SSH):
        return "", place
    host = place.removeprefix(_SSH)
    try:
        read_address(host)
    except InputError as error:
        raise RecipeError(f"budget '{text}': {error}") from error
    return host, pairs.pop("runtime", REFERENCE)


def _timers(host: str) -> tuple[str, ...]:
    """The runtimes that time layers, on a device those that take files."""
    return tuple(name for name in layer_timers() if not host or row_of(name).takes == "onnx")

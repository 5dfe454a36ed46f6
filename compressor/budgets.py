"""The budget a recipe asks for: its text in, what may stay out. Knows no network and imports no torch.

So a budget that can't be meant is refused at once, before anything heavy is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .device.runtimes import canonical_name, layer_timers, row_of, runtime_names
from .errors import RecipeError, did_you_mean

SLACK = 0.02
LATENCY_SLACK = 0.03
_FORMS = "'macs S', 'parameters S' or 'latency S on RUNTIME'"

Kind = Literal["macs", "parameters", "latency"]
_KINDS = ["macs", "parameters", "latency"]


@dataclass(frozen=True, slots=True)
class Budget:
    """`share` of the dense network's MACs, parameters or latency that may stay.

    MACs and parameters may be missed from below, by more than `slack` with a warning; a measured latency by at most
    `slack` either way. Latency is that of `batch` images on `runtime` with `threads` (0: the runtime's own number).
    """

    kind: Kind
    share: float
    slack: float = SLACK
    runtime: str = ""
    batch: int = 1
    threads: int = 0

    def __str__(self) -> str:
        return self.asking(self.share)

    def asking(self, share: float) -> str:
        """The same budget for another share, as it is written."""
        text = f"{self.kind} {round(share, 4):g}"
        if self.kind == "latency":
            text += f" on {self.runtime}"
            text += f" batch {self.batch}" if self.batch != 1 else ""
            text += f" threads {self.threads}" if self.threads else ""
        return text


def parse_budget(text: str) -> Budget:
    """`macs 0.5` -> half the MACs stay; `latency 0.5 on onnxruntime batch 8 threads 1` -> half the time.

    Raises RecipeError for anything else.
    """
    kind, *words = text.split() or [""]
    share = _share(words)
    if kind not in _KINDS or not 0 < share < 1:
        hint = "" if kind in _KINDS else did_you_mean(kind, _KINDS)
        raise RecipeError(
            f"budget '{text}' is not understood; write {_FORMS} with the share S that stays, 0 < S < 1, such as "
            f"'macs 0.5'.{hint}"
        )
    if kind == "latency":
        return _latency_budget(text, share, words[1:])
    if words[1:]:
        raise RecipeError(f"budget '{text}' goes on after its share with '{' '.join(words[1:])}'; write {_FORMS}")
    return Budget("macs" if kind == "macs" else "parameters", share)


def _share(words: Sequence[str]) -> float:
    """The first word as a number; -1, which no budget is, where there is none."""
    try:
        return float(words[0])
    except (IndexError, ValueError):
        return -1.0


def _latency_budget(text: str, share: float, words: Sequence[str]) -> Budget:
    """`words` is what follows the share: `on onnxruntime batch 8 threads 1`, in any order."""
    pairs = dict(zip(words[::2], words[1::2], strict=False))
    runtime, timers = canonical_name(pairs.get("on", "")), layer_timers()
    form = (
        f"write 'latency S on RUNTIME' (then 'batch N', 'threads N' if you like) with a RUNTIME of {', '.join(timers)}"
    )
    if len(words) % 2 or set(pairs) - {"on", "batch", "threads"} or not runtime:
        raise RecipeError(f"budget '{text}' is not understood; {form}")
    if runtime not in timers:
        reason = row_of(runtime).untimed_layers if runtime in runtime_names() else "no runtime of that name"
        raise RecipeError(f"budget '{text}': {reason}; {form}.{did_you_mean(runtime, [*timers])}")

    numbers = {"batch": pairs.get("batch", "1"), "threads": pairs.get("threads", "0")}
    for name, number in numbers.items():
        if not number.isdigit() or (name == "batch" and int(number) < 1):
            raise RecipeError(f"budget '{text}': {name} {number!r} is not a whole number above 0")
    return Budget("latency", share, LATENCY_SLACK, runtime, int(numbers["batch"]), int(numbers["threads"]))

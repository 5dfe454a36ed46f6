"""NVIDIA ModelOpt's FastNAS as the peer of a comparison: its pruner, brought to the same MACs, without labels.

In: a subject (model, images), a share of the MACs. Out: the physically pruned module, or why there is none.
FastNAS sorts channels by magnitude, measures how a score falls as each layer narrows, and takes for all layers the
narrowest widths that lose no more than one threshold, bisected until the budget is met. The score is ours to give:
agreement with the dense network, or the distance of the answers. Needs

    pip install nvidia-modelopt torchprofile==0.0.4
(it counts operations with a table that later versions of torchprofile no longer have).
"""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peer import Subject, macs_of
from torch import Tensor, nn

MISSING = "FastNAS needs: pip install nvidia-modelopt torchprofile==0.0.4"
DIVISORS = ("channel_divisor", "feature_divisor")  # of convolutions and of linear layers, in its configuration


@dataclass(frozen=True, slots=True)
class FastNas:
    """Widths are multiples of `multiple` (ModelOpt's default is 32); `score` says what a narrower layer loses."""

    multiple: int
    score: Literal["agreement", "distance"]

    def __str__(self) -> str:
        return f"FastNAS, multiples of {self.multiple}, {self.score}"


FASTNAS_SETTINGS = tuple(itertools.starmap(FastNas, itertools.product((2, 4, 8), ("agreement", "distance"))))


def require_fastnas() -> None:
    """Ends the program where ModelOpt, or the version of torchprofile that it works with, is not installed."""
    try:
        import modelopt.torch.prune  # noqa: F401
        from torchprofile.profile import handlers  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"{MISSING} ({error})") from error


def fastnas_to(subject: Subject, setting: FastNas, share: float, *, seed: int) -> tuple[nn.Module, float]:
    """The pruned copy at `share` of the MACs at most, and its share.

    Raises what ModelOpt raises.
    """
    from modelopt.torch import prune as modelopt_prune

    torch.manual_seed(seed)
    module = copy.deepcopy(subject.module).eval()
    batches = [images for images, _ in subject.batches]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        pruned, _ = modelopt_prune.prune(
            module,
            mode=[("fastnas", _widths(modelopt_prune.fastnas.FastNASConfig, setting.multiple))],
            constraints={"flops": f"{100 * share}%"},
            dummy_input=subject.example[:1],
            config={
                "score_func": _score(setting, subject.module, batches),
                "data_loader": batches,
                "collect_func": lambda images: images,
                "checkpoint": None,
            },
        )
    kept = macs_of(pruned, subject.example) / macs_of(subject.module, subject.example)
    return pruned.eval(), kept


def _widths(defaults: Any, multiple: int) -> dict[str, Any]:
    """ModelOpt's configuration with another step of widths: its own, 32, is half of ResNet-20's widest layer."""
    rules: dict[str, Any] = defaults().model_dump()
    for rule in rules.values():
        for name in DIVISORS:
            if name in rule["*"]:
                rule["*"][name] = multiple
    return rules


def _score(setting: FastNas, dense: nn.Module, batches: list[Tensor]) -> Callable[[nn.Module], float]:
    """Higher is better: the share of the images whose class stays, or minus the squared distance over the size."""
    dense = dense.eval()
    answers = [_answer(dense, images) for images in batches]

    def agreement(network: nn.Module) -> float:
        same = [_answer(network, images).argmax(1) == wanted.argmax(1) for images, wanted in pairs]
        return float(torch.cat(same).double().mean())

    def distance(network: nn.Module) -> float:
        lost = [(_answer(network, images) - wanted).square().sum() for images, wanted in pairs]
        size = [wanted.square().sum() for wanted in answers]
        return -float(torch.stack(lost).sum() / torch.stack(size).sum())

    pairs = list(zip(batches, answers, strict=True))
    return agreement if setting.score == "agreement" else distance


@torch.no_grad()
def _answer(network: nn.Module, images: Tensor) -> Tensor:
    answer: Tensor = network.eval()(images)
    return answer

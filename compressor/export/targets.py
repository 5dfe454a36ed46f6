"""The devices engines are built for, by name: which library serves each. Knows no file, no builder and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import InputError, did_you_mean

# TensorRT-RTX's list of named compute capabilities (1.7); it has no SM87, SM90 or SM100 and up but consumer cards.
RTX_CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
# FP32 matrix products don't build for Turing, so the portable default starts at Ampere as the library's own does.
RTX_DEFAULT = ("SM80", "SM86", "SM89", "SM120")


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of device. `libraries` in order of preference; the first that can build here is used."""

    name: str
    devices: str
    compute_capabilities: tuple[str, ...]
    libraries: tuple[str, ...]


_TARGETS = (
    Target("rtx", "RTX cards from Ampere on", RTX_DEFAULT, ("tensorrt_rtx",)),
    Target("this-gpu", "the GPU of the machine that builds", (), ("tensorrt", "tensorrt_rtx")),
    Target("SM75", "RTX 20, T4 (fp16 only)", ("SM75",), ("tensorrt_rtx", "tensorrt")),
    Target("SM80", "A100", ("SM80",), ("tensorrt_rtx", "tensorrt")),
    Target("SM86", "RTX 30, A10, A40", ("SM86",), ("tensorrt_rtx", "tensorrt")),
    Target("SM87", "Jetson Orin", ("SM87",), ("tensorrt",)),
    Target("SM89", "RTX 40, L4, L40", ("SM89",), ("tensorrt_rtx", "tensorrt")),
    Target("SM90", "H100, H200", ("SM90",), ("tensorrt",)),
    Target("SM100", "B200", ("SM100",), ("tensorrt",)),
    Target("SM110", "Jetson Thor", ("SM110",), ("tensorrt",)),
    Target("SM120", "RTX 50", ("SM120",), ("tensorrt_rtx", "tensorrt")),
    Target("SM121", "GB10", ("SM121",), ("tensorrt_rtx", "tensorrt")),
)
TARGETS: Mapping[str, Target] = {target.name: target for target in _TARGETS}
_ALIASES = {"orin": "SM87", "thor": "SM110", "h100": "SM90", "h200": "SM90", "a100": "SM80", "l4": "SM89"}


def synonyms_of(target: str) -> tuple[str, ...]:
    """Other words that mean a target: `orin` for SM87, and `8.7`, as NVIDIA writes compute capabilities."""
    words = [word for word, name in _ALIASES.items() if name == target]
    digits = target.removeprefix("SM")
    if digits.isdigit():
        words.append(f"{digits[:-1]}.{digits[-1]}")
    return tuple(words)


def resolve_target(name: str) -> Target:
    """`SM86`, `sm_86`, `8.6`, `orin` or `rtx` to the target it names; raises InputError for a name of none."""
    text = name.lower()
    text = _ALIASES.get(text, text).lower()
    compact = "sm" + text.removeprefix("sm").lstrip("_").replace(".", "")
    for target in _TARGETS:
        if target.name.lower() in (text, compact):
            return target
    names = [*TARGETS, *_ALIASES]
    raise InputError(f"no target {name!r}; there are {', '.join(names)}.{did_you_mean(name, names)}")

"""The options of a run: one frozen record, from a TOML file and from flags of the same names.

Knows what values are allowed, not what they do, and imports no torch: a value that is not allowed is refused
at once. Every field's help is the command line's too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints

from .budgets import is_none, parse_budgets, points_of
from .criteria import CRITERIA, UNLEARNED, Per, Place, Sign, Start
from .device.runtimes import REFERENCE, runtime_names
from .errors import RecipeError, did_you_mean, with_article
from .export.targets import resolve_target
from .records import UnitKind
from .toml import parse_toml

TASKS = (
    *("classification", "multi-label", "segmentation", "detection", "embedding", "image-to-image", "regression"),
    "any",
)
"""What a network's answers may mean; `any` is judged by the dense network's own answers."""

BY_WIDTH = -1
"""The multiple that follows each layer's own width."""

EMBEDDED = Path(__file__).resolve().parent.parent / "models"


StartClass = Literal["true", "predicted"]
Scope = Literal["global", "isomorphic", "uniform"]
Reduction = Literal["sum", "mean", "max"]
GatesSchedule = Literal["", "isp2022"]
Blocks = Literal["keep", "drop"]
Normalisation = Literal["measured", "mean", "sum", "max", "l2", "none"]


def _option(default: Any, text: str, *choices: str) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a run is made of. Lists are written `a,b` on the command line."""

    model: str = _option(
        "digits-resnet", "torchvision:NAME, timm:NAME, transformers:NAME, package.module:factory, file.py:factory"
    )
    weights: str = _option("", "default (the library's), none, or a safetensors / state-dict file")
    data: str = _option(
        "", "images: folder per class, folder with labels.csv, shards (.tar), .npz, torchvision:NAME, digits"
    )
    evaluation_data: str = _option("", "images for evaluation given apart; else a part of --data is held out")
    calibration: int = _option(512, "images that score, repair and, with all that are left over, teach")
    evaluation: float = _option(0.3, "share of --data held out when no evaluation data is given")
    damaged_images: float = _option(
        0.0, "share of --data that may be damaged: those images are counted, named and left out; 0: each is an error"
    )
    size: tuple[int, ...] = _option((), "height,width of the network's input in pixels, or one number for both")
    resize: tuple[int, ...] = _option((), "shorter side before the crop")
    interpolation: str = _option("", "bilinear, bicubic or nearest")
    mean: tuple[float, ...] = _option((), "mean of values 0-1, one per channel")
    std: tuple[float, ...] = _option((), "standard deviation of values 0-1, one per channel")
    task: str = _option(
        "",
        "what the network's answers mean; else what they and the data show: " + ", ".join(TASKS),
        "",
        *TASKS,
    )
    quality: str = _option("", "your own measure of a network, file.py:function: (predict, data) to a number")
    loss: str = _option("", "your own loss for each sample, file.py:function: (outputs by name, targets) to [N]")
    says: str = _option("", "where relevance starts, file.py:function: (outputs by name, targets) to [N]")
    distance: str = _option("", "how far two answers lie apart, file.py:function: (outputs, the dense one's) to [N]")
    decode: str = _option("", "a detector's boxes, file.py:function: (outputs by name) to boxes, scores and labels")
    batch_size: int = _option(32, "images per batch of calibration and evaluation")
    seed: int = _option(0, "every random choice follows from it")
    device: str = _option("auto", "what computes: auto (a GPU where there is one), cpu, cuda or cuda:1")
    criterion: str = _option(
        "lrp", "what scores the units: lrp, gradient_x_input, taylor, l1 ... (`compressor list criteria`)", *CRITERIA
    )
    composite: str = _option(
        "", "LRP's rules: epsilon-plus-flat, yeom2021, hatefi2024, a .toml or .json file, or a table of rules"
    )
    start: str = _option(
        "", "where relevance starts: one, logit, loss; else as the criterion's paper", "", *get_args(Start)
    )
    start_class: StartClass = _option(
        "true", "class it starts at: the labelled or the predicted", *get_args(StartClass)
    )
    sign: str = _option("", "of a unit's values: absolute, signed, squared; else the paper's", "", *get_args(Sign))
    per: str = _option(
        "", "values are summed up to here before their sign is taken; else the paper's", "", *get_args(Per)
    )
    place: str = _option(
        "", "values are read at the layer (site) or behind its activation (settled)", "", *get_args(Place)
    )
    strict: bool = _option(False, "refuse operations that LRP has no rule for, not pass them by input x gradient")
    accept: tuple[str, ...] = _option((), "operations that --strict lets pass by input x gradient all the same")
    gates_start: str = _option("", "criterion whose scores a learned one's gates start with", "", *UNLEARNED)
    gates_steps: int = _option(0, "batches that a learned criterion's gates see; 0: as its schedule says")
    selector_steps: int = _option(0, "batches that isp's selector sees, its predictor half as many; 0: as its schedule")
    gates_schedule: GatesSchedule = _option(
        "", "how gates learn: isp2022 as in the paper, for hours; else in about a minute", *get_args(GatesSchedule)
    )
    explanation: float = _option(0.5, "share of what isp keeps that is the selector's mask; the rest is the answer")
    budget: str = _option(
        "macs 0.5",
        "what may stay: 'macs 0.5', 'size 2 MB', 'latency 8 ms on onnxruntime', '30 fps on onnxruntime'; several: "
        "'macs 0.5, size 2 MB'; a run for each: 'macs 0.7,0.5'; none to remove nothing",
    )
    units: tuple[UnitKind, ...] = _option(
        ("channel", "neuron", "stream", "head", "conv_group"), "kinds of units that may go (also: head_dim)"
    )
    scope: Scope = _option(
        "global", "units compete globally, within their family, or lose a uniform share", *get_args(Scope)
    )
    reduction: Reduction = _option("sum", "scores of coupled layers to one", *get_args(Reduction))
    normalisation: Normalisation = _option(
        "measured",
        "what makes layers comparable: the loss measured when each gives up units, or a norm of its scores",
        *get_args(Normalisation),
    )
    per_cost: float = _option(0.5, "power of the MACs a unit costs that its score is divided by; 1 where measured")
    blocks: Blocks = _option(
        "keep",
        "drop: whole residual branches may go too, as many as pay; tries several, so takes longer",
        *get_args(Blocks),
    )
    least: float = _option(0.1, "share of every group that stays")
    multiple: int = _option(
        BY_WIDTH,
        "kept channels are rounded to multiples of this; -1: of 8, in small layers of an eighth of their width; 0: of "
        "what the runtime here likes",
    )
    rounds: int = _option(1, "rounds of score, remove and repair on the way to the budget")
    compensate: bool = _option(True, "repair consumers of what was removed by least squares")
    reestimate: bool = _option(False, "re-estimate batch normalisation from the calibration images")
    recovery_minutes: float = _option(
        2.0, "minutes at most in which the dense network teaches the repaired one, on all images; 0 for none"
    )
    finetune_epochs: int = _option(30, "passes of recovery over the images at most; 0 for none")
    learning_rate: float = _option(1e-3, "of recovery, the highest tried; a third and a ninth of it are tried, too")
    distillation: float = _option(1.0, "share of the loss that follows the dense model; the rest labels of classes")
    targets: tuple[str, ...] = _option(("SM86", "SM89"), "devices engines are built for; empty for none")
    precisions: tuple[str, ...] = _option(("fp32",), "of exported files: fp32, fp16, int8 (brings fp16 along)")
    runtimes: tuple[str, ...] = _option(
        (REFERENCE, "pytorch"), "what latency is measured on; the report says of those not here why"
    )
    latency_batches: tuple[int, ...] = _option((1, 32), "batch sizes that are timed")
    latency_seconds: float = _option(
        5.0, "time for each network and batch size; 2/5 of it where its percentiles have their runs"
    )
    max_accuracy_loss: float = _option(
        3.0, "gate: quality that the shipped network may lose: points of a share, else per cent"
    )
    max_int8_loss: float = _option(1.0, "gate: quality that int8 may lose, said alike; above it, layers stay in float")
    max_identity_error: float = _option(1e-9, "gate: pruned against masked original, float64, relative")
    max_parity: float = _option(1e-3, "gate: ONNX against PyTorch, relative to the largest output")
    out: str = _option("", "the run's folder; runs/<model> by default")

    def __post_init__(self) -> None:
        self._require_choices()
        self._require_choices_that_agree()
        self._require_entries()
        self._require_bounds()
        for point in points_of(self.budget):
            parse_budgets(point)
        for target in self.targets:
            resolve_target(target)

    def _require_choices(self) -> None:
        for f in fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value not in choices:
                named = list(filter(None, choices))  # "" leaves it to the run
                raise RecipeError(
                    f"{f.name} = {value!r} is not one of {', '.join(named)}.{did_you_mean(str(value), named)}"
                )

    def _require_choices_that_agree(self) -> None:
        if self.blocks == "drop" and self.criterion == "isp":
            raise RecipeError(
                "criterion = 'isp' learns masks from the dense network's blocks, which blocks = 'drop' may take away; "
                "use criterion = 'gates' or another, or blocks = 'keep'"
            )

    def _require_entries(self) -> None:
        for name, choices in _choices_of_lists().items():
            for value in getattr(self, name):
                if value not in choices:
                    raise RecipeError(
                        f"{name} has no {value!r}; there are {', '.join(choices)}.{did_you_mean(value, list(choices))}"
                    )

    def _require_bounds(self) -> None:
        for name, low, high in _BOUNDS:
            for number in _entries(getattr(self, name)):
                if not low <= number <= high:
                    raise RecipeError(f"{name} = {number} must lie between {low:g} and {high:g}")

    @property
    def as_it_is(self) -> bool:
        """Whether the network is exported, checked and shipped with nothing removed."""
        return is_none(self.budget)

    @property
    def recovers(self) -> bool:
        """Whether the repaired network is taught by the dense one."""
        return bool(self.recovery_minutes and self.finetune_epochs)

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.out or f"runs/{self.model.split(':')[-1].split('/')[-1]}")


class RecipeFields(TypedDict, total=False):
    """A recipe's fields but `model`, as keyword arguments that an editor completes; one value will do for a list."""

    weights: str
    data: str
    evaluation_data: str
    calibration: int
    evaluation: float
    damaged_images: float
    size: Sequence[int] | int
    resize: Sequence[int] | int
    interpolation: str
    mean: Sequence[float] | float
    std: Sequence[float] | float
    task: str
    quality: str | Callable[..., Any]
    loss: str | Callable[..., Any]
    says: str | Callable[..., Any]
    distance: str | Callable[..., Any]
    decode: str | Callable[..., Any]
    batch_size: int
    seed: int
    device: str
    criterion: str
    composite: str
    start: str
    start_class: StartClass
    sign: str
    per: str
    place: str
    strict: bool
    accept: Sequence[str] | str
    gates_start: str
    gates_steps: int
    selector_steps: int
    gates_schedule: GatesSchedule
    explanation: float
    budget: str
    units: Sequence[str] | str
    scope: Scope
    reduction: Reduction
    normalisation: Normalisation
    per_cost: float
    blocks: Blocks
    least: float
    multiple: int
    rounds: int
    compensate: bool
    reestimate: bool
    recovery_minutes: float
    finetune_epochs: int
    learning_rate: float
    distillation: float
    targets: Sequence[str] | str
    precisions: Sequence[str] | str
    runtimes: Sequence[str] | str
    latency_batches: Sequence[int] | int
    latency_seconds: float
    max_accuracy_loss: float
    max_int8_loss: float
    max_identity_error: float
    max_parity: float
    out: str | os.PathLike[str]


def _choices_of_lists() -> Mapping[str, tuple[str, ...]]:
    """What each value of a field that is a list may be."""
    return {
        "units": get_args(UnitKind),
        "precisions": ("fp32", "fp16", "int8"),
        "runtimes": runtime_names(),
    }


_BOUNDS: tuple[tuple[str, float, float], ...] = (
    ("calibration", 1, 10**9),
    ("evaluation", 0, 0.95),
    ("damaged_images", 0, 0.95),
    ("batch_size", 1, 10**6),
    ("seed", 0, 2**32 - 1),
    ("gates_steps", 0, 10**7),
    ("selector_steps", 0, 10**7),
    ("explanation", 0, 1),
    ("per_cost", 0, 100),
    ("least", 0, 1),
    ("multiple", BY_WIDTH, 4096),
    ("rounds", 1, 1000),
    ("recovery_minutes", 0, 10**5),
    ("finetune_epochs", 0, 10**6),
    ("learning_rate", 0, 10),
    ("distillation", 0, 1),
    ("latency_batches", 1, 10**6),
    ("latency_seconds", 0, 10**6),
    ("max_accuracy_loss", -100, 1e9),
    ("max_int8_loss", -100, 1e9),
    ("max_identity_error", 0, 10**6),
    ("max_parity", 0, 10**6),
)


def read_recipe(path: str | Path | None = None, **given: Any) -> Recipe:
    """The recipe of a TOML file with the given fields (not None) in their place.

    Without a file, an embedded model's own recipe is the base. Raises RecipeError naming the field.
    """
    base: dict[str, Any] = {}
    if path is not None:
        base = _read_toml(Path(path))
    else:
        name = given.get("model") or Recipe().model
        file = EMBEDDED / f"{name}.toml"
        is_name_alone = ":" not in name and "/" not in name
        if is_name_alone and file.is_file():
            base = _read_toml(file)
    stated = {name: value for name, value in given.items() if value is not None}
    return make_recipe({**base, **stated})


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """The recipe with these fields, each a value of its type or text that says one. Raises RecipeError naming the
    field."""
    hints = get_type_hints(Recipe)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise RecipeError(f"a recipe has no field {unknown[0]!r}.{did_you_mean(unknown[0], list(hints))}")
    typed = {name: _typed(name, value, _plain_kind(hints[name])) for name, value in values.items()}
    return replace(Recipe(), **typed)


def _plain_kind(kind: Any) -> Any:
    """A closed choice is read as text; which texts there are is checked by the recipe itself."""
    if get_origin(kind) is Literal:
        return str
    if get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal:
        return tuple[str, ...]
    return kind


def _typed(name: str, value: Any, kind: Any) -> Any:
    try:
        if get_origin(kind) is tuple:
            entry_kind = get_args(kind)[0]
            return tuple(_plain(entry_kind, entry) for entry in _entries(value))
        if name == "composite":
            return _plain(kind, _as_text(value))
        return _plain(kind, value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RecipeError(f"{name} = {repr(value)[:200]} is not understood; expected {_expected(kind)}") from error


def _entries(value: Any) -> Sequence[Any]:
    """What a list holds, a text with commas names, or else the one value."""
    if isinstance(value, str):
        return list(filter(None, map(str.strip, value.split(","))))
    return value if isinstance(value, (list, tuple)) else [value]


_KINDS: Mapping[Any, str] = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}


def _expected(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"{_KINDS[get_args(kind)[0]]}, or several with commas in between"
    return _KINDS[kind]


def _as_text(value: Any) -> Any:
    """A composite's table as JSON, whether it stands in the recipe or in a file of its own."""
    if isinstance(value, (str, os.PathLike)) and Path(value).suffix in _READERS:
        path = Path(value)
        value = _READERS[path.suffix](path)
        value = value.get("composite", value)  # a whole recipe will do
        if not isinstance(value, dict):
            return _as_text(value)
    return json.dumps(value) if isinstance(value, dict) else value


def _plain(kind: type, value: Any) -> Any:
    """Text is read as what the field wants; anything else must be that already (3 for 3.0, not 1 for 1.5)."""
    fits: Mapping[type, tuple[type, ...]] = {str: (str, os.PathLike), int: (int, str), float: (int, float, str)}
    is_switch = isinstance(value, bool)  # which Python counts among whole numbers
    if not isinstance(value, fits.get(kind, (kind,))) or (is_switch and kind is not bool):
        raise TypeError(f"not {_KINDS[kind]}")
    return kind(value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"can't read the recipe {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no TOML, or no UTF-8
        raise RecipeError(f"the recipe {path} is not valid TOML: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{path} holds {with_article(type(value).__name__)}, expected one object of rules")
    return value


_READERS: Mapping[str, Callable[[Path], dict[str, Any]]] = {".toml": _read_toml, ".json": _read_json}


def to_toml(recipe: Recipe) -> str:
    """The recipe as a TOML file that `read_recipe` reads back to the same."""
    lines = []
    for field_ in fields(recipe):
        value = getattr(recipe, field_.name)
        if field_.name == "composite" and value.lstrip().startswith("{"):
            value = json.loads(value)
        lines.append(f"{field_.name} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    match value:
        case bool() | str():
            return json.dumps(value, ensure_ascii=False)  # TOML reads JSON's escapes
        case tuple() | list():
            return f"[{', '.join(map(_toml_value, value))}]"
        case dict():
            pairs = ", ".join(f"{name} = {_toml_value(inner)}" for name, inner in value.items())
            return f"{{{pairs}}}"
        case _:
            return repr(value)

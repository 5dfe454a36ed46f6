"""How long and on what a search looks: one frozen record, checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from ..errors import RecipeError

USUAL_BUDGETS = (0.35, 0.5, 0.65, 0.8)


def _option(default: Any, text: str, of: type = str) -> Any:
    """A field with its help; `of` is the type of a list's items. `Any`, as a field stands for its value."""
    return field(default=default, metadata={"help": text, "of": of})


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """Trials score and repair with `score_images` and are judged on `trial_images`; finalists use all there are."""

    trials: int = _option(100, "trials in all, by every process and every start together")
    budgets: tuple[float, ...] = _option(
        (), "shares of the MACs a trial is judged at; 0.35,0.5,0.65,0.8 within reach", float
    )
    families: tuple[str, ...] = _option(("lrp",), "criteria to choose among; the recipe's own is always one")
    held: tuple[str, ...] = _option((), "choices that stay as the recipe has them, such as normalisation,scope")
    search_images: int = _option(1000, "images set apart to choose on, at most")
    trial_images: int = _option(300, "of them, how many judge a trial")
    score_images: int = _option(128, "calibration images that score and repair a trial")
    finalists: int = _option(3, "trials made again with all images, besides the presets")
    minutes: float = _option(0.0, "no trial is begun after so long; 0 for no limit")
    workers: int = _option(1, "processes at the trials here, each with its share of the threads")
    storage: str = _option("", "database address, such as postgresql://user@host/name; else a file in the folder")
    evaluate: bool = _option(True, "count the evaluation images for the finalists, once the choice is made")

    def __post_init__(self) -> None:
        if not all(0 < budget < 1 for budget in self.budgets):
            raise RecipeError(
                f"budgets {list(self.budgets)} must be shares of the MACs between 0 and 1, such as 0.35,0.5"
            )
        for name in ("trials", "search_images", "trial_images", "score_images", "finalists", "workers"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.minutes < 0:
            raise RecipeError(f"minutes = {self.minutes:g} must be 0 or more")


def make_options(values: Mapping[str, object]) -> SearchOptions:
    """From values or from text as it stands on the command line; None leaves the default.

    Raises RecipeError for what can't be read or lies outside its bounds.
    """
    typed: dict[str, Any] = {}
    for option in fields(SearchOptions):
        if values.get(option.name) is not None:
            typed[option.name] = _read(option, values[option.name])
    return SearchOptions(**typed)


def _read(option: Field[Any], value: Any) -> object:
    """In the type of the option's default; of a list, text is split at commas: `0.5,0.8` gives (0.5, 0.8)."""
    default: Any = option.default
    try:
        if not isinstance(default, tuple):
            return type(default)(value)
        entries = _words(value) if isinstance(value, str) else value
        return tuple(map(option.metadata["of"], entries))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{option.name} = {value!r} is not understood; an example: {default!r}") from error


def _words(text: str) -> list[str]:
    words = map(str.strip, text.split(","))
    return list(filter(None, words))

"""What stands for a user's function in a stage's key: the same in every process, another for other code."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

from compressor.inputs.decoding import NamedDecode
from compressor.run.task_choice import UserParts

SOURCE = """
def quality(predict, data):
    return sum(1 for inputs, targets in data if "a" in {"a", "b", "c"})
"""
SCRIPT = f"""
from compressor.run.task_choice import UserParts
source = {SOURCE!r}
exec(source)
print(UserParts({{"quality": quality}}).prints["quality"])
"""


def print_of(source: str, *, bound: int | None = None) -> str:
    names: dict[str, object] = {"__name__": "mine"}
    exec(source, names)
    function = names["quality"]
    assert callable(function)
    return UserParts({"quality": function if bound is None else functools.partial(function, bound)}).prints["quality"]


@pytest.mark.thorough
def test_a_functions_print_is_the_same_in_every_process() -> None:
    """A comprehension within prints as where it lies in memory, a set in the order of hashes."""
    command = [sys.executable, "-c", SCRIPT]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    )
    assert first == second


@pytest.mark.parametrize("change", [("sum", "max"), ("1 for", "2 for"), ('"b"', '"d"')])
def test_other_code_has_another_print(change: tuple[str, str]) -> None:
    assert print_of(SOURCE) != print_of(SOURCE.replace(*change))


def test_what_is_bound_belongs_to_it() -> None:
    assert print_of(SOURCE, bound=1) != print_of(SOURCE, bound=2)
    prints = [UserParts({"decode": NamedDecode({"threshold": share})}).prints["decode"] for share in (0.1, 0.2)]
    assert prints[0] != prints[1]

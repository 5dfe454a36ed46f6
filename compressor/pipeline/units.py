"""The dense network in, its groups of units out, each checked; kept in the run's folder as the check left them."""

from __future__ import annotations

from ..device import usage
from ..device.usage import Usage
from ..files import read_json, write_json, write_record
from ..placement import code_of
from ..pruning import Structure, analyse, find_structure
from ..run.work import Work


def find_units(work: Work) -> tuple[Structure, Usage]:
    """Groups of the traced graph, each checked, and what that took; a finished stage's if there is one."""
    path = work.stages.folder / "check.json"
    meter = usage.begin()
    if work.stages.holds("groups", group_inputs(work)) and path.is_file():
        findings = read_json(path, "check/1")
        return analyse(work.dense, tuple(findings["tied"]), tuple(findings["frozen"])), meter.read()
    work.stages.notify("groups", 0.0)
    structure = find_structure(work.dense, work.example, work.recipe.seed)
    return structure, meter.read()


def group_inputs(work: Work) -> list[object]:
    """What the groups depend on, as their stage's key holds it."""
    return [work.model.sha256, code_of(work.dense), list(work.inputs), work.recipe.seed]


def keep_units(work: Work, structure: Structure, spent: Usage | None = None) -> None:
    """The groups to disk; of the check its findings, not the labels. `spent` is what finding them took."""
    folder = work.stages.folder

    def write() -> None:
        write_record(folder / "groups.json", structure.groups)
        findings = {"schema": "check/1", "tied": list(structure.tied), "frozen": list(structure.frozen)}
        write_json(folder / "check.json", findings)

    work.stages.do("groups", group_inputs(work), write, lambda: None, spent=spent)

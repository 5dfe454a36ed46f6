"""The dense network in, its groups of units out, each checked; kept in the run's folder as the check left them."""

from __future__ import annotations

from ..device import usage
from ..device.usage import Usage
from ..distributed import by_first, world
from ..files import read_json, write_json, write_record
from ..placement import code_of
from ..pruning import Structure, analyse, find_structure
from ..run.work import Work

Findings = tuple[tuple[str, ...], tuple[str, ...]]  # names of the nodes that the check tied and froze


def find_units(work: Work) -> tuple[Structure, Usage]:
    """Groups of the traced graph, each checked, and what that took; a finished stage's if there is one."""
    meter = usage.begin()
    findings = by_first(lambda: _kept_findings(work))
    if findings is None and world() == 1:
        return _checked(work), meter.read()
    tied, frozen = by_first(lambda: _findings_of(_checked(work))) if findings is None else findings
    return analyse(work.dense, tied, frozen), meter.read()


def _kept_findings(work: Work) -> Findings | None:
    """A finished stage's; None where there is none."""
    path = work.stages.folder / "check.json"
    if not (work.stages.holds("groups", group_inputs(work)) and path.is_file()):
        return None
    findings = read_json(path, "check/1")
    return tuple(findings["tied"]), tuple(findings["frozen"])


def _checked(work: Work) -> Structure:
    work.stages.notify("groups", 0.0)
    return find_structure(work.dense, work.example, work.recipe.seed)


def _findings_of(structure: Structure) -> Findings:
    return structure.tied, structure.frozen


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

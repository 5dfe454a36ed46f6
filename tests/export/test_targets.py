"""Names of devices: every spelling of every target leads to it, and what is none is refused with those that are."""

from __future__ import annotations

import pytest

from compressor.errors import InputError
from compressor.export.targets import _ALIASES, RTX_CAPABILITIES, RTX_DEFAULT, TARGETS, resolve_target


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_found_under_all_its_spellings(name: str) -> None:
    spellings = [name, name.lower(), name.upper()]
    if name.startswith("SM"):
        digits = name.removeprefix("SM")
        spellings += [digits, f"{digits[:-1]}.{digits[-1]}", f"sm_{digits}"]
    assert {resolve_target(spelling).name for spelling in spellings} == {name}


@pytest.mark.parametrize(("alias", "name"), _ALIASES.items())
def test_a_devices_name_leads_to_its_capability(alias: str, name: str) -> None:
    assert resolve_target(alias).name == resolve_target(alias.upper()).name == name


def test_no_target_has_a_library_that_does_not_serve_it() -> None:
    for target in TARGETS.values():
        serves_rtx = set(target.compute_capabilities) <= set(RTX_CAPABILITIES)
        assert serves_rtx or "tensorrt_rtx" not in target.libraries
        assert target.libraries
    assert set(RTX_DEFAULT) <= set(RTX_CAPABILITIES)


@pytest.mark.parametrize("name", ["SM99", "", "rtx2", "gpu", "8..6.1"])
def test_what_is_no_target_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(InputError, match=f"no target '{name}'; there are rtx, this-gpu, SM75"):
        resolve_target(name)


def test_a_near_name_is_suggested() -> None:
    with pytest.raises(InputError, match=r"Did you mean .*'orin'"):
        resolve_target("orim")

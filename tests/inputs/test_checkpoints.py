"""Weights that no trained model has are refused in one line, from a file and in a model that is handed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.inputs.checkpoints import fill, state_hash


def _net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def _changed(name: str, value: Callable[[Tensor], Any]) -> dict[str, Any]:
    state = _net().state_dict()
    return {**state, name: value(state[name])}


def _inf(tensor: Tensor) -> Tensor:
    return tensor.clone().fill_(float("inf"))


def _qint8(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


FILES: list[tuple[str, Callable[[Tensor], Any], str]] = [
    ("3.weight", _inf, r"holds infinity \(first in '3\.weight'\)"),
    ("3.weight", lambda t: t * float("nan"), r"holds NaN \(first in '3\.weight'\)"),
    ("1.running_var", lambda t: t - 2, r"holds a negative variance \(first in '1\.running_var'\)"),
    ("3.weight", lambda t: (100 * t).to(torch.int8), "holds int8 where the model has float32"),
    ("3.weight", lambda t: t.to_sparse(), "holds '3.weight' as sparse_coo; store it dense"),
    ("3.weight", _qint8, "holds '3.weight' as qint8; give the float model"),
    ("3.weight", lambda t: t.to("meta"), "has no values for '3.weight'"),
]


@pytest.mark.filterwarnings("ignore")  # torch takes its quantised tensors away
@pytest.mark.parametrize(("name", "value", "said"), FILES, ids=[said[:24] for *_, said in FILES])
def test_a_checkpoint_with_strange_values_is_refused(
    tmp_path: Path, name: str, value: Callable[[Tensor], Any], said: str
) -> None:
    torch.save(_changed(name, value), tmp_path / "x.pt")
    module = _net()
    before = state_hash(module)
    with pytest.raises(ModelError, match=said):
        fill(module, tmp_path / "x.pt")
    assert state_hash(module) == before


def test_a_number_in_place_of_a_vector_is_a_misfit(tmp_path: Path) -> None:
    torch.save(_changed("3.bias", lambda t: t[0].clone()), tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"1 of other shape \('3\.bias' \[\] in the file, \[2\] in the model\)"):
        fill(_net(), tmp_path / "x.pt")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken(tmp_path: Path, kind: torch.dtype) -> None:
    saved = {name: t.to(kind) if t.is_floating_point() else t for name, t in _net().state_dict().items()}
    torch.save(saved, tmp_path / "x.pt")
    module = _net()
    fill(module, tmp_path / "x.pt")
    state = module.state_dict()
    assert all(torch.equal(state[name], tensor.to(state[name].dtype)) for name, tensor in saved.items())
    assert all(state[name].dtype == tensor.dtype for name, tensor in _net().state_dict().items())


def test_a_mask_may_be_infinite_where_the_models_own_is(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    torch.save({**module.state_dict(), "bias": torch.tensor([7.0, 8.0])}, tmp_path / "x.pt")
    fill(module, tmp_path / "x.pt")
    assert module.bias.tolist() == [7.0, 8.0]
    assert module.mask.tolist() == [0.0, float("-inf")]


def _quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(_net(), {nn.Linear}, torch.qint8)


def _on_meta() -> nn.Module:
    with torch.device("meta"):
        return _net()


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_quantised, "quantised .* Give the float model"),
        (_on_meta, "has no values for '0.weight'"),
        (_lazy, "has no size yet .* run the model on one image"),
    ],
)
def test_a_model_without_plain_weights_is_refused(make: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        state_hash(make())


def test_what_a_module_keeps_beside_tensors_does_not_stop_it() -> None:
    class Counting(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"steps": 7}

        def set_extra_state(self, state: object) -> None: ...

    assert state_hash(Counting(2, 2))


class Versioned(nn.Linear):
    """As MNASNet: its layout changed once, so it loads nothing without a version."""

    _version = 2

    def _load_from_state_dict(
        self, state: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError(f"version should be 2 instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


@pytest.mark.parametrize("form", ["safetensors", "pt", "nested"])
def test_a_module_that_asks_for_its_version_is_filled_from_tensors_alone(tmp_path: Path, form: str) -> None:
    module, trained = nn.Sequential(Versioned(3, 2)), nn.Sequential(Versioned(3, 2))
    path = tmp_path / ("x.safetensors" if form == "safetensors" else "x.pt")
    if form == "safetensors":
        save_file(trained.state_dict(), path)
    else:
        state = dict(trained.state_dict())
        torch.save({"state_dict": state} if form == "nested" else state, path)
    fill(module, path)
    assert state_hash(module) == state_hash(trained)


def test_a_module_that_refuses_its_own_tensors_says_why_in_one_line(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def _load_from_state_dict(self, *arguments: Any) -> None:
            raise RuntimeError("not today\nnor tomorrow")

    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"has the model's names and shapes, but not today$"):
        fill(Odd(3, 2), tmp_path / "x.pt")


def test_a_tensor_of_two_names_may_be_stored_under_one(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.again = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.first(x))

    trained, fresh = Tied(), Tied()
    save_model(trained, str(tmp_path / "tied.safetensors"))  # which keeps one name of the two
    fill(fresh, tmp_path / "tied.safetensors")
    assert torch.equal(fresh.again.weight, trained.first.weight)

"""Training that is put aside and gone on with: tensors in a file that is written whole or not at all.

The file names what it belongs to; what belongs to anything else is begun anew. It goes when the training is done.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FolderError
from ..files import content_hash, read_arrays, write_arrays

SECONDS = 10.0  # between two writings: as much is lost at most where a run is killed
_STEP, _KEY = "step", "key"
_OPTIMISER = "optimiser."
State = dict[str, Tensor]


@dataclass
class Checkpoint:
    """`path` is None where nothing is kept; `belongs` is all that a training is made of."""

    path: Path | None
    belongs: object
    seconds: float = field(default_factory=lambda: SECONDS)
    _written: float = field(default_factory=time.monotonic)

    @property
    def _key(self) -> Tensor:
        return torch.frombuffer(bytearray(bytes.fromhex(content_hash(self.belongs))), dtype=torch.uint8)

    def read(self) -> tuple[int, State] | None:
        """The steps that are done and the tensors after them; None where there are none of this training."""
        if self.path is None:
            return None
        try:
            state = {name: torch.from_numpy(array.copy()) for name, array in read_arrays(self.path).items()}
            key, step = state.pop(_KEY), state.pop(_STEP)
        except (FolderError, KeyError):  # not there, or damaged: it is begun anew
            return None
        return (int(step), state) if torch.equal(key, self._key) else None

    @property
    def is_due(self) -> bool:
        """Whether the last writing is long ago."""
        return self.path is not None and time.monotonic() - self._written >= self.seconds

    def write(self, step: int, state: Mapping[str, Tensor], *, due: bool = False) -> None:
        """Where the last writing is long ago, or where it is `due`."""
        if self.path is None or not (due or self.is_due):
            return
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in state.items()}
        write_arrays(self.path, {**arrays, _STEP: torch.tensor(step).numpy(), _KEY: self._key.numpy()})
        self._written = time.monotonic()

    def close(self) -> None:
        """The training is done, and its result is somebody else's to keep."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def optimiser_state(optimiser: torch.optim.Optimizer) -> State:
    """Adam's moments and counts, of every parameter by its number."""
    state: State = {}
    for number, parameter in enumerate(_parameters(optimiser)):
        for name, moment in optimiser.state.get(parameter, {}).items():
            state[f"{_OPTIMISER}{number}.{name}"] = torch.as_tensor(moment).detach().clone()
    return state


def restore_optimiser(optimiser: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """What `optimiser_state` gave, back."""
    parameters = _parameters(optimiser)
    moments = {key.removeprefix(_OPTIMISER): tensor for key, tensor in state.items() if key.startswith(_OPTIMISER)}
    for key, moment in moments.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if moment.ndim:  # Adam counts steps, a single number, on the CPU
            moment = moment.to(parameter.device)
        optimiser.state[parameter][name] = moment


def _parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]

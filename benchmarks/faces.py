"""MTCNN's three networks as facenet-pytorch ships them: photographs in, what each network is given in use, boxes out.

A network is shown what the stages before it propose on photographs (P-Net windows of the photographs' scales), half
of it what its own dense answer takes for a face. No label is read. The detector's flow is the package's own.
Zhang et al. 2016, arXiv 1604.02878.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_iou

STAGES = ("pnet", "rnet", "onet")
SIDE_PX = 256  # of the photographs, all alike so that they are searched together
LEAST_FACE_PX = 20
THRESHOLDS = {"pnet": 0.6, "rnet": 0.7, "onet": 0.7}  # the package's own: probabilities from which it is a face
PYRAMID = 0.709  # from one scale of the photograph to the next
WINDOW_PX = 40  # of P-Net, which takes any size: a map of 15 x 15 answers
TOGETHER = 20  # photographs
SAME_FACE = 0.5  # intersection over union
Boxes = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Search:
    """The dense detector on photographs: its boxes on each; by stage the network's inputs and its probabilities [N]."""

    boxes: list[Boxes]
    inputs: Mapping[str, Tensor]
    probabilities: Mapping[str, Tensor]

    def drawn(self, stage: str, count: int, seed: int) -> Tensor:
        """So many of a stage's inputs, half of them faces by the dense network's own word where there are as many."""
        is_face = (self.probabilities[stage] >= THRESHOLDS[stage]).numpy()
        return self.inputs[stage][balanced(is_face, count, seed)]


@dataclass(frozen=True, slots=True, eq=False)
class Detector:
    """The package's three networks by stage, and its function that runs them one after the other."""

    networks: Mapping[str, nn.Module]
    detection: ModuleType

    def boxes(self, photos: NDArray[np.uint8], **replaced: nn.Module) -> list[Boxes]:
        """[k, 5] for each of the photographs [N, height, width, 3]: x0 y0 x1 y1 in pixels and the probability.

        A stage's network is replaced by the one named so.
        """
        stages = [replaced.get(stage, self.networks[stage]) for stage in STAGES]
        boxes: list[Boxes] = []
        for start in range(0, len(photos), TOGETHER):
            part = photos[start : start + TOGETHER]
            with torch.no_grad():
                found, _ = self.detection.detect_face(
                    part, LEAST_FACE_PX, *stages, list(THRESHOLDS.values()), PYRAMID, torch.device("cpu")
                )
            boxes += [np.asarray(rows, np.float64).reshape(-1, 5) for rows in found]
        return boxes

    def search(self, photos: NDArray[np.uint8], seed: int) -> Search:
        """The boxes on these photographs, and what each stage's network was given on the way to them."""
        inputs: dict[str, list[Tensor]] = {stage: [] for stage in STAGES}
        hooks = [
            network.register_forward_pre_hook(lambda _, given, stage=stage: inputs[stage].append(given[0]))
            for stage, network in self.networks.items()
        ]
        try:
            boxes = self.boxes(photos)
        finally:
            for hook in hooks:
                hook.remove()
        generator = np.random.default_rng(seed)
        windows = [self._windows(level, generator) for level in inputs["pnet"] if min(level.shape[2:]) >= WINDOW_PX]
        crops = {"pnet": torch.cat(windows), "rnet": torch.cat(inputs["rnet"]), "onet": torch.cat(inputs["onet"])}
        probabilities = {stage: self.probabilities(stage, given) for stage, given in crops.items()}
        return Search(boxes, crops, probabilities)

    @torch.no_grad()
    def probabilities(self, stage: str, inputs: Tensor) -> Tensor:
        """[N]: of a face; of P-Net's maps the highest."""
        answers = [self.networks[stage](part)[-1][:, 1:].flatten(1) for part in inputs.split(512)]
        return torch.cat(answers).amax(1)

    @torch.no_grad()
    def _windows(self, level: Tensor, generator: np.random.Generator) -> Tensor:
        """Two of each photograph [N, 3, h, w] at one scale: around P-Net's most probable face, and anywhere."""
        probability = self.networks["pnet"](level)[-1][:, 1]  # [N, rows, columns], a stride of 2 pixels
        highest = probability.flatten(1).argmax(1)
        room = np.array(level.shape[2:]) - WINDOW_PX
        windows: list[Tensor] = []
        for image, place in zip(level, highest.tolist(), strict=True):
            row, column = divmod(place, probability.shape[2])
            around = 2 * np.array([row, column]) + 6 - WINDOW_PX // 2  # its field of 12 pixels in the middle
            for top, left in (around.clip(0, room), generator.integers(0, room + 1)):
                windows.append(image[:, top : top + WINDOW_PX, left : left + WINDOW_PX])
        return torch.stack(windows)


def balanced(is_face: NDArray[np.bool_], count: int, seed: int) -> NDArray[np.int64]:
    """So many places of [N], half of them faces or, where they are too few, all faces and more of the others."""
    order = np.random.default_rng(seed).permutation(len(is_face))
    faces, others = order[is_face[order]], order[~is_face[order]]
    taken = min(len(faces), max(count // 2, count - len(others)))
    return np.concatenate([faces[:taken], others[: count - taken]])


def read_photos(folder: Path, count: int) -> NDArray[np.uint8]:
    """[N, side, side, 3]: the folder's first images by name."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))[:count]
    if not paths:
        raise SystemExit(f"{folder} holds no .jpg or .png; give another folder of photographs")
    return np.stack([np.asarray(Image.open(path).convert("RGB").resize((SIDE_PX, SIDE_PX))) for path in paths])


def box_f1(boxes: Sequence[Boxes], dense: Sequence[Boxes]) -> float:
    """F1 of boxes against the dense detector's, each matched at most once, the most probable first."""
    matched = 0
    for rows, wanted in zip(boxes, dense, strict=True):
        overlap = box_iou(torch.from_numpy(rows[:, :4]), torch.from_numpy(wanted[:, :4])).numpy()
        for row in np.argsort(-rows[:, 4]):
            if overlap.shape[1] and overlap[row].max() >= SAME_FACE:
                matched += 1
                overlap[:, overlap[row].argmax()] = 0.0
    total = sum(map(len, boxes)) + sum(map(len, dense))
    return 2 * matched / total if total else 1.0

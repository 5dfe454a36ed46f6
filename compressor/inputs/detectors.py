"""A detector in, the network that answers before boxes are chosen out, and the decode that chooses them.

Which boxes stay (anchors above a threshold, non-maximum suppression, regions of interest) depends on values, and no
traced graph can hold that. So backbone and heads are the network, and what follows stays the library's own code.
Detectors are told by their parts, as torchvision's are made, not by their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..graph.wrappers import copied, is_detector
from .images import Preprocessing

Detections = list[dict[str, Tensor]]
Size = tuple[int, int]

_BATCH_NORM_EPS = 1e-5  # of `nn.BatchNorm2d`


class _Transform(Protocol):
    """What is read of torchvision's `GeneralizedRCNNTransform`; `fixed_size` is (width, height)."""

    min_size: Sequence[int]
    size_divisible: int
    fixed_size: tuple[int, int] | None
    image_mean: Sequence[float]
    image_std: Sequence[float]


class DenseHeads(nn.Module):
    """Backbone and head of a one-stage detector.

    Takes images [N, 3, H, W], normalised already, and answers what the head does of every anchor: `cls_logits`
    [N, anchors, classes], `bbox_regression` [N, anchors, 4], of FCOS `bbox_ctrness` [N, anchors, 1] too.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        answer: dict[str, Tensor] = self.head(list(_maps(self.backbone(images)).values()))
        return dict(answer)


class RegionProposals(nn.Module):
    """Backbone and region proposals of a two-stage detector.

    Takes images [N, 3, H, W], normalised already, and answers a map [N, C, h, w] a level (`features`), with, for each
    of its anchors, whether something is there (`objectness`) and where (`deltas`).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = nn.ModuleDict({"head": head})  # weights keep the names they have in the detector

    def forward(self, images: Tensor) -> dict[str, object]:
        maps = _maps(self.backbone(images))
        objectness, deltas = self.rpn["head"](list(maps.values()))
        return {"features": maps, "objectness": objectness, "deltas": deltas}


@dataclass(frozen=True, slots=True, eq=False)
class Decoder:
    """Boxes of a one-stage detector from its network's outputs, by the detector's own anchors and post-processing.

    `size` is the (height, width) of the network's input in pixels; `at` gives the decoder of another one.
    """

    detector: nn.Module
    size: Size

    def at(self, size: Size) -> Decoder:
        return replace(self, size=size)

    @torch.no_grad()
    def __call__(self, outputs: Mapping[str, Tensor]) -> Detections:
        """For each image `boxes` [k, 4], `scores` [k] and `labels` [k], best first.

        Boxes are x0 y0 x1 y1 in pixels of the network's input. `outputs` are the network's, on the CPU. Raises
        ModelError where they are of images of another size.
        """
        anchors, levels = self._anchors(len(outputs["cls_logits"]))
        sizes = [self.size] * len(anchors)
        self._require_fitting(outputs["cls_logits"].shape[1], len(anchors[0]))
        postprocess = cast(Callable[..., Detections], self.detector.postprocess_detections)
        if _takes_all_levels(self.detector):
            return postprocess(dict(outputs), anchors, sizes)
        parts = {name: list(leaf.split_with_sizes(levels, 1)) for name, leaf in outputs.items()}
        return postprocess(parts, [list(boxes.split_with_sizes(levels)) for boxes in anchors], sizes)

    def _anchors(self, count: int) -> tuple[list[Tensor], list[int]]:
        """Anchors [anchors, 4] for each of `count` images, and how many there are at each level."""
        from torchvision.models.detection.image_list import ImageList

        maps = [torch.empty(1, 1, *sides) for sides in _map_sizes(self.detector, self.size)]
        images = ImageList(torch.empty(count, 3, *self.size, device="meta"), [self.size] * count)
        generate = cast(Callable[[object, list[Tensor]], list[Tensor]], self.detector.anchor_generator)
        anchors = generate(images, maps)
        cells = [level.numel() for level in maps]
        return anchors, [len(anchors[0]) // sum(cells) * level for level in cells]

    def _require_fitting(self, answered: int, expected: int) -> None:
        if answered != expected:
            raise ModelError(
                f"the network answered for {answered} anchors, and images of {self.size[0]} x {self.size[1]} have "
                f"{expected}; take the decoder of the size it ran at: decode.at((height, width))"
            )


@dataclass(frozen=True, slots=True)
class Split:
    """`decode` is None for detectors of two stages; `notes` say what was left outside, for the report."""

    network: nn.Module
    decode: Decoder | None
    preprocessing: Preprocessing
    notes: tuple[str, ...]


def detector_network(detector: nn.Module) -> tuple[nn.Module, Decoder | None]:
    """A detector's network (backbone and heads), which can be compressed, and its decode, which follows it.

    `detector` is torchvision's, or made of such parts: SSD, SSDlite, RetinaNet, FCOS, and Faster, Mask and Keypoint
    R-CNN. The network takes images [N, 3, H, W] that are normalised already (`detector.transform` is left out) and
    answers a dict of tensors. `decode(outputs)` gives `boxes`, `scores` and `labels` of each image for inputs as large
    as the detector's own, `decode.at((height, width))` for others; it is None for detectors of two stages, the rest of
    which (`roi_heads`) is not pruned. The detector stays as it is. Raises ModelError for a module without these parts.
    """
    split = split_detector(detector)
    return split.network, split.decode


def split_detector(detector: nn.Module) -> Split:
    """The same with the pre-processing that its transform stands for, and what was left outside."""
    if not is_detector(detector):
        raise ModelError(
            f"{type(detector).__name__} is no detector with torchvision's parts (backbone with head and "
            "anchor_generator, or with rpn and roi_heads); write a module of backbone and heads, and decode what it "
            "answers"
        )
    detector = copied(detector).eval()
    notes = _thaw(detector)
    preprocessing = _preprocessing(cast(_Transform, detector.transform))
    backbone = cast(nn.Module, detector.backbone)
    if hasattr(detector, "roi_heads"):
        network: nn.Module = RegionProposals(backbone, cast(nn.Module, cast(nn.Module, detector.rpn).head))
        notes.append(
            "it is backbone and region proposals of the detector, which answer with feature maps, objectness and "
            "deltas; what chooses boxes, and the heads for each of them (roi_heads), stay outside and are not pruned"
        )
        return Split(network, None, preprocessing, tuple(notes))
    network = DenseHeads(backbone, cast(nn.Module, detector.head))
    notes.append("it is backbone and head of the detector; anchors and the choice of boxes are its decode")
    return Split(network, Decoder(detector, preprocessing.size), preprocessing, tuple(notes))


def _preprocessing(transform: _Transform) -> Preprocessing:
    """What the transform does, for inputs of one size: a fixed one, else the square of its shorter side.

    Images are scaled to it whole, as nothing at their margins may be cut off.
    """
    if transform.fixed_size is not None:
        width, height = transform.fixed_size
    else:
        shorter, multiple = transform.min_size[-1], transform.size_divisible
        width = height = math.ceil(shorter / multiple) * multiple
    size = (int(height), int(width))
    return Preprocessing(size, size, "bilinear", tuple(transform.image_mean), tuple(transform.image_std))


def _maps(features: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's answer by level."""
    return {"0": features} if isinstance(features, Tensor) else dict(features)


@torch.no_grad()
def _map_sizes(detector: nn.Module, size: Size) -> list[Size]:
    """Height and width of the backbone's maps, largest first; nothing is computed for it."""
    backbone = cast(nn.Module, detector.backbone)
    state = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    without_values = {name: tensor.to("meta") for name, tensor in state.items()}
    image = torch.empty(1, 3, *size, device="meta")
    maps: Any = torch.func.functional_call(backbone, without_values, (image,))
    return [(level.shape[-2], level.shape[-1]) for level in _maps(maps).values()]


def _takes_all_levels(detector: nn.Module) -> bool:
    """Whether the post-processing takes the anchors of all levels at once, as that of SSD's default boxes does."""
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

    return isinstance(detector.anchor_generator, DefaultBoxGenerator)


@torch.no_grad()
def _thaw(detector: nn.Module) -> list[str]:
    """Frozen batch normalisation as the batch normalisation it is, in place; says so.

    A detector without trained weights is built with the latter: a network is rebuilt from that. The library sets eps to
    zero with some weights; the factor between the two goes into the scale, as the variance may be smaller than eps.
    """
    from torchvision.ops import FrozenBatchNorm2d

    names = [name for name, layer in detector.named_modules() if isinstance(layer, FrozenBatchNorm2d)]
    for name in names:
        path, _, last = name.rpartition(".")
        setattr(detector.get_submodule(path), last, _thawed(detector.get_submodule(name)))
    return ["frozen batch normalisation was written as batch normalisation"] if names else []


def _thawed(frozen: nn.Module) -> nn.BatchNorm2d:
    values = {name: cast(Tensor, getattr(frozen, name)) for name in ("weight", "bias", "running_mean", "running_var")}
    norm = nn.BatchNorm2d(len(values["bias"]), eps=_BATCH_NORM_EPS).eval()
    variance = values["running_var"].double()
    factor = ((variance + _BATCH_NORM_EPS) / (variance + cast(float, frozen.eps))).sqrt()
    values["weight"] = (values["weight"].double() * factor).to(values["weight"].dtype)
    norm.load_state_dict(values, strict=False)
    return norm

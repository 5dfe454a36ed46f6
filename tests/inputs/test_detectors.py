from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d

import compressor
from compressor.errors import ModelError
from compressor.graph import trace
from compressor.graph.wrappers import is_detector, plain
from compressor.inputs.detectors import Decoder, split_detector
from compressor.inputs.images import Preprocessing
from compressor.inputs.models import load_model
from compressor.tensors import named_leaves

SIZE = (64, 96)  # height and width of the images: both axes must be told apart
CLASSES = 3
FROZEN = 1e-5  # of the largest output: one multiplication more in float32


class Pyramid(nn.Module):
    """Maps of half and a quarter of the image's sides, [N, 32, h, w]."""

    out_channels = 32

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), norm(32), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(32, 32, 3, 2, 1), norm(32), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(x)
        return OrderedDict([("0", first), ("1", self.second(first))])


def ssd() -> SSD:
    backbone = Pyramid()
    backbone.out_channels = [32, 32]  # type: ignore[assignment]
    return SSD(backbone, DefaultBoxGenerator([[2], [2, 3]]), SIZE[::-1], CLASSES)  # its size is (width, height)


def retinanet(norm: type[nn.Module] = nn.BatchNorm2d) -> RetinaNet:
    anchors = AnchorGenerator(((8, 12), (24, 32)), ((0.5, 1.0),) * 2)
    return RetinaNet(Pyramid(norm), CLASSES, min_size=50, max_size=200, anchor_generator=anchors)


def fcos() -> FCOS:
    anchors = AnchorGenerator(((8,), (16,)), ((1.0,),) * 2)
    return FCOS(Pyramid(), CLASSES, min_size=64, max_size=200, anchor_generator=anchors)


def faster_rcnn() -> FasterRCNN:
    anchors = AnchorGenerator(((8,), (16,)), ((1.0, 2.0),) * 2)
    return FasterRCNN(Pyramid(), CLASSES, rpn_anchor_generator=anchors, min_size=64, max_size=200)


def _boxes_of(detector: nn.Module, images: Tensor) -> list[dict[str, Tensor]]:
    """The detector's own answer to images that are as it wants them: neither resized nor normalised again."""
    height, width = images.shape[-2:]
    detector.transform = GeneralizedRCNNTransform(
        height, width, [0.0] * 3, [1.0] * 3, size_divisible=1, fixed_size=(width, height)
    )
    with torch.no_grad():
        answer: list[dict[str, Tensor]] = detector.eval()(list(images))
    return answer


@pytest.mark.parametrize("build", [ssd, retinanet, fcos])
def test_the_decode_gives_the_librarys_own_boxes(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    detector, images = build(), torch.rand(2, 3, *SIZE)
    detector.score_thresh = 0.005  # of random weights some boxes are to stay
    network, decode = compressor.detector_network(detector)
    assert decode is not None
    with torch.no_grad():
        outputs = named_leaves(network(images))
    boxes = decode.at(SIZE)(outputs)

    expected = _boxes_of(detector, images)
    assert all(len(image["boxes"]) > 5 for image in expected)
    for image, library in zip(boxes, expected, strict=True):
        assert set(image) == {"boxes", "scores", "labels"}
        assert all(torch.equal(image[name], library[name]) for name in library)


def test_outputs_of_another_size_are_refused() -> None:
    network, decode = compressor.detector_network(retinanet())
    assert decode is not None
    with torch.no_grad(), pytest.raises(ModelError, match=r"decode\.at\(\(height, width\)\)"):
        decode(network(torch.rand(1, 3, *SIZE)))


def test_the_pre_processing_is_the_transforms() -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert split_detector(ssd()).preprocessing == Preprocessing(SIZE, SIZE, "bilinear", *imagenet)
    sides = (64, 64)  # 50 px, filled up to a multiple of 32
    assert split_detector(retinanet()).preprocessing == Preprocessing(sides, sides, "bilinear", *imagenet)


def test_two_stages_answer_with_maps_and_proposals_by_level() -> None:
    torch.manual_seed(0)
    detector, images = faster_rcnn().eval(), torch.rand(2, 3, *SIZE)
    split = split_detector(detector)
    assert split.decode is None
    assert any("roi_heads" in note for note in split.notes)
    assert set(split.network.state_dict()) <= set(detector.state_dict())
    with torch.no_grad():
        leaves, maps = named_leaves(split.network(images)), detector.backbone(images)
        objectness, deltas = detector.rpn.head(list(maps.values()))
    expected = {f"features.{name}": level for name, level in maps.items()}
    expected |= {f"objectness.{i}": level for i, level in enumerate(objectness)}
    expected |= {f"deltas.{i}": level for i, level in enumerate(deltas)}
    assert list(leaves) == list(expected)
    assert all(torch.equal(leaves[name], expected[name]) for name in expected)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
def test_frozen_batch_normalisation_answers_the_same(eps: float) -> None:
    torch.manual_seed(0)
    detector, images = retinanet(FrozenBatchNorm2d).eval(), torch.rand(2, 3, *SIZE)
    for layer in detector.modules():
        if isinstance(layer, FrozenBatchNorm2d):
            layer.eps = eps
            layer.running_var.uniform_(1e-6, 1e-3)  # smaller than eps, some of them
            layer.running_mean.normal_()
            layer.weight.normal_()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    split = split_detector(detector)
    assert not any(isinstance(layer, FrozenBatchNorm2d) for layer in split.network.modules())
    assert any("frozen" in note for note in split.notes)
    with torch.no_grad():
        leaves = split.network(images)
        expected = detector.head(list(detector.backbone(images).values()))
    for name, leaf in expected.items():
        assert (leaves[name] - leaf).abs().max() <= FROZEN * leaf.abs().max()
    assert isinstance(detector.backbone.first[1], FrozenBatchNorm2d)  # the caller's stays as it was
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())


def test_a_whole_detector_is_refused_with_the_way_to_split_it() -> None:
    for detector in (ssd(), faster_rcnn(), nn.DataParallel(retinanet())):
        with pytest.raises(ModelError, match=r"compressor\.detector_network\(model\)"):
            plain(detector)
    assert not is_detector(compressor.detector_network(ssd())[0])
    with pytest.raises(ModelError, match="no detector with torchvision's parts"):
        compressor.detector_network(nn.Linear(1, 1))


class Suppressing(nn.Module):
    """A detector of another make: it drops what is below a threshold by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        boxes = self.head(images).flatten(2).transpose(1, 2)[0]  # [anchors, 5]
        kept = boxes[boxes[:, 4] > 0]
        return kept if len(kept) else boxes[:1]


def test_a_choice_of_boxes_inside_forward_names_the_split() -> None:
    with pytest.raises(ModelError, match="give backbone and heads as the model, and keep what follows as its decode"):
        trace(Suppressing(), torch.rand(2, 3, 8, 8))


class Heads(SSD):
    """A user's own split, by inheritance."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        answer: dict[str, Tensor] = self.head(list(self.backbone(images).values()))
        return answer


def test_a_module_of_the_same_parts_that_is_split_already_is_taken() -> None:
    backbone = Pyramid()
    backbone.out_channels = [32, 32]  # type: ignore[assignment]
    heads = Heads(backbone, DefaultBoxGenerator([[2], [2, 3]]), SIZE[::-1], CLASSES)
    assert plain(heads).module is heads


def test_a_name_and_a_factory_come_to_the_same_network() -> None:
    model = load_model("torchvision:ssdlite320_mobilenet_v3_large(num_classes=4)", "none")
    assert model.preprocessing == Preprocessing((320, 320), (320, 320), "bilinear", (0.5,) * 3, (0.5,) * 3)
    assert isinstance(model.decode, Decoder)
    assert any("decode" in note for note in model.notes)
    factory = "torchvision.models.detection:ssdlite320_mobilenet_v3_large(num_classes=4, weights_backbone=None)"
    built = load_model(factory)
    assert built.sha256 == model.sha256
    with torch.no_grad():
        leaves = named_leaves(model.module(torch.rand(1, 3, 320, 320)))
    assert {name: tuple(leaf.shape) for name, leaf in leaves.items()} == {
        "bbox_regression": (1, 3234, 4),
        "cls_logits": (1, 3234, 4),
    }


def test_a_checkpoint_of_the_whole_detector_fits(tmp_path: Path) -> None:
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    detector = get_model(name, weights=None, weights_backbone=None)
    file = tmp_path / "detector.pt"
    torch.save(detector.state_dict(), file)
    state = load_model(f"torchvision:{name}", str(file)).module.state_dict()
    assert not any(key.startswith("roi_heads") for key in state)
    assert all(torch.equal(value, detector.state_dict()[key]) for key, value in state.items())

"""Whether a network's answer and the data's targets are what a task takes: shapes and values in, an error in words out.

Asked before anything long. Computes no metric; of the answer only the leaves' shapes count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..errors import DataError
from .objectives import masks_of, multi_hot
from .record import Boxes, Leaves, Pick, Targets, class_leaf, is_labelled, leaf_like, map_leaf

_ANSWERS: Mapping[str, Pick] = {
    "classification": class_leaf,
    "multi-label": class_leaf,
    "embedding": class_leaf,
    "segmentation": map_leaf,
    "image-to-image": map_leaf,
}


def require_answer(name: str, leaves: Leaves) -> None:
    """Raises ModelError where no leaf has the form that the task of that name reads."""
    if name in _ANSWERS:
        _ANSWERS[name](leaves)


def require_targets(name: str, leaves: Leaves, targets: Targets, image_shape: Sequence[int]) -> None:
    """Raises DataError or ModelError for a batch of targets that the task of that name can't use.

    `image_shape` is that of the first input, its samples first; targets that are none fit every task.
    """
    if not is_labelled(targets) or name == "any":
        return
    if name == "detection":
        _require_boxes(targets, image_shape)
        return
    if not isinstance(targets, Tensor):
        raise DataError(f"the targets are boxes, which the task {name!r} has no use for; say task='detection'")
    _CHECKS.get(name, _of_one_form)(_stretched(leaves, len(targets)), targets)


def _stretched(leaves: Leaves, samples: int) -> dict[str, Tensor]:
    """Leaves of so many samples, without memory for them."""
    return {name: leaf[:1].expand(samples, *leaf.shape[1:]) for name, leaf in leaves.items() if leaf.dim()}


def _require_boxes(targets: Targets, image_shape: Sequence[int]) -> None:
    if targets is None or isinstance(targets, Tensor):
        form = "none" if targets is None else f"a tensor {list(targets.shape)}"
        raise DataError(
            f"the targets are {form}, and detection takes a list of dicts of boxes [k, 4] and labels [k], one an "
            "image; say another task, or give boxes"
        )
    if len(image_shape) == 4:
        for target in targets:
            _require_inside(target, image_shape)


def _require_inside(target: Boxes, image_shape: Sequence[int]) -> None:
    boxes, (height, width) = target["boxes"], tuple(image_shape)[-2:]
    beyond = (boxes[:, :2] > boxes.new_tensor([width, height])).any(1) | (boxes[:, 2:] < 0).any(1)
    if bool(beyond.any()):
        corners = " ".join(f"{value:g}" for value in boxes[beyond][0].tolist())
        raise DataError(
            f"a target has the box {corners}, outside of the input of {width} x {height} pixels; expected x0 y0 x1 y1 "
            "in pixels of the input"
        )


def _of_labels(leaves: Leaves, targets: Tensor) -> None:
    labels = multi_hot(class_leaf(leaves)[1], targets)
    if labels is not None and not bool(((labels == 0) | (labels == 1) | (labels == -1)).all()):
        raise DataError(
            f"labels are {float(labels.min()):g} to {float(labels.max()):g}, and multi-label takes 0 and 1 for each "
            "label, -1 where it is not known"
        )


def _of_masks(leaves: Leaves, targets: Tensor) -> None:
    _, leaf = map_leaf(leaves)
    if targets.is_floating_point() and bool((targets != targets.round()).any()):
        raise DataError("masks hold numbers with a fraction; segmentation takes the index of each pixel's class")
    classes = max(2, leaf.shape[1])  # one channel alone tells two classes
    masks = masks_of(leaf[:, :1].expand(-1, classes, *leaf.shape[2:]), targets)
    if masks is not None and not _is_in_proportion(leaf, masks):
        raise DataError(
            f"masks are {list(targets.shape)}, the network answers with {list(leaf.shape)}; give masks of the images' "
            "height and width"
        )


def _is_in_proportion(leaf: Tensor, masks: Tensor) -> bool:
    """Whether a picture's height and width are enlarged by the same factor, but for rounding to whole pixels."""
    if leaf.dim() != 4:  # of a video or a volume each side has a factor of its own
        return True
    (height, width), (full_height, full_width) = leaf.shape[2:], masks.shape[1:]
    return abs(full_width * height / full_height - width) <= 1


def _of_identities(leaves: Leaves, targets: Tensor) -> None:
    if targets.dim() != 1 or targets.is_floating_point():
        kind = str(targets.dtype).removeprefix("torch.")
        raise DataError(
            f"targets are {kind} {list(targets.shape)}, and embedding takes one whole number a sample, its identity"
        )


def _of_one_form(leaves: Leaves, targets: Tensor) -> None:
    leaf_like(leaves, targets)


_CHECKS: Mapping[str, Callable[[Leaves, Tensor], None]] = {
    "multi-label": _of_labels,
    "segmentation": _of_masks,
    "embedding": _of_identities,
}

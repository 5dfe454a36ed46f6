"""Images and the share of them that may be damaged in; those that can be decoded, and what was left out, out.

Which those are depends on the images alone, so parts dealt from what is left are the same for the same seed.
"""

from __future__ import annotations

from functools import partial

from ..errors import DataError, first_line
from .images import HASHED_AHEAD, Images, Kind, Source, decoding_workers
from .lookahead import in_order

_NAMED = 5  # damaged images in a message


def without_damaged(images: Kind, most: float) -> tuple[Kind, tuple[str, ...]]:
    """The images that can be decoded, as their targets can, and in words what is left out.

    Where `most` is 0 these are all of them, and the first damaged one is an error when it is decoded. Above it every
    image is decoded here, once. Raises DataError where a larger share than `most` is damaged.
    """
    if not most:
        return images, ()
    objections = _objections(images)
    damaged = [name for name, objection in zip(images.names, objections, strict=True) if objection]
    if not damaged:
        return images, ()

    share = len(damaged) / len(images)
    counted = f"{len(damaged):,} of {len(images):,} images of {images.source} ({share:.2%}) can't be used"
    listed = ", ".join(map(repr, damaged[:_NAMED]))
    if share > most:
        reason = next(filter(None, objections))
        raise DataError(
            f"{counted}, more than --damaged-images {most:g} lets pass: {listed}; replace them or let more pass "
            f"({reason})"
        )
    intact = [index for index, reason in enumerate(objections) if not reason]
    return images.subset(intact), (f"{counted} and are left out: {listed}",)


def _objections(images: Source) -> list[str]:
    """Why each image can't be used, empty where it can; tensors need no decoding."""
    if not isinstance(images, Images):
        return [""] * len(images)
    objection_to = partial(_objection, images)
    return list(in_order(objection_to, range(len(images)), workers=decoding_workers(images), ahead=HASHED_AHEAD))


def _objection(images: Images, index: int) -> str:
    """Why an image can't be decoded, or its target not be read; empty where both can."""
    try:
        images.pixel_hash(images.names[index])
        if images.target_of is not None:
            images.sample(index)
    except DataError as error:
        return first_line(error)
    return ""

"""A pruned network and its recipe in, the same network repaired in place: what every way to a result shares.

Layers that lost inputs are refitted by least squares, then batch normalisation's statistics are taken anew, where
the recipe asks for either. A run, a search and the studies repair by this one function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from .images import Batches
from .lockstep import Batch
from .placement import release
from .pruning import CompensationOptions, compensate
from .recipe import Recipe
from .records import Compensation, Slices
from .recovery.batchnorm import reestimate


def repair(
    recipe: Recipe,
    dense: fx.GraphModule,
    pruned: fx.GraphModule,
    slices: Slices,
    batches: Batches | Sequence[Batch],
    *,
    options: CompensationOptions | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Compensation:
    """What was refitted, in place; nothing where the recipe wants no repair. `options` other than a run's are lighter.

    Batches are [N, C, H, W] images, or (images, labels), and decoded only if asked for. Raises DataError without any.
    """
    release()
    found = Compensation()
    if recipe.compensate:
        how = options or CompensationOptions(seed=recipe.seed)
        found = compensate(dense, pruned, slices, batches, options=how, progress=progress)
    if recipe.reestimate:
        reestimate(pruned, batches, reference=dense, slices=slices)
    return found

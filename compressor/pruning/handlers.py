"""A table of what operations do to labels, and what happens to labels that reach one that is in none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from .labels import Ledger, Value
from .relations import freeze_all

Handler = Callable[[Ledger, fx.Node, list[Any], dict[str, Any]], Any]


class Table(dict[Any, Handler]):
    """Operation -> handler."""

    def handles(self, *targets: Any) -> Callable[[Handler], Handler]:
        def enter(handler: Handler) -> Handler:
            self.update(dict.fromkeys(targets, handler))
            return handler

        return enter


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def unknown(ledger: Ledger, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    freeze_all(ledger, node, [*args, *kwargs.values()], f"reaches {node.target}, which has no pruning rule")
    return blank(node.meta["val"])


def blank(meta: Any) -> Any:
    """Values without labels in the shape of a node's result."""
    if isinstance(meta, Tensor):
        return Value(tuple(meta.shape))
    if isinstance(meta, (tuple, list)):
        return tuple(blank(m) for m in meta)
    return meta

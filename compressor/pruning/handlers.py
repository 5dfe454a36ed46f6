"""A table of what operations do to labels, and what happens to labels that reach one that is in none.

A handler gets a node's arguments with a `Value` in place of every tensor, writes what it ties to the ledger, and
returns a `Value` for the node's result, or a tuple of them. Knows no single operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from .labels import Ledger, Value
from .relations import freeze_all

# what a node was called with, in the order of the operator's ATen schema; a Value stands for a tensor
Args = list[Any]
Kwargs = dict[str, Any]
Handler = Callable[[Ledger, fx.Node, Args, Kwargs], Any]


class Table(dict[object, Handler]):
    """Operation -> handler."""

    def handles(self, *targets: object) -> Callable[[Handler], Handler]:
        """Enters the decorated function for these operations."""

        def enter(handler: Handler) -> Handler:
            self.update(dict.fromkeys(targets, handler))
            return handler

        return enter


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's result, at the batch size the graph was traced with."""
    return tuple(node.meta["val"].shape)


def argument_at(args: Sequence[Any], position: int, default: Any = None) -> Any:
    """The argument there, or the default: what an operator's schema lets out is often not written."""
    return args[position] if len(args) > position else default


def unknown(ledger: Ledger, node: fx.Node, args: Args, kwargs: Kwargs) -> Any:
    """The handler of what has none: all labels that reach it freeze, the result has none."""
    freeze_all(ledger, node.name, [*args, *kwargs.values()], f"reaches {node.target}, which has no pruning rule")
    return blank(node.meta["val"])


def blank(meta: object) -> Any:
    """Values without labels in the shape of a node's result."""
    if isinstance(meta, Tensor):
        return Value(tuple(meta.shape))
    if isinstance(meta, (tuple, list)):
        return tuple(blank(piece) for piece in meta)
    return meta

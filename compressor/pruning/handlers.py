"""A table of what operations do to labels, the call a handler is given, and what becomes of labels no handler takes.

A handler reads a node's `Call`, writes what it ties to the ledger, and returns what is known of the node's result.
Knows no single operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from ..graph.operators import by_name
from ..tensors import as_tuple
from .labels import Ledger, Result, Value
from .relations import freeze_all


@dataclass(frozen=True, slots=True)
class Call:
    """One node's operation with a `Value` in place of every tensor, and a number in place of every size.

    Arguments are read by place (`operand`) where operators of a family name them differently, else by the names of
    the operator's ATen schema, with its defaults.
    """

    node: fx.Node
    args: Sequence[object]
    kwargs: Mapping[str, object]

    @property
    def name(self) -> str:
        """The node's, by which reports name it."""
        return self.node.name

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the node's result, of the first where it has several, at the batch size of the trace."""
        return self.shapes[0]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of all results that are tensors."""
        results = as_tuple(self.node.meta["val"])  # several where an operation gives values and places
        return [tuple(result.shape) for result in results]

    @property
    def passed(self) -> list[object]:
        """All arguments, by place and by name."""
        return [*self.args, *self.kwargs.values()]

    @property
    def input(self) -> Value:
        """The first operand."""
        return self.operand(0)

    def operand(self, position: int) -> Value:
        """The tensor at that place."""
        operand = self.args[position]
        assert isinstance(operand, Value)
        return operand

    def argument(self, name: str) -> object:
        """What was passed under that name of the schema, or its default; None where it has none."""
        return by_name(self.node.target, self.args, self.kwargs).get(name)

    def tensor(self, name: str) -> Value | None:
        """The tensor passed under that name; None where there is none."""
        tensor = self.argument(name)
        return tensor if isinstance(tensor, Value) else None

    def tensors(self, *names: str) -> list[Value]:
        """Those of the named arguments that are tensors, in order."""
        passed = map(self.tensor, names)
        return [tensor for tensor in passed if tensor is not None]

    def integer(self, name: str) -> int:
        """The whole number passed under that name."""
        number = self.argument(name)
        assert isinstance(number, int)
        return number

    def integers(self, name: str) -> list[int]:
        """The whole numbers passed under that name."""
        numbers = self.argument(name)
        assert isinstance(numbers, (list, tuple))
        return list(numbers)

    def returning(self, results: Sequence[Result]) -> Result:
        """The results as the node gives them: one by itself, several as a tuple."""
        return results[0] if isinstance(self.node.meta["val"], Tensor) else tuple(results)


Handler = Callable[[Ledger, Call], Result]


class Table(dict[object, Handler]):
    """Operation -> handler."""

    def handles(self, *targets: object) -> Callable[[Handler], Handler]:
        """Enters the decorated function for these operations."""

        def enter(handler: Handler) -> Handler:
            self.update(dict.fromkeys(targets, handler))
            return handler

        return enter


def unknown(ledger: Ledger, call: Call) -> Result:
    """The handler of what has none: all labels that reach it freeze, the result has none."""
    return left_alone(ledger, call, f"reaches {call.node.target}, which has no pruning rule")


def left_alone(ledger: Ledger, call: Call, reason: str) -> Result:
    """All labels that reach the call freeze, and its result has none."""
    freeze_all(ledger, call.name, call.passed, reason)
    return blank(call.node.meta["val"])


def blank(meta: object) -> Result:
    """Values without labels in the shape of a node's result; a number is itself."""
    match meta:
        case Tensor():
            return Value(tuple(meta.shape))
        case tuple() | list():
            return tuple(blank(piece) for piece in meta)
        case bool() | int() | float():
            return meta
        case _:
            return None

"""A model in, its ATen graph out: functional, evaluation mode, batch axis free, names kept.

`trace` is the only reading of a model's code; whatever follows (groups, relevance, costs, surgery)
works on the `torch.fx.GraphModule` it returns, whose parameters and buffers carry the model's own
qualified names. Knows nothing of units, scores or files.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import operator
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from .errors import ModelError
from .placement import placed
from .training import mark_dropouts, note_dropouts
from .wrappers import plain

aten = torch.ops.aten
_HERE = Path(__file__).resolve().parent

_IDENTITIES = (
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten._assert_tensor_metadata.default,
)


def trace(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """The model's evaluation graph in ATen operations, free in the batch axis.

    `example` is [N, C, H, W] with N >= 2. The model is left as it was (mode, hooks, parameters, buffers), and so is
    the example; the graph shares no storage with it, lies where the example does, wherever the model lies, and writes
    neither to its input nor to its buffers. Node metadata: `val` (shapes at the example), `layer` (qualified name of
    the module that issued the operation, "" for the root), `place` (`model.py:31`, its line in the user's code).
    Wrappers are taken off as in `wrappers.plain`. Raises ModelError when the model's forward fails, draws random
    numbers or cannot be traced.
    """
    model = placed(plain(model, convert=False).module, example.device)
    with torch.no_grad(), evaluating(model):
        exported = _export(model, example)
    mark_dropouts(exported)
    graph: fx.GraphModule = exported.run_decompositions({}).module(check_guards=False)
    _keep_constants(graph)
    _own_state(graph)
    _name_layers(graph)
    _drop_writes(graph)
    _simplify(graph)
    _refuse_random(graph)
    _propagate(graph, example)
    _fold_constants(graph)
    note_dropouts(graph)
    _propagate(graph, example)
    return graph


def _export(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim.DYNAMIC
    require_one_input(model)
    try:
        model(example.clone())
    except Exception as error:
        raise ModelError(
            f"the model's forward fails on an input of shape {list(example.shape)}{_at(_place_of(error))}: "
            f"{first_line(error)}; check --size, and that --mean and --std have one value for grey images, three "
            "for RGB"
        ) from error
    reasons = []
    for strict in (False, True):  # the strict reading alone follows `len(x)`, the other follows more of Python
        try:
            with contextlib.redirect_stderr(io.StringIO()), _plain_attention():  # where it fails, torch prints a graph
                return torch.export.export(model, (example.clone(),), dynamic_shapes=({0: batch},), strict=strict)
        except Exception as error:
            reasons.append(f"{first_line(error)}{_at(_place_in(str(error)) or _place_of(error))}")
    raise ModelError(
        f"the model can't be traced with a free batch axis: {reasons[0]}; its forward must not branch on values "
        "nor fix the batch size"
    )


def require_one_input(model: nn.Module) -> None:
    """Raises ModelError where forward needs more than the image."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # of a callable that isn't Python
        return
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in parameters if p.kind in positional and p.default is p.empty]
    needed += [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if len(needed) > 1:
        raise ModelError(
            f"the model's forward needs {len(needed)} inputs ({', '.join(needed)}), and one image batch [N, C, H, W] "
            "is what is given; wrap the model in a module whose forward takes the image alone and makes the others "
            "itself"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode; modes and buffers are as before afterwards, whatever the model's forward writes."""
    modes = {module: module.training for module in model.modules()}
    before = {name: tensor.detach().clone() for name, tensor in model.named_buffers() if not tensor.is_meta}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for name, tensor in model.named_buffers():
            kept = before.get(name)
            if kept is not None and kept.shape == tensor.shape and not torch.equal(kept, tensor):
                tensor.detach().copy_(kept)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """`nn.MultiheadAttention` of an input with itself, batch first, is read with three transpositions and not eight.

    The same function and names of parameters; PyTorch's own puts the tokens first and back, a copy each time.
    """
    theirs = nn.MultiheadAttention.forward

    def forward(
        self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        wanted = dict(zip(("key_padding_mask", "need_weights", "attn_mask"), args, strict=False)) | kwargs
        masked = wanted.get("key_padding_mask") is not None or wanted.get("attn_mask") is not None
        extended = self.bias_k is not None or self.add_zero_attn or not self._qkv_same_embed_dim
        plain = query is key and key is value and self.batch_first and query.dim() == 3
        if not plain or masked or extended or wanted.get("need_weights", True):
            return theirs(self, query, key, value, *args, **kwargs)
        projected = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = projected.reshape(*query.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return functional.linear(attended, self.out_proj.weight, self.out_proj.bias), None

    nn.MultiheadAttention.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.MultiheadAttention.forward = theirs  # type: ignore[method-assign]


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


_LIBRARIES = ("site-packages", "dist-packages", "<frozen", "<string>", "<eval")
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)|\((?P<short>[\w./-]+\.py):(?P<at>\d+) in ')


def _place_in(trace: str) -> str:
    """`model.py:31`, the last line of the user's own code that a printed stack names; "" where none is."""
    places = []
    for match in _FRAME.finditer(trace):
        file, line = match["file"] or match["short"], match["line"] or match["at"]
        if not any(library in file for library in _LIBRARIES) and not file.startswith(str(_HERE)):
            places.append(f"{Path(file).name}:{line}")
    return places[-1] if places else ""


def _place_of(error: BaseException) -> str:
    return _place_in("".join(traceback.format_tb(error.__traceback__)))


def _at(place: str) -> str:
    return f" (at {place})" if place else ""


def _keep_constants(graph: fx.GraphModule) -> None:
    """Tensors the model holds in plain attributes (a cached table) become buffers: cut, saved and loaded like any."""
    known = {
        name
        for name, _ in [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    }
    for node in graph.graph.nodes:
        if node.op != "get_attr" or node.target in known or not isinstance(_attribute(graph, node.target), Tensor):
            continue
        *path, last = str(node.target).split(".")
        owner = _attribute(graph, ".".join(path)) if path else graph
        value = getattr(owner, last)
        delattr(owner, last)
        owner.register_buffer(last, value)
        known.add(node.target)


def _own_state(graph: fx.GraphModule) -> None:
    """Copies parameters and buffers, tied ones to one copy, so that nothing is shared with the caller."""
    copies: dict[int, Tensor] = {}
    for module in graph.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                if id(tensor) not in copies:
                    data = tensor.detach().clone()
                    copies[id(tensor)] = nn.Parameter(data) if isinstance(tensor, nn.Parameter) else data
                store[name] = copies[id(tensor)]  # type: ignore[assignment]


def _name_layers(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        names = [path for path, _ in stack.values() if not path.startswith("_empty")]
        place = _place_in(node.meta.get("stack_trace") or "")
        node.meta = {"layer": _plain_path(names[-1]) if names else "", "place": place}


def _plain_path(path: str) -> str:
    """`L['self'].layer1._modules['0']` and the like to `layer1.0`."""
    return path.replace("L['self']", "").replace("._modules['", ".").replace("']", "").lstrip(".")


def _drop_writes(graph: fx.GraphModule) -> None:
    """What forward writes to its input and to buffers stays in the graph's values, and goes nowhere else."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target is not aten.copy_.default:
            continue
        if node.args[0].op in ("placeholder", "get_attr"):
            node.replace_all_uses_with(node.args[1])
            graph.graph.erase_node(node)


def _refuse_random(graph: fx.GraphModule) -> None:
    """Raises ModelError for random numbers that reach the answer; those that don't are dropped."""
    for node in reversed(list(graph.graph.nodes)):
        if node.op != "call_function" or not _draws(node):
            continue
        if not node.users:
            graph.graph.erase_node(node)
            continue
        raise ModelError(
            f"the model is random in evaluation: {node.target} in {place_of(node)} draws new numbers at every call; "
            "use nn.Dropout, or training=self.training, or draw the noise once and keep it in a buffer"
        )


def _draws(node: fx.Node) -> bool:
    """Whether an operation takes random numbers, with the arguments it has here."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = arguments(node)
    switches = [given[name] for name in ("train", "training", "dropout_p") if name in given]
    return not switches or any(switches)


def arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by the names of its operator's schema, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}


def _simplify(graph: fx.GraphModule) -> None:
    """Drops identities and writes operations in the one form that survives pruning and training."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _IDENTITIES:
            if node.args:
                node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            _write_batch_norm(graph, node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # strides change once copies are dropped and widths shrink
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _write_batch_norm(graph: fx.GraphModule, node: fx.Node) -> None:
    x, weight, bias, mean, var, momentum, eps = node.args
    with graph.graph.inserting_before(node):
        args = (x, weight, bias, mean, var, False, momentum, eps, False)
        norm = graph.graph.call_function(aten.batch_norm.default, args, name="batch_norm")
    norm.meta = dict(node.meta)
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(norm)
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)


class _Recorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        n.meta["val"] = _shape_of(out)
        return out


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta")
    if isinstance(value, (tuple, list)):
        return type(value)(_shape_of(v) for v in value)
    return value


@torch.no_grad()
def _propagate(graph: fx.GraphModule, example: Tensor) -> None:
    _Recorder(graph).run(example)


@torch.no_grad()
def _fold_constants(graph: fx.GraphModule) -> None:
    """Replaces what depends on no input and no parameter (masks, position grids) by buffers."""
    buffers = {name for name, _ in graph.named_buffers()}
    constant: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and node.target in buffers:
            constant[node] = fetch(graph, node.target)
        elif node.op == "call_function" and all(n in constant for n in _value_inputs(node)):
            args = fx.map_arg(
                (node.args, node.kwargs),
                lambda n: constant[n] if n in constant else torch.empty(0, dtype=n.meta["val"].dtype),
            )
            constant[node] = node.target(*args[0], **args[1])
    for node in constant:
        outside = [user for user in node.users if user not in constant]
        if node.op == "call_function" and outside and isinstance(constant[node], Tensor):
            _replace_by_buffer(graph, node, constant[node], outside)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _value_inputs(node: fx.Node) -> Sequence[fx.Node]:
    """The inputs whose values matter: `x.new_zeros(sizes)` reads only x's type."""
    if node.target in (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default):
        return [n for n in node.all_input_nodes if n is not node.args[0]]
    return node.all_input_nodes


def _replace_by_buffer(graph: fx.GraphModule, node: fx.Node, value: Tensor, users: Sequence[fx.Node]) -> None:
    name = f"_constant_{node.name}"
    graph.register_buffer(name, value.detach().clone())
    with graph.graph.inserting_before(node):
        attribute = graph.graph.get_attr(name)
    attribute.meta = {"layer": node.meta["layer"], "place": node.meta["place"]}
    for user in users:
        user.replace_input_with(node, attribute)


def place_of(node: fx.Node) -> str:
    """`layer 'blocks.0.attn' (model.py:31)`, as much of it as is known."""
    layer, place = node.meta.get("layer", ""), node.meta.get("place", "")
    if layer and place:
        return f"layer {layer!r} ({place})"
    return f"layer {layer!r}" if layer else place or "forward"


def fetch(graph: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that qualified name."""
    value = _attribute(graph, name)
    assert isinstance(value, Tensor)
    return value


def _attribute(graph: nn.Module, name: str) -> Any:
    value: Any = graph
    for part in name.split("."):
        value = getattr(value, part)
    return value


def store(graph: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in a parameter's or buffer's place, keeping which of the two it is."""
    *path, last = name.split(".")
    owner = graph
    for part in path:
        owner = getattr(owner, part)
    if last in owner._parameters:
        owner._parameters[last] = value if isinstance(value, nn.Parameter) else nn.Parameter(value)
    else:
        owner._buffers[last] = value


class Watcher(fx.Interpreter):
    """Runs the graph and hands every node's value to `watch(node, value)`, whose result takes its place."""

    def __init__(self, graph: fx.GraphModule, watch: Callable[[fx.Node, Any], Any]) -> None:
        super().__init__(graph)
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        return self.watch(n, super().run_node(n))

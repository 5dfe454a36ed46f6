"""A model in, its ATen graph out: functional, evaluation mode, batch axis free, names kept.

`trace` is the only reading of a model's code; whatever follows (groups, relevance, costs, surgery)
works on the `torch.fx.GraphModule` it returns, whose parameters and buffers carry the model's own
qualified names. Knows nothing of units, scores or files.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError
from ..placement import placed, without_autocast
from ..tensors import Inputs, as_tuple
from .dynamic import unfold_images
from .forms import unify
from .interface import input_nodes, name_outputs, output_node
from .neighbours import calls_of, stored_nodes
from .operators import arguments
from .program import Program, evaluating, export_program, first_line, place_in
from .training import mark_dropouts, note_dropouts
from .wrappers import plain

aten = torch.ops.aten

# what lies in memory as it must for these stays a copy
_READING_STRIDES = (aten.view_as_complex.default, aten.view_as_real.default, aten.as_strided.default)
_HELD_MODULE = re.compile(r"\.?(?:_modules|__dict__\['_modules'\])\['([^']*)'\]")
_IDENTITIES = (
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten._assert_tensor_metadata.default,
)
# what the exporter found out of a number that the model takes from a tensor; nothing is computed
_ASSERTIONS = (
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)


@without_autocast()
def trace(model: nn.Module, example: Inputs, keywords: Sequence[str] = ()) -> fx.GraphModule:
    """The model's evaluation graph in ATen operations, free in the batch axis, flat as `interface` has it.

    `example` is one tensor [N, ...] or several, N >= 2, which forward takes by position, or by name where `keywords`
    has one for each. The model is left as it was (mode, hooks, parameters, buffers), and so is
    the example; the graph shares no storage with it, lies where the example does, wherever the model lies, and writes
    neither to its input nor to its buffers. Node metadata: `val` (shapes at the example), `layer` (qualified name of
    the module that issued the operation, "" for the root), `place` (`model.py:31`, its line in the user's code).
    Wrappers are taken off as in `wrappers.plain`. Raises ModelError when the model's forward fails, draws random
    numbers or cannot be traced.
    """
    model = placed(plain(model, convert=False).module, as_tuple(example)[0].device)
    with torch.no_grad(), evaluating(model):
        program = export_program(model, example, keywords)
    mark_dropouts(program.exported)
    graph = _in_core_operations(program)

    _flatten(graph)
    _keep_constants(graph)
    _own_state(graph)
    _name_layers(graph)
    _drop_writes(graph)
    _simplify(graph)
    _refuse_random(graph)
    _name_ends(graph, program)

    _record_shapes(graph, example)  # what follows reads the shapes and types of values that depend on the input
    _write_numbers(graph)
    unify(graph)
    unfold_images(graph)
    _fold_constants(graph)
    note_dropouts(graph)
    _record_shapes(graph, example)
    _refuse_bfloat16(graph)
    return graph


def _in_core_operations(program: Program) -> fx.GraphModule:
    """The program's graph in ATen's core operations. Raises ModelError where PyTorch can't write it so.

    Also where it holds graphs of its own, one for each way that `torch.cond` may go.
    """
    try:
        graph: fx.GraphModule = program.exported.run_decompositions({}).module(check_guards=False)
    except Exception as error:
        raise ModelError(
            f"the model was traced, and its graph can't be written in plain operations: {first_line(error)}; tensors "
            "that forward registers, replaces or writes to through .data belong into the model's constructor: mask a "
            "weight where it is used, conv2d(x, weight * mask)"
        ) from error
    for node in stored_nodes(graph):
        if isinstance(operator.attrgetter(str(node.target))(graph), nn.Module):
            place = place_in(next(iter(node.users)).meta.get("stack_trace") or "") or "forward"
            raise ModelError(
                f"the model branches by torch.cond or the like at {place}, through which no layer can be followed; "
                "compute both and choose with torch.where"
            )
    return graph


def _flatten(graph: fx.GraphModule) -> None:
    """Takes the exporter's trees off: tensors are taken by position and given as they are, one alone by itself."""
    graph.graph.set_codegen(fx.graph.CodeGen())
    output = output_node(graph)
    returned = output.args[0]
    if isinstance(returned, (tuple, list)):
        output.args = (returned[0] if len(returned) == 1 else tuple(returned),)
    graph.recompile()


def _name_ends(graph: fx.GraphModule, program: Program) -> None:
    """Notes what inputs and outputs are called, and which tensors of the model's answer are none of them."""
    for node, name in zip(input_nodes(graph), program.inputs, strict=True):
        node.meta["name"] = name
    name_outputs(graph, program.outputs, program.constant)


def _keep_constants(graph: fx.GraphModule) -> None:
    """Tensors the model holds in plain attributes (a cached table) become buffers: cut, saved and loaded like any."""
    registered = named_tensors(graph)
    names = dict.fromkeys(str(node.target) for node in stored_nodes(graph))  # each once, in the graph's order
    for name in names:
        value = operator.attrgetter(name)(graph)
        if name not in registered and isinstance(value, Tensor):
            path, _, last = name.rpartition(".")
            owner = graph.get_submodule(path)
            delattr(owner, last)  # a name that is taken can't be registered
            owner.register_buffer(last, value)


def _own_state(graph: fx.GraphModule) -> None:
    """Copies parameters and buffers, tied ones to one copy, so that nothing is shared with the caller."""
    copies: dict[int, Tensor] = {}
    for name, tensor in named_tensors(graph).items():
        if id(tensor) not in copies:
            copies[id(tensor)] = _copied(tensor)
        store(graph, name, copies[id(tensor)])


def _copied(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy


def _name_layers(graph: fx.GraphModule) -> None:
    """Leaves of each node's metadata what is kept: the innermost module that issued it, and its line."""
    for node in graph.graph.nodes:
        stack: Mapping[str, tuple[str, object]] = node.meta.get("nn_module_stack") or {}
        paths = ["", *(path for path, _ in stack.values() if not path.startswith("_empty"))]
        node.meta = {"layer": _plain_path(paths[-1]), "place": place_in(node.meta.get("stack_trace") or "")}


def _plain_path(path: str) -> str:
    """`L['self'].layer1._modules['0']` and `layer1.__dict__['_modules']['0']` to `layer1.0`."""
    return _HELD_MODULE.sub(r".\1", path.replace("L['self']", "")).lstrip(".")


def _drop_writes(graph: fx.GraphModule) -> None:
    """What forward writes to its input and to buffers stays in the graph's values, and goes nowhere else."""
    for write in graph.graph.find_nodes(op="call_function", target=aten.copy_.default):
        settings = arguments(write)
        if settings["self"].op in ("placeholder", "get_attr"):
            write.replace_all_uses_with(settings["src"])
            graph.graph.erase_node(write)


def _refuse_random(graph: fx.GraphModule) -> None:
    """Raises ModelError for random numbers that reach the answer; those that don't are dropped."""
    draws = [node for node in calls_of(graph) if _draws(node)]
    for node in reversed(draws):  # backwards: what only a dropped one used is dropped too
        if node.users:
            raise ModelError(
                f"the model is random in evaluation: {node.target} in {place_of(node)} draws new numbers at every "
                "call; use nn.Dropout, or training=self.training, or draw the noise once and keep it in a buffer"
            )
        graph.graph.erase_node(node)


def _draws(node: fx.Node) -> bool:
    """Whether an operation takes random numbers, with the arguments it has here."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    options = arguments(node)
    switches = [options[name] for name in ("train", "training", "dropout_p") if name in options]
    return not switches or any(switches)


def _simplify(graph: fx.GraphModule) -> None:
    """Drops identities and writes operations in the one form that survives pruning and training."""
    for node in calls_of(graph):
        if node.target in _IDENTITIES and not any(user.target in _READING_STRIDES for user in node.users):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.graph.erase_node(node)
        elif node.target in _ASSERTIONS:
            graph.graph.erase_node(node)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            _write_batch_norm(graph, node)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # strides change once copies are dropped and widths shrink
        elif node.target is aten.rrelu.default:
            _write_leaky_relu(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _write_leaky_relu(rrelu: fx.Node) -> None:
    """In evaluation the slope is the middle of what training draws it from."""
    settings = arguments(rrelu)
    rrelu.target = aten.leaky_relu.default
    rrelu.args, rrelu.kwargs = (settings["self"], (settings["lower"] + settings["upper"]) / 2), {}


def _write_batch_norm(graph: fx.GraphModule, node: fx.Node) -> None:
    """`aten.batch_norm`, which can be switched to training, in place of the form that evaluation alone knows."""
    x, weight, bias, mean, var, momentum, eps = node.args
    training, cudnn_enabled = False, False
    with graph.graph.inserting_before(node):
        args = (x, weight, bias, mean, var, training, momentum, eps, cudnn_enabled)
        norm = graph.graph.call_function(aten.batch_norm.default, args, name="batch_norm")
    norm.meta = dict(node.meta)

    # entry 0 is the result; what is returned of the batch's statistics nobody reads
    for user in list(node.users):
        if user.target is operator.getitem and user.args[1] == 0:
            user.replace_all_uses_with(norm)
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)


def _refuse_bfloat16(graph: fx.GraphModule) -> None:
    """Raises ModelError for what is computed in a type that no runtime of ONNX files has on every device."""
    halved = [node for node in calls_of(graph) if _is_bfloat16(node)]
    if not halved:
        return
    first = next((node for node in halved if node.meta.get("place")), halved[0])
    raise ModelError(
        f"the model computes in bfloat16 from {place_of(first)} on, whatever its weights are, and its files can't; "
        "leave autocast and casts to bfloat16 out of forward: smaller numbers are made here (--precisions fp16)"
    )


def _is_bfloat16(node: fx.Node) -> bool:
    result = node.meta.get("val")
    return isinstance(result, Tensor) and result.dtype is torch.bfloat16


@torch.no_grad()
def _record_shapes(graph: fx.GraphModule, example: Inputs) -> None:
    def record(node: fx.Node, value: object) -> object:
        node.meta["val"] = _without_storage(value)
        return value

    Watcher(graph, record).run(*as_tuple(example))


def _without_storage(value: object) -> object:
    """The value with its tensors on the meta device, which keeps shapes and types alone."""
    match value:
        case Tensor():
            return torch.empty_like(value, device="meta")
        case tuple() | list():
            return type(value)(_without_storage(entry) for entry in value)
        case _:
            return value


@torch.no_grad()
def _write_numbers(graph: fx.GraphModule) -> None:
    """Numbers that forward takes from a buffer (`int(self.shift)`) stand where they are used."""
    if not graph.graph.find_nodes(op="call_function", target=aten.item.default):
        return
    for node, value in _constants(graph).items():
        if not isinstance(value, (bool, int, float)):
            continue
        for user in list(node.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), _put_for(node, value))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _put_for(node: fx.Node, value: bool | int | float) -> Callable[[fx.Node], Any]:
    """Of an operation's inputs the one is the number, the others stay."""
    return lambda source: value if source is node else source


@torch.no_grad()
def _fold_constants(graph: fx.GraphModule) -> None:
    """Replaces what depends on no input and no parameter (masks, position grids) by buffers."""
    constants = _constants(graph)
    for node, value in constants.items():
        outside = [user for user in node.users if user not in constants]  # constants behind it are folded themselves
        if node.op == "call_function" and outside and isinstance(value, Tensor):
            _replace_by_buffer(graph, node, value, outside)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _constants(graph: fx.GraphModule) -> dict[fx.Node, object]:
    """What each node gives that depends on no input and no parameter: buffers, and what is computed of them alone."""
    buffers = dict(graph.named_buffers())
    stored = [node for node in stored_nodes(graph) if node.target in buffers]
    constants: dict[fx.Node, object] = {node: buffers[str(node.target)] for node in stored}
    for node in calls_of(graph):
        if constants.keys() >= set(_value_inputs(node)):
            constants[node] = _computed(node, constants)
    return constants


def _computed(node: fx.Node, constants: Mapping[fx.Node, object]) -> object:
    def value_of(source: fx.Node) -> Any:  # any constant, where fx's own types foresee its arguments alone
        if source in constants:
            return constants[source]
        return torch.empty(0, dtype=source.meta["val"].dtype)  # read for its type alone

    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    value: object = node.target(*args, **kwargs)  # type: ignore[operator]
    return value


def _value_inputs(node: fx.Node) -> Sequence[fx.Node]:
    """The inputs whose values matter: `x.new_zeros(sizes)` reads only x's type."""
    if node.target in (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default):
        return [source for source in node.all_input_nodes if source is not node.args[0]]
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
    if not layer:
        return place or "forward"
    if not place:
        return f"layer {layer!r}"
    return f"layer {layer!r} ({place})"


def fetch(graph: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of that qualified name."""
    value = operator.attrgetter(name)(graph)
    assert isinstance(value, Tensor)
    return value


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, by every qualified name they have."""
    parameters = module.named_parameters(remove_duplicate=False)
    return dict([*parameters, *module.named_buffers(remove_duplicate=False)])


def store(graph: nn.Module, name: str, value: Tensor) -> None:
    """Puts a tensor in a parameter's or buffer's place, keeping which of the two it is."""
    path, _, last = name.rpartition(".")
    owner = graph.get_submodule(path)
    if last not in owner._parameters:
        owner._buffers[last] = value
    elif isinstance(value, nn.Parameter):
        owner._parameters[last] = value
    else:
        owner._parameters[last] = nn.Parameter(value)


class Watcher(fx.Interpreter):
    """Runs the graph and hands every node's value to `watch(node, value)`, whose result takes its place.

    `run(*inputs)` takes them as the graph does.
    """

    def __init__(self, graph: fx.GraphModule, watch: Callable[[fx.Node, Any], object]) -> None:
        super().__init__(graph)
        self.watch = watch

    def run_node(self, n: fx.Node) -> object:
        return self.watch(n, super().run_node(n))

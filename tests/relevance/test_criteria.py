"""The conformance table: what every criterion promises, on a CNN, a depthwise net, a ViT and a Swin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, fx, nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock

from compressor.criteria import CRITERIA, UNLEARNED, AtNodes, AtRandom, Criterion
from compressor.errors import DataError, ModelError, RecipeError
from compressor.graph import aten, trace
from compressor.pruning import find_structure
from compressor.recipe import Recipe
from compressor.records import Group, Groups, Scores, Site
from compressor.relevance import ScoreOptions, score
from compressor.relevance.criteria import function_named

# Other batch sizes and other orders of units sum in other orders, in float32: 16 ulp of the largest score, for
# the order is the processor's own (9 ulp were seen for sums of weight times gradient); float64 is the strict test ...
FLOAT32_TOLERANCE = 16 * 2.0**-23
# ... and integrated gradients subtract neighbouring activations, so its ulp weigh more; float64 shows what is left.
FLOAT64_TOLERANCE = 1e-12

N, PX, CLASSES = 6, 16, 5


@dataclass(frozen=True)
class Network:
    """`permuted` are parameters (by prefix) with the axis that one layer's units lie on."""

    build: Callable[[], nn.Module]
    layer: str
    permuted: dict[str, int]


def depthwise_net() -> nn.Module:
    blocks = [InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 3)]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES)
    )


def cnn() -> nn.Module:
    stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
    blocks = [BasicBlock(8, 8), BasicBlock(8, 12, 2, shortcut)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, CLASSES))


def vit() -> nn.Module:
    return VisionTransformer(img_size=PX, patch_size=4, embed_dim=16, depth=2, num_heads=4, num_classes=CLASSES)


def swin() -> nn.Module:
    return SwinTransformer(
        img_size=PX, patch_size=2, embed_dim=8, depths=(1, 2), num_heads=(2, 4), window_size=4, num_classes=CLASSES
    )


NETWORKS = {
    "cnn": Network(cnn, "4.conv1", {"4.conv1.": 0, "4.bn1.": 0, "4.conv2.weight": 1}),
    "depthwise": Network(depthwise_net, "1.conv.0.0", {"1.conv.0.": 0, "1.conv.1.": 0, "1.conv.2.weight": 1}),
    "vit": Network(vit, "blocks.0.mlp.fc1", {"blocks.0.mlp.fc1.": 0, "blocks.0.mlp.fc2.weight": 1}),
    "swin": Network(
        swin, "layers.1.blocks.0.mlp.fc1", {"layers.1.blocks.0.mlp.fc1.": 0, "layers.1.blocks.0.mlp.fc2.weight": 1}
    ),
}


def every_layer(graph: fx.GraphModule) -> Groups:
    """Every convolution's and linear layer's output and every attention's heads, each a group of its own,
    the network's output included: more than can be pruned.
    """
    found = []
    for node in graph.graph.nodes:
        kind, axis = {
            aten.conv2d.default: ("channel", 1),
            aten.linear.default: ("neuron", -1),
            aten.scaled_dot_product_attention.default: ("head", 1),
            aten.matmul.default: ("head", 1),
        }.get(node.target, ("", 0))
        if kind:
            shape = node.meta["val"].shape
            size = shape[axis]
            site = Site(node.name, node.meta["layer"], (axis % len(shape),), np.arange(size))
            found.append(Group(node.name, kind, size, (site,), np.zeros(size, np.int64)))
    return Groups(tuple(found))


@dataclass(frozen=True)
class Case:
    graph: fx.GraphModule
    groups: Groups
    images: Tensor
    labels: Tensor

    def scores(self, criterion: str, batch: int = 3, **options: object) -> Scores:
        options = {"steps": 3, **options}
        batches = list(zip(self.images.split(batch), self.labels.split(batch), strict=True))
        return score(self.graph, self.groups, batches, criterion=criterion, options=ScoreOptions(**options))


def settle(model: nn.Module) -> nn.Module:
    """Random weights with statistics, scales and biases that differ between channels."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def case_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(N, 3, PX, PX, generator=generator).to(dtype)
    labels = torch.randint(0, CLASSES, (N,), generator=generator)
    labels[-1] = -1
    graph = trace(copy.deepcopy(model).to(dtype), images[:2])
    return Case(graph, every_layer(graph), images, labels)


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request: pytest.FixtureRequest) -> Network:
    return NETWORKS[request.param]


@pytest.fixture(scope="module")
def model(network: Network) -> nn.Module:
    torch.manual_seed(0)
    return settle(network.build())


@pytest.fixture(scope="module")
def case(model: nn.Module) -> Case:
    return case_of(model)


@pytest.fixture(scope="module")
def exact(model: nn.Module) -> Case:
    return case_of(model, torch.float64)


@pytest.fixture(scope="module")
def permuted(model: nn.Module, network: Network) -> tuple[Case, Tensor]:
    """The same function with one layer's units in another order, and that order."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = next(name for name in state if name.startswith(network.layer) and name.endswith("weight"))
    order = torch.randperm(len(state[first]), generator=torch.Generator().manual_seed(2))
    for prefix, axis in network.permuted.items():
        for name in [n for n in state if n.startswith(prefix) and state[n].ndim]:
            state[name] = state[name].index_select(axis, order)
    other = network.build().eval()
    other.load_state_dict(state)
    return case_of(other, torch.float64), order


@pytest.mark.parametrize("row", CRITERIA.values(), ids=CRITERIA)
def test_a_row_names_functions_that_are_there(row: Criterion) -> None:
    names = [
        name for field in ("prepare", "uncovered", "weigh", "collect", "feeds") if (name := getattr(row, field, ""))
    ]
    assert [name for name in names if not callable(function_named(name))] == []


def test_a_recipe_offers_every_row() -> None:
    (criterion,) = (field for field in fields(Recipe) if field.name == "criterion")
    assert criterion.metadata["choices"] == tuple(CRITERIA)


def test_every_row_has_a_sentence_of_its_own() -> None:
    assert len({row.summary for row in CRITERIA.values()}) == len(CRITERIA)


criteria = pytest.mark.parametrize("criterion", UNLEARNED)


def difference(a: Scores, b: Scores) -> float:
    """The largest, relative to the largest score of its group."""
    assert a.values.keys() == b.values.keys()
    differences = [np.abs(a.values[k] - b.values[k]).max() / np.abs(a.values[k]).max().clip(1e-30) for k in a.values]
    return float(max(differences, default=0))


@criteria
def test_every_group_gets_finite_scores_or_is_named(case: Case, criterion: str) -> None:
    scores = case.scores(criterion)
    assert set(scores.values) | set(scores.unscored) == {g.name for g in case.groups.groups}
    assert not set(scores.values) & set(scores.unscored)
    if criterion != "bn_scale":
        assert scores.unscored == ()
    for group in case.groups.groups:
        if group.name in scores.values:
            values = scores.values[group.name]
            assert values.shape == (len(group.sites), group.size)
            assert values.dtype == np.float64
            assert np.isfinite(values).all()


@criteria
def test_every_group_that_can_be_pruned_is_scored(case: Case, criterion: str) -> None:
    groups = find_structure(case.graph, case.images[:2]).groups
    scores = Case(case.graph, groups, case.images, case.labels).scores(criterion)
    assert {g.kind for g in groups.groups} >= {"stream"}
    if criterion != "bn_scale":  # layers without a normalisation of their own are named
        assert scores.unscored == ()
    assert set(scores.values) | set(scores.unscored) == {g.name for g in groups.groups}
    for group in groups.groups:
        if group.name in scores.values:
            assert scores.values[group.name].shape == (len(group.sites), group.size)
            assert np.isfinite(scores.values[group.name]).all()
            assert scores.values[group.name].any()


@criteria
def test_scores_tell_units_apart(case: Case, criterion: str) -> None:
    scores = case.scores(criterion)
    flat = [name for name, v in scores.values.items() if v.shape[1] > 1 and np.ptp(v) == 0]
    # The last projection's queries and keys see no gradient where the class token alone is read.
    assert len(flat) <= len(scores.values) // 4, flat


@criteria
def test_same_seed_same_scores(case: Case, criterion: str) -> None:
    a, b = case.scores(criterion), case.scores(criterion)
    assert all((a.values[k] == b.values[k]).all() for k in a.values)


@criteria
def test_batch_size_does_not_matter(case: Case, exact: Case, criterion: str) -> None:
    assert difference(exact.scores(criterion, batch=N), exact.scores(criterion, batch=1)) < FLOAT64_TOLERANCE
    if criterion != "integrated_gradients":
        assert difference(case.scores(criterion, batch=N), case.scores(criterion, batch=4)) < FLOAT32_TOLERANCE


@criteria
def test_permuting_units_permutes_their_scores(
    exact: Case, permuted: tuple[Case, Tensor], network: Network, criterion: str
) -> None:
    if isinstance(CRITERIA[criterion], AtRandom):
        pytest.skip("a draw does not know which unit is which")
    other, order = permuted
    group = next(g.name for g in exact.groups.groups if g.sites[0].layer == network.layer)
    before, after = exact.scores(criterion), other.scores(criterion)
    if group in before.unscored:
        assert group in after.unscored
        return
    a, b = before.values[group][:, order.numpy()], after.values[group]
    assert np.ptp(a) > 0
    assert np.abs(a - b).max() / np.abs(a).max() < FLOAT64_TOLERANCE


def test_random_depends_on_the_seed_and_not_on_the_other_groups(case: Case) -> None:
    whole = case.scores("random", seed=3)
    last = case.groups.groups[-1]
    alone = score(case.graph, Groups((last,)), [], criterion="random", options=ScoreOptions(seed=3))
    assert (whole.values[last.name] == alone.values[last.name]).all()
    assert (whole.values[last.name] != case.scores("random", seed=4).values[last.name]).any()


@pytest.mark.parametrize("criterion", [name for name, row in CRITERIA.items() if isinstance(row, AtNodes)])
def test_mean_over_samples_is_the_sum_divided(case: Case, criterion: str) -> None:
    mean, total = case.scores(criterion, over="mean"), case.scores(criterion)
    assert total.samples == N
    assert all(np.allclose(mean.values[k] * N, total.values[k], rtol=1e-12, atol=0) for k in mean.values)


def test_unknown_labels_take_the_predicted_class(case: Case) -> None:
    predicted = case.graph(case.images).argmax(1)
    known = Case(case.graph, case.groups, case.images, predicted)
    unknown = Case(case.graph, case.groups, case.images, torch.full_like(predicted, -1))
    wrong = Case(case.graph, case.groups, case.images, (predicted + 1) % CLASSES)
    assert difference(known.scores("gradient_x_input"), unknown.scores("gradient_x_input")) == 0
    assert difference(known.scores("gradient_x_input"), wrong.scores("gradient_x_input")) > 0
    ignoring = wrong.scores("gradient_x_input", target="predicted")
    assert difference(known.scores("gradient_x_input"), ignoring) == 0


def test_scoring_leaves_the_graph_as_it_was(case: Case) -> None:
    before = {name: tensor.clone() for name, tensor in case.graph.state_dict().items()}
    text = case.graph.code
    for criterion in UNLEARNED:
        case.scores(criterion)
    assert case.graph.code == text
    assert all(torch.equal(before[name], tensor) for name, tensor in case.graph.state_dict().items())
    assert all(p.grad is None for p in case.graph.parameters())


def test_what_cannot_be_scored_is_said() -> None:
    case = case_of(settle(cnn()))
    with pytest.raises(RecipeError, match="Did you mean 'taylor'"):
        case.scores("tayler")
    with pytest.raises(RecipeError, match="loss"):
        case.scores("lrp", start="loss")
    with pytest.raises(DataError, match="no calibration images"):
        score(case.graph, case.groups, [], criterion="activation")
    broken = case_of(settle(cnn()))
    with torch.no_grad():
        dict(broken.graph.named_parameters())["4.conv1.weight"][0] = torch.inf
    with pytest.raises(ModelError, match="non-finite"):
        broken.scores("l1")

"""The loss of every unit against least squares on the covariances themselves, while units go one after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from compressor.planning.covariance import Inputs, _inverse_of, shrinkage, shrunk, stable_factor
from compressor.planning.redundancy import _Consumer, _consumer, counts_of
from compressor.records import Group, Scores, Site

# Inverses of at most twelve features in float64.
EXACT = 1e-9


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def covariance(features: int) -> Tensor:
    factor = numbers(features, 2 * features)
    return factor @ factor.mT / (2 * features)


def unexplained(matrix: Tensor, weights: Tensor, gone: list[int]) -> float:
    """The outputs' variance that no linear function of the features still there has: Schur's complement."""
    stay = [feature for feature in range(len(matrix)) if feature not in gone]
    inner = matrix[gone][:, gone]
    if stay:
        inner = inner - matrix[gone][:, stay] @ torch.linalg.solve(matrix[stay][:, stay], matrix[stay][:, gone])
    lost = weights[:, gone]
    return float(((lost @ inner) * lost).sum())


OWNERS = {
    "a feature each": [0, 1, 2, 3, 4, 5],
    "two features each": [0, 0, 1, 1, 2, 2],
    "unequal, one of nobody": [0, 2, 2, -1, 1, 2],
    "interleaved": [0, 1, 2, 0, 1, 2],
}


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
def test_a_units_loss_is_what_least_squares_cannot_recover(owner: list[int]) -> None:
    matrix, weights, units = covariance(6), numbers(3, 6, seed=1), max(owner) + 1
    consumer = _Consumer(torch.linalg.inv(matrix), weights.clone(), torch.tensor(owner), units)
    losses = consumer.losses()
    for unit in range(units):
        gone = [feature for feature, own in enumerate(owner) if own == unit]
        assert float(losses[unit]) == pytest.approx(unexplained(matrix, weights, gone), rel=EXACT)


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
def test_losses_after_removals_are_those_of_all_that_went_less_those_before(owner: list[int]) -> None:
    matrix, weights, units = covariance(6), numbers(3, 6, seed=1), max(owner) + 1
    consumer = _Consumer(torch.linalg.inv(matrix), weights.clone(), torch.tensor(owner), units)
    gone: list[int] = []
    for unit in range(units):
        features = [feature for feature, own in enumerate(owner) if own == unit]
        before, after = (unexplained(matrix, weights, ids) if ids else 0.0 for ids in (gone, gone + features))
        assert float(consumer.losses()[unit]) == pytest.approx(after - before, rel=1e3 * EXACT)
        consumer.remove(torch.tensor([unit]))
        gone += features
        assert float(consumer.losses()[unit]) == 0.0


def test_several_units_at_once_go_as_one_after_the_other() -> None:
    matrix, weights, owner = covariance(8), numbers(3, 8, seed=1), torch.arange(8)
    together = _Consumer(torch.linalg.inv(matrix), weights.clone(), owner, 8)
    together.remove(torch.tensor([1, 4, 6]))
    apart = _Consumer(torch.linalg.inv(matrix), weights.clone(), owner, 8)
    for unit in (6, 1, 4):
        apart.remove(torch.tensor([unit]))
    torch.testing.assert_close(together.losses(), apart.losses(), atol=1e2 * EXACT, rtol=0)


def test_outputs_count_by_their_score_and_each_as_a_share_of_its_variance() -> None:
    matrix, weight = covariance(4), numbers(2, 4, seed=1)
    inputs, units = Inputs(torch.zeros(4).double(), matrix), np.arange(4)
    scaled = weight * torch.tensor([[1.0], [10.0]]).double()
    plain, larger = (_consumer(one, units, 4, inputs=inputs, counts=np.array([1.0, 1e-9])) for one in (weight, scaled))
    torch.testing.assert_close(plain.losses(), larger.losses(), atol=1e-6, rtol=0)
    variance = float(weight[0] @ matrix @ weight[0])
    expected = unexplained(matrix, weight[:1], [2]) / variance
    assert float(plain.losses()[2]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
def test_many_outputs_in_fewer_rows_lose_the_same(owner: list[int]) -> None:
    matrix, weight, units = covariance(6), numbers(40, 6, seed=1), max(owner) + 1
    inputs = Inputs(torch.zeros(6).double(), matrix)
    consumer = _consumer(weight, np.array(owner), units, inputs=inputs, counts=None)
    assert consumer.weights.shape == (6, 6)
    variance = ((weight @ matrix) * weight).sum(1, keepdim=True)  # [outputs, 1], of which a loss is a share
    expected = _Consumer(torch.linalg.inv(matrix), weight / (40 * variance).sqrt(), torch.tensor(owner), units)
    for unit in range(units):
        torch.testing.assert_close(consumer.losses(), expected.losses(), atol=1e-6, rtol=1e-6)
        consumer.remove(torch.tensor([unit]))
        expected.remove(torch.tensor([unit]))


def test_an_output_without_variance_does_not_count_for_everything() -> None:
    weight = numbers(2, 4, seed=1)
    weight[1] *= 1e-12
    consumer = _consumer(weight, np.arange(4), 4, inputs=Inputs(torch.zeros(4).double(), covariance(4)), counts=None)
    assert float(consumer.losses().sum()) < 10


def test_scores_of_groups_on_one_layer_add_up_channel_by_channel() -> None:
    def group(name: str, units: list[int], axes: tuple[int, ...] = (1,)) -> Group:
        size = max(units) + 1
        return Group(name, "channel", size, (Site("conv", "conv", axes, np.array(units)),), np.zeros(size, dtype=int))

    groups = (group("a", [0, 1, -1, -1]), group("b", [-1, -1, 0, 0]), group("twofold", [0, 1, 2, 3], axes=(1, 3)))
    values = {"a": np.array([[1.0, 2.0]]), "b": np.array([[5.0]]), "twofold": np.ones((1, 4))}
    counts = counts_of(Scores("l1", values, 1), groups)
    assert {name: worth.tolist() for name, worth in counts.items()} == {"conv": [1.0, 2.0, 5.0, 5.0]}


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_an_inverse_does_not_depend_on_the_scale_of_the_features(precision: torch.dtype) -> None:
    matrix = covariance(6) + torch.eye(6)
    deviation = 10.0 ** torch.arange(-3, 3).double()
    scales = deviation.outer(deviation)
    inverse = _inverse_of(matrix * scales, precision)
    close = EXACT if precision == torch.float64 else 1e-5
    torch.testing.assert_close(
        inverse.double() * deviation.outer(deviation), torch.linalg.inv(matrix), atol=close, rtol=0
    )


def test_a_singular_matrix_has_a_factor_all_the_same() -> None:
    vector = numbers(5)
    matrix = vector.outer(vector)
    factor = stable_factor(matrix)
    torch.testing.assert_close(factor @ factor.mT, matrix, atol=1e-3 * float(matrix.diagonal().mean()), rtol=0)
    assert torch.isfinite(stable_factor(torch.zeros(3, 3))).all()


def test_the_strength_of_shrinkage_is_the_published_one() -> None:
    """Chen et al. 2010 on correlations: where all variances are one, those are the covariance itself."""
    p, n = 6, 20
    rows = numbers(n, p) + 1.5 * numbers(n, 1, seed=5)  # a common part, else all would be shrunk whole
    rows = (rows - rows.mean(0)) / rows.std(0, correction=0)
    empirical = rows.mT @ rows / n
    squares = float(torch.linalg.eigvalsh(empirical).square().sum())  # tr R^2
    by_hand = ((1 - 2 / p) * squares + p * p) / ((n + 1 - 2 / p) * (squares - p))
    assert 0 < by_hand < 1
    assert shrinkage(empirical, n) == pytest.approx(by_hand)
    deviation = torch.linspace(0.5, 2, p).double()
    assert shrinkage(empirical * deviation.outer(deviation), n) == pytest.approx(by_hand)


def test_a_single_row_is_shrunk_whole_and_many_hardly() -> None:
    assert shrinkage(covariance(6), 1) == 1.0
    assert shrinkage(covariance(6), 1e6) < 1e-4
    assert shrinkage(torch.eye(6).double(), 50) == 1.0  # features with nothing in common


def test_shrinking_keeps_the_variances_and_a_dead_layer_can_be_inverted() -> None:
    matrix = covariance(6)
    torch.testing.assert_close(shrunk(matrix, 0.7).diagonal(), matrix.diagonal(), atol=2e-6, rtol=0)
    torch.testing.assert_close(shrunk(matrix, 0.7)[0, 1], 0.3 * matrix[0, 1], atol=EXACT, rtol=0)
    assert torch.equal(shrunk(torch.zeros(3, 3).double(), 0.5), torch.eye(3).double())

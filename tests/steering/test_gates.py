"""Gates that learn: their distribution, what is paid, what is kept, one seed one result, stopped or not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from compressor.choices import Scoring
from compressor.errors import DataError
from compressor.graph import trace
from compressor.pruning import find_structure
from compressor.records import Scores
from compressor.relevance import score
from compressor.rounds import Prunable, score_units
from compressor.steering import GateOptions, SteeringOptions, learn_scores, start_logits
from compressor.steering.checkpoints import Checkpoint
from compressor.steering.gates import chance_to_be_open, drawn_gates, price, share_at
from compressor.steering.gating import Gated, find_gates
from compressor.steering.lessons import lessons_from, uniform
from compressor.steering.objectives import answers_lost, divergence, spread_of

from .conftest import subject_of

QUICK = SteeringOptions(gates=GateOptions(steps=12))
Batch = tuple[Tensor, Tensor]


def subject() -> tuple[Prunable, list[Batch]]:
    """Two layers of which half the units do nothing, and images."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
        model.append(nn.Linear(8 * 16, 4))
        images = torch.randn(24, 3, 8, 8)
    with torch.no_grad():
        model[2].weight[:, :4] = 0  # nobody reads the first four channels
        model[5].weight[:, : 4 * 16] = 0
    graph = trace(model.eval(), images[:2])
    batches = [(part, torch.full((6,), -1)) for part in images.split(6)]
    return Prunable(graph, find_structure(graph, images[:2])), batches


def learned(options: SteeringOptions = QUICK, folder: Path | None = None, **others: object) -> Scores:
    of, batches = subject()
    return learn_scores(of.network, of.structure, batches, criterion="gates", options=options, folder=folder, **others)


def test_a_gate_begins_open_and_is_as_often_open_as_is_said() -> None:
    logits = torch.tensor([0.0, -3.0, -6.0]).repeat(20000, 1)
    gates = drawn_gates(logits, uniform(0, 0, *logits.shape, like=logits))
    expected = chance_to_be_open(logits[0])
    assert ((gates > 0.5).double().mean(0) - expected).abs().max() < 0.015  # 4 standard errors of 20,000 draws
    assert float(expected[0]) > 0.999999
    assert float(expected[1]) == pytest.approx(1 - math.exp(-1))


def test_the_price_is_zero_at_the_share_that_is_asked_for_and_below() -> None:
    shares = torch.tensor([1.0, 0.5, 0.25, 0.1], requires_grad=True)
    paid = price(shares, 0.25)
    assert paid.tolist() == pytest.approx([math.log(4), math.log(2), 0, 0])
    (slope,) = torch.autograd.grad(paid.sum(), shares)
    assert slope.tolist()[:2] == [1, 2]  # of the logarithm
    assert slope.tolist()[3] == 0


def test_the_share_falls_from_all_to_a_tenth_or_is_one_and_the_same() -> None:
    falling = GateOptions(steps=9)
    assert [round(share_at(step, falling), 6) for step in range(9)] == [round(0.9 - 0.1 * step, 6) for step in range(9)]
    assert {share_at(step, GateOptions(least=0.5, falls=False)) for step in range(9)} == {0.5}


def test_answers_differ_by_the_divergence_of_their_probabilities() -> None:
    ours, dense = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    assert float(divergence(ours, dense)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(divergence(dense, dense)) == 0


def test_nothing_is_lost_with_all_gates_open_and_something_with_one_shut() -> None:
    of = subject_of("resnet")
    gating = find_gates(of.graph, of.structure, ("channel", "stream"))
    lost = answers_lost(Gated(gating), [(of.images, None)], None)
    ones = torch.ones(gating.count, dtype=torch.float64)
    assert abs(float(lost(of.images, ones))) < 1e-9
    ones[::2] = 0
    assert float(lost(of.images, ones)) > 1e-6


def test_the_mean_answer_loses_one() -> None:
    of, batches = subject()
    images = torch.cat([inputs for inputs, _ in batches])
    logits = of.network(images).double()
    mean = logits.softmax(1).mean(0).log().expand_as(logits)
    assert float(divergence(mean, logits).detach()) / spread_of(of.network, batches) == pytest.approx(1, rel=1e-5)


def test_units_that_do_nothing_are_found() -> None:
    scores = learned(SteeringOptions(gates=GateOptions(steps=60)))
    for values in scores.values.values():
        assert values[0, :4].max() < np.median(values[0, 4:])


def test_one_seed_one_result_and_weights_stay() -> None:
    of, batches = subject()
    before = {name: tensor.clone() for name, tensor in of.network.state_dict().items()}
    run = [learn_scores(of.network, of.structure, batches, criterion="gates", options=QUICK).values for _ in range(2)]
    assert all((run[0][name] == run[1][name]).all() for name in run[0])
    other = learned(SteeringOptions(gates=GateOptions(steps=12), seed=1)).values
    assert any((run[0][name] != other[name]).any() for name in run[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in of.network.state_dict().items())
    assert all(parameter.grad is None for parameter in of.network.parameters())


class Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize("stopped", [1, 5, 11])
def test_stopped_and_gone_on_with_it_comes_to_the_same_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    monkeypatch.setattr("compressor.steering.checkpoints.SECONDS", 0.0)
    whole = learned()
    shares: list[float] = []

    def kill(share: float) -> None:
        shares.append(share)
        if round(share * 12) == stopped:
            raise Killed

    with pytest.raises(Killed):
        learned(folder=tmp_path, progress=kill)
    (left,) = tmp_path.rglob("*.safetensors")
    shares.clear()
    again = learned(folder=tmp_path, progress=shares.append)
    assert len(shares) == 12 - stopped
    assert all((whole.values[name] == again.values[name]).all() for name in whole.values)
    assert not left.exists()


def test_what_was_put_aside_of_another_training_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "training.safetensors"
    tensors = {"logits": torch.arange(3.0)}
    Checkpoint(path, ["one"], seconds=0).write(4, tensors)
    read = Checkpoint(path, ["one"]).read()
    assert read is not None
    assert read[0] == 4
    assert torch.equal(read[1]["logits"], tensors["logits"])
    assert Checkpoint(path, ["another"]).read() is None
    path.write_bytes(path.read_bytes()[:-3])
    assert Checkpoint(path, ["one"]).read() is None
    assert Checkpoint(None, ["one"]).read() is None


def test_other_scores_start_the_gates_in_their_order() -> None:
    of, batches = subject()
    gating = find_gates(of.network, of.structure, ("channel",))
    first = score(of.network, of.structure.groups, batches, criterion="l1")
    logits = start_logits(gating, first)
    for name, units in gating.units.items():
        part = logits[units].numpy()
        assert spearmanr(part, first.values[name].mean(0)).statistic == pytest.approx(1)
        assert (part.min(), part.max()) == (-1.5, 1.5)
    assert not start_logits(gating, None).any()
    scoring = Scoring("gates", measured=False, steering=SteeringOptions(gates=GateOptions(steps=4), start="l1"))
    plain = Scoring("gates", measured=False, steering=SteeringOptions(gates=GateOptions(steps=4)))
    started, unstarted = (score_units(of, batches, scoring=s).values for s in (scoring, plain))
    assert any((started[name] != unstarted[name]).any() for name in started)


def test_units_of_other_kinds_have_no_gate_and_stay() -> None:
    of = subject_of("vit")
    lessons = [(of.images[:2], None)]
    options = SteeringOptions(gates=GateOptions(steps=2), kinds=("neuron",))
    scores = learn_scores(of.graph, of.structure, lessons, criterion="gates", options=options)
    for group in of.structure.groups.groups:
        values = scores.values[group.name]
        assert values.shape == (len(group.sites), group.size)
        assert (values == 1).all() == (group.kind != "neuron")


def test_without_a_unit_of_the_kinds_nothing_is_learned_and_all_stay() -> None:
    of = subject_of("resnet")
    lessons = [(of.images[:2], None)]
    scores = learn_scores(of.graph, of.structure, lessons, criterion="gates", options=SteeringOptions(kinds=("head",)))
    assert scores.values.keys() == {group.name for group in of.structure.groups.groups}
    assert all((values == 1).all() for values in scores.values.values())


def test_lessons_go_on_in_the_middle_as_they_would_have_come() -> None:
    _, batches = subject()
    stream = lessons_from(batches, 0, 0)
    first = [next(stream) for _ in range(9)]  # two passes over four batches, and one more
    later = lessons_from(batches, 0, 6)
    assert all(torch.equal(next(later), inputs) for inputs in first[6:])
    assert len({float(inputs.sum()) for inputs in first[:4]}) == 4
    with pytest.raises(DataError, match="no images"):
        next(lessons_from([], 0, 0))
    assert np.isfinite([float(uniform(0, step, 1, like=torch.zeros(1)).log()) for step in range(3)]).all()


def test_gates_learn_from_the_lessons_where_there_are_any() -> None:
    of, batches = subject()
    scoring = Scoring("gates", measured=False, steering=QUICK)
    alone = score_units(of, batches, scoring=scoring)
    taught = score_units(of, batches[:1], scoring=scoring, lessons=batches)
    assert alone.samples == taught.samples == 24
    assert all((alone.values[name] == taught.values[name]).all() for name in alone.values)

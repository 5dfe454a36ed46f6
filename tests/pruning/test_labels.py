"""Labels and classes: ties resolve to components, rows stay rows, zero never goes; groups tie what an oracle ties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from torchvision.models import MobileNetV2, ResNet
from torchvision.models.resnet import BasicBlock

from compressor.graph import trace
from compressor.pruning import analyse
from compressor.pruning.classes import resolve
from compressor.pruning.labels import Ledger, Value, along, axes, compress, first_along, map_labelled, reduce_to


def test_ties_are_transitive_and_zero_absorbs() -> None:
    ledger = Ledger()
    a, b, c = (ledger.fresh(3) for _ in range(3))
    ledger.tie(a, b)
    ledger.tie(b, c)
    ledger.freeze(c[2:], "node", "why")
    of = resolve(ledger).of
    assert of[a.numpy()].tolist() == of[c.numpy()].tolist()
    assert of[a.numpy()].tolist() == [1, 2, 0]
    assert resolve(ledger).reasons[int(a[2])] == ("node", "why")


def test_rows_of_one_class_are_the_row() -> None:
    ledger = Ledger()
    parents, children = ledger.fresh(2, 1), ledger.fresh(2, 3)
    ledger.tie(children, children[:, :1])
    ledger.relate(parents.expand(2, 3), children, "node")
    of = resolve(ledger).of
    assert of[parents.reshape(-1).numpy()].tolist() == of[children[:, 0].numpy()].tolist()


def test_rows_keep_their_parents() -> None:
    ledger = Ledger()
    parents, children = ledger.fresh(2, 1), ledger.fresh(2, 3)
    ledger.relate(parents.expand(2, 3), children, "node")
    classes = resolve(ledger)
    assert classes.parent[classes.of[children[1].numpy()]].tolist() == [classes.of[int(parents[1])]] * 3
    assert classes.row[classes.of[children.reshape(-1).numpy()]].tolist() == [0, 0, 0, 1, 1, 1]


def grid(ledger: Ledger) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of 2 rows and 3 columns of units, which are related to them: [2, 1], [1, 3] and [2, 3]."""
    rows, columns, cells = ledger.fresh(2, 1), ledger.fresh(1, 3), ledger.fresh(2, 3)
    ledger.relate(rows.expand(2, 3), cells, "node")
    ledger.relate_columns(columns.expand(2, 3), cells, [0])
    return rows, columns, cells


def test_cells_go_with_their_row_or_their_column() -> None:
    ledger = Ledger()
    rows, columns, cells = grid(ledger)
    classes = resolve(ledger)
    of = classes.of[cells.numpy()]
    assert len(set(of.ravel().tolist())) == 6
    assert classes.parent[of].tolist() == classes.of[rows.expand(2, 3).numpy()].tolist()
    assert classes.column[of].tolist() == classes.of[columns.expand(2, 3).numpy()].tolist()


def test_columns_without_rows_are_units() -> None:
    ledger = Ledger()
    columns, cells = ledger.fresh(1, 3), ledger.fresh(2, 3)
    ledger.relate_columns(columns.expand(2, 3), cells, [0])
    classes = resolve(ledger)
    assert classes.of[cells.numpy()].tolist() == classes.of[columns.expand(2, 3).numpy()].tolist()
    assert (classes.column == -1).all()


def test_columns_that_cut_rows_unalike_are_units() -> None:
    ledger = Ledger()
    rows, columns, children = ledger.fresh(2, 1), ledger.fresh(1, 3), ledger.fresh(2, 3)
    ledger.relate(rows.expand(2, 3), children, "node")
    ledger.relate_columns(columns, children[:1], [0])  # of the first row alone
    classes = resolve(ledger)
    assert (classes.column == -1).all()
    assert classes.of[children[0].numpy()].tolist() == classes.of[columns[0].numpy()].tolist()


def test_of_a_frozen_column_the_rows_still_go_and_of_a_frozen_cell_neither() -> None:
    ledger = Ledger()
    rows, columns, cells = grid(ledger)
    ledger.freeze(columns[:, :1], "node", "why")
    classes = resolve(ledger)
    assert classes.column[classes.of[cells[:, 0].numpy()]].tolist() == [0, 0]
    assert (classes.of[rows.numpy()] > 0).all()
    ledger.freeze(cells[:1, 1:2], "node", "why")
    classes = resolve(ledger)
    assert (classes.of[rows.numpy()] == 0).all()
    assert classes.of[columns.numpy()].ravel().tolist()[:2] == [0, 0]


def test_fixed_rows_are_units_and_rows_listed_for_each_image_are_the_same() -> None:
    ledger = Ledger()
    heads = ledger.fresh(2, 3)
    batch = heads.repeat(2, 1)  # [batch * heads, d]
    rows = ledger.pin(batch, [1], "node", "why")
    assert rows is not None
    classes = resolve(ledger)
    of_rows = classes.of[rows[:, 0].numpy()]
    assert of_rows[:2].tolist() == of_rows[2:].tolist()
    assert len(set(of_rows.tolist())) == 2
    assert classes.of[heads.numpy()].tolist() == [[row] * 3 for row in of_rows[:2]]


def test_compress_finds_the_axes_labels_depend_on() -> None:
    facet = along(torch.arange(1, 5), 1, (3, 4, 2))
    dense = facet.contiguous()
    assert axes(facet) == (1,)
    assert axes(dense) == (0, 1, 2)
    assert axes(compress(dense)) == (1,)
    assert torch.equal(compress(dense), facet)


def test_where_rows_cross_blocks_lose_equally_many() -> None:
    """48 units in 2 rows of 24 and in 3 of 16: parts of 16, 8, 8 and 16, so blocks of 8, and no row goes whole."""
    ledger = Ledger()
    units, halves, thirds = ledger.fresh(48), ledger.fresh(2, 1), ledger.fresh(3, 1)
    ledger.relate(halves.expand(2, 24), units.reshape(2, 24), "node")
    ledger.relate(thirds.expand(3, 16), units.reshape(3, 16), "node")
    classes = resolve(ledger)
    of = classes.of[units.numpy()]
    assert len(set(of.tolist())) == 48
    assert classes.row[of].tolist() == np.repeat(np.arange(6), 8).tolist()
    assert not classes.of[halves.numpy()].any()
    assert not classes.of[thirds.numpy()].any()


def test_rows_of_rows_do_not_cross() -> None:
    """48 units in 2 rows of 24, of which each is 3 of 8: both may go, the smaller with the larger."""
    ledger = Ledger()
    units, halves, sixths = ledger.fresh(48), ledger.fresh(2, 1), ledger.fresh(6, 1)
    ledger.relate(sixths.expand(6, 8), units.reshape(6, 8), "inner")
    ledger.relate(halves.expand(2, 3), sixths.reshape(2, 3), "outer")
    classes = resolve(ledger)
    inner = classes.of[sixths.reshape(-1).numpy()]
    assert classes.parent[classes.of[units.numpy()]].tolist() == np.repeat(inner, 8).tolist()
    assert classes.parent[inner].tolist() == np.repeat(classes.of[halves.reshape(-1).numpy()], 3).tolist()
    assert classes.relations[int(inner[0])] == (1,)


def test_a_column_that_all_rows_share_pins_the_rows() -> None:
    ledger = Ledger()
    parents, children = ledger.fresh(2, 1), ledger.fresh(1, 3).expand(2, 3)
    ledger.relate(parents.expand(2, 3), children, "node")
    classes = resolve(ledger)
    assert not classes.of[parents.numpy()].any()
    assert len(set(classes.of[children.numpy()].ravel().tolist())) == 3
    assert (classes.parent == -1).all(), "units that lie in no row"


def test_a_row_with_a_member_that_stays_does_not_go_and_its_other_members_do() -> None:
    ledger = Ledger()
    parents, children = ledger.fresh(3, 1), ledger.fresh(3, 4)
    ledger.relate(parents.expand(3, 4), children, "node")
    ledger.freeze(children[1:2, :1], "other", "why")
    classes = resolve(ledger)
    assert not classes.of[parents.numpy()].any(), "the rows of a relation may all go, or none"
    assert (classes.of[children.numpy()] == 0).sum() == 1
    assert classes.reasons == {int(children[1, 0]): ("other", "why")}


def test_reasons_are_those_of_what_a_label_is_tied_to() -> None:
    ledger = Ledger()
    a, b, c = (ledger.fresh(2) for _ in range(3))
    ledger.freeze(a, "first", "one reason")
    ledger.tie(b, c)
    ledger.freeze(c, "second", "another")
    ledger.freeze(a, "third", "too late")
    reasons = resolve(ledger).reasons
    assert [reasons[int(label)] for label in (a[0], b[1], c[0])] == [
        ("first", "one reason"),
        ("second", "another"),
        ("second", "another"),
    ]


def test_inexact_nodes_are_named_once_in_order_and_for_what_is_tied_too() -> None:
    ledger = Ledger()
    a, b = ledger.fresh(2), ledger.fresh(2)
    for node in ("norm", "pool", "norm"):
        ledger.mark_inexact(a, node)
    ledger.tie(a[:1], b[:1])
    classes = resolve(ledger)
    named = [classes.inexact.get(int(classes.of[int(label)])) for label in (a[0], a[1], b[0], b[1])]
    assert named == [("norm", "pool"), ("norm", "pool"), ("norm", "pool"), None]


def test_ties_broadcast_and_new_rows_are_the_same_for_every_image() -> None:
    ledger = Ledger()
    channels, everywhere = ledger.fresh(3), ledger.fresh(2, 3, 4)
    ledger.tie(along(channels, 1, (1, 3, 1)), everywhere)
    of = resolve(ledger).of
    assert of[everywhere.numpy()].tolist() == of[channels.reshape(1, 3, 1).expand(2, 3, 4).numpy()].tolist()
    heads = ledger.fresh(4).reshape(1, 2, 2).expand(3, 2, 2).reshape(6, 2)  # [images * heads, d]
    rows = ledger.fresh_rows(heads, {0})
    assert axes(rows) == (0,)
    assert len(set(rows[:, 0].tolist())) == 2
    assert rows[:2].tolist() == rows[2:4].tolist() == rows[4:].tolist()


def test_an_empty_tensor_still_says_what_lies_on_its_other_axes() -> None:
    """No register token [1, 0, C] has channels."""
    facet = along(torch.arange(1, 5), 2, (1, 0, 4))
    assert reduce_to(facet, (2,)).tolist() == [1, 2, 3, 4]
    assert first_along(facet, [1]).tolist() == [[[1, 2, 3, 4]]]
    assert reduce_to(torch.zeros((1, 0, 4), dtype=torch.int64), (2,)).tolist() == [0, 0, 0, 0], "of a copy nothing"


def test_several_results_are_mapped_one_by_one() -> None:
    a, b = Value((2,)), Value((3,))
    tensors = (torch.zeros(2), [torch.zeros(3), 5], "text")
    lengths = map_labelled(lambda tensor, value: tensor + len(tensor) * value.shape[0], tensors, (a, (b, 5), None))
    assert isinstance(lengths, tuple)
    assert [lengths[0].tolist(), lengths[1][0].tolist(), lengths[1][1], lengths[2]] == [[4.0] * 2, [9.0] * 3, 5, "text"]


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 3)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.fc(self.c(x + self.b(x).relu()).mean((2, 3)))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "model",
    [Plain(), ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5), MobileNetV2(num_classes=5, width_mult=0.35)],
    ids=["plain", "residual", "inverted residual"],
)
def test_groups_tie_the_layers_torch_pruning_ties(model: nn.Module) -> None:
    example = torch.randn(2, 3, 32, 32)
    graph = trace(model, example)
    ours = {frozenset(s.layer for s in g.sites) for g in analyse(graph).groups.groups}
    last = next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear))
    oracle = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    names = {m: n for n, m in model.named_modules()}
    theirs = set()
    for group in oracle.get_all_groups(ignored_layers=[last], root_module_types=[nn.Conv2d, nn.Linear]):
        produced = [d for d, _ in group if "out_channels" in d.handler.__name__]
        produced = [d for d in produced if isinstance(d.target.module, (nn.Conv2d, nn.Linear))]
        theirs.add(frozenset(names[d.target.module] for d in produced))
    assert len(theirs) > 1
    assert ours == theirs

"""Labels and classes: ties resolve to components, rows stay rows, zero never goes; groups tie what an oracle ties."""

from __future__ import annotations

import pytest
import torch
import torch_pruning
from torch import Tensor, nn
from torchvision.models import MobileNetV2, ResNet
from torchvision.models.resnet import BasicBlock

from compressor.graph import trace
from compressor.pruning import analyse
from compressor.pruning.classes import resolve
from compressor.pruning.labels import Ledger, along, axes, compress


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

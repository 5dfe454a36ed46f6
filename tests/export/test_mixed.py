"""How many layers stay in float, by a judge of known law and a writer that only writes down what it was asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from compressor.errors import GateError
from compressor.export import mixed
from compressor.export.calibration import Statistics
from compressor.export.mixed import Mixed, best_method, to_mixed
from compressor.export.onnx import write_model

ORDER = tuple(f"layer{i}" for i in range(20))


class Writer:
    """In place of `to_int8`: the layers each file keeps, the last one's first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept: list[tuple[str, ...]] = []
        self.ranges: list[Any] = []
        monkeypatch.setattr(mixed, "to_int8", self.write)

    def write(self, path: Any, out: Any, *, keep: Any = (), **options: Any) -> Path:
        self.kept.append(tuple(keep))
        self.ranges.append(options["ranges"])
        return Path(out)


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    return Writer(monkeypatch)


def made(writer: Writer, needed: int, *, order: tuple[str, ...] = ORDER) -> Mixed:
    """The file of a judge that accepts from `needed` layers in float on."""

    def score(path: Path) -> float:
        return 0.9 if len(writer.kept[-1]) >= needed else 0.5

    return to_mixed("model.onnx", "out.onnx", ranges={}, order=order, score=score, least=0.8)


@pytest.mark.parametrize("needed", range(11))
def test_the_fewest_layers_that_the_judge_accepts_stay_in_float(writer: Writer, needed: int) -> None:
    result = made(writer, needed)
    assert result.kept == ORDER[:needed]
    assert writer.kept[-1] == ORDER[:needed]  # the file that is there is the one that was chosen
    assert result.score == 0.9
    assert len(writer.kept) <= 10
    assert dict(result.tried)[needed] == 0.9
    assert all((score == 0.9) == (count >= needed) for count, score in result.tried)


@pytest.mark.parametrize("needed", [11, 20, 99])
def test_where_half_of_the_layers_is_not_enough_int8_is_refused(writer: Writer, needed: int) -> None:
    with pytest.raises(GateError, match=r"int8 reaches 0\.5000 with 10 of 20 layers in float, at least 0\.8000"):
        made(writer, needed)


def test_a_network_of_one_layer_may_keep_it(writer: Writer) -> None:
    assert made(writer, 1, order=ORDER[:1]).kept == ORDER[:1]
    with pytest.raises(GateError, match="with 1 of 1 layers in float"):
        made(writer, 2, order=ORDER[:1])


STATISTICS = Statistics({"x": (-1.0, 9.0)}, {"x": np.bincount([0] * 1000 + [2047], minlength=2048)}, 1)


def titled(title: str) -> onnx.ModelProto:
    """A file of one operation that tells what it is."""
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], title, [x], [y])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize(
    ("scores", "best"),
    [((0.7, 0.9, 0.8), "percentile"), ((0.7, 0.8, 0.9), "entropy"), ((0.9, 0.9, 0.9), "minmax")],
)
def test_the_method_whose_file_scores_highest_is_at_the_place_in_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scores: tuple[float, ...], best: str
) -> None:
    def write(path: Any, file: Path, *, ranges: Any, **options: Any) -> Path:
        return write_model(titled(str(ranges)), file)

    monkeypatch.setattr(mixed, "to_int8", write)
    given = iter(scores)
    score: Callable[[Path], float] = lambda path: next(given)  # noqa: E731
    out = tmp_path / "out.onnx"
    method, by_method = best_method("model.onnx", out, statistics=STATISTICS, score=score)
    assert method == best
    assert list(by_method.values()) == list(scores)
    assert onnx.load(out).graph.name == str(mixed.ranges(STATISTICS, best))  # type: ignore[arg-type]
    assert next(given, None) is None

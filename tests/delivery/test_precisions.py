"""Every precision from one run: files, gates, bundle, report, and what a file that is not right leads to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import compressor
from compressor.accuracy import evaluate
from compressor.delivery import flow, gates, precisions
from compressor.delivery.artifacts import INT8, INT8_TENSORRT, Artifact, Measure
from compressor.delivery.bundling import file_limits
from compressor.delivery.results import Delivery, Files, Parities
from compressor.device.bundle import read_bundle, verify_bundle
from compressor.device.golden import distance, read_golden
from compressor.device.parity import LIMITS, Parity, failures
from compressor.device.runtimes import open_model
from compressor.errors import GateError, RecipeError
from compressor.files import read_json, read_record
from compressor.inputs.checkpoints import state_hash
from compressor.inputs.images import Images, batches
from compressor.inputs.models import Model
from compressor.recipe import make_recipe
from compressor.records import Plan
from compressor.run.work import Request, prepare

from .conftest import QUICK, Small

Compress = Callable[..., compressor.Run]
pytestmark = pytest.mark.usefixtures("run", "short_run")
SHIPPED = ("model.onnx", "model.fp16.onnx", "model.int8.onnx", "model.int8.tensorrt.onnx")


def test_every_precision_is_a_file_with_its_own_parity_accuracy_and_gate(run: compressor.Run) -> None:
    assert set(run.summary["precisions"]) == set(SHIPPED)
    for name, about in run.summary["precisions"].items():
        assert about["bytes"] == (run.folder / name).stat().st_size
        assert 0 <= about["accuracy"] <= 1
    report = json.loads((run.folder / "report.json").read_text())
    named = " ".join(gate["name"] for gate in report["gates"])
    assert [gate["name"] for gate in report["gates"] if not gate["passed"] and not gate["doubt"]] == []
    assert all(f"parity: {name}" in named for name in SHIPPED)
    assert all(f"top-1 lost by {name}" in named for name in SHIPPED[1:])
    limits = {gate["name"]: gate["limit"] for gate in report["gates"]}
    assert limits["parity: model.fp16.onnx = PyTorch fp32, largest difference"] == LIMITS["fp16"].relative
    assert "int8: top-1 lost on 32 calibration images" in limits


def test_the_lower_precisions_are_not_copies(run: compressor.Run) -> None:
    found = run.summary["precisions"]
    assert found["model.fp16.onnx"]["parity_max_abs"] > 10 * found["model.onnx"]["parity_max_abs"]
    assert found["model.int8.onnx"]["parity_max_abs"] > 2 * found["model.fp16.onnx"]["parity_max_abs"]
    kinds = {name: {n.op_type for n in onnx.load(run.folder / name).graph.node} for name in SHIPPED}
    assert "QuantizeLinear" in kinds["model.int8.onnx"] & kinds["model.int8.tensorrt.onnx"]
    assert "QuantizeLinear" not in kinds["model.onnx"] | kinds["model.fp16.onnx"]


def test_tensorrt_gets_float_biases_and_cpus_integer_ones(run: compressor.Run) -> None:
    kinds = {
        name: {numpy_helper.to_array(i).dtype.name for i in onnx.load(run.folder / name).graph.initializer}
        for name in ("model.int8.onnx", "model.int8.tensorrt.onnx")
    }
    assert {"uint8", "int32"} <= kinds["model.int8.onnx"]
    assert {"uint8", "int32"}.isdisjoint(kinds["model.int8.tensorrt.onnx"])


def test_calibration_and_judgement_are_on_different_images(run: compressor.Run) -> None:
    held = read_json(run.folder / "int8.json", "int8/3")["files"]["model.int8.onnx"]
    splits = read_json(run.folder / "splits.json", "splits/1")
    assert held["judged_on"] == 32  # 42 calibration images, a quarter of which the ranges come from
    assert set(held["scores"]) == {"minmax", "percentile", "entropy"}
    assert held["method"] == max(held["scores"], key=held["scores"].get)
    assert splits["hashes"]["calibration"] != splits["hashes"]["evaluation"]


def test_the_bundle_holds_and_verifies_every_file(run: compressor.Run, tmp_path: Path) -> None:
    report = verify_bundle(run.folder / "bundle")
    ran = {check.what for check in report.checks if check.parity is not None}
    assert report.passed
    assert ran == set(SHIPPED)
    bundle = tmp_path / "bundle"
    for name in SHIPPED:
        shutil.copytree(run.folder / "bundle", bundle, dirs_exist_ok=True)
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)
        assert not verify_bundle(bundle).passed, name


def test_an_engine_for_every_precision_from_the_form_made_for_it(run: compressor.Run) -> None:
    manifest = json.loads((run.folder / "bundle" / "manifest.json").read_text())
    models = {r["precision"]: r["model"] for r in manifest["build"]}
    assert models == {"fp32": "model.onnx", "fp16": "model.fp16.onnx", "int8": "model.int8.tensorrt.onnx"}
    if not run.summary["engines"]:
        pytest.skip("no library here builds engines")
    assert [e["precision"] for e in run.summary["engines"]] == ["fp32", "fp16", "int8"]
    assert sum("TensorRT engines for SM86 in fp32, fp16, int8" in line for line in run.summary["not_checked"]) == 1


def test_the_report_shows_the_trade_and_where_time_goes(run: compressor.Run) -> None:
    report = json.loads((run.folder / "report.json").read_text())
    assert [p["label"] for p in report["pareto"]] == ["dense", "shipped", "shipped, fp16", "shipped, int8"]
    assert {f"plots/{name}.png" for name in ("pareto", "time")} <= {
        str(p.relative_to(run.folder)) for p in (run.folder / "plots").iterdir()
    }
    timed = {row["layer"]: row["ms_shipped"] for row in report["layers"]}
    assert all(timed[layer] > 0 for layer in ("stem", "inner", "outer", "head"))
    text = (run.folder / "report.md").read_text()
    assert "Layers were not timed" not in text
    assert "model.int8.tensorrt.onnx" in text


def test_other_precisions_in_the_same_folder_leave_no_stale_file(
    run: compressor.Run, compress: Compress, tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(run.folder, folder)
    said: list[str] = []
    fewer = compress(folder, precisions="fp32,fp16", targets="SM86", notify=lambda stage, share: said.append(stage))
    assert set(fewer.summary["precisions"]) == {"model.onnx", "model.fp16.onnx"}
    assert [p.name for p in folder.glob("*.onnx") if "int8" in p.name] == []
    assert [p.name for p in (folder / "bundle").glob("*.onnx") if "int8" in p.name] == []
    assert {"onnx (done before)", "fp16 (done before)"} <= set(said)


def test_int8_that_loses_too_much_ends_the_run_and_says_what_to_do(
    run: compressor.Run, compress: Compress, tmp_path: Path
) -> None:
    folder = tmp_path / "failed"
    shutil.copytree(run.folder, folder)
    with pytest.raises(GateError, match=r"int8: top-1 lost.*layers that cost most.*--precisions fp32,fp16"):
        compress(folder, precisions="int8", targets="SM86", max_int8_loss=-100)
    text = (folder / "report.md").read_text()
    assert "int8: top-1 lost" in text
    assert "This result should not ship" in text
    assert not (folder / "bundle").exists()
    assert not (folder / "summary.json").exists()


@pytest.mark.thorough
def test_layers_that_int8_hurts_stay_in_float_and_are_named(
    run: compressor.Run, compress: Compress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge that wants the head in float: the search finds it and the report names the layer, not the node."""
    folder = tmp_path / "mixed"
    shutil.copytree(run.folder, folder)

    def judge(original: Path, images: Any, labels: Any) -> Callable[[Path, Any], float]:
        def score(path: Path, placement: Any) -> float:
            model = onnx.load(path)
            head = next(n for n in model.graph.node if n.op_type == "Gemm")
            made = {n.output[0]: n.op_type for n in model.graph.node}
            return 0.0 if made.get(head.input[1]) == "DequantizeLinear" else 1.0

        return score

    monkeypatch.setattr(precisions, "_judge", judge)
    changed = compress(folder, precisions="int8", targets="SM86", max_int8_loss=1.0)
    for name in ("model.int8.onnx", "model.int8.tensorrt.onnx"):
        assert "head" in changed.summary["precisions"][name]["layers_in_float"]
    report = json.loads((folder / "report.json").read_text())
    assert ["head" in f["kept"] for f in report["files"] if f["precision"] == "int8"] == [True, True]


def _wrong_bias(path: Path) -> None:
    model = onnx.load(path)
    bias = next(i for i in model.graph.initializer if i.name == "head.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.5), bias.name))
    path.write_bytes(model.SerializeToString())


def _fixed_batch(path: Path) -> None:
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("breakage", "said"),
    [
        (_wrong_bias, "largest difference"),
        pytest.param(_fixed_batch, "fixed batch", marks=pytest.mark.slow),
    ],
)
def test_a_broken_export_fails_its_gate_and_the_report_shows_it(
    compress: Compress,
    run: compressor.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    breakage: Callable[[Path], None],
    said: str,
) -> None:
    whole = flow.export_onnx

    def broken(network: Any, example: Any, path: Path, **more: Any) -> Path:
        whole(network, example, path, **more)
        breakage(path)
        return path

    monkeypatch.setattr(flow, "export_onnx", broken)
    with pytest.raises(GateError, match=said):
        compress(tmp_path / "broken")
    report = json.loads((tmp_path / "broken" / "report.json").read_text())
    failed = [gate["name"] for gate in report["gates"] if gate["value"] is None or gate["value"] > gate["limit"]]
    assert failed[0].startswith("parity: dense.onnx")
    assert "This result should not ship" in (tmp_path / "broken" / "report.md").read_text()
    assert not (tmp_path / "broken" / "bundle").exists()


@pytest.mark.slow
def test_a_runtime_that_is_not_here_is_said_and_an_unknown_one_refused(
    compress: Compress, run: compressor.Run, tmp_path: Path
) -> None:
    folder = tmp_path / "runtimes"
    shutil.copytree(run.folder, folder)
    found = compress(
        folder, precisions="int8", targets="SM86", runtimes="onnxruntime,pytorch,pytorch-cuda-graph"
    ).summary
    assert set(found["latency_ms"]) >= {"onnxruntime", "pytorch"}
    if "pytorch-cuda-graph" not in found["latency_ms"]:
        assert "latency on pytorch-cuda-graph: no GPU: PyTorch finds no CUDA device" in found["not_checked"]
    with pytest.raises(RecipeError, match="Did you mean 'onnxruntime'"):
        make_recipe({"runtimes": "onnxruntme"})


def test_accuracy_of_a_file_is_the_networks(run: compressor.Run, small: nn.Module, images: Images) -> None:
    everything = batches(images, 7)
    found = gates.accuracy_of(run.folder / "model.onnx", everything)
    assert found == evaluate(run.network(small), everything)
    assert found.correct_top5 == -1  # four classes have no top-5


@pytest.mark.slow
def test_the_embedded_model_keeps_its_accuracy_in_every_precision(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    more: dict[str, Any] = {"criterion": "l1", "calibration": 256, "finetune_epochs": 1, "latency_seconds": 0.2}
    found = compressor.compress("digits-resnet", out=out, precisions="fp32,fp16,int8", **more).summary
    lost = {name: about["points_lost"] for name, about in found["precisions"].items()}
    assert max(lost.values()) - lost["model.onnx"] <= 1.0
    assert found["precisions"]["model.int8.onnx"]["bytes"] < 0.5 * found["onnx_bytes_shipped"]
    assert verify_bundle(tmp_path / "run" / "bundle").passed
    assert set(found["latency_ms"]["onnxruntime"]["1"]) == {"dense", "shipped", "shipped-fp16", "shipped-int8"}


def test_no_image_gives_ranges_and_judges_them(small: nn.Module, images: Images, tmp_path: Path) -> None:
    recipe = make_recipe({**QUICK, "model": "Small", "out": tmp_path / "run"})
    given = Model(small, "", "given", None, None, state_hash(small))
    work = prepare(Request(recipe, given, images), lambda stage, share: None)
    ranged, _ = precisions.gathered(work.calibration, precisions._range_count(work))
    judges = precisions.judge_images_of(work)
    judged, labels = judges.read()
    seen = {image.tobytes() for image in ranged}
    assert len(seen) == 10
    assert len(judged) == len(labels) == judges.count == 32
    assert seen.isdisjoint(image.tobytes() for image in judged)
    assert seen.isdisjoint(image.numpy().tobytes() for batch, _ in work.evaluation for image in batch)


def test_images_that_served_nothing_judge_where_there_are_enough(
    small: nn.Module, images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precisions, "LEAST_SPARE", 8)
    recipe = make_recipe({**QUICK, "model": "Small", "out": tmp_path / "run", "calibration": 16})
    given = Model(small, "", "given", None, None, state_hash(small))
    work = prepare(Request(recipe, given, images, spare=12), lambda stage, share: None)
    judges = precisions.judge_images_of(work)
    judged, labels = judges.read()
    assert len(judged) == len(labels) == judges.count == 12
    served = {image.numpy().tobytes() for part in (work.calibration, work.evaluation) for b, _ in part for image in b}
    assert served.isdisjoint(image.tobytes() for image in judged)
    assert precisions._gate_name(INT8, judges, Measure()) == "int8: top-1 lost on 12 spare images"
    name = precisions._gate_name(INT8_TENSORRT, judges, Measure("PSNR", is_share=False))
    assert name == "int8: PSNR lost on 12 spare images, form for tensorrt"
    assert (Measure("mIoU").unit, Measure("PSNR", is_share=False).unit) == ("points", "%")


# what the last line, the bundle and the report say of one run is what its files hold


def test_the_last_line_is_of_the_files_and_networks_that_are_there(run: compressor.Run) -> None:
    summary = run.summary
    for variant, name in (("dense", "dense.onnx"), ("shipped", "model.onnx")):
        assert summary[f"onnx_bytes_{variant}"] == (run.folder / name).stat().st_size
        assert summary[f"flops_{variant}"] == 2 * summary[f"macs_{variant}"]
    assert summary["macs_kept"] == round(summary["macs_shipped"] / summary["macs_dense"], 4)
    assert summary["params_shipped"] == sum(p.numel() for p in run.network(Small()).parameters())
    for about in summary["precisions"].values():
        lost = 100 * (summary["accuracy_dense"] - about["accuracy"])
        assert about["points_lost"] == pytest.approx(lost, abs=0.02)  # both are rounded
    at_one = summary["latency_ms"]["onnxruntime"]["1"]
    assert summary["latency_ratio_b1"] == pytest.approx(at_one["shipped"]["p50"] / at_one["dense"]["p50"], abs=1e-4)
    assert set(at_one) == {"dense", "shipped", "shipped-fp16", "shipped-int8"}


def test_the_distance_in_the_last_line_is_the_worst_batch_sizes(run: compressor.Run) -> None:
    measured = read_json(run.folder / "parity.json", "parity/1")["onnxruntime"]
    worst = {name: max(parity["max_abs"] for parity in by_batch.values()) for name, by_batch in measured.items()}
    assert all(len(by_batch) == 2 for by_batch in measured.values())
    assert run.summary["parity_max_abs"] == max(worst["dense.onnx"], worst["model.onnx"])
    assert {name: about["parity_max_abs"] for name, about in run.summary["precisions"].items()} == {
        name: worst[name] for name in SHIPPED
    }


def test_the_bundle_says_what_it_was_made_from(run: compressor.Run) -> None:
    manifest = read_bundle(run.folder / "bundle")
    assert [model.path for model in manifest.models if not model.library] == list(SHIPPED)
    assert [model.made_for for model in manifest.models[:4]] == ["", "", "", "tensorrt"]
    assert manifest.provenance["macs"] == run.summary["macs_shipped"]
    assert manifest.provenance["parameters"] == run.summary["params_shipped"]
    assert manifest.provenance["budget"] == "macs 0.6"
    assert manifest.preprocessing.size == (12, 12)
    assert (run.folder / "bundle" / "plan.json").read_bytes() == (run.folder / "network.json").read_bytes()
    assert any("patents" in line for line in manifest.licences)


def test_the_golden_outputs_are_the_shipped_networks_and_limits_leave_room(run: compressor.Run) -> None:
    manifest = read_bundle(run.folder / "bundle")
    golden = read_golden(run.folder / "bundle", manifest)
    with torch.no_grad():
        expected = run.network(Small())(torch.from_numpy(golden.inputs)).numpy()
    assert len(golden.inputs) == 8
    np.testing.assert_allclose(golden.outputs, expected, atol=1e-5 * np.abs(expected).max())
    measured = read_json(run.folder / "parity.json", "parity/1")["onnxruntime"]
    for model in manifest.models[:4]:
        found = max(parity["max_abs"] / parity["reference_max_abs"] for parity in measured[model.path].values())
        assert found <= model.limits.relative


def test_limits_leave_room_for_what_the_golden_images_differ_by(run: compressor.Run) -> None:
    """Eight images spread a channel less than those of parity, so a difference is a larger share of its spread."""
    manifest, name = read_bundle(run.folder / "bundle"), "model.onnx"
    held = read_golden(run.folder / "bundle", manifest)
    apart = replace(held, outputs=np.asarray(held.outputs) * np.float32(1.1))
    unnoticed = Parity(64, 1e-9, 1e-9, 1.0, 200.0, 1.0, 1.0)
    artifact, path = Artifact(name, "shipped"), run.folder / name
    delivery = Delivery(files=Files({artifact: path}), parity=Parities({name: {1: unnoticed}}))

    limits = file_limits(artifact, delivery, apart)
    assert not failures(distance(open_model(path), apart), limits)
    assert failures(distance(open_model(path), apart), file_limits(artifact, delivery, held))


def test_the_reports_rows_are_those_of_the_runs_files(run: compressor.Run) -> None:
    report = json.loads((run.folder / "report.json").read_text())
    timed = read_json(run.folder / "latency.json", "latency/2")["timings"]
    assert [row["samples_ms"] for row in report["latency"]] == [row["samples_ms"] for row in timed]
    plan = read_record(run.folder / "plan.json", Plan)
    kept = {group["name"]: group["kept"] for group in report["groups"]}
    assert plan.kept
    assert all(kept[name] == units.tolist() for name, units in plan.kept.items())
    for side in ("dense", "shipped"):
        assert sum(row[f"macs_{side}"] for row in report["layers"]) == report[f"cost_{side}"]["macs"]
        assert report[f"cost_{side}"]["macs"] == run.summary[f"macs_{side}"]
    widths = {
        row["layer"]: (row["width_dense"], row["width_shipped"]) for row in report["layers"] if row["width_dense"]
    }
    modules = dict(Small().named_modules())
    assert all(modules[layer].weight.shape[0] == dense for layer, (dense, _) in widths.items())
    assert all(shipped <= dense for dense, shipped in widths.values())
    assert [file["name"] for file in report["files"]] == ["dense.onnx", *SHIPPED]
    assert {stage["name"] for stage in report["stages"]} >= {"groups", "onnx", "fp16", "int8", "parity", "latency"}
    assert [point["label"] for point in report["trade"]] == ["dense", "removed", "repaired"]
    assert [point["chosen"] for point in report["trade"]] == [False, False, True]

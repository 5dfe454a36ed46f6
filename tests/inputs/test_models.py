from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor.errors import InputError, ModelError
from compressor.files import file_sha256
from compressor.inputs import models
from compressor.inputs.images import Preprocessing, batches, overridden
from compressor.inputs.models import load_model
from compressor.inputs.sources import load_images, require_labels
from compressor.inputs.torchvision_models import torchvision_names

INDEX = json.loads((models.EMBEDDED / "index.json").read_text())
ACCURACY_FLOORS = {"digits-resnet": 0.985, "digits-vit": 0.97}  # what the project promises of them
EMBEDDED_BYTES = 2_000_000
POINT = 0.01  # published accuracies are reproduced within a point; another decoder moves single images
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

USERS_FILE = """
from dataclasses import dataclass
from torch import nn
import beside

@dataclass
class Options:
    classes: int = beside.CLASSES

def net(classes=Options().classes, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.ReLU(), nn.Linear(width, classes))

def fails(): raise RuntimeError("no such preset")

def number(): return 3

ready = nn.Linear(2, 2)
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    """The spec of a user's own factory, in a file that imports a module beside it."""
    (tmp_path / "beside.py").write_text("CLASSES = 2\n")
    (tmp_path / "mine.py").write_text(USERS_FILE)
    return f"{tmp_path / 'mine.py'}:net"


def _correct(model: nn.Module, images: object) -> float:
    data = batches(images, 64)  # type: ignore[arg-type]
    with torch.no_grad():
        return float(np.mean([p for x, y in data for p in (model(x).argmax(1) == y).tolist()]))


# the embedded models


@pytest.mark.parametrize("name", sorted(ACCURACY_FLOORS))
def test_embedded_models_are_what_the_index_says(name: str) -> None:
    entry, model = INDEX["models"][name], load_model(name)
    assert file_sha256(models.EMBEDDED / entry["file"]) == entry["sha256"]
    assert (models.EMBEDDED / entry["file"]).stat().st_size <= EMBEDDED_BYTES
    assert sum(p.numel() for p in model.module.parameters()) == entry["parameters"]
    assert model.preprocessing is not None
    measured = _correct(model.module, load_images("digits:evaluation").prepared(model.preprocessing))
    assert measured == pytest.approx(entry["accuracy"]["correct"] / entry["accuracy"]["n"], abs=2 / 719)
    assert measured >= ACCURACY_FLOORS[name]


def test_a_licence_is_said_of_the_weights_that_it_is_of() -> None:
    assert load_model("digits-resnet").licence == "Apache-2.0"
    assert load_model("digits-resnet", "none").licence == ""  # nobody's weights
    assert models._timm("vit_tiny_patch16_224(num_classes=3)", "none").licence == "apache-2.0"
    assert load_model("timm:vit_tiny_patch16_224(num_classes=3)", "none").licence == ""


def test_the_embedded_transformer_has_the_promised_blocks_and_heads() -> None:
    names = [name for name, _ in load_model("digits-vit", "none").module.named_modules()]
    attention = [name for name in names if name.endswith(".attention")]
    assert len(attention) >= 4
    module = load_model("digits-vit", "none").module.get_submodule(attention[0])
    assert module.q.in_features // module.head_width == 4


def test_a_changed_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "models"
    shutil.copytree(models.EMBEDDED, copy)
    monkeypatch.setattr(models, "EMBEDDED", copy)
    file = copy / INDEX["models"]["digits-vit"]["file"]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ModelError, match=r"is not the file models/index\.json names"):
        load_model("digits-vit")


def test_a_missing_index_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "EMBEDDED", tmp_path / "models")
    with pytest.raises(ModelError, match=r"index\.json' is missing; they come with a checkout"):
        load_model("digits-resnet")


# specs


def test_a_factory_in_a_file(net: str) -> None:
    path = list(sys.path)
    model = load_model(net)
    assert (model.builder, model.weights, model.preprocessing) == (net, "none", None)
    assert not model.module.training
    assert model.module[3].out_features == 2
    assert load_model(f"{net}(classes=5, width=3)").module[3].weight.shape == (5, 3)
    assert sys.path == path


def test_a_module_that_is_there_already(net: str) -> None:
    assert isinstance(load_model(net.replace(":net", ":ready")).module, nn.Linear)


def test_a_factory_of_an_installed_package() -> None:
    assert load_model("torchvision.models:squeezenet1_0(num_classes=3)").weights == "none"


def test_fresh_weights_depend_on_the_seed_alone(net: str) -> None:
    state = torch.random.get_rng_state()
    first = load_model(net, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert load_model(net, seed=1).sha256 == first.sha256
    assert load_model(net, seed=2).sha256 != first.sha256


def test_torchvision_by_name_knows_its_preprocessing() -> None:
    model = load_model("torchvision:efficientnet_b1", "none")
    assert model.preprocessing == Preprocessing((240, 240), (255,), "bilinear", **IMAGENET)
    assert model.class_names is not None
    assert model.class_names[0] == "tench"
    small = load_model("torchvision:vit_b_32(image_size=96)", "none").preprocessing
    assert small is not None
    assert (small.size, small.resize) == ((96, 96), (110,))  # 224 of 256, for the pixels it was built for
    assert load_model("torchvision:resnet18(num_classes=2)", "none").class_names is None


def test_torchvision_by_name_knows_every_kind() -> None:
    segmentation = load_model("torchvision:deeplabv3_mobilenet_v3_large(aux_loss=True, num_classes=3)", "none")
    assert segmentation.preprocessing == Preprocessing((520, 520), (520,), "bilinear", **IMAGENET)
    assert any("auxiliary classifier" in note for note in segmentation.notes)
    with torch.no_grad():
        assert list(segmentation.module(torch.rand(1, 3, 32, 32))) == ["out"]
    video = load_model("torchvision:r3d_18", "none")
    assert video.preprocessing is None
    assert any("clips [N, 3, frames, 112, 112]" in note for note in video.notes)
    assert video.class_names is not None
    assert len(video.class_names) == 400


def test_what_a_librarys_names_are_for() -> None:
    kinds = torchvision_names()
    assert kinds["resnet18"] == "classification"
    assert kinds["lraspp_mobilenet_v3_large"] == "segmentation"
    assert kinds["keypointrcnn_resnet50_fpn"] == "detection"
    assert kinds["mvit_v1_b"] == "video"
    assert not any(name.startswith("quantized") for name in kinds)


def test_timm_by_name_knows_its_preprocessing() -> None:
    model = load_model("timm:vit_tiny_patch16_224(num_classes=3)", "none")
    assert model.preprocessing == Preprocessing((224, 224), (248,), "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert model.module(torch.zeros(1, 3, 224, 224)).shape == (1, 3)


BAD_SPECS = [
    ("torchvision:resnet19", "no model 'resnet19'. Did you mean 'resnet18'"),
    ("torchvision:ssd300_vgg", "Did you mean 'ssd300_vgg16'"),
    ("torchvision:quantized_resnet18", "is quantised; give the float model, torchvision:resnet18"),
    ("timm:vit_tiny_patch16_225", "no model 'vit_tiny_patch16_225'. Did you mean 'vit_tiny_patch16_224'"),
    ("digits-resnt", "no model 'digits-resnt'. Did you mean 'digits-resnet'"),
    ("squeezenet1_1", "Did you mean 'torchvision:squeezenet1_1'"),
    ("resnet18", "Did you mean 'torchvision:resnet18' or 'timm:resnet18'"),
    ("digits-vit(depth=2)", "takes no arguments"),
    ("no_such_package.models:net", "module 'no_such_package' is not here"),
    ("nowhere.py:net", "there is no file 'nowhere.py'"),
    ("torchvision:resnet18(num_classes='x')", "raised TypeError"),
    ("torchvision:resnet18(2)", "every argument needs its name"),
    ("json:dumps", "raised TypeError: dumps"),
    ("json:dmps", "has no factory 'dmps'. Did you mean 'dumps'"),
]


@pytest.mark.parametrize(("spec", "message"), BAD_SPECS, ids=[s for s, _ in BAD_SPECS])
def test_bad_names_are_refused_with_a_hint(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace(".", r"\.")) as caught:
        load_model(spec, "none")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("fails", r"raised RuntimeError \(at \w+\.py:\d+\): no such preset"),
        ("number", "gave int, expected a torch.nn.Module"),
        ("nett", "Did you mean 'net'"),
        ("net(depth=3)", "unexpected keyword argument 'depth'"),
    ],
)
def test_a_factory_that_fails_is_named(net: str, factory: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(net.replace(":net", f":{factory}"))


def test_the_line_of_the_users_code_that_raised_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("import json\n\ndef net():\n    return json.loads('{')\n")
    with pytest.raises(ModelError, match=r"raised JSONDecodeError \(at own\.py:4\): Expecting property name"):
        load_model(f"{tmp_path / 'own.py'}:net")


def test_a_file_that_fails_is_named_every_time(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(ModelError, match=r"importing .*broken\.py' raised ZeroDivisionError \(at broken\.py:1\)"):
            load_model(f"{tmp_path / 'broken.py'}:net")
    assert not [name for name in sys.modules if name.startswith("broken_")]


def test_no_network_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # the discard port: refused at once
    with pytest.raises(ModelError, match="default weights of 'torchvision:squeezenet1_1' can't be downloaded"):
        load_model("torchvision:squeezenet1_1")


# checkpoints


def _state(spec: str) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(value, 0.5) for name, value in load_model(spec).module.state_dict().items()}


@pytest.mark.parametrize("form", ["safetensors", "pt", "nested", "parallel", "compiled", "half"])
def test_checkpoints_in_their_usual_forms(net: str, tmp_path: Path, form: str) -> None:
    state, path = _state(net), tmp_path / "w.pth"
    if form == "safetensors":
        path = tmp_path / "w.safetensors"
        save_file(state, path)
    elif form == "nested":
        torch.save({"epoch": 3, "optimizer": {"lr": 0.1}, "state_dict": state}, path)
    elif form in ("parallel", "compiled"):
        prefix = {"parallel": "module.", "compiled": "_orig_mod."}[form]
        torch.save({"model": {prefix + name: value for name, value in state.items()}}, path)
    else:
        torch.save({name: value.half() if form == "half" else value for name, value in state.items()}, path)
    model = load_model(net, str(path))
    assert all(torch.equal(p, torch.full_like(p, 0.5)) for p in model.module.parameters())
    assert {p.dtype for p in model.module.parameters()} == {torch.float32}


def test_a_model_whose_own_names_start_like_a_wrapper(tmp_path: Path) -> None:
    (tmp_path / "wrapped.py").write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Linear(1, 1))\n")
    spec = f"{tmp_path / 'wrapped.py'}:net"
    (tmp_path / "named.py").write_text(
        "from collections import OrderedDict\nfrom torch import nn\n"
        "def net(): return nn.Sequential(OrderedDict(model=nn.Linear(1, 1)))\n"
    )
    torch.save({"model.weight": torch.ones(1, 1), "model.bias": torch.ones(1)}, tmp_path / "w.pt")
    assert load_model(f"{tmp_path / 'named.py'}:net", str(tmp_path / "w.pt")).module.model.weight.item() == 1
    torch.save({"model.0.weight": torch.ones(1, 1), "model.0.bias": torch.ones(1)}, tmp_path / "w.pt")
    assert load_model(spec, str(tmp_path / "w.pt")).module[0].weight.item() == 1


def test_another_number_of_classes_is_guessed(net: str, tmp_path: Path) -> None:
    save_file(_state(f"{net}(classes=1000)"), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="number of classes differs: 1000 in the file, 2 in the model") as caught:
        load_model(net, str(tmp_path / "w.safetensors"))
    assert "'3.weight' [1000, 4] in the file, [2, 4] in the model" in str(caught.value)


def test_another_width_is_not_taken_for_classes(net: str, tmp_path: Path) -> None:
    save_file(_state(f"{net}(width=8)"), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"3 of other shape .*built with another width"):
        load_model(net, str(tmp_path / "w.safetensors"))


def test_another_input_of_the_last_layer_is_not_taken_for_classes(net: str, tmp_path: Path) -> None:
    torch.save({**_state(net), "3.weight": torch.ones(3, 9)}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"1 of other shape .*built with another width"):
        load_model(net, str(tmp_path / "w.pt"))


def test_another_architecture_is_guessed(net: str) -> None:
    with pytest.raises(ModelError, match=r"4 missing \('1\.weight', .* unexpected .*another architecture"):
        load_model(net, str(models.EMBEDDED / INDEX["models"]["digits-vit"]["file"]))


def test_missing_and_left_over_tensors_are_listed(net: str, tmp_path: Path) -> None:
    state = _state(net)
    state["extra"] = state.pop("3.bias")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"1 missing \('3\.bias'\), 1 unexpected \('extra'\)"):
        load_model(net, str(tmp_path / "w.pt"))


class _Touch:
    """Unpickling it creates a file: what a hostile checkpoint would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_nothing_in_a_checkpoint_is_executed(net: str, tmp_path: Path) -> None:
    for name, write in (("plain.pt", pickle.dumps), ("torch.pt", None)):
        if write:
            (tmp_path / name).write_bytes(write(_Touch(tmp_path / "touched")))
        else:
            torch.save({"w": _Touch(tmp_path / "touched")}, tmp_path / name)
        with pytest.raises(ModelError, match="not a checkpoint that can be read safely"):
            load_model(net, str(tmp_path / name))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pt", b"garbage", "not a checkpoint that can be read safely"),
        ("w.safetensors", b"garbage", "not a checkpoint that can be read safely"),
        ("gone.pt", None, "don't exist; give 'none', 'default' or a file"),
    ],
)
def test_files_that_are_no_checkpoints(
    net: str, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(net, str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_tensors_or_with_nan(net: str, tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="holds dict, no tensors by name"):
        load_model(net, str(tmp_path / "w.pt"))
    state = _state(net)
    state["1.bias"][1] = float("nan")
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ModelError, match=r"holds NaN \(first in '1\.bias'\)"):
        load_model(net, str(tmp_path / "w.pt"))


def test_a_factory_has_no_default_weights(net: str) -> None:
    with pytest.raises(ModelError, match="no default weights of a library"):
        load_model(net, "default")


# real weights: pre-processing, loading and decoding reproduce published accuracies


def _published(spec: str, weights: Path, source: Path, **preprocessing: object) -> float:
    model = load_model(spec, str(weights))
    images = load_images(str(source)).prepared(overridden(model.preprocessing, **preprocessing))
    require_labels(images, 1000)
    return _correct(model.module, images)


def test_a_users_cifar_network_keeps_its_accuracy(shared_data: Path) -> None:
    weights = shared_data / "weights"
    spec = f"{weights}/architectures/cifar_resnet.py:cifar_resnet(depth=20)"
    evaluation = shared_data / "cifar10" / "evaluation.npz"
    measured = _published(spec, weights / "cifar10_resnet20.safetensors", evaluation, size=32, **IMAGENET)
    assert measured == pytest.approx(0.934, abs=POINT)


def test_raw_pixel_values_can_be_asked_for(shared_data: Path) -> None:
    weights, evaluation = shared_data / "weights", shared_data / "cifar10" / "evaluation.npz"
    spec = f"{weights}/architectures/mlperf_resnet8.py:ResNet8"
    raw = {"size": 32, "mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    measured = _published(spec, weights / "cifar10_mlperf_resnet8.safetensors", evaluation, **raw)
    assert measured == pytest.approx(0.896, abs=POINT)


@pytest.mark.slow
def test_torchvisions_own_preprocessing_keeps_the_accuracy(shared_data: Path) -> None:
    weights = shared_data / "weights" / "imagenet_squeezenet1_1.safetensors"
    measured = _published("torchvision:squeezenet1_1", weights, shared_data / "imagenet" / "evaluation")
    assert measured == pytest.approx(0.608, abs=POINT)


def test_a_small_imagenet_network_keeps_its_accuracy(shared_data: Path) -> None:
    weights = shared_data / "weights"
    spec = f"{weights}/architectures/tf_mobilenet.py:MobileNetV1(alpha=0.25)"
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    file, images = (
        weights / "imagenet_mobilenet_v1_0.25_128_slim_q8.safetensors",
        shared_data / "imagenet" / "evaluation",
    )
    assert _published(spec, file, images, size=128, resize=146, **half) == pytest.approx(0.407, abs=POINT)

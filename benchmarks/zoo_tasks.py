"""The zoo beyond classification: networks that segment, detect, measure, embed and restore, and the job for each.

In: a name of `NETWORKS`, built offline with random weights; what it sees is made of blocks and noise, without labels.
Out: what the whole job found, and whether a planted change of one weight behind every output is caught by the identity
check and by the parity gate. `zoo.py --models tasks` runs them.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import task_networks as own
import torch
from torch import Tensor, fx, nn

import compressor
from compressor.device import feeds
from compressor.device.parity import failures
from compressor.errors import BudgetError, GateError
from compressor.export.gate import measure_export
from compressor.graph import fetch, trace
from compressor.graph.interface import input_names, output_names, output_nodes
from compressor.graph.operators import ALL_CONVOLUTIONS, LINEAR, PRODUCTS
from compressor.inputs.models import load_model
from compressor.pipeline import Run
from compressor.pruning import Structure, analyse, identity_error, prune
from compressor.records import Groups, InputSpec, IntArray
from compressor.run.saved import load_graph, read_network
from compressor.tensors import Inputs, as_tuple, cut

PREFIX = "tasks:"
SAMPLES = 16
IDENTITY_LIMIT = 1e-9  # the recipe's own gate
PARITY_LIMIT = 1e-3
PLANTED = 0.25  # of a weight's standard deviation, another draw for each entry: no norm behind it divides that away
MOST_WEIGHTS = 16  # behind one output: of one that holds pixels beside scores, parity sees what changes pixels
MOST_PLANTS = 4  # outputs whose weights are tried; more of them stand behind the same heads
SHIPPED_FILE = "model.onnx"
RECIPE: dict[str, Any] = {  # without labels, tuning, engines and timings, which need no network of their own kind
    "calibration": 10,
    "evaluation": 0.35,
    "batch_size": 8,
    "finetune_epochs": 0,
    "targets": (),
    "precisions": ("fp32",),
    "runtimes": (),
    "max_accuracy_loss": 100.0,
    "device": "cpu",
}
_LEAST_SHARE = r"macs (0\.\d+)"


@dataclass(frozen=True, slots=True)
class Network:
    """`inputs` are what one sample is, given by `names` where forward does not need all of them.

    `package` is what has to be installed beside the project's own.
    """

    library: str
    build: Callable[[], nn.Module]
    inputs: tuple[InputSpec, ...]
    package: str = ""
    names: tuple[str, ...] = ()


def _image(pixels: int = 64, channels: int = 3) -> tuple[InputSpec, ...]:
    return (InputSpec((channels, pixels, pixels)),)


def _own(build: Callable[[], nn.Module], *inputs: InputSpec) -> Network:
    return Network("own", build, inputs or _image())


def _torchvision(spec: str, *inputs: InputSpec) -> Network:
    """By the product's own names, which also part a detector from what chooses its boxes."""
    return Network("torchvision", partial(_built, f"torchvision:{spec}"), inputs or _image())


def _transformers(spec: str, *inputs: InputSpec, names: tuple[str, ...] = ()) -> Network:
    """A class and its configuration, as the command line takes it."""
    build = partial(_built, f"transformers:{spec}")
    return Network("transformers", build, inputs or _image(), "transformers", names)


def _built(spec: str) -> nn.Module:
    return load_model(spec, "none").module


def _small_detector(kind: str) -> nn.Module:
    """torchvision's detectors on the feature pyramid of a ResNet-18: the heads are the library's, the trunk is thin."""
    import torchvision.models.detection as library
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    trunk = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d)
    return compressor.detector_network(getattr(library, kind)(trunk, num_classes=5).eval())[0]


def _detector(kind: str) -> Network:
    return Network("torchvision", partial(_small_detector, kind), _image(96))


def _small_mvit() -> nn.Module:
    from torchvision.models.video.mvit import MSBlockConfig, MViT

    blocks = [
        MSBlockConfig(1, 16, 32, (3, 3, 3), (3, 3, 3), (1, 1, 1), (1, 4, 4)),
        MSBlockConfig(2, 32, 64, (3, 3, 3), (3, 3, 3), (1, 2, 2), (1, 2, 2)),
        MSBlockConfig(4, 64, 64, (3, 3, 3), (3, 3, 3), (1, 2, 2), (1, 1, 1)),
    ]
    settings = {"residual_pool": False, "residual_with_cls_embed": True, "rel_pos_embed": False}
    return MViT((32, 32), 4, blocks, proj_after_attn=False, num_classes=5, **settings)


def _small_swin3d() -> nn.Module:
    from torchvision.models.video import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [4, 4, 4], num_classes=5)


def _small_raft() -> nn.Module:
    from torchvision.models.optical_flow import raft_small

    class TwoSteps(nn.Module):
        """The flow after two refinements."""

        def __init__(self) -> None:
            super().__init__()
            self.raft = raft_small(weights=None)

        def forward(self, before: Tensor, after: Tensor) -> Tensor:
            flows: list[Tensor] = self.raft(before, after, num_flow_updates=2)
            return flows[-1]

    return TwoSteps()


def _smp_network(kind: str, encoder: str, **options: Any) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, kind)(encoder, encoder_weights=None, classes=5, **options)


def _smp(kind: str, encoder: str = "tu-mobilenetv3_small_050", pixels: int = 64, **options: Any) -> Network:
    build = partial(_smp_network, kind, encoder, **options)
    return Network("segmentation-models-pytorch", build, _image(pixels), "segmentation_models_pytorch")


def _yolo(name: str) -> nn.Module:
    """In the form that the library's own export uses, its batch norms apart."""
    os.environ |= {"YOLO_OFFLINE": "True", "YOLO_AUTOINSTALL": "False", "YOLO_VERBOSE": "False"}
    from ultralytics import RTDETR, YOLO

    family = RTDETR if name.startswith("rtdetr") else YOLO
    model: Any = family(f"{name}.yaml").model.float().eval()
    head = model.model[-1]
    head.export, head.format = True, "onnx"
    return model


def _ultralytics(name: str, pixels: int = 64) -> Network:
    return Network("ultralytics", partial(_yolo, name), _image(pixels), "ultralytics")


_VIT = "hidden_size=32,num_hidden_layers=3,num_attention_heads=4,intermediate_size=64,image_size=64,patch_size=16"
_RESNET = "'embedding_size':16,'hidden_sizes':[16,24,32,48],'depths':[1,1,1,1],'layer_type':'basic'"
_STAGES = "'out_features':['stage1','stage2','stage3','stage4']"
_SWIN = (
    "{'model_type':'swin','embed_dim':16,'depths':[1,1,1,1],'num_heads':[1,2,2,4],'window_size':4,'image_size':64,"
    f"'drop_path_rate':0.0,{_STAGES}}}"
)
_DETR = (
    f"backbone_config={{'model_type':'resnet',{_RESNET},'out_features':['stage4']}},d_model=32,encoder_layers=2,"
    "decoder_layers=2,encoder_ffn_dim=64,decoder_ffn_dim=64,encoder_attention_heads=4,decoder_attention_heads=4,"
    "num_queries=10,num_labels=5"
)
_RT_DETR = (
    "encoder_hidden_dim=32,encoder_in_channels=[24,32,48],encoder_ffn_dim=64,encoder_attention_heads=4,d_model=32,"
    "num_queries=10,decoder_in_channels=[32,32,32],decoder_ffn_dim=64,decoder_layers=2,decoder_attention_heads=4,"
    "num_denoising=0,num_labels=5"
)
_DINOV2 = "'hidden_size':32,'num_hidden_layers':4,'num_attention_heads':4,'image_size':56,'patch_size':14"
_CLIP = InputSpec((3, 4, 32, 32))

NETWORKS: dict[str, Network] = {  # cheapest first
    # written here
    "multi_label": _own(own.MultiLabel),
    "multi_head": _own(own.MultiHead),
    "siamese": _own(own.Siamese, *_image(), *_image()),
    "image_and_vector": _own(own.ImageAndVector, *_image(), InputSpec((9,))),
    "signal": _own(own.Signal, InputSpec((12, 128))),
    "spectrogram": _own(own.Spectrogram, InputSpec((1, 64, 96))),
    "bands": _own(own.Bands, *_image(channels=8)),
    "channels_last": _own(own.ChannelsLast, InputSpec((64, 64, 3))),
    "uint8_pixels": _own(own.Pixels, InputSpec((3, 64, 64), "uint8")),
    "spatial_transformer": _own(own.SpatialTransformer),
    "face_embedding": _own(own.FaceEmbedding),
    "soft_argmax_pose": _own(own.SoftArgmaxPose),
    "rgb_and_depth": _own(own.ColourAndDepth, *_image(), *_image(channels=1)),
    "crnn": _own(own.CRNN, InputSpec((1, 32, 96))),
    "frames_gru": _own(own.FramesGRU, InputSpec((4, 3, 32, 32))),
    "depth_net": _own(own.DepthNet),
    "anchor_free": _own(own.AnchorFree),
    "unet": _own(own.UNet),
    "edsr": _own(own.EDSR, *_image(32)),
    "window_sr": _own(own.WindowSR, *_image(32)),
    "style_net": _own(own.StyleNet),
    # embeddings and encoders
    "clip_vision": _transformers(f"CLIPVisionModelWithProjection({_VIT},projection_dim=16)"),
    "siglip_vision": _transformers(f"SiglipVisionModel({_VIT})"),
    "trocr_encoder": _transformers(f"DeiTModel({_VIT})"),
    "dinov2": _transformers(
        "Dinov2Model(hidden_size=32,num_hidden_layers=3,num_attention_heads=4,mlp_ratio=2,image_size=56,patch_size=14)",
        *_image(56),
    ),
    "dinov3": _transformers(f"DINOv3ViTModel({_VIT},num_register_tokens=2)"),
    "sam_vision": _transformers(
        "SamVisionModel(hidden_size=32,num_hidden_layers=3,num_attention_heads=4,mlp_dim=64,image_size=64,patch_size=8,"
        "output_channels=16,window_size=4,global_attn_indexes=[1],initializer_range=0.02)"
    ),
    "sam2_vision": _transformers(
        "Sam2VisionModel(backbone_config={'model_type':'sam2_hiera_det_model','hidden_size':16,'image_size':[64,64],"
        "'blocks_per_stage':[1,1,2,1],'embed_dim_per_stage':[16,32,64,128],'num_attention_heads_per_stage':[1,2,4,8],"
        "'window_size_per_stage':[4,2,2,2],'global_attention_blocks':[3],"
        "'window_positional_embedding_background_size':[4,4]},backbone_channel_list=[128,64,32,16],"
        "backbone_feature_sizes=[[16,16],[8,8],[4,4]],fpn_hidden_size=32)"
    ),
    "vit_mae_encoder": _transformers(
        f"ViTMAEModel({_VIT},mask_ratio=0.0)", *_image(), InputSpec((16,)), names=("pixel_values", "noise")
    ),
    "videomae": _transformers(
        f"VideoMAEModel({_VIT.replace('image_size=64', 'image_size=32')},num_frames=4)", InputSpec((4, 3, 32, 32))
    ),
    # classes of pixels, depth, pose, restoration
    "segformer": _transformers(
        "SegformerForSemanticSegmentation(hidden_sizes=[16,32,48,64],depths=[1,1,1,1],num_attention_heads=[1,2,3,4],"
        "mlp_ratios=[2,2,2,2],decoder_hidden_size=32,num_labels=5)"
    ),
    "glpn": _transformers(
        "GLPNForDepthEstimation(hidden_sizes=[16,32,40,64],depths=[1,1,1,1],num_attention_heads=[1,2,5,8],"
        "mlp_ratios=[2,2,2,2],decoder_hidden_size=16)"
    ),
    "vitpose": _transformers(
        "VitPoseForPoseEstimation(backbone_config={'model_type':'vitpose_backbone','image_size':[64,48],"
        "'patch_size':[16,16],'hidden_size':32,'num_hidden_layers':3,'num_attention_heads':4,'mlp_ratio':2,"
        "'out_indices':[3]},num_labels=17)",
        InputSpec((3, 64, 48)),
    ),
    "depth_anything": _transformers(
        f"DepthAnythingForDepthEstimation(backbone_config={{'model_type':'dinov2',{_DINOV2},'out_indices':[1,2,3,4],"
        "'reshape_hidden_states':False,'apply_layernorm':True},reassemble_hidden_size=32,neck_hidden_sizes=[8,16,24,32],"
        "fusion_hidden_size=16,head_hidden_size=8)",
        *_image(56),
    ),
    "dpt": _transformers(
        f"DPTForDepthEstimation({_VIT.replace('layers=3', 'layers=4')},backbone_out_indices=[0,1,2,3],"
        "neck_hidden_sizes=[8,16,24,32],fusion_hidden_size=16,initializer_range=0.2)"  # 0.02: every image the same
    ),
    "beit_segmentation": _transformers(
        f"BeitForSemanticSegmentation({_VIT.replace('layers=3', 'layers=4')},out_indices=[1,2,3,4],pool_scales=[1,2],"
        "auxiliary_channels=16,num_labels=5)"
    ),
    "upernet": _transformers(
        "UperNetForSemanticSegmentation(backbone_config={'model_type':'convnext','hidden_sizes':[16,24,32,48],"
        f"'depths':[1,1,1,1],{_STAGES}}},hidden_size=32,pool_scales=[1,2],auxiliary_in_channels=32,"
        "auxiliary_channels=16,num_labels=5)"
    ),
    "swin2sr": _transformers(
        "Swin2SRForImageSuperResolution(image_size=32,embed_dim=24,depths=[2,2],num_heads=[2,2],window_size=4,upscale=2)",
        *_image(32),
    ),
    # boxes and masks
    "yolos": _transformers(
        f"YolosForObjectDetection({_VIT.replace('image_size=64', 'image_size=[64,64]')},num_detection_tokens=5,"
        "num_labels=5)"
    ),
    "detr": _transformers(f"DetrForObjectDetection({_DETR})", *_image(96)),
    "conditional_detr": _transformers(f"ConditionalDetrForObjectDetection({_DETR})", *_image(96)),
    "rt_detr": _transformers(
        f"RTDetrForObjectDetection(backbone_config={{'model_type':'rt_detr_resnet',{_RESNET},"
        f"'out_features':['stage2','stage3','stage4']}},{_RT_DETR})",
        *_image(96),
    ),
    "maskformer": _transformers(
        f"MaskFormerForInstanceSegmentation(backbone_config={_SWIN},decoder_config={{'model_type':'detr','d_model':32,"
        "'encoder_layers':1,'decoder_layers':2,'decoder_ffn_dim':64,'decoder_attention_heads':4,'num_queries':10},"
        "fpn_feature_size=32,mask_feature_size=32,num_labels=5)"
    ),
    "mask2former": _transformers(
        f"Mask2FormerForUniversalSegmentation(backbone_config={_SWIN},feature_size=32,mask_feature_size=32,"
        "hidden_dim=32,encoder_feedforward_dim=64,encoder_layers=1,decoder_layers=3,num_attention_heads=4,"
        "dim_feedforward=64,num_queries=10,num_labels=5)"
    ),
    # torchvision
    "swin3d": Network("torchvision", _small_swin3d, (_CLIP,)),
    "mvit": Network("torchvision", _small_mvit, (_CLIP,)),
    "lraspp_mobilenet_v3": _torchvision("lraspp_mobilenet_v3_large(num_classes=5)"),
    "ssdlite": _torchvision("ssdlite320_mobilenet_v3_large(num_classes=5)", *_image(96)),
    # segmentation-models-pytorch
    "smp_unet": _smp("Unet", decoder_channels=(64, 48, 32, 24, 16)),
    "smp_unetplusplus": _smp("UnetPlusPlus", decoder_channels=(64, 48, 32, 24, 16)),
    "smp_fpn": _smp("FPN", decoder_pyramid_channels=64, decoder_segmentation_channels=32),
    "smp_linknet": _smp("Linknet", "mobilenet_v2"),
    "smp_pspnet": _smp("PSPNet", psp_out_channels=64),
    "smp_manet": _smp("MAnet", decoder_channels=(64, 48, 32, 24, 16)),
    "smp_pan": _smp("PAN", pixels=128, decoder_channels=16),  # which pools to an eighth of what is a 32nd
    "smp_deeplabv3plus": _smp("DeepLabV3Plus", "mobilenet_v2", decoder_channels=64),
    "smp_segformer": _smp("Segformer", decoder_segmentation_channels=64),
    "smp_upernet": _smp("UPerNet", decoder_channels=64),
    "smp_unet_resnet18": _smp("Unet", "resnet18", decoder_channels=(64, 48, 32, 24, 16)),
    # ultralytics
    "yolov8n": _ultralytics("yolov8n"),
    "yolo11n": _ultralytics("yolo11n"),
    "yolo26n": _ultralytics("yolo26n"),
    "yolov8n_pose": _ultralytics("yolov8n-pose"),
    "yolo11n_seg": _ultralytics("yolo11n-seg"),
    "yolo11n_obb": _ultralytics("yolo11n-obb"),
    "yolo26n_seg": _ultralytics("yolo26n-seg"),
    # the larger ones
    "deeplabv3_mobilenet_v3": _torchvision("deeplabv3_mobilenet_v3_large(num_classes=5)"),
    "raft": Network("torchvision", _small_raft, (*_image(128), *_image(128))),
    "retinanet": _detector("RetinaNet"),
    "fcos": _detector("FCOS"),
    "fasterrcnn": _detector("FasterRCNN"),
    "maskrcnn": _detector("MaskRCNN"),
    "keypointrcnn": _detector("KeypointRCNN"),
    "r3d_18": _torchvision("r3d_18(num_classes=5)", _CLIP),
    "mc3_18": _torchvision("mc3_18(num_classes=5)", _CLIP),
    "fasterrcnn_mobilenet_v3": _torchvision("fasterrcnn_mobilenet_v3_large_320_fpn(num_classes=5)", *_image(96)),
    "fcn_resnet50": _torchvision("fcn_resnet50(num_classes=5)"),
    "rtdetr_ultralytics": _ultralytics("rtdetr-l", 96),
    "ssd300_vgg16": _torchvision("ssd300_vgg16(num_classes=5)", *_image(300)),
}


def names() -> list[str]:
    """Those whose library is installed, as `--models` takes them."""
    return [
        PREFIX + name
        for name, network in NETWORKS.items()
        if not network.package or importlib.util.find_spec(network.package) is not None
    ]


def job(name: str, folder: Path, log: Any, options: Any) -> Iterator[None]:
    """The default command without labels, what repair gained, and the planted changes; yields after each stage."""
    from zoo import disturb  # which asks for this module's names

    network = NETWORKS[name.removeprefix(PREFIX)]
    log.found["library"] = network.library
    with log.stage("build"):
        torch.manual_seed(0)
        module = network.build().float().eval()
        inputs = samples(network.inputs)
        disturb(module, inputs)
    yield
    with log.stage("job"):
        data = dict(zip(network.names, as_tuple(inputs), strict=True)) if network.names else inputs
        run = _compressed(module, data, folder / "run", log)
        log.found |= _facts(run)
    yield
    log.found["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with log.stage("planted"):
        log.found |= _planted(run, module, cut(inputs, 0, 4))
        for check in ("identity_catches", "parity_catches"):
            if not log.found[check]:
                raise AssertionError(f"{check} is false: {log.found['planted']}")
    yield


def samples(specs: tuple[InputSpec, ...], count: int = SAMPLES, seed: int = 1) -> Inputs:
    """Blocks of one value with noise on them, so that samples differ in what a network sees of them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = tuple(_blocks(spec, count, generator) for spec in specs)
    return tensors[0] if len(tensors) == 1 else tensors


def _blocks(spec: InputSpec, count: int, generator: torch.Generator) -> Tensor:
    blocks = torch.randn(
        count, *(max(1, side // 8) if side >= 16 else side for side in spec.shape), generator=generator
    )
    for axis, side in enumerate(spec.shape, 1):
        blocks = blocks.index_select(axis, torch.arange(side) * blocks.shape[axis] // side)
    values = blocks + 0.3 * torch.randn(count, *spec.shape, generator=generator)
    if spec.dtype == "uint8":
        return (128 + 50 * values).clamp(0, 255).to(torch.uint8)
    return values


def _compressed(module: nn.Module, data: object, folder: Path, log: Any) -> Run:
    """At half the MACs, or at what the network's structure lets go, whatever random weights lose by that."""
    begun = time.perf_counter()

    def notify(stage: str, share: float) -> None:
        if log.found.get("at") != stage:
            log.found["at"] = stage
            log.write()

    options: dict[str, Any] = {**RECIPE, "out": str(folder), "notify": notify, "budget": "macs 0.5"}
    notes: list[str] = log.found.setdefault("notes", [])
    while True:
        try:
            run = compressor.compress(module, data, **options)
            break
        except BudgetError as refusal:  # again, where scores show that a group can't go
            reachable = re.findall(_LEAST_SHARE, str(refusal))
            if len(reachable) < 2 or reachable[-1] == reachable[0]:
                raise
            notes.append(f"macs {reachable[0]} is out of reach, {reachable[-1]} taken")
            options["budget"] = f"macs {reachable[-1]}"
        except GateError as refusal:  # no limit allows a fidelity below zero
            if "quality" in options or not str(refusal).startswith("gate 'quality"):
                raise
            notes.append(str(refusal).partition(";")[0])
            options["quality"] = _ungraded
    log.found["job_s"] = round(time.perf_counter() - begun, 1)
    return run


def _ungraded(predict: Callable[[Inputs], dict[str, Tensor]], data: Iterable[tuple[Inputs, Tensor]]) -> float:
    """1 for every network that answers with numbers."""
    answers = [leaf for inputs, _ in data for leaf in predict(inputs).values()]
    return float(all(bool(leaf.isfinite().all()) for leaf in answers))


def _facts(run: Run) -> dict[str, Any]:
    """What the summary says, of which a row is made."""
    from compressor.files import read_record

    summary = run.summary
    groups = read_record(run.folder / "groups.json", Groups)
    return {
        "task": summary["task"],
        "metric": summary["metric"],
        "fidelity": {name: summary[f"accuracy_{name}"] for name in ("removed", "repaired")},
        "fidelity_shipped": summary["fidelity_shipped"],
        "macs_kept": round(summary["macs_shipped"] / summary["macs_dense"], 4),
        "groups": len(groups.groups),
        "left_alone": len(groups.left_alone),
        "blocked_by": sorted({f"{x.operation}: {x.reason}" for x in groups.left_alone})[:8],
        "gates": summary["gates"],
        "warnings": summary["warnings"],
        "stages": {name: stage["seconds"] for name, stage in summary.get("stages", {}).items()},
    }


def _planted(run: Run, module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Whether both checks hold for the networks as they are, and fail for one changed weight behind each output."""
    network = read_network(run.folder)
    dense = trace(module, network.example, network.keywords)
    structure = analyse(dense, network.tied, network.frozen)
    removed, _ = prune(dense, structure, network.kept)
    shipped = load_graph(run.folder, module)
    identity = _identity(dense, structure, network.kept, cut(inputs, 0, 2))
    parity = _parity(run.folder / SHIPPED_FILE, inputs)

    def plant(weight: str) -> dict[str, Any]:
        figures = {"identity": identity(changed(removed, weight)), "parity": parity(changed(shipped, weight))}
        return {"weight": weight, **figures}

    facts = {
        "inputs": list(input_names(dense)),
        "outputs": list(output_names(dense)),
        "identity": identity(removed),
        "parity": parity(shipped),
    }
    planted = {}
    for leaf, weights in list(weights_behind(shipped).items())[:MOST_PLANTS]:
        # a layer may add less to its output than a gate allows; then the one before it is changed
        for weight in weights[:MOST_WEIGHTS]:
            planted[leaf] = plant(weight)
            if planted[leaf]["identity"] > IDENTITY_LIMIT and planted[leaf]["parity"] > 1:
                break
    return {
        **facts,
        "planted": planted,
        "identity_catches": facts["identity"] <= IDENTITY_LIMIT and _caught(planted, "identity", IDENTITY_LIMIT),
        "parity_catches": facts["parity"] <= 1 and _caught(planted, "parity", 1.0),
    }


def _caught(planted: dict[str, dict[str, Any]], check: str, limit: float) -> bool:
    return bool(planted) and all(row[check] > limit for row in planted.values())


def _identity(
    dense: fx.GraphModule, structure: Structure, kept: dict[str, IntArray], inputs: Inputs
) -> Callable[[fx.GraphModule], float]:
    return lambda pruned: identity_error(dense, pruned, structure, kept, inputs)


def _parity(file: Path, inputs: Inputs) -> Callable[[fx.GraphModule], float]:
    """Largest difference to the file as a share of the gate's limit; infinite where another of its limits fails."""
    from compressor.delivery.gates import limits_of

    arrays = feeds_of(inputs)
    limits = limits_of("fp32", PARITY_LIMIT)

    def of(reference: fx.GraphModule) -> float:
        parities = measure_export(file, reference, arrays, batches=(1, 3)).values()
        worst = max(p.max_abs / max(p.reference_max_abs, 1e-30) for p in parities) / PARITY_LIMIT
        return worst if worst > 1 or not any(failures(p, limits) for p in parities) else float("inf")

    return of


def feeds_of(inputs: Inputs) -> feeds.Arrays:
    arrays = tuple(tensor.numpy() for tensor in as_tuple(inputs))
    return arrays[0] if len(arrays) == 1 else arrays


def changed(graph: fx.GraphModule, weight: str) -> fx.GraphModule:
    """A copy with that weight changed by `PLANTED` of its spread."""
    other = copy.deepcopy(graph)
    tensor = fetch(other, weight)
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        tensor.add_(PLANTED * tensor.std() * noise)
    return other


def weights_behind(graph: fx.GraphModule) -> dict[str, list[str]]:
    """For each output by its name the weights of the layers behind it, nearest first.

    Outputs without any are left out, and those behind the same layer as another.
    """
    weights: dict[str, list[str]] = {}
    for name, node in zip(output_names(graph), output_nodes(graph), strict=True):
        nearest = list(islice(_weights_before(graph, node), MOST_WEIGHTS))
        if nearest and nearest not in weights.values():
            weights[name] = nearest
    return weights


_LAYERS = (LINEAR, *ALL_CONVOLUTIONS, *PRODUCTS)


def _weights_before(graph: fx.GraphModule, output: fx.Node) -> Iterator[str]:
    """Breadth first against the arrows: parameters of two axes or more that a layer multiplies by."""
    waiting, seen = [output], {output}
    while waiting:
        node = waiting.pop(0)
        for source in node.all_input_nodes:
            if source in seen:
                continue
            seen.add(source)
            waiting.append(source)
            if source.op == "get_attr" and node.target in _LAYERS and fetch(graph, str(source.target)).dim() > 1:
                yield str(source.target)

"""Every torchvision classifier and a small model per timm family: relevance everywhere, or a name for what stops it."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torchvision

from compressor.graph import trace
from compressor.relevance import lrp

FAMILIES = (
    "test_vit test_convnext test_resnet test_byobnet test_efficientnet test_efficientnet_ln test_nfnet mixer_s32_224 "
    "mobilenetv3_small_050 mobilenetv4_conv_small ghostnet_050 hrnet_w18_small regnety_002 repvgg_a0 rexnet_100 "
    "semnasnet_075 tinynet_e levit_128s pit_ti_224 poolformer_s12 cait_xxs24_224 crossvit_tiny_240 coat_lite_tiny "
    "convit_tiny deit_tiny_patch16_224 edgenext_xx_small efficientformer_l1 eva02_tiny_patch14_224 fastvit_t8 "
    "gcvit_xxtiny hardcorenas_a inception_next_atto lcnet_050 mobilevit_xxs mobilevitv2_050 mvitv2_tiny nest_tiny "
    "pvt_v2_b0 res2net50_14w_8s resnest14d selecsls42 skresnet18 swinv2_cr_tiny_ns_224 tnt_s_legacy_patch16_224 "
    "twins_svt_small visformer_tiny volo_d1_224 xcit_nano_12_p16_224 cspdarknet53 darknet53 dla34 dpn48b "
    "sequencer2d_s starnet_s1 tiny_vit_5m_224 efficientvit_b0 efficientvit_m0 maxvit_rmlp_pico_rw_256 gmlp_s16_224 "
    "focalnet_tiny_srf beit_base_patch16_224 davit_tiny hgnet_small hiera_tiny_224 mobileone_s0 "
    "nextvit_small repghostnet_050 repvit_m0_9 resmlp_12_224 vgg11 vovnet39a xception41 densenet121"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_timm_family_scores_and_names_what_is_uncovered(family: str) -> None:
    if not timm.is_model(family):
        pytest.skip(f"this timm has no {family!r}")
    torch.manual_seed(0)
    model = timm.create_model(family).eval()
    size = model.default_cfg["input_size"]
    graph = trace(model, torch.randn(2, *size))
    missing = lrp.uncovered(graph)
    if missing:
        with pytest.raises(lrp.UncoveredError, match=re.escape(missing[0])):
            lrp.prepare(graph, lrp.LrpOptions(strict=True))
    prepared = lrp.prepare(graph)
    nodes = [n.name for n in prepared.canon.weighted]
    totals = prepared(torch.randn(2, *size), torch.tensor([0, 1]), nodes, take=lambda _, r: r.abs().sum())
    assert set(totals) == set(nodes)
    assert all(bool(total.isfinite()) for total in totals.values())
    assert any(float(total) > 0 for total in totals.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_torchvision_classifier_scores(name: str) -> None:
    torch.manual_seed(0)
    unusual = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=7, **unusual).eval()
    size = 299 if name == "inception_v3" else 224
    graph = trace(model, torch.randn(2, 3, size, size))
    assert lrp.uncovered(graph) == ()
    prepared = lrp.prepare(graph)
    nodes = [n.name for n in prepared.canon.weighted]
    totals = prepared(torch.randn(2, 3, size, size), torch.tensor([0, 1]), nodes, take=lambda _, r: r.abs().sum())
    assert set(totals) == set(nodes)
    assert all(bool(total.isfinite()) for total in totals.values())

"""A time instead of a share, such as two thirds of what an image takes here as it is: `milliseconds.py [OUT]`."""

import sys

import torch
from torch import nn

import compressor

torch.manual_seed(0)
body = [nn.Conv2d(3, 96, 3, padding=1), nn.ReLU(), nn.Conv2d(96, 96, 3, padding=1), nn.ReLU()]
model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 4)).eval()  # yours, trained
images = torch.randn(40, 3, 48, 48)  # yours, without labels

out = sys.argv[1] if len(sys.argv) > 1 else "runs/milliseconds"
quick = {"targets": (), "latency_seconds": 0.5, "calibration": 20, "finetune_epochs": 0, "max_accuracy_loss": 100.0}
as_it_is = compressor.compress(model, images, budget="none", precisions="fp32", out=f"{out}-as-it-is", **quick)
now = as_it_is.summary["latency_ms"]["onnxruntime"]["1"]["shipped"]["p50"]

run = compressor.compress(model, images, budget=f"latency {0.66 * now:.3f} ms on onnxruntime", out=out, **quick)
then = run.summary["latency_ms"]["onnxruntime"]["1"]["shipped"]["p50"]
print(f"{now:.2f} ms as it is, {then:.2f} ms shipped, {run.folder / 'bundle'}")

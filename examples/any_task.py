"""A network that labels pixels, no labels, and a measure of your own: `any_task.py [OUT]`."""

import sys

import torch
from torch import nn

import compressor

torch.manual_seed(0)
body = [nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()]
model = nn.Sequential(*body, nn.Conv2d(24, 5, 1)).eval()  # yours, trained
images = torch.randn(48, 3, 16, 16)  # yours, as the model takes them; masks would go in as (images, masks)


def same_pixels(predict, data):
    """The share of pixels that get the class they get now; predict is PyTorch, a file or the device."""
    shares = [(predict(x)["output"].argmax(1) == model(x).argmax(1)).float().mean() for x, _ in data]
    return sum(shares) / len(shares)


quick = {"finetune_epochs": 0, "targets": (), "latency_seconds": 0.1, "max_accuracy_loss": 100.0, "multiple": 1}
out = sys.argv[1] if len(sys.argv) > 1 else "runs/any-task"
run = compressor.compress(model, images, quality=same_pixels, budget="macs 0.6", out=out, calibration=24, **quick)
print(f"same_pixels {run.summary['accuracy_shipped']:.1%} with {run.summary['macs_kept']:.0%} of the MACs")

"""Nothing removed: a network exported, quantised, checked, timed and bundled as it is: `as_it_is.py [OUT]`."""

import sys

import torch
from torch import nn

import compressor

torch.manual_seed(0)
body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()  # yours, trained
images = torch.randn(40, 3, 16, 16)  # yours, without labels

out = sys.argv[1] if len(sys.argv) > 1 else "runs/as-it-is"
quick = {"targets": (), "latency_seconds": 0.1, "calibration": 20, "max_int8_loss": 100.0}
run = compressor.compress(model, images, budget="none", precisions="fp32,int8", out=out, **quick)
print("bundle:", sorted(path.name for path in (run.folder / "bundle").iterdir()))

"""Two budgets, a run each, and one page with the curve: `sweep.py [OUT]`."""

import sys

import torch
from torch import nn

import compressor

torch.manual_seed(0)
body = [nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4)).eval()  # yours, trained
images = torch.randn(40, 3, 32, 32)  # yours, without labels

out = sys.argv[1] if len(sys.argv) > 1 else "runs/sweep"
quick = {"targets": (), "latency_seconds": 0.1, "calibration": 20, "finetune_epochs": 0, "max_accuracy_loss": 100.0}
sweep = compressor.compress(model, images, budget="macs 0.7,0.5", out=out, **quick)
for run in sweep.runs:
    print(f"{run.recipe.budget}: {run.summary['macs_kept']:.0%} of the MACs, {run.folder / 'bundle'}")
print("page:", sweep.folder / "sweep.html")

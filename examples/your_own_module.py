"""A module of yours and arrays in memory: no name, no files."""

import sys

import numpy as np
from torch import nn

import compressor

layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))  # train it first

labels = np.arange(80) % 4
images = np.random.default_rng(0).integers(0, 60, (80, 16, 16, 3)) + 60 * labels[:, None, None, None]

settings = {"size": (16,), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "calibration": 40}
quick = {"finetune_epochs": 0, "targets": (), "latency_seconds": 0.1, "max_accuracy_loss": 100.0}
out = sys.argv[1] if len(sys.argv) > 1 else "runs/example"
run = compressor.compress(model, (images.astype(np.uint8), labels), budget="macs 0.5", out=out, **settings, **quick)
print(run.module(model))  # the same class, with fewer channels

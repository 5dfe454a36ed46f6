"""A module in memory to a smaller module in memory: no folder, no files, in steps of your own."""

import torch
from torch import nn

from compressor import Budget, make_prunable, pruning_round

torch.manual_seed(0)
body = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU()]
model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).eval()  # yours, trained
images = torch.randn(64, 3, 16, 16)  # yours, as the model takes them
labels = model(images).argmax(1)

batches = list(zip(images.split(16), labels.split(16), strict=True))
dense = make_prunable(model, images[:4])
for group in dense.structure.groups.groups:
    print(f"{group.size} units of {group.sites[0].layer} can go")

step = pruning_round(dense, dense, Budget("macs", 0.5), batches, images=images[:4])
small = step.after.network  # a torch.fx.GraphModule, called like the model
share = step.plan.macs_kept / step.plan.macs_dense
error = (small(images) - model(images)).square().sum() / model(images).square().sum()
print(f"{share:.0%} of the MACs stay; squared error of the outputs: {error:.4f}")

"""Compresses a model, trains what is left in a plain PyTorch loop, and ships it: `ship_after_training.py [RUN]`."""

import sys

import torch

import compressor
from compressor.inputs.images import batches, overridden
from compressor.inputs.models import load_model
from compressor.inputs.sources import load_images

out = sys.argv[1] if len(sys.argv) > 1 else "runs/digits-untuned"
run = compressor.compress("digits-resnet", finetune_epochs=0, out=out)
images = load_images("digits:training").prepared(overridden(load_model("digits-resnet").preprocessing))
network = run.network().train()
optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
for pixels, labels in batches(images, 64):
    optimiser.zero_grad()
    torch.nn.functional.cross_entropy(network(pixels), labels).backward()
    optimiser.step()

shipped = run.ship(network.eval())
print(f"top-1: dense {run.summary['accuracy_dense']:.2%}, before {run.summary['accuracy_shipped']:.2%}")
print(f"trained {shipped.summary['accuracy_trained']:.2%}, in {shipped.folder / 'bundle'}")

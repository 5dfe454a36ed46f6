"""Trains a finished run's network further in a loop of your own: `train_afterwards.py RUN`."""

import sys

import torch

import compressor
from compressor.inputs.images import batches, overridden
from compressor.inputs.models import load_model
from compressor.inputs.sources import load_images

if len(sys.argv) != 2:
    sys.exit("expected the folder of a finished run: train_afterwards.py runs/digits-resnet")
network = compressor.load(sys.argv[1])
images = load_images("digits:training").prepared(overridden(load_model("digits-resnet").preprocessing))
optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

network.train()  # batch statistics and dropout are there again
for step, (pixels, labels) in enumerate(batches(images, 64)):
    loss = torch.nn.functional.cross_entropy(network(pixels), labels)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    print(f"step {step}: loss {loss.item():.4f}")
network.eval()

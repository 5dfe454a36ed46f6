"""The units a model can lose, and what is left alone with the reason: `what_can_go.py [torchvision:NAME]`."""

import sys

from compressor.inspecting import inspect
from compressor.recipe import read_recipe

name = sys.argv[1] if len(sys.argv) > 1 else "digits-vit"
found = inspect(read_recipe(None, model=name, weights="none" if ":" in name else ""))
for group in found.groups.groups:
    print(f"{group.size:5} {group.kind:10} {group.sites[0].layer}")
for layer in found.groups.left_alone:
    print(f"left alone: {layer.layer}, {layer.operation}: {layer.reason}")
print(f"size of images: {found.image_size}")

"""A bundle's answers with numpy and one runtime, no torch: `run_on_a_device.py BUNDLE IMAGES`."""

import sys
from pathlib import Path

from compressor.device.bundle import open_bundle
from compressor.device.images import load_inputs, top_classes

if len(sys.argv) != 3:
    sys.exit("expected a run's bundle and images: run_on_a_device.py runs/digits-resnet/bundle image.png")

manifest, session = open_bundle(sys.argv[1])  # refuses a bundle that is not whole
images = load_inputs(Path(sys.argv[2]), manifest.preprocessing)  # an image, a folder, or an .npy
for answer in session.run(images):
    print(top_classes(answer, manifest.labels, count=1))

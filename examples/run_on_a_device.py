"""A bundle's answers with numpy and one runtime, no torch: `run_on_a_device.py BUNDLE IMAGES`."""

import sys

from compressor import device

if len(sys.argv) != 3:
    sys.exit("expected a run's bundle and images: run_on_a_device.py runs/digits-resnet/bundle image.png")

model = device.load(sys.argv[1])  # refuses a bundle that is not whole
print(model.choice)  # which file runs on which runtime here, as it was measured
for answer in model(sys.argv[2], top=1):  # an image, or an .npy of several
    print(answer.classes)

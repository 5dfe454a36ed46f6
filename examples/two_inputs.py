"""An image and a depth map in, a dict of two answers out, data in a DataLoader: `two_inputs.py OUT`."""

import sys

from torch import cat, nn, randn
from torch.utils.data import DataLoader, TensorDataset

import compressor


class Grasp(nn.Module):
    def __init__(self):
        super().__init__()
        self.rgb, self.range = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(1, 16, 3, padding=1)
        self.mix, self.angle, self.score = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 2), nn.Conv2d(32, 1, 1)

    def forward(self, image, depth):
        x = self.mix(cat([self.rgb(image), self.range(depth)], 1).relu()).relu()
        return {"angle": self.angle(x.mean((2, 3))), "score": self.score(x)}


loader = DataLoader(TensorDataset(randn(48, 3, 12, 12), randn(48, 1, 12, 12)), batch_size=16)
quick = {"finetune_epochs": 0, "targets": (), "latency_seconds": 0.1, "max_accuracy_loss": 100.0, "multiple": 1}
run = compressor.compress(Grasp().eval(), loader, budget="macs 0.6", out=sys.argv[1], calibration=24, **quick)
print([list(leaf.shape) for leaf in run.network()(*next(iter(loader)))])

"""Small networks beyond classification, written here: each does what the networks of its task do, and no more.

Restoration, dense answers, several inputs or outputs, recurrence, inputs that are no RGB image. Weights are random.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def layers(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def trunk(channels: int = 3, width: int = 16) -> nn.Sequential:
    """[N, channels, H, W] to [N, 4 * width, H / 8, W / 8]."""
    return nn.Sequential(layers(channels, width, 2), layers(width, 2 * width, 2), layers(2 * width, 4 * width, 2))


class UNet(nn.Module):
    """Classes of pixels [N, classes, H, W]: what goes down is concatenated on the way up."""

    def __init__(self, classes: int = 5, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = layers(3, width), layers(width, 2 * width, 2)
        self.third = layers(2 * width, 4 * width, 2)
        self.up_second = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up_first = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.merged_second, self.merged_first = layers(4 * width, 2 * width), layers(2 * width, width)
        self.classes = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        second = self.second(first)
        merged = self.merged_second(torch.cat([self.up_second(self.third(second)), second], 1))
        classes: Tensor = self.classes(self.merged_first(torch.cat([self.up_first(merged), first], 1)))
        return classes


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + 0.5 * self.body(x)
        return result


class EDSR(nn.Module):
    """Twice the resolution: residual blocks without norms, pixel shuffle."""

    def __init__(self, width: int = 24, blocks: int = 3) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, 1, 1)
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)), nn.Conv2d(width, width, 3, 1, 1))
        self.tail = nn.Sequential(
            nn.Conv2d(width, 4 * width, 3, 1, 1), nn.PixelShuffle(2), nn.Conv2d(width, 3, 3, 1, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.head(images)
        larger: Tensor = self.tail(x + self.body(x))
        return larger


class WindowBlock(nn.Module):
    """Attention within windows of `side` pixels, and a small MLP; tokens [N, H, W, C]."""

    def __init__(self, width: int, heads: int = 4, side: int = 8) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        s = self.side
        windows = self.norm(x).reshape(n, h // s, s, w // s, s, c).transpose(2, 3).reshape(-1, s * s, c)
        q, k, v = self.qkv(windows).reshape(-1, s * s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, s * s, c)
        mixed = self.out(mixed).reshape(n, h // s, w // s, s, s, c).transpose(2, 3).reshape(n, h, w, c)
        x = x + mixed
        result: Tensor = x + self.mlp(self.mlp_norm(x))
        return result


class WindowSR(nn.Module):
    """Twice the resolution by attention within windows, as Swin's restoration networks."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, 1, 1)
        self.blocks = nn.Sequential(WindowBlock(width), WindowBlock(width))
        self.tail = nn.Sequential(nn.Conv2d(width, 12, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.head(images)
        x = x + self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        larger: Tensor = self.tail(x)
        return larger


class StyleNet(nn.Module):
    """An image for an image: reflected borders, instance norms, upsampling."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.Sequential(
            *(nn.ReflectionPad2d(2), nn.Conv2d(3, width, 5), nn.InstanceNorm2d(width, affine=True), nn.ReLU()),
            *(nn.ReflectionPad2d(1), nn.Conv2d(width, 2 * width, 3, 2), nn.InstanceNorm2d(2 * width, affine=True)),
            *(nn.ReLU(), ResidualBlock(2 * width)),
        )
        self.up = nn.Sequential(
            *(nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.Conv2d(2 * width, width, 3)),
            *(nn.InstanceNorm2d(width, affine=True), nn.ReLU(), nn.ReflectionPad2d(2), nn.Conv2d(width, 3, 5)),
        )

    def forward(self, images: Tensor) -> Tensor:
        styled: Tensor = self.up(self.down(images))
        return styled


class DepthNet(nn.Module):
    """A positive number a pixel, [N, 1, H, W]: bilinear upsampling with skips."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.second = layers(3, width, 2), layers(width, 2 * width, 2)
        self.third = layers(2 * width, 4 * width, 2)
        self.up_second, self.up_first = layers(4 * width, 2 * width), layers(2 * width, width)
        self.depth = nn.Conv2d(width, 1, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        second = self.second(first)
        x = self._larger(self.up_second(self.third(second))) + second
        x = self._larger(self.up_first(x)) + first
        return functional.softplus(self._larger(self.depth(x)))

    def _larger(self, x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class SoftArgmaxPose(nn.Module):
    """Where each of 17 points lies, [N, 17, 2]: the mean place under a softmax over the map."""

    def __init__(self, points: int = 17, side: int = 8) -> None:
        super().__init__()
        self.trunk, self.maps = trunk(), nn.Conv2d(64, points, 1)
        self.register_buffer("places", torch.linspace(-1, 1, side))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(self.trunk(images))  # [N, points, h, w]
        share = maps.flatten(2).softmax(-1).view_as(maps)
        return torch.stack([(share.sum(2) * self.places).sum(-1), (share.sum(3) * self.places).sum(-1)], -1)


class FaceEmbedding(nn.Module):
    """Directions [N, 64]: PReLU, batch norms behind, length 1."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.PReLU(16)),
            *(nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.PReLU(32)),
            *(nn.Conv2d(32, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)),
        )
        self.direction = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, size), nn.BatchNorm1d(size)
        )

    def forward(self, faces: Tensor) -> Tensor:
        return functional.normalize(self.direction(self.body(faces)))


class CRNN(nn.Module):
    """Text: columns of a line's image through a bidirectional LSTM to logits for CTC, [N, T, characters]."""

    def __init__(self, characters: int = 38) -> None:
        super().__init__()
        self.columns = nn.Sequential(
            *(layers(1, 16), nn.MaxPool2d(2), layers(16, 32), nn.MaxPool2d(2), layers(32, 64)),
            *(nn.MaxPool2d((2, 1)), layers(64, 64), nn.AdaptiveAvgPool2d((1, None))),
        )
        self.rnn = nn.LSTM(64, 32, num_layers=2, bidirectional=True, batch_first=True)
        self.characters = nn.Linear(64, characters)

    def forward(self, lines: Tensor) -> Tensor:
        columns = self.columns(lines).squeeze(2).permute(0, 2, 1)  # [N, T, 64]
        characters: Tensor = self.characters(self.rnn(columns)[0])
        return characters


class FramesGRU(nn.Module):
    """Each frame of a clip [N, T, 3, H, W] to features, a GRU over them, one answer for each frame [N, T, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.rnn, self.answer = trunk(), nn.GRU(64, 32, batch_first=True), nn.Linear(32, 4)

    def forward(self, frames: Tensor) -> Tensor:
        n, t = frames.shape[:2]
        features = self.trunk(frames.flatten(0, 1)).mean((2, 3)).reshape(n, t, -1)
        answers: Tensor = self.answer(self.rnn(features)[0])
        return answers


class MultiHead(nn.Module):
    """Three tasks on one trunk: classes of the image, a box, classes of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()
        self.classes, self.box = nn.Linear(64, 7), nn.Linear(64, 4)
        self.pixels = nn.Conv2d(64, 5, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.trunk(images)
        pooled = features.mean((2, 3))
        return {"classes": self.classes(pooled), "box": self.box(pooled).sigmoid(), "pixels": self.pixels(features)}


class MultiLabel(nn.Module):
    """Probabilities of labels that don't exclude each other."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.labels = trunk(), nn.Linear(64, 12)

    def forward(self, images: Tensor) -> Tensor:
        return self.labels(self.trunk(images).mean((2, 3))).sigmoid()


class Siamese(nn.Module):
    """How alike two images are, and both embeddings: one trunk twice."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.features = trunk(), nn.Linear(64, 32)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        a, b = (self.features(self.trunk(images).mean((2, 3))) for images in (left, right))
        return {"likeness": functional.cosine_similarity(a, b), "left": a, "right": b}


class ColourAndDepth(nn.Module):
    """Classes of pixels from an RGB image and a depth map, joined half way."""

    def __init__(self) -> None:
        super().__init__()
        self.colour, self.depth = trunk(3), trunk(1)
        self.classes = nn.Sequential(layers(128, 32), nn.Conv2d(32, 5, 1))

    def forward(self, rgb: Tensor, depth: Tensor) -> Tensor:
        classes: Tensor = self.classes(torch.cat([self.colour(rgb), self.depth(depth)], 1))
        return functional.interpolate(classes, scale_factor=8, mode="bilinear", align_corners=False)


class ImageAndVector(nn.Module):
    """What to do, [N, 2], from what a camera and nine other instruments say."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = trunk()
        self.instruments = nn.Sequential(nn.Linear(9, 32), nn.ReLU())
        self.action = nn.Sequential(nn.Linear(96, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, image: Tensor, instruments: Tensor) -> Tensor:
        joined = torch.cat([self.trunk(image).mean((2, 3)), self.instruments(instruments)], 1)
        action: Tensor = self.action(joined)
        return action


class Signal(nn.Module):
    """A value a moment, [N, 1, T / 4], from 12 leads [N, 12, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv1d(12, 32, 7, 2, 3), nn.BatchNorm1d(32), nn.ReLU()),
            *(nn.Conv1d(32, 48, 5, 2, 2), nn.BatchNorm1d(48), nn.ReLU(), nn.Conv1d(48, 48, 3, 1, 1), nn.ReLU()),
            nn.Conv1d(48, 1, 1),
        )

    def forward(self, leads: Tensor) -> Tensor:
        values: Tensor = self.body(leads)
        return values


class Spectrogram(nn.Module):
    """Tags of sounds from a spectrogram [N, 1, bands, T], probabilities a moment [N, T / 8, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.tags = trunk(1), nn.Linear(64, 6)

    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.tags(self.trunk(spectrogram).mean(2).transpose(1, 2)).sigmoid()


class Bands(nn.Module):
    """Cover of land from 8 bands of a satellite, [N, 4, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            trunk(8), nn.ConvTranspose2d(64, 32, 4, 4), nn.ReLU(), nn.ConvTranspose2d(32, 4, 2, 2)
        )

    def forward(self, bands: Tensor) -> Tensor:
        cover: Tensor = self.body(bands)
        return cover


class ChannelsLast(nn.Module):
    """Images [N, H, W, 3] in, features [N, h, w, 16] out."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.features = trunk(), nn.Linear(64, 16)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.features(self.trunk(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return features


class Pixels(nn.Module):
    """uint8 images in, normalised inside; a box out."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.box = trunk(), nn.Linear(64, 4)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        images = (pixels.float() / 255 - self.mean) / 0.25
        box: Tensor = self.box(self.trunk(images).mean((2, 3)))
        return box


class SpatialTransformer(nn.Module):
    """Looks where it thinks the object is: an affine map of the image, resampled, then a box."""

    def __init__(self) -> None:
        super().__init__()
        self.locate, self.place = trunk(), nn.Linear(64, 6)
        self.trunk, self.box = trunk(), nn.Linear(64, 4)
        self.register_buffer("whole", torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]))

    def forward(self, images: Tensor) -> Tensor:
        shift = 0.1 * self.place(self.locate(images).mean((2, 3))).tanh()
        grid = functional.affine_grid((self.whole + shift).view(-1, 2, 3), list(images.shape), align_corners=False)
        seen = functional.grid_sample(images, grid, align_corners=False)
        box: Tensor = self.box(self.trunk(seen).mean((2, 3)))
        return box


class AnchorFree(nn.Module):
    """Classes, boxes and how central, one of each a cell at two scales that share a head."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = trunk(3, 12), layers(48, 48, 2)
        self.tower = layers(48, 48)
        self.classes, self.boxes, self.centre = (nn.Conv2d(48, n, 3, 1, 1) for n in (5, 4, 1))

    def forward(self, images: Tensor) -> dict[str, list[Tensor]]:
        fine = self.fine(images)
        towers = [self.tower(level) for level in (fine, self.coarse(fine))]
        heads = {"classes": self.classes, "boxes": self.boxes, "centre": self.centre}
        return {name: [head(tower) for tower in towers] for name, head in heads.items()}

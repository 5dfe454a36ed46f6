"""Words and pages of them drawn with DejaVu, with what they say: labels for text networks without a data set.

A seed in, the same images out. Words are made of syllables, or are numbers; size, slant, ink, paper, blur and noise
differ from word to word. Knows no network.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

HEIGHT_PX, WIDTH_PX = 64, 224  # of a word's image, as EasyOCR's recogniser takes it
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSansMono")
ONSETS, VOWELS, CODAS = "b c d f g h k l m n p r s t v w st tr ch".split(), "aeiou", ["", "n", "r", "s", "t", "l", "m"]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of a page's channels, as CRAFT takes them
Generator = np.random.Generator
Box = tuple[int, int, int, int]  # x0 y0 x1 y1 in pixels


def make_words(count: int, seed: int) -> list[str]:
    """So many words, none twice: four of five of one to three syllables, one of three with a capital; else numbers."""
    generator = np.random.default_rng(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        words[_number(generator) if generator.random() < 0.2 else _spoken(generator)] = None
    return list(words)


def _spoken(generator: Generator) -> str:
    syllables = [
        generator.choice(ONSETS) + generator.choice(list(VOWELS)) + generator.choice(CODAS)
        for _ in range(generator.integers(1, 4))
    ]
    word = "".join(syllables)
    return word.capitalize() if generator.random() < 1 / 3 else word


def _number(generator: Generator) -> str:
    number = int(generator.integers(10, 100_000))
    return f"{number / 100:.2f}" if generator.random() < 0.3 else str(number)


@functools.cache
def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"), size_px)


def draw_word(word: str, generator: Generator) -> Image.Image:
    """Grey, of the height a recogniser takes and at most its width; letters 20 to 40 pixels high before that."""
    font = _font(str(generator.choice(FONTS)), int(generator.integers(20, 41)))
    left, top, right, bottom = font.getbbox(word)
    margin_px = int(generator.integers(4, 9))
    paper, ink = _paper_and_ink(generator)
    image = Image.new("L", (int(right - left) + 2 * margin_px, int(bottom - top) + 2 * margin_px), paper)
    ImageDraw.Draw(image).text((margin_px - left, margin_px - top), word, fill=ink, font=font)
    image = image.rotate(float(generator.uniform(-3, 3)), Image.Resampling.BICUBIC, expand=True, fillcolor=paper)
    width_px = min(WIDTH_PX, round(image.width * HEIGHT_PX / image.height))
    image = image.resize((width_px, HEIGHT_PX), Image.Resampling.BICUBIC)
    return _worn(image, generator)


def _paper_and_ink(generator: Generator) -> tuple[int, int]:
    """Greys at least 70 apart, either of them the lighter."""
    dark = int(generator.integers(0, 110))
    light = int(generator.integers(dark + 70, 256))
    return (light, dark) if generator.random() < 0.8 else (dark, light)


def _worn(image: Image.Image, generator: Generator) -> Image.Image:
    """Blurred, with noise on it."""
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(float(generator.uniform(0, 1.6)))), np.float64)
    noise = generator.normal(0.0, generator.uniform(0, 24), blurred.shape)
    return Image.fromarray((blurred + noise).clip(0, 255).astype(np.uint8))


def word_images(words: Sequence[str], seed: int) -> Tensor:
    """float32 [N, 1, height, width] of -1 to 1; what a word leaves free is its last column again."""
    generator = np.random.default_rng(seed)
    images = np.empty((len(words), HEIGHT_PX, WIDTH_PX), np.float32)
    for row, word in zip(images, words, strict=True):
        pixels = np.asarray(draw_word(word, generator), np.float32)
        row[:, : pixels.shape[1]] = pixels
        row[:, pixels.shape[1] :] = pixels[:, -1:]
    return torch.from_numpy(images)[:, None] / 127.5 - 1


def draw_page(words: Sequence[str], side_px: int, generator: Generator) -> tuple[NDArray[np.uint8], list[Box]]:
    """A square page [side, side, 3] with those of the words that find room, and their boxes."""
    paper = generator.integers(150, 256, 3)
    image = Image.new("RGB", (side_px, side_px), tuple(paper.tolist()))
    canvas, boxes = ImageDraw.Draw(image), list[Box]()
    for word in words:
        font = _font(str(generator.choice(FONTS)), int(generator.integers(14, 27)))
        left, top, right, bottom = map(int, font.getbbox(word))
        room = side_px - (right - left), side_px - (bottom - top)
        if min(room) <= 0:
            continue
        x, y = (int(generator.integers(0, space)) for space in room)
        box = (x, y, x + right - left, y + bottom - top)
        if any(_meet(box, other) for other in boxes):
            continue
        canvas.text((x - left, y - top), word, fill=tuple(generator.integers(0, 100, 3).tolist()), font=font)
        boxes.append(box)
    noise = generator.normal(0.0, generator.uniform(2, 16), (side_px, side_px, 3))
    return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8), boxes


def _meet(box: Box, other: Box, gap_px: int = 6) -> bool:
    """Whether two boxes overlap or nearly so."""
    apart = box[0] > other[2] + gap_px or other[0] > box[2] + gap_px
    return not (apart or box[1] > other[3] + gap_px or other[1] > box[3] + gap_px)


def page_images(words: Sequence[str], side_px: int, seed: int, per_page: int = 6) -> tuple[Tensor, list[list[Box]]]:
    """float32 [N, 3, side, side] as CRAFT takes them, so many words tried on each, and the boxes of those drawn."""
    generator = np.random.default_rng(seed)
    starts = range(0, len(words), per_page)
    drawn = [draw_page(words[start : start + per_page], side_px, generator) for start in starts]
    pixels = torch.from_numpy(np.stack([page for page, _ in drawn])).permute(0, 3, 1, 2)  # [N, side, side, 3] before
    scaled = (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
    return scaled, [boxes for _, boxes in drawn]


def read_greedily(classes: NDArray[np.int64], characters: str) -> list[str]:
    """[N, T] classes to words, as CTC reads: runs once, and class 0, which parts them, not at all."""
    words: list[str] = []
    for row in classes:
        first_of_run = np.append(True, row[1:] != row[:-1])
        words.append("".join(characters[index - 1] for index in row[first_of_run] if index > 0))
    return words


def edit_distance(word: str, other: str) -> int:
    """Characters to insert, remove or replace (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, character in enumerate(word, 1):
        diagonal, row[0] = row[0], i
        for j, wanted in enumerate(other, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (character != wanted))
            diagonal, row[j] = row[j], best
    return row[-1]

"""Simple pictures in many colours and shapes, to compare sets of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


def draw(count: int, seed: int, size: int = 32) -> np.ndarray:
    """Discs with eyes and boxes on white, (count, size, size, 3) uint8."""
    random = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        image = Image.new("RGB", (size, size), "white")
        pen = ImageDraw.Draw(image)
        left, top = random.integers(1, size // 4, 2)
        right, bottom = random.integers(size // 2, size - 1, 2)
        colour = tuple(random.integers(0, 230, 3).tolist())
        shape = pen.ellipse if random.random() < 0.5 else pen.rectangle
        shape((int(left), int(top), int(right), int(bottom)), fill=colour, outline="black")
        for x in random.integers(size // 4, size // 2, 2).tolist():
            pen.rectangle((x, size // 3, x + 2, size // 3 + 2), fill="black")
        pictures.append(np.asarray(image))
    return np.stack(pictures)


def blur(pictures: np.ndarray, sigma: float) -> np.ndarray:
    soft = ImageFilter.GaussianBlur(sigma)
    return np.stack([np.asarray(Image.fromarray(picture).filter(soft)) for picture in pictures])


def save_folder(folder: Path, pictures: np.ndarray) -> Path:
    folder.mkdir()
    for index, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"{index:05}.png")
    return folder


def save_npz(path: Path, pictures: np.ndarray, **others: np.ndarray) -> Path:
    np.savez(path, arr_0=pictures, **others)
    return path

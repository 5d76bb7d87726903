"""The pictures and captions that the emoji model learns from.

Three pinned npm packages are fetched and their checksums verified: Google's and Twitter's
emoji pictures, and the CLDR names and keywords of every emoji.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# npm package -> (unpacked folder, SHA-256 of the archive)
PACKAGES = {
    "emoji-datasource-google@16.0.0": (
        "google",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    ),
    "emoji-datasource-twitter@16.0.0": (
        "twitter",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "emojibase-data@16.0.3": (
        "names",
        "cab288279075778f15b37f3ca60dfb17759af6fe29758e07338e248879991689",
    ),
}
VENDORS = ("google", "twitter")
# Twitter draws without shading. The suffix gives each picture a caption of its own.
STYLE_SUFFIX = {"google": "", "twitter": ", flat"}
# What the captions of the finished model name: the labels that come out well.
VOCABULARY = frozenset(
    (Path(__file__).parent / "vocabulary.txt").read_text(encoding="utf-8").splitlines()
)
# What the networks see first: more pictures of the same kinds.
BROAD_SUBGROUPS = frozenset(
    [
        "face-smiling",
        "face-affection",
        "face-tongue",
        "face-hand",
        "face-neutral-skeptical",
        "face-sleepy",
        "face-unwell",
        "face-hat",
        "face-glasses",
        "face-concerned",
        "face-negative",
        "face-costume",
        "cat-face",
        "monkey-face",
        "heart",
        "emotion",
        "animal-mammal",
        "animal-bird",
        "animal-amphibian",
        "animal-reptile",
        "animal-marine",
        "animal-bug",
        "plant-flower",
        "plant-other",
        "food-fruit",
        "food-vegetable",
        "food-prepared",
        "food-asian",
        "food-sweet",
        "drink",
    ]
)


@dataclass(frozen=True)
class Picture:
    """One training picture: what it is called, and where it comes from."""

    label: str
    keywords: tuple[str, ...]
    vendor: str
    code: str
    subgroup: str
    path: Path
    in_broad: bool
    in_vocabulary: bool

    @property
    def caption(self) -> str:
        """The one caption that names this picture and no other."""
        return self.label + STYLE_SUFFIX[self.vendor]


def fetch(folder: Path) -> None:
    """Download and unpack the pinned packages into `folder`, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for package, (name, expected) in PACKAGES.items():
        if (folder / name / "package.json").exists():
            continue
        listing = subprocess.run(
            ["npm", "pack", "--silent", package],
            cwd=folder,
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        archive = folder / listing.stdout.strip().splitlines()[-1]
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != expected:
            raise SystemExit(f"error: {package} has SHA-256 {found}, expected {expected}")
        _unpack(archive, folder / name)


def _unpack(archive: Path, target: Path) -> None:
    with tarfile.open(archive) as tar:
        tar.extractall(target.parent / f"{target.name}.partial", filter="data")
    (target.parent / f"{target.name}.partial" / "package").rename(target)


def pictures(folder: Path) -> list[Picture]:
    """Every emoji drawn by both vendors, without flags and people, in a fixed order."""
    names = json.loads((folder / "names/en/data.json").read_text(encoding="utf-8"))
    by_code = {entry["hexcode"]: entry for entry in names}
    entries = json.loads((folder / "google/emoji.json").read_text(encoding="utf-8"))
    found: list[Picture] = []
    for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
        if entry["category"] in ("Flags", "People & Body", "Component"):
            continue
        if not all(entry[f"has_img_{vendor}"] for vendor in VENDORS):
            continue
        code = entry["unified"]
        named = by_code.get(code) or by_code[code.replace("-FE0F", "")]
        label = named["label"].lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
        found += [
            Picture(
                label=label,
                keywords=tuple(tag.lower() for tag in named.get("tags", ()) if tag != label),
                vendor=vendor,
                code=code,
                subgroup=entry["subcategory"],
                path=folder / vendor / "img" / vendor / "64" / entry["image"],
                in_broad=entry["subcategory"] in BROAD_SUBGROUPS,
                in_vocabulary=label in VOCABULARY,
            )
            for vendor in VENDORS
        ]
    return found


def load_pixels(chosen: list[Picture]) -> Tensor:
    """The pictures on white, as (pictures, 3, 64, 64) uint8."""
    loaded: list[Tensor] = []
    for picture in chosen:
        drawing = Image.open(picture.path).convert("RGBA")
        if drawing.size != (64, 64):
            drawing = drawing.resize((64, 64), Image.Resampling.LANCZOS)
        white = Image.new("RGBA", drawing.size, "white")
        white.alpha_composite(drawing)
        loaded.append(torch.from_numpy(np.array(white.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(loaded)

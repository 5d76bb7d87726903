"""Where the pictures come from: seven drawings of the same emoji, joined by their names.

Only the standard library is used here, so that the renderer needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# npm package -> (unpacked folder, SHA-256 of the archive)
PACKAGES = {
    "@iconify-json/noto@1.2.9": (
        "noto",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "@iconify-json/noto-v1@1.2.5": (
        "noto-v1",
        "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    "@iconify-json/twemoji@1.2.5": (
        "twemoji",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    "@iconify-json/fluent-emoji@1.2.7": (
        "fluent-emoji",
        "8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    "@iconify-json/fluent-emoji-flat@1.2.6": (
        "fluent-emoji-flat",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    "@iconify-json/fxemoji@1.2.2": (
        "fxemoji",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
    ),
    "@iconify-json/emojione@1.2.3": (
        "emojione",
        "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    ),
    "emojibase-data@16.0.3": (
        "names",
        "cab288279075778f15b37f3ca60dfb17759af6fe29758e07338e248879991689",
    ),
}
# What a caption calls each drawing: one plain word for how it looks.
STYLES = {
    "noto": "shaded",
    "noto-v1": "blob",
    "twemoji": "plain",
    "fluent-emoji": "glossy",
    "fluent-emoji-flat": "flat",
    "fxemoji": "bright",
    "emojione": "cartoon",
}
LEAST_STYLES = 5
# Letters, arrows and square buttons with a glyph on them: nothing to draw in a style.
LEFT_OUT = frozenset(
    [
        "alphanum",
        "arrow",
        "av-symbol",
        "currency",
        "gender",
        "keycap",
        "math",
        "punctuation",
        "religion",
        "transport-sign",
        "zodiac",
    ]
)
# Clock faces differ in two thin hands only.
CLOCK_FACE = re.compile(".*(o\N{RIGHT SINGLE QUOTATION MARK}clock|-thirty)$")


@dataclass(frozen=True)
class Drawing:
    """One picture of a thing: the set that holds it, and its name there."""

    package: str
    icon: str


@dataclass(frozen=True)
class Thing:
    """What several sets draw: its CLDR name and keywords, and its drawings by style."""

    label: str
    keywords: tuple[str, ...]
    group: str
    drawings: dict[str, Drawing]


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


def read_json(file: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))


def things(folder: Path) -> list[Thing]:
    """Every thing that at least five sets draw, in CLDR's order."""
    entries = [entry for entry in read_json(folder / "names/en/data.json") if "group" in entry]
    codes = _codes_by_name(folder, entries)
    drawings: dict[str, dict[str, Drawing]] = {}
    for package, style in STYLES.items():
        icons = read_json(folder / package / "icons.json")
        # An alias that turns or mirrors another picture is a picture of something else.
        aliases = [name for name, alias in icons.get("aliases", {}).items() if len(alias) == 1]
        for name in [*icons["icons"], *aliases]:
            code = codes.get(_squashed(name))
            if code:
                drawings.setdefault(code, {}).setdefault(style, Drawing(package, name))
    messages = read_json(folder / "names/en/messages.json")
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups = {subgroup["order"]: subgroup["key"] for subgroup in messages["subgroups"]}
    found: list[Thing] = []
    for entry in sorted(entries, key=lambda entry: entry["order"]):
        drawn = drawings.get(_plain_code(entry["hexcode"]), {})
        if len(drawn) < LEAST_STYLES or subgroups[entry["subgroup"]] in LEFT_OUT:
            continue
        if CLOCK_FACE.match(entry["label"]):
            continue
        label = _plain_text(entry["label"])
        keywords = dict.fromkeys(_plain_text(tag) for tag in entry.get("tags", ()))
        keywords.pop(label, None)
        found.append(Thing(label, tuple(keywords), groups[entry["group"]], drawn))
    return found


def svg(folder: Path, package: str) -> dict[str, str]:
    """The drawings of one set by name, aliases included, as SVG documents."""
    icons = read_json(folder / package / "icons.json")
    documents = {name: _document(icon, icons) for name, icon in icons["icons"].items()}
    for name, alias in icons.get("aliases", {}).items():
        if len(alias) == 1 and alias["parent"] in documents:
            documents[name] = documents[alias["parent"]]
    return documents


def _document(icon: dict[str, Any], defaults: dict[str, Any]) -> str:
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", defaults.get("width", 16))
    height = icon.get("height", defaults.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def _codes_by_name(folder: Path, entries: list[dict[str, Any]]) -> dict[str, str]:
    """Code points by squashed name. Three of the sets say which code points a name stands for."""
    known = {_plain_code(entry["hexcode"]) for entry in entries}
    codes: dict[str, str] = {}
    for package in ("noto", "twemoji", "fluent-emoji-flat"):
        for code, name in read_json(folder / package / "chars.json").items():
            if _plain_code(code) in known:
                codes.setdefault(_squashed(name), _plain_code(code))
        for name, alias in read_json(folder / package / "icons.json").get("aliases", {}).items():
            if len(alias) == 1 and _squashed(alias["parent"]) in codes:
                codes.setdefault(_squashed(name), codes[_squashed(alias["parent"])])
    for entry in entries:
        codes.setdefault(_squashed(entry["label"]), _plain_code(entry["hexcode"]))
    return codes


def _squashed(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _plain_code(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _plain_text(text: str) -> str:
    """Lower case, plain quotes, no commas: a comma separates the parts of a caption."""
    plain = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return re.sub("[“”,]", "", plain)

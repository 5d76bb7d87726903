"""Pictures of every kind that `sag evaluate` is given: read as viewers show them, or refused."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import error_of, run
from drawings import draw, save_folder
from self_attention_guidance.evaluate import open_set

RANDOM = np.random.default_rng(0)
# Not square, and no two rows, columns or channels alike.
GRAY = RANDOM.permutation(192).astype(np.uint8).reshape(12, 16) + 32
COLOUR = RANDOM.integers(0, 256, (12, 16, 3), dtype=np.uint8)
ALPHA = np.where(GRAY % 2, 255, 0).astype(np.uint8)
ON_WHITE = np.where(ALPHA[..., None], COLOUR, 255)
GRAY_ON_WHITE = np.where(ALPHA, GRAY, 255)
IN_16_BITS = GRAY.astype(np.uint16) * 257
OTHERS = [Image.fromarray(255 - COLOUR), Image.fromarray(COLOUR[::-1])]

Write = Callable[[Path], object]


def image(pixels: np.ndarray, mode: str | None = None) -> Image.Image:
    made = Image.fromarray(pixels)
    return made if mode is None else made.convert(mode)


def saved(made: Image.Image, **options: Any) -> Write:
    return lambda path: made.save(path, **options)


def read(path: Path) -> np.ndarray:
    """The first of ten copies of a picture in a folder of their own."""
    folder = path.with_suffix("")
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}{path.suffix}").write_bytes(path.read_bytes())
    source: Any = open_set(folder)
    pixels = next(source.batches(10))
    assert source.size == pixels.shape[2:0:-1]
    return pixels[0]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: np.ndarray, colour_type: int, bits: int, *chunks: bytes) -> Write:
    """Kinds of PNG that Pillow does not write."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2" if bits == 16 else np.uint8)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", zlib.compress(data))]
    return lambda path: path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")
    )


def tiff(
    data: bytes, bits: int, photometric: int = 1, channels: int = 1, sample_format: int = 1
) -> Write:
    """Kinds of TIFF that Pillow does not write."""
    height, width = GRAY.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0}
    tags |= {277: channels, 278: height, 279: len(data), 339: sample_format}
    start = 10 + 12 * len(tags) + 4
    of_all = struct.pack(f"<{channels}H", *[bits] * channels)
    tags[273] = start + len(of_all)
    entries = b""
    for tag, value in tags.items():
        if tag == 258 and channels > 2:
            entries += struct.pack("<HHII", tag, 3, channels, start)
        else:
            entries += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    return lambda path: path.write_bytes(head + entries + bytes(4) + of_all + data)


def packed_12_bits() -> bytes:
    values = (GRAY.astype(np.uint32) * 4095 + 127) // 255
    first, second = values[:, ::2], values[:, 1::2]
    packed = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(packed, axis=-1).astype(np.uint8).tobytes()


CLEAR = int(GRAY[0, 0])
WITHOUT_ONE = np.where(CLEAR == GRAY, 255, GRAY)

KINDS: dict[str, tuple[str, Write, np.ndarray]] = {
    "gray, 1 bit": (".png", saved(image(GRAY > 128)), (GRAY > 128) * np.uint8(255)),
    "gray, 1 bit, TIFF": (".tif", saved(image(GRAY > 128)), (GRAY > 128) * np.uint8(255)),
    "gray": (".bmp", saved(image(GRAY)), GRAY),
    "gray, 16 bits": (".png", saved(image(IN_16_BITS)), GRAY),
    "gray, 16 bits, TIFF": (".tiff", saved(image(IN_16_BITS)), GRAY),
    "gray, 16 bits, packed TIFF": (
        ".tif",
        saved(image(IN_16_BITS), compression="tiff_adobe_deflate"),
        GRAY,
    ),
    "gray, 16 bits, big-endian": (".tif", saved(image(IN_16_BITS.astype(">u2"))), GRAY),
    "gray, 16 bits, one transparent": (
        ".png",
        png(IN_16_BITS, 0, 16, chunk(b"tRNS", struct.pack(">H", 257 * CLEAR))),
        WITHOUT_ONE,
    ),
    "gray, 12 bits": (".tif", tiff(packed_12_bits(), 12), GRAY),
    "gray, 16 bits, white is zero": (
        ".tif",
        tiff((65535 - IN_16_BITS).astype("<u2").tobytes(), 16, photometric=0),
        GRAY,
    ),
    "gray, white is zero": (".tif", tiff((255 - GRAY).tobytes(), 8, photometric=0), GRAY),
    "gray, one transparent": (
        ".png",
        saved(image(GRAY), transparency=CLEAR),
        WITHOUT_ONE,
    ),
    "gray with alpha": (".png", saved(image(np.dstack([GRAY, ALPHA]))), GRAY_ON_WHITE),
    "gray with alpha, 16 bits": (
        ".png",
        png(np.dstack([IN_16_BITS, ALPHA.astype(np.uint16) * 257]), 4, 16),
        GRAY_ON_WHITE,
    ),
    "colours": (".PNG", saved(image(COLOUR)), COLOUR),
    "colours, 16 bits": (".png", png(COLOUR.astype(np.uint16) * 257, 2, 16), COLOUR),
    "colours, 16 bits, TIFF": (
        ".tif",
        tiff((COLOUR.astype("<u2") * 257).tobytes(), 16, photometric=2, channels=3),
        COLOUR,
    ),
    "alpha": (".png", saved(image(np.dstack([COLOUR, ALPHA]))), ON_WHITE),
    "alpha, TIFF": (".tif", saved(image(np.dstack([COLOUR, ALPHA]))), ON_WHITE),
    "alpha, WebP": (".webp", saved(image(np.dstack([COLOUR, ALPHA])), lossless=True), ON_WHITE),
    "alpha, 16 bits": (
        ".png",
        png(np.dstack([COLOUR, ALPHA]).astype(np.uint16) * 257, 6, 16),
        ON_WHITE,
    ),
    "palette": (".png", saved(image(GRAY, "P")), GRAY),
    "palette, one transparent": (
        ".png",
        saved(image(GRAY, "P"), transparency=CLEAR),
        WITHOUT_ONE,
    ),
    "palette, each with its alpha": (
        ".png",
        saved(image(GRAY, "P"), transparency=bytes(255 * (number % 2) for number in range(256))),
        GRAY_ON_WHITE,
    ),
    "GIF, one transparent": (
        ".gif",
        saved(image(GRAY), transparency=CLEAR),
        WITHOUT_ONE,
    ),
    "CMYK": (".tif", saved(image(COLOUR, "CMYK")), COLOUR),
    "animated GIF": (
        ".gif",
        saved(image(GRAY), save_all=True, append_images=[image(255 - GRAY)]),
        GRAY,
    ),
    "animated PNG": (".png", saved(image(COLOUR), save_all=True, append_images=OTHERS), COLOUR),
    "animated WebP": (
        ".webp",
        saved(image(COLOUR), save_all=True, append_images=OTHERS, lossless=True),
        COLOUR,
    ),
    "pages of a TIFF": (".tif", saved(image(COLOUR), save_all=True, append_images=OTHERS), COLOUR),
    "WebP under another name": (
        ".png",
        saved(image(COLOUR), format="WEBP", lossless=True),
        COLOUR,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_read_as_viewers_show_them(kind: str, tmp_path: Path) -> None:
    suffix, write, expected = KINDS[kind]
    path = tmp_path / f"picture{suffix}"
    write(path)
    expected = expected if expected.ndim == 3 else np.dstack([expected] * 3)
    np.testing.assert_array_equal(read(path), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".jpe", ".jfif"])
def test_photographs_are_read(mode: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture{suffix}"
    smooth = Image.fromarray(COLOUR).resize((64, 48), Image.Resampling.BICUBIC).convert(mode)
    smooth.save(path, format="JPEG", quality=100, subsampling=0)
    expected = np.asarray(smooth.convert("RGB")).astype(int)
    assert np.abs(read(path) - expected).mean() < 2


@pytest.mark.parametrize(
    ("bits", "suffix", "options"),
    [
        (8, ".png", {}),
        (16, ".png", {}),
        (8, ".tif", {}),
        (16, ".tif", {}),
        (8, ".tif", {"compression": "tiff_lzw"}),
        (16, ".tif", {"compression": "tiff_lzw"}),
        (8, ".webp", {"lossless": True}),
        (8, ".jpg", {"quality": 100, "subsampling": 0}),
    ],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(
    bits: int, orientation: int, suffix: str, options: dict[str, Any], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"picture{suffix}"
    image(IN_16_BITS if bits == 16 else GRAY).save(path, exif=exif, **options)
    # The EXIF standard: where the first row and the first column of what is stored belong.
    turned = {
        1: GRAY,
        2: GRAY[:, ::-1],
        3: GRAY[::-1, ::-1],
        4: GRAY[::-1],
        5: GRAY.T,
        6: GRAY.T[:, ::-1],
        7: GRAY.T[::-1, ::-1],
        8: GRAY.T[::-1],
    }[orientation]
    found = read(path)[..., 0].astype(int)
    assert found.shape == turned.shape
    assert np.abs(found - turned).max() <= (3 if suffix == ".jpg" else 0)


def in_floats(path: Path) -> None:
    Image.fromarray(GRAY.astype(np.float32) / 255).save(path)


REFUSED: dict[str, tuple[str, Write, str]] = {
    "32 bits": (".tif", saved(image(IN_16_BITS.astype(np.int32))), "white is not known"),
    "32 bits, unsigned": (
        ".tif",
        tiff((GRAY.astype("<u4") * 2**24).tobytes(), 32),
        "white is not known",
    ),
    "floats": (".tiff", in_floats, "white is not known"),
    "floats of 64 bits": (
        ".tif",
        tiff((GRAY / 255).astype("<f8").tobytes(), 64, sample_format=3),
        "no picture, or of an unknown format",
    ),
    "colours in floats": (
        ".tif",
        tiff(
            (COLOUR / 255).astype("<f4").tobytes(),
            32,
            photometric=2,
            channels=3,
            sample_format=3,
        ),
        "no picture, or of an unknown format",
    ),
    "16 bits, signed": (
        ".tif",
        tiff((IN_16_BITS // 2).astype("<i2").tobytes(), 16, sample_format=2),
        "white is not known",
    ),
    "8 bits, signed": (
        ".tif",
        tiff((GRAY // 2).astype("i1").tobytes(), 8, sample_format=2),
        "white is not known",
    ),
    "empty": (".png", lambda path: path.write_bytes(b""), "it is empty"),
    "text": (
        ".jpg",
        lambda path: path.write_text("no picture"),
        "no picture, or of an unknown format",
    ),
    "a program's page": (
        ".png",
        lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
        "no picture, or of an unknown format",
    ),
    "half a PNG": (
        ".png",
        lambda path: (image(COLOUR).save(path), path.write_bytes(path.read_bytes()[:300])),
        "truncated",
    ),
    "half a JPEG": (
        ".jpg",
        lambda path: (image(COLOUR).save(path), path.write_bytes(path.read_bytes()[:700])),
        "truncated",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_right_is_refused(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix, write, message = REFUSED[kind]
    folder = save_folder(tmp_path / "pictures", np.stack([COLOUR] * 12))
    write(folder / f"z{suffix}")
    error = error_of(capsys, "evaluate", folder, folder)
    assert f"z{suffix}' cannot be read as a picture: " in error
    assert message in error


def test_files_that_are_no_pictures_are_left_out(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "pictures", np.stack([COLOUR] * 12))
    for name in ("._00000.png", ".DS_Store", ".hidden.jpg", "Thumbs.db", "captions.txt"):
        (folder / name).write_bytes(b"\0\5\26\7 no picture")
    (folder / "more.png").mkdir()
    source: Any = open_set(folder)
    assert source.count == 12
    assert len(next(source.batches(99))) == 12


def test_rotated_pictures_have_the_size_that_is_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_folder(tmp_path / "pictures", np.stack([COLOUR] * 12))
    exif = Image.Exif()
    exif[274] = 6
    image(COLOUR).save(folder / "z.png", exif=exif)
    message = error_of(capsys, "evaluate", folder, folder)
    assert "z.png' is 12x16, 00000.png is 16x12: all pictures must have one size" in message


def test_pictures_of_16_bits_have_the_figures_of_8_bits(tmp_path: Path) -> None:
    gray = draw(12, 1)[..., 1]
    reference = save_folder(tmp_path / "reference", draw(12, 0))
    folders = [
        save_folder(tmp_path / "8", gray),
        save_folder(tmp_path / "16", gray.astype("<u2") * 257),
    ]
    out = tmp_path / "out.json"
    assert run("evaluate", *folders, reference, "--bootstrap", 0, "--json", out) == 0
    first, second = json.loads(out.read_text(encoding="utf-8"))["samples"]
    assert first["metrics"] == second["metrics"]

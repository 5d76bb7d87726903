"""Pictures as viewers show them. No heavy import."""

from __future__ import annotations

from typing import Any

from PIL import Image, ImageOps

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""Pictures are read in these formats. For others, such as EPS, Pillow may run programs, or it is
not known which value is white."""

# Tags of TIFF.
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _UNSIGNED = 0, {1, 4}


def as_seen(image: Image.Image) -> Image.Image:
    """A picture in RGB, upright, on white where it is transparent, with 8 bits per value.

    Args:
        image: An opened picture. Of an animation, the first picture is used.

    Raises:
        ValueError: Its values are signed or floats, so that white is not known.
        OSError: It cannot be read.
    """
    drawing = ImageOps.exif_transpose(_in_8_bits(image)).convert("RGBA")
    white = Image.new("RGBA", drawing.size, "white")
    white.alpha_composite(drawing)
    return white.convert("RGB")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits per value; Pillow's own conversions would clip values above 255."""
    tags: Any = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        white = 2 ** tags.get(_BITS, (16,))[0] - 1
    elif image.mode in ("I", "F") or not set(tags.get(_SAMPLE_FORMAT, ())) <= _UNSIGNED:
        raise ValueError(
            "its values must be unsigned, of 8 or 16 bits: white is not known of others"
        )
    else:
        return image
    import numpy as np

    values = np.asarray(image).astype(np.int64)
    gray = (values * 255 + white // 2) // white
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        gray = 255 - gray
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = 255
    scaled = Image.fromarray(gray.astype(np.uint8))
    scaled.info["exif"] = image.getexif().tobytes()
    return scaled

"""Encoded images into pixels, as timm reads them.

Palettes, CMYK and transparency become RGB by Pillow's conversion, and an EXIF rotation is not
applied: timm calls ``Image.open(...).convert("RGB")`` and nothing else, and networks were
evaluated so. Only more than 8 bits per channel, which that call would clip to white, are refused.
"""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from tasks.idx import DatasetError

# Broken files, and files that would take gigabytes to decode.
_UNREADABLE = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError,
)  # fmt: skip


def decode(content: bytes, place: str) -> Image.Image:
    """Decode an image to mode L or RGB.

    Args:
        content: The file's bytes.
        place: Where it lies, for messages.

    Raises:
        DatasetError: If it does not decode to its end, or has more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except _UNREADABLE as error:
        raise DatasetError(
            f"{place}: expected a readable image, found {len(content)} bytes that do not "
            f"decode ({error}). Replace or remove the file."
        ) from error
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise DatasetError(
            f"{place}: expected 8 bits per channel, found mode {image.mode!r}. Convert the file."
        )
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")

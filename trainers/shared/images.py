"""Encoded images of any kind -> (3, H, W) uint8 RGB, upright and in the full range. A chapter of common.py."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

MAX_PIXELS = 178_956_970  # where Pillow, too, takes a file for an attack; its warning at half of that says nothing new
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# EXIF orientation -> axes of (3, H, W) to flip, after swapping height and width where it is above 4
FLIPS = {2: (2,), 3: (1, 2), 4: (1,), 6: (2,), 7: (1, 2), 8: (1,)}


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Encoded image -> (3, H, W) uint8 RGB, turned upright as its EXIF orientation says; of an animation the first frame.

    16 bits are scaled by their range; for wider integers and floats, which state none, see `_in_range`. Transparency is
    dropped. Raises ValueError for anything that is not a whole image, or holds more than `max_pixels`: their number is
    read in the header, before there is memory for them.
    """
    try:
        if size := _jpeg_size(data) or _png_size(data) or _webp_size(data):
            _check_size(size, max_pixels)
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            try:
                image = decode_image(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
            except RuntimeError:  # a kind that only Pillow reads
                return _by_pillow(data, max_pixels)
            return image if image.dtype == torch.uint8 else ((image.int() * 255 + 32767) // 65535).to(torch.uint8)
        return _by_pillow(data, max_pixels)
    except _TooLarge:
        raise
    except Image.DecompressionBombError as error:
        raise _TooLarge(f"{error}; --max-megapixels sets the limit") from None
    except Exception as error:  # Pillow raises a dozen kinds, struct.error and SyntaxError among them
        raise ValueError(f"{len(data)} bytes that are no whole image ({error})") from None


class _TooLarge(ValueError):
    pass


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise _TooLarge(
            f"{size[0]} x {size[1]} pixels are more than {max_pixels / 1e6:g} million; --max-megapixels sets the limit"
        )


def _png_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a PNG, None for anything else."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG, None for anything else: found by walking its segments up to the frame's header."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    at = 2
    while at + 9 <= len(data):
        kind = data[at + 1]
        if data[at] != 0xFF:
            return None
        if kind == 0xFF:  # padding
            at += 1
        elif 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP that is a single picture without EXIF, None for anything else."""
    if data[:4] != b"RIFF" or len(data) < 30:
        return None
    if data[8:16] == b"WEBPVP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    if data[8:16] == b"WEBPVP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def _by_pillow(data: bytes, max_pixels: int) -> Tensor:
    if max_pixels > (Image.MAX_IMAGE_PIXELS or max_pixels):  # Pillow's own limit would come first, and names no flag
        Image.MAX_IMAGE_PIXELS = max_pixels
    with Image.open(io.BytesIO(data)) as image:
        _check_size(image.size, max_pixels)
        image.load()
        orientation = image.getexif().get(0x0112, 1)  # after load(), which turns a TIFF and forgets that it did
        if image.mode[0] in "IF":
            grey = _in_range(*_values(image))
            pixels = torch.from_numpy(grey).expand(3, -1, -1)
        else:
            pixels = torch.from_numpy(np.array(_to_rgb(image))).permute(2, 0, 1)
    if orientation in FLIPS or orientation == 5:
        pixels = pixels.transpose(1, 2) if orientation > 4 else pixels
        pixels = pixels.flip(FLIPS.get(orientation, ()))
    return pixels.contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    straight = {"La": "LA", "RGBa": "RGBA"}.get(image.mode)  # colours were multiplied by alpha
    return (image.convert(straight) if straight else image).convert("RGB")


def _values(image: Image.Image) -> tuple[np.ndarray, float | None]:
    """A grey image's values (H, W) and the top of their range, None where the file states none."""
    values, top = np.asarray(image), None
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        top = 2 ** tags.get(258, (16,))[0] - 1  # BitsPerSample: 12 where a camera wrote so
    elif image.format == "PPM" and image.mode == "I":
        top = 65535  # Pillow scales to it
    elif image.mode == "I" and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):  # SampleFormat: unsigned
        values = values.view(np.uint32)
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero
        values = (values.max() if top is None else top) - values.astype(np.float64)
    return values, top


def _in_range(values: np.ndarray, top: float | None) -> np.ndarray:
    """Grey values (H, W) -> uint8. Without a stated range 0..1, 0..255 or 0..65535, or else their own least and greatest.

    Of these the first that holds them, up to 5 % of overshoot, and that they fill by a quarter at least: 0..1 always.
    Raises ValueError where a value is not finite.
    """
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite(high - low):
        raise ValueError("it holds values that are not finite")
    least = 0.0
    if top is None:
        top = next((t for t in (1, 255, 65535) if high <= 1.05 * t), np.inf)
        if low < -0.05 * top or 1 < top and high < top / 4:
            least, top = low, high
    return np.rint((values - least) * (255 / max(top - least, 1e-300))).clip(0, 255).astype(np.uint8)

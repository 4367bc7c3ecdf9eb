"""Every kind of image file that people have gives upright pixels in the full range, in both data paths, or is a bad image."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import common
from trainers import eval_detection
from trainers.shared.images import decode_rgb

SIDE = 32
MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F",
         "I;16", "I;16L", "I;16B", "I;16N"]  # fmt: skip
COLOUR = ("P", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
CPU = torch.device("cpu")


def ramp(side: int = SIDE) -> np.ndarray:
    """(H, W) uint8 from 0 to 255: pixels of the wrong range show at once."""
    return np.linspace(0, 255, side)[None].repeat(side, 0).astype(np.uint8)


def picture() -> Image.Image:
    return Image.fromarray(np.stack([ramp(), ramp().T, 255 - ramp()], 2))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png16(colour: np.ndarray) -> bytes:
    """(H, W, 3) uint16 as a PNG, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = colour.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colour)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def in_mode(mode: str) -> Image.Image:
    """The picture in one of Pillow's modes, the grey ones from black to white of their range."""
    if mode.startswith("I;16"):
        wide = (ramp().astype(np.uint16) * 257).astype(">u2" if mode == "I;16B" else "<u2")
        return Image.frombytes(mode, (SIDE, SIDE), wide.tobytes())
    if mode == "I":
        return Image.fromarray(ramp().astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray((ramp() / 255).astype(np.float32))
    if mode == "LAB":
        return Image.frombytes("LAB", (SIDE, SIDE), np.stack([ramp(), 0 * ramp(), 0 * ramp()], 2).tobytes())
    if mode in ("1", "L", "LA", "La", "PA"):
        grey = Image.fromarray(ramp())
        return grey.convert(mode, dither=Image.Dither.NONE) if mode in "1L" else grey.convert("LA").convert(mode)
    return picture().convert("RGBA").convert(mode) if mode == "RGBa" else picture().convert(mode)


def readable_files() -> list[tuple[str, str, bytes, np.ndarray]]:
    """(format, mode, bytes, pixels (H, W, 3)) of everything that Pillow can write and read again.

    What of more than 8 bits a format keeps is shown by the picture in grey, the rest by Pillow.
    """
    Image.init()
    found = []
    for format in sorted(Image.SAVE):
        for mode in MODES:
            if (format, mode) == ("ICNS", "I;16B"):  # Pillow scales the wrong bytes
                continue
            try:
                data = encoded(in_mode(mode), format)
                with Image.open(io.BytesIO(data)) as image:
                    image.load()
            except Exception:  # not this mode in this format, or one that only writes
                continue
            if image.mode[0] in "IF" or image.mode == "LAB":
                grey = ramp()
                if mode == "1" or mode in COLOUR:  # SPIDER makes grey floats of everything
                    straight = in_mode(mode).convert("RGBA") if mode == "RGBa" else in_mode(mode)
                    grey = np.asarray(straight.convert("RGB").convert("L"))
                shown = np.asarray(Image.fromarray(grey).resize(image.size).convert("RGB"))  # ICNS scales
            else:
                shown = np.asarray(image.convert("RGB"))
            found.append((format, mode, data, shown))
    return found


def test_every_mode_of_every_format_that_pillow_writes_gives_the_picture():
    files = readable_files()
    assert len(files) > 100 and {mode for _, mode, *_ in files} >= set(MODES) - {"La"}
    wrong = []
    for format, mode, data, shown in files:
        image = decode_rgb(data)
        if image.dtype != torch.uint8 or image.shape != (3, *shown.shape[:2]):
            wrong.append(f"{format} {mode}: {image.dtype} {tuple(image.shape)}")
            continue
        difference = abs(image.permute(1, 2, 0).numpy().astype(int) - shown).mean()
        if difference > 8:
            wrong.append(f"{format} {mode}: {difference:.0f} from the picture")
    assert not wrong, "\n".join(wrong)


GREY = {
    "16-bit PNG": lambda v: encoded(Image.fromarray((v * 65535).round().astype(np.uint16)), "PNG"),
    "16-bit RGB PNG": lambda v: png16(np.stack([(v * 65535).round().astype(np.uint16)] * 3, 2)),
    "16-bit TIFF": lambda v: encoded(Image.fromarray((v * 65535).round().astype(np.uint16)), "TIFF"),
    "32-bit TIFF of 0..65535": lambda v: encoded(Image.fromarray((v * 65535).round().astype(np.int32)), "TIFF"),
    "32-bit TIFF of 0..255": lambda v: encoded(Image.fromarray((v * 255).round().astype(np.int32)), "TIFF"),
    "32-bit TIFF of its whole range": lambda v: encoded(Image.fromarray((v * (2**31 - 1)).astype(np.int32)), "TIFF"),
    "16-bit PGM": lambda v: b"P5 %d %d 65535\n" % v.shape[::-1] + (v * 65535).round().astype(">u2").tobytes(),
    "float TIFF of 0..1": lambda v: encoded(Image.fromarray(v.astype(np.float32)), "TIFF"),
    "float TIFF of 0..255": lambda v: encoded(Image.fromarray((v * 255).astype(np.float32)), "TIFF"),
    "float TIFF of 0..65535": lambda v: encoded(Image.fromarray((v * 65535).astype(np.float32)), "TIFF"),
    "float TIFF of -1..1": lambda v: encoded(Image.fromarray((v * 2 - 1).astype(np.float32)), "TIFF"),
    "float TIFF of 270..300": lambda v: encoded(Image.fromarray((v * 30 + 270).astype(np.float32)), "TIFF"),
    "float TIFF of 0..1 with overshoot": lambda v: encoded(
        Image.fromarray((v * 1.02 - 0.01).astype(np.float32)), "TIFF"
    ),
}


@pytest.mark.parametrize("kind", GREY)
def test_a_grey_ramp_of_any_depth_goes_from_black_to_white(kind):
    image = decode_rgb(GREY[kind](np.linspace(0, 1, 40)[None].repeat(20, 0)))
    assert image.dtype == torch.uint8 and image.shape == (3, 20, 40)
    assert (image - torch.linspace(0, 255, 40)).abs().max() <= 3, image[0, 0]


@pytest.mark.parametrize("kind", ["16-bit PNG", "16-bit RGB PNG", "16-bit TIFF", "16-bit PGM", "float TIFF of 0..1"])
def test_a_dark_image_of_a_known_range_stays_dark(kind):
    image = decode_rgb(GREY[kind](np.linspace(0, 0.001, 40)[None].repeat(20, 0)))
    assert image.max() <= 1


def test_values_that_are_not_finite_are_no_image():
    values = np.full((8, 8), np.nan, np.float32)
    with pytest.raises(ValueError, match="not finite"):
        decode_rgb(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("format, options", [
    ("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
])  # fmt: skip
def test_of_an_animation_the_first_frame_counts(format, options):
    first = picture().quantize(64).convert("RGB")
    others = [Image.fromarray(255 - np.asarray(first))] * 2
    data = encoded(first, format, save_all=True, append_images=others, **options)
    assert (decode_rgb(data).permute(1, 2, 0).numpy().astype(int) - np.asarray(first)).__abs__().mean() < 4


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
@pytest.mark.parametrize("orientation", range(0, 10))
def test_an_image_stands_as_its_exif_orientation_says(format, orientation):
    quarters = np.zeros((24, 40, 3), np.uint8)
    quarters[:12, :20], quarters[:12, 20:], quarters[12:, :20] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored, exif = Image.fromarray(quarters), Image.Exif()
    exif[0x0112] = orientation
    upright = stored.copy()
    upright.getexif()[0x0112] = orientation
    upright = torch.from_numpy(np.array(ImageOps.exif_transpose(upright))).permute(2, 0, 1)
    for image in (stored, stored.convert("CMYK")) if format in ("JPEG", "TIFF") else (stored,):
        found = decode_rgb(encoded(image, format, exif=exif))
        assert found.shape == upright.shape
        corners = [(..., y, x) for y in (3, -4) for x in (3, -4)]
        assert all((found[c].int() - upright[c].int()).abs().max() < 90 for c in corners)


def claimed(format: str, side: int) -> bytes:
    """A small file whose header claims a huge image."""
    data = bytearray(encoded(Image.new("L", (16, 16)), format))
    if format == "JPEG":
        at = data.index(b"\xff\xc0")
        data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    elif format == "PNG":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif format == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    elif format == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    elif format == "TIFF":
        data = bytearray(encoded(Image.new("1", (side // 4, 16)), "TIFF"))
        for tag in (256, 257):
            at = data.index(struct.pack("<HH", tag, 3 if struct.pack("<HH", tag, 3) in data else 4))
            data[at + 8 : at + 12] = struct.pack("<I", side)
    elif format == "PPM":
        data = bytearray(b"P5 %d %d 255\n" % (side, side))
    return bytes(data)


@pytest.mark.parametrize("side", [14_000, 60_000])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM"])
def test_the_size_in_the_header_is_read_before_there_is_memory_for_it(format, side):
    with pytest.raises(ValueError, match="--max-megapixels") as error:
        decode_rgb(claimed(format, side))
    assert str(side) in str(error.value) or str(side * side) in str(error.value)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF"])
def test_the_limit_is_a_flags_to_set(format, lossless):
    data = encoded(picture(), format, **({"lossless": lossless} if format == "WEBP" else {}))
    assert decode_rgb(data, SIDE * SIDE).shape == (3, SIDE, SIDE)
    with pytest.raises(ValueError, match=f"{SIDE} x {SIDE} pixels .*--max-megapixels"):
        decode_rgb(data, SIDE * SIDE - 1)
    source = common.Source("one", 1, lambda i: data, max_pixels=SIDE * SIDE - 1)
    with pytest.raises(ValueError, match="--max-megapixels"):
        source.decode(0)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"text", b"\xff\xd8\xff\xe1\0\0" * 9]
)
def test_what_is_no_image_is_a_value_error(data):
    with pytest.raises(ValueError, match="no whole image"):
        decode_rgb(data)


def test_a_cut_file_is_no_image():
    for format in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        data = encoded(picture(), format)
        with pytest.raises(ValueError, match="no whole image"):
            decode_rgb(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("side, resident", [(32, True), (120, False)])
def test_a_folder_that_mixes_all_kinds_trains_in_both_data_paths(tmp_path, side, resident):
    grey = ramp(side)
    wide, image = grey.astype(np.uint16) * 257, Image.fromarray(grey)
    negative = Image.fromarray(255 - grey)
    files = {
        "8.png": encoded(image, "PNG"),
        "16.png": encoded(Image.fromarray(wide), "PNG"),
        "rgb16.png": png16(np.stack([wide] * 3, 2)),
        "animated.gif": encoded(image, "GIF", save_all=True, append_images=[negative]),
        "animated.webp": encoded(
            image.convert("RGB"), "WEBP", lossless=True, save_all=True, append_images=[negative.convert("RGB")]
        ),
        "pages.tif": encoded(image, "TIFF", save_all=True, append_images=[negative]),
        "16.tif": encoded(Image.fromarray(wide), "TIFF"),
        "32.tif": encoded(Image.fromarray(wide.astype(np.int32)), "TIFF"),
        "float.tif": encoded(Image.fromarray((grey / 255).astype(np.float32)), "TIFF"),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG", quality=100),
    }
    for name, data in files.items():
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(data)
    source = common.open_source(str(tmp_path))
    data = common.Batches(source, [(common.eval_recipe(side), 32)], len(files), seed=0, device=CPU)
    assert data.resident == resident and not source.bad
    (view,) = data.batch(0).views
    assert view.shape == (len(files), 3, 32, 32)
    assert (view - view[:1]).abs().max() < 0.03 and view.min() < 0.1 and view.max() > 0.9


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_land_on_the_upright_image(orientation):
    upright = torch.zeros(3, 60, 100, dtype=torch.uint8)
    upright[:, 5:25, 60:90] = 255
    turned = Image.fromarray(upright.permute(1, 2, 0).numpy())
    back = {5: 5, 6: 8, 8: 6}.get(orientation, orientation)  # what undoes it, as EXIF counts
    turned.getexif()[0x0112] = back
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(ImageOps.exif_transpose(turned), "JPEG", exif=exif, quality=95)
    source = common.Source("one", 1, lambda i: data)
    thing = {"bbox": [60.0, 5.0, 30.0, 20.0], "category_id": 1, "iscrowd": 0, "name": "white"}
    scene, bad = eval_detection.Scenes(common.Annotated(source, [[thing]], ["white"]), 0, (60,), 100)[0, 0]
    left, top, right, bottom = scene["boxes"][0].int().tolist()
    light = scene["image"].float().div(255)
    inside = light[:, top:bottom, left:right]
    assert not bad and inside.mean() > 0.95 and inside.sum() > 0.95 * light.sum()


def test_boxes_that_were_drawn_on_the_file_as_stored_are_told():
    exif = Image.Exif()
    exif[0x0112] = 6
    source = common.Source("one", 1, lambda i: encoded(Image.new("RGB", (100, 60)), "JPEG", exif=exif))
    thing = {"bbox": [6.0, 5.0, 30.0, 20.0], "category_id": 1, "iscrowd": 0, "name": "a"}
    for stated, told in (((100, 60), 0), ((60, 100), 1), ((0, 0), 0)):  # height, width; upright it has 100, 60
        annotated = common.Annotated(source, [[thing]], ["a"], sizes=[stated])
        _, bad = eval_detection.Scenes(annotated, 0, (60,), 100)[0, 0]
        assert len(bad) == told and all("EXIF" in why for _, why in bad)

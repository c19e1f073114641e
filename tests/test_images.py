"""Image files as training, test sets, data.check and --input read them: rightly, or a line says why not."""

import contextlib
import errno
import os
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, TiffImagePlugin

from conftest import write_image
from photograph_cases import DEEP, LZW, RGB, TAKEN, chunk, exif, interlaced_png16, png, png16
from test_data import folder_set
from utils import options
from utils.errors import InputError
from utils.files import list_files
from utils.images import EXTENSIONS, read_image, read_picture, save_image
from utils.photographs import read_photograph, save_tiff16

RGBA = np.dstack([RGB, np.maximum(DEEP[..., 3] >> 8, 1)]).astype(np.uint8)        # nothing is hidden

# What a viewer does with each EXIF orientation.
TURNS = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
         5: lambda x: x.swapaxes(0, 1),
         6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}


def tiff(path: Path, pixels: np.ndarray, *, orientation: int = 1, **how) -> Path:
    """A TIFF by tifffile, with an orientation."""
    tifffile.imwrite(path, pixels, metadata=None, extratags=[(0x0112, "H", 1, orientation, True)], **how)
    return path


def eight(numbers: np.ndarray) -> np.ndarray:
    """16 bits -> 8, rounded to nearest."""
    return (numbers / 65535 * 255 + 0.5).astype(np.uint8)


def colourmap() -> np.ndarray:
    """Entry i of a palette has the colour (i, 255 - i, i)."""
    levels = np.arange(256, dtype=np.uint16)
    return np.stack([levels, levels[::-1], levels]) * 257


PALETTE = np.stack([RGB[..., 0], 255 - RGB[..., 0], RGB[..., 0]], axis=2)
# Pixels as stored, how, and the picture.
TIFFS = {
    "grey": (RGB[..., 0], {"photometric": "minisblack"}, RGB[..., :1]),
    "grey, white is zero": (255 - RGB[..., 0], {"photometric": "miniswhite"}, RGB[..., :1]),
    "bits": (RGB[..., 0] > 99, {"photometric": "minisblack"}, (RGB[..., :1] > 99) * np.uint8(255)),
    "palette": (RGB[..., 0], {"photometric": "palette", "colormap": colourmap()}, PALETTE),
    "RGB": (RGB, {"photometric": "rgb"}, RGB),
    "RGBA": (RGBA, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, RGBA),
    "RGB planar": (RGB.transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"}, RGB),
    "grey 16": (DEEP[..., 0], {"photometric": "minisblack"}, DEEP[..., :1]),
    "grey 16, white is zero": (65535 - DEEP[..., 0], {"photometric": "miniswhite"}, DEEP[..., :1]),
    "grey and alpha 16": (DEEP[..., :2], {"planarconfig": "contig", "extrasamples": ["unassalpha"]},
                          DEEP[..., :2]),
    "RGB 16": (DEEP[..., :3], {"photometric": "rgb"}, DEEP[..., :3]),
    "RGB 16 planar": (DEEP[..., :3].transpose(2, 0, 1), {"photometric": "rgb", "planarconfig": "separate"},
                      DEEP[..., :3]),
    "RGB 16 big endian": (DEEP[..., :3], {"photometric": "rgb", "byteorder": ">"}, DEEP[..., :3]),
    "RGB 16 deflate": (DEEP[..., :3], {"photometric": "rgb", "compression": 8, "predictor": True},
                       DEEP[..., :3]),
    "RGB 16 tiles": (DEEP[..., :3], {"photometric": "rgb", "tile": (16, 16)}, DEEP[..., :3]),
    "RGB 16 strips": (DEEP[..., :3], {"photometric": "rgb", "rowsperstrip": 4}, DEEP[..., :3]),
    "RGB 16 BigTIFF": (DEEP[..., :3], {"photometric": "rgb", "bigtiff": True}, DEEP[..., :3]),
    "RGBA 16": (DEEP, {"photometric": "rgb", "extrasamples": ["unassalpha"]}, DEEP),
    "float 32": ((DEEP[..., 0] / 65535).astype(np.float32), {"photometric": "minisblack"}, DEEP[..., :1]),
    "float 64 RGB": (DEEP[..., :3] / 65535, {"photometric": "rgb"}, DEEP[..., :3]),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("kind", TIFFS)
def test_tiff_of_each_kind_and_orientation(tmp_path, kind, orientation):
    stored, how, expected = TIFFS[kind]
    path = tiff(tmp_path / "a.tif", stored, orientation=orientation, **how)
    expected = TURNS[orientation](expected)
    picture = read_picture(path)
    assert picture.pixels.dtype == expected.dtype and np.array_equal(picture.pixels, expected)
    colours = expected[..., :3] if expected.shape[2] > 2 else np.repeat(expected[..., :1], 3, axis=2)
    assert np.array_equal(read_image(path), colours if colours.dtype == np.uint8 else eight(colours))


def test_16_bit_tiffs_compressed_by_lzw(tmp_path):
    """Pillow would read 8 of the 16 bits, tifffile needs another package."""
    path = tmp_path / "rgb.tif"
    path.write_bytes(LZW)
    try:
        assert np.array_equal(read_picture(path).pixels.ravel(), 257 * np.arange(18) + 5)
    except InputError as error:
        assert "rgb.tif: cannot be read as an image" in str(error) and "imagecodecs" in str(error)


@pytest.mark.parametrize("predictor", [1, 2])
@pytest.mark.parametrize("stored", [DEEP[..., 0], (DEEP[..., 0] / 65535).astype(np.float32), RGB[..., 0]],
                         ids=str)
def test_grey_tiffs_compressed_by_lzw(tmp_path, stored, predictor):
    """They need no further package."""
    path = tmp_path / "a.tif"
    Image.fromarray(stored).save(path, compression="tiff_lzw", tiffinfo={317: predictor, 0x0112: 6})
    expected = RGB if stored.dtype == np.uint8 else DEEP
    assert np.array_equal(read_picture(path).pixels, np.rot90(expected[..., :1], -1))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="a.tif: cannot be read as an image"):
        read_picture(path)


def test_alpha_that_is_multiplied_into_16_bit_colours(tmp_path):
    alpha = np.maximum(DEEP[..., 3:], 20000)
    stored = np.concatenate([(DEEP[..., :3] * (alpha / 65535) + 0.5).astype(np.uint16), alpha], axis=2)
    picture = read_picture(tiff(tmp_path / "a.tif", stored, photometric="rgb", extrasamples=["assocalpha"]))
    assert picture.bits == 16 and np.array_equal(picture.alpha, alpha)
    assert np.abs(picture.colours.astype(int) - DEEP[..., :3]).max() <= 2           # 0.5 * 65535 / 20000
    assert not picture.remarks


def test_a_fourth_channel_without_a_stated_meaning(tmp_path):
    """8 bits: as viewers show it; 16 bits: refused."""
    for pixels, name in ((RGBA, "8.tif"), (DEEP, "16.tif")):
        unstated = tiff(tmp_path / name, pixels, photometric="rgb", extrasamples=["unspecified"])
        if name == "8.tif":
            picture = read_picture(unstated)
            assert np.array_equal(picture.pixels, RGB)
            assert picture.remarks == ["a fourth channel without a stated meaning, which is left out"]
        tag, other = (struct.pack("<HHII", code, 3, 1, 0) for code in (338, 40000))
        unstated.write_bytes(unstated.read_bytes().replace(tag, other))
    picture = read_picture(tmp_path / "8.tif")
    assert np.array_equal(picture.pixels, RGBA)
    with pytest.raises(InputError, match="uint16, 4 channels"):
        read_picture(tmp_path / "16.tif")


def numbers(dtype: str, scale: float = 1) -> np.ndarray:
    return (RGB[..., 0] * scale).astype(dtype)


def hole(value: float) -> np.ndarray:
    pixels = numbers("f4", 1 / 255)
    pixels[3, 4] = value
    return pixels


@pytest.mark.parametrize("stored, how, message", [
    (hole(np.nan), {}, "infinite or not a number"), (hole(np.inf), {}, "infinite or not a number"),
    (numbers("f4"), {}, "floats from 0 to 255, expected 0 to 1"), (hole(-0.5), {}, "floats from -0.5 to 1"),
    (numbers("u4"), {}, "a TIFF of uint32"), (numbers("i4"), {}, "a TIFF of int32"),
    (numbers("u8"), {}, "a TIFF of uint64"), (numbers("i2"), {}, "a TIFF of int16"),
    (numbers("i1", 0.5), {}, "a TIFF of int8"), (numbers("c8"), {}, "a TIFF of complex64"),
    (np.repeat(DEEP, 2, axis=2), {"planarconfig": "contig"}, "8 channels"),
    (np.stack([DEEP[..., 0]] * 3), {"volumetric": True, "tile": (1, 16, 16)}, "a TIFF of uint16"),
    (RGBA[..., :2].transpose(2, 0, 1), {"planarconfig": "separate", "extrasamples": ["unassalpha"]},
     "2 channels"),
    (DEEP.transpose(2, 0, 1), {"photometric": "separated", "planarconfig": "separate"},
     "4 channels, photometric 5"),
    (DEEP[..., :3], {"photometric": "cielab"}, "3 channels, photometric 8"),
], ids=str)
def test_tiffs_that_could_mean_several_things_are_refused(tmp_path, stored, how, message):
    path = tiff(tmp_path / "a.tif", stored, **{"photometric": "minisblack", **how})
    for read in (read_image, read_picture):
        with pytest.raises(InputError, match=f"a.tif: cannot be read as an image .*{message}") as error:
            read(path)
        assert "\n" not in str(error.value) and str(error.value).count(str(path)) == 1


@pytest.mark.parametrize("content", [
    b"", b"\x89PNG\r\n\x1a\n", LZW[:150], LZW[:-6], b"II*\0\x08\0\0\0\0\0", b"MM\0*" + bytes(30),
    b"not an image",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", png((9, 9), 3, 7, [b"\0"]),
], ids=str)
def test_what_is_no_image_is_one_line(tmp_path, content):
    path = tmp_path / "a.png"                               # EPS would run another program
    path.write_bytes(content)
    with pytest.raises(InputError, match="a.png: cannot be read as an image") as error:
        read_image(path)
    assert "\n" not in str(error.value) and "0x" not in str(error.value)


def test_a_tiff_that_is_cut_off_is_refused(tmp_path):
    path = tiff(tmp_path / "a.tif", DEEP[..., :3], photometric="rgb", rowsperstrip=4)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match="cut off"):
        read_image(path)


# What is a file --------------------------------------------------------------------------------------------

def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")                        # opening it would wait for ever
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(tmp_path):
        server.bind("socket.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "nowhere.png").symlink_to("gone")
    (tmp_path / "folder.png").mkdir()
    leads = "a link that leads to no file"
    for name, message in (("pipe", "no regular file"), ("socket", "no regular file"), ("device", leads),
                          ("itself", leads), ("nowhere", leads), ("folder", "no regular file"),
                          ("gone", "no such file")):
        with pytest.raises(InputError, match=f"{name}.png: {message}"):
            read_image(tmp_path / f"{name}.png")
    names = ["device.png", "itself.png", "nowhere.png", "pipe.png", "socket.png"]
    assert [path.name for path in list_files(tmp_path, EXTENSIONS)] == names


def refuse_to_list(monkeypatch, folder: Path) -> None:
    """Permission denied for a folder: root, who may run the tests, may read every one."""
    scandir = os.scandir

    def denied(path):
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    for name in ("a.png", "below/b.png", "closed/c.png"):
        write_image(tmp_path / name)
    refuse_to_list(monkeypatch, tmp_path / "closed")
    with pytest.raises(InputError, match="/closed: a folder that cannot be read .Permission denied."):
        list_files(tmp_path)
    unreadable = []
    assert [path.name for path in list_files(tmp_path, unreadable=unreadable)] == ["a.png", "b.png"]
    assert len(unreadable) == 1 and "/closed: " in unreadable[0]
    with pytest.raises(InputError, match="/closed: a folder that cannot be read"):
        folder_set(tmp_path, options.TestSet, degraded=".")


def test_a_file_that_may_not_be_read_is_named_once(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.png")

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(InputError) as error:
        read_image(path)
    assert str(error.value) == f"{path}: Permission denied"


ODD_NAMES = ["a\nb.png", "a\x1b[2J.png", os.fsdecode(b"\xff\xfe.png"), "写真.PNG", " .png"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(tmp_path, name):
    image = Image.fromarray(RGB)
    image.save(tmp_path / "a.png")
    path = (tmp_path / "a.png").rename(tmp_path / name)
    assert list_files(tmp_path, EXTENSIONS) == [path] and np.array_equal(read_image(path), RGB)
    path.write_bytes(b"")
    with pytest.raises(InputError) as error:
        read_image(path)
    assert "\n" not in str(error.value) and str(error.value).encode()


LOSSLESS = {".png": {}, ".apng": {}, ".bmp": {}, ".tif": {}, ".tiff": {"compression": "tiff_lzw"},
            ".ppm": {}, ".pnm": {}, ".webp": {"lossless": True},
            **dict.fromkeys((".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"), {})}
WRITTEN = {extension for extension, name in Image.registered_extensions().items() if name in Image.SAVE}


@pytest.mark.parametrize("extension", sorted(EXTENSIONS & WRITTEN))
def test_every_extension_is_read(tmp_path, extension):
    """In training and test sets, too; whatever the case; and by the content, whatever the extension."""
    image = Image.fromarray(RGB)
    smooth = image.resize((4, 3)).resize((30, 21), Image.Resampling.BICUBIC)
    mode = {".pgm": "L", ".pbm": "1"}.get(extension, "RGB")
    image = image if extension in LOSSLESS else smooth.convert(mode)
    name = Image.registered_extensions()[extension]
    for other in (extension, extension.upper(), ".jpg"):
        image.save(tmp_path / f"a{other}", name, **LOSSLESS.get(extension, {}))
        found = read_image(tmp_path / f"a{other}").astype(int)
        assert np.abs(found - np.asarray(image.convert("RGB"))).mean() <= (0 if extension in LOSSLESS else 4)
    assert extension in (".jpg", ".png") or len(folder_set(tmp_path, options.TestSet, degraded=".")) == 3


# Transparency ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_a_png(tmp_path, bits):
    values = DEEP[..., 0].astype(int) >> (16 - bits)
    key = int(values[2, 3])
    digits = (values[..., None] >> np.arange(bits)[::-1]) & 1
    rows = [b"\0" + np.packbits(row.astype(np.uint8)).tobytes() for row in digits]
    path = tmp_path / "a.png"
    path.write_bytes(png((30, 21), bits, 0, rows, chunk(b"tRNS", struct.pack(">H", key))))
    picture, full = read_picture(path), 65535 if bits == 16 else 255
    assert picture.grey and picture.bits == max(bits, 8)
    seen = values != key
    assert np.array_equal(picture.alpha[..., 0], np.where(seen, full, 0))
    assert np.array_equal(picture.colours[..., 0][seen], (values * full // (2**bits - 1))[seen])


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_of_a_png(tmp_path, bits):
    """Two colours that differ in their last bit: only the one that the file names is transparent."""
    pixels = DEEP[..., :3].copy() >> (16 - bits)
    pixels[5, 5], pixels[5, 6] = pixels[2, 3], pixels[2, 3] ^ 1
    rows = [b"\0" + row.astype(">u2" if bits == 16 else np.uint8).tobytes() for row in pixels]
    path = tmp_path / "a.png"
    path.write_bytes(png((30, 21), bits, 2, rows, chunk(b"tRNS", pixels[2, 3].astype(">u2").tobytes())))
    picture = read_picture(path)
    assert picture.bits == bits and (picture.alpha == 0).sum() == 2 and picture.alpha[5, 5, 0] == 0
    seen = picture.alpha[..., 0] > 0
    assert np.array_equal(picture.colours[seen], pixels[seen])


def test_transparent_entries_of_a_palette(tmp_path):
    image = Image.fromarray(RGB).quantize(16)
    entries = np.asarray(image)
    alpha = bytes(range(0, 256, 17))
    colours = np.asarray(image.convert("RGB"))
    one = np.where(entries == 3, 0, 255)
    for name, transparency, expected in (("one.png", 3, one), ("one.gif", 3, one),
                                         ("each.png", alpha, np.frombuffer(alpha, np.uint8)[entries])):
        image.save(tmp_path / name, transparency=transparency)
        picture = read_picture(tmp_path / name)
        assert np.array_equal(picture.alpha[..., 0], expected), name
        assert np.array_equal(picture.colours[expected > 0], colours[expected > 0])


@pytest.mark.parametrize("masks", [
    (0xFF0000, 0xFF00, 0xFF, 0xFF000000), (0xFF, 0xFF00, 0xFF0000, 0xFF000000)])
def test_a_bmp_whose_header_names_an_alpha_channel(tmp_path, masks):
    path = tmp_path / "a.bmp"
    order = [2, 1, 0, 3] if masks[0] > masks[2] else [0, 1, 2, 3]
    path.write_bytes(bmp(RGBA[..., order], masks))
    picture = read_picture(path)
    assert np.array_equal(picture.pixels, RGBA) and not picture.remarks


def test_a_bmp_whose_fourth_channel_means_nothing(tmp_path):
    path = tmp_path / "a.bmp"
    Image.fromarray(RGBA).save(path)                        # Pillow writes alpha there, and does not read it
    picture = read_picture(path)
    assert np.array_equal(picture.pixels, RGB)
    assert picture.remarks == ["a fourth channel without a stated meaning, which is left out"]
    path.write_bytes(bmp(np.dstack([RGB[..., ::-1], np.zeros_like(RGB[..., 0])]), None))
    assert np.array_equal(read_picture(path).pixels, RGB) and not read_picture(path).remarks


def bmp(pixels: np.ndarray, masks: tuple | None) -> bytes:
    """A BMP of 32 bits a pixel, [H,W,4] from the last row up, with the masks of a V4 header or none."""
    height, width = pixels.shape[:2]
    size, compression = (108, 3) if masks else (40, 0)
    header = struct.pack("<IiiHHIIiiII", size, width, height, 1, 32, compression, pixels.nbytes, 0, 0, 0, 0)
    header += struct.pack("<4I", *masks) + b"sRGB" + bytes(48) if masks else b""
    content = header + pixels[::-1].tobytes()
    return b"BM" + struct.pack("<IHHI", 14 + len(content), 0, 0, 14 + size) + content


@pytest.mark.parametrize("name, how", [
    ("a.webp", {"lossless": True, "exact": True}), ("a.png", {}), ("a.tif", {}), ("a.jp2", {})])
def test_alpha_of_other_formats(tmp_path, name, how):
    Image.fromarray(RGBA).save(tmp_path / name, **how)
    assert np.array_equal(read_picture(tmp_path / name).pixels, RGBA)


def test_what_hides_under_full_transparency_is_the_mean_of_what_is_seen(tmp_path):
    for pixels in (RGBA, DEEP):
        pixels = pixels.copy()
        pixels[..., 3] = np.iinfo(pixels.dtype).max
        pixels[5:9, 6:10, 3] = 0
        pixels[9, 9, 3] = 1                                 # partly transparent: as it is
        path = tiff(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
        picture, hidden = read_picture(path), pixels[..., 3] == 0
        assert np.array_equal(picture.pixels[~hidden], pixels[~hidden])
        assert np.array_equal(picture.alpha, pixels[..., 3:])
        assert (picture.colours[hidden] == np.round(pixels[~hidden][:, :3].mean(axis=0))).all()
    pixels[..., 3] = 0
    path = tiff(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    assert (read_picture(path).colours == 32768).all()


# EXIF ------------------------------------------------------------------------------------------------------

def test_a_damaged_exif_block_does_not_damage_the_image(tmp_path):
    image, whole = Image.fromarray(RGB), exif(6).tobytes()
    nonsense = b"Exif\0\0nonsense"
    for name, block, upright in (("a.jpg", nonsense, RGB), ("a.png", nonsense, RGB),
                                 ("a.webp", nonsense, RGB),
                                 ("b.png", whole[:30], RGB), ("c.png", whole[:-20], np.rot90(RGB, -1))):
        image.save(tmp_path / name, exif=block, **({"lossless": True} if name == "a.webp" else {}))
        photograph = read_photograph(tmp_path / name)
        (remark,) = photograph.remarks
        assert remark == "damaged EXIF, kept as far as it can be read", name
        assert photograph.pixels.shape == upright.shape
        assert name == "a.jpg" or np.array_equal(photograph.pixels, upright)
        assert np.array_equal(read_image(tmp_path / name), photograph.pixels)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_damaged_exif_directory_of_a_tiff(tmp_path, bits):
    path, pixels = tmp_path / "a.tif", RGB if bits == 8 else DEEP[..., :3]
    if bits == 8:
        Image.fromarray(RGB).save(path, exif=exif(6).tobytes())
    else:
        save_tiff16(str(path), pixels, {"exif": exif(6).tobytes()})
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags[0x8769].overwrite(10**9, dtype="I")
    photograph = read_photograph(path)
    assert np.array_equal(photograph.pixels, np.rot90(pixels, -1))
    assert photograph.remarks == ["damaged EXIF, kept as far as it can be read"]
    assert exif_of_block(photograph.metadata["exif"])[0x010F] == "camera"


@pytest.mark.parametrize("pixels", [RGB, DEEP[..., :3]])
def test_exif_of_a_big_tiff(tmp_path, pixels):
    make = (0x010F, "s", 0, "camera", True)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", bigtiff=True, metadata=None, extratags=[make])
    picture = read_picture(path)
    assert exif_of_block(picture.metadata["exif"])[0x010F] == "camera" and not picture.remarks


def exif_of_block(block: bytes) -> Image.Exif:
    entries = Image.Exif()
    entries.load(block)
    return entries


def test_exif_says_nothing_of_how_another_file_stores_its_pixels(tmp_path):
    """A TIFF's tags are its EXIF block: its strips, its photometric kind, ... are not the next file's."""
    image = Image.fromarray(255 - RGB[..., 0])
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    ifd[262], ifd[271], ifd[306] = 0, "camera", TAKEN       # white is zero: Pillow inverts when it writes
    image.save(tmp_path / "a.tif", tiffinfo=ifd, compression="tiff_lzw")
    picture = read_picture(tmp_path / "a.tif")
    assert np.array_equal(picture.pixels[..., 0], 255 - RGB[..., 0])
    assert dict(exif_of_block(picture.metadata["exif"])) == {271: "camera", 306: TAKEN}


# Siblings --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_interlaced_and_animated_16_bit_png(tmp_path, channels):
    pixels = np.maximum(DEEP[..., :channels], 1)
    (tmp_path / "a.png").write_bytes(interlaced_png16(pixels))
    assert np.array_equal(read_picture(tmp_path / "a.png").pixels, pixels)
    first = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 30, 21, 0, 0, 1, 1, 0, 0))
    still = png16(pixels, chunk(b"acTL", struct.pack(">II", 2, 0)), first)
    second = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 1, 30, 21, 0, 0, 1, 1, 0, 0))
    (tmp_path / "b.png").write_bytes(still[:-12] + second + still[-12:])
    picture = read_picture(tmp_path / "b.png")
    assert picture.frames == 2 and np.array_equal(picture.pixels, pixels)
    with pytest.raises(InputError, match="b.png: 2 frames, expected a still image"):
        read_image(tmp_path / "b.png")


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("largest", [1, 100, 255, 1000, 65535])
def test_portable_maps(tmp_path, kind, largest):
    largest = 1 if kind in (1, 4) else largest
    values = (DEEP[..., :3 if kind in (3, 6) else 1].astype(int) % (largest + 1)).astype(np.uint16)
    header = b"P%d\n30 21\n" % kind + (b"" if kind in (1, 4) else b"%d\n" % largest)
    ink = 1 - values if kind in (1, 4) else values          # of bits, 1 is black
    if kind < 4:
        content = header + b" ".join(b"%d" % value for value in ink.ravel())
    elif kind == 4:
        content = header + np.packbits(ink[..., 0].astype(np.uint8), axis=1).tobytes()
    else:
        content = header + ink.astype(np.uint8 if largest < 256 else ">u2").tobytes()
    path = tmp_path / "a.pnm"
    path.write_bytes(content)
    picture, deep = read_picture(path), largest > 255
    assert picture.bits == (16 if deep and kind in (2, 5) else 8) and picture.grey == (kind not in (3, 6))
    full = 2**picture.bits - 1
    assert np.abs(picture.pixels - values / largest * full).max() <= 1
    lost = [f"{largest.bit_length()} bits a channel, of which 8 are read"] if deep and kind in (3, 6) else []
    assert picture.remarks == lost


def test_jpeg_2000_of_16_bits(tmp_path):
    Image.fromarray(DEEP[..., 0]).save(tmp_path / "a.jp2")
    assert np.array_equal(read_picture(tmp_path / "a.jp2").pixels, DEEP[..., :1])
    Image.fromarray(RGB).save(tmp_path / "b.jp2")
    picture = read_picture(tmp_path / "b.jp2")
    assert np.array_equal(picture.pixels, RGB) and not picture.remarks


def test_cmyk_and_grey_jpegs(tmp_path):
    """Adobe stores CMYK inverted and says so; Pillow writes it so."""
    smooth = Image.fromarray(RGB).resize((3, 2)).resize((30, 21), Image.Resampling.BICUBIC)
    for mode in ("CMYK", "L"):
        image = smooth.convert(mode)
        image.save(tmp_path / "a.jpg", quality=100)
        picture = read_picture(tmp_path / "a.jpg")
        difference = read_image(tmp_path / "a.jpg").astype(int) - np.asarray(image.convert("RGB"))
        assert np.abs(difference).mean() < 2
        assert picture.grey == (mode == "L")
        said = ["CMYK without an ICC profile that can be used: its colours are approximate"]
        assert picture.remarks == said * (mode == "CMYK")


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"] + ["a.avif"] * (".avif" in WRITTEN))
def test_animations_are_no_still_images(tmp_path, name):
    image = Image.fromarray(RGB)
    image.save(tmp_path / name, save_all=True, append_images=[image.rotate(180)])
    assert read_picture(tmp_path / name).frames == 2
    with pytest.raises(InputError, match=f"{name}: 2 frames, expected a still image"):
        read_image(tmp_path / name)


def test_a_phone_that_adds_a_small_copy(tmp_path):
    image = Image.fromarray(RGB)
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image.resize((8, 6))], quality=100)
    assert Image.open(tmp_path / "a.jpg").n_frames == 2 and read_picture(tmp_path / "a.jpg").frames == 1
    assert read_image(tmp_path / "a.jpg").shape == RGB.shape


def test_what_a_format_cannot_hold_is_one_line(tmp_path):
    with pytest.raises(InputError, match="a.jpg: cannot be written as JPEG"):
        save_image(Image.new("L", (70000, 1)), tmp_path / "a.jpg")
    with pytest.raises(InputError, match="cannot write .xyz"):
        save_image(Image.new("L", (7, 1)), tmp_path / "a.xyz")
    assert not list(tmp_path.iterdir())

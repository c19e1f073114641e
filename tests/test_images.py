"""Image files as training, test sets and --input read them: rightly, or a line says why not."""

import contextlib
import errno
import io
import os
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import write_image
from photograph_cases import DEEP, RGB, RGBA, chunk, exif, png, saved, tiff
from utils import images
from utils.errors import InputError
from utils.files import list_files
from utils.images import EXTENSIONS, as_rgb, decode, read_image, save_image
from utils.photographs import read_photograph

HIGH = (DEEP >> 8).astype(np.uint8)
HIGH[..., 3] = np.maximum(HIGH[..., 3], 1)
SEEN = DEEP.copy()
SEEN[..., 3] = np.maximum(SEEN[..., 3], 256)                # nothing is hidden, at 8 bits either
GREY, BITS = RGB[..., :1], RGB[..., :1] > 99
SMOOTH = Image.fromarray(RGB).resize((4, 3)).resize((30, 21), Image.Resampling.BICUBIC)
PLAIN = Image.new("RGB", (30, 21), (200, 120, 90))
SOFT_GREY = SMOOTH.convert("L")
DEEP_REMARK = ["16 bits a channel, of which 8 are read"]
# What a viewer does with each EXIF orientation.
TURNS = [np.array, np.fliplr, lambda x: np.rot90(x, 2), np.flipud, lambda x: x.swapaxes(0, 1),
         lambda x: np.rot90(x, -1), lambda x: np.rot90(x, 2).swapaxes(0, 1), np.rot90]


def at_once(path: Path, content: bytes) -> tuple[np.ndarray, list[str]]:
    """Pixels and remarks of a file; training sees the same colours."""
    path.write_bytes(content)
    remarks = []
    pixels = decode(path, remarks)[1]
    assert np.array_equal(read_image(path), as_rgb(pixels))
    return pixels, remarks


def palette() -> Image.Image:
    return Image.fromarray(RGB).quantize(16)


def pnm(channels: int, largest: int) -> bytes:
    values = DEEP[..., :channels].astype(int) % (largest + 1)
    return b"P%d\n30 21\n%d\n" % (5 + channels // 3, largest) + values.astype(">u2").tobytes()


RIGHT = {                       # content, picture (8 bits within 1), remarks
    "PNG alpha 16": (png(SEEN), HIGH, DEEP_REMARK),
    "PNG grey 16": (png(DEEP[..., :1]), HIGH[..., :1], DEEP_REMARK),
    "PNG grey 4": (png(GREY >> 4, bits=4), (GREY >> 4) * np.uint8(17), []),
    "TIFF white is 0": (tiff(255 - GREY, 0), GREY, []),
    "TIFF bits": (saved(Image.fromarray(BITS[..., 0]), "TIFF"), BITS * np.uint8(255), []),
    "TIFF palette": (saved(palette(), "TIFF"), np.asarray(palette().convert("RGB")), []),
    "TIFF alpha": (tiff(RGBA, 2, t338=(2,)), RGBA, []),
    "TIFF fourth channel": (tiff(RGBA, 2, t338=(0,)), RGB, []),
    "TIFF grey 16": (tiff(DEEP[..., :1], 1), HIGH[..., :1], DEEP_REMARK),
    "TIFF 16 >": (tiff(DEEP[..., :3], 2, ">"), HIGH[..., :3], DEEP_REMARK),
    "TIFF alpha 16": (tiff(SEEN, 2, t338=(2,)), HIGH, DEEP_REMARK),
    "TIFF LAB": (saved(PLAIN.convert("LAB"), "TIFF"), np.asarray(PLAIN), []),
    "JPEG 2000 16": (saved(DEEP[..., 0], "JPEG2000"), HIGH[..., :1], DEEP_REMARK),
    "WebP alpha": (saved(RGBA, "WEBP", lossless=True, exact=True), RGBA, []),
    "GIF": (saved(palette(), "GIF"), np.asarray(palette().convert("RGB")), []),
    "JPEG grey": (saved(SOFT_GREY, "JPEG", quality=100), np.asarray(SOFT_GREY)[..., None], []),
    "PNM 10": (pnm(1, 1000), DEEP[..., :1] % 1001 * 0.255, ["10 bits a channel, of which 8 are read"]),
    "PNM 16": (pnm(3, 65535), HIGH[..., :3], DEEP_REMARK),
}


@pytest.mark.parametrize("kind", RIGHT)
def test_files_that_are_read_rightly(tmp_path, kind):
    """By the content, whatever the extension."""
    content, expected, remarks = RIGHT[kind]
    pixels, found = at_once(tmp_path / "a.jpg", content)
    assert pixels.dtype == np.uint8 and found == remarks
    assert pixels.shape == expected.shape and np.abs(pixels.astype(float) - expected).max() <= 1


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_each_orientation(tmp_path, name):
    how = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(name, {})
    for orientation, turn in enumerate(TURNS, 1):
        pixels, _ = at_once(tmp_path / "a", saved(SMOOTH, name, exif=exif(orientation), **how))
        assert np.abs(pixels.astype(int) - turn(np.asarray(SMOOTH))).max() <= (5 if how else 0)
    deep = png(DEEP[..., :1], chunk(b"eXIf", exif(6)[6:]))
    assert np.array_equal(at_once(tmp_path / "a", deep)[0], np.rot90(HIGH[..., :1], -1))
    for damaged in (b"Exif\0\0nonsense", exif(6)[:30], exif(6)[:-120], exif(9), exif()[:14] + b"\xff" * 40):
        pixels, _ = at_once(tmp_path / "a", saved(RGB, "PNG", exif=damaged))
        assert np.array_equal(pixels, RGB) or np.array_equal(pixels, np.rot90(RGB, -1))


def test_alpha_that_is_multiplied_into_the_colours(tmp_path):
    for full, pixels in ((255, RGBA), (65535, SEEN)):
        alpha = np.maximum(pixels[..., 3:], full // 3)
        stored = np.concatenate([(pixels[..., :3] * (alpha / full) + 0.5), alpha], axis=2)
        found, _ = at_once(tmp_path / "a.tif", tiff(stored.astype(pixels.dtype), 2, t338=(1,)))
        assert np.array_equal(found[..., 3:], alpha // ((full + 1) // 256))
        assert np.abs(found[..., :3] - pixels[..., :3] / full * 255).max() <= 4


UNSIGNED = "expected unsigned numbers of 8 or 16 bits a channel, in one plane, black at 0: convert it"


@pytest.mark.parametrize("content, message", [
    (tiff(GREY.astype("f4"), 1), f"mode F, .*{UNSIGNED}"), (tiff(GREY.astype("i2"), 1), "sample format 2"),
    (tiff(GREY.astype("u4"), 1), "32 bits"), (tiff(65535 - DEEP[..., :1], 0), "photometric 0"),
    (tiff(RGB, 2, planes=True), "planes=2"), (tiff(DEEP[..., :3], 8), "does not know"),
    (png(DEEP[..., :3], chunk(b"tRNS", bytes(6))), "16 bits, mode RGB"), (b"", "first bytes are b''"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "b'%!PS-Ado'"),
    (b"\0\0\0\x18ftypheic" + bytes(12), "HEIC, which needs a package: pip install pillow-heif|cannot"),
    (png(RGB)[:-300], "cut off"), (png(RGB)[:60] + b"xx" + png(RGB)[62:], "wrong checksum of its chunk"),
    (saved(RGB, "TIFF")[:-9], "truncated"), (saved(SMOOTH, "JPEG")[:-6], "truncated"),
    (saved(SMOOTH, "JPEG", progressive=True)[:-2], "truncated"),
], ids=lambda value: str(value)[:30])
def test_files_that_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "a.png"                               # EPS would run another program
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"a.png: cannot be read as an image .*{message}") as error:
        read_image(path)
    assert "\n" not in str(error.value) and "0x" not in str(error.value)
    assert str(error.value).count(str(path)) == 1


@pytest.mark.skipif("AVIF" not in Image.SAVE, reason="this Pillow writes none")
def test_bits_of_an_avif():
    content = saved(SMOOTH, "AVIF")
    image, deep = Image.open(io.BytesIO(content)), content.replace(b"av1C\x81\0\x0c", b"av1C\x81\0\x4c")
    assert images.bits_stored(image, content) == 8 and images.bits_stored(image, deep) == 10


def test_any_size_that_the_memory_holds(tmp_path):
    Image.new("1", (16320, 12240), 1).save(tmp_path / "phone.png")         # 200 megapixels are no bomb
    assert Image.open(tmp_path / "phone.png").size == (16320, 12240)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 600000, 60000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(png(RGB)[:8] + header + png(RGB)[33:])
    with pytest.raises(InputError, match="600000x60000 pixels, which need at least 576 GB of memory"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("content, remark", [
    (saved(SMOOTH, "JPEG")[:-2], "its end mark is missing, but no pixels"),
    (png(RGB, end=False), None), (png(RGB)[:-3], None), (png(RGB) + b"more", None),
    (png(RGB, chunk(b"tEXt", b"a\0b", error=1)), "its chunk b'tEXt' has a wrong checksum and is left out"),
    (png(RGB, chunk(b"eXIf", exif(6), error=1)), "its chunk b'eXIf' has a wrong checksum and is left out"),
], ids=lambda value: str(value)[:20])
def test_a_file_whose_pixels_are_whole(tmp_path, content, remark):
    pixels, remarks = at_once(tmp_path / "a", content)
    expected = RGB if content.startswith(b"\x89PNG") else np.asarray(SMOOTH)
    assert remarks == [remark] * bool(remark) and np.abs(pixels.astype(int) - expected).mean() < 3


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")                        # opening it would wait for ever
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(tmp_path):
        server.bind("socket.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "folder.png").mkdir()
    names = ["device.png", "itself.png", "pipe.png", "socket.png"]
    for name in [*names, "folder.png"]:
        with pytest.raises(InputError, match=f"{name}: no regular file"):
            read_image(tmp_path / name)
    assert [path.name for path in list_files(tmp_path, EXTENSIONS)] == names


def refuse_to_list(monkeypatch, folder: Path) -> None:
    """Permission denied for a folder: root, who may run the tests, may read every one."""
    scandir = os.scandir

    def denied(path):
        if Path(path) == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)


def test_folders_that_are_listed(tmp_path, monkeypatch):
    """By links, too, but in no circle; not those of systems, and hidden ones; one that is closed is named."""
    root, link = tmp_path / "root", tmp_path / "link"
    for name in ("a.png", "below/b.png", "closed/c.png", "@eaDir/a.png/SYNOPHOTO_THUMB_XL.jpg",
                 "__MACOSX/a.png", ".thumbnails/a.png", "#recycle/a.png", "below/@eaDir/b.png", "._a.png"):
        write_image(root / name)
    for place, target in ((link, root), (root / "below/again", root),
                          (root / "d", write_image(tmp_path / "elsewhere/d.png").parent)):
        place.symlink_to(target)
    assert [path.name for path in list_files(link)] == ["a.png", "b.png", "c.png", "d.png"]
    refuse_to_list(monkeypatch, link / "closed")
    with pytest.raises(InputError, match="/closed: a folder that cannot be read .Permission denied."):
        list_files(link)
    unreadable = []
    assert [path.name for path in list_files(link, unreadable=unreadable)] == ["a.png", "b.png", "d.png"]
    assert len(unreadable) == 1 and "/closed: " in unreadable[0]


def test_transparent_colours(tmp_path):
    """Only the one that the file names: another that differs in its last bit is seen."""
    for values, bits in (*((DEEP[..., :1] >> (16 - bits), bits) for bits in (1, 2, 4, 8)), (RGB.copy(), 8)):
        values[5, 5], values[5, 6] = values[2, 3], values[2, 3] ^ 1
        transparent = chunk(b"tRNS", values[2, 3].astype(">u2").tobytes())
        pixels, _ = at_once(tmp_path / "a", png(values, transparent, bits=bits))
        seen = (values != values[2, 3]).any(axis=2)
        assert np.array_equal(pixels[..., -1], np.where(seen, 255, 0))
        assert np.array_equal(pixels[seen][:, :-1], values[seen].astype(int) * 255 // (2**bits - 1))
    # Entries of a palette.
    entries, alpha = np.asarray(palette()), bytes(range(0, 256, 17))
    one = np.where(entries == 3, 0, 255)
    for name, transparency, expected in (("PNG", 3, one), ("GIF", 3, one),
                                         ("PNG", alpha, np.frombuffer(alpha, np.uint8)[entries])):
        pixels, _ = at_once(tmp_path / "a", saved(palette(), name, transparency=transparency))
        assert np.array_equal(pixels[..., 3], expected)
        assert np.array_equal(pixels[expected > 0][:, :3], np.asarray(palette().convert("RGB"))[expected > 0])


def test_what_hides_under_full_transparency_is_the_mean_of_what_is_seen(tmp_path):
    stored = RGBA.copy()
    stored[..., 3] = 255
    stored[5:9, 6:10, 3], stored[9, 9, 3] = 0, 1            # hidden, and partly transparent: as it is
    expected, hidden = stored.copy(), stored[..., 3] == 0
    expected[hidden, :3] = np.round(stored[~hidden][:, :3].mean(axis=0))
    assert np.array_equal(at_once(tmp_path / "a", png(stored))[0], expected)
    stored[..., 3] = 0
    assert (at_once(tmp_path / "a", png(stored))[0][..., :3] == 128).all()


def test_cmyk(tmp_path):
    """Adobe stores it inverted and says so; without its mark the numbers are ink."""
    ink = np.asarray(SMOOTH.convert("CMYK"))
    adobe, plain = (saved(Image.fromarray(of, "CMYK"), "JPEG", quality=100) for of in (ink, 255 - ink))
    mark = plain.index(b"\xff\xee")
    for content in (adobe, plain[:mark] + plain[mark + 16:]):
        pixels, remarks = at_once(tmp_path / "a", content)
        assert np.abs(pixels.astype(int) - np.asarray(SMOOTH)).mean() < 2
        assert remarks == ["CMYK without an ICC profile that can be used: its colours are approximate"]


def test_animations_are_no_still_images(tmp_path):
    for name in ("GIF", "PNG", "TIFF", "MPO"):              # MPO: a stereo pair
        (tmp_path / "a").write_bytes(saved(SMOOTH, name, save_all=True, append_images=[SMOOTH.rotate(180)]))
        assert decode(tmp_path / "a", [])[0].n_frames == 2
        with pytest.raises(InputError, match="a: 2 frames, expected a still image"):
            read_image(tmp_path / "a")
    (tmp_path / "a").write_bytes(saved(SMOOTH, "MPO", save_all=True, append_images=[SMOOTH.resize((8, 6))]))
    assert read_image(tmp_path / "a").shape == RGB.shape    # a phone adds a small copy
    # Damage behind the first frame is no frame.
    content = bytearray(saved(SMOOTH, "TIFF", save_all=True, append_images=[SMOOTH]))
    first = int.from_bytes(content[4:8], "little")
    link = first + 2 + 12 * int.from_bytes(content[first:first + 2], "little")
    second = int.from_bytes(content[link:link + 4], "little")
    content[second + 2:second + 50] = bytes(48)                     # width and height among its tags
    (tmp_path / "a.tif").write_bytes(content)
    assert np.array_equal(read_image(tmp_path / "a.tif"), np.asarray(SMOOTH))
    assert np.array_equal(read_photograph(tmp_path / "a.tif")[0], np.asarray(SMOOTH))


def test_formats_that_are_written(tmp_path):
    for name in ("a.png", "a.JPEG", "a.webp"):
        save_image(SMOOTH, tmp_path / name)
        assert np.abs(read_image(tmp_path / name).astype(int) - np.asarray(SMOOTH)).mean() < 5
    with pytest.raises(InputError, match="b.jpg: cannot be written as JPEG"):
        save_image(Image.new("L", (70000, 1)), tmp_path / "b.jpg")
    assert len(list(tmp_path.iterdir())) == 3

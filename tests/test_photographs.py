"""test.py --input: photographs, what a file says beside its pixels, places, file systems, what is refused.

The network gives back what it is given, but in the first test.
"""

import contextlib
import errno
import io
import os
import re
import shutil
import stat
import sys
import time
import unicodedata
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import photograph_cases as cases
from conftest import run_script, write_image, write_yaml
from photograph_cases import DEEP, RGB, RGBA, XMP, chunk, exif, png, saved, tiff, with_segments
from test_images import SMOOTH, refuse_to_list
from utils import evaluation, photographs
from utils.checkpoint import load_network
from utils.evaluation import BORDER, restore
from utils.files import partial_start, write_text
from utils.images import as_rgb, decode

JPEG = saved(SMOOTH, "JPEG", quality=95)
PALETTE = Image.fromarray(RGB).quantize(16)
UPRIGHT_XMP = XMP.replace(b'Orientation="6"', b'Orientation="1"')


@pytest.fixture
def run(tmp_path, checkpoint):
    """`test.py --input SOURCE --output TARGET`, with further arguments."""
    content = {"name": "x", "checkpoint": str(checkpoint), "precision": "float32", "sets": []}
    opt = write_yaml(tmp_path / "options.yml", content)
    return lambda source, target, *arguments: run_script(
        "test.py", "--opt", opt, "--input", tmp_path / source, "--output", tmp_path / target, *arguments)


@pytest.fixture
def same(monkeypatch):
    """A network that gives back what it is given."""
    monkeypatch.setattr(evaluation, "restore", lambda net, degraded, **_: degraded)


def copied(content: bytes, target: Path) -> str:
    """What is said of a file that goes to `target` as a photograph that needs no restoration."""
    source = put(target.parent / "in/a.any.png", content)
    pixels, metadata, remarks = photographs.read_photograph(source)
    restored = as_rgb(pixels) / np.float32(255)
    return "; ".join(remarks + photographs.write_photograph(target, restored, pixels, metadata))


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_photograph_is_restored_by_the_network(tmp_path, run, checkpoint):
    put(tmp_path / "a.png", png(RGB[:9, :8]))
    assert run("a.png", "out.png").returncode == 0
    degraded = torch.from_numpy(RGB[:9, :8] / np.float32(255)).permute(2, 0, 1)[None]
    expected = restore(load_network(checkpoint), degraded, border=BORDER)[0].permute(1, 2, 0).numpy()
    found = np.asarray(Image.open(tmp_path / "out.png"))
    assert np.abs(found - expected.clip(0, 1) * 255).max() <= 0.51 and not np.array_equal(found, RGB[:9, :8])


# Of content, name of the result: its mode, and what is said of it.
KINDS = {
    "phone.jpg": (with_segments(JPEG, (0xE1, exif(6))), "phone.png", "RGB", ""),
    "alpha.png": (png(RGBA), "alpha.png", "RGBA", ""),
    "grey.pgm": (saved(RGB[..., 0], "PPM"), "grey.png", "L", ""),
    "deep.tif": (tiff(DEEP[..., :3], 2), "deep.png", "RGB", "16 bits a channel, of which 8 are read"),
    "palette.gif": (saved(PALETTE, "GIF", transparency=3), "palette.png", "RGBA", ""),
    "dot.BMP": (saved(RGB[:1, :1], "BMP"), "dot.png", "RGB", ""),
    "sub/Ä 写真.webp": (saved(RGB, "WEBP", lossless=True), "sub/Ä 写真.png", "RGB", ""),
    "jpeg.heic": (JPEG, "jpeg.png", "RGB", ""),
    # Not restored:
    "cut.jpg": (JPEG[:-40], None, None, "truncated"), "text.png": (b"not an image", None, None, "not an i"),
}


def test_every_kind_of_photograph(tmp_path, run, same):
    for name, (content, *_) in {**KINDS, "notes.txt": [b"not an image"]}.items():
        put(tmp_path / "in" / name, content)
    result = run("in", "out")
    assert result.returncode == 3 and f"{len(KINDS) - 2} of {len(KINDS)} images restored" in result.stdout
    assert "notes.txt, no photograph by its name" in result.stdout
    final = result.stderr.splitlines()[-1]
    assert final.startswith(f"error: 2 of {len(KINDS)} images not restored: ")
    for name, (content, place, mode, said) in KINDS.items():
        line = next((line for line in result.stdout.splitlines() if f"/in/{name}: " in line), "")
        assert said in line and bool(said) == bool(line)
        if place is None:
            assert said in final
            continue
        image = Image.open(tmp_path / "out" / place)
        assert image.mode == mode and image.getexif().get(0x0112, 1) == 1
        assert image.size == ((21, 30) if name == "phone.jpg" else Image.open(io.BytesIO(content)).size)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out/alpha.png")), RGBA)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("name, target", [("JPEG", "a.png"), ("PNG", "a.jpg"), ("WEBP", "a.webp")])
def test_exif_is_kept_byte_for_byte(tmp_path, name, target, order):
    """But for orientation, and sizes and resolutions of a turned picture."""
    for orientation in (1, 3, 6):
        before, turned = exif(orientation, order), orientation == 6
        assert not copied(saved(RGB, name, exif=before), tmp_path / target)
        found = b"Exif\0\0" + Image.open(tmp_path / target).info["exif"].removeprefix(b"Exif\0\0")
        changed = [place for place in range(len(before)) if found[place] != before[place]]
        assert len(found) == len(before) and cases.ARTIST.encode() in found
        assert len(changed) == (orientation != 1) + 4 * turned  # and a byte of each of the two pairs
        block = Image.Exif()
        block.load(found)
        assert block[0x0112] == 1 and (block[0x011A], block[0x011B]) == ((200, 300) if turned else (300, 200))
        entries = block.get_ifd(0x8769)
        assert (entries[0xA002], entries[0xA003]) == ((21, 30) if turned else (30, 21))


def test_what_a_tiff_says_becomes_exif(tmp_path):
    """Its text as it is, the camera's part, the place; not how its pixels were stored."""
    found = []
    for content in (saved(RGB, "TIFF", exif=exif()),
                    tiff(RGB, 2, ">", t315=cases.ARTIST.encode() + b"\0", t271=b"camera\0")):
        assert not copied(content, tmp_path / "a.png")
        found.append(Image.open(tmp_path / "a.png").getexif())
        assert found[-1][0x010F] == "camera" and {256, 258, 273, 279}.isdisjoint(found[-1])
    assert found[0].get_ifd(0x8769)[0x9003] == cases.TAKEN and found[0].get_ifd(0x8825)[1] == "N"
    assert found[1][0x013B].encode("latin-1") == cases.ARTIST.encode()


XMP_PNG = png(RGB, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP))
XMP_JPEG = with_segments(JPEG, (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP))
MUCH = with_segments(
    JPEG, (0xE1, b"http://ns.adobe.com/xmp/extension/\0"), (0xEB, b"jumdc2pa"), (0xFE, b"page 3"),
    (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x hdrgm:Version="), (0xED, b"Photoshop 3.0\x008BIM" + bytes(8)))
OTHER, UNMEANT = "left out: an ICC profile for other colours", "left out: a channel without a stated meaning"
GAMMA, HDR = chunk(b"gAMA", b"\0\1\x86\xa0"), chunk(b"cICP", b"\x09\x10\0\1")
TEXT = chunk(b"tEXt", b"parameters\0steps"), chunk(b"iTXt", b"x\0\0\0\0\0y")
SAID = {        # content, target, and what is said; empty: nothing may be said, as all is kept
    "chunks": (png(RGB, GAMMA, chunk(b"cHRM", bytes(range(32))), HDR, *TEXT), "a.png", ""),
    "gamma to JPEG": (png(RGB, GAMMA), "a.jpg", "PNG's text or colours: .jpg"),
    "light levels": (png(RGB, chunk(b"cLLI", bytes(8))), "a.png", "left out: chunk b'cLLI'"),
    "text of 80 MB": (png(RGB, chunk(b"zTXt", b"c\0\0" + zlib.compress(bytes(80_000_000), 1))), "a.png", ""),
    "XMP of a PNG": (XMP_PNG, "a.png", ""), "XMP to JPEG": (XMP_PNG, "a.jpg", ""),
    "XMP of a JPEG": (XMP_JPEG, "a.png", ""), "XMP of a TIFF": (tiff(RGB, 2, t700=XMP), "a.png", ""),
    "XMP of 80 KB": (png(RGB, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP * 900)), "a.jpg",
                     "XMP: .jpg cannot hold that"),
    "much of a JPEG": (MUCH, "a.png", "left out: a gain map (HDR), extended XMP, content credentials, "
                                      "IPTC or Photoshop's data, a comment"),
    "film": (JPEG + b"\0\0\0\x18ftypmp42" + bytes(4000), "a.png", "left out: a film"),
    "stereo": (saved(SMOOTH, "MPO", save_all=True, append_images=[SMOOTH]), "a.png", "all but the first of"),
    "fifth channel": (tiff(np.dstack([RGBA, RGBA[..., :1]]), 2, t338=(2, 0)), "a.png", UNMEANT),
    "other tags": (tiff(RGB, 2, t33723=b"IPTC"), "a.png", "left out: tag 33723"),
    "profile of JPEG 2000": (saved(RGB, "JPEG2000") + b"colr\2", "a.png", "left out: an ICC profile"),
    "profile": (saved(SMOOTH, "JPEG", icc_profile=cases.PROFILE), "a.png", ""),
    "profile of 1.2 MB": (saved(RGB, "PNG", icc_profile=cases.PROFILE + bytes(1_200_000)), "a.png", ""),
    "profile, a piece missing": (with_segments(JPEG, (0xE2, b"ICC_PROFILE\0\2\3" + cases.PROFILE)), "a.png",
                                 "left out: a damaged ICC profile"),
    "profile, no zlib": (png(RGB, chunk(b"iCCP", b"a\0\0nonsense")), "a.png", "a damaged ICC profile"),
    "grey profile": (saved(SMOOTH, "JPEG", icc_profile=cases.GREY_PROFILE), "a.png", OTHER),
    "RGB profile of grey": (saved(SMOOTH.convert("L"), "JPEG", icc_profile=cases.PROFILE), "a.png", OTHER),
    "grey profile of grey": (saved(SMOOTH.convert("L"), "JPEG", icc_profile=cases.GREY_PROFILE), "a.png", ""),
    "EXIF of 70 KB": (saved(RGB, "PNG", exif=exif(note=bytes(70_000))), "a.jpg", "EXIF: .jpg cannot hold"),
    "nonsense as EXIF": (saved(RGB, "PNG", exif=b"Exif\0\0nonsense"), "a.png", "left out: damaged EXIF"),
    "resolution": (saved(RGB, "PNG", dpi=(300, 300)), "a.jpg", ""),
    "resolution to WebP": (saved(RGB, "PNG", dpi=(300, 300)), "a.webp", "resolution: .webp cannot hold that"),
    "resolution 0": (tiff(RGB, 2, t282=(0,), t283=(0,)), "a.png", ""),
}

@pytest.mark.parametrize("kind", SAID)
def test_what_is_lost_is_said_and_the_rest_is_kept(tmp_path, kind):
    content, target, said = SAID[kind]
    line = copied(content, tmp_path / target)
    assert said in line and bool(said) == bool(line), line
    after, _ = decode(tmp_path / target, [])
    if said:
        return
    if kind in ("chunks", "text of 80 MB"):                 # as they were
        assert content[33:content.index(b"IDAT") - 4] in (tmp_path / target).read_bytes()
    if b"http://ns.adobe.com/xap" in content or b"com.adobe.xmp" in content:
        assert after.info["xmp"] == UPRIGHT_XMP
    if "profile" in kind:
        assert after.info["icc_profile"] == Image.open(io.BytesIO(content)).info["icc_profile"]
        assert (after.mode == "L") == (kind == "grey profile of grey")
    if kind == "resolution":
        assert round(after.info["dpi"][0]) == 300


@pytest.mark.parametrize("target", ["a.png", "a.jpg"])
@pytest.mark.parametrize("content, shape", [
    (JPEG[:13] + b"\0\0\1\0\2" + JPEG[18:], 0.5), (png(RGB, chunk(b"pHYs", b"\0\0\0\2\0\0\0\1\0")), 2),
    (tiff(RGB, 2, t282=(2,), t283=(1,), t296=(1,)), 2), (saved(RGB, "PNG", dpi=(3, 2), exif=exif(6)), 2 / 3),
], ids=["JPEG", "PNG", "TIFF", "turned"])
def test_pixels_that_are_not_square_stay_so(tmp_path, content, shape, target):
    assert not copied(content, tmp_path / target)
    across, down = map(float, Image.open(tmp_path / target).info["dpi"])
    assert across / down == pytest.approx(shape, abs=0.01)


def test_transparency_becomes_white_where_a_format_has_none(tmp_path):
    pixels = np.dstack([np.full_like(RGB, 90), np.full(RGB.shape[:2], 255, np.uint8)])
    assert not copied(png(pixels), tmp_path / "a.jpg")
    pixels[:, :10], pixels[:, 10:12, 3] = (255, 0, 0, 0), 128           # red, which nobody sees
    assert copied(png(pixels), tmp_path / "a.jpg") == "transparency (put on white): .jpg cannot hold that"
    found = np.asarray(Image.open(tmp_path / "a.jpg")).astype(int)
    assert (found[:, :8] > 252).all() and abs(found[:, 16:] - 90).max() <= 3


def test_formats_are_kept_where_that_is_asked_for(tmp_path, run, same):
    for name in ("a.jpg", "b.JPE", "c.webp", "d.tiff"):
        write_image(tmp_path / "in" / name)
    for arguments, formats in (([], ["PNG"] * 4), (["--keep-format"], ["JPEG", "JPEG", "WEBP", "PNG"])):
        assert run("in", f"out{len(arguments)}", *arguments).returncode == 0
        results = sorted((tmp_path / f"out{len(arguments)}").iterdir())
        assert [Image.open(path).format for path in results] == formats


def test_interrupted_folder_goes_on_where_it_stopped(tmp_path, run, same, checkpoint, monkeypatch):
    for i in range(4):
        write_image(tmp_path / f"in/{i}.png", seed=i)
    read, seen = photographs.read_photograph, []

    def interrupted(path):
        seen.append(path.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(photographs, "read_photograph", interrupted)
    stopped = run("in", "out")
    assert stopped.returncode == 130 and "error: interrupted" in stopped.stderr
    run("in", "out")
    assert seen == ["0.png", "1.png", "2.png", "2.png", "3.png"]
    assert "4 there already, newer than photograph and weights" in run("in", "out").stdout
    assert len(seen) == 5 and len(list((tmp_path / "out").iterdir())) == 4

    # A photograph that changed, or newer weights, give another result: nothing is replaced unasked.
    ahead = time.time() + 9
    os.utime(write_image(tmp_path / "in/1.png", 50, 50), (ahead, ahead))
    message = "1 file there already: .*out/1.png; expected --overwrite or another place"
    assert re.search(message, run("in", "out").stderr)
    os.utime(shutil.copy(checkpoint, tmp_path / "newer.pth"), (ahead, ahead))
    assert "4 files there already: " in run("in", "out", "--set", f"checkpoint={tmp_path}/newer.pth").stderr
    assert Image.open(tmp_path / "out/1.png").size == (40, 32)
    run("in", "out", "--overwrite")
    assert Image.open(tmp_path / "out/1.png").size == (50, 50) and len(seen) == 9


@pytest.mark.parametrize("source, target, message", [
    ("in", "in", "1 file there already"), ("in/a.png", "there.png", "1 file there already"),
    ("pipe.png", "out", "no such file"), ("empty", "out", "no image"), ("in", "out.png", "expected a folder"),
    ("in", "there/notes.txt", "notes.txt: expected a folder"), ("in/a.png", "out.xyz", "or an image's name"),
    ("there/notes.txt", "out", "no image by its name"), ("in/a.png", "out.tif", "expected .png, .jpg or"),
])
def test_wrong_input_and_output(tmp_path, run, source, target, message):
    image = write_image(tmp_path / "in/a.png")
    os.utime(write_image(tmp_path / "there.png"), (0, 0))   # older than the photograph
    put(tmp_path / "there/notes.txt", b"not an image")
    os.mkfifo(tmp_path / "pipe.png")
    before = image.read_bytes()
    (tmp_path / "empty").mkdir()
    result = run(source, target)
    assert result.returncode == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert image.read_bytes() == before and not (tmp_path / "out").exists()


@pytest.mark.parametrize("source, target", [
    ("in", "in"), ("in", "link"), ("in/a.png", "link.png"), ("in/a.png", "hard.png"), ("two", "links")])
def test_a_photograph_is_never_overwritten(tmp_path, run, same, source, target):
    """Nor a result by another one's, which a link makes one file, or what a share makes of names."""
    image = write_image(tmp_path / "in/a.png")
    before = image.read_bytes()
    (tmp_path / "link.png").symlink_to(image)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    os.link(image, tmp_path / "hard.png")
    for seed, name in enumerate(("two/a/1.png", "two/b/1.png", "links/a/old.png")):
        write_image(tmp_path / name, seed=seed)
    (tmp_path / "links/b").symlink_to("a")
    result = run(source, target, "--overwrite")
    assert result.returncode == 3 and "is a photograph or another one's result" in result.stderr
    assert image.read_bytes() == before
    if target == "links":
        assert "two/b/1.png: " in result.stderr and "1 of 2 images" in result.stdout
        assert np.array_equal(Image.open(tmp_path / "links/a/1.png"), Image.open(tmp_path / "two/a/1.png"))


def test_input_and_output_inside_each_other_and_links_in_circles(tmp_path, run, same):
    before = write_image(tmp_path / "all/in/a.png").read_bytes()
    (tmp_path / "all/in/again").symlink_to(tmp_path / "all/in")
    for target in ("all", "all/in/out"):
        for restored in (1, 0):                             # the second run finds everything done
            assert f"{restored} of 1 images restored" in run("all/in", target).stdout
    assert (tmp_path / "all/in/a.png").read_bytes() == before and (tmp_path / "all/a.png").exists()


def test_only_what_cannot_be_read_stays_behind(tmp_path, run, same, monkeypatch):
    """Closed folders, links to themselves, pipes and a name that is too long for the file system."""
    folder = tmp_path / "in"
    for name in ("a.png", "closed/b.png", "below/c.png", f"{'x' * 251}.png"):
        write_image(folder / name)
    write_image(folder / f"{'x' * 251}.jpg")                # would become xxx.jpg.png
    os.mkfifo(folder / "pipe.png")
    (folder / "itself.png").symlink_to("itself.png")
    refuse_to_list(monkeypatch, folder / "closed")
    result = run("in", "out")
    assert result.returncode == 3 and "3 of 6 images restored" in result.stdout
    final = result.stderr.splitlines()[-1]
    for words in ("error: 3 of 6 images not restored, 1 folder not read: ", "in/pipe.png: no regular file",
                  "in/closed: a folder that cannot be read (Permission denied)", "in/itself.png: no regular",
                  ".jpg.png: File name too long"):
        assert words in final
    assert {path.name for path in (tmp_path / "out").rglob("*.png")} == {"a.png", "c.png", f"{'x' * 251}.png"}


def test_keep_tones(tmp_path, run, monkeypatch):
    """A network that repairs noise and brightens: with --keep-tones the noise goes, the brightness stays."""
    monkeypatch.setattr(evaluation, "restore", lambda net, degraded, **_: torch.full_like(degraded, 0.8))
    noisy = np.random.default_rng(0).normal(60, 12, (64, 64, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(tmp_path / "a.png")
    for target, arguments, mean in (("plain.png", [], 204), ("kept.png", ["--keep-tones"], noisy.mean())):
        result = run("a.png", target, *arguments)
        assert result.returncode == 0 and ("tones of the input kept" in result.stdout) == bool(arguments)
        restored = np.asarray(Image.open(tmp_path / target))
        assert abs(restored.mean() - mean) < 0.6 and restored.std() < 2


def test_the_page_of_photographs(tmp_path, run, same):
    write_image(tmp_path / "in/<img src=x>.png")
    write_image(tmp_path / "in/b.tif", seed=1)
    put(tmp_path / "in/c.jpg", saved(SMOOTH.convert("L"), "JPEG", icc_profile=cases.GREY_PROFILE))
    put(tmp_path / "in/broken.png", b"no image")
    for _ in range(2):                                      # again: all of them, also those restored before
        result = run("in", "out", "--report")
        assert result.returncode == 3 and f"look at them: {tmp_path / 'out/index.html'}" in result.stdout
        assert (tmp_path / "out/index.html").read_text("utf-8").count('"thumbnail"') == 3


def test_an_output_that_lacks_letters_of_a_name(tmp_path, run, same):
    """As on Windows: cp1252 has no Chinese, and no encoding has what a name's bytes mean in none."""
    for name in ("写真.png", os.fsdecode(b"\xe9t\xe9.png"), "a\nb.png", "50% #1?.png", "-v.png"):
        write_image(tmp_path / "a.png").rename(put(tmp_path / "in" / name, b""))
    for name in ("写真.txt", "写真 2.png"):
        put(tmp_path / "in" / name, b"no image")
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with mock.patch("contextlib.redirect_stdout", lambda _: mock.patch.object(sys, "stdout", output)):
        assert run("in", "out").returncode == 3
    output.flush()
    text = output.buffer.getvalue().decode("cp1252")
    assert "left out: " in text and r"\u5199\u771f.txt, no photograph" in text
    assert r"\u5199\u771f 2.png: cannot be read" in text and len(list((tmp_path / "out").iterdir())) == 5


def test_names_that_a_file_system_does_not_tell_apart(tmp_path, run, same):
    """Case and Unicode forms: each has a result of another name."""
    names = ["IMG_1.JPG", "img_1.webp", "A.png", "a.png", "a.png.png", "sub/b.png", "SUB/b.png", "c.jpg",
             "c.jpg.png", "c.png", *(unicodedata.normalize(form, "Zürich.png") for form in ("NFC", "NFD"))]
    for seed, name in enumerate(names):
        write_image(tmp_path / "in" / name, seed=seed)
    assert run("in", "out").returncode == 0
    assert f"{len(names)} there already" in run("in", "out").stdout
    files = [str(path) for path in (tmp_path / "out").rglob("*.*")]
    assert len(files) == len({unicodedata.normalize("NFC", path).casefold() for path in files}) == len(names)


def test_a_name_that_the_target_refuses(tmp_path, run, same, monkeypatch):
    """The file system does, or a file is where a folder must be."""
    for name in ("a.png", "sub/b.png", "taken/c.png"):
        write_image(tmp_path / "in" / name)
    put(tmp_path / "out/taken", b"mine")
    replace = os.replace

    def refused(source, target):
        if "/sub/" in str(target):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)
    result = run("in", "out")
    assert result.returncode == 3 and "1 of 3 images restored" in result.stdout
    for name, number in (("sub/b.png", errno.EINVAL), ("taken/c.png", errno.EEXIST)):
        assert f"in/{name}: {tmp_path}/out/{name}: {os.strerror(number)}" in result.stderr
    assert not list((tmp_path / "out").rglob(".partial-*"))


def test_no_place_for_any_result(tmp_path, run, same, monkeypatch):
    """One line that names the file, and nothing half."""
    write_image(tmp_path / "in/a.png")

    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    result = run("in", "out")
    assert result.returncode == 1               # one that fails for itself: 3
    assert result.stderr.splitlines()[-1] == f"error: {tmp_path}/out/a.png: No space left on device"
    assert not list((tmp_path / "out").iterdir())


def test_clocks_that_are_ahead(tmp_path, run, same, monkeypatch):
    """A camera's, or this one of the server's: the same command goes on all the same."""
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / "in" / name)
    ahead = time.time() + 3 * 3600
    os.utime(tmp_path / "in/b.png", (ahead, ahead))
    assert run("in", "out").returncode == 0
    (tmp_path / "out/c.png").unlink()
    assert "1 of 3 images restored" in run("in", "out").stdout
    monkeypatch.setattr(os, "utime", mock.Mock(side_effect=PermissionError(errno.EPERM, "not permitted")))
    assert run("in", "other").returncode == 0               # restored, if not to be continued


def test_what_a_kill_left_is_removed(tmp_path, run, same):
    """Of its own files alone: another command may be writing beside it."""
    write_image(tmp_path / "in/a.png")
    left, other = (put(tmp_path / "out" / f"{partial_start(Path(name))}0123abcd.png", b"half")
                   for name in ("a.png", "b.png"))
    assert run("in", "out").returncode == 0
    assert not left.exists() and other.exists() and (tmp_path / "out/a.png").exists()


@pytest.mark.parametrize("number, of_file, raised", [
    (errno.EINVAL, False, False), (errno.ENOTSUP, True, False), (errno.EIO, True, True),
    (errno.EIO, False, True)])
def test_shares_that_cannot_be_asked_when_a_file_is_safe(tmp_path, monkeypatch, number, of_file, raised):
    def fsync(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode) == of_file:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=f"{tmp_path}/a.txt") if raised else contextlib.nullcontext():
        write_text(tmp_path / "a.txt", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"] * (not raised or not of_file)

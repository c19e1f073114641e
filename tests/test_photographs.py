"""test.py --input: photographs as they are, interrupted folders, what is refused."""

import contextlib
import io
import os
import re
import runpy
import shutil
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import photograph_cases
from conftest import REPOSITORY, run_script, write_image
from photograph_cases import DEEP, PROFILE, RGB, TAKEN, exif
from test_evaluation import options, restored_by_hand
from test_images import refuse_to_list
from utils import evaluation, photographs
from utils.images import read_picture
from utils.photographs import save_png16, save_tiff16


def run(tmp_path: Path, checkpoint: Path, source: object, target: object, *arguments: str, **changes):
    """`test.py --input SOURCE --output TARGET`, with further arguments and changed options, in float32."""
    return run_script("test.py", "--opt", options(tmp_path, checkpoint, **{"precision": "float32"} | changes),
                      "--input", source, "--output", target, *arguments)


def restored_8_bits(checkpoint: Path, pixels: np.ndarray) -> np.ndarray:
    """[H,W,3] uint8, restored without test.py."""
    return (restored_by_hand(checkpoint, pixels).clip(0, 1) * 255 + 0.5).astype(np.uint8)


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    photograph_cases.write(folder)
    return folder


def test_every_kind_of_photograph(tmp_path, checkpoint, cases):
    before = {path: path.read_bytes() for path in cases.rglob("*") if path.is_file()}
    result = run(tmp_path, checkpoint, cases, tmp_path / "out")
    assert result.returncode == 3, result.stderr
    assert "23 of 30 images restored" in result.stdout
    assert "; 2 files left out, no photographs" in result.stdout
    assert {path: path.read_bytes() for path in before} == before

    folder = tmp_path / "out"
    out = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    deep_tiff = out.pop("deep.tif")
    opened = {name: Image.open(path) for name, path in out.items()}
    assert {name: (image.format, image.mode, image.size) for name, image in opened.items()} == {
        "phone.jpg.png": ("PNG", "RGB", (21, 30)),              # upright: EXIF orientation 6 turns 30x21
        "phone.png": ("PNG", "RGB", (30, 21)), "transparent.png": ("PNG", "RGBA", (30, 21)),
        "grey.png": ("PNG", "L", (30, 21)), "bits.png": ("PNG", "L", (30, 21)),
        "deep_grey.png": ("PNG", "I;16", (30, 21)), "deep_grey_alpha.png": ("PNG", "RGBA", (30, 21)),
        "deep.png": ("PNG", "RGB", (30, 21)), "deep_alpha.png": ("PNG", "RGBA", (30, 21)),
        "palette.png": ("PNG", "RGB", (30, 21)), "palette_alpha.png": ("PNG", "RGBA", (30, 21)),
        "print.png": ("PNG", "RGB", (30, 21)), "print_profile.png": ("PNG", "RGB", (30, 21)),
        "lab.tif": ("TIFF", "RGB", (30, 21)), "adobe.png": ("PNG", "RGB", (30, 21)),
        "dot.bmp": ("BMP", "RGB", (1, 1)), "Änderung an Bord 写真.png": ("PNG", "RGB", (30, 21)),
        "sub folder/below/phone.png": ("PNG", "RGB", (30, 21)),
        "animated.gif.png": ("PNG", "RGB", (30, 21)), "still.png": ("PNG", "RGBA", (30, 21)),
        "animated.png": ("PNG", "RGB", (30, 21)), "pages.tif": ("TIFF", "RGB", (30, 21)),
    }
    deep_names = ("deep_grey_alpha.png", "deep.png", "deep_alpha.png")
    assert [opened[name].tile[0].args for name in deep_names] == ["LA;16B", "RGB;16B", "RGBA;16B"]

    # Pixels: those of the upright photograph, restored; 16 bits stay 16 bits.
    assert np.array_equal(np.asarray(opened["adobe.png"]), restored_8_bits(checkpoint, RGB))
    turned = np.asarray(Image.fromarray(restored_pixels(opened["phone.png"])).rotate(180))
    # The network is not equivariant, the photograph is noise.
    assert np.abs(turned.astype(int) - restored_pixels(opened["adobe.png"])).mean() < 30
    deep = read_picture(tmp_path / "out/deep.png").pixels
    assert np.array_equal(deep, tifffile.imread(deep_tiff)) and len(np.unique(deep & 255)) > 200
    for name, expected in (("deep_alpha.png", DEEP[..., 3]), ("deep_grey_alpha.png", DEEP[..., 1]),
                           ("transparent.png", DEEP[..., 3] >> 8)):
        assert np.array_equal(read_picture(out[name]).alpha[..., 0], expected)

    # Metadata: profile, camera, resolution; the orientation is applied and gone.
    phone = opened["phone.jpg.png"]
    assert phone.getexif()[0x010F] == "camera" and phone.getexif().get(0x0112, 1) == 1
    assert phone.info["icc_profile"] == opened["adobe.png"].info["icc_profile"] == PROFILE
    assert round(phone.info["dpi"][0]) == 300
    assert Image.open(deep_tiff).info["icc_profile"] == PROFILE
    assert "icc_profile" not in opened["print_profile.png"].info

    # A line for everything that a user should know, and one for each file that was not restored.
    for line in ("animated.gif: 2 frames, only the first is restored", "animated.png: 2 frames",
                 "pages.tif: 2 frames", "print.jpg: CMYK without an ICC profile",
                 "print_profile.jpg: CMYK without an ICC profile that can be used",
                 "notes.txt, no photograph", "film.mov, no photograph"):
        assert line in result.stdout, line
    final = result.stderr.splitlines()[-1]
    assert final.startswith("error: 7 of 30 images not restored: ")
    for name, reason in (("cut.png", ""), ("cut.jpg", "truncated"), ("flipped.png", ""),
                         ("bomb.png", "decompression bomb"), ("empty.png", ""), ("text.jpg", ""),
                         ("phone.heic", "HEIC needs a package: pip install pillow-heif|cannot be read")):
        (own,) = (part for part in final.split("; ") if f"/{name}: " in part)
        assert any(word in own for word in reason.split("|")), own
    assert "Traceback" not in result.stderr


def restored_pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def test_sixteen_bits_are_read_as_they_were_written(tmp_path):
    for channels in (1, 2, 3, 4):
        path = tmp_path / f"{channels}.png"
        path.write_bytes(photograph_cases.png16(DEEP[..., :channels]))
        photograph = read_picture(path)
        assert photograph.bits == 16 and photograph.grey == (channels < 3)
        colours = DEEP[..., :channels - (channels in (2, 4))]
        found = (photograph.floats() * 65535 + 0.5).astype(np.uint16)
        assert np.array_equal(found, np.broadcast_to(colours, (21, 30, 3)))
        save_png16(str(tmp_path / "again.png"), DEEP[..., :channels], {"icc_profile": PROFILE})
        again = read_picture(tmp_path / "again.png")
        assert np.array_equal(again.pixels, photograph.pixels) and again.metadata["icc_profile"] == PROFILE
        if channels in (2, 4):
            assert np.array_equal(again.alpha[..., 0], DEEP[..., channels - 1])


def test_lab_is_converted_not_reinterpreted(cases):
    """sRGB -> LAB -> sRGB loses some levels to rounding and to LAB's 8 bits, not the colours."""
    pixels = read_picture(cases / "lab.tif").floats() * 255
    assert np.abs(pixels - RGB).mean() < 4


def test_formats_are_kept_where_that_is_asked_for(tmp_path, checkpoint):
    write_image(tmp_path / "in/a.jpg")
    assert run(tmp_path, checkpoint, tmp_path / "in", tmp_path / "out", "--keep-format").returncode == 0
    assert Image.open(tmp_path / "out/a.jpg").format == "JPEG"
    assert run(tmp_path, checkpoint, tmp_path / "in/a.jpg", tmp_path / "b.tif").returncode == 0
    assert Image.open(tmp_path / "b.tif").format == "TIFF"


def test_single_photograph_in_strips(tmp_path, checkpoint):
    path = write_image(tmp_path / "photo.png", 70, 50)
    for target, expected in (("new/other.png", "new/other.png"), ("folder", "folder/photo.png")):
        result = run(tmp_path, checkpoint, path, tmp_path / target, "--set", "strip=8")
        assert result.returncode == 0, result.stderr
        assert Image.open(tmp_path / expected).size == (70, 50)


def test_interrupted_folder_goes_on_where_it_stopped(tmp_path, checkpoint, monkeypatch):
    for i in range(4):
        write_image(tmp_path / f"in/{i}.png", seed=i)
    read, seen = read_picture, []

    def interrupted(path):
        seen.append(path.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(path)

    def restore(*arguments: str):
        return run(tmp_path, checkpoint, tmp_path / "in", tmp_path / "out", *arguments)

    monkeypatch.setattr(photographs, "read_picture", interrupted)
    stopped = restore()
    assert re.search("interrupted before .*2.png; the same command goes on where it stopped", stopped.stderr)
    assert stopped.returncode == 130
    restore()
    assert seen == ["0.png", "1.png", "2.png", "2.png", "3.png"]
    assert "there already, newer than photograph and weights" in restore().stdout   # everything is done
    assert len(seen) == 5 and len(list((tmp_path / "out").iterdir())) == 4

    # A photograph that changed, or newer weights, give another result: nothing is replaced unasked.
    write_image(tmp_path / "in/1.png", 50, 50)
    before = (tmp_path / "out/1.png").read_bytes()
    message = "1 file there already: .*out/1.png; expected --overwrite or another place"
    assert re.search(message, restore().stderr)
    newer = shutil.copy(checkpoint, tmp_path / "newer.pth")
    assert re.search("4 files there already: ", restore("--set", f"checkpoint={newer}").stderr)
    assert (tmp_path / "out/1.png").read_bytes() == before
    restore("--overwrite")
    assert Image.open(tmp_path / "out/1.png").size == (50, 50) and len(seen) == 9


@pytest.mark.parametrize("source, target, message", [
    ("in", "in", "would overwrite"), ("in/a.png", "in/a.png", "would overwrite"),
    ("gone", "out", "no such file or folder"),
    ("empty", "out", "no images"), ("in", "out.png", "expected a folder"),
    ("in/a.png", "there.png", "1 file there already"),
    ("in", "there", "1 file there already"), ("nested/in", "nested", "would overwrite"),
    ("there/notes.txt", "out", "no image by its name"), ("in/a.png", "out.txt", "or an image's name"),
    ("in", "there/notes.txt", "notes.txt: expected a folder"), ("in/a.npy", "out", "no image by its name"),
    ("pipe.png", "out", "neither a regular file nor a folder"),
    ("itself.png", "out", "neither a regular file nor a folder"),
])
def test_wrong_input_and_output(tmp_path, checkpoint, source, target, message):
    image = write_image(tmp_path / "in/a.png")
    for name in ("there.png", "there/a.png", "nested/in/a.png", "nested/in/in/a.png"):
        os.utime(write_image(tmp_path / name), (0, 0))      # older than the photograph
    (tmp_path / "there/notes.txt").write_text("not an image")
    np.save(tmp_path / "in/a.npy", np.zeros((4, 4, 3)))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "itself.png").symlink_to("itself.png")
    before = image.read_bytes()
    (tmp_path / "empty").mkdir()
    result = run(tmp_path, checkpoint, tmp_path / source, tmp_path / target)
    assert result.returncode == 1 and message in result.stderr and len(result.stderr.splitlines()) == 1
    assert image.read_bytes() == before and not (tmp_path / "out").exists()


def test_formats_that_cannot_be_written_are_refused_before_the_work(tmp_path, checkpoint, monkeypatch):
    image = write_image(tmp_path / "in/a.png")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)           # as if it were not installed
    monkeypatch.setattr(Image, "registered_extensions", lambda: {".png": "PNG"})
    for name, message in (("out.heic", "pip install pillow-heif"), ("out.avif", "cannot write .avif")):
        result = run(tmp_path, checkpoint, image, tmp_path / name)
        assert result.returncode == 1 and re.search(f"{name}: .*{message}", result.stderr)


def test_input_inside_output(tmp_path, checkpoint):
    before = write_image(tmp_path / "all/in/a.png").read_bytes()
    for _ in range(2):                                          # the second run finds everything done
        assert run(tmp_path, checkpoint, tmp_path / "all/in", tmp_path / "all").returncode == 0
    assert (tmp_path / "all/in/a.png").read_bytes() == before and (tmp_path / "all/a.png").exists()
    names = sorted(path.name for path in (tmp_path / "all").rglob("*"))
    assert names == ["a.png", "a.png", "in"]


def test_links_that_lead_in_circles(tmp_path, checkpoint):
    write_image(tmp_path / "in/a.png")
    os.symlink(tmp_path / "in", tmp_path / "in/again")
    result = run(tmp_path, checkpoint, tmp_path / "in", tmp_path / "out")
    assert result.returncode == 0 and "1 of 1 images restored" in result.stdout


@pytest.mark.parametrize("fits, rows", [(32, 32), (2, 2), (0, None)])
def test_out_of_memory_falls_back_to_smaller_strips(tmp_path, checkpoint, monkeypatch, fits, rows):
    """A device on which `fits` rows fit: the result is that of the whole image, and what happened is said."""
    path = write_image(tmp_path / "a.png", 40, 64)
    restore, tried = evaluation._restore, []

    def small_device(net, degraded, rows, bfloat16):
        tried.append(rows)
        if 0 < rows <= fits:
            return restore(net, degraded, rows, bfloat16)
        if len(tried) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(evaluation, "_restore", small_device)
    result = run(tmp_path, checkpoint, path, tmp_path / "out.png", strip=0)
    if rows is None:
        assert re.search("a.png: 40x64 pixels: not enough memory on cpu, even row by row", result.stderr)
        assert result.returncode == 3 and not (tmp_path / "out.png").exists()
        return
    assert tried[-1] == rows
    assert f"not enough memory on cpu, once more in strips of {rows} rows" in result.stdout
    expected = restored_8_bits(checkpoint, np.asarray(Image.open(path)))
    assert np.abs(np.asarray(Image.open(tmp_path / "out.png")).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_exif_of_a_tiff_is_kept(tmp_path, checkpoint, bits):
    """Make and date, upright, as TIFF and as PNG; nothing says how the other file stores its pixels."""
    path = tmp_path / "in/a.tif"
    path.parent.mkdir()
    metadata = {"exif": exif(6).tobytes(), "icc_profile": PROFILE, "dpi": (300.0, 300.0)}
    if bits == 8:
        Image.fromarray(RGB).save(path, **metadata)
    else:
        save_tiff16(str(path), DEEP, metadata)
    for target in ("out.tif", "out.png"):
        assert run(tmp_path, checkpoint, path, tmp_path / target).returncode == 0
        result = read_picture(tmp_path / target)
        assert result.bits == bits and result.pixels.shape == (30, 21, 3 if bits == 8 else 4)
        assert not result.remarks
        assert result.metadata["icc_profile"] == PROFILE and round(result.metadata["dpi"][0]) == 300
        block = Image.Exif()
        block.load(result.metadata["exif"])
        assert block[0x010F] == "camera" and set(block) == {0x010F, 0x8769, 0x8825}     # no orientation
        assert block.get_ifd(0x8769)[0x9003] == TAKEN and block.get_ifd(0x8825)[1] == "N"
    if bits == 16:
        png = read_picture(tmp_path / "out.png").pixels
        assert np.array_equal(tifffile.imread(tmp_path / "out.tif"), png)


def test_only_what_cannot_be_read_stays_behind(tmp_path, checkpoint, monkeypatch):
    """Closed folders, links to themselves, pipes, sockets and a name that is too long for the file system."""
    folder = tmp_path / "in"
    for name in ("a.png", "closed/b.png", "below/c.png", f"{'x' * 251}.png"):
        write_image(folder / name)
    write_image(folder / f"{'x' * 251}.jpg")                # would become xxx.jpg.png
    os.mkfifo(folder / "pipe.png")
    (folder / "itself.png").symlink_to("itself.png")
    (folder / "itself").symlink_to("itself")
    refuse_to_list(monkeypatch, folder / "closed")
    result = run(tmp_path, checkpoint, folder, tmp_path / "out")
    assert result.returncode == 3 and "3 of 6 images restored" in result.stdout
    assert len(result.stderr.splitlines()[-1:]) == 1 and "Traceback" not in result.stderr
    final = result.stderr.splitlines()[-1]
    assert final.startswith("error: 3 of 6 images not restored, 1 folder not read: ")
    for line in ("in/closed: a folder that cannot be read (Permission denied)",
                 "in/pipe.png: no regular file",
                 "in/itself.png: a link that leads to no file", ".jpg.png: File name too long"):
        assert line in final and line in result.stdout
    assert {path.name for path in (tmp_path / "out").rglob("*.png")} == {"a.png", "c.png", f"{'x' * 251}.png"}
    again = run(tmp_path, checkpoint, folder, tmp_path / "out")
    assert again.returncode == 3 and "0 of 6 images restored; 3 there already" in again.stdout


def test_many_failures_are_one_readable_line(tmp_path, checkpoint):
    for i in range(30):
        write_image(tmp_path / f"in/{i:02}.png").write_bytes(b"no image")
    result = run(tmp_path, checkpoint, tmp_path / "in", tmp_path / "out")
    assert result.returncode == 3 and result.stdout.count("cannot be read as an image") == 30
    final = result.stderr.splitlines()[-1]
    assert final.count("cannot be read as an image") == 10 and final.endswith("; ...")
    assert final.count("in/00.png") == 1


def test_an_output_that_lacks_letters_of_a_name(tmp_path, checkpoint):
    """As on Windows: cp1252 has no Chinese, and no encoding has what a name's bytes mean in none."""
    names = ["写真.png", os.fsdecode(b"\xe9t\xe9.png"), "a\nb.png"]
    (tmp_path / "in").mkdir()
    for name in names:
        write_image(tmp_path / "a.png").rename(tmp_path / "in" / name)
    for name in ("写真.txt", "写真 2.png"):
        (tmp_path / "in" / name).write_bytes(b"not an image")
    option_file, folder, target = options(tmp_path, checkpoint), tmp_path / "in", tmp_path / "out"
    arguments = "--opt", option_file, "--input", folder, "--output", target
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    with (mock.patch.object(sys, "argv", ["test.py", *map(str, arguments)]), contextlib.chdir(REPOSITORY),
          contextlib.redirect_stdout(output), contextlib.redirect_stderr(io.StringIO()),
          pytest.raises(SystemExit) as end):
        runpy.run_path("test.py", run_name="__main__")
    assert end.value.code == 3
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == sorted(names)
    output.flush()
    text = output.buffer.getvalue().decode("cp1252")
    assert "left out: " in text and r"\u5199\u771f.txt, no photograph" in text
    assert r"\u5199\u771f 2.png: cannot be read" in text


def test_transparency_becomes_white_where_a_format_has_none(tmp_path, checkpoint):
    pixels = np.dstack([np.full_like(RGB, 90), np.full(RGB.shape[:2], 255, np.uint8)])
    pixels[:, :10], pixels[:, 10:12, 3] = (255, 0, 0, 0), 128           # red, which nobody sees
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in/a.png")
    for target in ("a.jpg", "a.bmp"):
        result = run(tmp_path, checkpoint, tmp_path / "in/a.png", tmp_path / target)
        assert result.returncode == 0
        assert f"a.png: transparency, which {target[1:]} cannot hold: put on white" in result.stdout
        found = np.asarray(Image.open(tmp_path / target)).astype(int)
        seen = restored_8_bits(checkpoint, read_picture(tmp_path / "in/a.png").rgb())
        cover = pixels[..., 3:] / 255
        difference = np.abs(found - (seen * cover + 255 * (1 - cover)))
        exact = target == "a.bmp"
        assert difference.max() < 1 if exact else difference[:, :8].max() <= 3 and difference.mean() < 3
    opaque = pixels.copy()
    opaque[..., 3] = 255
    Image.fromarray(opaque).save(tmp_path / "in/a.png")
    assert "white" not in run(tmp_path, checkpoint, tmp_path / "in/a.png", tmp_path / "b.jpg").stdout


def test_what_is_hidden_does_not_change_what_is_seen(tmp_path, checkpoint):
    alpha = np.full(RGB.shape[:2], 255, np.uint8)
    alpha[5:15, 8:20], alpha[0, 0] = 0, 77
    results = []
    for hidden in (0, 255):
        pixels = np.dstack([np.where(alpha[..., None] == 0, hidden, RGB), alpha]).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        assert run(tmp_path, checkpoint, tmp_path / "a.png", tmp_path / f"{hidden}.png").returncode == 0
        results.append(np.asarray(Image.open(tmp_path / f"{hidden}.png")))
    assert np.array_equal(*results) and np.array_equal(results[0][..., 3], alpha)
    filled = RGB.copy()
    filled[alpha == 0] = np.round(RGB[alpha > 0].mean(axis=0))
    assert np.array_equal(results[0][..., :3], restored_8_bits(checkpoint, filled))


def test_what_a_format_cannot_hold_is_said(tmp_path, checkpoint):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/deep.png").write_bytes(photograph_cases.png16(DEEP[..., :3]))
    Image.fromarray(RGB).save(tmp_path / "in/phone.jpg", exif=exif(1).tobytes())
    result = run(tmp_path, checkpoint, tmp_path / "in/deep.png", tmp_path / "a.webp")
    assert result.returncode == 0 and "deep.png: 16 bits a channel, of which .webp gets 8" in result.stdout
    result = run(tmp_path, checkpoint, tmp_path / "in/phone.jpg", tmp_path / "a.bmp")
    assert result.returncode == 0
    assert "phone.jpg: EXIF or an ICC profile, which .bmp cannot hold" in result.stdout


def test_new_extensions(tmp_path, checkpoint):
    """Formats that lose come back as PNG, others as they came; what is too large for one stays behind."""
    for name in ("a.jfif", "b.JPE", "c.pgm", "d.pnm", "e.jp2", "f.pbm", "g.PNG"):
        path = write_image(tmp_path / "in" / name)
        if name == "c.pgm":
            Image.open(path).convert("L").save(path)
    result = run(tmp_path, checkpoint, tmp_path / "in", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    results = {path.name: Image.open(path) for path in (tmp_path / "out").iterdir()}
    assert {name: (image.format, image.mode) for name, image in results.items()} == {
        "a.png": ("PNG", "RGB"), "b.png": ("PNG", "RGB"), "c.pgm": ("PPM", "L"), "d.pnm": ("PPM", "RGB"),
        "e.png": ("PNG", "RGB"), "f.png": ("PNG", "RGB"), "g.PNG": ("PNG", "RGB")}
    assert run(tmp_path, checkpoint, tmp_path / "in", tmp_path / "kept", "--keep-format").returncode == 0
    kept = {path.name: Image.open(path).format for path in (tmp_path / "kept").glob("*.j*")}
    assert kept == {"a.jfif": "JPEG", "e.jp2": "JPEG2000"}
    assert Image.open(tmp_path / "kept/b.JPE").format == "JPEG"
    Image.new("L", (17000, 2)).save(tmp_path / "wide.png")
    result = run(tmp_path, checkpoint, tmp_path / "wide.png", tmp_path / "wide.webp")
    assert result.returncode == 3 and "wide.webp: cannot be written as WEBP" in result.stderr

"""test.py --input: photographs as they are, interrupted folders, what is refused."""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import photograph_cases
import test as script
from conftest import run_script, write_image
from photograph_cases import DEEP, PROFILE, RGB
from test_evaluation import options, restored_by_hand
from utils import evaluation
from utils.errors import InputError
from utils.photographs import Photograph, save_png16


def run(tmp_path: Path, checkpoint: Path, source: object, target: object, *arguments: str):
    return run_script("test.py", "--opt", options(tmp_path, checkpoint), "--input", source, "--output", target, *arguments)


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    photograph_cases.write(folder)
    return folder


def test_every_kind_of_photograph(tmp_path, checkpoint, cases):
    before = {path: path.read_bytes() for path in cases.rglob("*") if path.is_file()}
    result = run(tmp_path, checkpoint, cases, tmp_path / "out")
    assert result.returncode == 3, result.stderr
    assert "24 of 31 images restored" in result.stdout and "; 2 files left out, no photographs" in result.stdout
    assert {path: path.read_bytes() for path in before} == before

    out = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with open(out.pop("restored.csv"), newline="") as file:
        assert {row["output"] for row in csv.DictReader(file)} == set(out)
    arrays = {name: out.pop(name) for name in ("raw.npy", "deep.tif")}
    images = {name: Image.open(path) for name, path in out.items()}
    assert {name: (image.format, image.mode, image.size) for name, image in images.items()} == {
        "phone.jpg.png": ("PNG", "RGB", (21, 30)),              # upright: EXIF orientation 6 turns 30x21
        "phone.png": ("PNG", "RGB", (30, 21)), "transparent.png": ("PNG", "RGBA", (30, 21)), "grey.png": ("PNG", "L", (30, 21)),
        "bits.png": ("PNG", "L", (30, 21)), "deep_grey.png": ("PNG", "I;16", (30, 21)), "deep_grey_alpha.png": ("PNG", "RGBA", (30, 21)),
        "deep.png": ("PNG", "RGB", (30, 21)), "deep_alpha.png": ("PNG", "RGBA", (30, 21)), "palette.png": ("PNG", "RGB", (30, 21)),
        "palette_alpha.png": ("PNG", "RGBA", (30, 21)), "print.png": ("PNG", "RGB", (30, 21)), "print_profile.png": ("PNG", "RGB", (30, 21)),
        "lab.tif": ("TIFF", "RGB", (30, 21)), "adobe.png": ("PNG", "RGB", (30, 21)), "dot.bmp": ("BMP", "RGB", (1, 1)),
        "Änderung an Bord 写真.png": ("PNG", "RGB", (30, 21)), "sub folder/below/phone.png": ("PNG", "RGB", (30, 21)),
        "animated.gif.png": ("PNG", "RGB", (30, 21)), "still.png": ("PNG", "RGBA", (30, 21)), "animated.png": ("PNG", "RGB", (30, 21)), "pages.tif": ("TIFF", "RGB", (30, 21)),
    }
    assert [images[name].tile[0].args for name in ("deep_grey_alpha.png", "deep.png", "deep_alpha.png")] == ["LA;16B", "RGB;16B", "RGBA;16B"]

    # Pixels: those of the upright photograph, restored; 16 bits stay 16 bits; an array is not clipped.
    assert np.array_equal(np.asarray(images["adobe.png"]), (restored_by_hand(checkpoint, RGB).clip(0, 1) * 255 + 0.5).astype(np.uint8))
    turned = np.asarray(Image.fromarray(restored_pixels(images["phone.png"])).rotate(180))
    assert np.abs(turned.astype(int) - restored_pixels(images["adobe.png"])).mean() < 30       # the network is not equivariant, the photograph is noise
    deep = Photograph.read(tmp_path / "out/deep.png").pixels
    assert np.array_equal((deep * 65535 + 0.5).astype(np.uint16), tifffile.imread(arrays["deep.tif"]))
    assert len(np.unique(tifffile.imread(arrays["deep.tif"]) & 255)) > 200
    alpha = (Photograph.read(tmp_path / "out" / name).alpha for name in ("deep_alpha.png", "deep_grey_alpha.png", "transparent.png"))
    for found, expected in zip(alpha, (DEEP[..., 3], DEEP[..., 1], DEEP[..., 3] >> 8)):
        assert np.array_equal(found, expected)
    assert np.load(arrays["raw.npy"]).max() > 1

    # Metadata: profile, camera, resolution; the orientation is applied and gone.
    phone = images["phone.jpg.png"]
    assert phone.getexif()[0x010F] == "camera" and phone.getexif().get(0x0112, 1) == 1
    assert phone.info["icc_profile"] == images["adobe.png"].info["icc_profile"] == PROFILE and round(phone.info["dpi"][0]) == 300
    assert Image.open(arrays["deep.tif"]).info["icc_profile"] == PROFILE
    assert "icc_profile" not in images["print_profile.png"].info

    # A line for everything that a user should know, and one for each file that was not restored.
    for line in ("animated.gif: 2 frames, only the first is restored", "animated.png: 2 frames", "pages.tif: 2 frames", "print.jpg: CMYK with no ICC profile",
                 "print_profile.jpg: CMYK with an ICC profile that cannot be used", "notes.txt, no photograph", "film.mov, no photograph"):
        assert line in result.stdout, line
    final = result.stderr.splitlines()[-1]
    assert final.startswith("error: 7 of 31 images not restored: ")
    for name, reason in (("cut.png", ""), ("cut.jpg", "truncated"), ("flipped.png", ""), ("bomb.png", "decompression bomb"), ("empty.png", ""),
                         ("text.jpg", ""), ("phone.heic", "HEIC needs a package: pip install pillow-heif|cannot be read")):
        (own,) = (part for part in final.split("; ") if f"/{name}: " in part)
        assert any(word in own for word in reason.split("|")), own
    assert "Traceback" not in result.stderr


def restored_pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def test_sixteen_bits_are_read_as_they_were_written(tmp_path):
    for channels in (1, 2, 3, 4):
        path = tmp_path / f"{channels}.png"
        path.write_bytes(photograph_cases.png16(DEEP[..., :channels]))
        photograph = Photograph.read(path)
        assert photograph.bits == 16 and photograph.grey == (channels < 3)
        colours = DEEP[..., :channels - (channels in (2, 4))]
        assert np.array_equal((photograph.pixels * 65535 + 0.5).astype(np.uint16), np.broadcast_to(colours, (21, 30, 3)))
        save_png16(str(tmp_path / "again.png"), DEEP[..., :channels], {"icc_profile": PROFILE})
        again = Photograph.read(tmp_path / "again.png")
        assert np.array_equal(again.pixels, photograph.pixels) and again.metadata["icc_profile"] == PROFILE
        if channels in (2, 4):
            assert np.array_equal(again.alpha, DEEP[..., channels - 1])


def test_lab_is_converted_not_reinterpreted(cases):
    """sRGB -> LAB -> sRGB loses some levels to rounding and to LAB's 8 bits, not the colours."""
    pixels = Photograph.read(cases / "lab.tif").pixels * 255
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
    read, seen = Photograph.read, []

    def interrupted(path):
        seen.append(path.name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(path)

    command = ["--opt", options(tmp_path, checkpoint), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(script.Photograph, "read", interrupted)
    with pytest.raises(InputError, match="interrupted before .*2.png; the same command goes on where it stopped") as stopped:
        script.main(command)
    assert stopped.value.status == 130
    with open(tmp_path / "out/restored.csv", "a") as file:
        file.write("2.png,12")                                  # a kill in the middle of a row
    script.main(command)
    assert seen == ["0.png", "1.png", "2.png", "2.png", "3.png"]
    script.main(command)                                        # everything is done
    assert len(seen) == 5 and len(list((tmp_path / "out").iterdir())) == 5

    # A photograph that changed, or other weights, is another result: nothing is replaced unasked.
    write_image(tmp_path / "in/1.png", 50, 50)
    before = (tmp_path / "out/1.png").read_bytes()
    with pytest.raises(InputError, match="1 file there already: .*out/1.png; expected --overwrite or another place"):
        script.main(command)
    assert (tmp_path / "out/1.png").read_bytes() == before
    script.main([*command, "--overwrite"])
    assert Image.open(tmp_path / "out/1.png").size == (50, 50) and len(seen) == 9


def test_a_result_is_never_without_its_row(tmp_path, checkpoint, monkeypatch):
    """Killed between the row and the result, or just after both: the next run goes on."""
    for i in range(2):
        write_image(tmp_path / f"in/{i}.png", seed=i)
    command = ["--opt", options(tmp_path, checkpoint), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(script.Photograph, "write", lambda *_: 1 / 0)
        script.main(command)
    script.main(command)
    assert (tmp_path / "out/0.png").exists() and (tmp_path / "out/1.png").exists()


@pytest.mark.parametrize("source, target, message", [
    ("in", "in", "would overwrite"), ("in/a.png", "in/a.png", "would overwrite"), ("gone", "out", "no such file or folder"),
    ("in/a.png", "out.npy", "an array and an image"), ("empty", "out", "no images"), ("in", "out.png", "expected a folder"),
    ("in/a.png", "there.png", "1 file there already"), ("in", "there", "1 file there already"), ("nested/in", "nested", "would overwrite"),
    ("there/notes.txt", "out", "no image by its name"), ("in/a.png", "out.txt", "no image by its name"), ("in", "there/notes.txt", "a file, expected a folder"),
])
def test_wrong_input_and_output(tmp_path, checkpoint, source, target, message):
    image = write_image(tmp_path / "in/a.png")
    for name in ("there.png", "there/a.png", "nested/in/a.png", "nested/in/in/a.png"):
        write_image(tmp_path / name)
    (tmp_path / "there/notes.txt").write_text("not an image")
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
        with pytest.raises(InputError, match=f"{name}: .*{message}"):
            script.main(["--opt", options(tmp_path, checkpoint), "--input", str(image), "--output", str(tmp_path / name)])


def test_input_inside_output(tmp_path, checkpoint):
    before = write_image(tmp_path / "all/in/a.png").read_bytes()
    for _ in range(2):                                          # the second run finds everything done
        assert run(tmp_path, checkpoint, tmp_path / "all/in", tmp_path / "all").returncode == 0
    assert (tmp_path / "all/in/a.png").read_bytes() == before and (tmp_path / "all/a.png").exists()
    assert sorted(path.name for path in (tmp_path / "all").rglob("*")) == ["a.png", "a.png", "in", "restored.csv"]


def test_links_that_lead_in_circles(tmp_path, checkpoint):
    write_image(tmp_path / "in/a.png")
    os.symlink(tmp_path / "in", tmp_path / "in/again")
    result = run(tmp_path, checkpoint, tmp_path / "in", tmp_path / "out")
    assert result.returncode == 0 and "1 of 1 images restored" in result.stdout


@pytest.mark.parametrize("fits, rows", [(32, 32), (2, 2), (0, None)])
def test_out_of_memory_falls_back_to_smaller_strips(tmp_path, checkpoint, monkeypatch, capsys, fits, rows):
    """A device on which `fits` rows fit: the result is that of the whole image, and what happened is said."""
    path = write_image(tmp_path / "a.png", 40, 64)
    restore, tried = evaluation._restore, []

    def small_device(net, degraded, rows, bfloat16):
        tried.append(rows)
        if not 0 < rows <= fits:
            raise torch.OutOfMemoryError("CUDA out of memory") if len(tried) % 2 else RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return restore(net, degraded, rows, bfloat16)

    monkeypatch.setattr(evaluation, "_restore", small_device)
    command = ["--opt", options(tmp_path, checkpoint, strip=0), "--input", str(path), "--output", str(tmp_path / "out.png")]
    if rows is None:
        with pytest.raises(InputError, match="a.png: 40x64 pixels: not enough memory on cpu, even row by row") as error:
            script.main(command)
        assert error.value.status == 3 and not (tmp_path / "out.png").exists()
        return
    script.main(command)
    assert tried[-1] == rows and f"not enough memory on cpu, once more in strips of {rows} rows" in capsys.readouterr().out
    expected = (restored_by_hand(checkpoint, np.asarray(Image.open(path))).clip(0, 1) * 255 + 0.5).astype(np.uint8)
    assert np.abs(np.asarray(Image.open(tmp_path / "out.png")).astype(int) - expected).max() <= 1

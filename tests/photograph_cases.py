"""A folder of all kinds of photographs, of few pixels:  python tests/photograph_cases.py FOLDER"""

import base64
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageCms

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (21, 30, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (21, 30, 4), dtype=np.uint16)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + b"another one"
TAKEN = "2026:01:02 03:04:05"

# A TIFF compressed by LZW, of 16 bits, RGB, 3x2 pixels, numbers 5, 262, 519, ...: no package here writes one.
LZW = base64.b64decode(
    "SUkqAAgAAAAOAAABBAABAAAAAwAAAAEBBAABAAAAAgAAAAIBAwADAAAAtgAAAAMBAwABAAAABQAAAAYBAwABAAAAAgAAABEBBAAB"
    "AAAA0AAAABUBAwABAAAAAwAAABYBBAABAAAAAgAAABcBBAABAAAAGQAAABoBBQABAAAAvAAAABsBBQABAAAAxAAAABwBAwABAAAA"
    "AQAAACgBAwABAAAAAQAAAD0BAwABAAAAAgAAAAAAAAAQABAAEAABAAAAAQAAAAEAAAABAAAAAAAAAIABQABgCBwEA4RCYVCAcCQe"
    "CggC4XEwHAQ=")


def exif(orientation: int = 1) -> Image.Exif:
    """A camera's EXIF block: orientation, make, and in its directories when and where it was taken."""
    entries = Image.Exif()
    entries[0x0112], entries[0x010F] = orientation, "camera"
    entries[0x8769], entries[0x8825] = {0x9003: TAKEN}, {1: "N"}
    return entries


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(size: tuple[int, int], bits: int, colour_type: int, rows: list[bytes], *chunks: bytes,
        interlaced: bool = False) -> bytes:
    """A PNG file of (width, height), of rows that begin with their filter's number, with further chunks."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, interlaced))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *chunks, pixels, chunk(b"IEND", b"")])


def png16(pixels: np.ndarray, *chunks: bytes) -> bytes:
    """[H,W,C] uint16; filter 1 (less the pixel on the left) in every other row."""
    height, width, channels = pixels.shape
    rows = []
    for number, row in enumerate(pixels.astype(">u2").view(np.uint8).reshape(height, -1)):
        left = np.concatenate([np.zeros(2 * channels, np.uint8), row[:-2 * channels]])
        rows.append(bytes([number % 2]) + (row - left if number % 2 else row).tobytes())
    return png((width, height), 16, (0, 4, 2, 6)[channels - 1], rows, *chunks)


def interlaced_png16(pixels: np.ndarray) -> bytes:
    """[H,W,C] uint16 in the seven passes of Adam7."""
    height, width, channels = pixels.shape
    passes = [pixels[y::dy, x::dx] for y, x, dy, dx in (
        (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))]
    rows = [b"\0" + row.astype(">u2").tobytes() for part in passes for row in part if part.size]
    return png((width, height), 16, (0, 4, 2, 6)[channels - 1], rows, interlaced=True)


def write(folder: Path) -> None:
    rgb = Image.fromarray(RGB)
    rgba = Image.fromarray(np.dstack([RGB, DEEP[..., 3] >> 8]).astype(np.uint8))
    (folder / "sub folder/below").mkdir(parents=True)
    rgb.save(folder / "phone.jpg", exif=exif(6), icc_profile=PROFILE, dpi=(300, 300))
    rgb.save(folder / "phone.png", exif=exif(3))                                    # the same stem
    rgba.save(folder / "transparent.png")
    rgb.convert("L").save(folder / "grey.png")
    rgb.convert("1").save(folder / "bits.png")
    Image.fromarray(DEEP[..., 0]).save(folder / "deep_grey.png")
    for channels, name in ((2, "deep_grey_alpha"), (3, "deep"), (4, "deep_alpha")):
        (folder / f"{name}.png").write_bytes(png16(DEEP[..., :channels]))
    tifffile.imwrite(folder / "deep.tif", DEEP[..., :3], photometric="rgb", iccprofile=PROFILE)
    rgb.quantize(16).save(folder / "palette.png")
    rgb.quantize(16).save(folder / "palette_alpha.png", transparency=3)
    rgb.convert("CMYK").save(folder / "print.jpg")
    rgb.convert("CMYK").save(folder / "print_profile.jpg", icc_profile=b"not a profile")
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(rgb, srgb, lab, outputMode="LAB").save(folder / "lab.tif")
    rgb.save(folder / "adobe.png", icc_profile=PROFILE)
    rgb.resize((1, 1)).save(folder / "dot.bmp")
    rgb.save(folder / "Änderung an Bord 写真.png")
    rgb.save(folder / "sub folder/below/phone.webp", lossless=True)
    rgb.save(folder / "still.gif", transparency=0)
    rgb.save(folder / "animated.gif", save_all=True, append_images=[rgb.rotate(90)])
    rgb.save(folder / "animated.png", save_all=True, append_images=[rgb.rotate(180)])
    rgb.save(folder / "pages.tif", save_all=True, append_images=[rgb.resize((50, 40))])
    # What cannot be restored, or is no photograph:
    (folder / "cut.png").write_bytes((folder / "adobe.png").read_bytes()[:-200])
    (folder / "cut.jpg").write_bytes((folder / "phone.jpg").read_bytes()[:-300])
    flipped = bytearray((folder / "transparent.png").read_bytes())
    flipped[len(flipped) // 2] ^= 4
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "bomb.png").write_bytes(png((60000, 60000), 8, 2, [b"\0"]))
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not an image")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    (folder / "notes.txt").write_text("not an image")
    (folder / "film.mov").write_bytes(b"\0\0\0\x18ftypqt  ")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

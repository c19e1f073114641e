"""A folder with every kind of photograph that users bring, of few pixels:  python tests/photograph_cases.py FOLDER"""

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


def exif(orientation: int) -> Image.Exif:
    entries = Image.Exif()
    entries[0x0112], entries[0x010F] = orientation, "camera"
    return entries


def png(width: int, height: int, bits: int, colour_type: int, rows: list[bytes]) -> bytes:
    """A PNG file of rows that begin with their filter's number."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)


def png16(pixels: np.ndarray) -> bytes:
    """[H,W,C] uint16; filter 1 (less the pixel on the left) in every other row."""
    height, width, channels = pixels.shape
    rows = []
    for number, row in enumerate(pixels.astype(">u2").view(np.uint8).reshape(height, -1)):
        left = np.concatenate([np.zeros(2 * channels, np.uint8), row[:-2 * channels]])
        rows.append(bytes([number % 2]) + (row - left if number % 2 else row).tobytes())
    return png(width, height, 16, (0, 4, 2, 6)[channels - 1], rows)


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
    ImageCms.profileToProfile(rgb, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB").save(folder / "lab.tif")
    rgb.save(folder / "adobe.png", icc_profile=PROFILE)
    rgb.resize((1, 1)).save(folder / "dot.bmp")
    rgb.save(folder / "Änderung an Bord 写真.png")
    rgb.save(folder / "sub folder/below/phone.webp", lossless=True)
    rgb.save(folder / "still.gif", transparency=0)
    rgb.save(folder / "animated.gif", save_all=True, append_images=[rgb.rotate(90)])
    rgb.save(folder / "animated.png", save_all=True, append_images=[rgb.rotate(180)])
    rgb.save(folder / "pages.tif", save_all=True, append_images=[rgb.resize((50, 40))])
    (folder / "raw.npy").touch()
    np.save(folder / "raw.npy", RGB.astype(np.float32) / 128)
    # What cannot be restored, or is no photograph:
    (folder / "cut.png").write_bytes((folder / "adobe.png").read_bytes()[:-200])
    (folder / "cut.jpg").write_bytes((folder / "phone.jpg").read_bytes()[:-300])
    flipped = bytearray((folder / "transparent.png").read_bytes())
    flipped[len(flipped) // 2] ^= 4
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "bomb.png").write_bytes(png(60000, 60000, 8, 2, [b"\0"]))
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not an image")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(12))
    (folder / "notes.txt").write_text("not an image")
    (folder / "film.mov").write_bytes(b"\0\0\0\x18ftypqt  ")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

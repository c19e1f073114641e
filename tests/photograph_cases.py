"""Image files of all kinds, of few pixels, as bytes."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (21, 30, 3), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (21, 30, 4), dtype=np.uint16)
RGBA = np.dstack([RGB, np.maximum(DEEP[..., 3] >> 8, 1)]).astype(np.uint8)        # nothing is hidden
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + b"another one"
GREY_PROFILE = PROFILE[:16] + b"GRAY" + PROFILE[20:]
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
ARTIST, TAKEN = "Jörg Müller 夏", "2026:01:02 03:04:05"


def exif(orientation: int = 1, order: str = "<", note: bytes = b"MAKER" + bytes(range(200))) -> bytes:
    """A camera's EXIF block of RGB: maker, artist in UTF-8, sizes, resolution, time, maker note, place."""
    entries = Image.Exif()
    entries.endian = order
    entries[0x0112], entries[0x010F], entries[0x013B] = orientation, "camera", ARTIST.encode()
    entries[0x011A], entries[0x011B] = 300.0, 200.0
    entries[0x8769] = {0x9003: TAKEN, 0x927C: note, 0xA002: 30, 0xA003: 21}
    entries[0x8825] = {1: "N"}
    return entries.tobytes()


def saved(pixels: np.ndarray | Image.Image, name: str, **how) -> bytes:
    """An image file of Pillow's."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, name, **how)
    return out.getvalue()


def chunk(kind: bytes, content: bytes, error: int = 0) -> bytes:
    checksum = zlib.crc32(kind + content) ^ error
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png(pixels: np.ndarray, *chunks: bytes, bits: int = 0, end: bool = True) -> bytes:
    """A PNG file of [H,W,C] numbers of `bits` a channel, with further chunks, and an end mark or none."""
    height, width, channels = pixels.shape
    bits = bits or 8 * pixels.itemsize
    digits = (pixels.reshape(height, -1)[..., None].astype(int) >> np.arange(bits)[::-1]) & 1
    rows = [b"\0" + np.packbits(row.astype(np.uint8)).tobytes() for row in digits]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, (0, 4, 2, 6)[channels - 1], 0, 0, 0))
    content = [header, *chunks, chunk(b"IDAT", zlib.compress(b"".join(rows)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(content) + chunk(b"IEND", b"") * end


def tiff(pixels: np.ndarray, photometric: int, order: str = "<", planes: bool = False, **tags) -> bytes:
    """A TIFF file of [H,W,C] numbers, not compressed, interleaved or in planes; tags: t338=(2,), ..."""
    height, width, channels = pixels.shape
    stored = pixels.transpose(2, 0, 1) if planes else pixels
    data = stored.astype(pixels.dtype.newbyteorder(order)).tobytes()
    strips = channels if planes else 1
    numbers = {256: (width,), 257: (height,), 258: (8 * pixels.itemsize,) * channels, 259: (1,),
               262: (photometric,), 273: tuple(8 + len(data) // strips * i for i in range(strips)),
               277: (channels,), 278: (height,), 279: (len(data) // strips,) * strips, 284: (1 + planes,),
               339: ({"u": 1, "i": 2, "f": 3}[pixels.dtype.kind],) * channels}
    numbers |= {int(name[1:]): values for name, values in tags.items()}
    out, place, behind = struct.pack(order + "H", len(numbers)), 8 + len(data) + 6 + 12 * len(numbers), b""
    for tag, values in sorted(numbers.items()):
        text = isinstance(values, bytes)
        content = values if text else struct.pack(f"{order}{len(values)}I", *values)
        out += struct.pack(order + "HHI", tag, 2 if text else 4, len(values))
        out += content.ljust(4, b"\0") if len(content) <= 4 else struct.pack(order + "I", place + len(behind))
        behind += content if len(content) > 4 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    return head + data + out + struct.pack(order + "I", 0) + behind


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with further segments, marker and content, behind its first two bytes."""
    parts = [bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
             for marker, content in segments]
    return jpeg[:2] + b"".join(parts) + jpeg[2:]

"""What an image file says beside its pixels: kept where the result's format takes it, else named."""

import contextlib
import io
import re
import struct

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.images import PNG_XMP, frames_of

EXIF, GPS, ORIENTATION, EXTRA_SAMPLES, ICC_PROFILE, TIFF_XMP = 34665, 34853, 274, 338, 34675, 700      # tags
# TIFF's tags that describe a photograph: description, make, model, software, date, artist, host, rating,
# Windows' own, copyright. Others up to XMP say how the file stores its pixels.
DESCRIPTION = {270, 271, 272, 305, 306, 315, 316, 18246, *range(40091, 40096), 33432, EXIF, GPS}
SIDES = ((256, 257), (282, 283), (40962, 40963))        # tags of width and height, of resolution along them
PNG_KEPT = (b"gAMA", b"cHRM", b"cICP", b"sRGB", b"tEXt", b"zTXt", b"iTXt")     # chunks that go to a PNG
PNG_NEEDLESS = (b"bKGD", b"hIST", b"sPLT", b"tIME", b"sBIT")
SIGNS = {                                               # in a file's bytes of what Pillow passes over
    rb"hdrgm:Version|hdrgainmap": "a gain map (HDR)", rb"ftyp(?:mp4|isom|qt  |3gp)": "a film",
    rb"xmp/extension/": "extended XMP", rb"jumdc2pa": "content credentials", rb"colr\x02": "an ICC profile"}
WORDS = {"exif": "EXIF", "icc_profile": "ICC profile", "xmp": "XMP", "dpi": "resolution",
         "chunks": "PNG's text or colours"}


def read_metadata(image: Image.Image, pixels: np.ndarray, remarks: list[str]) -> dict:
    """EXIF, ICC profile, XMP, resolution and PNG's chunks of text and colours of an image.

    image, pixels: as of `decode`. remarks: takes one on what is left out.
    """
    info, found, lost = image.info, {}, left_out(image)
    turned = pixels.shape[0] != (image.tag_v2[257] if image.format == "TIFF" else image.height)
    try:
        if block := tiff_exif(image) if image.format == "TIFF" else info.get("exif"):
            found["exif"] = upright_exif(block, turned)
    except Exception:                                           # damage raises nearly anything in Pillow
        lost.append("damaged EXIF")
    profile = info.get("icc_profile") if image.mode != "CMYK" else None
    if profile and profile[16:20] == (b"GRAY" if pixels.shape[2] < 3 else b"RGB "):
        found["icc_profile"] = profile
    elif profile:
        lost.append("an ICC profile for other colours")
    if info.get("xmp"):
        found["xmp"] = re.sub(rb'(tiff:Orientation(?:="|>))[2-8]', rb"\g<1>1", info["xmp"])
    of_jpeg = () if info.get("jfif_unit") else info.get("jfif_density", ())
    shape = info.get("aspect") or info.get("resolution") or of_jpeg
    if shape and shape[0] != shape[1]:                          # pixels that are not square, of unknown size
        info["dpi"] = tuple(72 * side for side in shape)
    if info.get("dpi") and all(1 < side < 1e6 for side in info["dpi"]):        # 1: Pillow's of a TIFF without
        found["dpi"] = tuple(map(float, info["dpi"][::-1 if turned else 1]))
    if chunks := [chunk for chunk in info["chunks"] if chunk[0] in PNG_KEPT]:
        found["chunks"] = chunks
    remarks += [f"left out: {', '.join(lost)}"] * bool(lost)
    return found


def left_out(image: Image.Image) -> list[str]:
    """What a file holds that is neither restored nor kept."""
    info, tags, content = image.info, getattr(image, "tag_v2", {}), image.info["content"]
    frames, profile = frames_of(image), info.get("icc_profile")
    damaged = not profile and re.search(rb"ICC_PROFILE\0|iCCP", content[:2**18])
    lost = [word for sign, word in SIGNS.items() if re.search(sign, content)]
    lost += [f"chunk {kind}" for kind, _ in info["chunks"] if kind not in PNG_KEPT + PNG_NEEDLESS]
    lost += [f"tag {tag}" for tag in tags if tag > TIFF_XMP and tag not in {ICC_PROFILE, *DESCRIPTION}]
    lost += ["IPTC or Photoshop's data"] * ("photoshop" in info)
    lost += ["a comment"] * ("comment" in info and image.format != "JPEG2000")      # where its library signs
    lost += ["a damaged ICC profile"] * bool(damaged)
    lost += ["a channel without a stated meaning"] * (0 in tags.get(EXTRA_SAMPLES, ()))
    return lost + [f"all but the first of {frames} frames"] * (frames > 1)


def tiff_exif(image: Image.Image) -> bytes:
    """The tags of a TIFF that describe it, as an EXIF block; text as its bytes: Pillow reads Latin-1."""
    exif, tags = Image.Exif(), image.getexif()
    for tag in DESCRIPTION & set(tags):
        value = tags.get_ifd(tag) if tag in (EXIF, GPS) else tags[tag]
        exif[tag] = value.encode("latin-1") if isinstance(value, str) else value
    return exif.tobytes() if exif else b""


def upright_exif(block: bytes, turned: bool) -> bytes:
    """An EXIF block that says upright, width and height exchanged where `turned`; all else byte for byte.

    Entries are found by their first bytes: tag, type and a count of 1. Raises nearly anything where the block
    is damaged.
    """
    data, exif = bytearray(block), Image.Exif()
    exif.load(block)

    def value(tag: int) -> slice | None:
        """Where type, count and value of a tag stand; None where it is not there."""
        starts = b"|".join(re.escape(struct.pack(exif.endian + "HHI", tag, kind, 1)) for kind in (3, 4, 5))
        found = re.search(starts, data)
        return found and slice(found.start() + 2, found.start() + 12)

    if exif.get(ORIENTATION, 1) != 1:
        data[value(ORIENTATION)] = struct.pack(exif.endian + "HIHH", 3, 1, 1, 0)
    for one, other in SIDES if turned else ():
        if (one := value(one)) and (other := value(other)):
            data[one], data[other] = data[other], data[one]
    exif.load(bytes(data))
    if exif.get(ORIENTATION, 1) != 1:                           # Pillow has turned the picture by it
        raise ValueError("EXIF that Pillow reads otherwise")
    return bytes(data)


def for_format(metadata: dict, name: str) -> tuple[dict, list[str]]:
    """Metadata as of `read_metadata` as Pillow's save takes it for a format, and words for what is refused.

    Each is tried on a small image: what a format, or this version of Pillow, refuses costs no picture.
    """
    pieces, kept = dict(metadata), {}
    if name == "PNG":
        xmp = [(b"iTXt", PNG_XMP + bytes(4) + pieces.pop("xmp"))] if "xmp" in pieces else []
        pieces["pnginfo"] = PngInfo()
        for chunk in [*pieces.pop("chunks", []), *xmp]:
            pieces["pnginfo"].add(*chunk)
    for key, value in pieces.items():
        with contextlib.suppress(Exception):                    # Pillow raises nearly anything
            trial = io.BytesIO()
            Image.new("RGB", (16, 16)).save(trial, name, **{key: value})
            if key == "pnginfo" or key in Image.open(trial).info:
                kept[key] = value
    return kept, [WORDS[key] for key in pieces if key not in kept and pieces[key] != (72, 72)]

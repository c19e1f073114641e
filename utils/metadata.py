"""What an image file says beside its pixels: kept where the result's format takes it, else named."""

import contextlib
import io
import re
import struct

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from utils.images import PNG_XMP

EXIF, GPS, ORIENTATION, EXTRA_SAMPLES, ICC_PROFILE, TIFF_XMP = 34665, 34853, 274, 338, 34675, 700      # tags
# TIFF's tags that describe a photograph: description, make, model, software, date, artist, host, rating,
# Windows' own, copyright, the place on Earth. Those below XMP say how the file stores its pixels.
DESCRIPTION = {270, 271, 272, 305, 306, 315, 316, 18246, *range(40091, 40096), 33432, EXIF, GPS,
               33550, 33922, 34264, 34735, 34736, 34737, 42112, 42113}
SIDES = ((256, 257), (282, 283), (40962, 40963))        # tags of width and height, of resolution along them
PNG_KEPT = (b"gAMA", b"cHRM", b"cICP", b"sRGB", b"tEXt", b"zTXt", b"iTXt")     # chunks that go to a PNG
PNG_NEEDLESS = (b"bKGD", b"hIST", b"sPLT", b"tIME", b"sBIT")
SIGNS = {                                               # in a file's bytes of what Pillow passes over
    rb"hdrgm:Version|hdrgainmap": "a gain map (HDR)", rb"ftyp(?:mp4|isom|qt  |3gp)": "a film",
    rb"xmp/extension/": "extended XMP", rb"jumdc2pa": "content credentials", rb"colr\x02": "an ICC profile",
    rb"(?s)colrnclx(?:\0[^\1\2\5\6]|..\0[\x10\x12])": "colours of wide gamut or HDR"}    # of AVIF and HEIC
WORDS = {"exif": "EXIF", "icc_profile": "ICC profile", "xmp": "XMP", "dpi": "resolution",
         "chunks": "PNG's text or colours", "pnginfo": "text"}


def read_metadata(image: Image.Image, turned: bool, remarks: list[str]) -> dict:
    """EXIF, ICC profile, XMP, resolution and PNG's chunks of text and colours of an image as of `decode`.

    turned: the upright picture's width is the file's height. remarks: takes one on what is left out.
    """
    info, found, lost = image.info, {}, left_out(image)
    try:
        if block := tiff_exif(image) if image.format == "TIFF" else info.get("exif"):
            found["exif"] = upright_exif(block, turned)
    except Exception:                                           # damage raises nearly anything in Pillow
        lost.append("damaged EXIF")
    if info.get("icc_profile") and image.mode not in ("CMYK", "LAB"):
        found["icc_profile"] = info["icc_profile"]
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
    frames, bmp = getattr(image, "n_frames", 1), image.format == "BMP" and image.mode == "RGB"
    lost = [word for sign, word in SIGNS.items() if re.search(sign, content)]
    lost += [f"chunk {kind}" for kind, _ in info["chunks"] if kind not in PNG_KEPT + PNG_NEEDLESS]
    lost += [f"tag {tag}" for tag in tags if tag > TIFF_XMP and tag not in {ICC_PROFILE, *DESCRIPTION}]
    return lost + [what for what, there in {
        "IPTC or Photoshop's data": "photoshop" in info,
        "a comment": "comment" in info and image.format != "JPEG2000",          # where its library signs
        "a depth map": bool(info.get("depth_images")),
        "a damaged ICC profile":
            not info.get("icc_profile") and re.search(rb"ICC_PROFILE\0|iCCP", content[:2**18]),
        "a channel without a stated meaning": 0 in tags.get(EXTRA_SAMPLES, ()) or bmp and content[28] == 32,
        f"all but the first of {frames} frames": frames > 1,
    }.items() if there]


def tiff_exif(image: Image.Image) -> bytes:
    """The tags of a TIFF that describe it, as an EXIF block."""
    exif = image.getexif()
    for tag in set(exif) - DESCRIPTION:
        del exif[tag]
    exif.bigtiff = False                                        # the block is none, even of a BigTIFF's tags
    return with_text(exif).tobytes() if exif else b""


def with_text(exif: Image.Exif) -> Image.Exif:
    """EXIF whose text Pillow writes as it read it: as Latin-1, whatever it is."""
    exif.update({tag: value.encode("latin-1") for tag, value in exif.items()
                 if isinstance(value, str) and not value.isascii()})
    return exif


def upright_exif(block: bytes, turned: bool) -> bytes:
    """An EXIF block that says upright, width and height exchanged where `turned`; all else byte for byte.

    Raises nearly anything where it is damaged.
    """
    data, start = bytearray(block), 6 * block.startswith(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}[block[start:start + 2]]

    def entries(place: int) -> dict[int, int]:
        """Where type, count and value of each tag stand, in the directory whose offset is at a place."""
        first = start + struct.unpack_from(order + "I", data, place)[0]
        count, = struct.unpack_from(order + "H", data, first)
        places = range(first + 2, min(first + 2 + 12 * count, len(data) - 11), 12)
        return {struct.unpack_from(order + "H", data, place)[0]: place + 2 for place in places}

    tags = entries(start + 4)
    if ORIENTATION in tags:
        struct.pack_into(order + "H", data, tags[ORIENTATION] + 6, 1)
    with contextlib.suppress(KeyError, struct.error):
        tags |= entries(tags[EXIF] + 6)
    for one, other in SIDES:
        if turned and one in tags and other in tags:
            one, other = (slice(tags[tag], tags[tag] + 10) for tag in (one, other))
            data[one], data[other] = data[other], data[one]
    exif = Image.Exif()
    exif.load(bytes(data))
    if exif.get(ORIENTATION, 1) != 1:                           # Pillow has turned the picture by it
        raise ValueError("EXIF that Pillow reads otherwise")
    return bytes(data)


def for_format(metadata: dict, name: str, mode: str) -> tuple[dict, list[str]]:
    """Metadata as of `read_metadata` as Pillow's save takes it for a format, and words for what is refused.

    Each is tried on a small image: what a format, or this version of Pillow, refuses costs no picture.
    """
    pieces = dict(metadata)
    if name == "PNG":
        xmp = [(b"iTXt", PNG_XMP + bytes(4) + pieces.pop("xmp"))] if "xmp" in pieces else []
        pieces["pnginfo"] = PngInfo()
        for chunk in [*pieces.pop("chunks", []), *xmp]:
            pieces["pnginfo"].add(*chunk)
    elif name in ("TIFF", "AVIF"):                              # Pillow writes their EXIF anew
        exif = Image.Exif()
        exif.load(metadata.get("exif", b""))
        if name == "TIFF" and "xmp" in pieces:
            exif[TIFF_XMP] = pieces.pop("xmp")
        pieces |= {"exif": with_text(exif)} if exif else {}
    kept = {key: value for key, value in pieces.items() if holds(name, mode, key, value)}
    return kept, [WORDS[key] for key in pieces if key not in kept and pieces[key] != (72, 72)]


def holds(name: str, mode: str, key: str, value: object) -> bool:
    """Whether a format keeps a piece of metadata."""
    trial = io.BytesIO()
    try:
        Image.new(mode, (16, 16)).save(trial, name, **{key: value})
        return key == "pnginfo" or (name, key) == ("TIFF", "exif") or key in Image.open(trial).info
    except Exception:                                           # Pillow raises nearly anything
        return False

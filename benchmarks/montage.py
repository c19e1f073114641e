"""Stack pictures, such as test.py's side_by_side ones, into one JPEG.

    python -m benchmarks.montage OUT.jpg PICTURE [PICTURE ...]
"""

import argparse
from pathlib import Path

from PIL import Image

from utils.errors import InputError, one_line_errors
from utils.images import EXTENSIONS, read_image, save_image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--width", type=int, default=960, help="width of the montage in pixels")
    arguments = parser.parse_args()
    if arguments.width < 1 or arguments.out.suffix.lower() not in EXTENSIONS:
        raise InputError(f"{arguments.out}, --width {arguments.width}: expected an image's name "
                         f"({', '.join(sorted(EXTENSIONS))}) and a width from 1 on")
    pictures = []
    for path in arguments.pictures:
        picture = Image.fromarray(read_image(path))
        size = arguments.width, max(1, round(picture.height * arguments.width / picture.width))
        pictures.append(picture.resize(size, Image.Resampling.LANCZOS))
    montage = Image.new("RGB", (arguments.width, sum(picture.height for picture in pictures)))
    top = 0
    for picture in pictures:
        montage.paste(picture, (0, top))
        top += picture.height
    save_image(montage, arguments.out)


if __name__ == "__main__":
    with one_line_errors():
        main()

"""Pictures as readings: each .jpg or .png file is one reading. Pillow reads them; the extra `pictures` installs it.

    read_picture("front.jpg", body).found[0]        {"inputs": uint8 [height, width, 3], "file": "front.jpg"}

A picture's size is checked before its pixels are decoded.
"""

import io
import warnings

import numpy as np

from sumus.errors import extra
from sumus.node.batch import Batch
from sumus.node.reading import BadReading

MOST_POINTS = 2**24
"""The maximum number of pixels of one picture: 16 million."""


def read_picture(name: str, body: bytes) -> Batch:
    """Read a picture as a reading: `inputs` are its pixels, turned upright, in three colors or in gray; `file` is its name.

    Raises:
        BadReading: It is not a .jpg or .png picture, it is too large, or Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise BadReading(f"pictures need Pillow: {extra('pictures')}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(body), formats=("JPEG", "PNG")) as picture:
                width, height = picture.size
                if width * height > MOST_POINTS:
                    raise BadReading(
                        f"it has {width} x {height} pixels, but at most {MOST_POINTS} are allowed: make it smaller"
                    )
                deep = picture.mode in ("I", "F") or picture.mode.startswith("I;")
                if deep or "A" in picture.getbands() or "transparency" in picture.info:
                    raise BadReading(
                        f"its mode, {picture.mode}, has more than 8 bits per color, or transparency: save it with 8 bits per "
                        "color and without transparency"
                    )
                upright = ImageOps.exif_transpose(picture)
                points = np.asarray(upright.convert("L" if upright.mode in ("1", "L") else "RGB"))
    except BadReading:
        raise
    except Exception as error:  # for damaged files, Pillow raises errors of many types
        why = "" if "object at 0x" in str(error) else f": {str(error).partition(chr(10))[0]:.100}"
        raise BadReading(f"it is not a .jpg or .png picture that can be read{why}") from error
    return Batch([{"inputs": points, "file": name}], lambda numbers: body)

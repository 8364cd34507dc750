"""Image files of `folder:` as cameras, phones, macOS and image editors write them: the right pixels or one line."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from orwcfm_fast.data.datasets import load_data
from orwcfm_fast.errors import UserError

Colour = tuple[int, int, int]
Kind = Callable[[Colour, int, int], bytes | None]
WHITE = (255, 255, 255)
GREY = 8  # levels that a lossy file or a palette may be off


def file_of(image: Image.Image, form: str = "PNG", **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **more)
    return buffer.getvalue()


def rgb(c: Colour, w: int, h: int) -> Image.Image:
    return Image.new("RGB", (w, h), c)


def grey(c: Colour) -> Colour:
    return (c[0],) * 3


def sixteen(c: Colour, w: int, h: int, **more) -> bytes:
    return file_of(Image.fromarray(np.full((h, w), c[0] * 257, np.uint16)), **more)


def half(c: Colour, w: int, h: int) -> bytes:
    whole = file_of(rgb(c, w, h))
    return whole[: len(whole) // 2]


def transparent_palette(c: Colour, w: int, h: int) -> bytes:
    image = Image.new("P", (w, h), 1)
    image.putpalette([0, 0, 0, *c] + [0] * 750)
    return file_of(image, transparency=1)


def turned(c: Colour, w: int, h: int, orientation: int = 3) -> bytes:
    """The left half black and the right half of the colour, stored upside down and said to be so."""
    image = rgb((0, 0, 0), 2 * w, 2 * w)
    image.paste(c, (w, 0, 2 * w, 2 * w))
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(image.transpose(Image.Transpose.ROTATE_180), exif=exif)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def colour_with_hidden_alpha(c: Colour, w: int, h: int) -> bytes:
    """A PNG of true colour whose tRNS names one colour as transparent."""
    plain = file_of(rgb(c, w, h))
    at = plain.index(b"IDAT") - 4
    return plain[:at] + png_chunk(b"tRNS", struct.pack(">HHH", *c)) + plain[at:]


# name of the file, how it is made, the colour that must be read: a colour, or None where one line must refuse it
KINDS: dict[str, tuple[str, Kind, Callable[[Colour], Colour] | None]] = {
    "RGB": ("a.png", lambda c, w, h: file_of(rgb(c, w, h)), lambda c: c),
    "capitals": ("A.PNG", lambda c, w, h: file_of(rgb(c, w, h)), lambda c: c),
    "grey": ("a.png", lambda c, w, h: file_of(Image.new("L", (w, h), c[0])), grey),
    "16-bit grey": ("a.png", sixteen, grey),
    "16-bit grey, transparent": ("a.png", lambda c, w, h: sixteen(c, w, h, transparency=c[0] * 257),
                                 lambda c: WHITE),
    "16-bit TIFF": ("a.tif", lambda c, w, h: sixteen(c, w, h, form="TIFF"), grey),
    "one bit": ("a.png", lambda c, w, h: file_of(Image.new("1", (w, h), 1)), lambda c: WHITE),
    "RGBA, opaque": ("a.png", lambda c, w, h: file_of(Image.new("RGBA", (w, h), (*c, 255))), lambda c: c),
    "RGBA, hidden": ("a.png", lambda c, w, h: file_of(Image.new("RGBA", (w, h), (*c, 0))), lambda c: WHITE),
    "LA, hidden": ("a.png", lambda c, w, h: file_of(Image.new("LA", (w, h), (c[0], 0))), lambda c: WHITE),
    "palette": ("a.png", lambda c, w, h: file_of(rgb(c, w, h).quantize(2)), lambda c: c),
    "palette, hidden": ("a.png", transparent_palette, lambda c: WHITE),
    "tRNS of true colour": ("a.png", colour_with_hidden_alpha, lambda c: WHITE),
    "WebP": ("a.webp", lambda c, w, h: file_of(rgb(c, w, h), "WEBP", lossless=True), lambda c: c),
    "WebP, hidden": ("a.webp", lambda c, w, h: file_of(Image.new("RGBA", (w, h), (*c, 0)), "WEBP", lossless=True),
                     lambda c: WHITE),
    "JPEG": ("a.JPG", lambda c, w, h: file_of(rgb(c, w, h), "JPEG", quality=100), lambda c: c),
    "CMYK JPEG": ("a.jpeg", lambda c, w, h: file_of(rgb(c, w, h).convert("CMYK"), "JPEG", quality=100), lambda c: c),
    "BMP": ("a.bmp", lambda c, w, h: file_of(rgb(c, w, h), "BMP"), lambda c: c),
    "a JPEG named .png": ("a.png", lambda c, w, h: file_of(rgb(c, w, h), "JPEG", quality=100), lambda c: c),
    "EXIF orientation": ("turned.png", turned, lambda c: c),
    "animated WebP": ("a.webp", lambda c, w, h: file_of(rgb(c, w, h), "WEBP", save_all=True, lossless=True,
                                                       append_images=[rgb((0, 0, 0), w, h)]), lambda c: c),
    "macOS's ._ file": ("._a.png", lambda c, w, h: b"\0\5\26\7Mac OS X", lambda c: c),
    "a folder named .png": ("b.png", lambda c, w, h: None, lambda c: c),
    "in __MACOSX": ("__MACOSX/a.png", lambda c, w, h: b"\0\5\26\7", lambda c: c),
    "32-bit TIFF": ("a.tiff", lambda c, w, h: file_of(Image.new("F", (w, h), c[0]), "TIFF"), None),
    "cut off": ("a.png", lambda c, w, h: half(c, w, h), None),
    "text": ("a.jpg", lambda c, w, h: b"<html>429 Too Many Requests</html>", None),
    "empty": ("a.webp", lambda c, w, h: b"", None),
    "GIF named .png": ("a.png", lambda c, w, h: file_of(rgb(c, w, h), "GIF"), None),
}  # fmt: skip
levels = st.integers(0, 255)
MORE = ("._a.png", "b.png", "__MACOSX/a.png")  # to be passed over, beside a good one


def check(name: str, c: Colour, w: int, h: int) -> None:
    file, make, expected = KINDS[name]
    with TemporaryDirectory() as folder:
        path, data = Path(folder, file), make(c, w, h)
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if data is None else path.write_bytes(data)
        if file in MORE:
            Path(folder, "good.png").write_bytes(file_of(rgb(c, w, h)))
        if expected is None:
            with pytest.raises(UserError, match="1 of 1 files cannot be read as an image") as error:
                load_data(f"folder:{folder}")
            assert "\n" not in str(error.value)
            return
        images, _ = load_data(f"folder:{folder}")
        assert images.shape == (1, 3, 32, 32)
        seen = ((images[0] + 1) * 127.5).round()
        right = seen[:, :, 20:].flatten(1)  # of `turned`, the right half
        assert (right - right.new_tensor(expected(c))[:, None]).abs().max() <= GREY
        assert file != "turned.png" or seen[:, :, :12].max() <= GREY


def fuzz(name: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=examples < 1000,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.tuples(levels, levels, levels), st.integers(8, 80), st.integers(8, 80))
    def one(c: Colour, w: int, h: int) -> None:
        check(name, c, w, h)

    one()


@pytest.mark.parametrize("name", KINDS)
def test_an_image_of_each_kind_is_read_right_or_refused(name):
    fuzz(name, 4)


@pytest.mark.soak
@pytest.mark.parametrize("name", KINDS)
def test_a_thousand_of_each_kind(name):
    fuzz(name, 1000)


def test_several_unreadable_files_are_counted_and_named_once(tmp_path):
    for i in range(7):
        (tmp_path / f"bad{i}.png").write_bytes(b"no image")
    (tmp_path / "good.png").write_bytes(file_of(rgb((1, 2, 3), 9, 9)))
    with pytest.raises(UserError, match=r"7 of 8 files .*bad0\.png.*bad4\.png.* and 2 more") as error:
        load_data(f"folder:{tmp_path}")
    assert "bad5" not in str(error.value) and "\n" not in str(error.value)


def test_image_files_of_other_kinds_are_counted_in_a_warning(tmp_path, capsys):
    for name in ("a.gif", "b.HEIC", "c.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "good.png").write_bytes(file_of(rgb((1, 2, 3), 9, 9)))
    assert len(load_data(f"folder:{tmp_path}")[0]) == 1
    assert "2 .gif and .heic files are not read" in capsys.readouterr().err

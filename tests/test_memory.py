"""Small files that would fill the memory or hold a core: what decoding takes is counted before it begins, and
all decoders share a budget.
"""

import io
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from planting import patch
from PIL import Image

import flextok_edu.data.decoding as data_decoding
import flextok_edu.data.folders as data_folders
import flextok_edu.data.tar as data_tar
from flextok_edu.data.decoding import decode_square, to_rgb
from flextok_edu.data.folders import read_squares

ROOT = Path(__file__).resolve().parent.parent


def encoded(image, kind="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def sized(jpeg, side):
    """The same JPEG, claiming another size."""
    at = next(i for i in range(len(jpeg)) if jpeg[i] == 0xFF and jpeg[i + 1] in (0xC0, 0xC2))
    return jpeg[: at + 5] + struct.pack(">HH", side, side) + jpeg[at + 9 :]


def one_component_a_scan(jpeg):
    """Its only scan has one of three components: sequential, and yet all coefficients must be kept for the
    scans that never come.
    """
    at = jpeg.index(b"\xff\xda")
    length = struct.unpack(">H", jpeg[at + 2 : at + 4])[0]
    return (
        jpeg[:at]
        + b"\xff\xda"
        + struct.pack(">HB", 8, 1)
        + jpeg[at + 5 : at + 7]
        + jpeg[at + 2 + length - 3 :]
    )


def with_empty_scans(jpeg, count):
    """The last scan's header again and again, with nothing behind it."""
    at = jpeg.rindex(b"\xff\xda")
    header = jpeg[at : at + 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0]]
    return jpeg[: jpeg.rindex(b"\xff\xd9")] + header * count + b"\xff\xd9"


def colours(side=16):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def test_scans_are_counted_without_decoding():
    plain, progressive = encoded(colours()), encoded(colours(), progressive=True)
    assert data_decoding._scans(plain) == (1, False) and data_decoding._scans(
        one_component_a_scan(plain)
    ) == (1, True)
    scans, several = data_decoding._scans(progressive)
    assert (
        several
        and scans == progressive.count(b"\xff\xda") > 3
        and data_decoding._scans(with_empty_scans(progressive, 500)) == (scans + 500, True)
    )
    exif = Image.Exif()
    exif[0x9286] = b"\xff\xda\xff\xda"  # looks like scans, and is none
    assert data_decoding._scans(encoded(colours(), exif=exif)) == (1, False)
    for cut in range(2, len(progressive), 7):
        data_decoding._scans(progressive[:cut])
    with pytest.raises(ValueError, match="too many segments"):
        data_decoding._scans(b"\xff\xd8" + b"\xff\xfe\0\2" * 200_000)


def test_several_scans_count_as_progressive():
    assert not isinstance(decode_square(one_component_a_scan(encoded(colours(64))), 16), str)
    small = sized(one_component_a_scan(encoded(colours())), 23_168)
    assert len(small) < 1000 and decode_square(small, 32) == "more than 67 million pixels"
    assert not isinstance(decode_square(sized(encoded(colours()), 23_168), 32), str), (
        "one scan is decoded at an eighth"
    )
    began = time.perf_counter()
    many = with_empty_scans(sized(encoded(colours(), progressive=True), 8_192), 2_000)
    assert (
        decode_square(many, 32) == "more scans than such a picture may have"
        and time.perf_counter() - began < 1
    )
    assert not isinstance(
        decode_square(with_empty_scans(encoded(colours(64), progressive=True), 100), 16), str
    )


PROOF = """
import io, sys, threading
from PIL import Image
from flextok_edu.data.decoding import _share, decode_square
_share.total = 2**27
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024
picture = open(sys.argv[1], "rb").read()
small = io.BytesIO(); Image.new("RGB", (50, 50)).save(small, "PNG"); decode_square(small.getvalue(), 64)
before, found = peak(), []
threads = [threading.Thread(target=lambda: found.append(decode_square(picture, 64))) for _ in range(6)]
for t in threads: t.start()
for t in threads: t.join()
print(sum(not isinstance(f, str) for f in found), peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_six_large_pictures_at_once_share_a_budget(tmp_path):
    (tmp_path / "large.png").write_bytes(
        encoded(Image.new("RGB", (4_608, 4_608), (1, 2, 3)), "PNG", compress_level=1)
    )
    result = subprocess.run(
        [sys.executable, "-c", PROOF, str(tmp_path / "large.png")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    used, grown = map(int, result.stdout.split())
    assert used == 6 and grown < 180, f"{grown} MB: each takes 85 MB, and the budget is 134"


def test_what_a_picture_needs_is_counted(monkeypatch):
    asked = []
    monkeypatch.setattr(data_decoding._share, "take", lambda need: asked.append(need) or threading.Lock())
    patch(monkeypatch, data_decoding, "_MANY", 2**10)
    side, float_one = 64, Image.fromarray(np.zeros((64, 64), np.float32))
    for image, kind, options, each in (
        (Image.new("RGB", (side, side)), "PNG", {}, 4),
        (Image.new("1", (side, side)), "PNG", {}, 1),
        (float_one, "TIFF", {}, 9),
        (Image.new("I;16", (side, side)), "PNG", {}, 3),
        (Image.new("RGB", (side, side)), "WEBP", {}, 16),
        (Image.new("RGB", (side, side)), "JPEG", {"progressive": True}, 6.3125),
    ):
        assert (
            not isinstance(decode_square(encoded(image, kind, **options), 4), str)
            and asked.pop() == each * side * side
        ), (kind, image.mode)
    patch(monkeypatch, data_decoding, "_MOST", 1000)
    assert (
        decode_square(encoded(Image.new("RGB", (side, side)), "PNG"), 4) == "would need 0.0 GB to decode"
        and not asked
    )


def test_the_budget_is_never_overdrawn():
    share, most, now, lock = data_decoding._Share(10 * data_decoding._SMALL), [0], [0], threading.Lock()

    def work(need):
        with share.take(need):
            with lock:
                now[0] += need
                most[0] = max(most[0], now[0])
            time.sleep(0.002)
            with lock:
                now[0] -= need

    threads = [threading.Thread(target=work, args=((1 + i % 4) * data_decoding._SMALL,)) for i in range(60)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert share.used == 0 and 4 * data_decoding._SMALL < most[0] <= 10 * data_decoding._SMALL
    with share.take(100 * data_decoding._SMALL):
        assert share.used == 100 * data_decoding._SMALL  # alone
    with pytest.raises(RuntimeError), share.take(data_decoding._SMALL):
        raise RuntimeError
    assert share.used == 0
    with share.take(5):
        assert share.used == 0


def test_bands_change_no_picture(monkeypatch):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (294, 420, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    patch(monkeypatch, data_decoding, "_BAND", 4000)
    rgba = Image.fromarray(noise)
    for image in (
        rgba,
        rgba.convert("RGB"),
        rgba.convert("L"),
        rgba.convert("LA"),
        rgba.convert("P"),
        rgba.convert("1"),
        Image.fromarray(noise[..., 0].astype(np.uint16) * 257),
        Image.fromarray(noise[..., 0].astype(np.float32) / 255),
    ):
        image = Image.open(
            io.BytesIO(
                encoded(
                    image,
                    "TIFF" if image.mode == "F" else "PNG",
                    **({} if image.mode == "F" else {"exif": exif}),
                )
            )
        )
        for factor in (1, 2, 7):
            whole = np.asarray(to_rgb(image).reduce(factor) if factor > 1 else to_rgb(image)).astype(int)
            banded = np.asarray(data_decoding._reduced(image, factor)).astype(int)
            assert banded.shape == whole.shape and abs(banded - whole).mean() < (
                2 if image.mode in ("RGBA", "LA") else 0.6
            ), (image.mode, factor)


def test_floats_and_sixteen_bits_have_their_own_scale(tmp_path):
    """A float TIFF in 0..1 became black."""
    ramp = np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)

    def mean(values):
        return decode_square(encoded(Image.fromarray(values), "TIFF"), 64).mean()

    assert (
        abs(mean(ramp) - 127.5) < 2
        and abs(mean(ramp * 255) - 127.5) < 2
        and abs(mean(ramp * 65535) - 127.5) < 2
    )
    assert mean(ramp - 1) == 0 and mean(ramp * 0) == 0 and mean(ramp * 0 + 1) == 255
    holes = ramp.copy()
    holes[:8] = np.nan
    holes[8] = np.inf
    found = decode_square(encoded(Image.fromarray(holes), "TIFF"), 64)
    assert (found[:, :6] < 20).all() and abs(found[:, 20:].mean() - 255 * ramp[20:].mean()) < 3, (
        "NaN is black, and changes nothing else"
    )
    assert mean(np.full((64, 64), np.nan, np.float32)) == 0


def test_formats(tmp_path):
    """JFIF and AVIF are read, by one list for folders, shards and decoding."""
    from PIL import features

    pass

    kinds = (
        [("a.jfif", "JPEG"), ("b.jpe", "JPEG"), ("c.pgm", "PPM")]
        + [("d.avif", "AVIF")] * features.check("avif")
        + [("e.jp2", "JPEG2000")] * features.check("jpg_2000")
    )
    for name, kind in kinds:
        (colours(40).convert("L") if kind == "PPM" else colours(40)).save(tmp_path / name, kind)
    assert len(data_folders.image_files(tmp_path)) == len(kinds) and len(
        data_folders.read_folder(tmp_path, 16, progress=False).images
    ) == len(kinds)
    assert set(data_tar._IMAGES) == {suffix[1:] for suffix in data_decoding.PICTURES} and set(
        data_decoding.FORMATS
    ) == set(data_decoding.PICTURES.values())
    assert {"EPS", "PDF", "WMF", "SVG"}.isdisjoint(data_decoding.FORMATS), (
        "nothing that starts other programs"
    )
    images, good = read_squares(data_folders.image_files(tmp_path), 16, progress=False)
    assert good == list(range(len(kinds))) and len(images) == len(kinds)


def test_heic_is_read_where_its_plug_in_is(tmp_path):
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image, PngImagePlugin\ndef register_heif_opener(): Image.register_open('HEIF', "
        "PngImagePlugin.PngImageFile, lambda head: head[:8] == b'\\x89PNG\\r\\n\\x1a\\n')\n"
    )
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.heic").write_bytes(encoded(colours(40), "PNG"))
    code = (
        "from flextok_edu.data.decoding import PICTURES; from flextok_edu.data.folders import read_folder; "
        "print(PICTURES['.heic'], len(read_folder('set', 16, progress=False).images))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert result.stdout.split() == ["HEIF", "1"], result.stderr[-2000:]

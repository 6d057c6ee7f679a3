"""Images at scale: every kind of bad file, sources against independent readers, and feeds that resume
exactly.
"""

import importlib
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from planting import patch
import torch
from PIL import Image

import flextok_edu.data.decoding as data_decoding
import flextok_edu.data.sources as data_sources
import flextok_edu.data.tar as data_tar
from flextok_edu.data.datasets import load_data
from flextok_edu.data.folders import image_files, read_folder
from flextok_edu.data.scenes import ToyScenes
from flextok_edu.data.opening import Part, as_image_set, open_source, split_source
from flextok_edu.data.reading import SourceLoader, decode, reading_rate, survey
from flextok_edu.data.set_sources import HubSource, ObjectSource
from flextok_edu.data.sources import FolderSource, Item, Source
from flextok_edu.data.streams import StreamLoader
from flextok_edu.data.tar import TarSource, expand_braces, index_shard

ROOT = Path(__file__).resolve().parent.parent
LINUX = sys.platform.startswith("linux")


def picture(seed=0, w=40, h=40):
    """Smooth, so that JPEG keeps it."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize(
        (w, h), Image.Resampling.BICUBIC
    )


def encoded(image, kind="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(width, height, depth, colour, rows, *more):
    """A PNG by hand: 16 bits a channel, or a header that lies."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
        + b"".join(chunk(*m) for m in more)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def resized_header(jpeg, side):
    """The same JPEG, claiming another size."""
    at = next(i for i in range(len(jpeg)) if jpeg[i] == 0xFF and jpeg[i + 1] in (0xC0, 0xC2))
    return jpeg[: at + 5] + struct.pack(">HH", side, side) + jpeg[at + 9 :]


def without_adobe(jpeg):
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0] :]


def seed_folder(root):
    """One file of each odd kind.

    Returns {name: None if it can be used, else the beginning of the reason}; what is not listed must not be
    seen at all.
    """
    root.mkdir()
    base = picture()
    jpeg, lossless = encoded(base, quality=90), encoded(base, "PNG")
    noisy = encoded(
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "PNG"
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("P", (40, 40), 1)
    clear.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    frames = [picture(i) for i in range(3)]
    red = Image.new("CMYK", (40, 40), (0, 255, 255, 0))
    files = {  # name: (content, reason)
        "plain.jpg": (jpeg, None),
        "png_named.jpg": (lossless, None),
        "jpeg_named.png": (jpeg, None),
        "UPPER.PNG": (lossless, None),
        "grey.jpg": (encoded(base.convert("L")), None),
        "progressive.jpg": (encoded(base, progressive=True), None),
        "trailing.jpg": (jpeg + b"\0" * 1000, None),
        "cmyk_adobe.jpg": (
            encoded(red, quality=95),
            None,
        ),  # Pillow writes the values inverted, with Adobe's marker, as Photoshop does
        "cmyk.jpg": (
            without_adobe(encoded(red, quality=95)),
            None,
        ),  # Pillow takes it for inverted too, as most programs do
        "grey16.png": (
            encoded(Image.fromarray(np.linspace(0, 65535, 1600).reshape(40, 40).astype(np.uint16)), "PNG"),
            None,
        ),
        "rgb16.png": (
            png(8, 8, 16, 2, b"".join(b"\0" + struct.pack(">HHH", 65535, 32768, 0) * 8 for _ in range(8))),
            None,
        ),
        "float.tiff": (
            encoded(Image.fromarray(np.linspace(0, 255, 1600, dtype=np.float32).reshape(40, 40)), "TIFF"),
            None,
        ),
        "palette.png": (encoded(base.quantize(16), "PNG"), None),
        "palette_clear.png": (encoded(clear, "PNG", transparency=1), None),
        "rgb_key.png": (
            png(
                8,
                8,
                8,
                2,
                b"".join(b"\0" + b"\1\2\3" * 8 for _ in range(8)),
                (b"tRNS", struct.pack(">HHH", 1, 2, 3)),
            ),
            None,
        ),
        "la.png": (encoded(base.convert("LA"), "PNG"), None),
        "rgba.png": (encoded(Image.new("RGBA", (40, 40), (0, 0, 0, 0)), "PNG"), None),
        "bit.png": (encoded(base.convert("1"), "PNG"), None),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), None),
        "animated.webp": (encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:]), None),
        "animated.png": (encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]), None),
        "rotated.jpg": (encoded(picture(0, 40, 60), exif=exif), None),
        "exif_garbage.jpg": (
            encoded(base, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(256)) * 8),
            None,
        ),
        "exif_huge.jpg": (encoded(base, exif=b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0" + b"x" * 60_000), None),
        "exif_huge.png": (encoded(base, "PNG", exif=b"MM\0*\0\0\0\x08\0\0" + b"y" * 3_000_000), None),
        "exif_no_tiff.png": (encoded(base, "PNG", exif=b"garbage"), None),
        "icc.jpg": (encoded(base, icc_profile=b"no profile at all" * 100), None),
        "picture.bmp": (encoded(base, "BMP"), None),
        "picture.ppm": (encoded(base, "PPM"), None),
        "thin.png": (encoded(Image.new("RGB", (2, 30_000), "green"), "PNG"), None),
        "large.jpg": (encoded(Image.new("L", (14_000, 14_000), 200)), None),
        "ünï çødé 猫.png": (lossless, None),
        "new\nline  and spaces.png": (lossless, None),
        "x" * 240 + ".png": (lossless, None),
        "-rf.png": (lossless, None),
        "100%s{}.png": (lossless, None),
        "empty.jpg": (b"", "empty"),
        "empty.png": (b"", "empty"),
        "half.jpg": (jpeg[: len(jpeg) * 2 // 3], "damaged"),
        "half.png": (noisy[: len(noisy) // 2], "damaged"),
        "half.webp": (encoded(picture(2, 200, 200), "WEBP")[:150], "damaged"),
        "header.jpg": (jpeg[:20], "damaged"),
        "wrong_bit.png": (noisy[:3000] + bytes([noisy[3000] ^ 255]) + noisy[3001:], "damaged"),
        "huge_chunk.png": (lossless[:8] + b"\xff\xff\xff\xff" + lossless[12:], ""),
        "text.jpg": (b"not a picture", "not an image"),
        "page.png": (b"<html><body>404</body></html>", "not an image"),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        "postscript.jpg": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n",
            "not an image",
        ),
        "zeros.jpg": (bytes(5000), "not an image"),
        "dot.png": (encoded(Image.new("RGB", (1, 1)), "PNG"), "smaller"),
        "line.png": (encoded(Image.new("RGB", (1, 900)), "PNG"), "smaller"),
        "flat.jpg": (encoded(Image.new("RGB", (900, 1))), "smaller"),
        "bomb.png": (encoded(Image.new("1", (20_000, 20_000)), "PNG"), "more than"),
        "below_pillows_limit.png": (encoded(Image.new("1", (10_000, 9_000)), "PNG"), "more than"),
        "bomb.gif": (b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + encoded(base, "GIF")[10:], "more than"),
        "bomb_progressive.jpg": (resized_header(encoded(base, progressive=True), 20_000), "more than"),
        "bomb_baseline.jpg": (resized_header(jpeg, 65_000), "more than"),
    }
    want = {name: reason for name, (_, reason) in files.items()}
    for name, (content, _) in files.items():
        if not LINUX and ("\n" in name or len(name) > 200):
            want.pop(name)
            continue
        (root / name).write_bytes(content)
    for hidden in (".hidden.png", "._mac.jpg"):
        (root / hidden).write_bytes(lossless)  # not to be seen
    (root / "a_folder.jpg").mkdir()
    (root / "notes.md").write_text("no picture")
    if LINUX:
        (root / "loop1.png").symlink_to("loop2.png")
        (root / "loop2.png").symlink_to("loop1.png")
        (root / "dangling.png").symlink_to("/nowhere/at/all.png")
        (root / "link.png").symlink_to("plain.jpg")
        (root / "to_folder.png").symlink_to("a_folder.jpg")  # os.walk calls it a folder
        os.mkfifo(root / "pipe.png")
        os.mkfifo(root / "plain.txt")  # as a caption
        with socket.socket(socket.AF_UNIX) as s:
            here = os.getcwd()
            os.chdir(root)  # a socket's path is short
            s.bind("socket.png")
            os.chdir(here)
        (root / "secret.png").write_bytes(lossless)
        (root / "secret.png").chmod(0)
        Path(os.fsdecode(os.fsencode(str(root)) + b"/\xff\xfe latin.png")).write_bytes(lossless)
        want |= {
            "loop1.png": "link in a circle",
            "loop2.png": "link in a circle",
            "dangling.png": "missing",
            "link.png": None,
            "pipe.png": "not a regular file",
            "socket.png": "not a regular file",
            "secret.png": None if os.access(root / "secret.png", os.R_OK) else "not readable",
            os.fsdecode(b"\xff\xfe latin.png"): None,
        }
    return want


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    root = tmp_path_factory.mktemp("odd") / "folder"
    return root, seed_folder(root)


def test_every_kind_of_file_is_used_or_skipped_with_its_reason(odd, request):
    root, want = odd
    source = FolderSource(root)
    assert len(want) >= (60 if LINUX else 50) and {source.files[i] for i in range(len(source))} == want.keys()
    if LINUX:  # whoever waits for a pipe is woken by an exception
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(RuntimeError("waited for a file")))
        request.addfinalizer(lambda: signal.alarm(0))
    for i in range(len(source)):
        if LINUX:
            signal.alarm(20)
        found, expected = decode(source.item(i), 32), want[source.files[i]]
        if expected is None:
            assert (
                isinstance(found, torch.Tensor) and found.shape == (3, 32, 32) and found.dtype == torch.uint8
            ), (source.files[i], found)
        else:
            assert isinstance(found, str) and found.startswith(expected), (source.files[i], expected, found)


def test_the_pictures_of_odd_files_are_right(odd):
    root, _ = odd

    def mean(name):
        return decode(Item(str(root / name), 0, None, name), 32).float().mean((1, 2)).tolist()

    assert mean("cmyk_adobe.jpg") == pytest.approx([254, 0, 0], abs=6) == mean("cmyk.jpg")
    assert mean("rgb16.png") == pytest.approx([255, 128, 0], abs=1) and mean("grey16.png") == pytest.approx(
        [127] * 3, abs=4
    )
    assert mean("rgba.png") == mean("palette_clear.png") == mean("rgb_key.png") == [255] * 3, (
        "transparency lies on white"
    )
    assert mean("large.jpg") == pytest.approx([200] * 3, abs=1) and mean("thin.png") == [0, 128, 0]
    one, turned = (
        decode(Item(d, 0, None, ""), 32)
        for d in (encoded(picture(0, 40, 60).rotate(-90, expand=True), "PNG"), str(root / "rotated.jpg"))
    )
    assert (one.float() - turned.float()).abs().mean() < 3, "EXIF says that it lies on its side"
    plain = decode(Item(str(root / "UPPER.PNG"), 0, None, ""), 32)
    for same in (
        "exif_garbage.jpg",
        "exif_huge.png",
        "exif_no_tiff.png",
        "icc.jpg",
        "animated.png",
        "animated.webp",
        "trailing.jpg",
    ):
        assert (decode(Item(str(root / same), 0, None, ""), 32).float() - plain.float()).abs().mean() < 6, (
            same
        )


PROOF = """
import sys, time
from flextok_edu.data.reading import SourceLoader, decode, survey
from flextok_edu.data.sources import FolderSource
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024
source = FolderSource(sys.argv[1])
decode(source.item(0), 32)
before = peak()
report = survey(source, 256)
print(report)
print(report.used, sum(report.skipped.values()), peak() - before)
feed = SourceLoader(source, 32, len(source), workers=2)
images, labels = next(feed)
print(len(images), sum(feed.skipped.values()))
"""


@pytest.mark.skipif(not LINUX, reason="pipes, links, /proc")
def test_a_survey_of_them_neither_hangs_nor_fills_the_memory(odd):
    root, want = odd
    bad = sum(reason is not None for reason in want.values())
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:flextok_edu.survey", "-c", PROOF, str(root)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd="/",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    lines = result.stdout.splitlines()
    assert len(lines) == 3, result.stdout
    assert f"{len(want) - bad} of {len(want)} pictures can be used; {bad} skipped: " in lines[0]
    used, skipped, grown = map(int, lines[1].split())
    assert (used, skipped) == (len(want) - bad, bad)
    assert grown < 250, f"{grown} MB more for files of which one claims 400 million pixels"
    assert (
        lines[2].split() == [str(len(want)), str(bad)]
        and len(
            [
                line
                for line in result.stderr.splitlines()
                if "UserWarning: folder," in line and "the caption" not in line
            ]
        )
        == 1
    ), result.stderr  # ours; where there is one core, PyTorch has a word to say about workers, too


def test_very_large_pictures_are_reduced_first(monkeypatch):
    yy, xx = np.mgrid[:300, :420]
    noise = np.random.default_rng(0).integers(-20, 20, (300, 420, 4))
    image = Image.fromarray(
        np.clip(
            np.stack([xx / 2, yy / 1.5, 128 + 90 * np.sin(xx / 30), 255 - xx / 3], -1) + noise, 0, 255
        ).astype(np.uint8)
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    for mode, kind in (
        ("RGBA", "PNG"),
        ("RGB", "PNG"),
        ("LA", "PNG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("RGB", "TIFF"),
        ("RGBA", "WEBP"),
    ):
        item = Item(encoded(image.convert(mode), kind, exif=exif), 0, None, mode)
        patch(monkeypatch, data_decoding, "_MANY", 2**24)
        plain = decode(item, 32)
        patch(monkeypatch, data_decoding, "_MANY", 1000)
        assert 0 < (decode(item, 32).float() - plain.float()).abs().mean() < 3, (mode, kind)


def test_decode_is_room_01_for_ordinary_files(tmp_path):
    for i, (w, h) in enumerate([(40, 40), (90, 60), (61, 87), (500, 300), (33, 33), (200, 40)]):
        picture(i, w, h).save(tmp_path / f"{i}.{['jpg', 'png', 'webp'][i % 3]}")
    kept, source = read_folder(tmp_path, 32, progress=False), FolderSource(tmp_path)
    assert (
        [source.files[i] for i in range(6)]
        == list(kept.paths)
        == [str(p.relative_to(tmp_path)) for p in image_files(tmp_path)]
    )
    assert all(torch.equal(decode(source.item(i), 32), kept.images[i]) for i in range(6))


# --- kinds of sources ------------------------------------------------------------------------------


def scenes_folder(root, count=24, classes="abc"):
    toys = ToyScenes(size=24, length=count)
    for i in range(count):
        folder = root / classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        ObjectSource(toys)
        Image.fromarray(ObjectSource(toys).item(i).data).save(folder / f"{i:03}.png")
    return root


def test_folders_give_classes_captions_and_a_hash(tmp_path):
    root = scenes_folder(tmp_path / "set")
    (root / "a" / "000.txt").write_text("  a plain text\n", encoding="utf-8")
    (root / "b" / "001.json").write_text(json.dumps({"caption": "from json", "other": 1}))
    (root / "c" / "002.json").write_text("{broken")
    source, kept = FolderSource(root), read_folder(root, 24, progress=False)
    assert (
        source.classes == kept.classes == ("a", "b", "c")
        and source.labels.tolist() == kept.labels.tolist()
        and [source.files[i] for i in range(24)] == list(kept.paths)
    )
    said = {source.item(i).key: source.caption(i) for i in range(24)}
    assert (
        said.pop("a/000.png") == "a plain text"
        and said.pop("b/001.json".replace("json", "png")) == "from json"
        and set(said.values()) == {None}
    )
    again = FolderSource(root)
    assert (
        again.hash == source.hash
        and len(source.hash) == 16
        and FolderSource(root, limit=20).hash != source.hash
    )
    os.utime(root / "a" / "000.png", (1, 1))
    assert FolderSource(root).hash == source.hash, "a copy of the data is the same data"
    content = (root / "a" / "000.png").read_bytes()
    (root / "a" / "000.png").write_bytes(content[:-1] + b"?")
    assert FolderSource(root).hash != source.hash, "same names, same sizes, other bytes"
    (root / "loose.png").write_bytes(content)
    with pytest.warns(UserWarning, match="1 images lie beside the class folders"):
        assert len(FolderSource(root)) == 24
    with pytest.raises(IndexError):
        source.item(24)
    with pytest.raises(IndexError):
        source.item(-1)
    with pytest.raises(FileNotFoundError):
        FolderSource(tmp_path / "none")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="no image files"):
        FolderSource(tmp_path / "bare")


def test_sets_by_name_agree_with_room_01(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    for kind, count in (("train", 30), ("t10k", 5)):
        for name, a in (
            ("images-idx3", images[:count]),
            ("labels-idx1", (np.arange(count) % 10).astype(np.uint8)),
        ):
            (raw / f"{kind}-{name}-ubyte").write_bytes(
                struct.pack(">BBBB", 0, 0, 8, a.ndim) + struct.pack(f">{a.ndim}I", *a.shape) + a.tobytes()
            )
    source = open_source("fashion_mnist", root=tmp_path)
    train, _ = load_data("fashion_mnist", 28, 0, 0, progress=False, root=tmp_path)
    kept = as_image_set(source, 28)
    assert (
        len(source) == 30
        and source.classes == train.classes
        and torch.equal(kept.images, torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1))
        and kept.labels[:, 0].tolist() == [i % 10 for i in range(30)]
    )
    assert (
        len(open_source("fashion_mnist", root=tmp_path, split="val")) == 5
        and open_source("fashion_mnist", root=tmp_path, split="val").hash != source.hash
    )
    with pytest.raises(FileNotFoundError, match="cifar10 is not at"):
        open_source("cifar10", root=tmp_path)


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def shards(root, count=3, each=10):
    root.mkdir(exist_ok=True)
    for s in range(count):
        members = []
        for i in range(s * each, (s + 1) * each):
            key = f"train/{i:05}" if i % 2 else "n" * 120 + f"/{i:05}"  # long names need an extended header
            members += [
                (f"{key}.{'JPG' if i % 3 else 'png'}", encoded(picture(i), "JPEG" if i % 3 else "PNG")),
                (f"{key}.cls", str(i % 7).encode()),
            ]
            members += (
                [(f"{key}.txt", f"caption {i}".encode())]
                if i % 4
                else [(f"{key}.json", json.dumps({"text": f"json {i}"}).encode())]
            )
            members += [(f"{key}.seg.png", b"a mask, not the picture")]
        write_shard(root / f"x-{s:03}.tar", [("__meta__", b"skipped"), *members])
    return root


def test_tar_shards_agree_with_webdataset(tmp_path):
    pytest.importorskip("webdataset")
    wds = importlib.import_module("webdataset")
    root = shards(tmp_path / "shards")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = TarSource(str(root / "x-{000..002}.tar"))
    theirs = list(
        wds.WebDataset([str(root / f"x-{s:03}.tar") for s in range(3)], shardshuffle=False, empty_check=False)
    )
    assert len(source) == len(theirs) == 30 and source.classes == tuple("0123456")
    for i, sample in enumerate(theirs):
        item = source.item(i)
        assert (
            item.data == (sample.get("jpg") or sample["png"])
            and item.label == int(sample["cls"])
            and item.key.endswith(sample["__key__"])
        )
        assert item.caption == (
            sample["txt"].decode() if "txt" in sample else json.loads(sample["json"])["text"]
        )
    with wds.TarWriter(str(tmp_path / "w.tar")) as out:  # and what their writer writes
        for i in range(5):
            out.write({"__key__": f"s{i}", "jpg": encoded(picture(i)), "cls": i, "txt": f"t{i}"})
    ours = open_source(tmp_path / "w.tar")
    assert [(ours.item(i).label, ours.caption(i)) for i in range(5)] == [
        (i, f"t{i}") for i in range(5)
    ] and ours.item(3).data == encoded(picture(3))


def test_tar_patterns_index_and_damage(tmp_path):
    assert (
        expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
        and expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
        and expand_braces("{3..1}") == ["3", "2", "1"]
        and expand_braces("x") == ["x"]
    )
    root = shards(tmp_path / "shards")
    source = TarSource(str(root / "x-*.tar"), index=tmp_path / "index")
    assert (
        len(list((tmp_path / "index").iterdir())) == 3
        and source.hash
        == TarSource(str(root / "x-{000..002}.tar")).hash
        == open_source(root).hash
        == open_source([root / f"x-{s:03}.tar" for s in range(3)]).hash
    )
    original = data_tar.index_shard
    data_tar.index_shard = None  # the kept index is used: nothing may be indexed again
    try:
        assert TarSource(str(root / "x-*.tar"), index=tmp_path / "index").hash == source.hash
    finally:
        data_tar.index_shard = original
    for kept in (tmp_path / "index").iterdir():
        kept.write_text("{damaged")
    assert TarSource(str(root / "x-*.tar"), index=tmp_path / "index").hash == source.hash
    write_shard(root / "x-001.tar", [("new.jpg", encoded(picture(99))), ("new.cls", b"3")])
    fresh = TarSource(str(root / "x-*.tar"), index=tmp_path / "index")
    assert len(fresh) == 21 and fresh.item(10).data == encoded(picture(99)) and fresh.hash != source.hash, (
        "a changed shard is indexed anew"
    )

    whole = (root / "x-000.tar").read_bytes()
    cut = index_shard(root / "x-000.tar")["at"][4] + 100
    (root / "x-000.tar").write_bytes(whole[:cut])  # in the middle of the fifth picture
    with pytest.warns(UserWarning, match="x-000.tar is damaged .*; 4 samples before that"):
        assert len(TarSource(str(root / "x-*.tar"))) == 15
    (root / "x-002.tar").write_bytes(b"no tar at all" * 100)
    with pytest.warns(UserWarning, match="x-00[02].tar is damaged"):
        assert len(TarSource(str(root / "x-*.tar"))) == 5
    (root / "x-000.tar").write_bytes(whole)
    (tmp_path / "e.tar").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no pictures"):
        TarSource(tmp_path / "e.tar")
    with pytest.raises(FileNotFoundError, match="1 of 4 shards are missing.*x-003"):
        TarSource(str(root / "x-{000..003}.tar"))
    with pytest.raises(FileNotFoundError):
        TarSource(str(root / "y-*.tar"))
    with pytest.raises(ValueError, match="is compressed"):
        open_source(str(tmp_path / "x.tar.gz"))
    with pytest.raises(ValueError, match="download them first"):
        open_source("https://host/x-{000..010}.tar")


def test_tar_labels_may_be_names_or_missing(tmp_path):
    write_shard(
        tmp_path / "named.tar",
        [
            (f"{i}.{e}", c)
            for i in range(4)
            for e, c in (("jpg", encoded(picture(i))), ("cls", (b"dog", b"cat")[i % 2]))
        ],
    )
    named = open_source(tmp_path / "named.tar")
    assert named.classes == ("cat", "dog") and named.labels.tolist() == [1, 0, 1, 0]
    write_shard(
        tmp_path / "some.tar",
        [
            ("0.jpg", encoded(picture(0))),
            ("0.cls", b"1"),
            ("1.jpg", encoded(picture(1))),
            ("2.jpg", encoded(picture(2))),
            ("2.cls", b"-4"),
        ],
    )
    with pytest.warns(UserWarning, match="2 of 3 samples .* no valid label"):
        assert open_source(tmp_path / "some.tar").labels.tolist() == [1]
    write_shard(
        tmp_path / "none.tar",
        [("0.jpg", encoded(picture(0))), ("nodot", b"x"), (".hidden", b"x"), ("1.txt", b"no picture")],
    )
    bare = TarSource(tmp_path / "none.tar")
    assert len(bare) == 1 and bare.classes == ("all",) and bare.caption(0) is None
    with pytest.raises(ValueError, match="2 class names for labels up to 6"):
        TarSource(str(shards(tmp_path / "s") / "x-*.tar"), classes=("a", "b"))


def hub_dataset(count=40, broken=()):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [
            {"bytes": b"broken" if i in broken else encoded(picture(i), "PNG"), "path": None}
            for i in range(count)
        ],
        "label": [i % 3 for i in range(count)],
        "text": [f"text {i}" for i in range(count)],
    }
    return datasets.Dataset.from_dict(
        rows,
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=["x", "y", "z"]),
                "text": datasets.Value("string"),
            }
        ),
    )


def test_hugging_face_data_sets(tmp_path):
    dataset = hub_dataset(broken=(5,))
    source = open_source(dataset)
    assert isinstance(source, HubSource) and len(source) == 40 and source.classes == ("x", "y", "z")
    item = source.item(7)
    assert (
        item.data == encoded(picture(7), "PNG")
        and item.label == 1
        and item.caption == "text 7" == source.caption(7)
    )
    report = survey(source, 16)
    assert (
        report.used == 39
        and report.skipped == {"not an image": 1}
        and report.first == {"not an image": "row 5"}
    )
    dataset.save_to_disk(tmp_path / "saved")
    saved = open_source(tmp_path / "saved")
    assert (
        saved.item(7) == item
        and saved.hash == open_source(tmp_path / "saved").hash != source.hash + "x"
        and open_source(tmp_path / "saved", limit=10).item(1).caption == "text 4"
    )
    theirs = np.asarray(dataset[7]["image"].convert("RGB"))
    assert np.array_equal(decode(item, 40).permute(1, 2, 0).numpy(), theirs)
    strings = dataset.remove_columns("label").add_column("label", ["b", "a"] * 20)
    assert HubSource(strings).classes == ("a", "b") and HubSource(strings).item(0).label == 1
    unlabelled = (
        dataset.remove_columns("label")
        .add_column("label", [-1] * 40)
        .cast_column("label", dataset.features["label"])
    )
    assert survey(HubSource(unlabelled), 16).skipped == {"no valid label": 40}
    with pytest.raises(ValueError, match="no column holds images"):
        HubSource(dataset.remove_columns("image"))
    with pytest.raises(ValueError, match="no column 'img'"):
        HubSource(dataset, image="img")
    feed = SourceLoader(source, 16, 8, workers=2)
    with pytest.warns(UserWarning, match="row 5"):
        seen = [next(feed) for _ in range(5)]
    assert seen[0][0].shape == (8, 3, 16, 16) and dict(feed.skipped) == {"not an image": 1}


def test_streams_resume_exactly():
    def stream():
        return open_source(hub_dataset(50, broken=(3, 30)).to_iterable_dataset(num_shards=4))

    def make(**o):
        return StreamLoader(stream(), 16, 8, seed=2, flip=True, crop="random", block=16, **o)

    feed, seen, states = make(), [], []
    for _ in range(15):  # more than two epochs
        states.append(json.loads(json.dumps(feed.state_dict())))
        seen.append((*next(feed), feed.captions()))
    assert feed.skipped["not an image"] >= 4 and feed.step == 15
    first = [c for *_, captions in seen[:6] for c in captions]
    assert len(first) == len(set(first)) == 48 and not {"text 3", "text 30"} & set(first), (
        "an epoch gives every usable picture once"
    )
    numbers = [int(c.split()[1]) for c in first]
    assert sorted(numbers[:15]) == [i for i in range(16) if i != 3] and numbers[:15] != sorted(
        numbers[:15]
    ), "the first block, in an order of its own"
    for at in (0, 1, 2, 5, 6, 7, 13):
        again = make(workers=2)
        again.load_state_dict(states[at])
        for images, labels, captions in seen[at : at + 2]:
            found = next(again)
            assert (
                torch.equal(found[0], images)
                and torch.equal(found[1], labels)
                and again.captions() == captions
            ), at
    jumped = make()
    jumped.step = 9
    assert torch.equal(next(jumped)[0], seen[9][0])
    jumped.step = 1
    assert torch.equal(next(jumped)[0], seen[1][0])
    shares = [make().micro_batches(4, rank, 2, 2) for rank in range(2)]
    assert sum(w for s in shares for _, w in s) == 2.0 and sorted(
        l.item() for s in shares for (_, ls), _ in s for l in ls
    ) == sorted(seen[4][1][:, 0].tolist())
    hopeless = StreamLoader(open_source(hub_dataset(3, broken=range(3)).to_iterable_dataset()), 16, 2)
    with pytest.raises(ValueError, match="could not be used"):
        next(hopeless)


def test_objects_parts_and_errors(tmp_path):
    toys = open_source(ToyScenes(size=16, length=40))
    assert (
        isinstance(toys, ObjectSource)
        and toys.item(3).caption == ToyScenes(size=16, length=40)[3].caption
        and open_source(toys) is toys
    )
    assert torch.equal(as_image_set(toys, 16).images, ToyScenes(size=16, length=40).render()[0]), (
        "no byte is lost on the way"
    )
    pairs = torch.utils.data.Subset([(picture(i), i % 2) for i in range(6)], range(6))
    assert [open_source(pairs).item(i).label for i in range(6)] == [0, 1] * 3 and open_source(
        pairs
    ).hash == open_source(pairs).hash
    small, _ = load_data("scenes", 16, 20, 4, progress=False)
    kept = as_image_set(open_source(small), 16)
    assert torch.equal(kept.images, small.images) and torch.equal(kept.labels[:, 0], small.labels[:, 0])
    pictures = FolderSource(scenes_folder(tmp_path / "set", 40))
    train, val = split_source(pictures)
    assert (
        sorted([*train.rows, *val.rows]) == list(range(40))
        and split_source(FolderSource(tmp_path / "set"))[1].hash == val.hash
    ), "a picture's side depends on its bytes alone"
    assert val.item(1).key == pictures.item(int(val.rows[1])).key and val.caption(1) == pictures.caption(
        int(val.rows[1])
    )
    with pytest.raises(IndexError):
        val.item(len(val))
    assert len(open_source(ToyScenes(size=16, length=40), limit=8)) == 8
    with pytest.raises(FileNotFoundError, match="neither .* nor tar shards .* nor a folder"):
        open_source("nothing_like_it")
    with pytest.raises(ValueError, match="no length"):
        open_source(3.5)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="none of the 1 pictures"):
        as_image_set(FolderSource(tmp_path / "bad"), 16)


# --- feeds -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def holes(tmp_path_factory):
    """30 pictures in a row of classes; five of them broken, two next to each other."""
    root = scenes_folder(tmp_path_factory.mktemp("holes") / "set", 30, "abcde")
    source = FolderSource(root)
    broken = [0, 7, 8, 20, 29]
    for i in broken:
        Path(source.item(i).data).write_bytes(b"" if i == 7 else b"garbage")
    for i in range(30):
        Path(source.item(i).data).with_suffix(".txt").write_text(f"caption {i}")
    return FolderSource(root), broken


def quiet(feed, steps=1):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [next(feed) for _ in range(steps)]


def test_batches_are_a_function_of_seed_and_step(holes):
    source, broken = holes

    def make(workers=0, **o):
        return SourceLoader(source, 16, 8, **(dict(seed=5, flip=True, crop="random") | o), workers=workers)

    feed = make()
    seen = quiet(feed, 12)
    assert (
        feed.step == 12
        and seen[0][0].shape == (8, 3, 16, 16)
        and seen[0][1].shape == (8, 1)
        and seen[0][1].dtype == torch.int64
        and -1 <= seen[0][0].min() < seen[0][0].max() <= 1
    )
    rows = torch.cat([feed.rows(s) for s in range(12)])
    for epoch in range(3):
        assert sorted(rows[30 * epoch : 30 * epoch + 30].tolist()) == list(range(30))
    assert not torch.equal(rows[:30], rows[30:60])
    for workers in (1, 2):
        helped = make(workers)
        for step in (0, 1, 2, 7, 8, 3, 3, 11):  # on, a jump, back, the same again
            helped.step = step
            ((images, labels),) = quiet(helped)
            assert torch.equal(images, seen[step][0]) and torch.equal(labels, seen[step][1]), (workers, step)
        helped.close()
        helped.step = 2
        assert torch.equal(quiet(helped)[0][0], seen[2][0]), "closed, it starts again when asked"
        helped.close()
    assert not torch.equal(quiet(make(seed=6))[0][0], seen[0][0])


def test_shares_are_the_whole(holes):
    source, _ = holes

    def make(workers=0):
        return SourceLoader(source, 16, 11, seed=1, flip=True, workers=workers)

    whole = quiet(make(), 3)[2]
    for world, micro, workers in ((1, 3, 2), (2, 1, 0), (3, 2, 0)):
        found, weights, labels = {}, 0, []
        for rank in range(world):
            feed = make(workers)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                feed.micro_batches(1, rank, world, micro)
                parts = feed.micro_batches(2, rank, world, micro)
            for positions, ((images, ys), weight) in zip(feed.shard(2, rank, world, micro), parts):
                assert weight == len(images) * world / 11
                weights += weight / world
                found |= {p: x for p, x in zip(positions.tolist(), images)}
        assert weights == pytest.approx(1) and all(torch.equal(found[p], whole[0][p]) for p in range(11))

    class Sorted(SourceLoader):
        def positions(self, step):
            return torch.arange(self.batch).flip(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(
            Sorted(source, 16, 11, seed=1, flip=True).micro_batches(2)[0][0][0], whole[0].flip(0)
        ), "the places are dealt in the order that `places` says, and a picture is the same at its place"


def test_the_next_usable_item_stands_in(holes):
    source, broken = holes
    feed = SourceLoader(source, 24, 30, seed=3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        images, labels = next(feed)
        next(feed)
    assert len(said) == 1 and "cannot be used" in str(said[0].message)
    assert dict(feed.skipped) == {"empty": 1, "not an image": 4}, "counted once an item, not once an epoch"
    rows = feed.rows(0).tolist()
    want = {0: 1, 7: 9, 8: 9, 20: 21, 29: 1}
    for place, row in enumerate(rows):
        item = source.item(want.get(row, row))
        assert (
            torch.equal(((images[place] + 1) * 127.5).round().byte(), decode(item, 24))
            and labels[place] == item.label
        ), "its picture and its label"
    assert feed.captions(feed.rows(0)) == [f"caption {want.get(r, r)}" for r in rows]
    fresh = SourceLoader(source, 24, 30, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert fresh.captions(torch.tensor([7, 8, 12])) == ["caption 9", "caption 9", "caption 12"], (
            "without having seen the batch"
        )


def test_chance_is_chance(tmp_path):
    wide = np.zeros((16, 64, 3), np.uint8)
    wide[..., 0] = np.arange(64) * 4
    Image.fromarray(wide).save(tmp_path / "wide.png")
    source = FolderSource(tmp_path)
    images = next(SourceLoader(source, 16, 400, crop="random"))[0]
    left = (images[:, 0, 0, 0] + 1) * 127.5
    assert left.min() < 25 and left.max() > 165 and abs(left.mean() - 96) < 12, (
        "squares from all along the long side"
    )
    images = next(SourceLoader(source, 16, 400, flip=True))[0]
    mirrored = images[:, 0, 0, 0] > images[:, 0, 0, -1]
    assert 0.4 < mirrored.float().mean() < 0.6
    plain = next(SourceLoader(source, 16, 4))[0]
    assert (
        torch.equal(plain[0], plain[3])
        and torch.equal(images[~mirrored][0], plain[0])
        and torch.equal(images[mirrored][0], plain[0].flip(-1))
    )


def test_a_feed_leaves_the_random_state_alone(holes):
    source, _ = holes
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for workers in (0, 2):
        feed = SourceLoader(source, 16, 8, workers=workers, flip=True)
        quiet(feed, 2)
        feed.step = 7
        quiet(feed)
        feed.close()
    assert (
        torch.equal(torch.get_rng_state(), before[0])
        and np.array_equal(np.random.get_state()[1], before[1])
        and random.getstate() == before[2]
    )


def test_workers_go_when_the_feed_does(holes):
    before, feed = time.perf_counter(), SourceLoader(holes[0], 16, 8, workers=2)
    quiet(feed)
    workers = feed._loader._iterator._workers
    assert len(workers) == 2 and all(w.is_alive() for w in workers)
    del feed  # no circle of references: this is enough
    assert not any(w.is_alive() for w in workers) and time.perf_counter() - before < 5


class Failing(Source):
    """Items that cannot be had."""

    name, classes = "failing", ("all",)

    def __init__(self, good=()):
        self.good = good

    def __len__(self):
        return 12

    def item(self, i):
        if i in self.good:
            return Item(np.full((8, 8, 3), i, np.uint8), 0, None, str(i))
        raise OSError("the disk is gone")

    def listed(self):
        yield b"x"


def test_what_fails_inside_a_source_is_a_reason_too():
    assert survey(Failing({3}), 8).skipped == {"item not readable (OSError)": 11}
    feed = SourceLoader(Failing({3}), 8, 5)
    with pytest.warns(UserWarning, match="item not readable"):
        images, _ = next(feed)
    assert (images == 3 / 127.5 - 1).all()
    for workers in (0, 1):
        with pytest.raises(ValueError, match="no usable picture"):
            next(SourceLoader(Failing(), 8, 5, workers=workers))
    with pytest.raises(ValueError, match="crop 'left'"):
        SourceLoader(Failing(), 8, 5, crop="left")


def test_workers_get_little_to_carry(tmp_path):
    """A million names are two arrays, not a million objects: what a worker shares or receives stays small."""
    import pickle

    names = data_sources.SharedStrings(f"class{i % 1000}/picture{i}.jpg" for i in range(100_000))
    assert len(pickle.dumps(names)) < 40 * 100_000 and names[99_999] == "class999/picture99999.jpg"


def test_rates_and_surveys_with_workers(holes):
    source, broken = holes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert reading_rate(source, 16, batch=8, seconds=0.05) > 10
    one, two = survey(source, 16), survey(source, 16, workers=2)
    assert (one.used, one.skipped, one.first) == (two.used, two.skipped, two.first) == (
        25,
        {"not an image": 4, "empty": 1},
        one.first,
    ) and str(one).count("\n") == 0
    assert survey(source, 16, limit=10).used + sum(survey(source, 16, limit=10).skipped.values()) == 10
    with pytest.warns(UserWarning, match="5 of 30 pictures"):
        kept = as_image_set(source, 16, workers=2)
    assert len(kept) == 25 and "5 broken left out" in kept.source and isinstance(Part(source, [1, 2]), Source)


# --- in the place of an ImageSet
# -------------------------------------------------------------------------------


def test_a_vae_trains_from_the_disk_and_resumes(tmp_path):
    """The same losses from a folder read while training as from memory; and a stop in between changes
    nothing, for a stream either.
    """
    from dataclasses import replace

    from flextok_edu.engine.config import PRESETS, StageConfig, VAEConfig
    from flextok_edu.data.opening import OnDisk
    from flextok_edu.engine.long_run import Stopped, long_run
    from flextok_edu.engine.trainer import Callback
    from flextok_edu.vae_training import train_vae

    rng = np.random.default_rng(0)
    for i in range(12):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(
            tmp_path / "ab"[i % 2] / f"{i}.png"
        )
    p = replace(
        PRESETS["micro"],
        image_size=16,
        vae=VAEConfig(latent_channels=4, channels=(8,), stem=4, layers=1, groups=4, attention=False),
        train_vae=StageConfig(steps=8, batch=4, ema=0.5),
    )
    p = replace(p, vae_loss=replace(p.vae_loss, perceptual=0.0, adversarial=0.0))
    source = FolderSource(tmp_path)

    class Stop(Callback):
        def step(self, training, backend, looked):
            if training.done == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    def losses(data, trainer=None):
        model, log = train_vae(data, p, progress=False, trainer=trainer)
        return [row["vae"] for row in log], model

    memory, _ = losses(as_image_set(source, 16))
    assert losses(OnDisk(source, 16))[0] == pytest.approx(memory, rel=1e-6) and losses(
        OnDisk(source, 16, workers=1)
    )[0] == pytest.approx(memory, rel=1e-6)
    kinds = {"folder": lambda: OnDisk(source, 16)}
    if importlib.util.find_spec("datasets"):
        kinds["stream"] = lambda: OnDisk(open_source(hub_dataset(9).to_iterable_dataset()), 16)
        for ask in (len, lambda data: data.hash):
            with pytest.raises(TypeError, match="is a stream: nobody knows its length or its hash"):
                ask(kinds["stream"]())
    for name, data in kinds.items():
        whole, model = losses(data())
        with pytest.raises(Stopped):
            losses(data(), long_run(tmp_path / f"run_{name}", device="cpu", callbacks=[Stop()]))
        resumed, again = losses(data(), long_run(tmp_path / f"run_{name}", device="cpu"))
        assert resumed == whole and all(
            torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters())
        ), name

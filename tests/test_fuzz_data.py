"""Doors for other people's data, 2,000 damaged inputs each (FLEXTOK_FUZZ=10: ten times as many): pictures,
shards, captions, indices, lists. Only results come out, or errors that a person can read.
"""

import io
import json
import os
import random
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, features

import flextok_edu.data.opening as data_opening
import flextok_edu.data.reading as data_reading
import flextok_edu.data.set_sources as data_set_sources
import flextok_edu.data.sources as data_sources
import flextok_edu.data.tar as data_tar
from flextok_edu.data.datasets import load_data
from flextok_edu.data.keys import load_keys, save_keys
from flextok_edu.data.learned import learned_from, load_learned, save_learned
from flextok_edu.data.reading import decode
from flextok_edu.data.sources import FolderSource, Item
from flextok_edu.data.tar import TarSource

CASES = 2000 * int(os.environ.get("FLEXTOK_FUZZ", 1))
FINE = (ValueError, OSError)  # FileNotFoundError is an OSError


def mutated(content, rng, most=5):
    """Some bytes changed, cut, doubled or moved."""
    content = bytearray(content)
    for _ in range(rng.randint(1, most)):
        if not content:
            break
        at, kind = rng.randrange(len(content)), rng.randrange(7)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            del content[at : at + rng.randint(1, 40)]
        elif kind == 4:
            content[at:at] = content[at : at + rng.randint(1, 60)]
        elif kind == 5:
            content[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
        else:
            content[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
    return bytes(content)


def encoded(seed, kind, **options):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8)).save(
        stream, kind, **options
    )
    return stream.getvalue()


def quiet(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def test_pictures():
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        ("PNG", {"exif": exif}),
        ("JPEG", {"exif": exif}),
        ("JPEG", {"progressive": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("PPM", {}),
    ]
    if features.check("avif"):
        kinds.append(("AVIF", {"speed": 10}))
    whole, used = [encoded(i, kind, **options) for i, (kind, options) in enumerate(kinds)], 0
    for i in range(CASES):
        found = decode(Item(mutated(whole[i % len(whole)], rng), 0, None, ""), 16)
        if isinstance(found, str):
            assert 0 < len(found) < 100
        else:
            assert found.shape == (3, 16, 16) and found.dtype == torch.uint8
            used += 1
    assert used > CASES // 20


def shard():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(4):
            for suffix, content in (
                ("png", encoded(i, "PNG")[:300]),
                ("cls", str(i).encode()),
                ("json", json.dumps({"caption": f"number {i}"}).encode()),
            ):
                info = tarfile.TarInfo(f"{'ü' * 60 if i == 2 else ''}{i}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_shards(tmp_path):
    rng, whole, path, used = random.Random(1), shard(), tmp_path / "s.tar", 0
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    for i in range(CASES):
        content = bytearray(whole)
        at = rng.choice(headers)
        if i % 4 == 0:
            content = bytearray(mutated(whole, rng))
        else:  # fields of a header, with a checksum that is right
            field, size = rng.choice(
                ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
            )
            value = rng.choice(
                (
                    b"\x80" + b"\0" * 3 + bytes(rng.randrange(256) for _ in range(8)),
                    b"\xff" * 12,
                    b"7" * 12,
                    b"-5",
                    b"\0" * 12,
                    b"../../etc/passwd",
                    bytes(rng.randrange(256) for _ in range(12)),
                    b"xgSLKD"[rng.randrange(6) :][:1],
                )
            )[:size]
            content[at + field : at + field + len(value)] = value
            content[at + 148 : at + 156] = b"%06o\0 " % (
                sum(content[at : at + 148]) + 256 + sum(content[at + 156 : at + 512])
            )
        path.write_bytes(content)
        try:
            source = quiet(TarSource, path)
            assert 0 < len(source) <= 12
            for n in range(len(source)):
                item = quiet(source.item, n)
                assert (
                    isinstance(item.data, bytes)
                    and isinstance(item.caption, str | None)
                    and 0 <= item.label < len(source.classes)
                )
            used += 1
        except FINE as error:
            assert str(error)
    assert used > CASES // 4


def test_captions():
    rng, used = random.Random(2), 0
    whole = [
        json.dumps(x).encode()
        for x in (
            {"caption": "a red boat", "other": [1, {"text": None}]},
            "text alone",
            {"text": "ünï çødé"},
            {"prompt": 3},
            [{"caption": "x"}],
            {"caption": ["a"]},
        )
    ]
    for i in range(CASES):
        text = mutated(whole[i % len(whole)], rng, 3)
        if i % 50 == 0:
            text = rng.choice((b"[", b'{"a":', b'{"caption":[')) * rng.choice((10, 1000, 100_000))
        if i % 50 == 1:
            text = b'{"caption": ' + b"9" * rng.choice((100, 10_000)) + b"}"
        try:
            found = data_sources.caption_of(text, i % 3 > 0)
            assert found is None or isinstance(found, str) and found
            used += 1
        except ValueError as error:
            assert str(error)
    assert used > CASES // 5


def test_kept_indices(tmp_path):
    rng, index, path = random.Random(3), tmp_path / "index", tmp_path / "s.tar"
    path.write_bytes(shard())
    first = quiet(TarSource, path, index=index)
    (kept,) = index.iterdir()
    whole, facts, stamp = (
        kept.read_bytes(),
        json.loads(kept.read_text()),
        json.loads(kept.read_text())["stamp"],
    )
    odd = (None, True, -1, 10**9, 2**70, 1.5, "x", [], {}, [[]], "\ud800")
    for i in range(CASES):
        if i % 2:
            content = mutated(whole, rng)
        else:
            found = json.loads(whole)
            key = rng.choice(list(found))
            if rng.random() < 0.3 or not isinstance(found[key], list) or not found[key]:
                found[key] = rng.choice(odd)
            elif rng.random() < 0.3:
                found[key] = found[key][: rng.randrange(len(found[key]))]
            else:
                found[key][rng.randrange(len(found[key]))] = rng.choice(odd)
            content = json.dumps(
                rng.choice((found, [found], list(found))) if rng.random() < 0.1 else found
            ).encode()
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            found = None
        assert isinstance(data_tar._sound(found, stamp), bool)
        if i % 20:
            continue
        kept.write_bytes(content)
        source = quiet(TarSource, path, index=index)
        for n in range(len(source)):
            quiet(source.item, n)
    for wrong in (
        {},
        [],
        None,
        facts | {"at": facts["at"][:-1]},
        facts | {"at": [0.5] * 4},
        facts | {"at": [2**40] * 4},
        facts | {"label": [[]] * 4},
        facts | {"text_json": [1] * 4},
        {"stamp": stamp},
        facts | {"note": 3},
        facts | {"others": []},
    ):
        kept.write_text(json.dumps(wrong))
        again = quiet(TarSource, path, index=index)
        assert again.hash == first.hash and json.loads(kept.read_text()) == facts, "made anew"


def test_lists_of_keys_and_what_was_learned(tmp_path):
    rng = random.Random(4)
    save_keys(tmp_path / "k.safetensors", {f"{i}.png".encode(): (i, i, i) for i in range(9)})
    whole = (tmp_path / "k.safetensors").read_bytes()
    for _ in range(CASES // 2):
        (tmp_path / "k.safetensors").write_bytes(mutated(whole, rng))
        found = load_keys(tmp_path / "k.safetensors")
        assert isinstance(found, dict) and all(isinstance(k, bytes) and len(v) == 3 for k, v in found.items())
    known = learned_from(quiet(load_data, "scenes", 16, 4, 2, progress=False)[0])
    save_learned(tmp_path, known)
    whole = (tmp_path / "learned.json").read_bytes()
    for _ in range(CASES // 2):
        (tmp_path / "learned.json").write_bytes(mutated(whole, rng))
        try:
            load_learned(tmp_path)
        except ValueError as error:
            assert "learned.json" in str(error)


def test_one_bad_record_does_not_stop_a_source(tmp_path):
    """Brackets in a side file, header sizes that cannot be: what is damaged is named, the rest is used."""
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(encoded(i, "PNG"))
    (tmp_path / "0.json").write_text("[" * 100_000)
    (tmp_path / "1.json").write_text('{"caption": "one"}')
    (tmp_path / "2.json").write_text("{broken")
    source = FolderSource(tmp_path)
    with pytest.warns(UserWarning, match="the caption '0.json' cannot be used .RecursionError"):
        captions = [source.item(i).caption for i in range(4)]
    assert captions == [None, "one", None, None] and list(source.damaged_captions) == ["0.json", "2.json"]

    def write(path, *headers):
        with open(path, "wb") as f:
            for name, content, size, pax in headers:
                info = tarfile.TarInfo(name)
                info.size = len(content) if size is None else size
                info.pax_headers = pax
                f.write(
                    info.tobuf(tarfile.GNU_FORMAT if size is not None and not pax else tarfile.PAX_FORMAT)
                    + content
                    + b"\0" * (-len(content) % 512)
                )
            f.write(b"\0" * 1024)

    good, folder = encoded(0, "PNG"), tmp_path / "tars"
    folder.mkdir()
    for i, (size, pax) in enumerate(
        (
            (2**60, {}),
            (2**80, {}),
            (None, {"size": "-50"}),
            (None, {"size": "9" * 4000}),
            (None, {"size": "1e9"}),
            (None, {"path": "x" * 50_000}),
        )
    ):
        write(
            folder / "a.tar",
            ("0.png", good, None, {}),
            ("0.cls", b"0", None, {}),
            ("x.bin", b"12", size, pax),
            ("1.png", good, None, {}),
            ("1.cls", b"0", None, {}),
        )
        write(folder / "b.tar", ("2.png", good, None, {}), ("2.cls", b"1", None, {}))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            source = TarSource([folder / "a.tar", folder / "b.tar"])
        assert (
            source.item(0).data == good
            and source.item(len(source) - 1).data == good
            and len(source) in (2, 3)
        ), i
        if len(source) == 2:
            assert "a.tar is damaged" in str(said[0].message) and "1 samples before that are used" in str(
                said[0].message
            )


def test_a_chain_of_extended_headers_ends(tmp_path):
    with open(tmp_path / "s.tar", "wb") as f:
        block = tarfile.TarInfo._create_pax_generic_header({"comment": "x"}, tarfile.XHDTYPE, "utf-8")
        f.write(block * 3000)
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="no pictures"):
        TarSource(tmp_path / "s.tar")


def test_patterns_are_expanded_up_to_a_limit():
    for pattern in (
        "x-{0..30000000}.tar",
        "{0..999999999999999999}",
        "{0..1000}{0..1000}{0..1000}",
        "{a,b}" * 60,
    ):
        with pytest.raises(ValueError, match="stands for more than 1,000,000 files"):
            data_tar.expand_braces(pattern)
    assert data_tar.expand_braces("{a}" * 3000) == ["a" * 3000] and data_tar.expand_braces("{1..3}{x,y}") == [
        "1x",
        "1y",
        "2x",
        "2y",
        "3x",
        "3y",
    ]
    with pytest.raises(ValueError, match="stands for more than"):
        data_opening.open_source("x-{0..30000000}.tar")


def test_rows_may_not_name_files_of_this_machine(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "secret.png").write_bytes(encoded(0, "PNG"))
    rows = datasets.Dataset.from_dict(
        {
            "image": [
                {"bytes": None, "path": p}
                for p in ("/etc/passwd", str(tmp_path / "secret.png"), "~/.ssh/id_rsa")
            ]
            + [{"bytes": encoded(1, "PNG"), "path": "/nowhere/1.png"}]
        },
        features=datasets.Features({"image": datasets.Image()}),
    )
    source = data_opening.open_source(rows)
    assert data_reading.survey(source, 16).skipped == {"names a local file": 3} and len(source.hash) == 16
    stream = data_opening.open_source(rows.to_iterable_dataset())
    assert (
        sorted(isinstance(decode(item, 16), str) for item in stream) == [False, True, True, True]
        and len(list(data_opening.split_source(stream)[0])) + len(list(data_opening.split_source(stream)[1]))
        == 4
    )
    for _ in range(20):  # what cannot be read has a key too, and always the same
        assert len(list(data_opening.split_source(stream)[0])) == 4 - len(
            list(data_opening.split_source(stream)[1])
        ), "each on one side"
        assert data_set_sources.HubSource(rows).find_keys().tolist() == source.find_keys().tolist()
    assert data_reading.survey(data_set_sources.HubSource(rows, files=tmp_path), 16).skipped == {
        "names a local file": 2
    }
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    assert data_reading.survey(source, 16).skipped == {"names a local file": 2}, (
        "what `datasets` itself unpacked is read"
    )


def test_a_damaged_saved_data_set_is_an_error_for_a_person(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "state.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no data set that datasets can read"):
        data_opening.open_source(tmp_path)

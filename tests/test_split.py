"""Who may learn from what: a picture's side depends on its bytes alone, whatever the seed, the number, the
order and the route; and what a model learned from is known later.
"""

import io
import json
import tarfile
import warnings
from dataclasses import replace

import numpy as np
import pytest
from planting import patch
import torch
from PIL import Image

import flextok_edu.data.keys as data_keys
import flextok_edu.data.sets as data_sets
import flextok_edu.data.sources as data_sources
from flextok_edu.data.datasets import ImageSet, load_data
from flextok_edu.data.keys import held_out, picture_key, picture_keys
from flextok_edu.data.learned import Learned, learned_from, leave_out_learned, load_learned, save_learned
from flextok_edu.data.scenes import ToyScenes
from flextok_edu.data.opening import OnDisk, as_image_set, open_source, split_source
from flextok_edu.data.set_sources import HubSource
from flextok_edu.data.sources import FolderSource
from flextok_edu.data.streams import StreamSource


def encoded(seed, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed + 1000).integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(
        stream, kind
    )
    return stream.getvalue()


def folder(root, count=60, classes=("a", "b"), first=0):
    for i in range(count):
        place = root / classes[i % len(classes)]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:03}.png").write_bytes(encoded(first + i))
    return root


def quiet(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def loaded(root, val_images=100, **options):
    return quiet(load_data, str(root), 8, 0, val_images, progress=False, **options)


def keys(data):
    return set(data.keys.tolist())


def test_the_key_is_of_the_bytes(tmp_path):
    one = encoded(1)
    (tmp_path / "a.png").write_bytes(one)
    (tmp_path / "b.bin").write_bytes(one)
    assert (
        picture_key(one)
        == picture_key(tmp_path / "a.png")
        == picture_key(str(tmp_path / "b.bin"))
        != picture_key(encoded(2))
    )
    array = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert picture_key(array) == picture_key(torch.from_numpy(array)) != picture_key(array.reshape(1, 4, 3))
    assert (
        picture_key(array[:, ::-1]) == picture_key(array[:, ::-1].copy())
        and -(2**63) <= picture_key(one) < 2**63
    )
    with pytest.raises(OSError):
        picture_key(tmp_path / "none.png")


def test_one_in_eight_by_each_key_alone():
    all_keys = torch.tensor([picture_key(i.to_bytes(4, "big")) for i in range(4000)])
    held = held_out(all_keys)
    assert abs(held.float().mean() - 0.125) < 0.02
    some = torch.randperm(4000, generator=torch.Generator().manual_seed(0))[:777]
    assert torch.equal(held_out(all_keys[some]), held[some])
    for n in range(2, 30):
        for start in range(0, 300, 30):
            part = held_out(all_keys[start : start + n])
            assert 0 < part.sum() < n
            assert torch.equal(held_out(all_keys[start : start + n].flip(0)), part.flip(0)), (
                "not of the order"
            )
    assert (
        held_out(torch.tensor([8, 16, 24])).tolist() == [True, True, False]
        and held_out(torch.tensor([3, 3, 3])).tolist() == [False] * 3
    )
    assert held_out(torch.tensor([3, 3, 2, 7])).tolist() == [False, False, True, False] and not len(
        held_out(torch.zeros(0, dtype=torch.int64))
    )


def test_a_side_depends_on_nothing_but_the_picture(tmp_path):
    root = folder(tmp_path / "set")
    train, val = loaded(root)
    assert (
        (train.rule, val.rule) == ("one in eight",) * 2
        and len(train) + len(val) == 60
        and 3 < len(val) < 16
        and not keys(train) & keys(val)
    )
    (root / "a" / "000 again.png").write_bytes(encoded(0))  # a double
    (root / "b" / "broken.png").write_bytes(b"no picture")  # a broken file
    for options in ({"seed": 1}, {"val_images": 3}, {"limit": 10}, {"limit": 20, "seed": 5, "val_images": 1}):
        other_train, other_val = loaded(root, **options)
        assert not keys(other_train) & keys(val) and not keys(train) & keys(other_val), options
        assert len(other_train) == options.get("limit", len(train)) and len(other_val) == min(
            len(val), options.get("val_images", 99)
        ), "the limit is one of the training side"
    for i in range(60):
        (root / "ab"[i % 2] / f"{i:03}.png").rename(root / "ab"[i % 2] / f"{(i * 37) % 60:03} renamed.png")
    assert keys(loaded(root)[1]) == keys(val), "neither order nor names"


def test_every_route_gives_the_same_sides(tmp_path):
    datasets = pytest.importorskip("datasets")
    root = folder(tmp_path / "set")
    train, val = loaded(root)
    disk_train, disk_val = split_source(FolderSource(root))
    assert keys(disk_train) == keys(train) and keys(disk_val) == keys(val) and disk_val.rule == "one in eight"
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for i in reversed(range(60)):
            for suffix, content in (("png", encoded(i)), ("cls", b"1")):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    tar_train, tar_val = split_source(open_source(tmp_path / "s.tar"))
    assert keys(tar_val) == keys(val) and keys(tar_train) == keys(train)
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(i), "path": None} for i in range(60)]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    assert keys(split_source(HubSource(rows))[1]) == keys(val)
    sides = [
        {picture_key(item.data) for item in side}
        for side in split_source(open_source(rows.to_iterable_dataset()))
    ]
    assert sides == [keys(train), keys(val)]
    few_train, few_val = split_source(FolderSource(root), limit=10, val_images=2)
    assert (
        (len(few_train), len(few_val)) == (10, 2)
        and keys(few_train) < keys(train)
        and keys(few_val) < keys(val)
    )
    kept = as_image_set(few_val, 8)
    assert (
        keys(kept) == keys(few_val)
        and kept.rule == "one in eight"
        and torch.equal(kept.images[0], val.images[val.keys.tolist().index(int(kept.keys[0]))])
    )
    assert not keys(OnDisk(disk_train, 8)) & keys(kept) and OnDisk(disk_train, 8).rule == "one in eight"


def test_equal_pixels_in_other_files_are_left_out_of_the_held_out_part(tmp_path):
    root = folder(tmp_path / "set", 40)
    train, val = loaded(root)
    for i in range(0, 40, 3):  # the same pixels, other bytes
        stream = io.BytesIO()
        Image.open(io.BytesIO(encoded(i))).save(stream, "BMP")
        (root / "a" / f"{i:03} copy.bmp").write_bytes(stream.getvalue())
    new_train, new_val = loaded(root)
    pixels = [{x.numpy().tobytes() for x in part.images} for part in (new_train, new_val)]
    assert not pixels[0] & pixels[1] and "that are also trained on" in new_val.source
    copies = int(new_val.source.split(" that are also")[0].split("(")[1])
    assert copies > 0 and len(new_train) + len(new_val) == 40


def test_train_and_val_folders_are_no_classes(tmp_path):
    """ImageNet's own layout: read as two classes, val was trained on."""
    for names in (("train", "val"), ("Training", "validation"), ("train", "test")):
        root = tmp_path / names[1]
        folder(root / names[0], 20, ("cat", "dog"))
        folder(root / names[1], 12, ("cat", "dog"), 100)
        with pytest.warns(UserWarning, match=f"{names[0]}/ is for training, {names[1]}/ for evaluation"):
            train, val = load_data(str(root), 8, 0, 100, progress=False)
        assert (
            train.classes == val.classes == ("cat", "dog")
            and (len(train), len(val)) == (20, 12)
            and train.rule == val.rule == "train and val folders"
        )
        assert val.labels[:, 0].tolist() == [0] * 6 + [1] * 6 and keys(val) == {
            picture_key(encoded(100 + i)) for i in range(12)
        }
        disk_train, disk_val = quiet(lambda: split_source(open_source(root)))
        assert (
            (len(disk_train), len(disk_val)) == (20, 12)
            and keys(disk_val) == keys(val)
            and disk_train.classes == ("cat", "dog")
            and disk_val.labels.tolist() == val.labels[:, 0].tolist()
        )
        assert len(quiet(open_source, root, split="val")) == 12
        few = loaded(root, 4, limit=10)
        assert (
            few[1].labels[:, 0].tolist() == [0, 0, 1, 1] and few[0].labels[:, 0].tolist() == [0] * 5 + [1] * 5
        )
    (tmp_path / "val" / "train" / "cat" / "copy.png").write_bytes(encoded(100))  # lies on both sides
    assert (
        "1 that are also held out" in loaded(tmp_path / "val")[0].source
        and len(loaded(tmp_path / "val")[1]) == 12
    )
    disk_train, disk_val = quiet(lambda: split_source(open_source(tmp_path / "val")))
    assert (len(disk_train), len(disk_val)) == (20, 12) and not keys(disk_train) & keys(disk_val)


def test_odd_train_and_val_folders(tmp_path):
    root = tmp_path / "strangers"
    folder(root / "train", 20, ("cat", "dog"))
    folder(root / "val", 4, ("cow",))
    for door in (
        lambda: load_data(str(root), 8, 0, 9, progress=False),
        lambda: split_source(FolderSource(root)),
    ):
        with pytest.raises(ValueError, match="cow, which is no class of the training folder"):
            quiet(door)
    root = tmp_path / "empty"
    folder(root / "train", 20, ("cat", "dog"))
    (root / "val").mkdir()
    with pytest.warns(UserWarning, match="no val/ with pictures in it"):
        train, val = load_data(str(root), 8, 0, 9, progress=False)
    assert train.classes == ("cat", "dog") and train.rule == "one in eight" and len(train) + len(val) == 20
    assert keys(quiet(lambda: split_source(FolderSource(root)))[1]) == keys(val)
    root = folder(tmp_path / "vehicles", 30, ("train", "plane", "car"))  # a class that is called train
    assert loaded(root)[0].classes == ("car", "plane", "train") and loaded(root)[0].rule == "one in eight"
    root = tmp_path / "nested"
    folder(root / "train" / "cat", 10, ("x", "y"))
    folder(root / "train" / "dog", 10, ("x", "y"), 50)
    folder(root / "val" / "cat" / "deep", 4, ("z",), 90)
    assert loaded(root)[0].classes == ("cat", "dog") and loaded(root)[1].labels[:, 0].tolist() == [0] * 4


def test_a_named_set_keeps_its_split_from_the_disk(tmp_path):
    folder(tmp_path / "imagenet" / "train", 40, ("n1", "n2"))
    folder(tmp_path / "imagenet" / "val", 10, ("n1", "n2"), 100)
    (tmp_path / "imagenet" / "train" / "n1" / "x.png").write_bytes(encoded(101))
    train, val = load_data("imagenet", 8, 0, 100, progress=False, root=tmp_path)
    disk_train, disk_val = split_source(open_source("imagenet", root=tmp_path))
    assert (
        train.rule == val.rule == disk_train.rule == disk_val.rule == "own split"
        and keys(disk_val) == keys(val)
        and keys(disk_train) == keys(train)
        and len(val) == 10
        and len(train) == 40
    )
    for f in (tmp_path / "imagenet" / "val").rglob("*.png"):
        f.unlink()
    train, val = load_data("imagenet", 8, 0, 100, progress=False, root=tmp_path)
    assert train.rule == "one in eight" and keys(
        split_source(open_source("imagenet", root=tmp_path))[1]
    ) == keys(val)


def test_a_saved_data_set_keeps_its_validation_split(tmp_path):
    datasets = pytest.importorskip("datasets")

    def part(first, n):
        return datasets.Dataset.from_dict(
            {"image": [{"bytes": encoded(i), "path": None} for i in range(first, first + n)]},
            features=datasets.Features({"image": datasets.Image()}),
        )

    datasets.DatasetDict(train=part(0, 20), validation=part(100, 9)).save_to_disk(tmp_path / "both")
    train, val = split_source(open_source(tmp_path / "both"))
    assert (len(train), len(val), val.rule, train.rule) == (20, 9, "own split", "own split") and keys(
        val
    ) == {picture_key(encoded(100 + i)) for i in range(9)}
    train, val = split_source(open_source(tmp_path / "both", streaming=True))
    assert (len(list(train)), len(list(val))) == (20, 9)
    part(0, 30).save_to_disk(tmp_path / "one")
    assert len(split_source(open_source(tmp_path / "one"))[1]) < 10


def test_keys_are_kept_and_made_anew(tmp_path, monkeypatch):
    root, index = folder(tmp_path / "set", 20), tmp_path / "index"
    first = FolderSource(root, index=index).keys
    (kept,) = index.iterdir()
    patch(monkeypatch, data_keys, "picture_key", None)  # nothing may be hashed again
    assert torch.equal(FolderSource(root, index=index).keys, first)
    monkeypatch.undo()
    whole = kept.read_bytes()
    for damage in (b"", b"{", whole[:-9], whole[:200], b"\xff" * 100):  # rebuilt
        kept.write_bytes(damage)
        assert torch.equal(FolderSource(root, index=index).keys, first) and len(kept.read_bytes()) == len(
            whole
        )
    (root / "a" / "000.png").write_bytes(encoded(777))
    assert FolderSource(root, index=index).keys[0] == picture_key(encoded(777)) and torch.equal(
        FolderSource(root, index=index).keys[1:], first[1:]
    )
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(root / "b", "b")
    tars = open_source(tmp_path / "s.tar", index=index)
    tar_keys = tars.keys
    patch(monkeypatch, data_keys, "picture_key", None)
    assert torch.equal(open_source(tmp_path / "s.tar", index=index).keys, tar_keys) and torch.equal(
        tar_keys.sort().values, first[10:].sort().values
    )
    monkeypatch.undo()
    patch(monkeypatch, data_keys, "_KEPT", 1)
    patch(monkeypatch, data_sets, "CACHE_ROOT", str(tmp_path / "home"))
    picture_keys([root / "b" / "001.png"])
    assert len(list((tmp_path / "home" / "keys").iterdir())) == 1
    patch(monkeypatch, data_sets, "CACHE_ROOT", "/proc/nowhere")
    assert picture_keys([root / "b" / "001.png"])[0] == picture_key(root / "b" / "001.png"), (
        "where nothing can be kept, nothing is lost"
    )


def test_large_sets_with_an_own_split_are_not_hashed(tmp_path, monkeypatch):
    folder(tmp_path / "imagenet" / "train", 40, ("n1", "n2"))
    folder(tmp_path / "imagenet" / "val", 10, ("n1", "n2"), 100)
    patch(monkeypatch, data_sources, "HASHED_AT_MOST", 20)
    train, val = split_source(open_source("imagenet", root=tmp_path))
    assert train.keys is None and val.keys is not None
    known = learned_from(train)
    assert known.keys is None and known.count == 40 and known.hash == train.hash
    assert leave_out_learned(as_image_set(val, 8), {"vae": known})[1]["vae"]["overlap"] == "none"
    assert leave_out_learned(replace(as_image_set(val, 8), source=train.name), {"vae": known})[1]["vae"][
        "overlap"
    ].startswith("unknown"), "the same part"
    other = folder(tmp_path / "other")
    assert leave_out_learned(loaded(other)[1], {"vae": known})[1]["vae"]["overlap"].startswith("unknown")


def test_what_was_learned_is_kept_and_left_out(tmp_path):
    train, val = loaded(folder(tmp_path / "set"))
    known = learned_from(train)
    assert known.facts == {
        "rule": "one in eight",
        "source": train.source,
        "count": len(train),
        "hash": known.hash,
        "keys": True,
    } and json.dumps(known.facts)
    save_learned(tmp_path / "model", known)
    again = load_learned(tmp_path / "model")
    assert (
        again.facts == known.facts
        and torch.equal(again.keys, train.keys.sort().values)
        and load_learned(tmp_path) is None
    )
    both = ImageSet(
        torch.cat([val.images, train.images[:5]]),
        torch.cat([val.labels, train.labels[:5]]),
        val.classes,
        "mixed",
        keys=torch.cat([val.keys, train.keys[:5]]),
        rule="one in eight",
    )
    left, card = leave_out_learned(both, {"vae": known, "tokenizer": None})
    assert (
        torch.equal(left.images, val.images)
        and torch.equal(left.keys, val.keys)
        and "5 that were learned left out" in left.source
    )
    assert (
        card["vae"] == {"rule": "one in eight", "count": len(train), "hash": known.hash, "overlap": 5}
        and card["tokenizer"]["overlap"].startswith("unknown")
        and json.dumps(card)
    )
    assert leave_out_learned(val, {"vae": known})[0] is val
    with pytest.raises(ValueError, match="0 of .* held-out pictures are left.*vae"):
        leave_out_learned(train, {"vae": known})
    scenes_train, scenes_val = load_data("scenes", 16, 8, 4, seed=3, progress=False)
    other = load_data("scenes", 16, 8, 4, seed=9, progress=False)[0]
    for pictures, part, overlap in (
        (scenes_val, other, "none"),
        (scenes_val, train, "none"),
        (val, other, "none"),
    ):
        assert leave_out_learned(pictures, {"vae": learned_from(part)})[1]["vae"]["overlap"] == overlap
    assert leave_out_learned(other, {"vae": learned_from(scenes_train)})[1]["vae"]["overlap"].startswith(
        "unknown"
    )
    save_learned(tmp_path / "model", learned_from(other))
    assert (
        load_learned(tmp_path / "model").keys is None
        and not (tmp_path / "model" / "learned.safetensors").exists()
    )
    for made, overlap in (
        (ImageSet(val.images, val.labels, ("a", "b"), "drawn", True), "none"),
        (ImageSet(val.images, val.labels, ("a", "b"), "photographs"), "none"),
    ):
        assert leave_out_learned(made, {"vae": learned_from(other)})[1]["vae"]["overlap"] == overlap
    assert learned_from(ImageSet(val.images, val.labels, ("a", "b"), "drawn", True)).rule == "scenes"
    bare = ImageSet(val.images, val.labels, val.classes, "by hand")
    assert leave_out_learned(bare, {"vae": known})[1]["vae"]["overlap"].startswith(
        "unknown: there is no list of these pictures"
    )


def test_a_damaged_list_is_refused(tmp_path):
    train, _ = loaded(folder(tmp_path / "set"))
    save_learned(tmp_path, learned_from(train))
    whole = (tmp_path / "learned.json").read_text()
    for damage in (
        "",
        "[",
        "[1]",
        "{}",
        whole.replace('"count": ', '"count": 1'),
        whole.replace('"one in eight"', "3"),
        "[" * 100_000,
    ):
        (tmp_path / "learned.json").write_text(damage)
        with pytest.raises(ValueError, match="does not say what the model learned from"):
            load_learned(tmp_path)
    (tmp_path / "learned.json").write_text(whole)
    content = bytearray((tmp_path / "learned.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "learned.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is not the list that it names"):
        load_learned(tmp_path)


def test_streams_say_what_they_cannot_know(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": encoded(i), "path": None} for i in range(40)]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    stream = open_source(rows.to_iterable_dataset())
    train, _ = split_source(stream)
    known = learned_from(OnDisk(train, 8))
    assert known.count == -1 and known.keys is None and known.rule == "one in eight"
    _, val = loaded(folder(tmp_path / "set"))
    assert leave_out_learned(val, {"vae": known})[1]["vae"]["overlap"] == "none", (
        "a stream of seven in eight has not seen the eighth"
    )
    assert leave_out_learned(val, {"vae": learned_from(OnDisk(stream, 8))})[1]["vae"]["overlap"].startswith(
        "unknown"
    ), "the whole stream"
    with pytest.raises(ValueError, match="is a stream"):
        split_source(stream, limit=3)
    with pytest.raises(ValueError, match="side"):
        StreamSource(rows.to_iterable_dataset(), side="left")


def test_a_handful(tmp_path):
    with pytest.raises(ValueError, match="holds 7 usable images; training needs at least 8"):
        loaded(folder(tmp_path / "seven", 7))
    with pytest.raises(ValueError, match="at least 8"):
        split_source(FolderSource(tmp_path / "seven"))
    for i in range(10):
        train, val = loaded(folder(tmp_path / f"nine {i}", 9, first=100 * i))
        assert (
            len(train) + len(val) == 9
            and len(val) >= 1
            and keys(quiet(lambda: split_source(FolderSource(tmp_path / f"nine {i}")))[1]) == keys(val)
        )
    same = tmp_path / "same"
    same.mkdir()
    for i in range(10):
        (same / f"{i}.png").write_bytes(encoded(0))
    with pytest.raises(ValueError):
        loaded(same)
    with pytest.raises(ValueError):
        split_source(FolderSource(same))


def test_toy_scenes_are_disjoint_by_construction():
    train, val = split_source(open_source(ToyScenes(size=16, length=40)))
    assert (
        (len(train), len(val)) == (40, 5)
        and val.dataset.split == "val"
        and train.rule == val.rule == "scenes"
        and train.keys is None
    )
    assert isinstance(learned_from(train), Learned) and as_image_set(val, 16).keys is None

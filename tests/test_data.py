"""Image folders with all their accidents, and the speed-independent promises of ToyScenes."""

import io
import sys
import tarfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flextok_edu.apps.models import DataOptions
from flextok_edu.apps.pictures import on_disk, open_pictures
from flextok_edu.apps.run_config import RunConfig, check
from flextok_edu.engine.config import preset
from flextok_edu.engine.tensors import from_uint8
import flextok_edu.data.folders as data_folders
import flextok_edu.data.learned as data_learned
from flextok_edu.data.datasets import ImageSet, batches, load_data, spread
from flextok_edu.data.folders import image_files, read_folder
from flextok_edu.data.scenes import KINDS, ToyScenes, draw
from flextok_edu.data.opening import OnDisk, as_image_set, open_source, split_source
from flextok_edu.data.reading import SourceLoader
from flextok_edu.data.registry import (
    SOURCES,
    SourceKind,
    find_kind,
    function_at,
    is_place,
    register_source,
    unregister_source,
)
from flextok_edu.data.set_sources import ObjectSource
from flextok_edu.data.sources import FolderSource


def photo(size=(90, 60), seed=0):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )


def test_mixed_formats_sizes_and_modes(tmp_path):
    for name, image in {
        "rgb.png": photo(),
        "grey.jpg": photo().convert("L"),
        "palette.png": photo().convert("P"),
        "alpha.webp": photo().convert("RGBA"),
        "la.png": photo().convert("LA"),
        "one.bmp": photo((64, 200)).convert("1"),
        "cmyk.tif": photo().convert("CMYK"),
        "tiny.gif": photo((5, 3)),
        "float.tiff": Image.fromarray(np.linspace(0, 255, 400, dtype=np.float32).reshape(20, 20)),
        "ünïcode name.PNG": photo((300, 40)),
    }.items():
        image.save(tmp_path / name)
    found = read_folder(tmp_path, 32, progress=False)
    assert found.images.shape == (10, 3, 32, 32) and found.images.dtype == torch.uint8 and not found.skipped
    assert found.classes == ("all",) and found.labels.unique().tolist() == [0]


def test_broken_files_are_counted_in_one_warning(tmp_path):
    photo().save(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "notes.txt").write_text("not counted at all")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_folder(tmp_path, 16, progress=False)
    assert found.paths == ("good.png",) and len(found.skipped) == 4
    assert (
        len([w for w in caught if issubclass(w.category, UserWarning) and "4 of 5 files" in str(w.message)])
        == 1
    )


def test_nothing_usable_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        read_folder(tmp_path / "none", 16)
    with pytest.raises(ValueError, match="no image files"):
        read_folder(tmp_path, 16)
    (tmp_path / "bad.png").write_text("x")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="none of the 1 image files"):
            read_folder(tmp_path, 16, progress=False)


def test_class_subfolders_and_disjoint_split(tmp_path):
    for i in range(20):
        (tmp_path / f"class {i % 2}").mkdir(exist_ok=True)
        photo(seed=i).save(tmp_path / f"class {i % 2}" / f"{i}.png")
    for i in range(6):  # the same picture under other names must not be on both sides
        photo(seed=i).save(tmp_path / "class 0" / f"again {i}.png")
    photo(seed=99).save(tmp_path / "class 1" / ".hidden.png")
    train, val = load_data(str(tmp_path), 16, 0, 100, seed=3, progress=False)
    assert train.classes == ("class 0", "class 1") and (len(train), len(val)) == (16, 4)
    pixels = [{x.numpy().tobytes() for x in part.images} for part in (train, val)]
    assert not pixels[0] & pixels[1]
    assert torch.equal(load_data(str(tmp_path), 16, 0, 100, seed=4, progress=False)[1].images, val.images), (
        "the seed does not decide who is held out"
    )


@pytest.mark.parametrize("level", (1, 2, 3))
def test_scenes_do_not_depend_on_order_or_process(level):
    data = ToyScenes("val", 48, level, seed=7, length=50)
    images, labels = data.render(10, 5)
    assert torch.equal(images[3], ToyScenes("val", 48, level, seed=7, length=14).render(13, 1)[0][0])
    item = data[13]
    assert (
        torch.equal(item.image, from_uint8(images[3:4])[0])
        and item.label == labels[3, 0]
        and KINDS[item.label] in item.caption
    )
    assert len(item.scene.things) == level and draw(item.scene, 20).shape == (20, 20, 3)
    assert not torch.equal(ToyScenes("val", 48, level, seed=8, length=50).render(10, 1)[0][0], images[0])


def test_scenes_at_many_sizes():
    for size in (8, 31, 64, 200):
        assert ToyScenes("train", size, 3, length=1)[0].image.shape == (3, size, size)


def test_batches_of_a_set_smaller_than_the_batch():
    data = ImageSet(
        torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 8, 8).contiguous(),
        torch.arange(3)[:, None],
        ("a", "b", "c"),
        "three",
    )
    images, labels = next(batches(data, 7, flip=True))
    assert images.shape == (7, 3, 8, 8) and set(labels[:, 0].tolist()) == {0, 1, 2}


LINKS = pytest.mark.skipif(sys.platform == "win32", reason="links")


@LINKS
def test_linked_class_folders_are_read_and_circles_are_not(tmp_path):
    """`ln -s ../real/b sl/b`: the class was gone, without a word."""
    for name in "abc":
        (tmp_path / "real" / name).mkdir(parents=True)
        for i in range(8):
            photo(seed=ord(name) * 10 + i).save(tmp_path / "real" / name / f"{i}.png")
    (tmp_path / "real" / "b" / "0.txt").write_text("a caption in a linked folder")
    root = tmp_path / "sl"
    root.mkdir()
    (root / "a").mkdir()
    for i in range(8):
        photo(seed=i).save(root / "a" / f"{i}.png")
    (root / "b").symlink_to("../real/b")  # a class elsewhere
    (root / "c").mkdir()
    (root / "c" / "deeper").symlink_to(tmp_path / "real" / "c")  # and below a real folder
    (root / "d").symlink_to("../real/b")  # the same folder again
    (root / "a" / "round").symlink_to("..")  # a circle
    (root / "c" / "up").symlink_to(tmp_path)  # to above all of it
    (root / "gone").symlink_to("../real/none")
    with pytest.warns(UserWarning, match="not read below") as said:
        found = read_folder(root, 16, progress=False)
    assert (
        found.classes == ("a", "b", "c")
        and torch.bincount(found.labels).tolist() == [8, 8, 8]
        and "c/deeper/3.png" in found.paths
    )
    message = next(str(w.message) for w in said if "not read below" in str(w.message))
    assert "4 folders or links" in message and ("leads nowhere" in message or "read already" in message)
    _, lost = data_folders.walk(root)
    assert sorted(x.split(" (")[1] for x in lost) == [
        "a link that leads nowhere)",
        "a link to a folder above it)",
        "a link to a folder that is read already)",
        "a link to a folder that is read already)",
    ]
    with pytest.warns(UserWarning, match="not read below"):
        source = FolderSource(root)
    assert (
        [source.files[i] for i in range(24)] == list(found.paths)
        and source.labels.tolist() == found.labels.tolist()
        and source.caption(8) == "a caption in a linked folder"
    )
    many = tmp_path / "many"  # links that would double at each step
    many.mkdir()
    for i in range(30):
        (many / str(i)).mkdir()
        for side in "lr":
            (many / str(i) / side).symlink_to(f"../{i + 1}")
    photo().save(many / "29" / "x.png")
    assert len(image_files(many)) == 1


def test_what_is_passed_over_is_counted_and_named(tmp_path):
    """A folder of HEIC and JFIF trained on the nine PNGs beside them."""
    for i in range(9):
        photo(seed=i).save(tmp_path / f"{i}.png")
    for i in range(5):
        (tmp_path / f"phone {i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "camera.NEF").write_bytes(b"raw")
    photo().save(tmp_path / "plain", "JPEG")
    for name in ("notes.txt", "labels.csv", "README", "Thumbs.db"):
        (tmp_path / name).write_text("no picture")
    photo(seed=33).save(tmp_path / "jfif.jfif", "JPEG")
    doors = (lambda: read_folder(tmp_path, 16, progress=False), lambda: FolderSource(tmp_path))
    for door in doors:
        with pytest.warns(UserWarning) as said:
            found = door()
        (message,) = [str(w.message) for w in said]
        assert (
            "5 files (.heic: HEIC needs the plug-in: pip install pillow-heif)" in message
            and "1 files (.nef: a camera's raw data" in message
        )
        assert (
            "1 files (no suffix: JPEG by its first bytes" in message
            and ".csv" not in message
            and "README" not in message
        )
        assert len(found.paths if hasattr(found, "paths") else found) == 10, "JFIF is read"
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("0.png", "phone 0.HEIC", "phone 1.HEIC", "camera.NEF"):
            tar.add(tmp_path / name, name)
    with pytest.warns(UserWarning, match="2 samples .*pillow-heif.*1 samples .*raw data"):
        assert len(open_source(tmp_path / "s.tar")) == 1
    (tmp_path / "imagenet" / "train" / "n1").mkdir(parents=True)
    for i in range(12):
        photo(seed=50 + i).save(tmp_path / "imagenet" / "train" / "n1" / f"{i}.png")
    (tmp_path / "imagenet" / "train" / "n1" / "x.heic").write_bytes(b"x")
    with pytest.warns(UserWarning, match="not read below .*heic"):
        load_data("imagenet", 16, 0, 9, progress=False, root=tmp_path)
    only = tmp_path / "only"
    only.mkdir()
    (only / "x.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="no image files .*pillow-heif"):
        read_folder(only, 16)


def test_skipped_files_have_reasons_in_memory_too(tmp_path):
    for i in range(20):
        photo(seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.png").write_text("<html>")
    (tmp_path / "page2.png").write_text("<html>")
    with pytest.warns(
        UserWarning,
        match=r"3 of 23 files .* 2 not an image \(first: page.png\), 1 empty \(first: empty.png\)",
    ):
        found = read_folder(tmp_path, 16, progress=False)
    assert dict(zip(found.skipped, found.reasons)) == {
        "empty.png": "empty",
        "page.png": "not an image",
        "page2.png": "not an image",
    }
    with pytest.warns(UserWarning, match="files of .* could not be read and were skipped: .* not an image"):
        load_data(str(tmp_path), 16, 0, 9, progress=False)
    with pytest.warns(UserWarning, match="3 of 23 pictures .* 2 not an image"):
        as_image_set(FolderSource(tmp_path), 16)


def test_compressed_shards_get_their_own_message_at_every_door(tmp_path):
    for name in ("x.tar.gz", "x-{000..003}.tar.gz", "x.tgz", str(tmp_path / "x.tar.zst")):
        for door in (lambda: load_data(name, 16, 0, 9), lambda: open_source(name)):
            with pytest.raises(
                ValueError, match="is compressed, and so has no random access: unpack it to .tar"
            ):
                door()
    with pytest.raises(ValueError, match="open_source"):
        load_data("x.tar", 16, 0, 9)


def open_toy(spec, options):
    """`toy:40`: forty small pictures of two classes."""
    rng = np.random.default_rng(len(spec))
    count = int(spec.removeprefix("toy:"))
    pictures = rng.integers(0, 256, (count, options.size, options.size, 3)).astype(np.uint8)
    source = ObjectSource([(pictures[i], i % 2) for i in range(count)], f"{spec}, {count} pictures")
    source.classes = ("even", "odd")
    return source


@pytest.fixture
def toy():
    kind = SourceKind("toy", open_toy, what="toy:COUNT")
    register_source(kind)
    yield kind
    if kind in SOURCES:
        unregister_source("toy")


def test_a_kind_of_source_from_outside_is_one_entry(toy):
    train, val = load_data("toy:40", 16, 0, 100, progress=False)
    assert train.classes == ("even", "odd") and train.rule == val.rule == "one in eight"
    assert len(train) + len(val) == 40 and len(val) >= 1 and set(train.labels[:, 0].tolist()) == {0, 1}
    source = open_source("toy:40", 16)
    disk_train, disk_val = split_source(source)
    assert torch.equal(disk_val.keys, val.keys) and torch.equal(disk_train.keys, train.keys), "one splitter"
    assert torch.equal(as_image_set(disk_val, 16).images, val.images)
    few = load_data("toy:40", 16, 0, 1, progress=False, limit=10)
    assert [len(x) for x in few] == [10, 1]

    micro, options = preset("micro"), DataOptions(data="toy:40")
    check(RunConfig(data="toy:40"))
    memory, held = open_pictures(options, micro)
    assert isinstance(memory, ImageSet) and memory.images.shape[1:] == (3, 32, 32)
    disk, disk_held = open_pictures(replace(options, from_disk=True), micro)
    assert isinstance(disk, OnDisk) and len(disk) == len(memory) and torch.equal(disk_held.keys, held.keys)
    assert not torch.isin(disk.keys, held.keys).any() and torch.equal(disk.head(40), memory.images)
    assert not is_place("toy:40") and is_place("toys") and not on_disk("toy:40") and on_disk("toy:40", True)

    with pytest.raises(ValueError, match="there is a kind of source 'toy' already"):
        register_source(SourceKind("toy", open_toy))
    with pytest.raises(FileNotFoundError, match="toy-40 is neither toy:COUNT nor 'scenes' nor"):
        open_source("toy-40")
    assert unregister_source("toy") is toy
    for door in (
        lambda: load_data("toy:40", 16, 0, 9),
        lambda: open_source("toy:40"),
        lambda: open_pictures(options, micro),
        lambda: check(RunConfig(data="toy:40")),
    ):
        with pytest.raises(FileNotFoundError, match="toy:40 is neither 'scenes' nor"):
            door()
    with pytest.raises(ValueError, match="no kind of source 'toy'"):
        unregister_source("toy")


def test_equal_pictures_of_a_new_kind_are_on_one_side_in_memory(toy):
    """Doubles under other bytes: of any kind they go where both sides are in memory."""
    colours = [Image.new("RGB", (9, 9), (i, 0, 0)) for i in range(30)]
    files = [io.BytesIO() for _ in range(60)]
    for i, file in enumerate(files):
        colours[i % 30].save(file, "PNG", compress_level=1 + i // 30 * 8, dpi=(72 + i, 72))
    pairs = [(Image.open(file), 0) for file in files]
    train, val = load_data(pairs, 8, 0, 100, progress=False)
    shown = [x.numpy().tobytes() for side in (train, val) for x in side.images]
    assert len(shown) == len(set(shown)) == 30


def test_every_kind_has_its_own_functions(tmp_path):
    """The table names functions that are there, and what a person may give is recognised as one of them."""
    for kind in SOURCES:
        assert callable(function_at(kind.open)) and (kind.load is None or callable(function_at(kind.load)))
    photo().save(tmp_path / "0.png")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "x.tar").write_bytes(b"")
    for given, name in (
        ("scenes", "scenes"),
        (Path("scenes"), None),
        ("cifar10", "set"),
        (Path("cifar10"), None),
        ("hf:owner/name:config", "hf"),
        (tmp_path, "folder"),
        (str(tmp_path / "saved"), "saved"),
        (tmp_path / "shards", "shards"),
        ("x-{000..003}.tar", "shards"),
        (["a.tar", "b.tar"], "shards"),
        ([(None, 0)] * 3, "object"),
        (ToyScenes(length=3), "object"),
        (None, "object"),
        ("x.tgz", None),
        ("https://host/x.tar", None),
        ("", None),  # an unset variable of a shell
        ("x" * 5000, None),
        ("a\0b", None),
    ):
        if name is None:
            with pytest.raises((ValueError, FileNotFoundError)):
                find_kind(given)
        else:
            assert find_kind(given).name == name, given
    toys = open_source("scenes", 16, limit=40, level=2, seed=3)
    train, val = load_data("scenes", 16, 40, 5, 2, 3, progress=False)
    assert torch.equal(as_image_set(toys, 16).images, train.images)
    assert torch.equal(as_image_set(split_source(toys)[1], 16).images, val.images)
    for given in ("hf:owner/name", str(tmp_path / "saved"), str(tmp_path / "shards")):
        with pytest.raises(ValueError, match="open_source opens it"):
            load_data(given, 16, 0, 9)
    for door in (
        lambda: load_data("scenes", 16, 0, 9, colour="red"),
        lambda: open_source("scenes", colour="red"),
        lambda: SourceLoader(toys, 16, 2, colour="red"),
    ):
        with pytest.raises(TypeError, match="there is no setting 'colour'"):
            door()


def test_head_is_spread_over_the_classes(tmp_path):
    """Of a set in the order of its classes the first pictures show one of them."""
    data = ImageSet(
        torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 3, 8, 8).contiguous(),
        torch.arange(60)[:, None] // 20,
        ("a", "b", "c"),
        "ordered",
        keys=torch.arange(60),
        rule="one in eight",
    )
    assert (
        data.head(6)[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]
        and len(data.head(100)) == 60
        and len(data.head(0)) == 0
    )
    disk = OnDisk(ObjectSource(data), 8)
    assert torch.equal(disk.head(6), data.head(6)) and len(disk.head(1)) == 1
    few = data.select(spread(60, 6))
    assert (
        few.labels[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
        and few.keys.tolist() == [0, 10, 20, 30, 40, 50]
        and few.rule == data.rule
    )
    assert data.select(data.labels[:, 0] == 1, "one class").source == "one class"


def test_everything_that_holds_pictures_prints_one_line(tmp_path):
    for i in range(20):
        photo(seed=i).save(tmp_path / f"{i}.png")
    train, val = load_data(str(tmp_path), 16, 0, 100, progress=False)
    for thing in (
        train,
        read_folder(tmp_path, 16, progress=False),
        OnDisk(FolderSource(tmp_path), 16),
        FolderSource(tmp_path),
        data_folders.list_folder(tmp_path),
        data_learned.learned_from(train),
        ToyScenes(length=3)[0],
    ):
        assert "\n" not in repr(thing) and len(repr(thing)) < 600 and "tensor" not in repr(thing), repr(
            thing
        )[:200]


def test_floats_without_a_negative_value_are_noticed():
    class Set(list):
        classes = ("all",)

    with pytest.warns(UserWarning, match="none is negative"):
        ObjectSource(Set([(torch.rand(3, 8, 8), 0)] * 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ObjectSource(Set([(torch.rand(3, 8, 8) * 2 - 1, 0)] * 5))
        ObjectSource(Set([(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)] * 5))

"""Image folders with all their accidents, and the speed-independent promises of ToyScenes."""
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from flextok_edu.core import from_uint8
from flextok_edu.data import KINDS, ImageSet, ToyScenes, batches, draw, load_data, read_folder


def photo(size=(90, 60), seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_mixed_formats_sizes_and_modes(tmp_path):
    for name, image in {"rgb.png": photo(), "grey.jpg": photo().convert("L"), "palette.png": photo().convert("P"), "alpha.webp": photo().convert("RGBA"), "la.png": photo().convert("LA"),
                        "one.bmp": photo((64, 200)).convert("1"), "cmyk.tif": photo().convert("CMYK"), "tiny.gif": photo((5, 3)), "float.tiff": Image.fromarray(np.linspace(0, 255, 400, dtype=np.float32).reshape(20, 20)),
                        "ünïcode name.PNG": photo((300, 40))}.items():
        image.save(tmp_path / name)
    found = read_folder(tmp_path, 32, progress=False)
    assert found.images.shape == (10, 3, 32, 32) and found.images.dtype == torch.uint8 and not found.skipped
    assert found.classes == ("all",) and found.labels.unique().tolist() == [0]


def test_broken_files_are_counted_in_one_warning(tmp_path):
    photo().save(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("no picture")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    (tmp_path / "notes.txt").write_text("not counted at all")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_folder(tmp_path, 16, progress=False)
    assert found.paths == ("good.png",) and len(found.skipped) == 4
    assert len([w for w in caught if issubclass(w.category, UserWarning) and "4 of 5 files" in str(w.message)]) == 1


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
    assert torch.equal(load_data(str(tmp_path), 16, 0, 100, seed=4, progress=False)[1].images, val.images), "the seed does not decide who is held out"


@pytest.mark.parametrize("level", (1, 2, 3))
def test_scenes_do_not_depend_on_order_or_process(level):
    data = ToyScenes("val", 48, level, seed=7, length=50)
    images, labels = data.render(10, 5)
    assert torch.equal(images[3], ToyScenes("val", 48, level, seed=7, length=14).render(13, 1)[0][0])
    item = data[13]
    assert torch.equal(item.image, from_uint8(images[3:4])[0]) and item.label == labels[3, 0] and KINDS[item.label] in item.caption
    assert len(item.scene.things) == level and draw(item.scene, 20).shape == (20, 20, 3)
    assert not torch.equal(ToyScenes("val", 48, level, seed=8, length=50).render(10, 1)[0][0], images[0])


def test_scenes_at_many_sizes():
    for size in (8, 31, 64, 200):
        assert ToyScenes("train", size, 3, length=1)[0].image.shape == (3, size, size)


def test_batches_of_a_set_smaller_than_the_batch():
    data = ImageSet(torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 8, 8).contiguous(), torch.arange(3)[:, None], ("a", "b", "c"), "three")
    images, labels = next(batches(data, 7, flip=True))
    assert images.shape == (7, 3, 8, 8) and set(labels[:, 0].tolist()) == {0, 1, 2}

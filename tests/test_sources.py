"""Public sets by name, read from small stand-ins in their real formats; other eyes by name; the loop's single
step. Nothing is downloaded.
"""

import gzip
import hashlib
import pickle
import struct
import sys
import warnings
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from planting import patch
import torch
from PIL import Image
from torch import nn

import flextok_edu.data.decoding as data_decoding
import flextok_edu.data.extractors as data_extractors
import flextok_edu.data.features as data_features
import flextok_edu.data.scenes as data_scenes
import flextok_edu.data.sets as data_sets
from flextok_edu.engine.config import StageConfig
from flextok_edu.engine.trainer import Objective, SingleDevice, Trainer, fit
from flextok_edu.data.datasets import load_data
from flextok_edu.data.decoding import check_memory
from flextok_edu.data.folders import SETS, evenly, read_squares
from flextok_edu.data.sets import find_set

RNG = np.random.default_rng(0)
FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


def fashion(root, train, test):
    """Four idx files, as Zalando wrote them."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in {"train": train, "t10k": test}.items():
        for kind, a in (("images-idx3", images), ("labels-idx1", labels)):
            (raw / f"{name}-{kind}-ubyte").write_bytes(
                struct.pack(">BBBB", 0, 0, 8, a.ndim)
                + struct.pack(f">{a.ndim}I", *a.shape)
                + a.astype(np.uint8).tobytes()
            )


def cifar(root, monkeypatch, per_batch=6):
    """Six pickles and their checksums, as Krizhevsky wrote them; returns the training pixels."""
    from torchvision.datasets import CIFAR10

    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    pixels = RNG.integers(0, 256, (6, per_batch, 3072), dtype=np.uint8)
    entries = []
    for i, name in enumerate([f"data_batch_{j}" for j in range(1, 6)] + ["test_batch"]):
        whole = pickle.dumps({"data": pixels[i], "labels": [(i + j) % 10 for j in range(per_batch)]})
        (folder / name).write_bytes(whole)
        entries.append([name, hashlib.md5(whole).hexdigest()])
    meta = pickle.dumps(
        {
            "label_names": [
                "airplane",
                "automobile",
                "bird",
                "cat",
                "deer",
                "dog",
                "frog",
                "horse",
                "ship",
                "truck",
            ]
        }
    )
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", entries[:5])
    monkeypatch.setattr(CIFAR10, "test_list", entries[5:])
    monkeypatch.setattr(
        CIFAR10,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()},
    )
    return pixels


def photos(folder, wnids, count, size=(90, 60), suffix=".JPEG", seed=0):
    rng = np.random.default_rng(seed)
    for wnid in wnids:
        (folder / wnid).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
                folder / wnid / f"{wnid}_{i}{suffix}"
            )


def test_cifar10_keeps_pixels_labels_and_its_test_split(tmp_path, monkeypatch):
    pixels = cifar(tmp_path, monkeypatch)
    train, val = load_data("cifar10", 32, 0, 100, progress=False, root=tmp_path)
    assert torch.equal(train.images, torch.from_numpy(pixels[:5]).reshape(30, 3, 32, 32)), (
        "at 32 px not a byte changes, and the order of the set is kept"
    )
    assert torch.equal(val.images, torch.from_numpy(pixels[5]).reshape(6, 3, 32, 32))
    assert train.labels[:, 0].tolist() == [
        (i + j) % 10 for i in range(5) for j in range(6)
    ] and train.labels.shape == (30, 1)
    assert train.classes[:2] == ("airplane", "automobile") and not train.scenes and "30 of 30" in train.source
    small, few = load_data("cifar10", 16, 0, 3, progress=False, root=tmp_path, limit=10)
    assert small.images.shape == (10, 3, 16, 16) and len(few) == 3 and "10 of 30" in small.source


def test_a_damaged_pickle_is_not_opened(tmp_path, monkeypatch):
    cifar(tmp_path, monkeypatch)

    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("a pickle whose checksum is wrong was opened",)

    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileNotFoundError, match="incomplete or damaged.*remove that folder"):
        load_data("cifar10", 32, 0, 10, progress=False, root=tmp_path)


def test_fashion_mnist_in_its_own_format(tmp_path):
    images = RNG.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    fashion(tmp_path, (images, np.arange(40) % 10), (images[:5] // 2, np.arange(5)))
    train, val = load_data("fashion_mnist", 28, 0, 100, progress=False, root=tmp_path)
    assert torch.equal(
        train.images, torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1)
    ) and train.labels[:, 0].tolist() == [i % 10 for i in range(40)]
    assert (
        len(val) == 5
        and train.classes[0] == "T-shirt/top"
        and load_data("fashion_mnist", 32, 0, 2, progress=False, root=tmp_path)[1].images.shape
        == (2, 3, 32, 32)
    )
    raw = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    raw.write_bytes(raw.read_bytes()[:3000])
    with pytest.raises(FileNotFoundError, match="damaged"):
        load_data("fashion_mnist", 28, 0, 10, progress=False, root=tmp_path)


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_the_real_fashion_mnist(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for f in FASHION.glob("*.gz"):
        (raw / f.stem).write_bytes(gzip.decompress(f.read_bytes()))
    train, val = load_data("fashion_mnist", 32, 0, 500, progress=False, root=tmp_path, limit=2000)
    assert (
        (len(train), len(val)) == (2000, 500)
        and "of 60000" in train.source
        and torch.bincount(train.labels[:, 0], minlength=10).min() > 140
    )


def test_imagenette_is_read_at_the_size_that_is_needed(tmp_path):
    from torchvision.datasets import Imagenette

    wnids = list(Imagenette._WNID_TO_CLASS)
    for folder, side in (("imagenette2-160", 40), ("imagenette2-320", 80)):
        for split, count in (("train", 2), ("val", 1)):
            photos(tmp_path / folder / split, wnids, count, (side + 20, side), ".jpeg", seed=side + count)
    with pytest.warns(UserWarning, match="20 of Imagenette's 9,469"):
        train, val = load_data("imagenette", 32, 0, 100, progress=False, root=tmp_path)
    assert (
        (len(train), len(val)) == (20, 10)
        and train.classes[:3] == ("tench", "English springer", "cassette player")
        and val.labels[:, 0].tolist() == list(range(10))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "imagenette2-320" in str(
            find_set("imagenette", 200, tmp_path)[0][0][0]
        ) and "imagenette2-160" in str(find_set("imagenette", 128, tmp_path)[0][0][0])


def test_imagenet_folders_and_the_order_of_their_classes(tmp_path):
    wnids = ["n02000003", "n01000001", "n03000002"]
    photos(tmp_path / "imagenet" / "train", wnids, 6)
    photos(tmp_path / "imagenet" / "val", wnids, 2, seed=1)
    train, val = load_data("imagenet", 24, 0, 100, progress=False, root=tmp_path)
    assert (
        train.classes == ("n01000001", "n02000003", "n03000002")
        and train.labels[:, 0].tolist() == [0] * 6 + [1] * 6 + [2] * 6
        and len(val) == 6
    )
    (tmp_path / "imagenet" / "LOC_synset_mapping.txt").write_text(
        "n03000002 crane\nn01000001 kite, toy\nn02000003 crane, bird\n"
    )
    assert find_set("imagenet", 24, tmp_path)[2] == ("kite", "crane (n02000003)", "crane (n03000002)")
    # the data root may be ImageNet itself
    half, few = load_data("imagenet", 24, 0, 3, progress=False, root=tmp_path / "imagenet", limit=9)
    assert half.labels[:, 0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 and few.labels[:, 0].tolist() == [
        0,
        1,
        2,
    ], "evenly over the classes"
    (tmp_path / "imagenet" / "val" / "loose.JPEG").write_bytes(b"")
    with pytest.raises(ValueError, match="loose.JPEG, which is no class"):
        load_data("imagenet", 24, 0, 10, progress=False, root=tmp_path)


def test_imagenet_of_a_thousand_classes_has_names():
    names = data_sets._wnid_names(Path("/nowhere"), [f"n{i:08}" for i in range(1000)])
    assert (
        names[0] == "tench"
        and names[134] == "crane bird"
        and names[517] == "crane"
        and len(set(names)) == 1000
    )


def test_without_a_test_split_pictures_are_held_out(tmp_path):
    photos(tmp_path / "imagenet" / "train", ["n1", "n2"], 10)
    train, val = load_data("imagenet", 16, 0, 100, progress=False, root=tmp_path)
    assert (len(train), len(val)) == (17, 3) and train.rule == val.rule == "one in eight"
    assert not {x.numpy().tobytes() for x in train.images} & {x.numpy().tobytes() for x in val.images}


def test_what_is_held_out_is_not_trained_on(tmp_path):
    images = RNG.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    fashion(tmp_path, (images, np.zeros(30)), (images[[3, 7]], np.zeros(2)))
    train, val = load_data("fashion_mnist", 28, 0, 100, progress=False, root=tmp_path)
    assert (len(train), len(val)) == (28, 2) and "2 that are also held out" in train.source


def test_broken_files_of_a_set_are_counted(tmp_path):
    photos(tmp_path / "imagenet" / "train", ["n1"], 12)
    photos(tmp_path / "imagenet" / "val", ["n1"], 2, seed=5)
    (tmp_path / "imagenet" / "train" / "n1" / "n1_4.JPEG").write_bytes(b"not a picture")
    with pytest.warns(UserWarning, match="1 files of imagenet could not be read"):
        train, _ = load_data("imagenet", 16, 0, 10, progress=False, root=tmp_path)
    assert len(train) == 11 and "1 broken" in train.source


@pytest.mark.parametrize("name", SETS)
def test_missing_sets_say_what_to_do(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{name} is not at .*--data-root") as error:
        load_data(name, 32, 0, 10, progress=False, root=tmp_path)
    assert str(tmp_path) in str(error.value) and ("--download" in str(error.value)) == (name != "imagenet")


@pytest.mark.parametrize("name", [n for n in SETS if n != "imagenet"])
def test_offline_downloads_say_what_to_do(name, tmp_path, monkeypatch):
    import torchvision.datasets.cifar
    import torchvision.datasets.imagenette
    import torchvision.datasets.mnist

    def offline(*a, **k):
        raise URLError("[Errno -3] Temporary failure in name resolution")

    for module in (torchvision.datasets.cifar, torchvision.datasets.imagenette, torchvision.datasets.mnist):
        monkeypatch.setattr(module, "download_and_extract_archive", offline)
    with pytest.raises(
        FileNotFoundError, match=f"{name} could not be downloaded .*name resolution.*online"
    ) as error:
        load_data(name, 32, 0, 10, progress=False, root=tmp_path, download=True)
    assert SETS[name][0] in str(error.value) and str(tmp_path) in str(error.value)


def test_sets_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="cannot be downloaded for you"):
        load_data("imagenet", 32, 0, 10, progress=False, root=tmp_path, download=True)
    with pytest.raises(ValueError, match="no set 'cifar100'"):
        find_set("cifar100", 32)
    with pytest.raises(FileNotFoundError, match="cifar10, fashion_mnist"):
        load_data("cifar-10", 32, 0, 10, progress=False)


def test_what_does_not_fit_is_refused_before_reading(tmp_path, monkeypatch):
    patch(monkeypatch, data_decoding, "machine_memory", lambda: 2**20)
    for call in (
        lambda: load_data("scenes", 64, 100, 10, progress=False),
        lambda: read_squares([tmp_path / "none.png"] * 100, 64),
    ):
        with pytest.raises(ValueError, match="GB in memory, more than half .*--train-images"):
            call()
    monkeypatch.undo()
    check_memory(10, 32, "")


def test_read_squares_keeps_the_order_across_threads():
    items = [np.full((9, 9), i % 251, np.uint8) for i in range(1500)]
    items[700] = np.zeros((1, 1), np.uint8)
    images, good = read_squares(items, 8, progress=False)
    assert good == [i for i in range(1500) if i != 700] and images[:, 0, 0, 0].tolist() == [
        i % 251 for i in good
    ]
    assert evenly(list(range(10)), 4) == [0, 2, 5, 7] and evenly([1, 2], None) == [1, 2]


# --- eyes
# ------------------------------------------------------------------------------------------------------------


def test_inception_by_name(tmp_path, monkeypatch):
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    net = inception_v3(weights=None, init_weights=False)
    for p in net.parameters():
        if p.ndim == 4:
            nn.init.kaiming_normal_(p)
    path = tmp_path / "inception.pth"
    torch.save(net.state_dict(), path)
    with pytest.raises(ValueError, match="is not torchvision's Inception-v3"):
        data_extractors.extractor("inception", weights=path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(
        data_extractors.DOWNLOADED,
        "inception",
        (f"https://example.org/inception-{found}.pth", *data_extractors.DOWNLOADED["inception"][1:]),
    )
    feature_extractor = data_extractors.extractor("inception", size=80, weights=path).train()
    images = torch.rand(2, 3, 80, 80) * 2 - 1
    assert (
        feature_extractor(images).shape == (2, 2048)
        and feature_extractor.name == "inception at 80 px"
        and not feature_extractor.training
        and not any(w.requires_grad for w in feature_extractor.parameters())
    )
    with torch.no_grad():
        net.eval().fc = nn.Identity()
        assert (net(images) - net(images * 0.9)).abs().max() > 1e-2 * net(images).abs().max(), (
            "weights that notice a wrong range"
        )
        assert torch.allclose(feature_extractor(images), net(images), atol=1e-4 * net(images).abs().max()), (
            "Inception expects [-1, 1], where our images are"
        )
    with pytest.raises(ValueError, match="RGB"):
        feature_extractor(images[:, :1])


def test_every_network_gets_the_normalisation_that_it_was_trained_with():
    class Spy(nn.Module):
        def forward(self, pixel_values):
            self.seen = pixel_values
            return type(
                "Out", (), {"last_hidden_state": torch.ones(2, 5, 384), "image_embeds": torch.ones(2, 512)}
            )

    for name, mean, std in (("dinov2_small", 0.485, 0.229), ("clip_b32", 0.48145466, 0.26862954)):
        feature_extractor = data_extractors.DownloadedExtractor(name, spy := Spy())
        for ours, theirs in ((1.0, 1.0), (0.0, 0.5), (-1.0, 0.0)):  # our range, theirs
            assert feature_extractor(torch.full((2, 3, 32, 32), ours)).shape == (2, feature_extractor.dim)
            assert (
                spy.seen.shape == (2, 3, 224, 224)
                and abs(spy.seen[0, 0, 5, 5].item() - (theirs - mean) / std) < 1e-5
            )


def test_dinov2_and_clip_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny = dict(hidden_size=384, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    transformers.Dinov2Model(transformers.Dinov2Config(**tiny, image_size=28, patch_size=14)).save_pretrained(
        tmp_path / "dino"
    )
    transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**tiny, image_size=224, patch_size=32, projection_dim=512)
    ).save_pretrained(tmp_path / "clip")
    for name, folder in (("dinov2_small", "dino"), ("clip_b32", "clip")):
        feature_extractor = data_extractors.extractor(name, weights=tmp_path / folder)
        assert (
            feature_extractor(torch.rand(1, 3, 30, 30) * 2 - 1).shape == (1, feature_extractor.dim)
            and torch.isfinite(feature_extractor(torch.zeros(1, 3, 64, 64))).all()
        )


def test_eyes_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no extractor 'vgg': use 'efficientnet_lite0'"):
        data_extractors.extractor("vgg")
    with pytest.raises(FileNotFoundError, match="is not there"):
        data_extractors.extractor("inception", weights=tmp_path / "none.pth")

    def offline(*a, **k):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no copy from before
    with pytest.raises(FileNotFoundError, match="inception could not be downloaded .*efficientnet_lite0"):
        data_extractors.extractor("inception")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"flextok_edu\[text\]"):
        data_extractors.extractor("dinov2_small")


def test_the_classifiers_log_starts_at_chance():
    train, _ = load_data("scenes", 16, 64, 8, progress=False)
    model, log = data_features.train_classifier(train, StageConfig(steps=2, batch=8), progress=False, every=1)
    assert (
        len(log) == 2
        and set(data_scenes.ATTRIBUTES) <= set(log[0])
        and all(0.6 < log[0][head] < 1.6 for head in data_scenes.ATTRIBUTES)
    )
    images, labels = torch.rand(3, 3, 16, 16), train.labels[:3]
    each = model.losses(images, labels)
    assert torch.allclose(model.loss(images, labels), 3 * each[0] + each[1] + each[2] + each[3])


# --- the loop
# ------------------------------------------------------------------------------------------------------------


class InParts(SingleDevice):
    """Every batch in three uneven parts."""

    def micro_batches(self, training):
        whole = next(training.loader)
        return [(rows, len(rows) / len(whole)) for rows in whole.split([7, 4, 5])]


def test_parts_of_a_batch_are_the_batch():
    x = torch.linspace(-1, 1, 16)[:, None]

    def run(backend):
        torch.manual_seed(0)
        line, seen = nn.Linear(1, 1), []

        def loss(b, progress):
            seen.append(len(b))
            error = (line(b) - 2 * b).square()
            return error.mean(), {
                "at": torch.tensor(progress),
                "largest": (error.sum(), len(b)),
                "lazy": lambda: seen[-1],
            }

        objective = Objective("line", loss, list(line.named_parameters()), StageConfig(lr=0.1, warmup=2))
        return (
            fit([objective], iter([x] * 6), 6, every=2, progress=False, trainer=Trainer(backend)),
            line,
            seen,
        )

    (log, a, whole), (log_parts, b, parts) = run(SingleDevice()), run(InParts())
    assert whole == [16] * 6 and parts == [7, 4, 5] * 6
    assert (
        torch.allclose(a.weight, b.weight, atol=1e-6)
        and [row["step"] for row in log] == [0, 2, 4, 5]
        and log[1]["at"] == pytest.approx(2 / 6)
    )
    for row, other in zip(log, log_parts):
        assert (
            row["line"]
            == pytest.approx(other["line"], rel=1e-5)
            == pytest.approx(row["largest"], rel=1e-5)
            == pytest.approx(other["largest"], rel=1e-5)
        )
        assert other["lazy"] == pytest.approx((7 * 7 + 4 * 4 + 5 * 5) / 16)


def test_nan_stops_before_the_weights_move():
    line = nn.Linear(1, 1)
    before = line.weight.clone()
    objective = Objective(
        "line", lambda b, _: (line(b).sum() * float("nan"), {}), list(line.named_parameters()), StageConfig()
    )
    with pytest.raises(FloatingPointError, match="loss of line is nan at step 0"):
        fit([objective], iter([torch.ones(2, 1)] * 3), 3, progress=False)
    assert torch.equal(line.weight, before)

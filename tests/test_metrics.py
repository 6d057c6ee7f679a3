"""The registry's metrics against the libraries that define them, and networks of the published classes with
random weights.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import flextok_edu.evaluation.entries as entries
import flextok_edu.evaluation.networks as networks
from flextok_edu.data.datasets import ImageSet
from flextok_edu.engine.config import EvalConfig
from flextok_edu.evaluation import distances as D
from flextok_edu.evaluation.codebook import bits_per_pixel, entropy, perplexity, usage, word_counts
from flextok_edu.evaluation.compare import compare
from flextok_edu.evaluation.evaluate import evaluate_tokenizer
from flextok_edu.evaluation.metrics import resamples
from flextok_edu.evaluation.preprocessing import CLIP, IMAGENET, Recipe, resize_tf1
from flextok_edu.evaluation.registry import KINDS, METRICS, metric_of, metrics_asked
from flextok_edu.evaluation.report import load_report
from flextok_edu.evaluation.self_test import Check, known_answers, mistakes, resized, self_test


def some(seed, n=300, d=24, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(9)) / d**0.5
    return torch.randn(n, d, generator=generator) @ mix * scale + shift


A, B = some(0), some(1, 400, scale=1.2, shift=0.2)
BYTES = torch.randint(0, 256, (3, 3, 40, 52), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def same(found, expected, relative=1e-3):
    assert found == pytest.approx(float(expected), rel=relative), (found, expected)


# --- distances against libraries
# --------------------------------------------------------------------------------------------------------


def test_frechet_against_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = A.double().numpy(), B.double().numpy()
    root = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        np.cov(a, rowvar=False) + np.cov(b, rowvar=False)
    )
    same(D.frechet_distance(A, B), expected - 2 * np.trace(root), 1e-6)


def test_frechet_of_fewer_pictures_than_features():
    """The covariances are singular: both ways must agree all the same."""
    from flextok_edu.evaluation.metrics import frechet

    same(D.frechet_distance(A[:10], B[:12]), frechet(A[:10], B[:12]), 1e-3)


def test_against_torch_fidelity():
    fid = pytest.importorskip("torch_fidelity.metric_fid", reason="the extra `fidelity` is not installed")
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    pair = [fid.fid_features_to_statistics(x.double()) for x in (A, B)]
    found = fid.fid_statistics_to_metric(*pair, False)
    same(D.frechet_distance(A, B), found["frechet_inception_distance"])
    found = kid_features_to_metric(B, A, kid_subsets=10, kid_subset_size=100, verbose=False, rng_seed=2020)
    same(D.kid(A, B, 10, 100), found["kernel_inception_distance_mean"])
    found = prc_features_to_metric(B, A, verbose=False)
    assert 0.02 < found["recall"] < 1 and 0.02 < found["precision"] < 1
    same(D.precision(A, B), found["precision"])
    same(D.recall(A, B), found["recall"])
    logits = some(2, 333, 10, 4.0)
    same(D.inception_score(None, logits), isc_features_to_metric(logits)["inception_score_mean"])


def test_a_neighbour_at_the_radius_counts():
    """On a line of whole numbers: the last one's third neighbour is 3 away, and so is the picture."""
    line, beyond = torch.arange(10.0)[:, None], torch.tensor([[12.0], [12.5]])
    assert D.precision(line, beyond) == 0.5 == D.recall(beyond, line)


def test_kid_against_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    same(D.kid(A, B[:300]), poly_mmd(A.double(), B[:300].double()), 1e-9)


def test_cmmd_by_hand():
    """As its authors write it, all pairs at once; the unbiased one without the diagonal."""
    x, y = (torch.nn.functional.normalize(z.double(), dim=1) for z in (A, B))
    gamma = 1 / (2 * 10**2)
    kernel = lambda p, q: torch.exp(-gamma * torch.cdist(p, q).square())  # noqa: E731
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    same(D.cmmd(A, B, unbiased=False), 1000 * (xx.mean() + yy.mean() - 2 * xy.mean()), 1e-6)
    n, m = len(x), len(y)
    inner = (xx.sum() - n) / (n * (n - 1)) + (yy.sum() - m) / (m * (m - 1))
    same(D.cmmd(A, B), 1000 * (inner - 2 * xy.mean()), 1e-6)
    same(D.cmmd(A, 7 * B), D.cmmd(A, B), 1e-6)


def test_mind_against_one_dimension():
    """On a line every direction is ±1: the squared Wasserstein distance of sorted values."""
    a, b = A[:, :1].double(), B[:300, :1].double()
    same(D.mind(a, b, 5), (a.sort(0).values - b.sort(0).values).square().mean(), 1e-9)
    shift = torch.linspace(-1, 1, 24)
    same(D.mind(A, A + shift, 20_000), shift.square().mean(), 0.02)
    assert D.mind(A, B, seed=1) != D.mind(A, B) and D.mind(A, B) == D.mind(A, B)


def test_blocks_change_nothing(monkeypatch):
    whole = [f(A, B) for f in (D.kid, D.cmmd, D.precision, D.recall)]
    monkeypatch.setattr(D, "_BLOCK", 37)
    for f, expected in zip((D.kid, D.cmmd, D.precision, D.recall), whole):
        same(f(A, B), expected, 1e-9)


def test_moments(tmp_path):
    """Batches add up to the whole; files of others are read, and files that are none are refused."""
    parts = D.Moments.of(B[:3]) + D.Moments.of(B[3:50]) + D.Moments.of(B[50:])
    whole = D.Moments.of(B)
    assert parts.count == 400 and torch.allclose(parts.covariance, whole.covariance, atol=1e-12)
    assert np.allclose(whole.covariance, np.cov(B.double().numpy(), rowvar=False))
    whole.save(tmp_path / "own.npz")
    assert D.frechet_distance(D.Moments.load(tmp_path / "own.npz"), A) == D.frechet_distance(B, A)
    other = dict(mu=whole.mean, sigma=whole.covariance, mu_s=np.zeros(3), sigma_s=np.eye(3))
    np.savez(tmp_path / "adm.npz", **other)
    found = D.Moments.load(tmp_path / "adm.npz", spatial=True)
    assert found.count == 0 and found.mean.shape == (3,)
    with pytest.raises(ValueError, match="without their count"):
        found + found
    for odd in (
        dict(mu=np.zeros(3)),
        dict(mu=np.zeros(3), sigma=np.eye(4)),
        dict(mu=np.full(3, np.nan), sigma=np.eye(3)),
        dict(mu=np.array([{}], dtype=object), sigma=np.eye(1)),
        dict(mu=np.array(["a"]), sigma=np.eye(1)),
    ):
        np.savez(tmp_path / "odd.npz", **odd)
        with pytest.raises(ValueError, match="odd.npz"):
            D.Moments.load(tmp_path / "odd.npz")
    (tmp_path / "text.npz").write_text("nothing")
    with pytest.raises(ValueError, match="no file of statistics"):
        D.Moments.load(tmp_path / "text.npz")
    with pytest.raises(FileNotFoundError):
        D.Moments.load(tmp_path / "none.npz")


def test_too_few():
    for call in (
        lambda: D.Moments.of(A[:1]),
        lambda: D.frechet_distance(A, B[:, :3]),
        lambda: D.cmmd(A[:1], B),
        lambda: D.precision(A[:3], B),
        lambda: D.inception_score(None, A[:5]),
        lambda: D.floor_ratio(torch.ones(2), torch.ones(3)),
    ):
        with pytest.raises(ValueError):
            call()
    assert math.isnan(D.floor_ratio(torch.ones(2), torch.tensor([1.0, 0.0])))


def test_halves_have_the_right_spread():
    """The spread over random halves is that over new samples: on means, whose error is known."""
    x = torch.randn(4000, 1, generator=torch.Generator().manual_seed(3))
    wanted = float(x.std()) / 4000**0.5
    found = torch.stack(
        [resamples(lambda a, b: float(b.mean()), x, x, seed, halves=True) for seed in range(40)]
    ).std()
    same(found, wanted, 0.2)
    found = resamples(lambda a, b: float(b.unique().numel()), x, x, halves=True)
    assert (found == 2000).all(), "no picture twice"


# --- codebook
# --------------------------------------------------------------------------------------------------------


def test_codebook():
    ids = torch.tensor([[0, 3], [1, 3], [0, 2], [1, 3]])
    assert word_counts(ids, 4).tolist() == [[2, 2, 0, 0], [0, 0, 1, 3]]
    assert usage(ids, 4).tolist() == [0.5, 0.5]
    bits = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert entropy(ids, 4).tolist() == pytest.approx([1, bits])
    assert perplexity(ids, 4).tolist() == pytest.approx([2, 2**bits])
    assert torch.equal(word_counts(ids[:1], 4) + word_counts(ids[1:], 4), word_counts(ids, 4))
    for vocabulary, bits in ((64_000, 16), (1000, 10), (4096, 12), (1, 1)):
        assert bits_per_pixel(torch.zeros(1, 8, dtype=torch.long), vocabulary, 100) == 8 * bits / 100
    for bad in (torch.tensor([[4]]), torch.tensor([[-1]]), torch.zeros(0, 2).long(), torch.zeros(3).long()):
        with pytest.raises(ValueError):
            word_counts(bad, 4)


# --- preprocessing against the libraries' own
# --------------------------------------------------------------------------------------------------------


def test_tensorflow_resize():
    library = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    for side in (299, 31, 52):
        expected = library.interpolate_bilinear_2d_like_tensorflow1x(
            BYTES.float(), size=(side, side), align_corners=False
        )
        assert (resize_tf1(BYTES.float(), side) - expected).abs().max() < 1e-2, side
    off = torch.nn.functional.interpolate(BYTES.float(), size=(299, 299), mode="bilinear")
    assert (resize_tf1(BYTES.float(), 299) - off).abs().max() > 20, "the half pixel is seen"


def test_recipes_against_their_libraries():
    from torchvision import transforms as T

    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in BYTES]
    bicubic = T.InterpolationMode.BICUBIC
    dgm = T.Compose([T.Resize((224, 224), bicubic), T.ToTensor(), T.Normalize(*IMAGENET)])
    found = networks.NETWORKS["dinov2_l"].recipe.prepare(BYTES)
    assert torch.equal(found, torch.stack([dgm(i) for i in images])), "dgm-eval's transform"
    head = T.Compose([T.Resize(256, bicubic), T.CenterCrop(224), T.ToTensor(), T.Normalize(*IMAGENET)])
    found = networks.NETWORKS["dinov2_l_classes"].recipe.prepare(BYTES)
    assert torch.allclose(found, torch.stack([head(i) for i in images]), atol=1e-6)
    openai = T.Compose([T.Resize(224, bicubic), T.CenterCrop(224), T.ToTensor(), T.Normalize(*CLIP)])
    found = networks.NETWORKS["clip_l"].recipe.prepare(BYTES)
    assert torch.allclose(found, torch.stack([openai(i) for i in images]), atol=1e-6)
    dream = T.Compose([T.Resize((224, 224), bicubic), T.ToTensor()])
    found = networks.NETWORKS["dreamsim"].recipe.prepare(BYTES)
    assert torch.equal(found, torch.stack([dream(i) for i in images])), "dreamsim's preprocess"


def test_clip_recipe_against_transformers():
    CLIPImageProcessor = pytest.importorskip("transformers").CLIPImageProcessor

    square = BYTES[..., :40]  # of an odd rest, OpenAI and transformers leave the odd pixel at other sides
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in square]
    expected = CLIPImageProcessor()(images, return_tensors="pt")["pixel_values"]
    gap = (networks.NETWORKS["clip_l"].recipe.prepare(square) - expected).abs().max()
    assert gap < 2.01 / 255 / min(CLIP[1]), (
        "two levels: transformers resizes with torchvision, OpenAI with PIL"
    )


def test_float_recipe_is_pils_kernel():
    x = networks.NETWORKS["clip_l336"].recipe.prepare(BYTES) * torch.tensor(CLIP[1]).view(3, 1, 1)
    x = (x + torch.tensor(CLIP[0]).view(3, 1, 1))[0] * 255
    for channel, found in zip(BYTES[0].float().numpy(), x.numpy()):
        image = Image.fromarray(channel).resize((336, 336), Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(image) - found).max() < 0.01


def test_pictures_are_rounded_not_cut():
    recipe = Recipe("none")
    assert torch.equal(recipe.prepare(BYTES.float() / 127.5 - 1), BYTES)
    assert torch.equal(recipe.prepare((BYTES.float() + 0.4).clamp(max=255) / 127.5 - 1), BYTES)
    below = (BYTES.float() - 0.4).clamp(min=0) / 127.5 - 1
    assert torch.equal(recipe.prepare(below), BYTES), "cut off, these would be a level darker"
    with pytest.raises(ValueError, match="RGB pictures"):
        recipe.prepare(BYTES[:, :1])
    for odd in (("bilinear", 224, 0), ("pil", 224, 200), ("pil crop", 224, 0)):
        with pytest.raises(ValueError):
            Recipe(*odd)


# --- networks of the published classes, with random weights
# --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Where weights lie, empty."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    yield place
    torch.hub.set_dir(before)


def test_what_to_fetch(hub, monkeypatch):
    """Offline, each network says which file, from where, to which place."""
    for name, network in networks.NETWORKS.items():
        with pytest.raises(FileNotFoundError) as error:
            networks.open_network(name)
        said = str(error.value)
        assert network.fetch in said and str(hub / network.place) in said and name in said
        if network.needs:
            (hub / network.place).mkdir(exist_ok=True)
            with pytest.raises(FileNotFoundError, match=f"lacks .*{network.needs[-1]}"):
                networks.open_network(name)
    with pytest.raises(ValueError, match="no network 'eyes': there are fid_inception"):
        networks.open_network("eyes")
    (hub / "alexnet-owt-7be5be79.pth").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"another file \(sha256 .*expected 7be5be79"):
        networks.open_network("lpips_alex")
    monkeypatch.setitem(__import__("sys").modules, "dreamsim", None)
    for file in networks.NETWORKS["dreamsim"].needs:
        (hub / "dreamsim" / file).mkdir(parents=True)
    with pytest.raises(ImportError, match="pip install dreamsim"):
        networks.open_network("dreamsim")


def test_no_code_in_weights(tmp_path):
    """A pickle that would run something is refused before a library opens it."""
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    builders = [networks.lpips_network]
    try:
        import torch_fidelity  # noqa: F401

        builders.append(lambda path: networks.FidInception(path, "2048"))
    except ImportError:
        pass
    for build in builders:
        with pytest.raises(Exception, match="[Ww]eights"):
            build(tmp_path / "evil.pth")
    assert not ran.exists()


def test_fid_inception(tmp_path, monkeypatch):
    """The published network with random weights: our features are torch-fidelity's."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    torch.manual_seed(0)
    cls = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as m:  # its constructor insists on a file
        m.setattr(cls, "load_state_dict", lambda self, state: None)
        torch.save({}, tmp_path / "empty.pth")
        torch.save(cls("x", ["2048"], str(tmp_path / "empty.pth")).state_dict(), tmp_path / "w.pth")
    features = ("2048", "logits_unbiased", "768")
    library = cls("inception-v3-compat", list(features), str(tmp_path / "w.pth"))
    two = BYTES[:2]
    expected = dict(zip(features, library(two)))
    for feature in ("2048", "logits_unbiased"):
        eyes = networks.Eyes("x", networks.FidInception(tmp_path / "w.pth", feature), Recipe("none"))
        assert torch.equal(eyes(two), expected[feature])
        assert torch.equal(eyes(two.float() / 127.5 - 1), expected[feature]), "floats are rounded first"
    eyes = networks.Eyes("x", networks.FidInception(tmp_path / "w.pth", "mixed_6"), Recipe("none"))
    seen = []
    library.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, x: seen.append(x))
    library(two)
    spatial = eyes(two)
    assert spatial.shape == (2, 17 * 17 * 7) == (2, networks.NETWORKS["fid_inception_mixed_6"].dim)
    assert torch.equal(spatial.view(2, 17, 17, 7), seen[0][:, :7].permute(0, 2, 3, 1)), "TensorFlow's order"


def test_lpips(hub, monkeypatch):
    """The smallest trunk with random weights, against richzhang's own package and by what it must do."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    trunk = squeezenet1_1(weights=None)
    path = hub / "squeezenet1_1-b8a52dc0.pth"
    torch.save(trunk.state_dict(), path)
    eyes = networks.Eyes("lpips", networks.lpips_network(path, "squeeze"), Recipe("none"))
    a, b = (torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    found = entries.lpips(a, b, eyes)
    assert found.shape == (3,) and (found > 0).all()
    assert torch.allclose(entries.lpips(a, a, eyes), torch.zeros(3), atol=1e-6)
    assert torch.allclose(entries.lpips(a[:1], b[:1], eyes), found[:1], rtol=1e-4), "a batch of one"
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    theirs = LearnedPerceptualImagePatchSimilarity("squeeze", normalize=True)(a, b)
    same(found.mean(), theirs, 1e-5)
    assert not any(p.requires_grad for p in eyes.parameters()) and not eyes.train().training


def test_dinov2_and_its_head(hub):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    config = transformers.Dinov2Config(**small)
    transformers.Dinov2Model(config).save_pretrained(hub / "dinov2-large")
    for name in ("dinov2_l", "dinov2_l_tf1"):
        eyes = networks.open_network(name)
        x = networks.NETWORKS[name].recipe.prepare(BYTES)
        with torch.no_grad():
            expected = eyes.net.net(pixel_values=x)
        assert torch.equal(eyes(BYTES), expected.pooler_output), "the class token behind the last norm"
        assert eyes(BYTES[:1]).shape == (1, 32)
    head = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**small, num_labels=1000))
    head.save_pretrained(hub / "dinov2-large-imagenet1k-1-layer")
    eyes = networks.open_network("dinov2_l_classes")
    logits = eyes(BYTES)
    with torch.no_grad():
        tokens = eyes.net.net.dinov2(
            pixel_values=networks.NETWORKS["dinov2_l_classes"].recipe.prepare(BYTES)
        ).last_hidden_state
        by_hand = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1) @ eyes.net.net.classifier.weight.T
        by_hand = by_hand + eyes.net.net.classifier.bias
    assert torch.allclose(logits, by_hand, atol=1e-4)
    right = entries.right_class(logits, torch.tensor([int(logits[0].argmax()), -1, int(logits[2].argmax())]))
    assert right.tolist() == [1, 0, 1]


def _clip(hub, place, side):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tower = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    vision = dict(tower, image_size=side, patch_size=56)
    if place.endswith("336"):
        config = transformers.CLIPVisionConfig(**vision, projection_dim=16)
        transformers.CLIPVisionModelWithProjection(config).save_pretrained(hub / place)
        return
    text = dict(tower, vocab_size=300, max_position_embeddings=12, eos_token_id=257, bos_token_id=256)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(hub / place)
    letters = [chr(c) for c in range(97, 123)]
    words = letters + [f"{c}</w>" for c in letters]
    vocabulary = {w: i for i, w in enumerate(words)} | {"<|startoftext|>": 256, "<|endoftext|>": 257}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[])
    tokenizer.save_pretrained(hub / place)


def test_cmmd_embeddings(hub):
    _clip(hub, "clip-vit-large-patch14-336", 336)
    eyes = networks.open_network("clip_l336")
    with torch.no_grad():
        expected = eyes.net.net(pixel_values=eyes.recipe.prepare(BYTES)).image_embeds
    assert torch.equal(eyes(BYTES), expected) and expected.shape == (3, 16)


def test_clip_score(hub):
    """100 times the cosine of both towers, by hand; longer captions are cut."""
    _clip(hub, "clip-vit-large-patch14", 224)
    eyes = networks.open_network("clip_l")
    captions = ["a red boat", "b" * 40, "a red boat"]
    found = entries.score_texts(BYTES, captions, eyes)
    with torch.no_grad():
        ids = eyes.net.tokenizer(captions[0], return_tensors="pt")
        out = eyes.net.net(pixel_values=eyes.recipe.prepare(BYTES), **ids)
    cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds, dim=-1)
    assert torch.allclose(found[[0, 2]].float(), 100 * cosine[[0, 2]], atol=1e-3)
    assert found.shape == (3,) and found[0] != found[2]
    with pytest.raises(ValueError, match="3 pictures and 1 captions"):
        entries.score_texts(BYTES, ["one"], eyes)


def test_dreamsim_is_a_cosine():
    """Of embeddings of what the recipe prepares; the published ensemble cannot be had here."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 5)

        def forward(self, x):
            assert x.shape[-2:] == (224, 224) and 0 <= x.min() and x.max() <= 1
            return self.embed(x.mean((2, 3)))

    eyes = networks.Eyes("dreamsim", Small(), networks.NETWORKS["dreamsim"].recipe)
    a, b = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    found = entries.dreamsim(a, b, eyes)
    expected = 1 - torch.cosine_similarity(eyes(a * 2 - 1), eyes(b * 2 - 1), dim=1)
    assert torch.equal(found, expected) and torch.allclose(
        entries.dreamsim(a, a, eyes), torch.zeros(2), atol=1e-6
    )


# --- the registry
# --------------------------------------------------------------------------------------------------------

WANTED = """mae mse psnr ssim lpips dreamsim rfid gfid sfid inception_score kid precision recall fd_dinov2
cmmd fdr mind acc class_acc clip_score codebook_usage entropy perplexity bpp frechet""".split()


def test_every_entry_is_complete():
    assert set(WANTED) <= set(METRICS)
    for m in METRICS.values():
        assert m.source and m.of in KINDS and m.against and m.direction in (1, -1), m.name
        assert m.extractor in ("", *networks.NETWORKS), m.name
        assert m.variant or not m.asked or m.name == "mse", m.name
        key = m.columns(["eyes/x"])[0]
        assert metric_of(key) is m, "a column leads back to its metric"
    assert [m.name for m in METRICS.values() if not m.asked] == ["mae", "psnr", "ssim", "frechet", "acc"]
    assert METRICS["rfid"].against != METRICS["gfid"].against
    assert {m.name for m in metrics_asked("ids", ["bpp"])} == {"bpp"}
    assert all(name in entries.metric_table() for name in METRICS)


def test_asking(hub, tmp_path):
    with pytest.raises(ValueError, match="no metric 'fid': there are mae"):
        entries.open_asked(["fid"])
    with pytest.raises(ValueError, match="score_texts"):
        entries.open_asked(["clip_score"])
    with pytest.raises(ValueError, match="--reference"):
        entries.open_asked(["gfid"])
    with pytest.raises(FileNotFoundError, match="weights-inception"):
        entries.open_asked(["rfid"])
    asked = entries.open_asked(["kid", "bpp", "kid"])
    assert asked.names == ("kid", "bpp") and not asked.networks and not asked.extractors


class Halves:
    """A tokenizer of two words: how bright the picture is, coarse and fine."""

    kind, identity, vocabulary, length, token_counts, image_size = "halves", "abc", 16, 2, (1, 2), 16
    device, vae = torch.device("cpu"), None

    def tokenize(self, images, budget=None):
        level = ((images.mean((1, 2, 3)) + 1) * 127.5).round().long()
        return torch.stack([level // 16, level % 16], 1)[:, :budget]

    def detokenize(self, ids, sampling=None, *, first_index=0, **settings):
        level = ids[:, 0] * 16 + (ids[:, 1] if ids.shape[1] > 1 else 8)
        return (level / 127.5 - 1)[:, None, None, None].expand(-1, 3, 16, 16).float()


class Pixels(nn.Module):
    def __init__(self, name, side):
        super().__init__()
        self.name, self.side, self.weight = name, side, nn.Parameter(torch.ones(1))

    def forward(self, x):
        x = x if x.is_floating_point() else x.float() / 127.5 - 1
        return nn.functional.adaptive_avg_pool2d(x, self.side).flatten(1) * self.weight


def pictures(n=120, classes=1000):
    generator = torch.Generator().manual_seed(5)
    base = torch.randint(20, 230, (n, 3, 1, 1), generator=generator)
    noise = torch.randint(-20, 20, (n, 3, 16, 16), generator=generator)
    labels = torch.arange(n)[:, None] % classes
    return ImageSet((base + noise).to(torch.uint8), labels, tuple(map(str, range(classes))), "greys")


def measured(names, data=None, reference=None, offset=0.0, **nets):
    fake = {"fid_inception": Pixels("inception", 2), "clip_l336": Pixels("clip", 3)} | nets
    fake["dinov2_l_classes"] = Pixels("head", 1)
    fake["lpips_alex"] = networks.Eyes("lpips", Mean(), Recipe("none"))
    asked = entries.open_asked(names, "cpu", reference, fake)
    tok = Halves()
    if offset:
        tok.detokenize = lambda *a, **k: (Halves.detokenize(tok, *a, **k) + offset).clamp(-1, 1)
    data = data or pictures()
    config = EvalConfig(images=60, steps=1, guidance=1.0)
    return evaluate_tokenizer(tok, data, None, Pixels("pixels/2x2", 2), config, asked=asked, progress=False)


class Mean(nn.Module):
    """In the place of LPIPS: takes [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, a, b):
        assert a.min() < 0 and b.min() < 0
        return ((a - b).abs().mean((1, 2, 3)) * self.weight)[:, None, None, None]


ASKED = "mse lpips rfid cmmd kid precision recall mind fdr codebook_usage entropy perplexity bpp class_acc"


def test_a_table_with_everything(tmp_path):
    """Columns, errors, gains, card, files, text and figure of all that can be measured without a download."""
    names = ASKED.split()
    report, plain = measured(names), measured(())
    first, last = report.rows[-2:]
    assert [r["what"] for r in report.rows] == ["originals", "real against real", "half against half"] + [
        "tokens"
    ] * 2
    for row, before in zip(report.rows, plain.rows):
        assert {k: v for k, v in row.items() if k in before} == pytest.approx(before, nan_ok=True)
    columns = {n: [f"{n}_pixels"] if METRICS[n].family else [n] for n in names}
    for name, keys in columns.items():
        assert all(math.isfinite(last[k]) for k in keys), name
        if METRICS[name].of in ("pictures", "set", "classes"):
            assert all(math.isfinite(last[f"{k}_se"]) and f"{k}_gain" in last for k in keys), name
    same(last["mse"], report.scores["tokens/2/mse"].mean(), 1e-6)
    same(last["lpips"], 2 * last["mae"], 1e-4)
    same(last["rfid"], last["frechet_pixels"], 1e-3)
    floor = report.rows[1]
    same(last["fdr"], last["frechet_pixels"] / floor["frechet_pixels"], 1e-6)
    assert "rfid" in floor and "bpp" not in floor and last["bpp"] == 8 / 256 and first["bpp"] == 4 / 256
    same(last["perplexity"], perplexity(Halves().tokenize(_kept()), 16).mean(), 1e-9)
    assert set(report.card["metrics"]) == set(names) and "2,048 pooled" in report.card["metrics"]["rfid"]
    assert {"fid_inception", "clip_l336", "lpips_alex"} <= set(report.card["weights"])
    assert "metrics" not in plain.card and "rfid" not in str(plain)
    text = str(report)
    assert "rFID" in text and "perplexity" in text and "rFID: Inception of 2015" in text and "FDr" in text
    report.save(tmp_path)
    assert load_report(tmp_path) == report
    import matplotlib.pyplot as plt

    from flextok_edu.evaluation.report import plot_report

    titles = [ax.get_title().split("\n")[0] for ax in plot_report(load_report(tmp_path)).axes]
    plt.close("all")
    assert {"rFID", "KID", "FDr", "MSE"} <= set(titles), titles


def _kept():
    from flextok_edu.evaluation.evaluate import measured_and_rest

    return measured_and_rest(pictures(), 60, 60)[0].images.float() / 127.5 - 1


def test_variants_and_references_are_not_ranked(monkeypatch):
    one, two = measured(["rfid", "kid"]), measured(["rfid", "kid"], offset=0.6)
    assert not compare(one, two).mismatches("rfid") and compare(one, two).best("rfid", tokens=2) == 0
    monkeypatch.setitem(METRICS, "rfid", replace(METRICS["rfid"], variant="another resize"))
    other = measured(["rfid", "kid"], offset=0.1)
    assert list(compare(one, other).mismatches("rfid")) == ["metric"]
    assert not compare(one, other).mismatches("kid_pixels")
    nets = Pixels("inception", 2)
    nn.init.constant_(nets.weight, 2.0)
    other = measured(["rfid", "kid"], fid_inception=nets)
    assert "weights.extractor" in compare(one, other).mismatches("rfid")


def test_gfid_needs_its_reference(tmp_path):
    """Of samples only, against the file; the card says which."""
    D.Moments.of(Pixels("x", 2)(pictures().images)).save(tmp_path / "r.npz")
    report = measured(["gfid"], reference=tmp_path / "r.npz")
    assert "gfid" not in report.rows[-1], "these are reconstructions"
    assert "120 pictures" in report.card["metrics"]["gfid"]


def test_classes_need_imagenet():
    with pytest.raises(ValueError, match="1,000 classes of ImageNet; 'greys' has 7"):
        measured(["class_acc"], pictures(classes=7))


# --- self-test
# --------------------------------------------------------------------------------------------------------


def test_self_test_finds_planted_bugs(monkeypatch):
    """Each bug fails a known answer."""
    import flextok_edu.evaluation.self_test as module

    x = some(4, 200, 8)
    assert all(c.passed for c in known_answers(x)), [str(c) for c in known_answers(x)]
    real = D.frechet_distance
    bugs = {
        "frechet_distance": lambda a, b: abs(real(a, b)) ** 0.5,
        "mind": lambda a, b: float((a.mean(0) - b.mean(0)).square().sum()),
        "kid": lambda a, b: D.mmd(a.double(), b.double(), D.cubic_kernel, unbiased=False) + 0.1,
        "cmmd": lambda a, b: 1000 * D.cmmd(a, b) + 1,
        "precision": lambda a, b: D.precision(a, b) - 0.01,
        "recall": lambda a, b: D.precision(a, b),
        "inception_score": lambda a, b: math.log(D.inception_score(a, b)),
        "floor_ratio": lambda a, b: float((a - b).mean()),
    }
    for name, bug in bugs.items():
        with monkeypatch.context() as m:
            m.setattr(module, name, bug)
            assert not all(c.passed for c in known_answers(x)), name
    assert not Check("x", math.nan, 0, 1).passed


def test_mistakes_are_mistakes():
    from flextok_edu.data.scenes import ToyScenes

    large = ToyScenes("val", 96, 2, 0, 3).render(progress=False)[0]
    small = resized(large, 64)
    for what, changed in mistakes(large, small).items():
        assert changed.shape == small.shape and changed.dtype == torch.uint8
        assert not torch.equal(changed, small), what
    found = self_test(100, eyes=Pixels("pixels", 4))
    rows = {r["what"]: r for r in found.rows}
    assert found.passed and rows["itself"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert rows["other scenes, 25"]["frechet"] > rows["other scenes, 50: the floor"]["frechet"]
    assert rows["JPEG quality 50"]["psnr"] < rows["JPEG quality 95"]["psnr"]
    with pytest.raises(ValueError, match="too few"):
        self_test(50)


def test_the_command(capsys):
    from flextok_edu.apps.measure import eval_main

    with pytest.raises(SystemExit) as end:
        eval_main(["--self-test", "--scenes", "50"])
    assert end.value.code == 2 and "100 or more" in capsys.readouterr().err
    eval_main(["--self-test", "--scenes", "100"])
    said = capsys.readouterr().out
    assert "14 of 14 known answers" in said and "JPEG quality 75" in said


def test_the_command_measures_more(tmp_path, capsys, monkeypatch):
    """Also of samples: rFID is of reconstructions, gFID of samples and against the file."""
    from flextok_edu.apps.measure import eval_main

    monkeypatch.setattr(entries, "open_network", lambda name, device: Pixels(name, 2))
    statistics = D.Moments.of(Pixels("x", 2)(pictures().images))
    statistics.save(tmp_path / "r.npz")
    few = [f"evaluate.{k}=12" for k in ("images", "samples")] + ["evaluate.steps=1"]
    words = ["tiny", "--ar", "tiny", "--out", str(tmp_path / "t"), "--set", *few]
    eval_main([*words, "--reference", str(tmp_path / "r.npz"), "--metrics", *"mse bpp gfid rfid fdr".split()])
    report = load_report(tmp_path / "t")
    made, sampled = ([r for r in report.rows if r["what"] == what][-1] for what in ("tokens", "samples"))
    assert made["bpp"] == sampled["bpp"] == 320 / 4096 and made["mse"] > 0 and "mse" not in sampled
    assert "gfid" not in made and "rfid" not in sampled and made["fdr"] > 0 and sampled["fdr"] > 0
    assert sampled["gfid"] > made["rfid"] and sampled["gfid_se"] > 0
    assert "120 pictures" in report.card["metrics"]["gfid"]
    with pytest.raises(SystemExit) as end:
        eval_main(
            [
                "tiny",
                "--out",
                str(tmp_path / "v"),
                "--reference",
                str(tmp_path / "r.npz"),
                "--metrics",
                "gfid",
            ]
        )
    assert end.value.code == 2 and "--ar" in capsys.readouterr().err, "there are no new pictures"
    with pytest.raises(SystemExit) as end:
        eval_main(["tiny", "--out", str(tmp_path / "u"), "--metrics", "sharpness"])
    assert end.value.code and "no metric 'sharpness'" in capsys.readouterr().err


def test_small_sets_have_values_and_no_error():
    """A half of them is too small for ten parts: the value is there, its error is not known."""
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    measure = METRICS["inception_score"].measure
    assert math.isfinite(measure(logits, logits))
    assert resamples(measure, logits, logits, halves=True).isnan().all()
    with pytest.raises(ValueError):
        measure(logits[:5], logits[:5])


def test_damaged_statistics_are_a_value_error(tmp_path):
    D.Moments.of(torch.randn(9, 4)).save(tmp_path / "r.npz")
    whole = (tmp_path / "r.npz").read_bytes()
    for i, damaged in enumerate((whole[:200], whole[:150] + bytes(40) + whole[190:], b"")):
        (tmp_path / f"{i}.npz").write_bytes(damaged)
        with pytest.raises(ValueError, match="no file of statistics"):
            D.Moments.load(tmp_path / f"{i}.npz")


def test_fdr_is_not_ranked_against_other_networks():
    from flextok_edu.evaluation.compare import conditions

    cards = [
        {"extractors": e, "weights": {}, "reference": r, "floor": 1} for e, r in ((["a"], "x"), (["b"], "y"))
    ]
    a, b = (conditions(card, "fdr", "tokens") for card in cards)
    assert {name for name in a if a[name] != b[name]} == {"extractors", "reference"}


@pytest.mark.parametrize("name", ["kid", "cmmd", "precision", "recall", "mind"])
def test_sets_that_do_not_fit_are_refused(name):
    """Features of two networks, no features, and one vector instead of a set."""
    distance, some = getattr(D, name), torch.randn(9, 4)
    for real, found in ((some, torch.randn(9, 5)), (torch.randn(0, 4), some), (some[0], some)):
        with pytest.raises(ValueError, match="both sides|at least"):
            distance(real, found)

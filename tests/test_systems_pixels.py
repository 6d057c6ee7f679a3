"""TiTok and One-D-Piece in their own form: each property with the bug that would break it (`planted`)."""

import json
from dataclasses import replace

import pytest
import torch

from flextok_edu.apps.run import run
from flextok_edu.apps.run_config import RunConfig
from flextok_edu.data.datasets import load_data
from flextok_edu.engine.config import preset
from flextok_edu.engine.files import weights_hash
from flextok_edu.engine.long_run import long_run
from flextok_edu.engine.optim import EMA
from flextok_edu.engine.tensors import from_uint8
from flextok_edu.engine.tokenizers import Tokenizer, load_any_tokenizer, tokenizer_from_pretrained
from flextok_edu.engine.trainer import Callback, SingleDevice, Trainer
from flextok_edu.systems.common import training_flops
from flextok_edu.systems.pixel_stages import TwoStages, picture_batches
from flextok_edu.systems.proxy import Proxy, kmeans, nearest
from flextok_edu.systems.titok_pixels import PixelTailDrop, PixelTiTok
from flextok_edu.systems.vq import VQ, EntryUsage
from flextok_edu.vae import VAE

MICRO = preset("micro")
SMALL = replace(
    MICRO,
    vae=replace(MICRO.vae, channels=(8, 16)),
    tokenizer=replace(
        MICRO.tokenizer,
        registers=8,
        encoder=replace(MICRO.tokenizer.encoder, width=64, depth=1),
        decoder=replace(MICRO.tokenizer.decoder, width=64, depth=1),
    ),
    train_tokenizer=replace(MICRO.train_tokenizer, steps=10, batch=8, warmup=2),
)


class Small:
    """Fast in tests: no network for the perceptual distance, and stages of 6 and 4 steps."""

    perceptual = 0.0


class SmallTiTok(Small, PixelTiTok):
    pass


class SmallTailDrop(Small, PixelTailDrop):
    pass


@pytest.fixture(scope="module")
def data():
    return load_data("scenes", 32, 40, 10, 1, 0, progress=False)[0]


def made(cls=SmallTiTok, quantizer="vq"):
    torch.manual_seed(0)
    vae = VAE(SMALL.vae).eval()
    return cls(replace(cls.settings_for(SMALL), quantizer=quantizer, entries=64), vae)


def trained(data, trainer=None, cls=SmallTiTok, quantizer="vq", **changed):
    tok = made(cls, quantizer)
    config = replace(SMALL.train_tokenizer, **changed)
    return tok.fit(data, config, trainer=trainer, device="cpu", progress=False)


class Watching(Callback):
    """Hashes of the parts after each step."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def around(self, training, backend):
        self.names = {id(w): n for n, w in training.objectives[0].parameters}
        return super().around(training, backend)

    def step(self, training, backend, looked):
        state = {n: w.detach().clone() for n, w in training.objectives[0].parameters}
        parts = {n.split(".")[0] for n in state if not n.startswith("proxy")}
        seen = {p: weights_hash({n: w for n, w in state.items() if n.startswith(p)}) for p in parts}
        seen["codebook"] = weights_hash({"": state["proxy.codebook"]})
        seen["pixels"] = weights_hash({n: w for n, w in state.items() if n.startswith("proxy.decoder")})
        self.seen.append(seen)
        if training.done == self.stop_at:
            raise KeyboardInterrupt


# --- who moves when
# ----------------------------------------------------------------------


@pytest.mark.parametrize("like_a_gpu", (False, True))
def test_each_stage_moves_its_own(data, like_a_gpu):
    backend, watching = SingleDevice(), Watching()
    backend.tensors = like_a_gpu  # gradients stay where they are, as zeros
    tok, log = trained(data, Trainer(backend, callbacks=[watching]))
    one, two = watching.seen[:6], watching.seen[6:]
    for part in ("encoder", "quantizer"):
        assert len({s[part] for s in one}) == 6 and len({s[part] for s in two}) == 1, part
    assert len({s["decoder"] for s in watching.seen}) == 10
    for part in ("codebook", "pixels"):
        assert len({s[part] for s in one}) == 1 and len({s[part] for s in two}) == 4, part
    # what is kept is what stage 2 has learned from: averages of stage 1
    for part in ("encoder", "quantizer"):
        kept = {n: w for n, w in tok.own_parameters() if n.startswith(part)}
        assert weights_hash(kept) == two[-1][part] != one[-1][part], part
    assert all(w.requires_grad for _, w in tok.own_parameters())
    assert not any(w.requires_grad for w in tok.vae.parameters())
    assert {"words", "quantizer"} <= set(log[0]) and {"l2", "adversarial", "critic"} <= set(log[-1])


def test_the_vae_itself_does_not_move(data):
    tok = made()
    before = weights_hash(tok.vae)
    tok.fit(data, SMALL.train_tokenizer, device="cpu", progress=False)
    assert weights_hash(tok.vae) == before
    assert weights_hash(tok.proxy.decoder) != weights_hash(tok.vae.decoder)


# while entries are revived, between the two stages, within the second, and with the critic
@pytest.mark.parametrize(
    "at, cls", ((2, SmallTiTok), (6, SmallTailDrop), (7, SmallTiTok), (9, SmallTailDrop))
)
def test_an_interrupted_training_goes_on(data, tmp_path, monkeypatch, at, cls):
    monkeypatch.setattr(EntryUsage, "memory", 0.3)  # entries die within three steps
    whole, log = trained(data, cls=cls)

    class Stop(Callback):
        def step(self, training, backend, looked):
            if training.done == at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop = long_run(tmp_path, device="cpu", steps=1, callbacks=[Stop()])
        trained(data, stop, cls)
    again, resumed = trained(data, long_run(tmp_path, device="cpu"), cls)
    assert weights_hash(again.own_state()) == weights_hash(whole.own_state())
    assert [row["tokenizer"] for row in resumed] == [row["tokenizer"] for row in log]


def test_micro_batches_make_the_same_step(data):
    from flextok_edu.engine.distributed import Distributed

    class Still(SmallTailDrop):  # (a revived entry takes the vectors of the last micro-batch)
        words_until, adversarial = 0.5, 0.0

    found = []
    for micro in (1, 2):
        logs = trained(data, Trainer(Distributed("cpu", micro=micro)), Still, "fsq")[1]
        found.append([row["tokenizer"] for row in logs])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# --- the tail
# ----------------------------------------------------------------------


class Given(torch.nn.Module):
    """An encoder that says what it is told."""

    def __init__(self, z):
        super().__init__()
        self.z = z

    def forward(self, images):
        return self.z


def test_the_tail_is_removed(data):
    tok = made(SmallTailDrop)
    tok.proxy.codebook.data.normal_()
    loss = TwoStages(tok)
    images = from_uint8(data.images[:3])
    latents = tok.vae.encode(images)
    z = torch.randn(3, 8, 12, requires_grad=True)
    other = torch.cat([z[:, :5], torch.randn(3, 3, 12)], 1).detach()
    found = {}
    for name, vectors in (("z", z), ("other", other)):
        tok.encoder = Given(vectors)
        found[name] = loss.words(images, latents, 5)[1]["words"], loss.pixels(images, 5)[0]
        found[name, "whole"] = loss.words(images, latents, 8)[1]["words"]
    assert torch.equal(found["z"][0], found["other"][0]) and torch.equal(found["z"][1], found["other"][1])
    assert not torch.equal(found["z", "whole"], found["other", "whole"])
    of = torch.autograd.grad(found["z"][0], z)[0].abs().sum((0, 2))
    assert of[:5].gt(0).all() and not of[5:].any()
    # removed, not masked: the decoder sees fewer positions
    seen = []
    tok.decoder.blocks[0].register_forward_pre_hook(lambda block, given: seen.append(given[0].shape[1]))
    loss.words(images, latents, 5)
    assert seen == [16 + 5]


def test_one_length_a_batch_drawn_evenly(data):
    latents = torch.zeros(40, 4, 8, 8)
    drawn = picture_batches(made(SmallTailDrop), data.images, latents, 8)
    lengths = torch.tensor([drawn.part(torch.arange(1), torch.arange(1), step)[2] for step in range(1600)])
    counts = lengths.bincount(minlength=9)
    assert counts[0] == 0 and counts[1:].min() > 140 and counts[1:].max() < 260 and len(counts) == 9
    assert {m for (_, _, m), _ in drawn.micro_batches(7, micro=4)} == {int(lengths[7])}
    fixed = picture_batches(made(), data.images, latents, 8)
    assert {fixed.part(torch.arange(1), torch.arange(1), step)[2] for step in range(50)} == {8}


def test_shorter_lists_decode(data):
    tok = made(SmallTailDrop).eval()
    tok.proxy.codebook.data.normal_()
    ids = tok.tokenize(from_uint8(data.images[:4]))
    one = [tok.detokenize(ids[i : i + 1, :r]) for i, r in enumerate((3, 8, 1, 3))]
    many = tok.detokenize([ids[i, :r] for i, r in enumerate((3, 8, 1, 3))])
    assert torch.allclose(torch.cat(one), many, atol=1e-5)
    assert not torch.allclose(tok.detokenize(ids[:, :3]), tok.detokenize(ids), atol=1e-4)
    each = tok.tokenize(from_uint8(data.images[:4]), [1, 2, 3, 8])
    assert [len(row) for row in each] == [1, 2, 3, 8] and torch.equal(each[2], ids[2, :3])
    assert tok.token_counts == (1, 2, 4, 8) and tok.mean_budget == 4
    policy = tok.tokenize(from_uint8(data.images[:2]), lambda tok, images: [2, 5])
    assert [len(row) for row in policy] == [2, 5]


# --- as a tokenizer
# ----------------------------------------------------------------------


@pytest.mark.parametrize("cls", (PixelTiTok, PixelTailDrop))
@pytest.mark.parametrize("quantizer", ("vq", "fsq"))
def test_saved_and_loaded(data, tmp_path, cls, quantizer):
    tok = made(cls, quantizer).eval()
    with torch.no_grad():
        tok.proxy.codebook.normal_()
    assert isinstance(tok, Tokenizer)
    images = from_uint8(data.images[:3])
    tok.save_pretrained(tmp_path / "tok")
    facts = json.loads((tmp_path / "tok" / "config.json").read_text())
    assert facts["kind"] == cls.kind and facts["vae"] == weights_hash(tok.vae)
    again = tokenizer_from_pretrained(tmp_path / "tok")
    assert type(again) is cls and again.identity == tok.identity and again.config == tok.config
    assert torch.equal(again.tokenize(images), tok.tokenize(images))
    assert torch.equal(again.detokenize(tok.tokenize(images)), tok.detokenize(tok.tokenize(images)))
    bare, _ = load_any_tokenizer(tmp_path / "tok")  # pictures need no VAE
    assert torch.equal(bare.detokenize(bare.tokenize(images)), tok.detokenize(tok.tokenize(images)))
    with pytest.raises(ValueError, match="needs a VAE"):
        bare.fit(data, SMALL.train_tokenizer)
    with pytest.raises(ValueError, match="was trained with VAE"):
        load_any_tokenizer(tmp_path / "tok", VAE(SMALL.vae))


def test_batches_of_one_and_what_changes_nothing(data):
    tok = made().eval()
    with torch.no_grad():
        tok.proxy.codebook.normal_()
    images = from_uint8(data.images[:3])
    ids = tok.tokenize(images)
    assert ids.shape == (3, 8) and ids.dtype == torch.int64 and ids.max() < tok.vocabulary == 1000
    alone = torch.cat([tok.tokenize(image[None]) for image in images])
    assert torch.equal(alone, ids)
    pictures = tok.detokenize(ids)
    assert pictures.shape == (3, 3, 32, 32) and pictures.abs().max() <= 1 and pictures.dtype == torch.float32
    assert torch.allclose(tok.detokenize(ids[1:2]), pictures[1:2], atol=1e-5)
    told = tok.detokenize(ids, steps=3, guidance=7.0, seed=5, first_index=9, noise=None, verbose=True)
    assert torch.equal(told, pictures)
    assert [row.shape for row in tok.tokenize(images, as_list=True)] == [(1, 8)] * 3
    loss = TwoStages(tok.train())
    for progress in (0.0, 0.7, 0.95):
        assert torch.isfinite(loss((images[:1], tok.vae.encode(images[:1]), 8), progress)[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(TwoStages(made())((images, tok.vae.encode(images), 8), 0.0)[0])
        assert torch.equal(
            tok.eval().quantizer(torch.randn(1, 2, 12).bfloat16())[0].norm(dim=-1).round(), torch.ones(1, 2)
        )


def test_what_is_refused(data, tmp_path):
    tok, tail = made(), made(SmallTailDrop)
    images = from_uint8(data.images[:2])
    ids = tok.tokenize(images)
    for wrong, words in (
        (lambda: tok.tokenize(images, 4), "has 8 tokens an image, always"),
        (lambda: tok.tokenize(images, [8, 4]), "was asked for 4"),
        (lambda: tok.detokenize(ids[:, :4]), "has 8 tokens an image"),
        (
            lambda: tail.detokenize(torch.zeros(1, 9, dtype=torch.int64)),
            "a list of ids must be an integer in 1",
        ),
        (lambda: tok.detokenize(ids + 1000), "ids must lie in 0 .. 999"),
        (lambda: tok.detokenize(-1 - ids), "ids must lie in 0 .. 999"),
        (lambda: tok.detokenize(ids, vae_image_sizes=64), "pictures of 32 px"),
        (lambda: tok.tokenize(images[:, :, :16, :16]), "takes \\(b, 3, 32, 32\\)"),
        (lambda: PixelTiTok(PixelTiTok.settings_for(SMALL), VAE(MICRO.vae)), "was made for"),
        (
            lambda: tok.fit(object(), None),
            "learns from pictures",
        ),
        (lambda: TwoStages(made(PixelTiTok)), "needs a feature extractor"),
    ):
        with pytest.raises(ValueError, match=words):
            wrong()
    for wrong in (lambda: tok.detokenize(ids.float()), lambda: tok.detokenize(ids, stepps=3)):
        with pytest.raises(TypeError):
            wrong()

    class Two(SingleDevice):
        world = 2

    with pytest.raises(ValueError, match="trained by one process"):
        tok.fit(data, SMALL.train_tokenizer, trainer=Trainer(Two()), device="cpu")


@pytest.mark.parametrize("kind", ("titok_pixels", "tail_drop_pixels"))
def test_a_whole_run(tmp_path, kind):
    small = dict(steps=5, train_images=60, images=12, device="cpu", compile="off")
    stages = ("train_vae", "train_classifier", "train_tokenizer", "train_ar")
    base = replace(MICRO, system=kind, **{s: replace(getattr(MICRO, s), batch=8) for s in stages})
    base = replace(base, evaluate=replace(base.evaluate, samples=24))
    report = run(RunConfig(out=str(tmp_path / "run"), **small), base)
    kinds = json.loads((tmp_path / "run/tokenizer/config.json").read_text())["kind"]
    assert kinds == kind
    counts = [16] if kind == "titok_pixels" else [1, 2, 4, 8, 16]
    assert [row["tokens"] for row in report.rows if row["what"] == "tokens"] == counts
    assert (tmp_path / "run/report.html").exists() and (tmp_path / "run/ar/config.json").exists()


def test_arithmetic_of_stages():
    system = replace(MICRO, system="titok_pixels")
    assert training_flops(system) == training_flops(system, 25)
    assert training_flops(system) > 1.1 * training_flops(replace(MICRO, system="tail_drop_pixels"), 25) * 0.95
    assert 1.3 < training_flops(system) / training_flops(MICRO) < 1.7


# --- quantiser and proxy
# ----------------------------------------------------------------------


def test_entries_in_use_stay_when_others_are_revived():
    torch.manual_seed(0)
    vq, used = VQ(20), EntryUsage(20)
    average = vq.codebook.detach().clone() + 1
    used.shares[:10] = 0.0
    kept, z = vq.codebook.detach().clone(), torch.randn(2, 4, 12)
    used.revive(z, vq.codebook.data, average)
    unit = torch.nn.functional.normalize(z, dim=-1).flatten(0, 1)
    assert torch.equal(vq.codebook[10:], kept[10:]) and torch.equal(average[10:], kept[10:] + 1)
    assert torch.equal(vq.codebook[:10], average[:10])
    assert torch.cdist(vq.codebook[:10], unit).amin(1).max() < 1e-3
    assert used.shares[:10].allclose(torch.tensor(1 / 20))


def test_ids_are_those_of_the_nearest():
    torch.manual_seed(0)
    points, book = torch.randn(1000, 4) * 3 + 1, torch.randn(30, 4) * 3 + 1
    assert torch.equal(nearest(points, book, 77)[0], torch.cdist(points, book).argmin(1))
    assert kmeans(points, 30).shape == (30, 4)
    proxy = Proxy(SMALL.vae, 30)
    proxy.learn(torch.randn(50, 4, 8, 8))
    logits = torch.randn(2, 8, 8, 30)
    by_hand = sum(logits.softmax(-1)[..., i, None] * proxy.codebook[i] for i in range(30))
    assert torch.allclose(proxy.mean_latents(logits).permute(0, 2, 3, 1), by_hand, atol=1e-5)


def test_places_of_the_decoder_are_those_of_the_latents():
    """A decoder that knows: each place's own logits come out at that place, in every patch."""
    tok = made()
    tok.decoder.blocks = torch.nn.ModuleList()
    head = torch.nn.Linear(64, 4 * 64)
    tok.decoder.head = head
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.arange(256.0))
        logits = tok.decoder(torch.zeros(1, 8, 12))  # 1 8 8 64
    for row in range(8):
        for column in range(8):
            start = 64 * (2 * (row % 2) + column % 2)
            assert torch.equal(logits[0, row, column], torch.arange(start, start + 64.0))


def test_averages_follow_a_revived_entry(data):
    tok = made()
    ema = EMA([w for _, w in tok.own_parameters()])
    loss, book = TwoStages(tok, ema=ema), tok.quantizer.codebook
    images = from_uint8(data.images[:3])
    loss((images, tok.vae.encode(images), 8), 0.0)[0].backward()
    with torch.no_grad():
        book += 1
    loss.usage.shares[:5] = 0.0
    loss.usage.counts[:5] = 0.0
    loss.after(lambda x: x)
    average = next(a for w, a in zip(ema.parameters, ema.average) if w is book)
    assert torch.equal(average[:5], book[:5]) and not torch.allclose(average[5:], book[5:], atol=0.5)
    # in the second half of stage 1 nothing is revived: averages need time
    before = book.detach().clone()
    loss((images, tok.vae.encode(images), 8), 0.5)
    loss.usage.shares.zero_()
    loss.after(lambda x: x)
    assert torch.equal(book, before)

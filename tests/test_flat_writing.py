"""Written flat, the same lists: by class and by text, in float32 to rounding, in whole numbers nearly."""

import copy
import gc
import pickle
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from planting import planted, randomize
from test_devices import AR_SMALL
from torch import nn

from flextok_edu.ar import ARBlock, ARModel
from flextok_edu.engine import flat_writing, products
from flextok_edu.engine.conditions import TextFeatures, take
from flextok_edu.engine.flat_writing import FlatWriter, _Sheet
from flextok_edu.engine.products import Int8, Packed, Transposed, int8_works
from flextok_edu.engine.settings import TextConfig

WIDE = replace(AR_SMALL, width=128, head_dim=32)  # four heads
CONFIGS = {
    "class": WIDE,
    "class, null is nothing": replace(WIDE, null="nothing"),
    "text": replace(WIDE, classes=0, text=TextConfig(width=24, length=6)),
}
CHOICES = {
    "plain": {},
    "guided": {"guidance": 2.0},
    "scheduled": {"guidance": lambda j: 1.0 if j % 2 else 3.0, "temperature": 0.7, "top_k": 40, "top_p": 0.9},
    "short": {"length": 3, "guidance": 2.0},
    "greedy": {"temperature": 0.0},
    "seeds": {"seeds": [4, 5, 6], "length": [5, 1, 8]},
}
whole = pytest.mark.skipif(not int8_works(), reason="no whole numbers here")


def texts(b, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 1])[:b, None]
    return TextFeatures(torch.randn(b, 6, 24, generator=g) * mask[..., None], mask)


def made(kind):  # model, condition of three samples
    torch.manual_seed(0)
    model = randomize(ARModel(CONFIGS[kind])).eval()
    with torch.no_grad():
        model.head.weight.mul_(5)  # sure of something
    if kind != "text":
        return model, torch.tensor([0, 2, 3])  # 3: no class
    model.text.set_null(take(texts(4), [3]))
    return model, texts(3)


@pytest.fixture(params=CONFIGS)
def asked(request):
    return made(request.param)


@pytest.fixture(params=("small", "large"))
def size(request, monkeypatch):  # as if matrices were small, or large: then they are packed
    if request.param == "large":
        monkeypatch.setattr(products, "SMALL", 0)
        monkeypatch.setattr(flat_writing, "SMALL", 0)
    return request.param


def plainly(model, cond, **choice):  # by the modules
    model.flat.enabled = False
    ids = model.generate(cond, **choice)
    model.flat.enabled = True
    return ids


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else all(map(torch.equal, a, b))


@torch.no_grad()
def logits_of(write, cond, ids, guidance):  # (b k v), where these ids are written whatever they are
    seen = []
    write(cond, guidance, lambda j, logits: seen.append(logits.clone()) or ids[:, j])
    return torch.stack(seen, 1)


# --- the same numbers ------------------------


@pytest.mark.parametrize("choice", CHOICES)
def test_the_same_lists(asked, size, choice):
    model, cond = asked
    assert equal(model.generate(cond, **CHOICES[choice]), plainly(model, cond, **CHOICES[choice]))
    assert model.flat.made, "it was written flat"
    kinds = {type(p) for _, w in model.flat.made.values() for b in w.blocks for p in (b.qkv, b.out, b.down)}
    assert kinds == ({Packed} if size == "large" and torch.backends.mkl.is_available() else {Transposed})


@pytest.mark.parametrize(
    "guidance", ([1.0] * 8, [2.5, 1.0, 0.0, -1.0, 3.0, 1.0, 1.0, 7.0]), ids=("plain", "guided")
)
def test_the_same_logits(asked, size, guidance):
    model, cond = asked
    ids = torch.randint(1000, (3, 8))
    flat = logits_of(partial(model.flat.write, model), cond, ids, guidance)
    module = logits_of(model.write, cond, ids, guidance)
    assert module.std() > 1
    torch.testing.assert_close(flat, module, rtol=1e-5, atol=1e-5 * float(module.abs().max()))


@pytest.mark.parametrize("j", (1, 7, 8))
@pytest.mark.parametrize("quantize", (None, pytest.param("int8", marks=whole)))
def test_a_list_can_be_continued(asked, size, j, quantize):
    model, cond = asked
    ids = model.generate(cond, guidance=2.0, quantize=quantize)
    model.flat.clear()  # its memory remembers them
    assert torch.equal(model.generate(cond, guidance=2.0, prefix=ids[:, :j], quantize=quantize), ids)
    other = model.generate(cond, guidance=2.0, prefix=(ids[:, :j] + 1) % 1000, quantize=quantize)
    assert torch.equal(other[:, :j], (ids[:, :j] + 1) % 1000) and (j == 8 or not torch.equal(other, ids))


def test_batches_of_any_size_in_turn(asked):
    model, cond = asked
    for rows in ([0], [0, 1, 2], [2, 1], [0]):
        for g in (1.0, 2.0):
            part = take(cond, rows)
            assert torch.equal(model.generate(part, guidance=g), plainly(model, part, guidance=g))


def test_a_text_of_which_nothing_counts(size):
    model, cond = made("text")
    mask = cond.mask.clone()
    mask[1] = False
    cond = TextFeatures(cond.features, mask)
    ids = model.generate(cond)
    assert torch.equal(ids[[0, 2]], plainly(model, cond)[[0, 2]])
    assert torch.equal(ids, plainly(model, cond)) or torch.__version__ < "2.5"  # (before, attention gave NaN)


def test_inference_mode_leaves_no_trace(asked):
    model, cond = asked
    with torch.inference_mode():
        inside = model.generate(cond, guidance=2.0)
    outside = model.generate(cond, guidance=2.0)
    assert torch.equal(inside, outside) and not outside.is_inference()
    model(outside, cond).sum().backward()


# --- weights ------------------------


def in_place(model):
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[3] += 5


def by_an_optimizer(model):
    model.train()
    cond = torch.tensor([0, 2, 3])
    model.loss(torch.randint(1000, (3, 8)), cond)[0].backward()
    torch.optim.SGD(model.parameters(), 3.0).step()
    model.eval()


def loaded(model):
    model.load_state_dict({n: torch.randn_like(w) * 0.3 for n, w in model.state_dict().items()})


def replaced(model):
    model.norm.weight = nn.Parameter(torch.linspace(-1, 1, 128))


@pytest.mark.parametrize("change", (in_place, by_an_optimizer, loaded, replaced), ids=lambda f: f.__name__)
def test_changed_weights_are_noticed(change):
    model, cond = made("class")
    before = model.generate(cond)
    change(model)
    after = model.generate(cond)
    assert torch.equal(after, plainly(model, cond)) and not torch.equal(after, before)
    assert len(model.flat.made) == 1


def test_memory_comes_back(monkeypatch):
    model, cond = made("class")
    model.generate(cond)
    held = [weakref.ref(x) for _, x in model.flat.made.values()] + [
        weakref.ref(x) for x in model.flat.sheets.values()
    ]
    assert len(held) == 2
    model.flat.clear()
    gc.collect()
    assert not any(x() for x in held)
    model.generate(cond.repeat(1500))
    assert not model.flat.sheets, "caches of large batches are large"


def test_weights_are_taken_out_once(size, monkeypatch):
    """A search goes back and forth between numbers of rows; only packed weights depend on them."""
    model, cond = made("class")
    times, real = [], flat_writing._Weights
    monkeypatch.setattr(flat_writing, "_Weights", lambda *given: times.append(1) or real(*given))
    for _ in range(3):
        for b, g in ((1, 1.0), (2, 1.0), (2, 2.0)):
            model.generate(cond[:b], 2, guidance=g)
    assert len(times) == len(model.flat.made) == (1 if size == "small" else 3)
    assert len(model.flat.sheets) == 3
    for b in range(1, 9):
        model.generate(cond[:1].expand(b), 2)
    assert len(model.flat.made) == (1 if size == "small" else 4)
    monkeypatch.setattr(flat_writing, "LARGE", 0)
    model.flat.least = 2
    model.generate(cond[:1].expand(9), 2)
    assert len(model.flat.made) == 1, "of a large model there is one copy"


def test_copies_have_weights_of_their_own():
    model, cond = made("class")
    model.flat.quantize = "int8"
    model.generate(cond)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not other.flat.made and not other.flat.sheets and other.flat.quantize == "int8"
        other.flat.quantize = None
        with torch.no_grad():
            other.head.weight.neg_()
        assert torch.equal(other.generate(cond), plainly(other, cond))


# --- where it is not used ------------------------


class Other(ARBlock):
    """A block that somebody has changed."""


def another_block(model):
    model.blocks[1] = Other(128, 32)


def bias(model):
    model.blocks[0].attention.out = nn.Linear(128, 128)


def another_norm(model):
    model.blocks[0].norm2 = nn.LayerNorm(128)


def hook(model):
    model.blocks[0].mlp.register_forward_hook(lambda m, x, y: 2 * y)


def one_forward(model):
    model.head.forward = lambda x: torch.zeros(len(x), 1000)


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.up)


def more_precise(model):
    model.double()


def of_inference(model):
    with torch.inference_mode():
        model.load_state_dict({n: w + 1 for n, w in model.state_dict().items()}, assign=True)


OTHERS = (another_block, bias, another_norm, hook, one_forward, parametrized, more_precise, of_inference)


@pytest.mark.parametrize("change", OTHERS, ids=lambda f: f.__name__)
def test_what_is_not_known_is_left_to_the_modules(change):
    model, cond = made("class")
    with torch.no_grad():
        assert model.flat.usable(model)
        change(model)
        assert not model.flat.usable(model)
    model.generate(cond)
    assert not model.flat.made


def test_when_it_is_not_used():
    model, cond = made("class")
    assert not model.flat.usable(model), "gradients are wanted"
    with torch.no_grad():
        assert model.flat.usable(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert not model.flat.usable(model)
        assert not FlatWriter(enabled=False).usable(model)
        assert not model.flat.usable(copy.deepcopy(model).to("meta"))
        large = ARModel(replace(WIDE, vocabulary=64_000))
        assert not large.flat.usable(large, 3) and large.flat.usable(large, 64)
        assert large.flat.usable(large, 3, "int8"), "what is written does not depend on how much is written"
        large.generate(cond[:1], 2)
        assert not large.flat.made


# --- whole numbers ------------------------


@whole
def test_whole_numbers_are_near(asked):
    model, cond = asked
    ids, guidance = torch.randint(1000, (3, 8)), [1.0] * 8
    near = logits_of(partial(model.flat.write, model, quantize="int8"), cond, ids, guidance)
    true = logits_of(model.write, cond, ids, guidance)
    assert 1e-4 < float((near - true).abs().mean() / true.std()) < 0.05


@whole
def test_whole_numbers_do_not_look_at_their_neighbours(asked):
    model, cond = asked
    together = model.generate(cond, guidance=2.0, quantize="int8")
    for i in range(3):
        alone = model.generate(take(cond, [i]), guidance=2.0, quantize="int8", first_index=i)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("kind", (RuntimeError, AttributeError))
def test_without_whole_numbers_float32_is_used_and_said_once(kind, monkeypatch, capsys):
    model, cond = made("class")

    def refuse(*given):
        raise kind("there is no such operation")

    monkeypatch.setattr(torch, "_make_per_channel_quantized_tensor", refuse)
    monkeypatch.setattr(products, "_works", [])
    assert torch.equal(model.generate(cond, quantize="int8"), plainly(model, cond))
    model.generate(cond, quantize="int8")
    assert capsys.readouterr().out.count("int8 does not work here, and float32 is used instead") == 1


def test_a_wrong_product_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(products, "_works", [])
    monkeypatch.setattr(Int8, "__call__", lambda self, x: x * 0)
    assert not int8_works() and "the product is wrong" in capsys.readouterr().out


def test_whole_numbers_where_they_cannot_be(monkeypatch, capsys):
    model, cond = made("class")
    monkeypatch.setattr(flat_writing, "_said", set())
    hook(model)
    assert torch.equal(model.generate(cond, quantize="int8"), plainly(model, cond))
    assert capsys.readouterr().out.count("not used here") == 1
    with pytest.raises(ValueError, match="quantize must be None or 'int8', not 'int4'"):
        model.generate(cond, quantize="int4")


def test_without_mkl_matrices_lie_transposed(monkeypatch):
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(Packed, "__init__", lambda self, w, rows: torch.ops.mkl.there_is_no_such_operation(w))
    assert isinstance(products.product(torch.randn(8, 4), 2), Transposed)


# --- bugs ------------------------


def lists_are_the_same():
    for kind in CONFIGS:
        model, cond = made(kind)
        for choice in ("plain", "scheduled"):
            assert torch.equal(
                model.generate(cond, **CHOICES[choice]), plainly(model, cond, **CHOICES[choice])
            )


def continued_is_the_same():
    model, cond = made("class")
    ids = model.generate(cond)
    model.flat.clear()  # its memory remembers them
    assert torch.equal(model.generate(cond, prefix=ids[:, :3]), ids)


def change_is_noticed():
    test_changed_weights_are_noticed(in_place)


def one_position_is_hidden(monkeypatch):
    def at(self, position, real=_Sheet.at):
        return [
            (k, v, keys[:, :, :-1], values[:, :-1]) if position else (k, v, keys, values)
            for k, v, keys, values in real(self, position)
        ]

    monkeypatch.setattr(_Sheet, "at", at)


def text_is_not_hidden(monkeypatch):
    def read(self, seen, real=_Sheet.read):
        real(self, seen and [(k, v, torch.ones_like(mask)) for k, v, mask in seen])

    monkeypatch.setattr(_Sheet, "read", read)


def norms_are_forgotten(monkeypatch):
    def of(block, rows, whole, real=flat_writing._Block.of):
        block = copy.deepcopy(block)
        nn.init.ones_(block.norm2.weight)
        return real(block, rows, whole)

    monkeypatch.setattr(flat_writing._Block, "of", of)


def unguided_rows_get_nothing(monkeypatch):
    def place(model, s, token, position, real=flat_writing._place):
        before = s.x.clone()
        real(model, s, token, position)
        s.x[len(token) :] = before[len(token) :]

    monkeypatch.setattr(flat_writing, "_place", place)


def slots_keep_nothing(monkeypatch):
    monkeypatch.setattr(
        flat_writing._Slots,
        "add",
        lambda self, k, v, position: (k, v, torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).tril()),
    )


def weights_stay(monkeypatch):
    monkeypatch.setattr(flat_writing, "held_by", lambda model: [])


test_flat_code, test_flat_bugs = planted(
    [
        (lists_are_the_same, one_position_is_hidden),
        (lists_are_the_same, text_is_not_hidden),
        (lists_are_the_same, norms_are_forgotten),
        (lists_are_the_same, unguided_rows_get_nothing),
        (continued_is_the_same, slots_keep_nothing),
        (change_is_noticed, weights_stay),
    ]
)

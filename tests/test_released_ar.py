"""Released autoregressive models: the numbers they give, what is refused, and the way back.

The fixtures are complete checkpoints of random numbers with the reference implementation's own results
(tests/fixtures/README_AR.md). For what they do not use there is a second implementation below, in the names
of the files.
"""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from planting import patch, planted, randomize
from safetensors.torch import load_file, save_file
from test_graphs import NoTraffic, listed, on_the_gpu

from flextok_edu.ar import ARModel, cached_logits, load_ar, save_ar
from flextok_edu.engine.compiler import compiled, compiler_works
from flextok_edu.engine.conditions import TextFeatures, join, take
from flextok_edu.engine.config import ARConfig
from flextok_edu.engine.settings import ARStyle, TextConfig
from flextok_edu.engine.writing import Writer, _Sheet, _step
from flextok_edu.io import ar_styles
from flextok_edu.io.ar_export import save_released_ar
from flextok_edu.io.ar_layout import plain_style, read_ar_config, read_ar_description
from flextok_edu.io.ar_styles import rotated
from flextok_edu.io.released_ar import load_released_ar
from flextok_edu.io.yaml_files import parse_yaml, resolve
from flextok_edu.sampling import TokenSampling, filter_top_k_top_p

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("class", "text", "grid")
CLOSE = 2e-5  # largest difference in float32; asked for is 1e-4
GPU = torch.cuda.is_available()


def place(name):
    return FIXTURES / f"released_ar_{name}"


def description(name="class"):
    return yaml.safe_load((place(name) / "config.yaml").read_text())


def conditions(ar, io):
    """The condition, and none."""
    if ar.text is None:
        return io["class_ids"], torch.full_like(io["class_ids"], ar.config.classes)
    cond = TextFeatures(io["text_features"], io["text_mask"].bool())
    ar.text.set_null(TextFeatures(io["null_features"], io["null_mask"].bool()))
    return cond, ar.condition.without(cond)


def opened(name, device="cpu"):
    ar = load_released_ar(place(name), device)
    io = {n: w.to(device) for n, w in load_file(place(name) / "io.safetensors").items()}
    return ar, io, *conditions(ar, io)


@pytest.fixture(scope="module", params=NAMES)
def case(request):
    return opened(request.param)


def off(a, b):
    return float((a - b).abs().max())


# --- the numbers ------------------------


@torch.no_grad()
def states(ar, ids, cond):
    """Logits, what block 0 receives, what block 1 gives."""
    seen = {}
    hooks = [
        ar.blocks[0].register_forward_pre_hook(lambda m, given: seen.update(first=given[0])),
        ar.blocks[1].register_forward_hook(lambda m, given, out: seen.update(second=out)),
    ]
    logits = ar(ids, cond)
    for hook in hooks:
        hook.remove()
    return logits, seen["first"], seen["second"]


def test_logits_and_states(case):
    ar, io, cond, none = case
    logits, first, second = states(ar, io["token_ids"], cond)
    assert off(logits, io["logits_cond"]) < CLOSE
    assert off(first, io["input_embeddings"]) < 1e-6
    assert off(second, io["hidden_block1"]) < CLOSE
    assert off(states(ar, io["token_ids"], none)[0], io["logits_uncond"]) < CLOSE


@torch.no_grad()
def test_the_projected_text(case):
    ar, io, cond, none = case
    if ar.text is None:
        assert ar.condition.read(cond) is None
        return
    assert off(ar.text.read(cond)[0], io["text_projected"]) < 1e-6
    null = TextFeatures(io["null_features"], io["null_mask"].bool())
    assert off(ar.text.read(null)[0], io["null_projected"]) < 1e-6
    real = null.mask[0]  # what stands in its padding is not kept
    assert off(ar.text.read(none)[0][0, real], io["null_projected"][0, real]) < 1e-6


def test_what_stands_in_padding_does_not_count(case):
    ar, io, cond, none = case
    if ar.text is None:
        return
    odd = torch.where(cond.mask[..., None], cond.features, 100.0)
    with torch.no_grad():
        assert off(ar(io["token_ids"], TextFeatures(odd, cond.mask)), io["logits_cond"]) < CLOSE


@torch.no_grad()
def test_with_a_cache(case):
    ar, io, cond, none = case
    for name, c in (("logits_cond", cond), ("logits_uncond", none)):
        assert off(cached_logits(ar, io["token_ids"], c), io[name]) < CLOSE


@torch.no_grad()
def test_one_at_a_time(case):
    ar, io, cond, none = case
    for i in range(3):
        assert off(ar(io["token_ids"][[i]], take(cond, [i])), io["logits_cond"][[i]]) < CLOSE


def sampled(ar, io, cond, s, steps=8, none_at=None):
    """Ids with the given uniform numbers, and the log-probability of each list.

    `none_at`: step -> the null condition of the released code at that step.
    """
    total, chance, g = torch.zeros(len(io["token_ids"]), 1), io["uniforms"], s.guidance

    def pick(j, logits):
        if none_at is not None:
            # not `write`'s own unconditional half: the same list under another "none"
            ids = torch.stack(written, 1) if written else torch.zeros(len(logits), 0, dtype=torch.int64)
            ids = torch.cat([ids, ids.new_zeros(len(ids), 1)], 1)
            c, u = ar(ids, cond)[:, -1], ar(ids, none_at(j))[:, -1]
            logits = u + g * (c - u)
        token = s.choose(logits, chance[:, j : j + 1])
        kept = filter_top_k_top_p(logits / (s.temperature or 1), s.top_k, s.top_p)
        total.add_(kept.log_softmax(-1).gather(-1, token[:, None]))
        written.append(token)
        return token

    written = []
    with torch.no_grad():
        ids = ar.write(cond, [g] * steps, pick)
    return ids, total


def ways(ar):
    g = ar.released.sampling.guidance
    return {
        "greedy": TokenSampling(1.5, temperature=0),
        "greedy_noguide": TokenSampling(temperature=0),
        "sample": TokenSampling(g),
        "sample_filtered": TokenSampling(g, 0.8, 50, 0.9),
    }


def named_tokens(way):
    return "greedy_tokens_noguide" if way == "greedy_noguide" else f"{way}_tokens"


@pytest.mark.parametrize("way", ("greedy", "greedy_noguide", "sample", "sample_filtered"))
def test_lists(case, way):
    ar, io, cond, none = case
    ids, total = sampled(ar, io, cond, ways(ar)[way])
    assert torch.equal(ids, io[named_tokens(way)])
    if f"{way}_logprob" in io:
        assert off(total, io[f"{way}_logprob"]) < 1e-4


def test_the_guidance_of_the_released_code():
    """Its null marks become class 0 after the first step: that is what its own lists are guided by. Ours are
    guided by no class at every step, as the paper says.
    """
    ar, io, cond, none = opened("class")
    for way in ("greedy", "sample", "sample_filtered"):
        ids, total = sampled(
            ar, io, cond, ways(ar)[way], none_at=lambda j: none if j == 0 else torch.zeros_like(none)
        )
        assert torch.equal(ids, io[f"{way}_tokens_as_released"])
        assert off(total, io[f"{way}_logprob_as_released"]) < 1e-4
        assert not torch.equal(ids, io[f"{way}_tokens"]), "it makes a difference"


def test_recorded(case):
    """The same lists from one recorded step, replayed."""
    ar, io, cond, none = case
    ar = copy.deepcopy(ar)
    ar.writer = Writer(listed())
    chance = F.pad(io["uniforms"], (0, ar.config.length - 8), value=0.5)
    for way, s in ways(ar).items():
        found = ar.writer.write(ar, cond, [s.guidance] * 8, s, chance)
        assert torch.equal(found, io[named_tokens(way)]), way
    assert ar.writer.graphs.recordings and not ar.writer.graphs.refused


def test_from_the_door(case):
    """`generate`, batch or not, continued or not."""
    ar, io, cond, none = case
    ids = ar.generate(cond, 8, ar.released.sampling, seed=3)
    assert torch.equal(ar.generate(cond, 8, ar.released.sampling, seed=3, prefix=ids[:, :4]), ids)
    alone = ar.generate(take(cond, [2]), 8, ar.released.sampling, seed=3, first_index=2)
    assert torch.equal(alone, ids[2:])


@torch.no_grad()
def test_half_precision(case):
    ar, io, cond, none = case
    with torch.autocast("cpu", torch.bfloat16):
        logits = ar(io["token_ids"], cond).float()
        step = cached_logits(ar, io["token_ids"], cond).float()
    scale = io["logits_cond"].std()
    assert off(logits, io["logits_cond"]) < 0.1 * scale and off(step, io["logits_cond"]) < 0.1 * scale
    half = copy.deepcopy(ar).bfloat16()
    if ar.text is not None:
        cond = TextFeatures(cond.features.bfloat16(), cond.mask)
    assert half(io["token_ids"], cond).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_compiled(device):
    if device == "cuda" and not GPU or not compiler_works(device):
        pytest.skip("no compiler")
    for name in NAMES:
        ar, io, cond, none = opened(name, device)
        torch._dynamo.reset()
        with compiled(ar.blocks):
            assert off(ar(io["token_ids"], cond), io["logits_cond"]) < 1e-4


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name):
    ar, io, cond, none = opened(name, "cuda")
    with torch.no_grad():
        assert off(ar(io["token_ids"], cond), io["logits_cond"]) < 1e-4
        assert off(cached_logits(ar, io["token_ids"], none), io["logits_uncond"]) < 1e-4
    chance = F.pad(io["uniforms"], (0, ar.config.length - 8), value=0.5)
    for way, s in ways(ar).items():
        for _ in range(3):
            found = ar.writer.write(ar, cond, [s.guidance] * 8, s, chance)
        assert torch.equal(found, io[named_tokens(way)]), way
    assert any(r.replay for r in ar.writer.graphs.recordings.values()) and not ar.writer.graphs.refused


# --- what no fixture uses: a second implementation, by their names ------------------------


def norm(w, name, x, p):
    """LayerNorm or RMSNorm as `p` says."""
    weight, bias = w.get(f"{name}.weight"), w.get(f"{name}.bias")
    if p["_target_"].endswith("RMSNorm"):
        return x / (x.square().mean(-1, keepdim=True) + float(p.get("eps", 1e-6))).sqrt() * weight
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + float(p.get("eps", 1e-5))).sqrt()
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def linear(w, name, x):
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def turned(x, theta):
    """Each pair of channels as one complex number."""
    m, e = x.shape[-2:]
    z = torch.complex(x[..., : e // 2], x[..., e // 2 :])
    speed = torch.tensor([theta ** (-2 * k / e) for k in range(e // 2)], dtype=x.dtype)
    z = z * torch.exp(1j * torch.arange(m, dtype=x.dtype)[:, None] * speed)
    return torch.cat([z.real, z.imag], -1)


def attend(q, k, v, scale, hidden):
    score = (q @ k.transpose(-1, -2) * scale).masked_fill(hidden, -torch.inf)
    return (score.softmax(-1) @ v).transpose(1, 2).flatten(2)


def heads(x, n):
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def self_attention(w, name, x, p):
    n, d = p["num_heads"], p["dim"]
    merged = p["_target_"].endswith("EfficientAttention")
    kv, e = (p.get("num_kv_heads") or n), (p.get("head_dim") or d // n)
    if merged:
        q, k, v = linear(w, f"{name}.qkv", x).chunk(3, -1)
    else:
        q, k, v = (linear(w, f"{name}.{a}_proj", x) for a in "qkv")
    q, k, v = heads(q, n), heads(k, kv), heads(v, kv)
    if "qk_norm" in p:
        q, k = norm(w, f"{name}.q_norm", q, p["qk_norm"]), norm(w, f"{name}.k_norm", k, p["qk_norm"])
    if rope := p.get("rope_pos_embed") or p.get("rope"):
        q, k = turned(q, rope.get("theta", 10_000.0)), turned(k, rope.get("theta", 10_000.0))
    k, v = (torch.stack([y[:, i // (n // kv)] for i in range(n)], 1) for y in (k, v))
    scale = p.get("qk_scale") if merged and p.get("qk_scale") else e**-0.5
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    return linear(w, f"{name}.proj", attend(q, k, v, scale, future))


def cross_attention(w, name, x, text, mask, p):
    n = p["num_heads"]
    q, k, v = (heads(linear(w, f"{name}.W{a}", y), n) for a, y in zip("qkv", (x, text, text)))
    if "qk_norm" in p:
        q, k = norm(w, f"{name}.q_norm", q, p["qk_norm"]), norm(w, f"{name}.k_norm", k, p["qk_norm"])
    return linear(w, f"{name}.proj", attend(q, k, v, (p["dim"] // n) ** -0.5, ~mask[:, None, None]))


def mlp(w, name, x, t, by_text):
    kind = t.get("ffn_target", {"_target_": "MLP"})["_target_"].rpartition(".")[2]
    a = linear(w, f"{name}.fc1", x)
    if kind == "MLP":
        tanh = not by_text and t.get("act_layer", {}).get("approximate") == "tanh"
        return linear(w, f"{name}.fc2", F.gelu(a, approximate="tanh" if tanh else "none"))
    act = F.silu if kind == "SwiGLUFFN" else F.gelu
    return linear(w, f"{name}.fc2", act(a) * linear(w, f"{name}.fc3", x))


def reference(told, w, ids, cond):
    """Logits, from the description and the tensors alone, in double precision."""
    models = told["model"]["meta_model"]["models"]
    m, text = models["ar_image_model"], models.get("text_encoder")
    t, usual = m["trunk"], {"_target_": "LayerNorm", "eps": 1e-6}
    w = {n.removeprefix("models.ar_image_model."): x.double() for n, x in w.items()}
    x = torch.cat(
        [
            w["preprocessor.sos_token_embed"].expand(len(ids), 1, -1),
            w["preprocessor.embedding.weight"][ids[:, :-1]],
        ],
        1,
    )
    if m["preprocessor"].get("pos_embed_type"):
        x = x + w["preprocessor.positional_embedding"]
    if text is None:
        x[:, 0] += w["preprocessor.cls_embedding.weight"][cond]
    else:
        act, name = text["mlp"]["act_layer"], "models.text_encoder.mlp"
        f = {
            "GELU": lambda y: F.gelu(y, approximate=act.get("approximate", "none")),
            "SiLU": F.silu,
            "ReLU": F.relu,
        }
        y = f[act["_target_"].rpartition(".")[2]](linear(w, f"{name}.fc1", cond.features.double()))
        projected = linear(w, f"{name}.fc2", y)
    p = t.get("norm_layer", usual)
    for i in range(t["num_blocks"]):
        b = f"trunk.blocks.{i}."
        if text is None:
            x = x + self_attention(w, f"{b}attn", norm(w, f"{b}norm_1", x, p), t["attn_target"])
        else:
            x = x + self_attention(w, f"{b}self_attn", norm(w, f"{b}norm_1", x, p), t["self_attn_target"])
            y = norm(w, f"{b}norm_2", x, p)
            x = x + cross_attention(w, f"{b}cross_attn", y, projected, cond.mask, t["cross_attn_target"])
        x = x + mlp(w, f"{b}mlp", norm(w, f"{b}norm_{3 if text else 2}", x, p), t, text is not None)
    if t.get("post_trunk_norm"):
        x = norm(w, "trunk.post_trunk_norm", x, p)
    if m["head"].get("use_layernorm"):
        x = norm(w, "head.norm", x, {"_target_": "LayerNorm"})
    return linear(w, "head.linear", x)


IDS = torch.arange(3 * 9).view(3, 9) * 7 % 50
CLASSES = torch.tensor([2, 0, 1])
TEXT = TextFeatures(
    torch.randn(3, 6, 10, generator=torch.Generator().manual_seed(1)),
    torch.arange(6) < torch.tensor([[6], [3], [1]]),
)
BASE = ARStyle(hidden=40, text_hidden=10)
STYLES = {
    "plain": BASE,
    "rope": replace(BASE, rope=100.0, positions="none", scale=0.3),
    "fewer key heads": replace(BASE, kv_heads=1, qkv_bias=True, norm="layer", norm_eps=1e-5, norm_bias=True),
    "key heads, turned": replace(BASE, kv_heads=2, rope=50.0, qk_norm="layer", qk_eps=1e-5),
    "narrow heads": replace(BASE, heads=2, kv_heads=2),
    "geglu": replace(BASE, mlp="geglu", hidden=41, bias=True, head_bias=True, head_norm=True),
    "gelu": replace(BASE, mlp="gelu", final_norm=False, norm="layer", norm_weight=False, norm_bias=False),
    "gelu_tanh": replace(BASE, mlp="gelu_tanh", positions="fixed", norm="layer", norm_bias=False),
    "text": replace(BASE, cross_qk_norm="rms", cross_heads=2, text_act="relu", text_bias=True),
    "text, norms": replace(
        BASE, qk_norm="layer", cross_qkv_bias=True, text_act="silu", rope=10_000.0, scale=0.2
    ),
    "text, plain": replace(BASE, mlp="gelu", bias=True, text_act="gelu"),
}


def config(name):
    by_text = name.startswith("text")
    return ARConfig(
        50,
        9,
        0 if by_text else 3,
        32,
        2,
        8,
        null=None if by_text else "nothing",
        text=TextConfig("t5", width=10, length=6) if by_text else None,
        style=STYLES[name],
    )


def random_model(name):
    ar = randomize(ARModel(config(name))).eval()
    if STYLES[name].positions == "none":
        torch.nn.init.zeros_(ar.positions)
    if ar.text is not None:
        ar.text.set_null(TextFeatures(torch.ones(1, 2, 10), torch.ones(1, 2, dtype=torch.bool)))
    return ar


@torch.no_grad()
@pytest.mark.parametrize("name", STYLES)
def test_every_style(name, tmp_path, capsys):
    """Written, read, and computed by the second implementation from what was written."""
    ar, cond = random_model(name), TEXT if name.startswith("text") else CLASSES
    save_released_ar(tmp_path, ar)
    back = load_released_ar(tmp_path)
    if back.text is not None:
        back.text.set_null(TextFeatures(torch.ones(1, 2, 10), torch.ones(1, 2, dtype=torch.bool)))
    style = back.config.style or plain_style(back.config)
    assert style == (ar.config.style if ar.text is not None else replace(ar.config.style, text_hidden=2048))
    assert torch.equal(ar(IDS, cond), back(IDS, cond))
    told, weights = (
        yaml.safe_load((tmp_path / "config.yaml").read_text()),
        load_file(tmp_path / "model.safetensors"),
    )
    expected = reference(told, weights, IDS, cond)
    assert off(ar(IDS, cond), expected) < 1e-4 * expected.std()
    assert off(cached_logits(ar, IDS, cond), expected) < 1e-4 * expected.std()


@pytest.mark.parametrize("name", ("class", "text", "grid"))
def test_the_second_implementation(name):
    """It is right about what the fixtures say."""
    told, io = description(name), load_file(place(name) / "io.safetensors")
    told["model"] = resolve(told["model"], told, "x")
    cond = io["class_ids"] if name == "class" else TextFeatures(io["text_features"], io["text_mask"].bool())
    found = reference(told, load_file(place(name) / "model.safetensors"), io["token_ids"], cond)
    assert off(found, io["logits_cond"]) < CLOSE


@pytest.mark.parametrize("name", STYLES)
def test_every_style_recorded(name):
    ar, cond = random_model(name), TEXT if name.startswith("text") else CLASSES
    plain = [ar.generate(cond, seed=s, guidance=2.0) for s in range(3)]
    ar.writer = Writer(listed())
    assert all(torch.equal(ar.generate(cond, seed=s, guidance=2.0), plain[s]) for s in range(3))
    assert ar.writer.graphs.recordings and not ar.writer.graphs.refused


@pytest.mark.parametrize("name", ("key heads, turned", "text, norms", "geglu"))
def test_every_style_stays_on_the_gpu(name):
    model, by_text = random_model(name), name.startswith("text")

    def work(new):
        if by_text:
            cond = TextFeatures(new(2, 6, 10), new(2, 6, dtype=torch.bool))
        else:
            cond = new(2, dtype=torch.int64)
        sheet = _Sheet.of(model, 2, join(cond, model.condition.without(cond)))
        with NoTraffic():
            _step(model, sheet, TokenSampling().choose, new(1, dtype=torch.int64))
            assert model(new(2, 9, dtype=torch.int64), cond).device.type == "cuda"

    on_the_gpu(work, model)


@torch.no_grad()
@pytest.mark.parametrize("name", ("key heads, turned", "text, norms"))
def test_a_style_compiled(name):
    if not compiler_works():
        pytest.skip("no compiler")
    ar, cond = random_model(name), TEXT if name.startswith("text") else CLASSES
    plain = ar(IDS, cond)
    with compiled(ar.blocks):
        assert off(ar(IDS, cond), plain) < 1e-4 * plain.std()


@pytest.mark.parametrize("name", STYLES)
def test_a_style_is_kept_in_our_own_files(name, tmp_path):
    ar, cond = random_model(name), TEXT if name.startswith("text") else CLASSES
    save_ar(tmp_path, ar)
    back = load_ar(tmp_path)[0]
    assert back.config == ar.config
    with torch.no_grad():
        assert torch.equal(back(IDS, cond), ar(IDS, cond))


def test_a_style_can_be_trained():
    for name in STYLES:
        ar = ARModel(config(name))
        if ar.text is not None:
            ar.text.set_null(TextFeatures(torch.ones(1, 2, 10), torch.ones(1, 2, dtype=torch.bool)))
        loss, _ = ar.loss(IDS, TEXT if ar.text is not None else CLASSES)
        loss.backward()
        assert abs(float(loss.detach()) - 3.9) < 0.2, "ln 50: small at the beginning"
        assert all(w.grad is not None for w in ar.parameters())


# --- the way back ------------------------


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path, capsys):
    save_released_ar(tmp_path, load_released_ar(place(name)))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == description(name)
    before, after = (load_file(p / "model.safetensors") for p in (place(name), tmp_path))
    strays = {n for n in before if "image_tokenizer" in n or "t5_embedder" in n}
    assert after.keys() == before.keys() - strays and bool(strays) == (name == "grid")
    assert all(torch.equal(w, before[n]) for n, w in after.items())


@torch.no_grad()
def test_the_shipped_model_goes_out_and_comes_back(tmp_path, capsys):
    ar = ARModel.from_pretrained("tiny")
    save_released_ar(tmp_path, ar, tokenizer="owner/tiny")
    assert "learned null class" in capsys.readouterr().out
    back = load_released_ar(tmp_path)
    assert back.config == replace(ar.config, null="nothing") and back.released.tokenizer == "owner/tiny"
    ids = torch.randint(
        ar.config.vocabulary, (3, ar.config.length), generator=torch.Generator().manual_seed(0)
    )
    for cond in (torch.tensor([0, 3, 5]), torch.full((3,), ar.config.classes)):
        assert off(ar(ids, cond), back(ids, cond)) < 1e-4
    told, weights = (
        yaml.safe_load((tmp_path / "config.yaml").read_text()),
        load_file(tmp_path / "model.safetensors"),
    )
    assert off(reference(told, weights, ids, cond * 0), ar(ids, cond * 0)) < 1e-4


@torch.no_grad()
def test_a_text_model_of_ours_goes_out_and_comes_back(tmp_path, capsys):
    ar = randomize(ARModel(ARConfig(50, 9, 0, 32, 2, 8, text=TextConfig("t5", width=10, length=6)))).eval()
    ar.text.set_null(TextFeatures(torch.ones(1, 2, 10), torch.ones(1, 2, dtype=torch.bool)))
    save_released_ar(tmp_path, ar)
    assert "encoder=" in capsys.readouterr().out

    class Encoder:
        identity = "0" * 16

        def encode(self, texts):
            assert texts == [""]
            return TextFeatures(torch.ones(1, 2, 10), torch.ones(1, 2, dtype=torch.bool))

    back = load_released_ar(tmp_path, encoder=Encoder())
    assert back.config == replace(ar.config, text=replace(ar.config.text, identity="0" * 16))
    assert torch.equal(back(IDS, TEXT), ar(IDS, TEXT))
    save_released_ar(tmp_path / "again", back)
    assert load_released_ar(tmp_path / "again").config == ar.config, "who read it has no place there"
    assert torch.equal(ar.generate(TEXT, guidance=2.0), back.generate(TEXT, guidance=2.0))


def test_after_training_it_is_written_as_it_is_now(tmp_path, capsys):
    ar = load_released_ar(place("class"))
    with torch.no_grad():
        ar.blocks[1].attention.k.weight.mul_(2)
    save_released_ar(tmp_path, ar)
    before, after = (load_file(p / "model.safetensors") for p in (place("class"), tmp_path))
    assert [n for n in before if not torch.equal(before[n], after[n])] == [
        "models.ar_image_model.trunk.blocks.1.attn.qkv.weight"
    ]


@pytest.mark.parametrize(
    "change,what",
    [
        (dict(kv_heads=1, scale=0.5), "no place for this attention"),
        (dict(positions="none"), "would be lost"),
    ],
)
def test_what_the_layout_cannot_say(change, what, tmp_path):
    ar = randomize(ARModel(replace(config("plain"), style=replace(BASE, **change))))
    with pytest.raises(ValueError, match=what):
        save_released_ar(tmp_path, ar)
    assert not list(tmp_path.iterdir()), "nothing half written"


# --- what is refused ------------------------

TRUNK = "ar_image_model.trunk"
CHANGES = [  # fixture, path into the models, new value (None: left out), what the error says
    ("class", f"{TRUNK}.layer_scale", 0.1, r"unknown option 'layer_scale' = 0\.1"),
    ("class", f"{TRUNK}.attn_target.window", 4, "unknown option 'window'"),
    (
        "class",
        f"{TRUNK}.attn_target._target_",
        "l3m.Mamba",
        "unknown _target_ 'l3m.Mamba'.*expected Efficient",
    ),
    ("class", f"{TRUNK}.attn_target.is_causal", False, "'is_causal' is False; it must be True"),
    ("class", f"{TRUNK}.attn_target.is_causal", None, "'is_causal' is missing"),
    ("class", f"{TRUNK}.attn_target.dim", 64, "the width differs"),
    ("class", f"{TRUNK}.attn_target.num_heads", 3, "3 heads do not divide width 128"),
    ("class", f"{TRUNK}.attn_target.num_heads", "2", "'num_heads' is '2'; it must be a whole number"),
    ("class", f"{TRUNK}.attn_target.rope_pos_embed", {"_target_": "x.Alibi"}, "unknown _target_ 'x.Alibi'"),
    ("class", f"{TRUNK}.attn_target.rope_pos_embed", {"_target_": "x.Rotary", "xpos": 1}, "option 'xpos'"),
    ("class", f"{TRUNK}.attn_target.qk_norm", {"_target_": "x.L2Norm"}, "unknown _target_ 'x.L2Norm'"),
    ("class", f"{TRUNK}.ffn_target._target_", "l3m.model.layers.moe.MoE", "unknown _target_ .*MoE"),
    ("class", f"{TRUNK}.ffn_target.multiple_of", 0, "'multiple_of' is 0"),
    ("class", f"{TRUNK}.norm_layer._target_", "torch.nn.RMSNorm", "surplus|eps"),
    ("class", f"{TRUNK}.norm_layer.eps", "small", "'eps' is 'small'; it must be a number"),
    ("class", f"{TRUNK}.norm_layer.momentum", 0.1, "unknown option 'momentum'"),
    ("class", f"{TRUNK}.num_blocks", 4, "missing tensors .*blocks.3"),
    ("class", f"{TRUNK}.num_blocks", 2, "surplus tensors .*blocks.2"),
    ("class", f"{TRUNK}.num_blocks", 10**9, "'num_blocks' is 1000000000"),
    ("class", f"{TRUNK}.mlp_ratio", 3, "fc1.weight' has shape .512, 128."),
    ("class", f"{TRUNK}.use_bias", True, "missing tensors"),
    ("class", f"{TRUNK}.post_trunk_norm", False, "surplus tensors"),
    ("class", f"{TRUNK}.embed_dim", None, "option 'embed_dim' is missing"),
    (
        "class",
        f"{TRUNK}._target_",
        "l3m.model.trunks.transformer_decoder.TransformerDecoder",
        "expected Transformer",
    ),
    ("class", "ar_image_model.head.out_features", 999, "the vocabulary differs"),
    ("class", "ar_image_model.head.tied", True, "unknown option 'tied'"),
    ("class", "ar_image_model.postprocessor._target_", "x.Select", "unknown _target_ 'x.Select'"),
    ("class", "ar_image_model.preprocessor.pos_embed_type", "rotary", "'pos_embed_type' is 'rotary'"),
    ("class", "ar_image_model.preprocessor.pos_embed_type", None, "surplus tensors .*positional"),
    ("class", "ar_image_model.preprocessor.token_grid_size", [8, 1], "the grid of tokens differs"),
    ("class", "ar_image_model.preprocessor.num_classes", None, "asked by class or by text"),
    ("class", "ar_image_model.preprocessor.num_classes", 6, "shape .5, 128.*says .6, 128"),
    ("class", "ar_image_model.extra", {"_target_": "x.Y"}, "unknown option 'extra'"),
    ("class", "vision_encoder", {"_target_": "x.Y"}, "unknown model 'vision_encoder'"),
    ("class", "ar_image_model", None, "'ar_image_model' is missing"),
    ("class", "image_tokenizer.quantizer", "lfq", "unknown option 'quantizer'"),
    ("text", "text_encoder.mlp.act_layer", None, "'act_layer' is missing"),
    ("text", "text_encoder.mlp.act_layer._target_", "torch.nn.Tanh", "unknown _target_ 'torch.nn.Tanh'"),
    ("text", "text_encoder.mlp.text_dim", 40, "shape .48, 48."),
    ("text", "text_encoder.t5_embedder.decoder_seqlen", 16, "the number of tokens differs"),
    ("text", "text_encoder.t5_embedder.pooling", "mean", "unknown option 'pooling'"),
    ("text", "text_encoder", None, "asked by class or by text"),
    ("text", f"{TRUNK}.cross_attn_target.encoder_dim", 48, "the width differs"),
    ("text", f"{TRUNK}.self_attn_target._target_", "l3m.GenericAttention", "expected EfficientAttention"),
    ("text", f"{TRUNK}.num_blocks", "${constants.depth}", "leads nowhere"),
    ("text", f"{TRUNK}.num_blocks", "${env:HOME}", "is no path"),
    (
        "text",
        f"{TRUNK}.num_blocks",
        "${model.meta_model.models.ar_image_model.trunk.num_blocks}",
        "leads to itself",
    ),
]


def changed(told, path, value):
    told = copy.deepcopy(told)
    *way, last = f"model.meta_model.models.{path}".split(".")
    at = told
    for key in way:
        at = at[key]
    at.pop(last, None)
    if value is not None:
        at[last] = value
    return told


def written(folder, told, name):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    (folder / "model.safetensors").write_bytes((place(name) / "model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize("name,path,value,says", CHANGES)
def test_what_is_refused(name, path, value, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        load_released_ar(written(tmp_path, changed(description(name), path, value), name))


HARMLESS = [
    (f"{TRUNK}.weight_init_style", "other"),
    (f"{TRUNK}.attn_target.attn_dropout", 0.5),
    (f"{TRUNK}.read_key", "other"),
    (f"{TRUNK}._target_", "elsewhere.Transformer"),
    (f"{TRUNK}.attn_target.qk_scale", 0.125),  # 64 ** -0.5
    (f"{TRUNK}.act_layer", {"_target_": "torch.nn.GELU", "_partial_": True}),  # of no gated MLP
    ("ar_image_model.head.encoder_num_blocks", 3),
    ("image_tokenizer", None),
    (f"{TRUNK}.norm_layer._target_", "torch.nn.LayerNorm"),
    (f"{TRUNK}.mlp_hidden_dim", 512),
]


@torch.no_grad()
@pytest.mark.parametrize("path,value", HARMLESS)
def test_what_changes_nothing(path, value, tmp_path):
    told = changed(description("class"), path, value) | {
        "wandb": {"a": "${no.such}"},
        "optim": {"lr": "1e-3"},
    }
    told["model"] |= {"model_ema": False, "checkpoint": None}
    ar, io = load_released_ar(written(tmp_path, told, "class")), load_file(place("class") / "io.safetensors")
    assert off(ar(io["token_ids"], io["class_ids"]), io["logits_cond"]) < CLOSE


@pytest.mark.parametrize(
    "section,says",
    [
        ({"generation": {"beam": 3}}, "unknown key 'beam'"),
        ({"generation": {"cfg_factor": "much"}}, "cfg_factor is 'much'"),
        ({"generation": {"model_type": "ar_image_to_text"}}, "model_type is 'ar_image_to_text'"),
        ({"generation": {"model_type": "ar_text_to_image_model"}}, "asked by class or by text"),
        ({"model": {"lora": 1}}, "has an unknown key 'lora'|no 'meta_model'"),
        ({"model": None}, "has no 'model'"),
    ],
)
def test_sections(section, says):
    with pytest.raises(ValueError, match=says):
        read_ar_description(description("class") | section)


def test_generation_defaults():
    assert read_ar_config(place("text")).sampling == TokenSampling(3.0)
    told = description("class")
    told["generation"] |= {"sample": False, "cfg_factor": None}
    assert read_ar_description(told).sampling == TokenSampling(1.0, 0.0)
    told["generation"] |= {"sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.5, "cfg_factor": 2}
    assert read_ar_description(told).sampling == TokenSampling(2.0, 0.7, 9, 0.5)
    del told["generation"]
    assert read_ar_description(told).sampling == TokenSampling()


def with_weights(folder, change):
    written(folder, description("class"), "class")
    weights = load_file(place("class") / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    return folder


SOS = "models.ar_image_model.preprocessor.sos_token_embed"


@pytest.mark.parametrize(
    "change,says",
    [
        (lambda w: w.pop(SOS), "missing tensors .*sos_token_embed"),
        (lambda w: w.update(more=torch.zeros(2)), "surplus tensors 'more'"),
        (lambda w: w.update({SOS: w[SOS][0].clone()}), "shape .1, 128., but .*1, 1, 128"),
        (lambda w: w.update({SOS: w[SOS].long()}), "holds int64, not real numbers"),
        (lambda w: w[SOS].fill_(torch.nan), "contains NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit(change, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        load_released_ar(with_weights(tmp_path, change))


def test_strays_are_not_even_read(tmp_path):
    """A file may bring 11 GB of T5: what is skipped may hold anything."""

    def add(w):
        w["models.text_encoder.t5_embedder.x"] = torch.tensor([torch.nan])
        w["models.image_tokenizer.y"] = torch.zeros(2, dtype=torch.int64)

    assert load_released_ar(with_weights(tmp_path, add)).config.depth == 3


@torch.no_grad()
@pytest.mark.parametrize("kind", (torch.bfloat16, torch.float16, torch.float64))
def test_any_float_type_becomes_float32(kind, tmp_path):
    def cast(w):
        w |= {n: x.to(kind) for n, x in w.items()}

    ar = load_released_ar(with_weights(tmp_path, lambda w: w.update({n: x.to(kind) for n, x in w.items()})))
    assert {w.dtype for w in ar.parameters()} == {torch.float32}
    io = load_file(place("class") / "io.safetensors")
    assert off(ar(io["token_ids"], io["class_ids"]), io["logits_cond"]) < 0.2


@torch.no_grad()
def test_json_in_place_of_yaml(tmp_path):
    written(tmp_path, description("text"), "text")
    (tmp_path / "config.yaml").rename(tmp_path / "config.json")
    told = description("text")
    told["model"] = resolve(told["model"], told, "x")
    (tmp_path / "config.json").write_text(json.dumps(told))
    ar, io = load_released_ar(tmp_path), load_file(place("text") / "io.safetensors")
    assert off(ar(io["token_ids"], conditions(ar, io)[0]), io["logits_cond"]) < CLOSE


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml"):
        load_released_ar(tmp_path)
    (tmp_path / "config.yaml").write_bytes((place("class") / "config.yaml").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        load_released_ar(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder here"):
        load_released_ar(tmp_path / "no" / "where")
    with pytest.raises(ValueError, match="pass its folder"):
        load_released_ar(place("class") / "model.safetensors")


def test_what_it_is_asked_with(capsys):
    """A class that there is not; features of another width; text before anybody said what none is."""
    ar = load_released_ar(place("class"))
    with pytest.raises(ValueError, match=r"classes must lie in 0 \.\. 4"):
        ar.generate(torch.tensor([6]))
    ar = load_released_ar(place("text"))
    cond = TextFeatures(torch.zeros(1, 12, 48), torch.ones(1, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="what no text is"):
        ar.generate(cond)
    ar.text.set_null(cond)
    with pytest.raises(ValueError, match="must have width 48 .*google/flan-t5-xl"):
        ar.generate(TextFeatures(torch.zeros(1, 12, 40), cond.mask))
    with pytest.raises(ValueError, match="no use for a text encoder"):
        load_released_ar(place("class"), encoder=object())


def test_bound_to_a_tokenizer():
    class Tokenizer:
        length, vocabulary, identity = 16, 1000, "0" * 16

    ar = load_released_ar(place("class"), tokenizer=Tokenizer())
    assert ar.tokenizer_identity == "0" * 16
    Tokenizer.vocabulary = 999
    with pytest.raises(ValueError, match="16 tokens out of 1,000, and this tokenizer has 16 out of 999"):
        load_released_ar(place("class"), tokenizer=Tokenizer())


@pytest.mark.parametrize(
    "text,says",
    [
        (b"a: &x [1]\nb: *x", "aliases .* line 2"),
        (b"a: 1\na: 2", "key 'a' is given twice in line 2"),
        (b"<<: {a: 1}", "merge keys"),
        (b"a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        (b"a: !!int x", "a value in it is odd"),
        (b"[" * 5000, "nested too deeply"),
        (b"a: [1", "is no configuration"),
        (b"\xff\xfe\x00", "is no configuration"),
        (b"a: 2020-13-45", "a value in it is odd"),
        (b"a" * (2**18 + 1), "more than 262,144 are not read"),
        (b"? [1, 2]\n: 3", "is no configuration"),
    ],
)
def test_yaml_that_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        parse_yaml(text, "x")


def test_paths_end():
    for told in ({"a": "${b}", "b": "${a}"}, {f"a{i}": f"${{a{i + 1}}}" for i in range(5000)} | {"a5000": 1}):
        with pytest.raises(ValueError, match="leads to itself"):
            resolve(told, told, "x")
    told = {f"a{i}": [f"${{a{i - 1}}}"] * 9 for i in range(1, 15)} | {"a0": 1}
    with pytest.raises(ValueError, match="without end"):
        resolve(told, told, "x")


# --- bugs that these tests find ------------------------


def the_numbers():
    for name in NAMES:
        ar, io, cond, none = opened(name)
        for key, c in (("logits_cond", cond), ("logits_uncond", none)):
            with torch.no_grad():
                assert off(ar(io["token_ids"], c), io[key]) < CLOSE
                assert off(cached_logits(ar, io["token_ids"], c), io[key]) < CLOSE


@torch.no_grad()
def turned_steps():
    ar = random_model("key heads, turned")
    assert off(cached_logits(ar, IDS, CLASSES), ar(IDS, CLASSES)) < 1e-3


def queries_and_keys_exchanged(monkeypatch):
    from flextok_edu.io import released_ar

    real = released_ar.ar_names
    wrong = lambda c, merged=True: {  # noqa: E731
        n: (ours[1], ours[0], ours[2]) if len(ours) == 3 else ours for n, ours in real(c, merged).items()
    }
    monkeypatch.setattr(released_ar, "ar_names", wrong)


def eps_is_forgotten(monkeypatch):
    real = ar_styles.StyledNorm.__init__
    monkeypatch.setattr(
        ar_styles.StyledNorm,
        "__init__",
        lambda self, d, kind, eps, *a, **k: real(self, d, kind, 1e-2, *a, **k),
    )


def padding_is_read(monkeypatch):
    real = ar_styles.StyledCross.read
    monkeypatch.setattr(
        ar_styles.StyledCross, "read", lambda self, text, mask: real(self, text, torch.ones_like(mask))
    )


def always_exact_gelu(monkeypatch):
    monkeypatch.setitem(ar_styles.ACTIVATIONS, "gelu_tanh", F.gelu)


def no_norm_of_queries(monkeypatch):
    monkeypatch.setattr(ar_styles, "_head_norms", lambda *given: [torch.nn.Identity() for _ in "qk"])


def each_step_turned_as_the_first(monkeypatch):
    real = rotated
    patch(monkeypatch, ar_styles, "rotated", lambda x, position, base: real(x, 0, base))


test_numbers_code, test_numbers_bugs = planted(
    [
        (the_numbers, queries_and_keys_exchanged),
        (the_numbers, eps_is_forgotten),
        (the_numbers, padding_is_read),
        (the_numbers, always_exact_gelu),
        (turned_steps, each_step_turned_as_the_first),
    ]
)

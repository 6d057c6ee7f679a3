"""Released checkpoints: what they mean, the numbers they give, what is refused, and the way back.

The fixtures are complete checkpoints with the reference implementation's own results
(tests/fixtures/README.md); `diffusers.AutoencoderKL` stands for the released VAEs.
"""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from planting import patch, randomize

from flextok_edu.engine.config import StageConfig, TokenizerConfig, TrunkConfig, VAEConfig
from flextok_edu.data.datasets import load_data
from flextok_edu.flow import APG
from flextok_edu.io.export import save_released
from flextok_edu.io.layout import Layout
from flextok_edu.io.released import load_flextok, load_vae
from flextok_edu.io.tables import Table
from flextok_edu.objective import FlowObjective
from flextok_edu.short_cuts import condition_of, null_condition_of
from flextok_edu.tokenizer import FlexTok
from flextok_edu.training import fit_tokenizer, train_tokenizer
from flextok_edu.vae import VAE

FIXTURES = Path(__file__).parent / "fixtures"
OWN = TokenizerConfig(
    4,
    8,
    12,
    (8, 5, 5, 5),
    TrunkConfig(32, 1, head_dim=16, mlp_ratio=3.0),
    TrunkConfig(48, 2, head_dim=16, mlp_ratio=3.0),
    modulations=1,
    max_timestep=1000.0,
    time_features=64,
    time_distribution="mode",
    budget_distribution="uniform",
)


def fixture(name="released_tiny"):
    return json.loads((FIXTURES / name / "config.json").read_text()), load_file(
        FIXTURES / name / "model.safetensors"
    )


def write(folder, description, weights):
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({n: w.contiguous() for n, w in weights.items()}, Path(folder) / "model.safetensors")
    (Path(folder) / "config.json").write_text(json.dumps(description))
    return folder


def disguise(description, weights, seed):
    """The same checkpoint: its modules renamed and shuffled, its keys renamed."""
    rng, description, prefix = random.Random(seed), copy.deepcopy(description), {}
    for side in ("encoder", "decoder"):
        parts = list(description[side]["module_dict"].items())
        rng.shuffle(parts)
        if seed == 1:  # a name that says the opposite of what the module is
            names = [n for n, _ in parts][::-1]
        else:
            names = [f"{rng.randrange(10**9):x}" for _ in parts]
        prefix |= {
            f"{side}.module_dict.{n}.": f"{side}.module_dict.{new}." for (n, _), new in zip(parts, names)
        }
        description[side]["module_dict"] = {
            new: dict(rng.sample(list(part.items()), len(part))) for (_, part), new in zip(parts, names)
        }

    def rename(value, option=""):
        if isinstance(value, dict):
            return {k: rename(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [rename(v, option) for v in value]
        return (
            f"key_{value[::-1]}"
            if option.endswith(("read_key", "write_key", "read_keys", "write_keys"))
            else value
        )

    new = {n: next(b + n.removeprefix(a) for a, b in prefix.items() if n.startswith(a)) for n in weights}
    return rename(description), {new[n]: w for n, w in weights.items()}


# --- the numbers
# -----------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        (n, how)
        for n in ("released_tiny", "released_plain")
        for how in ("as released", "disguised", "names swapped", "one file")
    ],
    ids=" ".join,
)
def case(request, tmp_path_factory):
    name, how = request.param
    source, folder = FIXTURES / name, tmp_path_factory.mktemp("case")
    if how == "disguised":
        source = write(folder, *disguise(*fixture(name), seed=0))
    elif how == "names swapped":
        source = write(folder, *disguise(*fixture(name), seed=1))
    elif how == "one file":
        description, weights = fixture(name)
        source = folder / "all.safetensors"
        save_file(weights, source, metadata={"config": json.dumps(description)})
    return load_flextok(source), load_file(FIXTURES / name / "io.safetensors")


@torch.no_grad()
def test_encoder_and_tokens(case):
    tok, io = case
    assert torch.allclose(tok.encoder(io["latents"]), io["encoder_out"], atol=1e-4)
    assert torch.equal(tok.encode_latents(io["latents"]), io["tokens"])
    assert torch.equal(tok.encode_latents(io["latents"], 5), io["tokens"][:, :5])
    assert torch.allclose(tok.fsq.ids_to_codes(io["tokens"]), io["quantized"], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("short", (False, True), ids=("plain", "short cuts"))
def test_decoder(case, short):
    tok, io = case
    n, time = tok.config.patches("decoder"), tok.decoder.modulations(io["t"])
    v, hidden = tok.decoder(
        io["x_t"],
        time,
        *condition_of(tok.decoder, tok.fsq.ids_to_codes(io["tokens"]), io["keep_k"], short=short),
        hidden_of=1,
    )
    assert torch.allclose(v, io["velocity_cond"], atol=1e-4)
    assert torch.allclose(
        tok.decoder(io["x_t"], time, *null_condition_of(tok.decoder, 3, short)),
        io["velocity_uncond"],
        atol=1e-4,
    )
    for image, k in enumerate(io["keep_k"].tolist()):
        assert torch.allclose(hidden[image, : n + k], io["decoder_block1"][image, : n + k], atol=1e-4)


@torch.no_grad()
def test_samples(case):
    tok, io = case
    ids = [row[:k] for row, k in zip(io["tokens"], io["keep_k"].tolist())]
    for name, settings in dict(
        sample_euler5={}, sample_cfg5=dict(guidance=3.0), sample_apg5=dict(guidance=7.5, apg=APG())
    ).items():
        assert torch.allclose(
            tok.decode_latents(ids, io["noise"], steps=5, **settings), io[name], atol=1e-3
        ), name


def test_what_a_loaded_tokenizer_is(capsys):
    tok = load_flextok(FIXTURES / "released_plain")
    said = capsys.readouterr().out.strip()
    assert "research use only" in said and "\n" not in said
    c = tok.config
    assert (
        c.modulations,
        c.max_timestep,
        c.decoder.mlp_ratio,
        c.levels,
        c.encoder.patch,
        c.time_distribution,
        c.null_probability,
    ) == (1, 1000.0, 3.0, (7, 5, 5, 5, 5), 1, "mode", 0.2)
    assert (
        not tok.training
        and not any(w.is_meta for w in [*tok.parameters(), *tok.buffers()])
        and all(w.requires_grad for w in tok.parameters())
    )
    assert isinstance(tok.released, Layout)
    with pytest.raises(ValueError, match="no VAE: pass vae="):
        tok.tokenize(torch.zeros(1, 3, 64, 64))
    tok.train()
    loss, _ = FlowObjective(tok)(torch.randn(2, 8, 8, 8))
    loss.backward()
    assert all(
        w.grad is not None
        for n, w in tok.named_parameters()
        if "mask_token" not in n and "null_token" not in n
    )


@torch.no_grad()
def test_dtype():
    tok, io = (
        load_flextok(FIXTURES / "released_tiny", dtype=torch.bfloat16),
        load_file(FIXTURES / "released_tiny" / "io.safetensors"),
    )
    assert {w.dtype for w in tok.parameters()} == {torch.bfloat16}
    assert torch.allclose(tok.fsq.ids_to_codes(io["tokens"]), io["quantized"], atol=1e-6), (
        "the quantiser stays float32"
    )
    assert (tok.encode_latents(io["latents"].bfloat16()) == io["tokens"]).float().mean() > 0.7
    ids = [row[:k] for row, k in zip(io["tokens"], io["keep_k"].tolist())]
    assert (tok.decode_latents(ids, io["noise"], steps=5) - io["sample_euler5"]).abs().mean() < 0.02 * io[
        "sample_euler5"
    ].abs().mean()


# --- position tables
# -------------------------------------------------------------------------------------------


def test_tables_by_hand():
    stored = torch.randn(2, 1, 6, 5)
    for kind, combine in (("learnable_sum", torch.add), ("learnable_prod", torch.mul)):
        full = torch.stack(
            [
                torch.stack([combine(stored[0, 0, :, i], stored[1, 0, :, j]) for j in range(4)], -1)
                for i in range(5)
            ],
            -2,
        )[None]  # 1 d 5 4
        assert torch.allclose(Table("", kind, "absolute", 6, (5, 4), (5, 4)).dense(stored), full)
        assert torch.equal(Table("", kind, "absolute", 6, (5, 4), (3, 2)).dense(stored), full[..., :3, :2])
        stretched = Table("", kind, "interpolate", 6, (5, 4), (7, 7)).dense(stored)
        for i, j in (
            (0, 0),
            (6, 6),
            (2, 5),
            (3, 1),
        ):  # bilinear, corners aligned: row i of 7 is row i * 4 / 6 of 5
            y, x = i * 4 / 6, j * 3 / 6
            y0, x0 = min(int(y), 3), min(int(x), 2)
            by_hand = sum(
                full[0, :, y0 + a, x0 + b] * abs(1 - a - (y - y0)) * abs(1 - b - (x - x0))
                for a in (0, 1)
                for b in (0, 1)
            )
            assert torch.allclose(stretched[0, :, i, j], by_hand, atol=1e-5)
    line = torch.randn(1, 1, 6, 9)
    assert torch.equal(Table("", "learnable_prod", "absolute", 6, (9,), (4,)).dense(line), line[0, 0].T[:4])
    assert torch.allclose(
        Table("", "learnable_sum", "interpolate", 6, (9,), (5,)).dense(line), line[0, 0].T[::2], atol=1e-6
    )


@pytest.mark.parametrize("kind", ("learnable_sum", "learnable_prod"))
@pytest.mark.parametrize(
    "scaling, size", (("absolute", 8), ("interpolate", 8), ("absolute", 11), ("interpolate", 5))
)
def test_learnable_tables(tmp_path, kind, scaling, size):
    """A checkpoint with factors gives the same tokens as one that stores the dense table, and is written back
    as factors.
    """
    description, weights = fixture()
    part = description["encoder"]["module_dict"]["enc_posemb_module"]
    part |= dict(posemb_type=kind, posemb_scaling=scaling, max_sizes=[size, size])
    name = "encoder.module_dict.enc_posemb_module.posembs"
    factors = torch.randn(2, 1, 64, size)
    full = (
        (factors[0, :, :, :, None] + factors[1, :, :, None])
        if kind == "learnable_sum"
        else factors[0, :, :, :, None] * factors[1, :, :, None]
    )
    dense = (
        full[..., :8, :8]
        if scaling == "absolute"
        else torch.nn.functional.interpolate(full, (8, 8), mode="bilinear", align_corners=True)
    )
    tok = load_flextok(write(tmp_path / "factors", description, weights | {name: factors}))
    plain = load_flextok(write(tmp_path / "dense", fixture()[0], weights | {name: dense}))
    assert (
        torch.allclose(tok.encoder.positions, plain.encoder.positions, atol=1e-6)
        and tok.config == plain.config
    )
    latents = torch.randn(2, 16, 16, 16)
    assert torch.allclose(tok.encoder(latents), plain.encoder(latents), atol=1e-4)
    save_released(tok, tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again" / "model.safetensors")[name], factors)
    tok.encoder.positions += 1
    with pytest.raises(ValueError, match="encoder.positions has changed"):
        save_released(tok, tmp_path / "never")


@pytest.mark.parametrize(
    "kind, scaling, size",
    (
        ("learnable_sum", "absolute", 80),
        ("learnable_prod", "absolute", 64),
        ("learnable_sum", "interpolate", 33),
        ("sincos", "absolute", 70),
    ),
)
def test_register_tables(tmp_path, kind, scaling, size):
    description, weights = fixture()
    description["decoder"]["module_dict"]["dec_registers_posemb_module"] |= dict(
        posemb_type=kind, posemb_scaling=scaling, max_sizes=[size]
    )
    name, table = "decoder.module_dict.dec_registers_posemb_module.posembs", torch.randn(128, size)
    stored = table[None] if kind == "sincos" else table[None, None]
    tok = load_flextok(write(tmp_path / "a", description, weights | {name: stored}))
    expected = (
        table[:, :64]
        if scaling == "absolute"
        else torch.nn.functional.interpolate(table[None], 64, mode="linear", align_corners=True)[0]
    )
    assert torch.allclose(tok.decoder.register_positions, expected.T, atol=1e-6)
    save_released(tok, tmp_path / "b")
    assert torch.equal(load_file(tmp_path / "b" / "model.safetensors")[name], stored)
    with torch.no_grad():
        tok.decoder.register_positions += 1  # as fine-tuning would
    assert torch.equal(tok.released.originals[name], stored), "the original stays as it was"
    if scaling == "absolute":
        save_released(tok, tmp_path / "c")
        again = load_flextok(tmp_path / "c")
        assert torch.equal(again.decoder.register_positions, tok.decoder.register_positions)
    else:
        with pytest.raises(ValueError, match="register_positions has changed"):
            save_released(tok, tmp_path / "c")


def test_latent_size(tmp_path):
    assert load_flextok(FIXTURES / "released_tiny", latent_size=12).encode_latents(
        torch.randn(1, 16, 12, 12)
    ).shape == (1, 64)
    for size in (18, 13, 0):
        with pytest.raises(ValueError, match="max_sizes|latent_size"):
            load_flextok(FIXTURES / "released_tiny", latent_size=size)
    description, weights = fixture()
    for side, name in (("encoder", "enc_posemb_module"), ("decoder", "dec_patches_posemb_module")):
        description[side]["module_dict"][name]["posemb_scaling"] = "interpolate"
    assert load_flextok(write(tmp_path, description, weights)).config.latent_size == 16
    assert load_flextok(tmp_path, latent_size=20).encode_latents(torch.randn(1, 16, 20, 20)).shape == (1, 64)


# --- refusals
# --------------------------------------------------------------------------------------------------

WEIGHT = "decoder.module_dict.dec_transformer.blocks.0.attn.wq.weight"


def enc(d, name):
    return d["encoder"]["module_dict"][name]


def dec(d, name):
    return d["decoder"]["module_dict"][name]


REFUSED = {  # what is wrong: (how it is made, what the error must say)
    "target of a module": (
        lambda d, w: dec(d, "dec_time_embedder").update(
            _target_="flextok.model.preprocessors.time_embedding.Fourier"
        ),
        "time_embedding.Fourier",
    ),
    "target of the quantiser": (
        lambda d, w: d["regularizer"].update(_target_="flextok.regularizers.vq.VQ"),
        "flextok.regularizers.vq.VQ",
    ),
    "target is a command": (lambda d, w: d["pipeline"].update(_target_="os.system"), "os.system"),
    "another package's class": (
        lambda d, w: dec(d, "dec_transformer").update(_target_="evil.FlexTransformer"),
        "evil.FlexTransformer",
    ),
    "a method": (
        lambda d, w: enc(d, "enc_channels_to_last")["per_sample_op"].update(path="os.remove"),
        "os.remove",
    ),
    "the wrong turn": (
        lambda d, w: enc(d, "enc_channels_to_last")["per_sample_op"].update(
            path="flextok.model.utils.dict_ops.channels_last_to_first"
        ),
        "channels_last_to_first",
    ),
    "no target": (lambda d, w: enc(d, "enc_to_latents").pop("_target_"), "_target_"),
    "an option": (lambda d, w: dec(d, "dec_transformer").update(window_size=8), "window_size"),
    "an option of FSQ": (lambda d, w: d["regularizer"].update(drop_quant_p=0.1), "drop_quant_p"),
    "a missing option": (lambda d, w: dec(d, "dec_time_embedder").pop("max_timestep"), "max_timestep"),
    "a value": (lambda d, w: enc(d, "enc_seq_packer").update(mask_mode="sliding"), "sliding"),
    "mu-P": (lambda d, w: enc(d, "enc_to_latents").update(use_mup_readout=True), "use_mup_readout"),
    "a number that is true": (lambda d, w: enc(d, "enc_transformer").update(depth=True), "depth"),
    "the decoder's mask": (lambda d, w: dec(d, "dec_seq_packer").update(mask_mode="causal"), "mask_mode"),
    "no mask": (lambda d, w: enc(d, "enc_transformer").pop("block_mask_read_key"), "block_mask_read_key"),
    "registers that vary": (lambda d, w: enc(d, "enc_register_module").update(n_min=1), "n_min"),
    "modulation in the encoder": (
        lambda d, w: enc(d, "enc_transformer").update(adaLN_emb_read_key="x"),
        "adaLN_emb_read_key",
    ),
    "modulation without its clock": (
        lambda d, w: dec(d, "dec_transformer").update(adaLN_emb_read_key="x"),
        "adaLN_emb_read_key",
    ),
    "expansion": (lambda d, w: dec(d, "dec_transformer").update(adaLN_expansion=3), "adaLN_expansion"),
    "expansion without kinds": (
        lambda d, w: dec(d, "dec_seq_packer").update(per_subseq_embs=False),
        "per_subseq_embs",
    ),
    "an mlp ratio that is not the weights'": (
        lambda d, w: enc(d, "enc_transformer").update(mlp_ratio=3.0),
        "mlp.fc1.weight",
    ),
    "two patch sizes in the decoder": (
        lambda d, w: dec(d, "dec_to_patches").update(patch_sizes=[1, 1]),
        "patch_sizes",
    ),
    "a patch that is not the weights'": (
        lambda d, w: enc(d, "enc_patch_emb").update(patch_sizes=[1, 1]),
        "patch_proj",
    ),
    "times outside 0 .. 1": (
        lambda d, w: d["flow_matching_noise_module"].update(mode_scale=3.0),
        "mode_scale",
    ),
    "a head that does not divide": (
        lambda d, w: [
            s(d, n).update(head_dim=48) for s, n in ((enc, "enc_transformer"), (dec, "dec_transformer"))
        ],
        "head_dim 48",
    ),
    "long patches": (lambda d, w: enc(d, "enc_patch_emb").update(patch_sizes=[2, 1]), "patch_sizes"),
    "two widths": (lambda d, w: enc(d, "enc_register_module").update(dim=32), "dim"),
    "channels": (lambda d, w: d["pipeline"].update(out_channels=8), "channels"),
    "FSQ dimensions": (lambda d, w: d["regularizer"].update(levels=[8, 5, 5]), "FSQ"),
    "a level of one": (lambda d, w: d["regularizer"].update(levels=[8, 8, 8, 5, 5, 1]), "levels"),
    "position table kind": (
        lambda d, w: dec(d, "dec_patches_posemb_module").update(posemb_type="rope"),
        "rope",
    ),
    "a table too small": (
        lambda d, w: dec(d, "dec_registers_posemb_module").update(max_sizes=[32]),
        "max_sizes",
    ),
    "a table with too many axes": (
        lambda d, w: dec(d, "dec_registers_posemb_module").update(max_sizes=[8, 8]),
        "max_sizes",
    ),
    "a module too many": (
        lambda d, w: d["decoder"]["module_dict"].update(second=copy.deepcopy(dec(d, "dec_time_embedder"))),
        "TimestepEmbedder",
    ),
    "a module that nobody reads": (
        lambda d, w: d["encoder"]["module_dict"].update(
            second=copy.deepcopy(enc(d, "enc_to_latents")) | dict(read_key="q")
        ),
        "second",
    ),
    "a module too few": (
        lambda d, w: d["decoder"]["module_dict"].pop("dec_nested_dropout"),
        "MaskedNestedDropout",
    ),
    "a broken connection": (
        lambda d, w: dec(d, "dec_to_patches").update(read_key="dec_quants"),
        "ToPatchesLinearHead",
    ),
    "the quantiser reads elsewhere": (
        lambda d, w: d["regularizer"].update(latents_read_key="x"),
        "LinearHead",
    ),
    "the sampler writes elsewhere": (lambda d, w: d["pipeline"].update(reconst_write_key="x"), "reconst"),
    "a section too many": (lambda d, w: d.update(discriminator={}), "discriminator"),
    "a section too few": (lambda d, w: d.pop("pipeline"), "pipeline"),
    "another family": (
        lambda d, w: [d.clear(), d.update(model_type="llama", hidden_size=64)],
        "no FlexTok configuration.*llama|no FlexTok configuration.*model_type",
    ),
    "a VAE": (lambda d, w: [d.clear(), d.update(block_out_channels=[64])], "load_vae"),
    "one of ours": (lambda d, w: [d.clear(), d.update(config={}, weights="")], "load_tokenizer"),
    "absurd size": (lambda d, w: dec(d, "dec_transformer").update(depth=10**9), "depth"),
    "missing tensor": (lambda d, w: w.pop(WEIGHT), f"missing.*{WEIGHT}"),
    "missing table": (
        lambda d, w: w.pop("encoder.module_dict.enc_posemb_module.posembs"),
        "missing.*enc_posemb_module.posembs",
    ),
    "surplus tensor": (
        lambda d, w: w.update(
            {"decoder.module_dict.dec_transformer.blocks.0.attn.wq.bias": torch.zeros(128)}
        ),
        "surplus.*wq.bias",
    ),
    "one block too few": (lambda d, w: dec(d, "dec_transformer").update(depth=2), "surplus.*blocks.2"),
    "wrong shape": (lambda d, w: w.update({WEIGHT: torch.zeros(128, 64)}), f"{WEIGHT}.*\\(128, 64\\)"),
    "expansion of other tensors": (
        lambda d, w: dec(d, "dec_transformer").update(adaLN_expansion=1),
        "adaLN_modulation",
    ),
    "integers": (
        lambda d, w: w.update({WEIGHT: torch.zeros(128, 128, dtype=torch.int32)}),
        f"{WEIGHT}.*int32",
    ),
    "NaN": (lambda d, w: w[WEIGHT].view(-1)[7].fill_(float("nan")), f"{WEIGHT}.*NaN"),
    "infinity": (lambda d, w: w[WEIGHT].view(-1)[7].fill_(float("inf")), f"{WEIGHT}.*infinity"),
    "vae tensors that are none": (lambda d, w: w.update({"vae.secret": torch.zeros(3)}), "vae"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(tmp_path, what):
    change, says = REFUSED[what]
    description, weights = fixture()
    change(description, weights)
    with pytest.raises(ValueError, match=says):
        load_flextok(write(tmp_path, description, weights))


BELIEVED = {  # sizes and numbers that a description may ask for, and that no file of two megabytes can mean
    "blocks": lambda d, w: dec(d, "dec_transformer").update(depth=1000),
    "registers": lambda d, w: [
        enc(d, "enc_register_module").update(n_min=65536, n_max=65536),
        dec(d, "dec_registers_posemb_module").update(max_sizes=[65536]),
    ],
    "a width": lambda d, w: [p.update(dim=65536) for p in d["encoder"]["module_dict"].values() if "dim" in p],
    "features of the clock": lambda d, w: dec(d, "dec_time_embedder").update(frequency_embedding_size=65536),
    "channels of the VAE": lambda d, w: d["vae"].update(latent_channels=65536),
    "times that overflow": lambda d, w: dec(d, "dec_time_embedder").update(max_timestep=5e-324),
    "a scale that overflows": lambda d, w: d["vae"].update(scaling_factor=5e-324),
    "an mlp ratio": lambda d, w: enc(d, "enc_transformer").update(mlp_ratio=1e300),
    "a name of a megabyte": lambda d, w: d["encoder"]["module_dict"].update(
        {"x" * 10**6: {"_target_": "y" * 10**6}}
    ),
    "ten thousand modules": lambda d, w: d["encoder"]["module_dict"].update(
        {str(i): copy.deepcopy(enc(d, "enc_to_latents")) for i in range(10_000)}
    ),
    "levels beyond counting": lambda d, w: d["regularizer"].update(levels=[65536] * 6),
}


@pytest.mark.parametrize("what", BELIEVED)
def test_sizes_are_not_believed(tmp_path, monkeypatch, what):
    """Refused in a short sentence, before a tensor is read."""
    description, weights = fixture()
    BELIEVED[what](description, weights)
    write(tmp_path, description, weights)
    monkeypatch.setattr("flextok_edu.io.released.read_tensors", lambda *a: pytest.fail("tensors were read"))
    with pytest.raises(ValueError) as error:
        load_flextok(tmp_path)
    assert len(str(error.value)) < 4000


@pytest.mark.parametrize("kind", ("learnable_sum", "learnable_prod"))
@pytest.mark.parametrize(
    "scaling, size, latent_size",
    (("absolute", 8192, None), ("interpolate", 8192, 16), ("interpolate", 8, 16384), ("absolute", 2048, 16)),
)
def test_expanded_tables_have_a_limit(tmp_path, monkeypatch, kind, scaling, size, latent_size):
    """A few megabytes of factors are tables of gigabytes."""
    description, weights = fixture()
    for part, at in (
        (enc(description, "enc_posemb_module"), "encoder.module_dict.enc_posemb_module"),
        (dec(description, "dec_patches_posemb_module"), "decoder.module_dict.dec_patches_posemb_module"),
    ):
        part.update(posemb_type=kind, posemb_scaling=scaling, max_sizes=[size, size])
        weights[at + ".posembs"] = torch.zeros(2, 1, part["dim"], size)
    write(tmp_path, description, weights)
    monkeypatch.setattr("flextok_edu.io.released.read_tensors", lambda *a: pytest.fail("tensors were read"))
    with pytest.raises(ValueError, match="would become a position table of .* GB.*it is not made"):
        load_flextok(tmp_path, latent_size=latent_size)


def test_git_lfs_pointers(tmp_path):
    """What a clone without git-lfs holds is recognised at every door."""
    pointer = (
        "version https://git-lfs.github.com/spec/v1\noid "
        "sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 132\n"
    )
    folder = write(tmp_path / "a", *fixture())
    (folder / "model.safetensors").write_text(pointer)
    (tmp_path / "one.safetensors").write_text(pointer)
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "config.json").write_text(
        json.dumps(dict(block_out_channels=[16], layers_per_block=1, latent_channels=4, norm_num_groups=4))
    )
    (tmp_path / "v" / "diffusion_pytorch_model.safetensors").write_text(pointer)
    for load, place in (
        (load_flextok, folder),
        (load_flextok, tmp_path / "one.safetensors"),
        (load_vae, tmp_path / "v"),
        (FlexTok.from_pretrained, tmp_path / "ours"),
        (VAE.from_pretrained, tmp_path / "ours" / "vae"),
    ):
        if "ours" in str(place):
            FlexTok(
                OWN, VAE(VAEConfig(latent_channels=4, channels=(16,), layers=1, stem=4, groups=4))
            ).save_pretrained(tmp_path / "ours")
            (place / "model.safetensors").write_text(pointer)
        with pytest.raises(ValueError, match="is a git-lfs pointer, not the file: git lfs pull"):
            load(place)
    (folder / "config.json").write_text(pointer)
    (folder / "model.safetensors").write_bytes(
        (FIXTURES / "released_tiny" / "model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match="config.json is a git-lfs pointer"):
        load_flextok(folder)


def test_order_of_the_listing(tmp_path):
    """Any order of all modules means the same; but all else in order and the dropout before the position
    table is another model.
    """
    latents, first = torch.randn(1, 16, 16, 16), None
    for arrange in (sorted, reversed, list):
        d, weights = fixture()
        for side in ("encoder", "decoder"):
            d[side]["module_dict"] = {
                n: d[side]["module_dict"][n] for n in arrange(list(d[side]["module_dict"]))
            }
        ids = load_flextok(write(tmp_path, d, weights)).encode_latents(latents)
        first = ids if first is None else first
        assert torch.equal(ids, first)
    description, weights = fixture()
    for names in (
        ("dec_nested_dropout", "dec_registers_posemb_module"),
        ("dec_latent_dropout", "dec_nested_dropout"),
    ):
        d, parts = copy.deepcopy(description), description["decoder"]["module_dict"]
        d["decoder"]["module_dict"] = {
            "dec_from_latents": parts["dec_from_latents"],
            **{n: parts[n] for n in names},
            **{n: p for n, p in parts.items() if n not in names},
        }
        with pytest.raises(ValueError, match=names[1]):
            load_flextok(write(tmp_path, d, weights))


def test_nothing_is_imported(tmp_path, monkeypatch):
    """A module of that name is there to be imported; it must not be."""
    (tmp_path / "trap13.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    description, weights = fixture()
    description["vae"]["_target_"] = "trap13.StableDiffusionVAE"
    with pytest.raises(ValueError, match="trap13"):
        load_flextok(write(tmp_path / "a", description, weights))


def test_bad_files(tmp_path, monkeypatch):
    description, weights = fixture()
    folder = write(tmp_path / "a", description, weights)
    good = (folder / "model.safetensors").read_bytes()
    for bad in (
        good[: len(good) // 2],
        good[:100],
        b"",
        b"\xff" * 8 + good[8:],
        good[:9] + b"!" + good[10:],
        good + b"more",
        b"hello",
    ):
        (folder / "model.safetensors").write_bytes(bad)
        with pytest.raises(ValueError, match="damaged"):
            load_flextok(folder)
    for old in (False, True):
        torch.save(weights, folder / "model.safetensors", _use_new_zipfile_serialization=not old)
        with pytest.raises(ValueError, match="pickle"):
            load_flextok(folder)
    (folder / "model.safetensors").write_bytes(good)
    for text in (
        "{",
        "[1, 2]",
        "null",
        "",
        '{"encoder": NaN, "decoder": 1, "regularizer": []}',
        "[" * 100_000,
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError):
            load_flextok(folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickle"):
        load_flextok(folder)
    with pytest.raises(FileNotFoundError, match="not there"):
        load_flextok(tmp_path / "nowhere" / "at" / "all")
    save_file(weights, tmp_path / "bare.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="metadata"):
        load_flextok(tmp_path / "bare.safetensors")


def test_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def from_hub(repo, allow_patterns):
        asked.append((repo, *allow_patterns))
        return str(FIXTURES / "released_tiny")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_hub)
    assert load_flextok("someone/flextok-tiny").config.registers == 64
    assert set(asked) == {
        ("someone/flextok-tiny", "config.json"),
        ("someone/flextok-tiny", "model.safetensors"),
    }

    def offline(repo, allow_patterns):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for load in (load_flextok, load_vae):
        with pytest.raises(FileNotFoundError, match="someone/flextok-tiny could not be downloaded.*online"):
            load("someone/flextok-tiny")


# --- the way back
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("released_tiny", "released_plain"))
@pytest.mark.parametrize("single", (False, True), ids=("folder", "one file"))
def test_round_trip(tmp_path, name, single):
    description, weights = fixture(name)
    tok, target = load_flextok(FIXTURES / name), tmp_path / ("a.safetensors" if single else "a")
    save_released(tok, target)
    written = load_file(target if single else target / "model.safetensors")
    assert written.keys() == weights.keys() and all(torch.equal(written[n], w) for n, w in weights.items())
    if not single:
        assert json.loads((target / "config.json").read_text()) == description and sorted(
            f.name for f in target.iterdir()
        ) == ["config.json", "model.safetensors"]
    again = load_flextok(target)
    assert again.config == tok.config and all(
        torch.equal(w, again.state_dict()[n]) for n, w in tok.state_dict().items()
    )


def test_round_trip_after_training(tmp_path):
    tok = load_flextok(FIXTURES / "released_tiny").train()
    optimizer = torch.optim.SGD(tok.parameters(), lr=0.1)
    loss, _ = FlowObjective(tok)(torch.randn(2, 16, 16, 16))
    loss.backward()
    optimizer.step()
    save_released(tok, tmp_path)
    again = load_flextok(tmp_path)
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in tok.state_dict().items())
    assert not torch.equal(
        again.decoder.register_positions, load_flextok(FIXTURES / "released_tiny").decoder.register_positions
    )


@pytest.mark.parametrize(
    "changes",
    (
        dict(),
        dict(
            encoder_mask="full",
            encoder=TrunkConfig(32, 1, 1, 16),
            modulations=2,
            time_distribution="logit_normal",
        ),
        dict(encoder_mask="causal", levels=(7, 5), null_probability=0.3, budget_distribution="powers_of_two"),
        dict(
            registers=1,
            time_distribution="uniform",
            sample_posterior=False,
            decoder=TrunkConfig(64, 3, 4, 8, 2.5),
        ),
        dict(mode_scale=1.2, encoder=TrunkConfig(32, 2, 4, 32), decoder=TrunkConfig(48, 1, 1, 12)),
    ),
    ids=str,
)
def test_own_tokenizer(tmp_path, changes):
    tok = randomize(FlexTok(replace(OWN, **changes)).eval())
    save_released(tok, tmp_path)
    again = load_flextok(tmp_path)
    assert again.config == tok.config and again.state_dict().keys() == tok.state_dict().keys()
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in tok.state_dict().items())
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    ids = tok.encode_latents(latents)
    assert torch.equal(again.encode_latents(latents), ids) and torch.equal(
        again.decode_latents(ids, noise, steps=2, guidance=2.0),
        tok.decode_latents(ids, noise, steps=2, guidance=2.0),
    )
    save_released(again, tmp_path / "b")
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


def test_own_limits(tmp_path, capsys):
    with pytest.raises(ValueError, match="norm_before_fsq"):
        save_released(FlexTok(replace(OWN, norm_before_fsq=True)), tmp_path)
    assert not list(tmp_path.iterdir())
    measured = VAE(VAEConfig(latent_channels=4, channels=(16,), layers=1, stem=4, groups=4))
    save_released(FlexTok(replace(OWN, zero_noise=0.5, budget_distribution="half_full"), measured), tmp_path)
    said = capsys.readouterr().out
    assert "zero_noise=0.5" in said and "half_full" in said and "VAE is not part" in said
    assert load_flextok(tmp_path, vae=measured).tokenize(torch.zeros(1, 3, 32, 32)).shape == (1, 12)
    with pytest.raises(ValueError, match="latent channels"):
        load_flextok(FIXTURES / "released_tiny", vae=measured)


# --- VAEs
# ------------------------------------------------------------------------------------------------------

SHAPES = {
    "two levels": dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8),
    "like SDXL": dict(
        block_out_channels=(32, 64, 128, 128), layers_per_block=2, norm_num_groups=32, scaling_factor=0.13025
    ),
    "sixteen channels, shifted": dict(
        block_out_channels=(16, 24),
        layers_per_block=2,
        norm_num_groups=8,
        latent_channels=16,
        scaling_factor=0.36,
        shift_factor=0.12,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "one level, no attention": dict(
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=8,
        mid_block_add_attention=False,
    ),
    "half of the 1x1 convolutions": dict(
        block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=16, use_quant_conv=False
    ),
}
OLD = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}


def reference(**options):
    """A diffusers VAE with random weights that matter."""
    diffusers = pytest.importorskip("diffusers")
    levels = len(options["block_out_channels"])
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **options,
    ).eval()
    with torch.no_grad():
        for n, w in vae.named_parameters():
            w.add_(torch.randn(w.shape) * (0.1 if w.ndim == 1 else 0.02))
    return vae


def rename(path, conv):
    """The same file with the attention's old names, its weights perhaps as 1x1 convolutions."""
    weights, new = load_file(path), {}
    for n, w in weights.items():
        if ".attentions.0.to_" in n:
            for a, b in OLD.items():
                n = n.replace(a, b)
            w = w[..., None, None].clone() if conv and w.ndim == 2 else w
        new[n] = w
    save_file(new, path)


@torch.no_grad()
@pytest.mark.parametrize("names", ("new", "old", "old, as convolutions"))
@pytest.mark.parametrize("shape", SHAPES)
def test_vae(tmp_path, shape, names):
    theirs, sub = reference(**SHAPES[shape]), "vae" if names == "new" else ""
    theirs.save_pretrained(tmp_path / sub)
    if names != "new":
        rename(tmp_path / sub / "diffusion_pytorch_model.safetensors", conv="convolutions" in names)
    ours = load_vae(tmp_path)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = theirs.encode(images).latent_dist
    mean, logvar = ours.posterior(images)
    assert torch.allclose(mean, expected.mean, atol=1e-4) and torch.allclose(
        logvar, expected.logvar, atol=1e-4
    )
    assert torch.allclose(ours.decode(ours.normalize(mean)), theirs.decode(expected.mean).sample, atol=1e-4)
    shift, scale = SHAPES[shape].get("shift_factor", 0.0), SHAPES[shape].get("scaling_factor", 0.18215)
    assert torch.allclose(ours.encode(images), (expected.mean - shift) * scale, atol=1e-4)
    assert not ours.training and not any(w.requires_grad for w in ours.parameters())
    half = load_vae(tmp_path, dtype=torch.bfloat16)
    assert half.decode(half.encode(images.bfloat16())).dtype == torch.bfloat16


def test_vae_of_full_size():
    """84 million parameters: every name and shape of the released VAEs' layout is one of ours."""
    from flextok_edu.io.released_vae import vae_names

    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        ours = VAE(VAEConfig(latent_channels=16))
        theirs = diffusers.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    names = {
        f"{a}.{last}": f"{b}.{last}" for a, b in vae_names(ours.config).items() for last in ("weight", "bias")
    }
    state = ours.state_dict()
    assert {n: w.shape for n, w in theirs.state_dict().items()} == {
        a: state[b].shape for a, b in names.items()
    }
    assert {*names.values(), "latent_mean", "latent_std"} == state.keys()


@torch.no_grad()
def test_vae_of_full_size_runs(tmp_path):
    """The same 84 million, loaded and run on a small image beside diffusers' own."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()
    assert 83e6 < sum(w.numel() for w in theirs.parameters()) < 85e6
    theirs.save_pretrained(tmp_path)
    ours, images = load_vae(tmp_path), torch.rand(1, 3, 64, 64) * 2 - 1
    expected = theirs.encode(images).latent_dist.mean
    mean = ours.posterior(images)[0]
    assert torch.allclose(mean, expected, atol=1e-4)
    assert torch.allclose(ours.decode(ours.normalize(expected)), theirs.decode(expected).sample, atol=1e-4)


def test_vae_refusals(tmp_path):
    reference(**SHAPES["two levels"]).save_pretrained(tmp_path)
    config, file = (
        json.loads((tmp_path / "config.json").read_text()),
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    for option, value in dict(
        act_fn="relu",
        temporal=True,
        latents_mean=[0.0] * 4,
        in_channels=1,
        norm_num_groups=7,
        layers_per_block="2",
        scaling_factor=0,
        _class_name="VQModel",
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["UpDecoderBlock2D"],
    ).items():
        (tmp_path / "config.json").write_text(json.dumps(config | {option: value}))
        with pytest.raises(
            ValueError,
            match={"in_channels": "image channels", "norm_num_groups": "sizes"}.get(option, option),
        ):
            load_vae(tmp_path)
    for option, value, says in (
        ("use_quant_conv", False, "surplus.*quant_conv"),
        ("mid_block_add_attention", False, "surplus.*attentions"),
        ("layers_per_block", 2, "missing.*resnets"),
        ("latent_channels", 8, "shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {option: value}))
        with pytest.raises(ValueError, match=says):
            load_vae(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(file)
    name = "encoder.conv_in.weight"
    for change, says in (
        ({name: weights[name] * float("nan")}, f"{name}.*NaN"),
        ({"loss.logvar": torch.zeros(1)}, "surplus.*loss.logvar"),
        ({"encoder.mid_block.attentions.0.query.weight": torch.zeros(32, 32)}, "old and its new"),
    ):
        save_file(weights | change, file)
        with pytest.raises(ValueError, match=says):
            load_vae(tmp_path)
    torch.save(weights, file)
    with pytest.raises(ValueError, match="pickle"):
        load_vae(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model"):
        load_vae(tmp_path)
    with pytest.raises(ValueError, match="load_flextok"):
        load_vae(FIXTURES / "released_tiny")


@torch.no_grad()
@pytest.mark.parametrize(
    "prefix, names, quant", (("vae.", "new", True), ("vae.vae.", "old", True), ("vae.", "new", False))
)
def test_vae_in_a_checkpoint(tmp_path, prefix, names, quant):
    theirs = reference(
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=8,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    theirs.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    if names == "old":
        rename(file, conv=True)
    description, weights = fixture("released_plain")
    description["vae"]["scaling_factor"] = 0.5
    weights |= {prefix + n: w for n, w in load_file(file).items()}
    tok, images = load_flextok(write(tmp_path / "a", description, weights)), torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.allclose(tok.vae.encode(images), theirs.encode(images).latent_dist.mean * 0.5, atol=1e-4)
    ids = tok.tokenize(images)
    assert (
        torch.equal(ids, tok.encode_latents(tok.vae.encode(images)))
        and tok.detokenize(ids[:, :3], steps=2).shape == images.shape
    )
    assert not any(w.requires_grad for w in tok.vae.parameters())
    save_released(tok, tmp_path / "b")
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == weights.keys() and all(torch.equal(written[n], w) for n, w in weights.items())
    with pytest.raises(ValueError, match="its own VAE"):
        load_flextok(tmp_path / "a", vae=tok.vae)
    with pytest.raises(ValueError, match="surplus.*describes no VAE"):
        load_flextok(write(tmp_path / "c", {k: v for k, v in description.items() if k != "vae"}, weights))
    with pytest.raises(ValueError, match="missing.*conv_out"):
        load_flextok(
            write(
                tmp_path / "d",
                description,
                {n: w for n, w in weights.items() if n != prefix + "encoder.conv_out.bias"},
            )
        )


@torch.no_grad()
def test_a_vae_brought_along(tmp_path):
    """It must scale its latents as the tokenizer was trained; an own tokenizer takes a plain VAE with it."""
    vae = randomize(VAE(VAEConfig(latent_channels=4, channels=(32, 32), layers=1)), 0.05).eval()
    vae.latent_std.fill_(1 / 0.3)
    tok = FlexTok(replace(OWN, latent_size=8), vae).eval()
    save_released(tok, tmp_path / "a")
    again, images = load_flextok(tmp_path / "a"), torch.rand(2, 3, 16, 16) * 2 - 1
    assert all(torch.equal(w, again.state_dict()[n]) for n, w in tok.state_dict().items())
    assert torch.equal(again.tokenize(images), tok.tokenize(images))
    tok.vae = None
    save_released(tok, tmp_path / "b")
    with pytest.raises(ValueError, match="scales its latents by 0.3.*trained on 1"):
        load_flextok(tmp_path / "b", vae=vae)
    vae.latent_std.fill_(1.0)
    assert load_flextok(tmp_path / "b", vae=vae).vae is vae


# --- going on with a released one
# ------------------------------------------------------------------------------


def small_vae(scaling):
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent_channels=16, channels=(16, 32), layers=1, groups=8)).eval()
    vae.latent_std.fill_(1 / scaling)
    return vae


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of images through the ordinary data path."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for i in range(20):
        Image.effect_noise((40, 36), 20 + 5 * i).convert("RGB").save(folder / f"{i}.png")
    return load_data(str(folder), 32, 0, 4, progress=False)[0]


@pytest.mark.parametrize("part", ("decoder", "both"))
def test_fine_tuning(tmp_path, pictures, part):
    tok = load_flextok(
        FIXTURES / "released_tiny", vae=small_vae(load_flextok(FIXTURES / "released_tiny").released.scaling)
    )
    before = {n: w.detach().clone() for n, w in tok.own_state().items()}
    tuned, log = fit_tokenizer(
        tok, pictures, StageConfig(steps=8, batch=4, lr=1e-3, warmup=2, ema=0.5), part, progress=False
    )
    moved = {n for n, w in tuned.own_state().items() if not torch.equal(w, before[n])}
    assert tuned is tok and not tok.training and all(w.requires_grad for _, w in tok.own_parameters())
    assert (
        any(n.startswith("encoder.") for n in moved) == (part == "both")
        and "decoder.mask_token" in moved
        and "decoder.blocks.0.attention.q.weight" in moved
    )
    assert log[-1]["tokenizer"] < log[0]["tokenizer"] and "research use only" in tok.terms
    save_released(tok, tmp_path)
    again = load_flextok(tmp_path)
    assert all(torch.equal(w, again.own_state()[n]) for n, w in tok.own_state().items())


def test_fine_tuning_is_the_loop_of_training(pictures):
    """The same seed, the same numbers: train_tokenizer is a fresh start and then the same loop."""
    from flextok_edu.engine.config import preset

    p = preset("micro")
    vae = VAE(p.vae).eval()
    p = replace(p, train_tokenizer=replace(p.train_tokenizer, steps=3, batch=4))
    one, log = train_tokenizer(pictures, vae, p, seed=3, progress=False)
    torch.manual_seed(3)
    two, other = fit_tokenizer(FlexTok(p.tokenizer, vae), pictures, p.train_tokenizer, seed=3, progress=False)
    assert log[-1]["tokenizer"] == other[-1]["tokenizer"] and all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values())
    )


def test_fine_tuning_refusals(pictures):
    tok = load_flextok(FIXTURES / "released_tiny")
    config = StageConfig(steps=1, batch=2)
    with pytest.raises(ValueError, match="no VAE"):
        fit_tokenizer(tok, pictures, config)
    tok = load_flextok(FIXTURES / "released_tiny", vae=small_vae(tok.released.scaling))
    with pytest.raises(ValueError, match="part"):
        fit_tokenizer(tok, pictures, config, "encoder")
    with pytest.raises(ValueError, match="32 px, but this tokenizer and its VAE take 64"):
        fit_tokenizer(FlexTok(replace(tok.config, latent_size=32), tok.vae), pictures, config)
    half = load_flextok(FIXTURES / "released_tiny", dtype=torch.bfloat16, vae=tok.vae)
    with pytest.raises(ValueError, match="float32"):
        fit_tokenizer(half, pictures, config)


# --- the released API's names
# ----------------------------------------------------------------------------------


def test_their_names_are_understood():
    tok = load_flextok(
        FIXTURES / "released_tiny", vae=small_vae(load_flextok(FIXTURES / "released_tiny").released.scaling)
    )
    ids = tok.tokenize(torch.rand(3, 3, 32, 32) * 2 - 1, [1, 16, 64])
    theirs = tok.detokenize(
        [row[None] for row in ids], timesteps=3, guidance_scale=7.5, perform_norm_guidance=True
    )
    assert torch.equal(theirs, tok.detokenize(ids, steps=3, guidance=7.5, apg=True))
    for both in (
        dict(steps=3, timesteps=4),
        dict(guidance=2.0, guidance_scale=3.0),
        dict(apg=True, perform_norm_guidance=False),
    ):
        with pytest.raises(ValueError, match="given twice, under both of its names"):
            tok.detokenize(ids, **both)
    for steps in (0, 2.5, True):
        with pytest.raises(ValueError, match="steps"):
            tok.detokenize(ids, timesteps=steps)


@pytest.fixture
def dressed():
    """The fixture with a small VAE: 32 px."""
    return load_flextok(
        FIXTURES / "released_tiny", vae=small_vae(load_flextok(FIXTURES / "released_tiny").released.scaling)
    )


def test_their_lists(dressed):
    """`[t[:, :16] for t in tok.tokenize(x)]` of the released API."""
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    ids, tokens = dressed.tokenize(x), dressed.tokenize(x, as_list=True)
    assert [t.shape for t in tokens] == [(1, 64)] * 3 and torch.equal(
        torch.cat([t[:, :16] for t in tokens]), ids[:, :16]
    )
    assert [t.shape for t in dressed.tokenize(x, [1, 2, 3], as_list=True)] == [
        (1, 1),
        (1, 2),
        (1, 3),
    ] and dressed.tokenize(x, 5, as_list=True)[2].shape == (1, 5)
    assert torch.equal(
        dressed.detokenize([t[:, :16] for t in tokens], steps=2), dressed.detokenize(ids[:, :16], steps=2)
    )


def test_their_generators(dressed):
    ids, made = torch.zeros(2, 4, dtype=torch.int64), lambda seed: torch.Generator().manual_seed(seed)
    one = dressed.detokenize(ids, steps=2, generator=made(1))
    assert torch.equal(one, dressed.detokenize(ids, steps=2, generator=made(1))) and not torch.equal(
        one, dressed.detokenize(ids, steps=2, generator=made(2))
    )
    g = made(1)
    assert torch.equal(
        one,
        dressed.detokenize(
            ids, steps=2, noise=torch.stack([torch.randn(16, 16, 16, generator=g) for _ in range(2)])
        ),
    )
    each = dressed.detokenize(ids, steps=2, generator=[made(5), made(5)])
    assert torch.allclose(each[0], each[1], atol=1e-5)
    for wrong, says in (
        (dict(seed=1, generator=made(1)), "seed=1 and generator="),
        (dict(noise=torch.zeros(2, 16, 16, 16), generator=made(1)), "not both"),
        (dict(generator=[made(1)]), "1 generators for 2 images"),
    ):
        with pytest.raises(ValueError, match=says):
            dressed.detokenize(ids, steps=2, **wrong)


def test_their_bar_and_sizes(dressed, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    ids = torch.zeros(2, 4, dtype=torch.int64)
    silent = dressed.detokenize(ids, steps=3)
    assert "decoding" not in capsys.readouterr().err
    for sizes in (32, (32, 32), [32, 32], [(32, 32), (32, 32)], torch.tensor([[32, 32]] * 2)):
        assert torch.equal(dressed.detokenize(ids, steps=3, vae_image_sizes=sizes), silent)
    for sizes in (256, (256, 32), [(32, 32), (64, 64)]):
        with pytest.raises(ValueError, match="makes pictures of 32 px, not of (256|64)"):
            dressed.detokenize(ids, steps=3, vae_image_sizes=sizes)
    assert torch.equal(dressed.detokenize(ids, steps=3, verbose=True), silent)
    assert torch.allclose(
        dressed.detokenize(ids, steps=3, verbose=True, solver="heun"),
        dressed.detokenize(ids, steps=3, solver="heun"),
    )


@pytest.mark.parametrize(
    "shape, says",
    (
        (
            (2, 3, 256, 256),
            r"images are \(2, 3, 256, 256\), and this model takes \(b, 3, 32, 32\): make them 32 px first: "
            r"fit_square\(picture, 32\)",
        ),
        ((3, 32, 32), r"images\[None\]"),
        ((2, 32, 32, 3), r"permute\(0, 3, 1, 2\)"),
        ((2, 1, 32, 32), "takes"),
        ((2, 3, 32, 64), "32 px first"),
        ((32,), "takes"),
    ),
)
def test_images_of_another_shape(dressed, shape, says):
    with pytest.raises(ValueError, match=says):
        dressed.tokenize(torch.zeros(shape))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float64))
def test_images_of_another_precision(dressed, dtype):
    x = (torch.rand(2, 3, 32, 32) * 2 - 1).to(dtype)
    assert torch.equal(dressed.tokenize(x), dressed.tokenize(x.float()))
    half = load_flextok(FIXTURES / "released_tiny", dtype=torch.bfloat16, vae=dressed.vae.to(torch.bfloat16))
    assert half.detokenize(half.tokenize(x)[:, :3], steps=2).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="uint8 .from_uint8 converts bytes"):
        dressed.tokenize(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(
    "ids",
    (
        torch.zeros(2, 4),
        torch.zeros(2, 4, dtype=torch.float16),
        [[1.9, 2.0]],
        torch.zeros(2, 4, dtype=torch.bool),
        [[True]],
    ),
    ids=str,
)
def test_ids_that_are_no_integers(dressed, ids):
    for call in (dressed.detokenize, dressed.decode_latents):
        with pytest.raises(TypeError, match="ids must be integers, not torch.*tokenize. gives int64"):
            call(ids)


def test_small_integers_are_ids(dressed):
    ids = torch.tensor([[1, 2, 3]])
    for dtype in (torch.int32, torch.int16, torch.uint8, torch.uint16):
        assert torch.equal(dressed.detokenize(ids.to(dtype), steps=2), dressed.detokenize(ids, steps=2))


def test_images_from_zero_to_one_are_noticed(dressed, monkeypatch, recwarn):
    import flextok_edu.engine.inputs as engine_inputs

    patch(monkeypatch, engine_inputs, "_warned", set())
    x = torch.rand(2, 3, 32, 32)
    for quiet in (x * 2 - 1, torch.ones(2, 3, 32, 32), torch.zeros(2, 3, 32, 32), torch.cat([x, -x])):
        dressed.tokenize(quiet)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"nothing in these images is negative.*images \* 2 - 1") as said:
        dressed.tokenize(x)
    assert said[0].filename == __file__, "the warning points at the caller"
    recwarn.clear()
    dressed.tokenize(x)
    assert not recwarn.list, "once"


def test_guidance_beyond_all_pictures(dressed):
    """It gave black pictures, and nobody was told."""
    ids = torch.zeros(1, 4, dtype=torch.int64)
    for guidance in (1e38, -1e38, lambda t: 1e10):
        with pytest.raises(ValueError, match="is out of range: use one between 1 and 20"):
            dressed.detokenize(ids, steps=2, guidance=guidance)
    with torch.no_grad():
        dressed.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN or infinity instead of pictures"):
        dressed.detokenize(ids, steps=2)


def test_nan_reaches_the_loss(dressed):
    """A training that goes wrong is stopped by what looks at losses, with its evidence; nothing before may
    fall over NaN or infinity.
    """
    for norm in (False, True):
        tok = FlexTok(replace(OWN, norm_before_fsq=norm)).train()
        for bad in (float("nan"), float("inf")):
            loss, numbers = FlowObjective(tok)(torch.full((4, 4, 8, 8), bad))
            assert not torch.isfinite(loss)
            loss.backward()

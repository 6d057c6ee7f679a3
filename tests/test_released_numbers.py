"""Our classes compute what the reference implementation computed.

Two tiny checkpoints in the layout of the released FlexTok models, and what the reference made of them in
float32 (tests/fixtures/README.md). The names are mapped by hand here; a loader for real checkpoints is
released's job.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flextok_edu.engine.config import TokenizerConfig, TrunkConfig
from flextok_edu.flow import APG
from flextok_edu.short_cuts import condition_of, null_condition_of
from flextok_edu.tokenizer import FlexTok

FIXTURES = Path(__file__).parent / "fixtures"
BLOCK = {
    "attn.wq": "attention.q",
    "attn.wk": "attention.k",
    "attn.wv": "attention.v",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.gate",
    "mlp.fc3": "mlp.up",
    "mlp.fc2": "mlp.down",
    "adaLN_modulation.1": "to_modulation.1",
}
NAMES = {
    "enc_patch_emb.patch_proj": "encoder.patches_in",
    "enc_posemb_module.posembs": "encoder.positions",
    "enc_register_module.registers": "encoder.registers",
    "enc_to_latents.proj": "encoder.head",
    "dec_from_latents.proj": "decoder.codes_in",
    "dec_latent_dropout.nullcond": "decoder.null_token",
    "dec_nested_dropout.dropout_mask_token": "decoder.mask_token",
    "dec_noise_patch_emb.patch_proj": "decoder.patches_in",
    "dec_patches_posemb_module.posembs": "decoder.positions",
    "dec_registers_posemb_module.posembs": "decoder.register_positions",
    "dec_time_embedder.mlp": "decoder.time.mlp",
    "dec_to_patches.adaLN_modulation": "decoder.to_modulation",
    "dec_to_patches.proj": "decoder.head",
}


def ours(name: str) -> str:
    """A released name in our words."""
    short = name.split("module_dict.", 1)[1]
    for part, side in (("enc_transformer.", "encoder."), ("dec_transformer.", "decoder.")):
        if short.startswith(part):
            _, number, rest = short.removeprefix(part).split(".", 2)
            kind, last = rest.rsplit(".", 1)
            return f"{side}blocks.{number}.{BLOCK[kind]}.{last}"
    found = max((k for k in NAMES if short.startswith(k)), key=len)
    return NAMES[found] + short.removeprefix(found)


@pytest.fixture(scope="module", params=("released_tiny", "released_plain"))
def case(request):
    folder = FIXTURES / request.param
    config = json.loads((folder / "config.json").read_text())
    enc, dec = (config[side]["module_dict"] for side in ("encoder", "decoder"))
    e, d, p = enc["enc_transformer"], dec["dec_transformer"], enc["enc_patch_emb"]
    tok = FlexTok(
        TokenizerConfig(
            latent_channels=p["channels_in"],
            latent_size=p["patch_sizes"][0] * enc["enc_posemb_module"]["max_sizes"][0],
            registers=enc["enc_register_module"]["n_max"],
            levels=tuple(config["regularizer"]["levels"]),
            encoder=TrunkConfig(e["dim"], e["depth"], p["patch_sizes"][0], e["head_dim"], e["mlp_ratio"]),
            decoder=TrunkConfig(d["dim"], d["depth"], p["patch_sizes"][0], d["head_dim"], d["mlp_ratio"]),
            modulations=d["adaLN_expansion"],
            max_timestep=dec["dec_time_embedder"]["max_timestep"],
            encoder_mask=enc["enc_seq_packer"]["mask_mode"],
        )
    )
    state = {ours(n): w for n, w in load_file(folder / "model.safetensors").items()}
    state["decoder.register_positions"] = state["decoder.register_positions"][0, 0].T.contiguous()
    tok.load_state_dict(state, strict=True)
    return tok.eval(), load_file(folder / "io.safetensors")


@torch.no_grad()
def test_encoder_and_tokens(case):
    tok, io = case
    assert torch.allclose(tok.encoder(io["latents"]), io["encoder_out"], atol=1e-4)
    assert torch.equal(tok.encode_latents(io["latents"]), io["tokens"])
    assert torch.equal(tok.encode_latents(io["latents"], 5), io["tokens"][:, :5])
    assert torch.allclose(tok.fsq.ids_to_codes(io["tokens"]), io["quantized"], atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("short", (False, True), ids=("plain", "short cuts"))
def test_velocity_and_hidden_states(case, short):
    tok, io = case
    codes, keep = tok.fsq.ids_to_codes(io["tokens"]), io["keep_k"]
    modulations = tok.decoder.modulations(io["t"])
    v, hidden = tok.decoder(
        io["x_t"], modulations, *condition_of(tok.decoder, codes, keep, short=short), hidden_of=1
    )
    assert torch.allclose(v, io["velocity_cond"], atol=1e-4)
    n = tok.config.patches("decoder")
    assert torch.allclose(hidden[:, :n], io["decoder_block1"][:, :n], atol=1e-4)
    for image, k in enumerate(keep.tolist()):
        assert torch.allclose(hidden[image, n : n + k], io["decoder_block1"][image, n : n + k], atol=1e-4)
    v = tok.decoder(io["x_t"], modulations, *null_condition_of(tok.decoder, 3, short))
    assert torch.allclose(v, io["velocity_uncond"], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("short", (False, True), ids=("plain", "short cuts"))
def test_samples(case, short):
    tok, io = case
    tok.short_cuts = short
    ids = [row[:k] for row, k in zip(io["tokens"], io["keep_k"].tolist())]
    noise = io["noise"]
    try:
        assert torch.allclose(tok.decode_latents(ids, noise, steps=5), io["sample_euler5"], atol=1e-3)
        assert torch.allclose(
            tok.decode_latents(ids, noise, steps=5, guidance=3.0), io["sample_cfg5"], atol=1e-3
        )
        assert torch.allclose(
            tok.decode_latents(ids, noise, steps=5, guidance=7.5, apg=APG()), io["sample_apg5"], atol=1e-3
        )
    finally:
        tok.short_cuts = True

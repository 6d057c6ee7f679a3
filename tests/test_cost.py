"""What a size costs: formulas against models, memory against real runs, and the two commands."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from flextok_edu.ar import ARModel
from flextok_edu.engine.config import AR_SIZES, PRESETS, TokenizerConfig, TrunkConfig, VAEConfig, preset
from flextok_edu.apps.bench import bench
from flextok_edu.apps.cost import (
    ar_parameters,
    decode_positions,
    describe,
    encode_positions,
    tokenizer_parameters,
    vae_parameters,
)
from flextok_edu.apps.memory import PeakMemory, on_meta, peak_bytes, training_bytes
from flextok_edu.apps.timing import BenchConfig, bench_tokenizer, in_turns, matmuls, variant
from flextok_edu.engine.marks import is_ours
from flextok_edu.objective import FlowObjective
from flextok_edu.tokenizer import FlexTok
from flextok_edu.vae import VAE

ROOT = Path(__file__).resolve().parent.parent
ODD = TokenizerConfig(
    5,
    12,
    7,
    (7, 5, 5),
    TrunkConfig(48, 2, 3, 16, 3.0),
    TrunkConfig(96, 3, 2, 32, 2.5),
    modulations=1,
    time_features=64,
)


def count(build):
    return sum(w.numel() for w in on_meta(build).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_presets(name):
    p = PRESETS[name]
    parts = on_meta(lambda: FlexTok(p.tokenizer))
    assert tokenizer_parameters(p.tokenizer) == {
        side: sum(w.numel() for w in getattr(parts, side).parameters()) for side in ("encoder", "decoder")
    }
    assert sum(ar_parameters(p.ar).values()) == count(lambda: ARModel(p.ar))
    vae = on_meta(lambda: VAE(p.vae))
    assert vae_parameters(p.vae) == {
        side: sum(w.numel() for w in getattr(vae, side).parameters()) for side in ("encoder", "decoder")
    }


def test_parameters_of_odd_sizes():
    assert sum(tokenizer_parameters(ODD).values()) == count(lambda: FlexTok(ODD))
    for config in (
        VAEConfig(1, 3, (8, 16), 3, 2, 4, False),
        VAEConfig(3, 8, (16,), 1, 1, 8),
        VAEConfig(latent_channels=8, channels=(32, 32, 64), layers=1),
    ):
        assert sum(vae_parameters(config).values()) == count(lambda: VAE(config))


def test_the_papers_numbers():
    """FACTS.md: 84.9 M, 286.7 M, 1.08 B a trunk, as much again in the decoder's modulations; VAE about 84 M;
    AR sizes by name.
    """
    for name, trunks in (
        ("d12_d12", (84.9e6, 84.9e6)),
        ("d18_d18", (286.7e6, 286.7e6)),
        ("d18_d28", (286.7e6, 1.08e9)),
    ):
        found, c = tokenizer_parameters(PRESETS[name].tokenizer), PRESETS[name].tokenizer
        assert (
            (c.encoder.width, c.decoder.width) == (64 * c.encoder.depth, 64 * c.decoder.depth)
            and c.registers == 256
            and c.vocabulary == 64_000
            and c.patches("encoder") == c.patches("decoder") == 256
        )
        assert (
            abs(found["encoder"] / trunks[0] - 1) < 0.01
            and abs(found["decoder"] / (2 * trunks[1]) - 1) < 0.02
        )
    for channels in (4, 8, 16):
        assert abs(sum(vae_parameters(VAEConfig(latent_channels=channels)).values()) / 84e6 - 1) < 0.01
    for name, config in AR_SIZES.items():
        assert (
            abs(
                ar_parameters(config)["blocks"]
                / (float((n := name.removesuffix("-text"))[:-1]) * {"M": 1e6, "B": 1e9}[n[-1]])
                - 1
            )
            < 0.01
        )


def test_positions():
    c = PRESETS["d12_d12"].tokenizer
    assert decode_positions(c, 8, True) == (265, 257) and decode_positions(c, 8, True, short=False) == (
        512,
        512,
    )  # DESIGN.md's example
    assert decode_positions(c, 256, True) == (512, 257) and decode_positions(c, 8, False) == (265,)
    assert encode_positions(c, 8) == 264 and encode_positions(replace(c, encoder_mask="full"), 8) == 512


def test_peak_memory_counts_storages():
    a = torch.zeros(1000)
    with PeakMemory() as peak:
        peak.hold(a)
        b = a + 1  # 8,000 bytes live
        c = b.view(10, 100)  # a view is no new storage
        del b
        d = c * 2  # 12,000
        del c, d
        e = a * 3  # 8,000 again
    assert peak.most == 12_000 and peak.live == 8_000
    del e
    assert peak.live == 4_000


@pytest.mark.parametrize(
    "build,loss",
    (
        (lambda: FlexTok(PRESETS["micro"].tokenizer), lambda m: FlowObjective(m)(torch.randn(3, 4, 8, 8))[0]),
        (
            lambda: VAE(PRESETS["micro"].vae),
            lambda m: m.decode(m.encode(torch.randn(2, 3, 32, 32))).square().mean(),
        ),
        (
            lambda: ARModel(PRESETS["micro"].ar),
            lambda m: m.loss(torch.zeros(4, 16, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))[0],
        ),
    ),
    ids=("tokenizer", "VAE", "AR"),
)
def test_memory_predicted_is_memory_used(build, loss):
    """Fake tensors need as much as real ones. (The optimiser's share is a product.)"""
    torch.manual_seed(0)
    model = build()
    real = peak_bytes(model, lambda: loss(model).backward())
    fake = training_bytes(build, loss) - 12 * sum(w.numel() for w in model.parameters())
    assert abs(fake / real - 1) < 0.05


@pytest.mark.parametrize("name", ("micro", "d18_d28"))
def test_info(name):
    page = describe(preset(name))
    assert all(
        word in page
        for word in (
            "VAE",
            "tokenizer",
            "AR model",
            "GFLOPs an image",
            "memory of a training step",
            "memory of decoding",
        )
    )
    assert "nan" not in page and "inf" not in page.replace("info", "")


def test_info_command():
    def run(*names):
        return subprocess.run(
            [sys.executable, "-c", "from flextok_edu.apps.cost import info_main; info_main()", *names],
            capture_output=True,
            text=True,
            timeout=400,
            cwd=ROOT,
        )

    assert (
        "usage: flextok_info" in run().stdout
        and "d18_d28" in run("--help").stdout
        and "usage" in run("--help").stdout
    )
    assert run("tiny").stdout.startswith("tiny: 64 px")
    wrong = run("huge")
    assert wrong.returncode == 1 and "choose one of micro" in wrong.stderr and "Traceback" not in wrong.stderr


def test_bench_command(tmp_path):
    def run(*words):
        return subprocess.run(
            [sys.executable, "-c", "from flextok_edu.apps.bench import bench_main; bench_main()", *words],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=ROOT,
        )

    done = run(
        "decode",
        "--preset",
        "micro",
        "--device",
        "cpu",
        "--budgets",
        "1",
        "16",
        "--variants",
        "plain",
        "short",
        "short+together",
        "short+bf16",
        "--steps",
        "2",
        "--repeats",
        "2",
        "--adamw",
        "--out",
        str(tmp_path / "b.json"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert [(r["budget"], r["variant"]) for r in rows] == [
        (k, v) for k in (1, 16) for v in ("plain", "short", "short+together", "short+bf16")
    ]
    assert all(
        r["seconds_low"] <= r["seconds"] <= r["seconds_high"]
        and r["images_per_second"] > 0
        and 0 < r["share_of_matmul"]
        for r in rows
    )
    assert (
        all(r["difference"] < 1e-4 for r in rows if "bf16" not in r["variant"]) and rows[3]["difference"] > 0
    )
    assert rows[1]["positions"] == 2 * (16 + 1 + 1 + 16 + 1) and rows[0]["positions"] == 2 * 2 * 32
    assert is_ours(tmp_path / "b.json"), "so the next measurement may take its place"
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    kept = run("decode", "--preset", "micro", "--device", "cpu", "--out", str(tmp_path / "mine.json"))
    assert (
        kept.returncode == 1
        and "--force" in kept.stderr
        and not kept.stdout
        and (tmp_path / "mine.json").read_text() == '{"mine": 1}'
    ), "refused before anything is measured"
    for words, status, says in (
        (("decode", "--variants", "quick"), 1, "use plain"),
        (("paint",), 2, "invalid choice 'paint'"),
        ((), 2, "{decode,encode,train,generate}"),
        (("encode", "--preset", "micro", "--budgets", "17"), 1, "1 .. 16"),
    ):
        wrong = run(*words)
        assert wrong.returncode == status and says in wrong.stderr and "Traceback" not in wrong.stderr, (
            wrong.stderr[-500:]
        )


def test_bench_train_and_encode():
    small = BenchConfig("micro", "cpu", batch=1, budgets=(3,), variants=("plain",), repeats=1, steps=1)
    rows = bench("train", small, say=lambda text: None) + bench("encode", small, say=lambda text: None)
    assert (
        [r["what"] for r in rows] == ["train", "encode"]
        and math.isnan(rows[0]["difference"])
        and rows[0]["peak_gb"] > rows[1]["peak_gb"] > 0
    )


def test_a_variant_is_taken_back():
    tok = bench_tokenizer(BenchConfig("micro", "cpu"))
    with pytest.raises(RuntimeError):
        with variant(tok, "plain+together"):
            assert (tok.short_cuts, tok.guidance_together) == (False, True)
            raise RuntimeError
    assert (tok.short_cuts, tok.guidance_together) == (True, None)
    assert all(w.detach().any() for w in tok.parameters() if w.ndim > 1), (
        "no gate is shut: what is timed and compared depends on everything"
    )


def test_in_turns_takes_turns():
    order = []
    times = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2)
    assert order == ["a", "b"] * 3 and len(times["a"]) == len(times["b"]) == 2
    run, flops = matmuls(TrunkConfig(64, 1), 10, blocks=1)
    run()
    assert flops == 2 * 10 * (4 * 64 * 64 + 3 * 64 * 170)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_on_cuda():
    tok = FlexTok(PRESETS["small"].tokenizer).cuda()
    latents = torch.randn(2, 8, 16, 16, device="cuda")
    FlowObjective(tok)(latents)[0].backward()
    nn.Module.zero_grad(tok)
    torch.cuda.reset_peak_memory_stats()
    FlowObjective(tok)(latents)[0].backward()
    predicted = training_bytes(
        lambda: FlexTok(PRESETS["small"].tokenizer), lambda m: FlowObjective(m)(torch.randn(2, 8, 16, 16))[0]
    ) - 12 * sum(w.numel() for w in tok.parameters())
    assert abs(torch.cuda.max_memory_allocated() / predicted - 1) < 0.2

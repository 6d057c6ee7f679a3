"""The systems beside FlexTok: what makes each of them what it is, with the bug that each check must find; and
that commands, caches, AR models and evaluation take all of them.
"""

import json
from dataclasses import replace

import pytest
import torch
from planting import planted, randomize

from flextok_edu.apps import studies
from flextok_edu.apps.studies import STUDIES, Job, Study, collect_results, study_all
from flextok_edu.engine.config import preset
from flextok_edu.engine.tokenizers import TOKENIZERS, load_any_tokenizer, tokenizer_class
from flextok_edu.flow import mix, velocity_target
from flextok_edu.objective import FlowObjective, sample_training_noise
from flextok_edu.systems import grid, pixels, tail_drop, titok
from flextok_edu.systems.common import FlowSystem, equal_flops, training_flops
from flextok_edu.tokenizer import FlexTok, save_tokenizer
from flextok_edu.training import Latents, fresh_tokenizer, train_tokenizer

MICRO = preset("micro")
SYSTEMS = [kind for kind in TOKENIZERS if issubclass(tokenizer_class(kind), FlowSystem)]


def small(kind, **changes):
    """A random system with big weights."""
    torch.manual_seed(0)
    return randomize(fresh_tokenizer(replace(MICRO, system=kind, **changes), None))


def latents(tok, b=2):
    return torch.randn(b, *tok.config.latent_shape, generator=torch.Generator().manual_seed(1))


# --- each system is what it is


def reach(tok, j):
    """Which registers move when register j is exchanged."""
    x = latents(tok)
    with torch.no_grad():
        before = tok.encoder(x)
        tok.encoder.registers[j].copy_(torch.randn_like(tok.encoder.registers[j]))
        return ((tok.encoder(x) - before).abs().amax((0, 2)) > 1e-4).tolist()


def check_titok_sees_everything():
    assert all(reach(small("titok"), 15)) and reach(small("flextok"), 15) == [False] * 15 + [True]


def check_titok_never_drops():
    tok = small("titok")
    assert (sample_training_noise(tok.config, 200).budget == 16).all()
    FlowObjective(tok)(latents(tok, 16))[0].backward()
    assert tok.decoder.mask_token.grad is None or not tok.decoder.mask_token.grad.any()
    assert tok.encoder.registers.grad.abs().sum(1).gt(0).all()


def check_titok_has_one_length():
    tok = small("titok")
    ids = tok.encode_latents(latents(tok))
    for wrong in (
        lambda: tok.encode_latents(latents(tok), 8),
        lambda: tok.decode_latents(ids[:, :8], steps=1),
    ):
        with pytest.raises(ValueError, match="16 tokens"):
            wrong()
    assert tok.token_counts == (16,)


def check_tail_drop_sees_and_drops():
    tok = small("tail_drop")
    assert all(reach(tok, 15))
    budget = sample_training_noise(tok.config, 8000).budget
    assert budget.bincount(minlength=17)[1:].min() > 350  # 500 each: evenly


def check_grid_codes_stand_at_their_places():
    tok = small("grid")
    randomize(tok, 0.05)
    codes = torch.randn(1, 16, 4, requires_grad=True)
    v = tok.decoder(
        torch.zeros(1, 4, 8, 8), tok.decoder.modulations(torch.ones(1)), tok.decoder.condition(codes, 16)
    )
    for i in range(16):  # cell i of the latents, in raster order
        cell = v[..., i // 4 * 2 : i // 4 * 2 + 2, i % 4 * 2 : i % 4 * 2 + 2]
        pull = torch.autograd.grad(cell.sum(), codes, retain_graph=True)[0][0].norm(dim=-1)
        assert pull.argmax() == i


def check_grid_reads_its_own_place():
    tok = small("grid")
    randomize(tok, 0.05)
    x = latents(tok, 1)
    for i in (1, 6, 12):
        y = x.clone()
        y[..., i // 4 * 2 : i // 4 * 2 + 2, i % 4 * 2 : i % 4 * 2 + 2] += 3 * torch.randn(2, 2)
        assert (tok.encoder(y) - tok.encoder(x)).norm(dim=-1)[0].argmax() == i


def check_raw_grid_fills_with_id_zero():
    tok = small("grid", tokenizer=replace(MICRO.tokenizer, budget_distribution="full"))
    ids, start = torch.randint(1, 1000, (2, 16)), torch.randn(2, 4, 8, 8)
    zeros = torch.cat([ids[:, :5], torch.zeros_like(ids[:, 5:])], 1)
    short, whole = tok.decode_latents(ids[:, :5], start, steps=2), tok.decode_latents(zeros, start, steps=2)
    assert torch.allclose(short, whole, atol=1e-4)
    mixed = tok.decode_latents([ids[0], ids[1, :5]], start, steps=2)
    assert torch.allclose(mixed[1], whole[1], atol=1e-4)
    assert torch.allclose(mixed[0], tok.decode_latents(ids, start, steps=2)[0], atol=1e-4)


def check_grid_mask_hides_what_is_missing():
    tok = small("grid")
    ids, start = torch.randint(1, 1000, (2, 16)), torch.randn(2, 4, 8, 8)
    zeros = torch.cat([ids[:, :5], torch.zeros_like(ids[:, 5:])], 1)
    short = tok.decode_latents(ids[:, :5], start, steps=2)
    assert not torch.allclose(short, tok.decode_latents(zeros, start, steps=2), atol=1e-3)
    FlowObjective(tok)(latents(tok, 16), budget=5)[0].backward()
    assert tok.decoder.mask_token.grad.any()  # it is trained


def check_pixels_predict_pictures():
    tok = small("pixels")
    x, noise, t = (
        torch.rand(4, 3, 32, 32) * 2 - 1,
        torch.randn(4, 3, 32, 32),
        torch.tensor([0.06, 0.3, 0.7, 1.0]),
    )
    tok.decoder.clean = lambda *_: x
    v = tok.decoder(mix(x, noise, t), tok.decoder.modulations(t), None)
    assert torch.allclose(v, velocity_target(x, noise), atol=1e-4)
    early = tok.decoder(mix(x, noise, t * 0), tok.decoder.modulations(t * 0), None)
    assert torch.isfinite(early).all()


def causal_titok(monkeypatch):
    monkeypatch.setattr(titok.TiTok, "settings", {"budget_distribution": "full"})


def dropping_titok(monkeypatch):
    monkeypatch.setattr(titok.TiTok, "settings", {"encoder_mask": "full"})


def lenient_titok(monkeypatch):
    monkeypatch.setattr(titok.TiTok, "_check_length", lambda *_: None)


def powers_instead(monkeypatch):
    settings = {"encoder_mask": "full", "budget_distribution": "powers_of_two"}
    monkeypatch.setattr(tail_drop.TailDrop, "settings", settings)


def columns_first(monkeypatch):
    right = grid.GridDecoder.forward

    def forward(self, x_t, modulations, registers, *rest, **named):
        turned = registers.unflatten(1, self.grid).transpose(1, 2).flatten(1, 2)
        return right(self, x_t, modulations, turned, *rest, **named)

    monkeypatch.setattr(grid.GridDecoder, "forward", forward)


def turned_encoder(monkeypatch):
    right = grid.GridEncoder.forward
    monkeypatch.setattr(
        grid.GridEncoder, "forward", lambda self, x, budget=None: right(self, x.transpose(2, 3), budget)
    )


def mask_in_raw(monkeypatch):
    monkeypatch.setattr(grid.Grid, "raw", property(lambda self: False))


def zeros_in_masked(monkeypatch):
    monkeypatch.setattr(grid.Grid, "raw", property(lambda self: True))


def wrong_sign(monkeypatch):
    right = pixels.PixelDecoder.forward
    monkeypatch.setattr(pixels.PixelDecoder, "forward", lambda self, *a: -right(self, *a))


def divides_by_nothing(monkeypatch):
    monkeypatch.setattr(pixels, "EARLIEST", 0.0)


test_systems, test_system_bugs = planted(
    [
        (check_titok_sees_everything, causal_titok),
        (check_titok_never_drops, dropping_titok),
        (check_titok_has_one_length, lenient_titok),
        (check_tail_drop_sees_and_drops, powers_instead),
        (check_grid_codes_stand_at_their_places, columns_first),
        (check_grid_reads_its_own_place, turned_encoder),
        (check_raw_grid_fills_with_id_zero, mask_in_raw),
        (check_grid_mask_hides_what_is_missing, zeros_in_masked),
        (check_pixels_predict_pictures, wrong_sign),
        (check_pixels_predict_pictures, divides_by_nothing),
    ]
)


# --- what they share


@pytest.mark.parametrize("kind", SYSTEMS)
def test_files_batches_and_autocast(kind, tmp_path):
    tok = small(kind).eval()
    save_tokenizer(tmp_path, tok)
    again, facts = load_any_tokenizer(tmp_path)
    assert facts["kind"] == kind and type(again) is tokenizer_class(kind) and again.identity == tok.identity
    x = latents(tok, 3)
    ids = tok.encode_latents(x)
    assert torch.equal(torch.cat([tok.encode_latents(x[i : i + 1]) for i in range(3)]), ids)
    noise = torch.randn(3, *tok.config.latent_shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tok.encode_latents(x).shape == ids.shape
        assert torch.isfinite(tok.decode_latents(ids, noise, steps=2)).all()


@pytest.mark.parametrize("kind", SYSTEMS)
def test_settings_are_its_own(kind):
    system = tokenizer_class(kind)
    for name, wanted in system.settings.items():
        other = {"full": "causal_last", "uniform": "full", 3: 5, 1: 2}.get(wanted, "full")
        config = replace(system.settings_for(MICRO), **{name: other})
        with pytest.raises(ValueError, match=name):
            system(config)


@pytest.mark.parametrize("kind", [k for k in SYSTEMS if not hasattr(tokenizer_class(k), "fit")])
def test_training_lowers_the_loss(kind):
    few = replace(MICRO.train_tokenizer, steps=12, batch=16, warmup=2)
    p = replace(MICRO, system=kind, train_tokenizer=few)
    means = torch.randn(16, 4, 1, 1).expand(16, 4, 8, 8) + torch.zeros(16, 4, 8, 8)  # one colour each
    tok, log = train_tokenizer(Latents(means), None, p, device="cpu", progress=False)
    assert isinstance(tok, tokenizer_class(kind)) and log[-1]["tokenizer"] < log[0]["tokenizer"]


def test_flextok_warns_and_others_do_not(recwarn):
    for kind in ("titok", "tail_drop", "grid"):
        small(kind)
    assert not [w for w in recwarn if "short cut 1" in str(w.message)]
    with pytest.warns(UserWarning, match="short cut 1"):
        FlexTok(replace(MICRO.tokenizer, encoder_mask="full"))


# --- equal arithmetic, and studies


def test_every_run_of_the_study_computes_as_much():
    want = training_flops(MICRO)
    for name in STUDIES["baselines"].runs:
        assert abs(training_flops(STUDIES["baselines"].preset(name, MICRO)) / want - 1) < 0.1, name


def test_what_cannot_be_equal_says_so():
    tiny = replace(MICRO, tokenizer=replace(MICRO.tokenizer, registers=1))
    wide = replace(tiny.tokenizer.encoder, width=1024)
    with pytest.raises(ValueError, match="width"):
        equal_flops(replace(tiny, tokenizer=replace(tiny.tokenizer, encoder=wide)), MICRO)


class Process:
    """In the place of one: writes a result, or fails."""

    alone = []  # those that began without the models that a seed shares

    def __init__(self, folder, job, log):
        self.returncode, self.terminated = None, False
        if not (folder / job.key / "vae" / "config.json").exists():
            Process.alone.append(job.key)
        log.append(job.key)
        self.folder, self.job = folder, job

    def poll(self):
        if self.job.name == "broken":
            self.returncode = 1
        else:
            for part in ("vae", "classifier"):
                (self.folder / self.job.key / part).mkdir(parents=True, exist_ok=True)
                (self.folder / self.job.key / part / "config.json").write_text("{}")
            file = self.job.result(self.folder)
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({"run": self.job.name, "seed": self.job.seed, "minutes": 1.0}))
            self.returncode = 0
        return self.returncode

    def wait(self):
        return self.returncode

    def terminate(self):
        self.terminated = True


@pytest.fixture
def begun(monkeypatch):
    log = []
    monkeypatch.setattr(Process, "alone", [])
    monkeypatch.setattr(studies, "_begin", lambda folder, job, threads: Process(folder, job, log))
    monkeypatch.setitem(STUDIES, "toy", Study({"first": (), "broken": (), "other": ()}, "a toy", equal=False))
    monkeypatch.setattr(studies.time, "sleep", lambda _: None)
    return log


def test_study_goes_on_and_shares_and_survives_failures(begun, tmp_path, capsys):
    o = studies.StudyOptions(action="run", study="toy", out=str(tmp_path), seeds=2, beside=2)
    assert study_all(o) == 1  # something failed
    assert begun[0] == "first-0" and sorted(begun) == sorted(
        f"{name}-{seed}" for name in ("first", "broken", "other") for seed in (0, 1)
    )
    assert (tmp_path / "other-1" / "vae" / "config.json").exists()  # shared before it began
    assert "broken-0, broken-1" in capsys.readouterr().err
    begun.clear()
    assert study_all(o) == 1 and sorted(begun) == ["broken-0", "broken-1"]  # nothing is done twice
    assert collect_results(tmp_path, tmp_path / "all.json", "toy") == 4
    found = json.loads((tmp_path / "all.json").read_text())
    assert {(r["run"], r["seed"]) for r in found["runs"]} == {
        (n, s) for n in ("first", "other") for s in (0, 1)
    }


def test_interrupted_study_stops_its_processes(begun, tmp_path, monkeypatch):
    made = []

    def begin(folder, job, threads):
        made.append(Process(folder, job, []))
        made[-1].poll = lambda: None
        return made[-1]

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "_begin", begin)
    monkeypatch.setattr(studies.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        studies.run_all(tmp_path, [Job("first", 0, MICRO), Job("first", 1, MICRO)], beside=2)
    assert len(made) == 2 and all(p.terminated for p in made)


def test_one_real_run(tmp_path):
    """Train, write, measure one small system as the study does it: `one_run` without a process of its own."""
    few = {
        f"train_{s}": replace(getattr(MICRO, f"train_{s}"), steps=3)
        for s in ("vae", "classifier", "tokenizer", "ar")
    }
    p = replace(
        MICRO, system="grid", train_images=60, evaluate=replace(MICRO.evaluate, images=12, samples=12), **few
    )
    found = studies.one_run(tmp_path, Job("grid", 0, p))
    assert found["system"] == "grid" and found["token_counts"] == [1, 2, 4, 8, 16]
    assert len(found["nats"]["ar"]) == 16 and found["flops"] > 1e6
    assert {r.get("tokens") for r in found["rows"] if r["what"] == "samples"} == {1, 2, 4, 8, 16}
    assert (tmp_path / "results" / "grid-0.png").exists()
    assert studies.one_run(tmp_path, Job("grid", 0, p)) == json.loads(
        json.dumps(found)
    )  # read, not made again


def test_wrong_words():
    for o, words in (
        (studies.StudyOptions(action="run", study="none"), "no study"),
        (studies.StudyOptions(action="run", seeds=0), "--seeds 0"),
        (studies.StudyOptions(action="run", only=("nobody",), out="runs/nobody"), "nobody"),
    ):
        with pytest.raises(studies.UsageError, match=words):
            study_all(o)

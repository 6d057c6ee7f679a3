"""The seams: what is given twice is refused, what is known is not computed again, what is new fits in."""

import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from planting import patch

import flextok_edu.engine.tokenizers as engine_tokenizers
from flextok_edu.ar import ARModel, sample_images
from flextok_edu.engine.binding import bind_tokenizer
from flextok_edu.engine.config import ARConfig, StageConfig, TokenizerConfig, TrunkConfig, preset
from flextok_edu.engine.loader import Loader
from flextok_edu.engine.long_run import Checkpointer
from flextok_edu.engine.runtime import Runtime, fold
from flextok_edu.engine.tokenizers import Tokenizer, known_identity
from flextok_edu.engine.trainer import Callback, Objective, SingleDevice, Trainer, fit
from flextok_edu.flow import SamplingConfig
from flextok_edu.tokenizer import FlexTok
from flextok_edu.vae import VAE

SMALL = TokenizerConfig(4, 8, 8, (8, 5, 5, 5), TrunkConfig(64, 1), TrunkConfig(64, 1))


def line(rows=64):
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    objective = Objective(
        "line", lambda x, _: (model(x).square().mean(), {}), list(model.named_parameters()), StageConfig()
    )
    return objective, Loader(rows, 8, lambda rows, positions, step: torch.ones(len(rows), 2))


# --- one object for what belongs together


def test_a_precision_beside_a_trainer_is_refused():
    objective, loader = line()
    with pytest.raises(
        ValueError, match="bfloat16 was asked for beside a trainer that computes in torch.float32"
    ):
        fit([objective], loader, 2, trainer=Trainer(), precision=torch.bfloat16, progress=False)
    half = Trainer(SingleDevice("cpu", torch.bfloat16))
    fit([objective], loader, 2, trainer=half, precision=torch.bfloat16, progress=False)


def test_settings_by_name_and_by_object():
    few = SamplingConfig(steps=4, guidance=2.0)
    assert SamplingConfig.of(few, {"solver": "heun"}) == SamplingConfig(4, 2.0, solver="heun")
    assert (
        SamplingConfig.of(None, {"timesteps": 4, "guidance_scale": 2.0, "perform_norm_guidance": None}) == few
    )
    assert Runtime.of(Runtime(seed=1), {"device": "meta"}) == Runtime(1, "meta")
    with pytest.raises(TypeError, match="there is no setting 'stepz'; SamplingConfig has apg, guidance"):
        SamplingConfig.of(None, {"stepz": 3})
    with pytest.raises(ValueError, match="steps was given twice"):
        SamplingConfig.of(None, {"steps": 3, "timesteps": 4})
    with pytest.raises(TypeError, match="4 is no SamplingConfig: give its settings by name, steps="):
        FlexTok(SMALL, VAE(preset("micro").vae)).detokenize(torch.zeros(1, 2, dtype=torch.int64), sampling=4)
    with pytest.raises(ValueError, match="solver 'rk4': use one of"):
        SamplingConfig(solver="rk4")
    assert fold(Runtime, None, {}) == Runtime()


# --- processes agree when numbers are summed anyway, not in every step


class Two(SingleDevice):
    """Two processes, of which the other does as this one; it counts how often they wait for each other."""

    world = 2

    def __init__(self):
        super().__init__("cpu")
        self.waits = 0

    def total(self, x):
        self.waits += 1
        return 2 * x


@pytest.mark.parametrize("steps", (None, 7))
def test_processes_do_not_wait_in_every_step(tmp_path, steps):
    objective, loader = line()
    backend = Two()
    Trainer(backend, Checkpointer(tmp_path, steps=steps)).fit(
        *training(objective, loader, 41), progress=False
    )
    looked = 5  # steps 0, 10, 20, 30, 40: one sum for the log, one to agree
    assert backend.waits <= 2 * looked, "a step that nobody looks at does not wait"
    counted = {7, 14, 21, 28, 35, 41} if steps else {41}
    found = {int(f.stem[5:]) for f in (tmp_path / "checkpoints").glob("step-*")}
    assert found == set(sorted(counted)[-2:]), "what is counted in steps is saved at exactly these"


def training(objective, loader, steps):
    from flextok_edu.engine.trainer import Training

    return (Training([objective], loader, steps, None, "line"),)


def test_a_signal_is_heard_by_all_at_the_next_look(tmp_path):
    from flextok_edu.engine.long_run import Stopped

    class Asks(Callback):
        def step(self, training, backend, looked):
            if training.done == 13:
                checkpointer.asked = 15

    objective, loader = line()
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(Stopped, match="after step 21 of 41"):
        Trainer(Two(), checkpointer, [Asks()]).fit(*training(objective, loader, 41), progress=False)


def test_callbacks_in_their_order():
    seen = []

    class Looks(Callback):
        @contextmanager
        def around(self, training, backend):
            seen.append("around")
            yield
            seen.append("after")

        def begin(self, training, backend):
            seen.append("begin")

        def row(self, training, backend, row):
            return {"twice": 2 * row["line"]}

        def step(self, training, backend, looked):
            seen.append(training.done)

    objective, loader = line()
    log = Trainer(callbacks=[Looks()]).fit(*training(objective, loader, 3), every=2, progress=False)
    assert seen == ["around", "begin", 1, 2, 3, "after"]
    assert [r["step"] for r in log] == [0, 2] and all(r["twice"] == 2 * r["line"] for r in log)


# --- a tokenizer says what it is


def test_flextok_keeps_the_protocol():
    tok = FlexTok(SMALL, VAE(preset("micro").vae))
    assert isinstance(tok, Tokenizer) and tok.kind == "flextok" and tok.token_counts == (1, 2, 4, 8)
    assert (tok.vocabulary, tok.length, tok.image_size) == (1000, 8, 32)
    assert tok.identity == known_identity(tok)


def test_the_warning_of_a_full_mask_names_the_line_that_asked(tmp_path):
    from dataclasses import replace

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FlexTok(replace(SMALL, encoder_mask="full"))
    (said,) = [w for w in caught if "encoder_mask" in str(w.message)]
    assert said.filename == __file__, said.filename


def test_weights_are_hashed_once(monkeypatch):
    """Every picture of a class checks whose ids it decodes; the weights are read once, until changed."""
    tok = FlexTok(SMALL, VAE(preset("micro").vae)).eval()
    ar = ARModel(ARConfig(tok.vocabulary, tok.length, 3, 64, 1)).eval()
    bind_tokenizer(ar, tok)
    real, count = engine_tokenizers.weights_hash, []
    patch(monkeypatch, engine_tokenizers, "weights_hash", lambda m: count.append(1) or real(m))
    for _ in range(3):
        sample_images(ar, tok, torch.tensor([0, 1]), 2, steps=1)
    assert not count, "known since it was bound"
    with torch.no_grad():
        tok.decoder.mask_token.add_(1)
    with pytest.raises(ValueError, match="writes ids of tokenizer"):
        sample_images(ar, tok, torch.tensor([0, 1]), 2, steps=1)
    with torch.no_grad():
        tok.decoder.mask_token.sub_(1)
    tok.vae.decoder.load_state_dict({k: v + 1 for k, v in tok.vae.decoder.state_dict().items()})
    with pytest.raises(ValueError, match="writes ids of tokenizer"):
        sample_images(ar, tok, torch.tensor([0, 1]), 2, steps=1)
    assert len(count) >= 2


def test_what_silences_the_other_processes_is_closed(monkeypatch, tmp_path):
    """Of several processes one talks; the others write nowhere, and do not leave that open."""
    import accelerate

    from flextok_edu.apps import train as module
    from flextok_edu.apps.training import TrainOptions

    opened = []

    def remembered(*args, **named):
        opened.append(open(*args, **named))
        return opened[-1]

    class Second:
        is_main_process = False

        def __init__(self, **named):
            pass

        def wait_for_everyone(self):
            print("nobody hears this")
            raise KeyboardInterrupt

    monkeypatch.setattr(accelerate, "PartialState", Second)
    monkeypatch.setattr(module, "open", remembered, raising=False)
    with pytest.raises(KeyboardInterrupt):
        module.train(TrainOptions(stage="vae", preset="micro", train_images=20, out=str(tmp_path / "x")))
    assert [f.name for f in opened] == ["/dev/null"] and all(f.closed for f in opened)

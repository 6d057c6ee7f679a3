"""Recorded or not, the same numbers: by a recorder that lists operations, and on a GPU where there is one."""

import contextlib
import gc
import math

import long_run
import pytest
import torch
from planting import patch, planted, randomize
from test_devices import AR_SMALL, TOK_SMALL, on_fake_cuda
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from flextok_edu import flow
from flextok_edu.ar import ARModel
from flextok_edu.data.datasets import load_data
from flextok_edu.data.features import train_classifier
from flextok_edu.engine import long_run as keeping
from flextok_edu.engine import optim, trainer as training_loop
from flextok_edu.engine.config import StageConfig
from flextok_edu.engine.distributed import Distributed
from flextok_edu.engine.files import weights_hash
from flextok_edu.engine.graphs import CUDARecorder, Graphs, OpRecorder, held_by, places
from flextok_edu.engine.loader import Loader
from flextok_edu.engine.trainer import Objective, SingleDevice, Trainer, fit
from flextok_edu.engine.writing import Writer, _Sheet, _step
from flextok_edu.flow import APG, SamplingConfig
from flextok_edu.fsq import RunningNorm
from flextok_edu.objective import FlowObjective, sample_training_noise
from flextok_edu.sampling import TokenSampling
from flextok_edu.short_cuts import GuidedVelocity
from flextok_edu.tokenizer import FlexTok

STAGES = ("vae", "classifier", "tokenizer", "ar")
GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


def named(settings):
    """For the tests' names: the same in every process, also for functions."""
    return ",".join(f"{k}={getattr(v, '__name__', v)}" for k, v in settings.items()) or "plain"


def listed(keep=8, warm=1, enabled=True):
    return Graphs(enabled, keep, warm, OpRecorder())


class Remembering(Graphs):
    """Recordings are given up with their phase and with the training: the tests want to see them."""

    def clear(self):
        self.all = getattr(self, "all", {}) | self.recordings
        self.all_refused = getattr(self, "all_refused", set()) | self.refused
        super().clear()


def backend(recorded, kind=SingleDevice, **options):
    """As on a GPU: what changes from step to step is a tensor; recorded, or with the same arithmetic not."""
    made = kind("cpu", **options)
    made.tensors, made.graphs = True, Remembering(recorded, 24, 2, OpRecorder())
    return made


def kinds(graphs):
    """What was recorded of a training: gradients, updates."""
    found = (key[0] if isinstance(key[0][0], str) else key[0][0] for key in graphs.all)
    return {name[0] for name in found}


def stage(name, trainer, steps=14, **options):
    if name != "classifier":
        return long_run.stage(name, steps, trainer=trainer, **options)
    data = load_data("scenes", 16, 40, 4, progress=False)[0]
    return train_classifier(data, StageConfig(steps=steps, batch=4), trainer=trainer, progress=False)


# --- training ------------------------


def same_training(name="tokenizer", optimizer="muon", kind=SingleDevice, **options):
    """The backend that recorded, after its weights and losses were compared with one that did not."""
    torch.set_num_threads(1)
    made = []
    for recorded in (False, True):
        b = backend(recorded, kind, **options)
        how = {} if name == "classifier" else {"optimizer": optimizer}
        model, log = stage(name, Trainer(b), **how)
        made.append((weights_hash(model), [{k: v for k, v in row.items() if k != "seconds"} for row in log]))
    assert not b.graphs.all_refused, "something could not be recorded"
    assert not b.graphs.recordings, "what comes after wants their memory"
    assert made[0] == made[1]
    return b


@pytest.mark.parametrize("name", STAGES)
def test_a_recorded_training_is_the_training(name):
    b = same_training(name)
    replayed = [r for r in b.graphs.all.values() if r.replay]
    # the adversary comes in the middle of the VAE's training: another loss, other recordings; batches of the
    # tokenizer have several lengths; the AR model's accuracy is only computed when somebody looks
    assert len(replayed) == {"vae": 4, "tokenizer": 3}.get(name, 2)


def test_micro_batches_have_one_recording_a_length():
    b = same_training("tokenizer", kind=Distributed, micro=3)
    lengths = [key[0][1][1][-1] for key in b.graphs.all if key[0][0][0] == "gradients"]
    assert len(set(lengths)) > 1 and all(n in (1, 2, 4, 8) for n in lengths)


def record_everything():
    same_training("tokenizer")


def record_the_classifier():
    same_training("classifier")


def rate_is_a_number(monkeypatch):
    real = optim.make_optimizers
    patch(monkeypatch, optim, "make_optimizers", lambda named, config, recorded=False: real(named, config))


def average_by_a_number(monkeypatch):
    def prepared(self, training, real=SingleDevice.prepared):
        with real(self, training):
            training.ema.weight = 1.0
            yield

    monkeypatch.setattr(SingleDevice, "prepared", contextlib.contextmanager(prepared))


def gradients_are_left(monkeypatch):
    def ready(self, training, objective, real=SingleDevice.ready):
        before = [None if w.grad is None else w.grad.clone() for _, w in objective.parameters]
        real(self, training, objective)
        if self.graphs.enabled:
            for (_, w), g in zip(objective.parameters, before):
                if g is not None:
                    w.grad.copy_(g)

    monkeypatch.setattr(SingleDevice, "ready", ready)


def batch_is_not_copied(monkeypatch):
    def recorded(self, key, found, *what, real=Graphs._recorded):
        done = real(self, key, found, *what)
        found.inputs = []
        return done

    monkeypatch.setattr(Graphs, "_recorded", recorded)


def statistics_are_forgotten(monkeypatch):
    def settle(self, total=lambda x: x, real=RunningNorm.settle):
        self.asked = getattr(self, "asked", 0) + 1
        if self.asked < 3:  # Python is asked no more after that
            real(self, total)

    monkeypatch.setattr(RunningNorm, "settle", settle)


test_training_code, test_training_bugs = planted(
    [
        (record_everything, rate_is_a_number),
        (record_everything, average_by_a_number),
        (record_everything, gradients_are_left),
        (record_everything, batch_is_not_copied),
        (record_the_classifier, batch_is_not_copied),
    ]
)


def test_the_phase_of_a_loss_is_part_of_the_key():
    """A VAE whose phase is always the same would go on without its adversary."""
    torch.set_num_threads(1)
    from flextok_edu.vae import VAELoss

    real = VAELoss.objectives

    def without(self, config):
        found = real(self, config)
        for o in found:
            o.phase = lambda progress: "always"
            o.start = 0.0
        return found

    logs = []
    for recorded in (False, True):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(VAELoss, "objectives", without)
            logs.append(stage("vae", Trainer(backend(recorded)))[1])
    assert "adversarial" in logs[0][-1] and "adversarial" not in logs[1][-1], "this is how the bug looks"


def test_a_loss_that_says_nothing_is_never_recorded():
    """A loss of one's own may depend on progress, or count in Python."""
    line, asked = torch.nn.Linear(2, 1), []

    def loss(batch, progress):
        asked.append(progress)
        return (line(batch) * progress).square().mean(), {}

    b = backend(True)
    loader = Loader(50, 4, lambda rows, positions, step: torch.ones(4, 2))
    objective = Objective("line", loss, list(line.named_parameters()), StageConfig())
    fit([objective], loader, 6, trainer=Trainer(b), progress=False)
    assert len(set(asked)) == 6 and not b.graphs.all


def test_half_precision_with_a_scaler_steps_as_it_is():
    """A scaler asks whether gradients are finite before it steps: only the gradients are recorded."""
    for precision, recorded in ((torch.bfloat16, {"gradients", "update"}), (torch.float16, {"gradients"})):
        b = backend(True, precision=precision)
        stage("ar", Trainer(b), steps=5)
        assert kinds(b.graphs) == recorded


@pytest.mark.parametrize("name", ("vae", "tokenizer"))
def test_a_recorded_training_resumes_exactly(name, tmp_path):
    """Stopped in the middle and begun again, with recordings made anew: the weights of a run in one go."""
    torch.set_num_threads(1)

    class StopAt(training_loop.Callback):
        def step(self, training, backend, looked):
            if training.done == 7:
                raise KeyboardInterrupt

    def run(folder, *callbacks):
        made = backend(True, Distributed)
        return stage(name, keeping.long_run(folder, made, steps=5, callbacks=callbacks), steps=12)

    whole, _ = run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", StopAt())
    parts, log = run(tmp_path / "b")
    assert log[-1]["step"] == 11 and weights_hash(whole) == weights_hash(parts)


class Forbidden:
    """Methods of tensors that wait for a GPU, counted while somebody watches."""

    NAMES = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")

    def __init__(self, monkeypatch):
        self.watching, self.calls = False, []
        for name in self.NAMES:
            real = getattr(torch.Tensor, name)
            monkeypatch.setattr(torch.Tensor, name, self.counted(name, real))

    def counted(self, name, real):
        def method(tensor, *args, **kwargs):
            if self.watching:
                self.calls.append(name)
            return real(tensor, *args, **kwargs)

        return method


def questions(name, monkeypatch):
    """What a step that nobody looks at asks of tensors (the loader's part left out: it works on the CPU)."""
    forbidden = Forbidden(monkeypatch)

    class Watched(SingleDevice):
        reads_every_loss = False

        def micro_batches(self, training):
            forbidden.watching = False
            found = super().micro_batches(training)
            forbidden.watching = training.done % 10 != 0 and training.done < training.steps - 1
            return found

    class Rest(training_loop.Callback):
        def step(self, training, backend, looked):
            forbidden.watching = False

    b = Watched("cpu")
    b.tensors = True
    stage(name, Trainer(b, callbacks=[Rest()]), steps=9)
    return forbidden.calls


@pytest.mark.parametrize("name", STAGES)
def test_a_step_that_nobody_looks_at_asks_nothing(name, monkeypatch):
    assert not questions(name, monkeypatch)


def test_a_question_is_found(monkeypatch):
    real = SingleDevice.move
    monkeypatch.setattr(SingleDevice, "move", lambda self, t, o: torch.tensor(float(real(self, t, o))))
    assert questions("ar", monkeypatch)


def counted_terms(recorded):
    """A term of the loss that counts in Python, and one whose weight is changed on the way."""
    from flextok_edu.training import recorded_terms

    class Counting:
        name, weight = "counting", 0.5

        def __call__(self, step):
            return step.velocity.square().mean()

    term = Counting()
    if recorded:
        term.recorded = True
    return term, recorded_terms([term])


def test_a_term_says_whether_it_may_be_recorded():
    assert counted_terms(False)[1] is None, "it may do anything"
    term, phase = counted_terms(True)
    before = phase(0.0)
    term.weight = 0.25
    assert phase(0.5) != before, "another weight, another recording"


def test_a_phase_that_is_over_gives_its_memory_back():
    held = []

    class Look(training_loop.Callback):
        def step(self, training, backend, looked):
            held.append({key[0][0][2] for key in backend.graphs.recordings if key[0][0][0] == "gradients"})

    stage("vae", Trainer(backend(True), callbacks=[Look()]))
    assert all(len(phases) <= 1 for phases in held) and len(set.union(*held)) == 2


def test_numbers_that_nobody_asks_for_are_not_computed(monkeypatch):
    """The AR model's accuracy reads all logits: in ten steps once."""
    asked, real = [], ARModel.loss

    def loss(self, *given):
        value, numbers = real(self, *given)
        lazy = numbers["accuracy"]
        return value, numbers | {"accuracy": lambda: asked.append(1) or lazy()}

    monkeypatch.setattr(ARModel, "loss", loss)
    _, log = stage("ar", Trainer(backend(False)), steps=14)
    assert len(asked) == 3 == sum("accuracy" in row for row in log)
    asked.clear()
    same = backend(True)
    _, again = stage("ar", Trainer(same), steps=35)
    assert [row["accuracy"] for row in again][:2] == [row["accuracy"] for row in log][:2]
    # before it is known that there are such numbers, in rehearsals, and in the recording of a step with them
    assert len(asked) <= 4


# --- decoding ------------------------

WAYS = (
    {"steps": 3},
    {"steps": 3, "guidance": 2.0},
    {"steps": 3, "guidance": 2.0, "apg": True},
    {"steps": 3, "guidance": 2.0, "apg": APG(momentum=0.5)},
    {"steps": 3, "guidance": lambda t: 1.0 if t > 0.5 else 3.0, "solver": "heun"},
    {"steps": 2, "guidance": 2.0, "shift": 3.0},
)


@pytest.fixture(scope="module")
def tok():
    return randomize(FlexTok(TOK_SMALL)).eval()


IDS = torch.arange(15).view(3, 5) * 61
LISTS = [IDS[0], IDS[1, :2], IDS[2, :4]]


@pytest.mark.parametrize("how", WAYS, ids=named)
@pytest.mark.parametrize("ids", (IDS, LISTS), ids=("alike", "different"))
def test_a_recorded_decode_is_the_decode(tok, how, ids):
    tok.graphs = Graphs()
    plain = [tok.decode_latents(ids, seed=s, **how) for s in range(3)]
    tok.graphs = listed()
    recorded = [tok.decode_latents(ids, seed=s, **how) for s in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded)) and not torch.equal(plain[0], plain[1])
    assert len(tok.graphs.recordings) == 1 and not tok.graphs.refused
    other = [row.flip(0) for row in LISTS] if ids is LISTS else IDS.flip(0)
    again = tok.decode_latents(other, seed=0, **how)
    tok.graphs.enabled = False
    assert torch.equal(again, tok.decode_latents(other, seed=0, **how)), "a replay takes new ids"


def test_what_a_decode_is_filed_under(tok):
    """One recording for each thing that changes the arithmetic, and none for what does not."""
    tok.graphs = listed(keep=50)

    def decode(ids=IDS, noise=None, **how):
        tok.decode_latents(ids, noise, **({"steps": 2, "guidance": 2.0, "seed": 0} | how))
        return len(tok.graphs.recordings)

    assert decode() == 1
    assert decode(seed=5) == decode(first_index=7) == decode(guidance=lambda t: 2.0) == 1
    assert decode([row[:5] for row in IDS]) == 1, "a list of equal lengths is a batch"
    changes = [
        {"steps": 3},
        {"guidance": 3.0},
        {"guidance": lambda t: 1 + t},
        {"apg": True},
        {"solver": "heun"},
        {"shift": 2.0},
        {"ids": IDS[:2]},
        {"ids": IDS[:, :4]},
        {"ids": LISTS},
        {"noise": torch.zeros(3, 4, 8, 8, dtype=torch.float64)},
    ]
    assert [decode(**c) for c in changes] == list(range(2, 2 + len(changes)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decode() == 12
    tok.guidance_together = True
    assert decode() == 13
    tok.guidance_together = None
    kept = len(tok.graphs.recordings)
    tok.decode_latents(IDS, seed=0, steps=2, verbose=True)
    assert len(tok.graphs.recordings) == kept, "a bar that counts steps needs steps"


def test_weights_that_moved_are_seen(tok):
    tok.graphs = listed()
    for _ in range(2):
        before = tok.decode_latents(IDS, seed=0, steps=2)
    with torch.no_grad():
        tok.decoder.head.weight.mul_(2)  # in its place: the recording reads it
        doubled = tok.decode_latents(IDS, seed=0, steps=2)
        assert not torch.equal(before, doubled)
        tok.decoder.head.weight = torch.nn.Parameter(tok.decoder.head.weight / 2)  # elsewhere
    assert torch.equal(tok.decode_latents(IDS, seed=0, steps=2), before)


def recorded_decodes():
    torch.manual_seed(0)
    made = randomize(FlexTok(TOK_SMALL)).eval()
    plain = [made.decode_latents(IDS, seed=s, steps=3, guidance=2.0, apg=True) for s in range(3)]
    made.graphs = listed()
    for s in range(3):
        assert torch.equal(made.decode_latents(IDS, seed=s, steps=3, guidance=2.0, apg=True), plain[s])
    for g in (2.0, 3.0, 3.0, 2.0):
        found = made.decode_latents(IDS, seed=0, steps=3, guidance=g)
        made.graphs.enabled = False
        assert torch.equal(found, made.decode_latents(IDS, seed=0, steps=3, guidance=g))
        made.graphs.enabled = True


def momentum_lives_on(monkeypatch):
    real = GuidedVelocity.__init__
    kept = {}

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        self.running = kept.get("running")

    def call(self, x, i, real=GuidedVelocity.__call__):
        found = real(self, x, i)
        kept["running"] = self.running
        return found

    monkeypatch.setattr(GuidedVelocity, "__init__", init)
    monkeypatch.setattr(GuidedVelocity, "__call__", call)


def guidance_is_not_in_the_key(monkeypatch):
    monkeypatch.setattr(SamplingConfig, "fixed", lambda self: (self.steps, self.apg))


def results_are_not_copied(monkeypatch):
    real = Graphs.__call__
    monkeypatch.setattr(
        Graphs, "__call__", lambda self, *args, **named: real(self, *args, **(named | {"copy": False}))
    )


def keep_results():
    made = randomize(FlexTok(TOK_SMALL)).eval()
    made.graphs = listed()
    several = [made.decode_latents(IDS, seed=s, steps=2) for s in range(4)]
    assert not any(torch.equal(a, b) for i, a in enumerate(several) for b in several[:i])


test_decoding_code, test_decoding_bugs = planted(
    [
        (recorded_decodes, momentum_lives_on),
        (recorded_decodes, guidance_is_not_in_the_key),
        (recorded_decodes, batch_is_not_copied),
        (keep_results, results_are_not_copied),
    ]
)


# --- writing ------------------------

LABELS = torch.tensor([0, 2, 3])  # 3: no class
CHOICES = (
    {},
    {"guidance": 2.0},
    {"guidance": lambda j: 1.0 if j % 2 else 3.0, "temperature": 0.7, "top_k": 40, "top_p": 0.9},
    {"length": 3, "guidance": 2.0},
    {"temperature": 0.0},
    {"seeds": [4, 5, 6], "length": 5},
)


@pytest.fixture(scope="module")
def ar():
    return randomize(ARModel(AR_SMALL)).eval()


@pytest.mark.parametrize("choice", CHOICES, ids=named)
def test_a_recorded_list_is_the_list(ar, choice):
    ar.writer = Writer()
    plain = ar.generate(LABELS, **choice)
    ar.writer = Writer(listed())
    assert all(torch.equal(ar.generate(LABELS, **choice), plain) for _ in range(2))
    assert not ar.writer.graphs.refused and len(ar.writer.graphs.recordings) == 1
    other = ar.generate(LABELS.flip(0), **choice)
    ar.writer = Writer()
    assert torch.equal(other, ar.generate(LABELS.flip(0), **choice)), "nothing of the first list is left"


def test_lists_of_every_length_share_a_recording(ar, monkeypatch):
    ar.writer, steps, real = Writer(listed()), [], ARModel.step
    monkeypatch.setattr(ARModel, "step", lambda self, *given: steps.append(1) or real(self, *given))
    lists = [ar.generate(LABELS, k, guidance=2.0) for k in (8, 1, 3, 8)]
    assert len(steps) == 2, "one rehearsal, one recording"
    assert all(torch.equal(short, lists[0][:, : short.shape[1]]) for short in lists)


def test_sheets_are_few_and_fit(ar):
    ar.writer = Writer(listed())
    for b in (1, 2, 3, 2):
        ids = ar.generate(LABELS[:1].expand(b), guidance=2.0)
        assert ids.shape == (b, 8)
    assert [key[0] for key in ar.writer.sheets] == [3, 2]
    ar.writer.clear()
    assert not ar.writer.sheets and not ar.writer.graphs.recordings


def test_a_list_of_nan_leaves_nothing_behind(ar):
    """Hidden positions count nothing, but nothing times NaN is NaN."""
    import copy

    model = copy.deepcopy(ar)
    model.writer = Writer(listed())
    good = {n: w.clone() for n, w in model.state_dict().items()}
    plain = model.generate(LABELS, guidance=2.0)
    with torch.no_grad():
        for w in model.parameters():
            w.fill_(math.nan)
    model.generate(LABELS, guidance=2.0)
    model.load_state_dict(good)
    assert torch.equal(model.generate(LABELS, guidance=2.0), plain)


def test_with_and_without_inference_mode(ar):
    ar.writer = Writer(listed())
    with torch.inference_mode():
        one = ar.generate(LABELS)
    assert torch.equal(ar.generate(LABELS), one)


def test_two_batch_sizes_keep_their_recordings(ar, monkeypatch):
    steps, real = [], ARModel.step
    monkeypatch.setattr(ARModel, "step", lambda self, *given: steps.append(1) or real(self, *given))
    ar.writer = Writer(listed())
    for _ in range(3):
        ar.generate(LABELS, guidance=2.0)
        ar.generate(LABELS[:2], guidance=2.0)
    assert len(steps) == 4, "for each a rehearsal and a recording"


def recorded_lists():
    made = randomize(ARModel(AR_SMALL)).eval()
    plain = [made.generate(LABELS, seed=s, guidance=2.0) for s in range(3)]
    made.writer = Writer(listed())
    assert all(torch.equal(made.generate(LABELS, seed=s, guidance=2.0), plain[s]) for s in range(3))


def hidden_positions_are_seen(monkeypatch):
    real = torch.le
    monkeypatch.setattr(torch, "le", lambda a, b, out: real(a * 0, b * 0, out=out))


def mask_lags(monkeypatch):
    real = torch.le
    monkeypatch.setattr(torch, "le", lambda a, b, out: real(a, (b - 1).clamp_min(0), out=out))


def chance_of_the_first(monkeypatch):
    real = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda x, axis, i: real(x, axis, i * 0))


def guidance_is_forgotten(monkeypatch):
    monkeypatch.setattr(
        _Sheet,
        "begin",
        lambda self, model, cond, g, *rest, real=_Sheet.begin: real(self, model, cond, [], *rest),
    )


test_writing_code, test_writing_bugs = planted(
    [
        (recorded_lists, hidden_positions_are_seen),
        (recorded_lists, mask_lags),
        (recorded_lists, chance_of_the_first),
        (recorded_lists, guidance_is_forgotten),
    ]
)


# --- nothing passes between the CPU and a GPU while a function is recorded ------------------------


class NoTraffic(TorchDispatchMode):
    """What a capture refuses: copies between CPU and GPU, and questions."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError(f"{operation} waits for the GPU")
        found = operation(*args, **(kwargs or {}))
        kinds = {
            x.device.type
            for x in tree_flatten((args, kwargs, found))[0]
            if isinstance(x, torch.Tensor) and (x.ndim or operation in COPIES)
        }
        if len(kinds) > 1:
            raise RuntimeError(f"{operation} moves something between {' and '.join(sorted(kinds))}")
        return found


COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


def on_the_gpu(work, *modules):
    with FakeTensorMode(allow_non_fake_inputs=False):
        for m in modules:
            on_fake_cuda(m)
        return work(lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("how", WAYS, ids=named)
@pytest.mark.parametrize("alike", (True, False), ids=("alike", "different"))
def test_a_decode_stays_on_the_gpu(how, alike, monkeypatch):
    model, s, real = FlexTok(TOK_SMALL), SamplingConfig(**how), flow.euler_times

    def times(steps, device=None, shift=1.0):  # without a device they are numbers of Python's
        with unset_fake_temporarily() if device is None else contextlib.nullcontext():
            found = real(steps, device, shift)
            return found.numpy() if device is None else found

    patch(monkeypatch, flow, "euler_times", times)

    def work(new):
        ids, noise = new(3, 5, dtype=torch.int64), new(3, 4, 8, 8)
        with torch.no_grad(), NoTraffic():
            each = None if alike else new(3, dtype=torch.int64)
            assert model._follow(s, ids, noise, each).device.type == "cuda"

    on_the_gpu(work, model)


@pytest.mark.parametrize("choice", (TokenSampling(), TokenSampling(top_k=5, top_p=0.9, temperature=0.5)))
def test_writing_stays_on_the_gpu(choice):
    model = ARModel(AR_SMALL)

    def work(new):
        sheet = _Sheet.of(model, 2, new(4, dtype=torch.int64))
        with NoTraffic():
            _step(model, sheet, choice.choose, new(1, dtype=torch.int64))

    on_the_gpu(work, model)


@pytest.mark.parametrize("longest", (3, 8))
def test_a_loss_stays_on_the_gpu(longest):
    model, ar = FlexTok(TOK_SMALL).train(), ARModel(AR_SMALL)
    draws = sample_training_noise(TOK_SMALL, 4, longest)

    def work(new):
        rest = [new(*x.shape, dtype=x.dtype) for x in draws[:4]]
        batch = type(draws)(*rest, new(4, 4, 8, 8), longest)
        latents, ids, some = new(4, 4, 8, 8), new(4, 8, dtype=torch.int64), new(4, dtype=torch.int64)
        with NoTraffic():
            loss, _ = FlowObjective(model)(latents, draws=batch)
            assert loss.device.type == ar.loss(ids, some, some > 1)[0].device.type == "cuda"
            model.norm.settle()

    on_the_gpu(work, model, ar)


def test_traffic_is_found():
    def work(new):
        with NoTraffic():
            new(3) + torch.tensor([1.0, 2.0, 3.0]).to("cuda")

    with pytest.raises(RuntimeError, match="moves something between cpu and cuda"):
        on_the_gpu(work)


# --- the tool itself ------------------------


def test_what_fails_runs_as_it_is_and_says_so_once(capsys):
    graphs, state = listed(warm=0), torch.zeros(2)

    def asks(x):
        state.add_(1)
        return x * 2 if x.sum() > 0 else x

    for n in (2, 3, 2):
        assert torch.equal(graphs("asks", asks, [torch.ones(n)]), torch.full((n,), 2.0))
    assert capsys.readouterr().out.count("cannot be recorded as a CUDA graph, and runs without") == 1
    assert torch.equal(state, torch.full((2,), 3.0)), "a recording that failed has changed nothing"
    assert not graphs.recordings and len(graphs.refused) == 2


def test_too_little_memory_is_no_end(capsys):
    class Full(OpRecorder):
        def record(self, function, device):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    graphs = Graphs(True, 8, 0, Full())
    assert graphs("add", torch.add, [torch.ones(1), torch.ones(1)]).item() == 2
    assert "OutOfMemoryError: CUDA out of memory" in capsys.readouterr().out


def test_memory_that_recordings_hold_is_given_up(capsys):
    """A rehearsal that finds no memory beside recordings: they go, and what can be repeated is repeated."""
    graphs, tight = listed(), []

    def large(x):
        if graphs.recordings and any(r.replay for r in graphs.recordings.values()):
            tight.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * 2

    for _ in range(3):
        graphs("small", torch.neg, [torch.ones(1)])
    assert graphs("large", large, [torch.ones(1)]).item() == 2 and tight == [1]
    assert not graphs.recordings and graphs.enabled is False
    graphs = listed()
    for _ in range(3):
        graphs("small", torch.neg, [torch.ones(1)])
    with pytest.raises(torch.OutOfMemoryError) as error:
        graphs("large", large, [torch.ones(1)], copy=False)
    assert "--graphs off" in "".join(error.value.__notes__), "a step of a training cannot be repeated"


def test_a_recording_does_not_run(capsys):
    """Capturing writes down; the replay after it is the call."""
    graphs, count = listed(), torch.zeros(1)
    for i in range(5):
        graphs("count", lambda x: count.add_(x), [torch.ones(1)], places([count]))
        assert count.item() == i + 1


def test_views_are_put_back_in_order():
    recorder, x = OpRecorder(), torch.zeros(4)

    def work():
        x[1:3].add_(1)
        x.mul_(2).add_(1)
        x[:2].sub_(5)
        return x.sum()

    replay, total = recorder.record(work, x.device)
    assert torch.equal(x, torch.zeros(4))
    replay()
    assert torch.equal(x, torch.tensor([-4.0, -2.0, 3.0, 1.0])) and total.item() == -2


def test_a_copy_of_a_model_has_its_own_recordings(tok):
    import copy

    tok.graphs = listed()
    for _ in range(2):
        tok.decode_latents(IDS, seed=0, steps=2)
    other = copy.deepcopy(tok)
    assert other.graphs is not tok.graphs and not other.graphs.recordings
    twin = copy.deepcopy(ARModel(AR_SMALL))
    assert isinstance(twin.writer, Writer)


# --- on a GPU ------------------------


@on_gpu
@pytest.mark.parametrize("how", WAYS, ids=named)
@pytest.mark.parametrize("half", (False, True), ids=("float32", "bfloat16"))
def test_gpu_decode_bit_for_bit(how, half):
    made = randomize(FlexTok(TOK_SMALL)).eval().cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        for ids in (IDS, LISTS):
            made.graphs.enabled = False
            plain = [made.decode_latents(ids, seed=s, **how) for s in range(4)]
            made.graphs.enabled = None
            recorded = [made.decode_latents(ids, seed=s, **how) for s in range(4)]
            assert all(torch.equal(a, b) for a, b in zip(plain, recorded))
    assert not made.graphs.refused and any(r.replay for r in made.graphs.recordings.values())


@on_gpu
@pytest.mark.parametrize("choice", CHOICES, ids=named)
def test_gpu_lists_bit_for_bit(choice):
    made = randomize(ARModel(AR_SMALL)).eval().cuda()
    recorded = [made.generate(LABELS, **choice) for _ in range(3)]
    assert not made.writer.graphs.refused and made.writer.graphs.recordings
    made.writer = Writer(Graphs(True, warm=10**9))  # the same step, never recorded
    assert all(torch.equal(made.generate(LABELS, **choice), r) for r in recorded)


@pytest.fixture
def repeatable():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@on_gpu
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("precision", (None, torch.bfloat16), ids=("float32", "bfloat16"))
def test_gpu_training_bit_for_bit(name, precision, repeatable):
    found = []
    for graphs in (False, None):
        b = SingleDevice("cuda", precision, graphs)
        b.graphs = Remembering(graphs, 24, 2)
        if name == "classifier":
            data = load_data("scenes", 16, 40, 4, progress=False)[0]
            config = StageConfig(steps=9, batch=4)
            model, _ = train_classifier(data, config, trainer=Trainer(b), device="cuda", progress=False)
        else:
            model, _ = long_run.stage(name, 9, optimizer="muon", trainer=Trainer(b), device="cuda")
        found.append(weights_hash(model))
    assert not b.graphs.all_refused and any(r.replay for r in b.graphs.all.values())
    assert found[0] == found[1]


@on_gpu
def test_gpu_survives_a_capture_that_fails(capsys):
    graphs, x = Graphs(warm=1), torch.ones(4, device="cuda")

    def asks(y):
        z = torch.randn_like(y)
        return z * 0 + y * 2 if y.sum() > 0 else z

    for _ in range(3):
        assert torch.equal(graphs("asks", asks, [x]), 2 * x)
    assert "cannot be recorded" in capsys.readouterr().out
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.isfinite(torch.randn(8, device="cuda")).all(), "the generator works on"
    good = [graphs("good", lambda y: y + 1, [x]) for _ in range(3)]
    assert all(torch.equal(g, x + 1) for g in good)
    assert len(graphs.refused) == 1
    large = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    before, side = torch.cuda.memory_reserved(), torch.cuda.Stream()
    large.record_stream(side)
    del large
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")  # the allocator looks at what other streams have left
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before, "memory is given back as before"


@on_gpu
def test_gpu_recordings_in_any_order():
    """Several recordings share memory: what one has made is read before another is replayed."""
    graphs = Graphs(warm=1, keep=8)
    runs = {n: lambda x, n=n: (x.repeat(n, 1) @ x.T).cumsum(0) * n for n in (1, 5, 3)}
    for n in (1, 5, 3, 3, 1, 5, 5, 3, 1, 1, 5, 3):
        x = torch.randn(64, 32, device="cuda")
        assert torch.equal(graphs(n, runs[n], [x], copy=False), runs[n](x))


@on_gpu
def test_gpu_compiled_blocks_in_a_recording():
    from flextok_edu.engine.compiler import compiled, compiler_works

    if not compiler_works("cuda"):
        pytest.skip("no compiler")
    made = randomize(FlexTok(TOK_SMALL)).eval().cuda()
    with compiled([*made.encoder.blocks, *made.decoder.blocks]):
        made.graphs.enabled = False
        plain = [made.decode_latents(IDS, seed=s, steps=3, guidance=2.0) for s in range(3)]
        made.graphs.enabled = None
        recorded = [made.decode_latents(IDS, seed=s, steps=3, guidance=2.0) for s in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded)) and not made.graphs.refused


@on_gpu
def test_gpu_trains_with_a_thread_and_gives_its_memory_back():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    b = SingleDevice("cuda", ahead=2)
    b.graphs = Remembering(None, 24, 2)
    model, _ = long_run.stage("tokenizer", 30, optimizer="muon", trainer=Trainer(b), device="cuda")
    assert any(r.replay for r in b.graphs.all.values()) and not b.graphs.all_refused
    b.graphs.all.clear()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 128 * 2**20


@on_gpu
def test_gpu_memory_comes_back():
    made = randomize(FlexTok(TOK_SMALL)).eval().cuda()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for _ in range(3):
        made.decode_latents(IDS, seed=0, steps=2)
    made.graphs.clear()
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + 64 * 2**20
    assert isinstance(made.graphs.recorder, CUDARecorder) and math.isfinite(before) and held_by(made)


@on_gpu
@pytest.mark.parametrize("name", ("tokenizer", "ar"))
def test_gpu_steps_do_not_wait(name):
    """The GPU's own guard: a step that nobody looks at makes no call that waits."""

    class Guarded(SingleDevice):
        def micro_batches(self, training):
            torch.cuda.set_sync_debug_mode("default")
            found = super().micro_batches(training)
            if training.done % 10 and 3 < training.done < training.steps - 1:
                torch.cuda.set_sync_debug_mode("error")
            return found

    class Rest(training_loop.Callback):
        def step(self, training, backend, looked):
            torch.cuda.set_sync_debug_mode("default")

    try:
        trainer = Trainer(Guarded("cuda"), callbacks=[Rest()])
        long_run.stage(name, 9, trainer=trainer, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")

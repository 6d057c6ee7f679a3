"""A thread prepares the next steps, and nothing else changes: batches, states, errors, signals.

And the noise of a training, drawn by name or on the device.
"""

import contextlib
import gc
import importlib.util
import io
import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import warnings
import weakref
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from planting import patch, planted
from torch import nn

import flextok_edu.apps.stage_table as apps_stage_table
import flextok_edu.apps.stages as apps_stages
import flextok_edu.data.reading as data_reading
import flextok_edu.engine.prefetch as engine_prefetch
import flextok_edu.engine.tensors as engine_tensors
from flextok_edu.apps.run_config import RunConfig, check
from flextok_edu.apps.stage_table import STAGE_TABLE
from flextok_edu.data.datasets import ImageSet
from flextok_edu.data.reading import SourceLoader, quiet_pillow
from flextok_edu.data.scenes import ToyScenes
from flextok_edu.data.opening import open_source
from flextok_edu.data.streams import StreamLoader, StreamSource
from flextok_edu.engine.config import PRESETS, StageConfig, TokenizerConfig, TrunkConfig, VAEConfig
from flextok_edu.engine.loader import Loader
from flextok_edu.engine.long_run import Stopped, long_run
from flextok_edu.engine.prefetch import Prefetched
from flextok_edu.engine.resume import Recipe
from flextok_edu.engine.runtime import Runtime
from flextok_edu.engine.tensors import NoiseSource, named_generator, onto
from flextok_edu.engine.trainer import Callback, Objective, Trainer, fit
from flextok_edu.tokenizer import FlexTok
from flextok_edu.training import Latents, TokenizerLoader, latent_batches, train_tokenizer
from flextok_edu.vae_training import PosteriorLoader, train_vae

SMALL = TokenizerConfig(
    4, 8, 8, (8, 5, 5, 5), TrunkConfig(32, 1, head_dim=16), TrunkConfig(32, 1, head_dim=16)
)
VAE_SMALL = VAEConfig(latent_channels=4, channels=(8,), stem=4, layers=1, groups=4, attention=False)
# (step, rank, world, micro): in order; the same again; a jump ahead, and back; another share; in order again
QUESTIONS = [(0, 0, 1, 2), (1, 0, 1, 2), (1, 0, 1, 2), (2, 0, 1, 2), (7, 0, 1, 2), (8, 0, 1, 2), (3, 0, 1, 2)]
QUESTIONS += [
    (3, 1, 2, 1),
    (4, 1, 2, 1),
    (5, 1, 2, 1),
    (6, 0, 1, 1),
    (7, 0, 1, 1),
    (8, 0, 1, 1),
    (9, 0, 1, 1),
]


def toy(length=40, batch=8, wait=0.0):
    """What a step sees, and random numbers by its name."""

    def make(rows, positions, step):
        time.sleep(wait)
        return {"rows": rows, "noise": torch.randn(len(rows), generator=named_generator("toy", step))}

    return Loader(length, batch, make, seed=3)


class Rows:
    """All that StreamSource asks of a data set that is read from front to back; counts what was read."""

    features = None

    def __init__(self, count=50):
        scenes = ToyScenes(size=16, length=count)
        images = scenes.render(progress=False)[0].permute(0, 2, 3, 1).numpy()
        self.rows = [{"image": {"bytes": png(image)}, "label": i} for i, image in enumerate(images)]
        self.at = self.read = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]

    def set_epoch(self, epoch):
        pass

    def __iter__(self):
        for i in range(self.at, len(self.rows)):
            self.at = i + 1
            self.read += 1
            yield self.rows[i]
        self.at = 0


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


def stream(rows=None, block=12):
    options = {"flip": True, "crop": "random"}
    return StreamLoader(StreamSource(rows or Rows(), "toys"), 16, 4, seed=1, block=block, **options)


def latents(noise="cpu", batch=8):
    g = torch.Generator().manual_seed(1)
    data = Latents(torch.randn(40, 4, 8, 8, generator=g), torch.rand(40, 4, 8, 8, generator=g))
    return latent_batches(data, batch, 0, features=torch.randn(40, 3, generator=g), noise=noise)


def tokenizer_loader(noise="cpu"):
    torch.manual_seed(0)
    return TokenizerLoader(FlexTok(SMALL), latents(noise), noise)


KINDS = {
    "toy": toy,
    "tokenizer": tokenizer_loader,
    "tokenizer, device": lambda: tokenizer_loader("device"),
    "source": lambda: SourceLoader(open_source(ToyScenes(size=16, length=20)), 16, 4, flip=True),
    "posterior": lambda: PosteriorLoader(
        SourceLoader(open_source(ToyScenes(size=16, length=20)), 16, 4), VAE_SMALL
    ),
    "stream": stream,
    "posterior of a stream": lambda: PosteriorLoader(stream(), VAE_SMALL),
}


def same(a, b):
    """Equal to the last bit, whatever they are made of."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def prefetching():
    return [t for t in threading.enumerate() if t.name == "prefetch" and t.is_alive()]


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.002)
    return condition()


@contextlib.contextmanager
def wrapped(loader, **options):
    found = Prefetched(loader, **options)
    try:
        yield found
    finally:
        found.close()


# --- the same batches
# -------------------------------------------------------------------------------------------------


def check_same_batches(kinds=("toy", "tokenizer")):
    for kind in kinds:
        plain = KINDS[kind]()
        with wrapped(KINDS[kind]()) as ahead:
            assert isinstance(ahead, Loader) and (ahead.batch, ahead.seed) == (plain.batch, plain.seed)
            for asked in QUESTIONS:
                assert same(ahead.micro_batches(*asked), plain.micro_batches(*asked)), (kind, asked)
    plain = toy()
    with wrapped(toy()) as ahead:
        assert all(same(next(ahead), next(plain)) for _ in range(7)) and ahead.step == 7
        ahead.step = plain.step = 3
        assert same(next(ahead), next(plain)) and same(ahead.rows(5), plain.rows(5))
    assert ahead.loader.step == 4 and same(next(ahead.loader), next(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_any_loader(kind):
    check_same_batches((kind,))


def test_workers_read_ahead_too():
    """Worker processes are started by the first question, and go when the loader does."""
    source = open_source(ToyScenes(size=16, length=20))
    plain = SourceLoader(source, 16, 4, flip=True)
    with wrapped(SourceLoader(source, 16, 4, workers=1, flip=True)) as ahead:
        for step in (0, 1, 2, 3, 9, 10):
            assert same(ahead.micro_batches(step), plain.micro_batches(step)), step
        ahead.loader.close()


def check_made_once():
    """In order, and also when each step is asked for twice (a rehearsal), nothing is made twice."""
    made = Counter()
    loader = Loader(40, 4, lambda rows, positions, step: made.update([step]) or rows)
    with wrapped(loader, stop=9) as ahead:
        for step in range(9):
            first, second = ahead.micro_batches(step), ahead.micro_batches(step)
            assert same(first, second) and first[0][0] is second[0][0]
    assert made == Counter(range(9))


def forgets_the_last(monkeypatch):
    real = Prefetched.micro_batches

    def broken(self, *asked):
        self._last = self._last._replace(asked=(-9, 0, 1, 1))
        return real(self, *asked)

    monkeypatch.setattr(Prefetched, "micro_batches", broken)


def begins_too_late(monkeypatch):
    real = engine_prefetch._Ahead._run
    monkeypatch.setattr(
        engine_prefetch._Ahead, "_run", lambda self, asked, *a: real(self, (asked[0] + 1, *asked[1:]), *a)
    )


def whole_batches_only(monkeypatch):
    real = engine_prefetch._Ahead._attempt
    monkeypatch.setattr(
        engine_prefetch._Ahead,
        "_attempt",
        lambda self, asked, state: real(self, (asked[0], 0, 1, 1), state)._replace(asked=asked),
    )


def takes_what_comes(monkeypatch):
    """Whatever was asked for, the thread's next step is handed out."""

    def broken(self, asked):
        if self._ahead is None:
            return None
        made = self._ahead.take((self._last.asked[0] + 1, *self._last.asked[1:]))
        return made and made._replace(asked=asked)

    monkeypatch.setattr(Prefetched, "_ready", broken)


# --- how far ahead, and how far at all
# -------------------------------------------------------------------------------------------------


def check_depth():
    """The thread makes `depth` steps and not one more, whatever time it is given."""
    for depth in (1, 2, 4):
        begun = []
        loader = Loader(40, 4, lambda rows, positions, step: begun.append(step) or rows)
        with wrapped(loader, depth=depth) as ahead:
            for step in range(5):
                ahead.micro_batches(step)
                assert until(lambda: len(begun) == step + 1 + depth), "they are prepared"
                time.sleep(0.02)
                assert begun == list(range(step + 1 + depth)), "and no more"


def one_too_many(monkeypatch):
    class Loose(deque):
        def __len__(self):
            return max(super().__len__() - 1, 0)

        def __bool__(self):
            return super().__len__() > 0

    monkeypatch.setattr(engine_prefetch, "deque", Loose)


def check_stop():
    """Nothing is read beyond the last step; whoever asks for more gets it all the same."""
    begun = []
    loader = Loader(40, 4, lambda rows, positions, step: begun.append(step) or rows)
    with wrapped(loader, depth=3, stop=5) as ahead:
        for step in range(5):
            ahead.micro_batches(step)
            time.sleep(0.01)
        assert begun == [0, 1, 2, 3, 4] and until(lambda: not prefetching())
        assert same(ahead.micro_batches(5), toy_rows(5)) and begun[-1] == 5
        time.sleep(0.02)
        assert begun[-1] == 5


def toy_rows(step):
    return Loader(40, 4, lambda rows, positions, step: rows).micro_batches(step)


def never_stops(monkeypatch):
    real = engine_prefetch._Ahead.__init__
    monkeypatch.setattr(
        engine_prefetch._Ahead, "__init__", lambda self, a, b, depth, stop: real(self, a, b, depth, None)
    )


# --- the state
# -------------------------------------------------------------------------------------------------


def check_state():
    """After k steps the state is that of a loader nobody has prepared, however far the thread has read."""
    for wrap in (lambda loader: loader, lambda loader: PosteriorLoader(loader, VAE_SMALL)):
        plain, states = wrap(stream()), []
        for step in range(15):  # more than an epoch, and blocks that end within a batch
            states.append(plain.state_dict())
            plain.micro_batches(step)
        for depth in (1, 3):
            with wrapped(wrap(stream()), depth=depth) as ahead:
                for step in range(14):
                    assert ahead.state_dict() == states[step], (depth, step)
                    ahead.micro_batches(step)
                    assert until(lambda: len(ahead._ahead.ready) == depth)
            assert ahead.state_dict() == ahead.loader.state_dict() == states[14], "closed, it is put back"
            assert same(ahead.loader.micro_batches(14), plain.micro_batches(14))


def check_resume():
    """A state goes into another wrapped loader, which goes on with the same batches."""
    plain = stream()
    batches = [plain.micro_batches(step) for step in range(12)]
    with wrapped(stream()) as ahead:
        for step in range(5):
            ahead.micro_batches(step)
        state = ahead.state_dict()
        for step in (5, 6):  # meanwhile this one goes on
            ahead.micro_batches(step)
        ahead.load_state_dict(state)
        assert ahead.step == 5 and same(ahead.micro_batches(5), batches[5])
    with wrapped(stream()) as ahead:
        ahead.load_state_dict(state)
        assert all(same(ahead.micro_batches(step), batches[step]) for step in range(5, 12))
        with pytest.raises(KeyError):
            ahead.load_state_dict({"nothing": 1})
        ahead.load_state_dict(state)
        assert same(next(ahead), batches[5][0][0]) and same(next(ahead), batches[6][0][0])


def check_streams_are_not_read_again():
    """Another share of the same step or of the next, with the thread far ahead.

    A block is read again, and not the stream from its start.
    """
    rows = Rows(200)
    with wrapped(stream(rows, block=4), depth=3) as ahead:
        for step in range(30):
            ahead.micro_batches(step)
        until(lambda: len(ahead._ahead.ready) == 3)
        for asked in ((29, 0, 1, 2), (30, 0, 1, 4)):
            before = rows.read
            ahead.micro_batches(*asked)
            assert until(lambda: len(ahead._ahead.ready) == 3) and rows.read - before <= 4 * 6, asked


def state_of_the_thread(monkeypatch):
    monkeypatch.setattr(Prefetched, "state_dict", lambda self: self.loader.state_dict())


def nothing_is_put_back(monkeypatch):
    monkeypatch.setattr(Prefetched, "_put_back", lambda self, state: None)


def state_of_the_step_before(monkeypatch):
    monkeypatch.setattr(Prefetched, "state_dict", lambda self: self._last.before)


def loads_beside_the_thread(monkeypatch):
    monkeypatch.setattr(Prefetched, "load_state_dict", lambda self, state: self.loader.load_state_dict(state))


# --- errors
# -------------------------------------------------------------------------------------------------


class Torn(OSError):
    "A type of its own."


def error_of(loader, step):
    try:
        loader.micro_batches(step)
    except Exception as error:
        return error


def check_errors():
    """Own type and traceback, at the step to which they belong; afterwards all is as if nothing had been."""
    broken = {3}

    def torn_file(rows, positions, step):
        if step in broken:
            raise Torn(f"step {step}")
        return rows

    with wrapped(Loader(40, 4, torn_file), depth=4) as ahead:
        for step in range(3):
            assert same(ahead.micro_batches(step), toy_rows(step)), "what came before the error is there"
        for _ in range(2):
            error = error_of(ahead, 3)
            assert type(error) is Torn and str(error) == "step 3"
            assert "torn_file" in [f.name for f in traceback.extract_tb(error.__traceback__)]
            assert not prefetching()
        broken.clear()
        for step in range(3, 8):
            assert error_of(ahead, step) is None and same(ahead.micro_batches(step), toy_rows(step))


def check_errors_of_streams():
    """A stream that breaks off in the middle of a batch goes on from the batch before."""
    rows, plain = Rows(), stream()
    batches = [plain.micro_batches(step) for step in range(8)]
    with wrapped(stream(rows, block=12), depth=2) as ahead:
        ahead.micro_batches(0)
        until(lambda: len(ahead._ahead.ready) == 2)
        good, rows.rows = rows.rows, [*rows.rows[:14], *([None] * 36)]
        ahead.micro_batches(1), ahead.micro_batches(2)
        with pytest.raises(AttributeError):
            ahead.micro_batches(3)
        rows.rows = good
        assert all(same(ahead.micro_batches(step), batches[step]) for step in range(3, 8))


def errors_are_forgotten(monkeypatch):
    """The thread tries until it works, and leaves a step out."""
    real = engine_prefetch._Ahead._attempt

    def broken(self, asked, state):
        made = real(self, asked, state)
        return real(self, (asked[0] + 1, *asked[1:]), state)._replace(asked=asked) if made.error else made

    monkeypatch.setattr(engine_prefetch._Ahead, "_attempt", broken)


def errors_change_their_type(monkeypatch):
    real = engine_prefetch._Ahead._attempt

    def broken(self, asked, state):
        made = real(self, asked, state)
        return made._replace(error=RuntimeError(str(made.error))) if made.error else made

    monkeypatch.setattr(engine_prefetch._Ahead, "_attempt", broken)


def errors_stay(monkeypatch):
    """The thread that failed is asked again and again."""
    real = Prefetched._halt
    monkeypatch.setattr(
        Prefetched,
        "_halt",
        lambda self: None if self._ahead and self._ahead.ready and self._ahead.ready[0].error else real(self),
    )


def check_interrupts():
    """Ctrl-C just when the batch was there: asked again, it is the same, and nothing is made twice."""
    made, real = Counter(), engine_prefetch._Ahead.take

    def interrupted(self, asked):
        found = real(self, asked)
        if asked[0] == 3 and made["interrupts"] == 0:
            made["interrupts"] += 1
            raise KeyboardInterrupt
        return found

    loader = Loader(40, 4, lambda rows, positions, step: made.update([step]) or rows)
    with pytest.MonkeyPatch.context() as m, wrapped(loader, stop=8) as ahead:
        m.setattr(engine_prefetch._Ahead, "take", interrupted)
        for step in range(8):
            try:
                found = ahead.micro_batches(step)
            except KeyboardInterrupt:
                found = ahead.micro_batches(step)
            assert same(found, toy_rows(step))
    assert made == Counter(range(8)) + Counter(["interrupts"])


def taken_at_once(monkeypatch):
    """The queue forgets a step before anybody has it."""
    real = engine_prefetch._Ahead.take

    def broken(self, asked):
        found = real(self, asked)
        self.drop(asked[0])
        return found

    monkeypatch.setattr(engine_prefetch._Ahead, "take", broken)


def check_interrupts_anywhere():
    """Ctrl-C at any instruction of the main thread: nobody waits for ever, and nothing is lost."""
    plain, states, batches = stream(), [], []
    for step in range(40):
        states.append(plain.state_dict())
        batches.append(plain.micro_batches(step))
    states.append(plain.state_dict())
    armed, done, hits = [], threading.Event(), []

    def interrupt(*_):
        if armed:
            armed.clear()
            hits.append(1)
            raise KeyboardInterrupt

    def shoot(rng=np.random.default_rng(0)):
        while not done.wait(rng.random() * 1e-3):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def answer(ahead, step, shots):
        try:
            armed[:] = [True] * shots
            return ahead.micro_batches(step)
        except KeyboardInterrupt:
            return None
        finally:
            armed.clear()

    before, shooter = signal.signal(signal.SIGUSR1, interrupt), threading.Thread(target=shoot)
    shooter.start()
    try:
        for _ in range(4):
            with wrapped(stream(), depth=3) as ahead:
                for step in range(40):
                    found = next(x for shots in (1, 1, 1, 0) if (x := answer(ahead, step, shots)))
                    assert same(found, batches[step]), step
                    assert ahead.state_dict() == states[step + 1], step
    finally:
        done.set()
        shooter.join()
        signal.signal(signal.SIGUSR1, before)
    assert len(hits) > 20


# --- the thread's end
# -------------------------------------------------------------------------------------------------


def check_end():
    for end in ("close", "jump to the end", "forgotten"):
        ahead = Prefetched(toy(), stop=20)
        ahead.micro_batches(0)
        there = weakref.ref(ahead)
        assert len(prefetching()) == 1
        if end == "close":
            ahead.close()
            ahead.close()
            assert same(ahead.micro_batches(1), toy().micro_batches(1)), "it may be asked again"
            ahead.close()
        elif end == "jump to the end":
            ahead.micro_batches(19)
        elif end == "forgotten":
            gc.disable()  # by its references alone
            try:
                del ahead
                assert not prefetching()
            finally:
                gc.enable()
                if there() is not None:
                    there().close()
        assert not prefetching(), end


def check_many_jumps():
    """One thread at a time, whatever is asked."""
    with wrapped(toy(), depth=3) as ahead:
        for step in np.random.default_rng(0).integers(0, 30, 60).tolist():
            assert same(ahead.micro_batches(step), toy().micro_batches(step))
            assert len(prefetching()) <= 1


def never_ends(monkeypatch):
    def run(self, *args):
        while not GIVE_UP.is_set():
            time.sleep(0.01)

    GIVE_UP.clear()
    monkeypatch.setattr(engine_prefetch._Ahead, "_run", run)
    monkeypatch.setattr(engine_prefetch._Ahead, "end", lambda self, patience=None: None)


GIVE_UP = threading.Event()


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No test inherits another one's thread."""
    yield
    GIVE_UP.set()
    if prefetching():
        gc.collect()
    assert until(lambda: not prefetching())


def the_thread_knows_its_owner(monkeypatch):
    real = engine_prefetch._Ahead.__init__

    def broken(self, loader, *args):
        real(self, loader, *args)
        frame = sys._getframe(1)
        self.owner = frame.f_locals["self"]
        del frame

    monkeypatch.setattr(engine_prefetch._Ahead, "__init__", broken)


def check_no_gradient():
    """Autograd's mode belongs to a thread: in neither is there a graph behind a batch."""
    w = torch.ones(3, requires_grad=True)
    with wrapped(Loader(40, 4, lambda rows, positions, step: 2 * w)) as ahead:
        assert not any(ahead.micro_batches(step)[0][0].requires_grad for step in range(4))
        assert torch.is_grad_enabled()


def with_a_graph(monkeypatch):
    monkeypatch.setattr(engine_prefetch.torch, "no_grad", contextlib.nullcontext)


def check_device_stream():
    """On a GPU: a step is made inside the thread's stream, marked there when it is made, and received in the
    main thread each time before it is handed out.
    """
    said, inside = [], threading.local()

    class StandIn:
        @contextlib.contextmanager
        def enter(self):
            inside.stream = True
            yield
            inside.stream = False

        def mark(self, parts):
            step = parts[0][0]
            said.append(("marked", step, getattr(inside, "stream", False)))
            return lambda: said.append(("received", step, threading.current_thread().name))

    def make(rows, positions, step):
        said.append(("made", step, getattr(inside, "stream", False)))
        return step

    with pytest.MonkeyPatch.context() as m:
        m.setattr(engine_prefetch, "_stream_for", lambda parts: StandIn())
        with wrapped(Loader(40, 4, make), stop=4) as ahead:
            for step in (0, 1, 1, 2, 3):
                ahead.micro_batches(step)
                received = [what for what, s, _ in said if what == "received" and s == step]
                said.append(("taken", step, len(received)))
    of = [[(what, how) for what, s, how in said if s == step] for step in range(4)]
    main = threading.main_thread().name
    assert of[0] == [("made", False), ("taken", 0)], "the first, by the main thread on its own stream"
    assert of[1] == [
        ("made", True), ("marked", True), ("received", main), ("taken", 1), ("received", main), ("taken", 2)
    ]  # fmt: skip
    assert of[2] == of[3] == [("made", True), ("marked", True), ("received", main), ("taken", 1)]


def taken_without_waiting(monkeypatch):
    real = engine_prefetch._Ahead.take
    monkeypatch.setattr(
        engine_prefetch._Ahead,
        "take",
        lambda self, asked: (made := real(self, asked)) and made._replace(receive=None),
    )


def outside_of_the_stream(monkeypatch):
    real = engine_prefetch._Ahead.__init__

    def broken(self, *args):
        real(self, *args)
        self.device.enter = contextlib.nullcontext

    monkeypatch.setattr(engine_prefetch._Ahead, "__init__", broken)


test_the_code_passes, test_the_bug_is_caught = planted(
    [
        (check_same_batches, begins_too_late),
        (check_same_batches, whole_batches_only),
        (check_same_batches, takes_what_comes),
        (check_made_once, forgets_the_last),
        (check_depth, one_too_many),
        (check_stop, never_stops),
        (check_state, state_of_the_thread),
        (check_state, state_of_the_step_before),
        (check_state, nothing_is_put_back),
        (check_resume, loads_beside_the_thread),
        (check_streams_are_not_read_again, nothing_is_put_back),
        (check_errors, errors_are_forgotten),
        (check_errors, errors_change_their_type),
        (check_errors, errors_stay),
        (check_errors_of_streams, nothing_is_put_back),
        (check_interrupts, taken_at_once),
        (check_end, never_ends),
        (check_end, the_thread_knows_its_owner),
        (check_many_jumps, takes_what_comes),
        (check_no_gradient, with_a_graph),
        (check_device_stream, taken_without_waiting),
        (check_device_stream, outside_of_the_stream),
    ]
)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_anywhere(monkeypatch):
    check_interrupts_anywhere()
    nothing_is_put_back(monkeypatch)
    with pytest.raises(AssertionError):
        check_interrupts_anywhere()


def test_what_cannot_be_wrapped():
    with pytest.raises(ValueError, match="depth 0"):
        Prefetched(toy(), 0)
    with pytest.raises(TypeError, match="generator cannot be asked"):
        Prefetched(x for x in ())


def test_no_second_thread_on_apple(monkeypatch):
    """PyTorch crashes there when two threads compute."""
    monkeypatch.setattr(engine_prefetch, "_one_thread_only", lambda parts: True)
    with wrapped(toy()) as ahead:
        for step in range(3):
            assert same(ahead.micro_batches(step), toy().micro_batches(step)) and not prefetching()


# --- what is particular to CUDA, with stand-ins for its calls
# -------------------------------------------------------------------------------------------------


def test_cuda_calls(monkeypatch):
    """The order in which a step goes over from one stream to the other, for each of its tensors."""
    said = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            said.append(f"event on {self.name}")
            return "event"

        def wait_event(self, event):
            said.append(f"{self.name} waits for the {event}")

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: f"in {stream.name}")
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda self, stream: said.append(f"{self.tolist()} used by {stream.name}"),
    )
    side = engine_prefetch._DeviceStream(torch.device("cpu"))
    assert side.enter() == "in side"
    draws = Loader(4, 4, None).positions(0)
    parts = [
        ((torch.tensor(1), None, {"x": [torch.tensor(2), 7]}), 0.5),
        (torch.empty(1, device="meta"), draws),
    ]
    receive = side.mark(parts)
    assert said == ["side waits for main", "event on side"]
    receive()
    assert said[2:] == [
        "main waits for the event", "1 used by main", "2 used by main", "[0, 1, 2, 3] used by main"
    ]  # fmt: skip
    assert engine_prefetch._stream_for(parts) is None and not engine_prefetch._one_thread_only(parts)


def test_copies_to_a_gpu_do_not_wait():
    """Out of pinned memory; everything else as `to` does it."""

    class Fake:
        def __init__(self, kind, pinned=False):
            self.device, self.pinned = torch.device(kind), pinned

        def pin_memory(self):
            return Fake("cpu", True)

        def to(self, device, non_blocking=False):
            return device, self.pinned, non_blocking

    assert onto(Fake("cpu"), "cuda:1") == ("cuda:1", True, True)
    assert onto(Fake("cuda"), "cuda") == ("cuda", False, False)
    assert onto(Fake("cpu"), "mps") == ("mps", False, False)
    x = torch.arange(3)
    assert onto(x, None) is x and onto(x, "cpu") is x and onto(x, torch.device("meta")).device.type == "meta"


# --- signals
# -------------------------------------------------------------------------------------------------

WAITS = """
    import signal, sys, time
    from flextok_edu.engine import prefetch
    from flextok_edu.engine.loader import Loader
    {bug}
    def make(rows, positions, step):
        time.sleep(0 if step == 0 else 3)
        return rows

    loader = prefetch.Prefetched(Loader(40, 4, make))
    loader.micro_batches(0)
    signal.signal(signal.SIGTERM, lambda *a: print("heard", time.monotonic(), flush=True))
    print("waits", flush=True)
    try:
        loader.micro_batches(1)
    except KeyboardInterrupt:
        print("stopped", time.monotonic(), flush=True)
"""
MASKED = """
    import threading
    start = threading.Thread.start
    def start_and_mask(self):
        start(self)
        if self.name == "prefetch":  # from now on the system gives signals to the other thread
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    threading.Thread.start = start_and_mask
"""
FOR_EVER = """
    class Bell:
        def __init__(self):
            self.lock = threading.Lock()
            self.release = self.lock.release

        def acquire(self, timeout):
            return self.lock.acquire()

    class Threading:
        Lock, Thread, current_thread = Bell, threading.Thread, threading.current_thread

    prefetch.threading = Threading
"""
SWALLOWED = """
    take = prefetch._Ahead.take
    def again(self, asked):
        while True:
            try:
                return take(self, asked)
            except KeyboardInterrupt:
                pass
    prefetch._Ahead.take = again
"""


def check_signals(bug=""):
    """While the thread reads and the main thread waits: SIGTERM is heard, Ctrl-C stops, both at once."""
    code = textwrap.dedent(WAITS).replace("{bug}", textwrap.dedent(bug))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "waits\n"
            time.sleep(0.2)
            for number, word in ((signal.SIGTERM, "heard"), (signal.SIGINT, "stopped")):
                sent = time.monotonic()
                os.kill(child.pid, number)
                said = child.stdout.readline().split()
                assert said[:1] == [word] and float(said[1]) - sent < 1.5, said
            assert child.wait(timeout=20) == 0
        finally:
            child.kill()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("which", ("", MASKED), ids=("main", "other"))
def test_signals_are_served(which):
    """Whichever thread the system gives them to."""
    check_signals(which)


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("bug", (SWALLOWED, MASKED + FOR_EVER), ids=("swallowed", "for_ever"))
def test_waiting_deafly_is_caught(bug):
    with pytest.raises(AssertionError):
        check_signals(bug)


# --- whole trainings
# -------------------------------------------------------------------------------------------------


class Ahead(Callback):
    """What a trainer does around a training; and SIGTERM after some step."""

    def __init__(self, stop_after=None):
        self.stop_after = stop_after

    @contextlib.contextmanager
    def around(self, training, backend):
        loader = training.loader
        training.loader = Prefetched(loader, stop=training.steps)
        try:
            yield
        finally:
            training.loader.close()
            training.loader = loader

    def step(self, training, backend, looked):
        if training.done == self.stop_after:
            until(lambda: len(training.loader._ahead.ready) == 2)  # the thread is as far ahead as it may
            os.kill(os.getpid(), signal.SIGTERM)


class Streamed:
    """Images to train on that are read from front to back."""

    scenes = True

    def feed(self, batch, seed=0, device="cpu", flip=False):
        return StreamLoader(StreamSource(Rows(), "toys"), 16, batch, seed, block=12, device=device, flip=flip)

    def head(self, count):
        return ToyScenes(size=16, length=8).render(progress=False)[0]


def train(stage, noise="cpu", trainer=None):
    config = StageConfig(steps=12, batch=4, lr=3e-3, warmup=2, ema=0.9)
    p = replace(PRESETS["micro"], image_size=16, vae=VAE_SMALL, tokenizer=SMALL, train_vae=config)
    p = replace(p, train_tokenizer=config, vae_loss=replace(p.vae_loss, perceptual=0.0, adversarial=0.0))
    how = {"progress": False, "noise": noise, "trainer": trainer}
    if stage == "vae":
        return train_vae(Streamed(), p, **how)
    g = torch.Generator().manual_seed(1)
    data = Latents(torch.randn(40, 4, 8, 8, generator=g), torch.rand(40, 4, 8, 8, generator=g))
    return train_tokenizer(data, None, p, **how)


def check_long_run(folder, stage, noise):
    """Alone; beside a thread; stopped by SIGTERM and gone on with, beside a thread: bit for bit the same."""
    expected, log = train(stage, noise)
    for name, stops in (("whole", [None]), ("stopped", [5, 8, None])):
        for stop in stops:
            trainer = long_run(folder / name, device="cpu", callbacks=[Ahead(stop)])
            with pytest.raises(Stopped) if stop else contextlib.nullcontext():
                model, found = train(stage, noise, trainer)
            assert not prefetching()
        for (n, a), b in zip(expected.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b), (name, n)
        losses = [row[stage] for row in found]
        assert losses == [row[stage] for row in log], name


@pytest.mark.parametrize("stage,noise", [("vae", "cpu"), ("tokenizer", "cpu"), ("tokenizer", "device")])
def test_a_long_run_beside_a_thread(tmp_path, stage, noise):
    check_long_run(tmp_path, stage, noise)


@pytest.mark.parametrize("stage", ("vae", "tokenizer"))
def test_a_thread_one_step_off_is_caught(tmp_path, monkeypatch, stage):
    real = engine_prefetch._Ahead._attempt
    monkeypatch.setattr(
        engine_prefetch._Ahead,
        "_attempt",
        lambda self, asked, state: real(self, (asked[0] + 1, *asked[1:]), state)._replace(asked=asked),
    )
    with pytest.raises(AssertionError):
        check_long_run(tmp_path, stage, "cpu")


def test_a_training_that_fails_leaves_no_thread():
    """The loss is not finite; the thread goes, the loader is where the training was."""
    w = nn.Parameter(torch.ones(1))

    def loss(batch, progress):
        value = (w * batch["noise"]).square().mean()
        return value * (math.nan if progress > 0.4 else 1), {}

    objective = Objective("toy", loss, [("w", w)], StageConfig(steps=8, batch=8))
    with pytest.raises(FloatingPointError):
        fit([objective], toy(), 8, trainer=Trainer(callbacks=[Ahead()]), progress=False)
    assert not prefetching()


# --- warnings, when it is a thread that decodes
# -------------------------------------------------------------------------------------------------


def check_filters():
    """The thread decodes while the main thread is inside a block of its own: the filters are put back."""
    before, entered, leave = list(warnings.filters), threading.Event(), threading.Event()

    def decodes():
        with quiet_pillow():
            entered.set()
            leave.wait(5)

    thread = threading.Thread(target=decodes)
    thread.start()
    assert entered.wait(5)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        leave.set()
        thread.join()
    left = [f for f in warnings.filters if f != data_reading._NOTES]
    warnings.filters[:] = before
    assert left == [f for f in before if f != data_reading._NOTES]


@contextlib.contextmanager
def careless_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_filters_survive_a_thread(monkeypatch):
    with warnings.catch_warnings():
        check_filters()
        patch(monkeypatch, data_reading, "quiet_pillow", careless_quiet)
        monkeypatch.setitem(globals(), "quiet_pillow", careless_quiet)
        with pytest.raises(AssertionError):
            check_filters()


def test_pillow_is_silent_in_a_thread():
    """Its notes, and only its."""

    def decodes():
        for _ in range(2):
            with quiet_pillow():
                warnings.warn_explicit("a note", UserWarning, "Image.py", 1, module="PIL.Image")
                warnings.warn_explicit(
                    "ours", UserWarning, "reading.py", 1, module="flextok_edu.data.reading"
                )

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        thread = threading.Thread(target=decodes)
        thread.start()
        thread.join()
    assert [str(w.message) for w in heard] == ["ours", "ours"]


# --- noise
# -------------------------------------------------------------------------------------------------


def noises(loader, step, rank=0, world=1, micro=1):
    """The random parts of the micro-batches, flat."""
    found = []
    for batch, _ in loader.micro_batches(step, rank, world, micro):
        if isinstance(loader, TokenizerLoader):
            found += [batch[0], batch[2].noise]  # the posterior's sample, and the flow's
        else:
            found.append(batch[-1])
    return [x.flatten() for x in found]


def pixels(noise):
    images = Loader(40, 8, lambda rows, positions, step: (torch.zeros(len(rows), 3, 16, 16), rows), seed=0)
    return PosteriorLoader(images, VAE_SMALL, noise)


def check_device_noise():
    """The same question gives the same bits, in a loader that has seen something else too; any other question
    gives other numbers; and only `cpu` does not mind how the batch is divided.
    """
    for make in (tokenizer_loader, pixels):
        for kind in ("cpu", "device"):
            loader, again = make(kind), make(kind)
            again.micro_batches(9, 1, 2, 2)
            shares = list(itertools.product((3, 4), (0, 1), (2,), (1, 2)))
            for share in shares:
                assert same(noises(loader, *share), noises(again, *share)), share
            # two steps, each dealt to two processes with two micro-batches: all of it differs
            each = [x for share in shares if share[3] == 2 for x in noises(loader, *share)]
            assert not any(torch.equal(a, b) for a, b in itertools.combinations(each, 2)), kind
        whole = {kind: torch.cat(noises(make(kind), 3)) for kind in ("cpu", "device")}
        for kind, x in whole.items():
            parts = torch.cat([p for rank in (0, 1) for p in noises(make(kind), 3, rank, 2, 2)])
            assert torch.equal(x.sort().values, parts.sort().values) == (kind == "cpu"), kind


def check_moments():
    for stream, step in (("flow", 0), ("posterior", 5)):
        source = NoiseSource("device", 0, 256)
        parts = [source.draw(stream, (4, 8, 8), step, p) for p in torch.arange(256).split(16)]
        x = torch.stack(parts).flatten(1)  # 16 micro-batches of 4096 numbers
        n = x.numel()
        assert abs(x.mean()) < 4 / n**0.5 and abs(x.var() - 1) < 4 * (2 / n) ** 0.5
        assert abs((x**3).mean()) < 4 * (15 / n) ** 0.5 and abs((x**4).mean() - 3) < 4 * (96 / n) ** 0.5
        off = torch.corrcoef(x)[~torch.eye(16, dtype=torch.bool)]
        assert off.abs().max() < 5 / x.shape[1] ** 0.5, "micro-batches do not know of each other"


def planted_noise(names):
    def bug(monkeypatch):
        def draw(self, stream, shape, step, positions, device="cpu"):
            if self.kind == "cpu":
                return real(self, stream, shape, step, positions, device)
            known = {"stream": stream, "seed": self.seed, "step": step, "place": int(positions[0])}
            generator = named_generator(*(known[n] for n in names), device=device)
            return torch.randn(len(positions), *shape, generator=generator, device=device)

        real = NoiseSource.draw
        monkeypatch.setattr(NoiseSource, "draw", draw)

    bug.__name__ = "noise_by_" + "_".join(names)
    return bug


def global_noise(monkeypatch):
    monkeypatch.setattr(
        NoiseSource,
        "draw",
        lambda self, stream, shape, step, positions, device="cpu": torch.randn(len(positions), *shape),
    )


test_noise, test_a_bug_of_noise_is_caught = planted(
    [
        (check_device_noise, planted_noise(("stream", "seed", "place"))),
        (check_device_noise, planted_noise(("stream", "seed", "step"))),
        (check_device_noise, global_noise),
        (check_moments, planted_noise(("stream", "seed", "step"))),
    ]
)


def test_noise_by_name_is_as_before():
    """What `noise_like` gives for (seed, step, place): checkpoints of earlier versions go on."""
    places = torch.tensor([5, 2, 7])
    found = NoiseSource("cpu", 3, 8).draw("flow", (2, 4), 6, places)
    assert torch.equal(found, engine_tensors.noise_like((2, 4), 3, [53, 50, 55], stream="flow"))


def test_noise_is_one_of_two():
    assert Runtime().noise == "cpu" and Runtime.of(None, {"noise": "device"}).noise == "device"
    for refused in (
        lambda: Runtime(noise="gpu"),
        lambda: NoiseSource("auto", 0, 1),
        lambda: latents("cuda"),
        lambda: train("tokenizer", "fast"),
    ):
        with pytest.raises(ValueError, match="use 'cpu' .* or 'device'"):
            refused()


def check_recipe():
    """A stage's recipe says how noise was drawn, if not by name.

    Older checkpoints stay valid, and a run goes on with its own kind alone.
    """
    images, labels = ToyScenes(size=16, length=8).render(progress=False)
    data = ImageSet(images, labels, tuple("abcdefghijkl"), "toys", scenes=True)

    def task(noise):
        job = SimpleNamespace(
            config=RunConfig(noise=noise), preset=PRESETS["micro"], precision=None, changes={}, train=data
        )
        job.device, job.compile, job.out, job.feature_extractor = "cpu", False, Path("no_such_run"), None
        job.noise = noise
        return apps_stages._task(job, STAGE_TABLE["vae"], None)

    facts = {"step": 3, "log": [], "feed": {}, "ema_updates": 3, "scalers": {}}
    by_name, on_device = task("cpu"), task("device")
    assert (by_name.runtime.noise, on_device.runtime.noise) == ("cpu", "device")
    assert set(by_name.recipe) == {"stage", "seed", "images", "after", "precision", "preset"}
    for own, other in ((by_name, on_device), (on_device, by_name)):
        assert not Recipe(own.recipe).agree(facts | {"recipe": own.recipe}, Path("here"))
        try:
            Recipe(own.recipe).agree(facts | {"recipe": other.recipe}, Path("here"))
        except ValueError as error:
            assert "noise: " in str(error)
        else:
            raise AssertionError("another noise, and nothing was said")
    check(RunConfig(noise="device"))
    with pytest.raises(ValueError, match="noise 'gpu'"):
        check(RunConfig(noise="gpu"))


def test_recipe():
    check_recipe()


def test_a_silent_recipe_is_caught(monkeypatch):
    real = apps_stages._task

    def broken(job, stage, after):
        found = real(job, stage, after)
        return replace(found, recipe={k: v for k, v in found.recipe.items() if k != "noise"})

    monkeypatch.setattr(apps_stages, "_task", broken)
    with pytest.raises(AssertionError):
        check_recipe()


def test_every_stage_gets_the_noise():
    """What a stage's trainer takes by name has the field of the runtime."""
    task = SimpleNamespace(runtime=Runtime(noise="device"))
    assert apps_stage_table._how(task, None)["noise"] == "device"


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="Hugging Face datasets")
def test_a_real_stream():
    """Hugging Face's own, over several epochs and shards."""
    import datasets

    rows = Rows(30).rows
    data = datasets.Dataset.from_list([{"image": r["image"]["bytes"], "label": r["label"]} for r in rows])

    def make():
        source = StreamSource(data.to_iterable_dataset(num_shards=3), "hub", image="image", label="label")
        return StreamLoader(source, 16, 4, seed=1, block=7)

    plain, states, batches = make(), [], []
    for step in range(20):
        states.append(plain.state_dict())
        batches.append(plain.micro_batches(step))
    with wrapped(make(), depth=3) as ahead:
        for step in range(12):
            assert ahead.state_dict() == states[step]
            assert same(ahead.micro_batches(step), batches[step])
            until(lambda: len(ahead._ahead.ready) == 3)
        state = ahead.state_dict()
    assert state == states[12] == ahead.loader.state_dict()
    with wrapped(make()) as again:
        again.load_state_dict(state)
        assert all(same(again.micro_batches(step), batches[step]) for step in range(12, 20))

"""The lesson training: the same training in parts, on processes, in pieces; what is left behind when it is
killed, stopped, or goes wrong.
"""

import contextlib
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from planting import patch
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import long_run
import flextok_edu.engine.checkpoint as engine_checkpoint
import flextok_edu.engine.claims as engine_claims
import flextok_edu.engine.distributed as engine_distributed
import flextok_edu.engine.monitor as engine_monitor
import flextok_edu.engine.resume as engine_resume
import flextok_edu.engine.tensors as engine_tensors
from flextok_edu.engine.config import StageConfig
from flextok_edu.engine.loader import Loader
from flextok_edu.engine.optim import EMA
from flextok_edu.engine.trainer import Callback, Objective, Trainer, fit
from flextok_edu.training import TokenizerLoader
from flextok_edu.engine.checkpoint import Checkpoints
from flextok_edu.engine.claims import claimed
from flextok_edu.engine.distributed import Distributed, recomputed
from flextok_edu.engine.long_run import Dashboard, Stopped, long_run as lasting

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = str(ROOT / "tests" / "long_run.py")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}


def start(*args, world=1, **more):
    launch = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        if world > 1
        else [sys.executable]
    )
    return subprocess.run(
        [*launch, PROGRAM, *args], env=ENV, capture_output=True, text=True, timeout=200, **more
    )


def answer(result):
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def close(a, b, keys, tolerance=1e-5):
    """Every loss of every logged step."""
    assert len(a) == len(b) and len(a) > 1
    for x, y in zip(a, b):
        for key in keys:
            if key in x or key in y:
                assert x[key] == pytest.approx(y[key], rel=tolerance, abs=tolerance), (x["step"], key)


KEYS = {
    "vae": ("vae", "critic", "scale", "l1", "kl", "score_real"),
    "tokenizer": ("tokenizer", "flow"),
    "ar": ("ar", "first", "last", "accuracy"),
}


@pytest.fixture(scope="module")
def alone():
    """Each stage in one process and one batch."""

    def run(name, optimizer="adamw", cache={}):
        if (name, optimizer) not in cache:
            cache[name, optimizer] = long_run.stage(name, optimizer=optimizer, trainer=Trainer())
        return cache[name, optimizer]

    return run


# --- parts and processes
# -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("micro", (2, 3))
def test_accumulation_changes_nothing(name, micro, alone):
    model, log = alone(name)
    other, log_parts = long_run.stage(name, trainer=Trainer(Distributed("cpu", micro=micro)))
    close(log, log_parts, KEYS[name])
    for (n, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.allclose(a, b, atol=2e-4), n
    if name == "tokenizer":
        assert torch.allclose(model.norm.mean, other.norm.mean, atol=1e-4) and torch.allclose(
            model.norm.std, other.norm.std, atol=1e-4
        )


@pytest.mark.parametrize(
    "name,options",
    [
        ("vae", {}),
        ("vae", {"optimizer": "muon"}),
        ("vae", {"sharded": True, "optimizer": "muon"}),
        ("tokenizer", {}),
        ("tokenizer", {"optimizer": "muon"}),
        ("tokenizer", {"micro": 2, "sharded": True}),
        ("ar", {"sharded": True, "recompute": True}),
        ("tokenizer", {"sharded": True, "optimizer": "muon"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x) or "ddp",
)
def test_two_processes_are_one(name, options, alone):
    """The same global batch on two processes: the losses of one to 1e-5 over 20 steps; DDP and FSDP."""
    _, log = alone(name, options.get("optimizer", "adamw"))
    two = answer(start(name, "-", *(f"{k}={json.dumps(v)}" for k, v in options.items()), world=2))
    assert two["world"] == 2 and two["dealt"] == (
        options.get("optimizer") == "muon" and (name == "vae" or "sharded" not in options)
    )  # no transformer blocks, nothing to shard
    close(log, two["log"], KEYS[name])


def check_divided(monkeypatch, work):
    """Five matrices over two, three, four and six processes, one after the other: each does its part, all get
    the same whole.
    """
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    for world in (2, 3, 4, 6):
        parts, done = {}, []

        def collect(whole, part):
            parts[len(parts)] = part.clone()

        monkeypatch.setattr("torch.distributed.all_gather_into_tensor", collect)
        for rank in range(world):
            engine_distributed._divided(rank, world, lambda m: done.append(len(m)) or work(m), x)
        if world > len(x):
            assert done == [5] * world and not parts  # too few to share: everybody does all
            continue
        assert sum(done) == 5 and max(done) == math.ceil(5 / world)
        monkeypatch.setattr(
            "torch.distributed.all_gather_into_tensor",
            lambda whole, part: whole.copy_(torch.cat([parts[i] for i in range(world)])),
        )
        for rank in range(world):
            assert torch.equal(engine_distributed._divided(rank, world, work, x), work(x)), (rank, world)


def test_muon_is_dealt_out(monkeypatch):
    check_divided(monkeypatch, lambda m: 2 * m)


def test_everybody_doing_everything_is_caught(monkeypatch):
    patch(monkeypatch, engine_distributed, "_divided", lambda rank, world, work, x: work(x))
    with pytest.raises(AssertionError):
        check_divided(monkeypatch, lambda m: 2 * m)


def check_shares_weigh_what_they_hold():
    """Uneven shares: 7 rows in 2 parts on 2 processes; the gradient of the mean over all."""
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    feed = Loader(7, 7, lambda rows, positions, step: x[rows])
    w = torch.ones(3, requires_grad=True)
    (whole,) = torch.autograd.grad((x @ w).square().mean(), w)
    parts = [part for rank in (0, 1) for part in feed.micro_batches(0, rank, 2, 2)]
    # DDP: mean over processes
    total = sum(torch.autograd.grad((rows @ w).square().mean() * weight, w)[0] for rows, weight in parts) / 2
    assert torch.allclose(total, whole, atol=1e-6) and sorted(len(rows) for rows, _ in parts) == [1, 2, 2, 2]


def test_shares_weigh_what_they_hold():
    check_shares_weigh_what_they_hold()


def test_equal_weights_for_unequal_shares_are_caught(monkeypatch):
    real = Loader.micro_batches
    monkeypatch.setattr(
        Loader,
        "micro_batches",
        lambda self, step, rank=0, world=1, micro=1: [
            (b, 1 / micro) for b, _ in real(self, step, rank, world, micro)
        ],
    )
    with pytest.raises(AssertionError):
        check_shares_weigh_what_they_hold()


def test_what_cannot_be_shared_is_refused():
    line = nn.Linear(1, 1)
    objective = Objective(
        "line", lambda b, _: (line(b).sum(), {}), list(line.named_parameters()), StageConfig()
    )
    with pytest.raises(TypeError, match="need a Loader"):
        fit(
            [objective],
            iter([torch.ones(2, 1)] * 3),
            3,
            progress=False,
            trainer=Trainer(Distributed("cpu", micro=2)),
        )
    with pytest.raises(ValueError, match="batch of 2 cannot be dealt to 1 processes with 3"):
        fit(
            [objective],
            Loader(9, 2, lambda *_: torch.ones(2, 1)),
            3,
            progress=False,
            trainer=Trainer(Distributed("cpu", micro=3)),
        )
    with pytest.raises(ValueError, match="0 items"):
        Loader(0, 2, None)


def test_recomputing_changes_nothing():
    logs, held = [], []
    for recompute in (False, True):
        log = long_run.stage("ar", 6, trainer=Trainer(Distributed("cpu", recompute=recompute)))[1]
        logs.append([r["ar"] for r in log])
    assert logs[0] == logs[1]
    block = nn.Sequential(*[nn.Linear(16, 16) for _ in range(8)])
    for recompute in (False, True):
        saved = []
        with (
            recomputed([block], recompute),
            torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x),
        ):
            block(torch.randn(4, 16, requires_grad=True)).sum().backward()
        held.append(sum(saved))
    assert held[1] < held[0] / 3 and "forward" not in vars(block)


@pytest.mark.parametrize("name", KEYS)
def test_bfloat16_trains(name):
    log = long_run.stage(
        name, 40, precision=torch.bfloat16, trainer=Trainer(Distributed("cpu", torch.bfloat16))
    )[1]
    first, last = log[0], log[-1]
    key = {"vae": "l1", "tokenizer": "tokenizer", "ar": "ar"}[name]
    assert last[key] < first[key]


# --- killed
# ------------------------------------------------------------------------------------------------------------


def kill_later(target, when, sign):
    """Run in a forked child (imports are paid once), and SIGKILL it `when` seconds after it has made a sign
    of life, a file. Returns its exit status.
    """
    sign.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            target()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    deadline = math.inf
    while time.monotonic() < deadline:
        if deadline == math.inf and sign.exists():
            deadline = time.monotonic() + when
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", ("tokenizer", "vae"))
def test_killed_twenty_times_leaves_no_trace(name, tmp_path):
    """SIGKILL at random moments, also while a checkpoint is written; the weights at the end are those of an
    uninterrupted run, bit for bit.
    """
    torch.set_num_threads(1)
    plan = dict(steps=120, batch=8, optimizer="muon" if name == "tokenizer" else "adamw")
    wanted = long_run.own_hash(long_run.stage(name, **plan)[0])

    class Alive(Callback):
        def begin(self, training, backend):
            (tmp_path / "trains").touch()

    def go():
        model, _ = long_run.stage(
            name, trainer=lasting(tmp_path / "run", device="cpu", steps=2, callbacks=[Alive()]), **plan
        )
        (tmp_path / "hash").write_text(long_run.own_hash(model))

    dice, statuses, torn, starts, reach = random.Random(0), [], 0, set(), 0.35
    folder = tmp_path / "run" / "checkpoints"
    while statuses.count(-9) < 20:

        def newest():
            return max([0, *(int(f.stem[5:]) for f in folder.glob("step-*.safetensors"))])

        began = newest()
        starts.add(began)
        statuses.append(
            kill_later(go, reach * dice.random() if len(statuses) < 200 else 60, tmp_path / "trains")
        )
        assert statuses[-1] in (-9, 0), statuses
        # long enough on a busy machine to get anywhere
        reach = min(reach * 1.3, 10) if statuses[-1] == -9 and newest() == began else max(reach / 1.1, 0.2)
        torn += bool(list(folder.glob(".step-*")))
        for file in folder.glob("step-*.safetensors"):  # whatever has its real name is whole
            assert Checkpoints(folder).newest() is not None and file.stat().st_size > 1000
        if statuses[-1] == 0:  # finished early: once more from the start
            assert (tmp_path / "hash").read_text() == wanted
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "hash").unlink()
    assert kill_later(go, 100, tmp_path / "trains") == 0
    assert (tmp_path / "hash").read_text() == wanted and len(starts) > 5, "most lives began at a checkpoint"
    print(
        f"{name}: {statuses.count(-9)} kills, {torn} of them in the middle of a write, {statuses.count(0)} "
        "early finishes"
    )


def resumes(tmp_path, forget=()):
    """10 of 20 steps, then a new process's worth of objects for the rest."""
    with pytest.raises(Stopped):
        long_run.stage("tokenizer", 20, trainer=stop_at(10, tmp_path))
    model, log = long_run.stage("tokenizer", 20, trainer=lasting(tmp_path, device="cpu"))
    return long_run.own_hash(model), [
        {
            k: row[k]
            for k in (
                "step",
                "tokenizer",
                "flow",
                "tokenizer_grad",
                "codebook_usage",
                "entropy_1",
                "entropy_8",
            )
            if k in row
        }
        for row in log
    ]


class Signal(Callback):
    """A signal arrives in step `when`."""

    def __init__(self, when, number=signal.SIGINT):
        self.when, self.number = when, number

    def step(self, training, backend, looked):
        if training.done == self.when:
            os.kill(os.getpid(), self.number)


def stop_at(when, folder, **options):
    """A long run in which somebody presses Ctrl-C in step `when`."""
    return lasting(folder, device="cpu", callbacks=[Signal(when), *options.pop("callbacks", [])], **options)


def check_resume(tmp_path):
    torch.set_num_threads(1)
    model, log = long_run.stage("tokenizer", 20)
    weights, rows = resumes(tmp_path)
    assert weights == long_run.own_hash(model)
    assert (
        rows == [{k: row[k] for k in r} for r, row in zip(rows, log, strict=True)]
        and "codebook_usage" in rows[-1]
    )


def test_stopped_and_resumed(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)  # ignored, if the tests run in the background of a shell
    check_resume(tmp_path)
    assert "goes on after step 10 of 20" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before, "the handler is put back"


def forget_the_moments(m):
    patch(m, engine_checkpoint, "set_optimizer_state", lambda *a: None)


def forget_the_step(m):
    m.setattr(
        TokenizerLoader,
        "micro_batches",
        lambda self, step, rank=0, world=1, micro=1, real=TokenizerLoader.micro_batches: real(
            self, step % 10, rank, world, micro
        ),
    )


def forget_the_average(m):
    real = engine_resume.restore_training

    def restore(training, *rest):
        ema, training.ema = training.ema, None
        real(training, *rest)
        training.ema = ema

    patch(m, engine_resume, "restore_training", restore)


def forget_the_buffers(m):
    real = engine_resume.restore_training

    def restore(training, *rest):
        [o.buffers.clear() for o in training.objectives]
        real(training, *rest)

    patch(m, engine_resume, "restore_training", restore)


@pytest.mark.parametrize("bug", (forget_the_moments, forget_the_step, forget_the_average, forget_the_buffers))
def test_forgetting_is_caught(bug, tmp_path, monkeypatch):
    wanted = long_run.own_hash(long_run.stage("tokenizer", 20)[0])
    bug(monkeypatch)
    assert resumes(tmp_path)[0] != wanted


def check_channels_last(tmp_path):
    """Weights in another order in memory: the moments come back in that order."""

    def go(engine):
        torch.manual_seed(0)
        net = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        x = torch.randn(9, 3, 6, 6)
        objective = Objective(
            "net",
            lambda b, _: ((net(b) - b.mean()).square().mean(), {}),
            list(net.named_parameters()),
            StageConfig(lr=0.01, warmup=2),
        )
        fit(
            [objective],
            Loader(9, 3, lambda rows, positions, step: x[rows]),
            12,
            progress=False,
            trainer=engine,
        )
        return net

    whole = go(Trainer())
    with pytest.raises(Stopped):
        go(stop_at(5, tmp_path))
    again = go(lasting(tmp_path, device="cpu"))
    assert whole.weight.is_contiguous(memory_format=torch.channels_last) and torch.equal(
        whole.weight, again.weight
    )


def test_channels_last(tmp_path):
    check_channels_last(tmp_path)


def test_moments_in_another_order_are_caught(tmp_path, monkeypatch):
    patch(monkeypatch, engine_checkpoint, "placed_like", lambda x, other: x.to(other.device))
    with pytest.raises(AssertionError):
        check_channels_last(tmp_path)


def check_dice_are_resumed(tmp_path):
    """A loss that throws dice of its own, in Python, NumPy and PyTorch, throws the same after a pause."""

    def go(engine, thrown):
        engine_tensors.seed_everything(0)
        line = nn.Linear(1, 1)

        def loss(x, progress):
            thrown.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            return (line(x) * thrown[-1][2]).square().mean(), {}

        objective = Objective("line", loss, list(line.named_parameters()), StageConfig(lr=0.01))
        fit(
            [objective],
            Loader(9, 3, lambda rows, positions, step: rows[:, None].float()),
            12,
            progress=False,
            trainer=engine,
        )

    whole, pieces = [], []
    go(Trainer(), whole)
    with pytest.raises(Stopped):
        go(stop_at(5, tmp_path), pieces)
    go(lasting(tmp_path, device="cpu"), pieces)
    assert [d for d in pieces[1:6] + pieces[7:]] == whole, (
        "(the first throw of each sitting is the rehearsal's)"
    )


def test_dice_are_resumed(tmp_path):
    check_dice_are_resumed(tmp_path)


def test_a_probe_that_throws_dice_is_caught(tmp_path, monkeypatch):
    patch(monkeypatch, engine_monitor, "matmul_rate", lambda *a: 1e9 + float(torch.rand(())))
    with pytest.raises(AssertionError):
        check_dice_are_resumed(tmp_path)


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_signals_save_and_exit(number, tmp_path):
    """A real process, a real signal."""
    child = subprocess.Popen(
        [sys.executable, PROGRAM, "ar", str(tmp_path), "steps=4000", "save=20"],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("checkpoints/step-*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(number)
    _, err = child.communicate(timeout=100)
    assert child.returncode != 0 and "stopped after step" in err and "goes on from there" in err
    step = int(err.rsplit("stopped after step ", 1)[1].split(" of")[0])
    assert (tmp_path / "checkpoints" / f"step-{step:09}.safetensors").exists()


# --- one folder, one training
# ----------------------------------------------------------------------------------------------


class Holder:
    """Another process that claims a folder, and keeps it until it is spoken to.

    (A program of its own does the same in the notebook.)
    """

    def __init__(self, folder):
        (read, self.say), (self.hear, write) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.say)
            try:
                with claimed(folder):
                    os.write(write, b"claimed")
                    os.read(read, 1)
            except ValueError as error:
                os.write(write, str(error).encode())
            finally:
                os._exit(0)
        os.close(read)
        os.close(write)
        self.said = os.read(self.hear, 1000).decode()

    def end(self, kill=False):
        if self.pid:
            os.kill(self.pid, signal.SIGKILL) if kill else os.close(self.say)
            os.waitpid(self.pid, 0)
        self.pid = 0


@pytest.fixture
def hold():
    """Holders of folders, gone at the end."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    holders = []
    yield lambda folder: holders.append(Holder(folder)) or holders[-1]
    for holder in holders:
        holder.end(kill=True)


def test_a_second_process_is_refused_and_told_by_whom(hold, tmp_path):
    folder = tmp_path / "not there yet"
    first = hold(folder)
    assert first.said == "claimed"
    with pytest.raises(
        ValueError, match=rf"process {first.pid} on \S+ trains there \(since 20.*choose another folder"
    ):
        with claimed(folder):
            pass
    assert f"process {first.pid}" in hold(folder).said, "a third is refused as well: asking released nothing"
    with pytest.raises(ValueError, match=f"process {first.pid}"):
        long_run.stage("ar", 4, trainer=lasting(folder, device="cpu"))
    assert [p.name for p in folder.iterdir()] == [".claim"], "nothing was written"
    first.end()
    assert not folder.exists(), "a folder that was only claimed is not left behind"


def test_death_releases_a_claim(hold, tmp_path):
    (tmp_path / "run").mkdir()
    hold(tmp_path / "run").end(kill=True)
    assert (tmp_path / "run" / ".claim").exists()
    with claimed(tmp_path / "run", "evaluates"):
        with pytest.raises(ValueError, match="this very process evaluates there"):
            with claimed(tmp_path / "x" / ".." / "run"):
                pass
        with claimed(tmp_path / "run" / "vae"):
            assert (tmp_path / "run" / "vae" / ".claim").exists()
    assert not list((tmp_path / "run").iterdir())


def test_whatever_stands_in_a_claim(hold, tmp_path):
    """The text is for the message; no text, a foreign one, or a bad one changes nothing about who has the
    folder.
    """
    hold(tmp_path)
    for text in (b"", b"\xff", b"[" * 100_000, b'{"pid": "x"}', b"[1]", b'{"pid": 1e999, "host": 1}'):
        (tmp_path / ".claim").write_bytes(text)
        with pytest.raises(ValueError, match="another process trains there"):
            with claimed(tmp_path):
                pass


def test_a_training_works_under_the_claim_of_its_command(tmp_path):
    with claimed(tmp_path):
        with pytest.raises(Stopped):
            long_run.stage("ar", 8, trainer=stop_at(4, tmp_path))
        long_run.stage("ar", 8, trainer=lasting(tmp_path, device="cpu"))

        class Second(Callback):
            def step(self, training, backend, looked):
                long_run.stage("ar", 8, trainer=lasting(tmp_path, device="cpu"))

        with pytest.raises(ValueError, match="this very process trains there"):
            long_run.stage(
                "ar",
                9,
                trainer=lasting(
                    tmp_path, device="cpu", recipe={"another": 1}, ignore=("another",), callbacks=[Second()]
                ),
            )
        assert (tmp_path / ".claim").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints"]


def test_putting_a_folder_aside_keeps_the_claim(hold, tmp_path):
    folder = tmp_path / "run"
    with claimed(folder) as claim:
        assert claim.put_aside() is None, "there is nothing in it"
        (folder / "run.json").write_text("{}")
        (folder / "vae").mkdir()
        (folder / "vae" / ".claim").write_text("of a process that was killed")
        assert claim.put_aside() == tmp_path / "run.old-1"
        assert [p.name for p in folder.iterdir()] == [".claim"] and not list(
            (tmp_path / "run.old-1").rglob(".claim")
        )
        (folder / "run.json").write_text("{}")
        child = hold(folder / "vae")
        with pytest.raises(ValueError, match=f"vae is taken: process {child.pid}"):
            claim.put_aside()
        child.end(kill=True)
        assert (folder / "run.json").exists() and claim.put_aside() == tmp_path / "run.old-2"
    with claimed(tmp_path / "run.old-2"):
        pass


def test_a_disk_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    patch(monkeypatch, engine_claims, "lock_byte", none)
    with pytest.warns(UserWarning, match="without locks"):
        with claimed(tmp_path):
            pass


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
@pytest.mark.parametrize("before", (signal.SIG_DFL, signal.SIG_IGN))
def test_a_closed_terminal(before, tmp_path):
    """SIGHUP saves and stops; under nohup, which has it ignored, it does nothing."""

    kept = signal.signal(signal.SIGHUP, before)
    try:
        with pytest.raises(Stopped) if before == signal.SIG_DFL else contextlib.nullcontext():
            long_run.stage(
                "ar", 8, trainer=lasting(tmp_path, device="cpu", callbacks=[Signal(4, signal.SIGHUP)])
            )
        assert [f.stem for f in Checkpoints(tmp_path / "checkpoints").files()] == [
            "step-000000004" if before == signal.SIG_DFL else "step-000000008"
        ]
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, kept)


# --- what is on the disk
# -------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_nothing(tmp_path):
    """A real full disk where we may mount one; else a limit on the size of files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("needs the right to mount a small disk")
    try:
        store = Checkpoints(disk, keep=3)
        store.write(1, {"w": torch.ones(200_000)}, {"step": 1})
        with pytest.raises(
            OSError, match="step 2 .* could not be written .* Earlier checkpoints are untouched"
        ):
            store.write(2, {"w": torch.ones(200_000)}, {"step": 2})
        assert [f.name for f in disk.iterdir()] == ["step-000000001.safetensors"] and store.newest()[1] == {
            "step": 1
        }
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(OSError, match="could not be written"):
        long_run.stage("ar", 4, trainer=lasting(tmp_path / "run", device="cpu", steps=2))
    assert (tmp_path / "run").read_text() == "a file, not a folder"


def test_another_run_is_refused(tmp_path):
    with pytest.raises(Stopped):
        long_run.stage("tokenizer", 20, trainer=stop_at(4, tmp_path, recipe={"preset": "micro", "lr": 1e-3}))
    before = {f.name: f.read_bytes() for f in (tmp_path / "checkpoints").iterdir()}
    with pytest.raises(ValueError, match="lr: 0.001 then, 0.002 now"):
        long_run.stage(
            "tokenizer", 20, trainer=lasting(tmp_path, device="cpu", recipe={"preset": "micro", "lr": 2e-3})
        )
    with pytest.raises(ValueError, match="of another model"):
        long_run.stage(
            "ar", 20, trainer=lasting(tmp_path, device="cpu", recipe={"preset": "micro", "lr": 1e-3})
        )
    assert before == {f.name: f.read_bytes() for f in (tmp_path / "checkpoints").iterdir()}
    long_run.stage(
        "tokenizer",
        20,
        trainer=lasting(tmp_path, device="cpu", recipe={"preset": "micro", "lr": 2e-3}, ignore=("lr",)),
    )


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        store.write(step, {"w": torch.full((5,), float(step))}, {"step": step})
    assert [f.name for f in store.files()] == ["step-000000002.safetensors", "step-000000003.safetensors"]
    data = store.files()[-1].read_bytes()
    for bad in (b"", data[:20], data[:-3], b"\xff" * len(data)):
        store.files()[-1].write_bytes(bad)
        with pytest.warns(UserWarning, match="damaged"):
            assert store.newest()[1] == {"step": 2}
    assert Checkpoints(tmp_path / "none").newest() is None


def check_a_flipped_bit(tmp_path, whole=None):
    """Any bit of the newest checkpoint, in its numbers or in its json: the one before is taken, and the
    warning names the file.
    """
    store = Checkpoints(tmp_path, keep=2)
    facts = {"step": 1, "log": [{"step": 0, "loss": 0.5}], "recipe": {"lr": 0.001}}
    store.write(1, {"weight/w": torch.ones(6), "optimizer/w/exp_avg": torch.ones(6)}, facts)
    store.write(2, {"weight/w": torch.ones(6) * 2, "optimizer/w/exp_avg": torch.ones(6)}, facts | {"step": 2})
    newest = store.files()[-1]
    whole = newest.read_bytes()
    assert store.newest()[1]["step"] == 2
    for i in (*range(8, len(whole), 7), len(whole) - 1):
        for bit in (1, 128):
            newest.write_bytes(whole[:i] + bytes([whole[i] ^ bit]) + whole[i + 1 :])
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                tensors, found = store.newest()
            if (tensors["weight/w"] == 2).all() and found == facts | {"step": 2}:
                continue  # a name of no meaning in the header
            assert found == facts and (tensors["weight/w"] == 1).all(), (i, whole[i - 10 : i + 10])
            assert "step-000000002" in str(heard[0].message) and "passed over" in str(heard[0].message)


def test_a_flipped_bit_falls_back(tmp_path):
    check_a_flipped_bit(tmp_path)


def test_a_content_that_nobody_looks_at_is_caught(tmp_path, monkeypatch):
    patch(monkeypatch, engine_checkpoint, "_content", lambda *a: "0" * 16)
    with pytest.raises(AssertionError):
        check_a_flipped_bit(tmp_path)


@pytest.mark.parametrize(
    "name,value",
    [
        ("weight/a/w", math.nan),
        ("ema/a/w", math.inf),
        ("optimizer/a/w/exp_avg_sq", math.nan),
        ("buffer/a/std", math.nan),
    ],
)
def test_a_checkpoint_with_nan_is_not_the_last_good_one(name, value, tmp_path):
    store = Checkpoints(tmp_path, keep=3)
    store.write(1, {name: torch.ones(3)}, {"step": 1})
    store.write(2, {name: torch.tensor([1.0, value, 1.0])}, {"step": 2})
    with pytest.warns(UserWarning, match=f"step-000000002.*{name} is not finite.*passed over"):
        assert store.newest()[1]["step"] == 1
    store.write(
        2,
        {"buffer/mask": torch.tensor([-math.inf]), "other": torch.tensor([math.nan]), "n": torch.tensor([1])},
        {"step": 2},
    )
    assert store.newest()[1]["step"] == 2, "a mask may be infinite, and what is not ours may be anything"


def test_an_old_checkpoint_is_read_with_a_note(tmp_path):
    from safetensors.torch import save_file

    save_file(
        {"weight/w": torch.ones(2)},
        tmp_path / "step-000000004.safetensors",
        metadata={"facts": json.dumps({"step": 4})},
    )
    store = Checkpoints(tmp_path)
    with pytest.warns(UserWarning, match="before checkpoints had a content hash") as heard:
        assert store.newest()[1] == {"step": 4} == store.newest()[1]
    assert len(heard) == 1


def test_an_old_run_goes_on(tmp_path):
    """A checkpoint as it was written before there were hashes and changes: the same run, bit for bit."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    wanted = long_run.own_hash(long_run.stage("tokenizer", 20)[0])
    with pytest.raises(Stopped):
        long_run.stage("tokenizer", 20, trainer=stop_at(10, tmp_path))
    (path,) = Checkpoints(tmp_path / "checkpoints").files()
    tensors, facts, _ = engine_checkpoint._read_checkpoint(path)
    tensors = {name: x.clone() for name, x in tensors.items()}
    del facts["changes"]
    path.unlink()
    save_file(tensors, path, metadata={"facts": json.dumps(facts)})
    with pytest.warns(UserWarning, match="read, but not checked"):
        model, _ = long_run.stage("tokenizer", 20, trainer=lasting(tmp_path, device="cpu"))
    assert long_run.own_hash(model) == wanted


def test_damaged_checkpoints_do_not_crowd_out_the_sound(tmp_path):
    """Two newer ones are damaged; the run goes on from the third, and what it writes stays."""
    store = Checkpoints(tmp_path, keep=2)
    for step in (20, 30):
        store.write(step, {"w": torch.ones(1)}, {"step": step})
        store.files()[-1].write_bytes(b"damaged")
    (tmp_path / "step-000000010.safetensors").write_bytes(
        Checkpoints(tmp_path / "x").write(10, {"w": torch.ones(1)}, {"step": 10}).read_bytes()
    )
    store.write(13, {"w": torch.ones(1)}, {"step": 13})
    assert [f.stem for f in store.files()] == ["step-000000010", "step-000000013"]


def nan_run(tmp_path, when):
    torch.manual_seed(0)
    line, x = nn.Linear(2, 1), torch.randn(50, 2)

    def make(rows, positions, step):
        return x[rows] * (float("nan") if step == when else 1), torch.tensor([step])

    objective = Objective(
        "line",
        lambda b, _: ((line(b[0]) - 1).square().mean(), {}),
        list(line.named_parameters()),
        StageConfig(lr=0.01),
    )
    return line, lambda: fit(
        [objective],
        Loader(50, 4, make),
        20,
        EMA(line),
        progress=False,
        trainer=lasting(tmp_path, device="cpu", steps=3),
    )


def test_nan_leaves_its_batch(tmp_path):
    from safetensors.torch import load_file

    line, go = nan_run(tmp_path, 7)
    with pytest.raises(
        FloatingPointError,
        match=r"nan at step 7.*failed_batch.*part.0.0 in it is not finite.*The last good checkpoint, of "
        r"step 6, is in .*--go-on lr=0.003 ",
    ):
        go()
    batch = load_file(tmp_path / "failed_batch.safetensors")
    assert (
        batch["part.0.0"].isnan().all()
        and batch["part.0.1"].item() == 7
        and torch.isfinite(line.weight).all()
    )
    assert Checkpoints(tmp_path / "checkpoints").newest()[1]["step"] == 6


def test_no_good_checkpoint_is_promised_where_there_is_none(tmp_path):
    _, go = nan_run(tmp_path, 1)
    with pytest.raises(
        FloatingPointError,
        match="There is no good checkpoint in .*begin again with a lower learning rate than 0.01",
    ):
        go()
    _, go = nan_run(tmp_path, 7)
    with pytest.raises(FloatingPointError):
        go()
    for file in Checkpoints(tmp_path / "checkpoints").files():
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    _, go = nan_run(tmp_path, 1)
    with (
        pytest.warns(
            UserWarning, match="no checkpoint in .* can be used: the training begins at its first step"
        ),
        pytest.raises(FloatingPointError, match="There is no good checkpoint"),
    ):
        go()


@pytest.mark.parametrize("name", ("weight/line/weight", "optimizer/line/bias/exp_avg_sq"))
def test_weights_that_are_not_finite_are_never_saved(name, tmp_path):
    """A weight that the loss does not look at, or a moment, goes wrong after the first checkpoint: the second
    is refused, the first stays.
    """
    line = nn.Linear(2, 1)

    def wrong(optimizer):
        (line.weight.data if name.startswith("weight") else optimizer.state[line.bias]["exp_avg_sq"]).fill_(
            math.inf
        )

    class Broken(Distributed):
        def move(self, training, objective):
            norm = super().move(training, objective)
            if Checkpoints(tmp_path / "checkpoints").files():
                wrong(training.optimizers["line"][0])
            return norm

    objective = Objective(
        "line",
        lambda b, _: ((line.bias - b).square().mean(), {}),
        list(line.named_parameters()),
        StageConfig(lr=0.01),
    )
    with pytest.raises(
        FloatingPointError, match=f"{name} is not finite after 6 steps.*The last good checkpoint, of step 3"
    ):
        fit(
            [objective],
            Loader(50, 4, lambda rows, positions, step: torch.zeros(4, 1)),
            20,
            progress=False,
            trainer=lasting(tmp_path, Broken("cpu"), steps=3),
        )
    tensors, facts = Checkpoints(tmp_path / "checkpoints").newest()
    assert facts["step"] == 3 and all(
        torch.isfinite(x).all() for n, x in tensors.items() if n.startswith("weight")
    )


def go_on(tmp_path, lr, steps=12, stop=None, **options):
    """A line, with its learning rate in the recipe: (recipe, weights)."""
    torch.manual_seed(0)
    line, x = nn.Linear(2, 1), torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    rates = []

    class Rates(Callback):
        def step(self, training, backend, looked):
            rates.append(training.optimizers["line"][0].param_groups[0]["lr"])

    options = {
        "recipe": {
            "stage": "line",
            "precision": "None",
            "preset": {"name": "x", "train_line": {"lr": lr, "batch": 4}},
        },
        **options,
    }
    trainer = stop_at(stop, tmp_path, callbacks=[Rates()], **options)
    objective = Objective(
        "line",
        lambda b, _: ((line(b) - 1).square().mean(), {}),
        list(line.named_parameters()),
        StageConfig(lr=lr, warmup=1),
    )
    with pytest.raises(Stopped) if stop else contextlib.nullcontext():
        fit(
            [objective],
            Loader(50, 4, lambda rows, positions, step: x[rows]),
            steps,
            progress=False,
            trainer=trainer,
        )
    return trainer.checkpointer.recipe, line, rates


LR = "preset.train_line.lr"


def test_a_run_goes_on_with_other_settings(tmp_path, capsys):
    """Stopped at step 4, on with another learning rate to step 8, on without saying it again; all that time
    everything else is refused.
    """
    go_on(tmp_path, 0.01, stop=4)
    before = engine_checkpoint._read_checkpoint(Checkpoints(tmp_path / "checkpoints").files()[-1])[0]
    with pytest.raises(ValueError, match=rf"{LR}: 0.01 then, 0.002 now"):
        go_on(tmp_path, 0.002)
    with pytest.raises(ValueError, match="preset.train_line.batch: 4 then, 5 now"):
        go_on(
            tmp_path,
            0.002,
            changes={LR: 0.002},
            recipe={
                "stage": "line",
                "precision": "None",
                "preset": {"name": "x", "train_line": {"lr": 0.002, "batch": 5}},
            },
        )
    with pytest.raises(ValueError, match="has no preset.train_line.momentum"):
        go_on(tmp_path, 0.002, changes={"preset.train_line.momentum": 1})
    with pytest.raises(ValueError, match="was built with 0.01: build it with the new value"):
        go_on(tmp_path, 0.01, changes={LR: 0.002})
    assert engine_resume.changes_of(tmp_path) == {}

    class Killed(Exception):
        pass

    def kill(*args):
        raise Killed

    with pytest.MonkeyPatch().context() as patch, pytest.raises(Killed):  # just after it began
        patch.setattr(Dashboard, "begin", kill)
        go_on(tmp_path, 0.002, changes={LR: 0.002})
    assert engine_resume.changes_of(tmp_path) == {LR: 0.002}, "it is written down before the first step"
    after, facts, _ = engine_checkpoint._read_checkpoint(Checkpoints(tmp_path / "checkpoints").files()[-1])
    assert (
        facts["step"] == 4
        and before.keys() == after.keys()
        and all(torch.equal(before[n], after[n]) for n in before if not n.startswith("random"))
    )

    engine, _, rates = go_on(tmp_path, 0.002, stop=8)  # needs no changes again
    assert max(rates[1:]) < 0.002 and engine.changed == [
        {"step": 4, "settings": {LR: 0.002}, "before": {LR: 0.01}}
    ]
    with pytest.raises(
        ValueError,
        match=rf"{LR}: 0.002 then, 0.01 now.*since step 4 it goes on with {LR}=0.002: ask for that",
    ):
        go_on(tmp_path, 0.01)
    engine, _, _ = go_on(tmp_path, 0.001, changes={LR: 0.001}, stop=10)
    assert "goes on after step 8 of 12, with preset.train_line.lr=0.001" in capsys.readouterr().out
    assert [(c["step"], c["settings"]) for c in engine.changed] == [(4, {LR: 0.002}), (8, {LR: 0.001})]
    engine, _, _ = go_on(tmp_path, 0.001, changes={LR: 0.001})  # the same command once more: nothing new
    assert len(engine.changed) == 2 and engine_resume.changes_of(tmp_path) == {LR: 0.001}


def test_changes_need_something_to_go_on_from(tmp_path):
    with pytest.raises(ValueError, match=rf"no checkpoint in .* that could go on with {LR}=0.002"):
        go_on(tmp_path, 0.002, changes={LR: 0.002})
    assert not list(tmp_path.iterdir())


def test_a_change_to_what_it_was_changes_nothing(tmp_path):
    """Exact resume, with and without `changes` that change nothing."""
    _, whole, _ = go_on(tmp_path / "a", 0.01)
    go_on(tmp_path / "b", 0.01, stop=5)
    engine, parts, _ = go_on(tmp_path / "b", 0.01, changes={LR: 0.01})
    assert torch.equal(whole.weight, parts.weight) and engine.changed == []


def test_another_precision(tmp_path):
    def recipe(precision):
        return {"precision": precision}

    go_on(tmp_path, 0.01, stop=4, recipe=recipe("torch.bfloat16"), precision=torch.bfloat16)
    with pytest.raises(ValueError, match="was built with 'torch.bfloat16'"):
        go_on(tmp_path, 0.01, recipe=recipe("None"), changes={"precision": "None"}, precision=torch.bfloat16)
    engine, _, _ = go_on(tmp_path, 0.01, recipe=recipe("None"), changes={"precision": "None"})
    assert engine.changed[0]["settings"] == {"precision": "None"}


def classifier(trainer):
    from flextok_edu.data.datasets import load_data
    from flextok_edu.data.features import train_classifier

    data, _ = load_data("scenes", 32, 24, 4, progress=False)
    return train_classifier(data, StageConfig(steps=12, batch=4, warmup=2), trainer=trainer, progress=False)


@pytest.mark.parametrize("stage", ("vae", "classifier", "tokenizer", "ar"))
@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_every_stage_leaves_evidence(stage, value, tmp_path):
    """Weights that became NaN, or so large that everything becomes infinite: a clear error, the batch, and a
    checkpoint to go on from.
    """

    class Broken(Distributed):
        def move(self, training, objective):
            norm = super().move(training, objective)
            if Checkpoints(tmp_path / "checkpoints").files():
                with torch.no_grad():
                    for _, w in training.objectives[0].parameters:
                        w.fill_(value)
            return norm

    torch.set_num_threads(1)
    trainer = lasting(tmp_path, Broken("cpu"), steps=4)
    with pytest.raises(
        FloatingPointError,
        match=r"the loss of \w+ is (nan|inf|-inf) at step 5.*Its batch is in .*The last good checkpoint, "
        r"of step 4, is in .*--go-on lr=",
    ):
        classifier(trainer) if stage == "classifier" else long_run.stage(stage, 12, trainer=trainer)
    assert (tmp_path / "failed_batch.safetensors").stat().st_size > 100


# --- dashboard
# -----------------------------------------------------------------------------------------------------------


def test_the_dashboard(tmp_path):
    _, log = long_run.stage("tokenizer", 30, trainer=lasting(tmp_path, device="cpu"))
    row = log[-1]
    assert {
        "tokenizer",
        "tokenizer_grad",
        "lr",
        "images_per_second",
        "share_of_matmul",
        "memory",
        "codebook_usage",
        "entropy_1",
        "entropy_8",
        "flow",
        "seconds",
    } <= set(row)
    assert (
        0 < row["share_of_matmul"] < 1.5
        and row["memory"] > 1e7
        and row["images_per_second"] > 1
        and 0 < row["codebook_usage"] <= 1
        and 0 <= row["entropy_1"] <= 1
    )
    assert "share_of_matmul" not in log[0], "the first step is counted, not timed"
    _, log = long_run.stage("ar", 12, trainer=lasting(tmp_path / "ar", device="cpu"))
    assert 0 <= log[-1]["accuracy"] <= 1


def test_trackers(tmp_path):
    with pytest.raises(ValueError, match="tensorboard, wandb or none"):
        lasting(tmp_path, device="cpu", track="paper")
    from accelerate.utils import is_wandb_available

    if not is_wandb_available():
        with pytest.raises(ImportError, match="pip install wandb"):
            lasting(tmp_path, device="cpu", track="wandb")
    assert not list(tmp_path.iterdir())
    pytest.importorskip("tensorboard")
    long_run.stage(
        "ar", 12, trainer=lasting(tmp_path, device="cpu", track="tensorboard", recipe={"preset": "micro"})
    )
    assert list(tmp_path.rglob("events.out*"))


def test_a_healthy_run_hears_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long_run.stage("vae", 60, trainer=lasting(tmp_path, device="cpu"))

"""Scenes drawn by several processes: the same pictures, from anywhere, and nothing is left behind."""

import os
import queue
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planting import planted

from flextok_edu.apps.models import DataOptions
from flextok_edu.apps.pictures import held_out_scenes, open_pictures
from flextok_edu.apps.run_config import RunConfig, check
from flextok_edu.data import drawing
from flextok_edu.data.datasets import load_data
from flextok_edu.data.scenes import ToyScenes
from flextok_edu.engine.config import preset

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def started(monkeypatch):
    """The processes that are started; none may be left in the end."""
    found, popen = [], subprocess.Popen

    def start(*args, **named):
        found.append(popen(*args, **named))
        return found[-1]

    monkeypatch.setattr(drawing.subprocess, "Popen", start)
    yield found
    assert all(p.poll() is not None for p in found), "a process is left"


def same(a, b) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def in_the_child(monkeypatch, line: str) -> None:
    """Have the processes run this before they draw."""
    monkeypatch.setattr(drawing, "_PROGRAM", drawing._PROGRAM.replace("serve()", f"{line}\nserve()"))


@pytest.mark.parametrize(
    "workers, split, size, level, start, count",
    [(2, "val", 40, 3, 7, 131), (3, "train", 17, 2, 0, 97), (2, "train", 8, 1, 3, 33)],
)
def test_the_same_pictures_from_several_processes(started, workers, split, size, level, start, count):
    data = ToyScenes(split, size, level, seed=np.int64(5), length=start + count)
    alone = data.render(start, count, workers=1)
    assert not started
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(data.render(start, count, workers=workers), alone) and len(started) == workers
    assert (
        same(data.render(start, 32, workers=2), (alone[0][:32], alone[1][:32])) and len(started) == workers
    ), "one piece needs no help"


def check_every_process_draws_what_it_was_dealt():
    data = ToyScenes(size=16, level=2, length=200)
    assert same(data.render(3, 170, workers=2), data.render(3, 170, workers=1))


def bug_pieces_are_drawn_twice(monkeypatch):
    """The first and the last are right, and all are real pictures: nothing but the comparison tells."""
    draw = drawing._Helper.draw

    def wrong(helper, start, images, labels):
        draw(helper, 3 if start == 35 else start, images, labels)

    monkeypatch.setattr(drawing._Helper, "draw", wrong)


def bug_labels_of_another_piece(monkeypatch):
    draw = drawing._Helper.draw

    def wrong(helper, start, images, labels):
        draw(helper, start, images, labels)
        if start == 35:
            labels[:] = labels[::-1].copy()

    monkeypatch.setattr(drawing._Helper, "draw", wrong)


test_the_code_passes, test_the_bug_is_caught = planted(
    [
        (check_every_process_draws_what_it_was_dealt, bug_pieces_are_drawn_twice),
        (check_every_process_draws_what_it_was_dealt, bug_labels_of_another_piece),
    ]
)


def test_it_does_not_depend_on_what_else_is_printed_or_imported(started, monkeypatch):
    """What a process prints, at its start or while it draws, is no picture, and PyTorch is not read."""
    in_the_child(
        monkeypatch,
        "print('hello')\n"
        "class Refuse:\n"
        "    def find_spec(name, *args):\n"
        "        assert name.split('.')[0] != 'torch', 'a process that only draws needs no PyTorch'\n"
        "sys.meta_path.insert(0, Refuse)\n"
        "from PIL import ImageDraw; real = ImageDraw.Draw\n"
        "ImageDraw.Draw = lambda image: (print('drawn'), real(image))[1]",
    )
    data = ToyScenes(size=16, length=70)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(data.render(workers=2), data.render(workers=0)) and len(started) == 2


def test_the_bar_counts_pictures(started, monkeypatch):
    steps, tqdm = [], drawing.tqdm

    class Bar(tqdm):
        def update(self, n=1):
            steps.append(n)
            return super().update(n)

    monkeypatch.setattr(drawing, "tqdm", Bar)
    ToyScenes(size=16, length=100).render(workers=2, progress=True)
    assert sorted(steps) == [4, 32, 32, 32] and len(started) == 2


def test_by_default_all_cores_but_one_where_it_pays(started, monkeypatch):
    assert drawing.FEW == 4_000
    monkeypatch.setattr(drawing, "cores", lambda: 16)
    assert [drawing.processes(None, n) for n in (0, 4_000, 4_001, 6_000, 60_000)] == [1, 1, 8, 12, 15]
    monkeypatch.setattr(drawing, "cores", lambda: 1)
    assert drawing.processes(None, 10**6) == 1
    monkeypatch.setattr(drawing, "cores", lambda: 3)
    monkeypatch.setattr(drawing, "FEW", 64)
    monkeypatch.setattr(drawing, "_LEAST", 1)
    data = ToyScenes(size=16, length=65)
    assert same(data.render(), data.render(workers=1)) and len(started) == 2
    data.render(0, 64)
    assert len(started) == 2, "few are drawn here"


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "process_cpu_count", lambda: 12, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(drawing, "_quota", lambda: float("inf"))
    assert drawing.cores() == 12
    monkeypatch.setattr(drawing, "_quota", lambda: 6.5)
    assert drawing.cores() == 6, "a container's share"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert drawing.cores() == 1, "four processes train here"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "some")
    monkeypatch.setattr(drawing, "_quota", lambda: 0.5)
    assert drawing.cores() == 1
    monkeypatch.delattr(os, "process_cpu_count")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    monkeypatch.setattr(drawing, "_quota", lambda: float("inf"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert drawing.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert drawing.cores() == 1


@pytest.mark.parametrize("workers", [-1, 2.0, True, "2"])
def test_what_is_no_number_of_processes_is_refused(workers):
    with pytest.raises(ValueError, match="workers=.*give 0 or 1"):
        ToyScenes(size=16, length=2).render(workers=workers)
    with pytest.raises(ValueError, match="workers="):
        check(RunConfig(workers=workers))


def test_mistakes_show_in_their_own_words(started):
    with pytest.raises(ValueError, match="at least 8"):
        ToyScenes(size=4, length=100).render(workers=2)
    with pytest.raises(IndexError, match="item 104 of 100"):
        ToyScenes(size=16, length=100).render(5, 100, workers=2)
    assert not started


def test_a_process_that_fails_is_quoted(started, monkeypatch):
    in_the_child(monkeypatch, "from PIL import ImageDraw; ImageDraw.Draw = None")
    with pytest.raises(RuntimeError, match="TypeError: 'NoneType'.*workers=1") as caught:
        ToyScenes(size=16, length=100).render(workers=2)
    assert "Traceback" in "".join(caught.value.__notes__) and len(started) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_that_is_killed_is_told(started, monkeypatch):
    in_the_child(
        monkeypatch,
        "import os; from PIL import ImageDraw; ImageDraw.Draw = lambda image: os.kill(os.getpid(), 9)",
    )
    with pytest.raises(RuntimeError, match="ended by signal 9 .memory.*workers=1"):
        ToyScenes(size=16, length=100).render(workers=2)


def test_where_no_process_can_begin_the_pictures_are_drawn_here(started, monkeypatch):
    data = ToyScenes(size=16, length=100)
    alone = data.render(workers=1)
    with monkeypatch.context() as patched:
        in_the_child(patched, "raise SystemExit('no numpy here')")
        with pytest.warns(UserWarning, match="no numpy here.*this one draws 100 scenes"):
            assert same(data.render(workers=2), alone)

    def refuse(*args, **named):
        raise PermissionError(1, "not in this sandbox")

    monkeypatch.setattr(drawing.subprocess, "Popen", refuse)
    with pytest.warns(UserWarning, match="not in this sandbox.*this one draws 100 scenes"):
        assert same(data.render(workers=2), alone)


def test_some_processes_that_can_begin_are_enough(started, monkeypatch):
    monkeypatch.setattr(drawing._Helper, "begin", begin := drawing._Helper.begin)
    turns = queue.SimpleQueue()
    for turn in range(3):
        turns.put(turn)

    def some(helper):
        if turns.get() == 1:
            helper.process.kill()
        begin(helper)

    monkeypatch.setattr(drawing._Helper, "begin", some)
    data = ToyScenes(size=16, length=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(data.render(workers=3), data.render(workers=1)) and len(started) == 3


def test_other_pictures_are_not_handed_out(started, monkeypatch):
    """The package was changed on the disk after this process imported it."""
    in_the_child(
        monkeypatch,
        "from flextok_edu.data.shapes import SHAPES; SHAPES.update(dict.fromkeys(SHAPES, SHAPES['tree']))",
    )
    with pytest.raises(RuntimeError, match="other scenes.*workers=1"):
        ToyScenes(size=16, length=100).render(workers=2)


def test_a_class_that_others_do_not_know_is_drawn_here(started):
    class Mine(ToyScenes):
        def scene(self, index):
            return super().scene(index // 2)

    data = Mine(size=16, length=100)
    images, _ = data.render(workers=2)
    assert not started and torch.equal(images[0], images[1])


def test_who_draws_whole_sets_passes_it_on(started, monkeypatch):
    p = replace(preset("micro"), train_images=70)
    alone = load_data("scenes", 16, 70, 40, progress=False, workers=1)
    assert not started
    two = load_data("scenes", 16, 70, 40, progress=False, workers=2)
    assert all(torch.equal(a.images, b.images) for a, b in zip(alone, two)) and len(started) == 4
    held_out_scenes(p, 0, 70, 2)
    assert len(started) == 6
    for options, more in (
        (DataOptions(workers=2), 2),
        (RunConfig(workers=2), 2),
        (DataOptions(workers=0), 0),
    ):
        before = len(started)
        open_pictures(options, p, "train")
        assert len(started) == before + more
    monkeypatch.setattr(drawing, "FEW", 60)
    monkeypatch.setattr(drawing, "_LEAST", 1)
    monkeypatch.setattr(drawing, "cores", lambda: 3)
    before = len(started)
    open_pictures(RunConfig(), p, "train")
    assert len(started) == before + 2, "a run lets drawing decide"


SCRIPT = f"""
import sys
sys.path.append({str(ROOT)!r})  # on the path of this process alone: the others must be told
from flextok_edu.data.scenes import ToyScenes
images, labels = ToyScenes(size=16, length=100).render(workers=2)
import hashlib
print("drawn", hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest(), __name__)
"""


def test_from_a_script_without_a_guard_and_from_where_there_is_no_file(tmp_path):
    """A script without `if __name__ == "__main__":`, and a program from stdin, as a notebook has no file."""
    import hashlib

    images, labels = ToyScenes(size=16, length=100).render()
    known = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "json.py").write_text("raise SystemExit('this json is none')")
    python = [sys.executable, "-P", "-W", "error::UserWarning"]  # of not having started any
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    runs = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=env | {"TMPDIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in ([*python, "script.py"], python)
    ]
    for run in runs:
        out, err = run.communicate(SCRIPT, timeout=60)
        assert run.returncode == 0 and out.split() == ["drawn", known, "__main__"], err
    assert sorted(f.name for f in tmp_path.iterdir()) == ["json.py", "script.py"]


ENDLESS = """
import os, subprocess, sys
from flextok_edu.data import drawing
for name in ("torch", "torch.utils", "torch.utils.data"):
    sys.modules[name] = drawing._Placeholder(name)
from flextok_edu.data.scenes import ToyScenes

class Told(subprocess.Popen):
    def __init__(self, *args, **named):
        super().__init__(*args, **named)
        sys.stdout.write(f"{self.pid}\\n")
        sys.stdout.flush()

drawing.subprocess.Popen = Told
begin = drawing._Helper.begin
def told(self):
    begin(self)
    os.write(1, b"drawing\\n")
drawing._Helper.begin = told
try:
    ToyScenes(size=16, length=10**6).render(workers=2)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def there(pid: int) -> bool:
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.strip()
    return bool(state) and not state.startswith("Z")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    "who, what", [("all", signal.SIGINT), ("one", signal.SIGINT), ("one", signal.SIGKILL)]
)
def test_interrupted_or_killed_nothing_is_left(tmp_path, who, what):
    """Ctrl-C in a terminal goes to all processes, a kernel's interrupt and a kill to one.

    (The placeholder saves the time of reading PyTorch, which is not needed before the end.)
    """
    run = subprocess.Popen(
        [sys.executable, "-c", ENDLESS],
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said = [run.stdout.readline().strip() for _ in range(4)]
        pids = [int(s) for s in said if s.isdigit()]
        assert len(pids) == 2 and said.count("drawing") == 2 and all(map(there, pids))
        if who == "all":  # a program that hears Ctrl-C itself goes on, and so do those who draw for it
            for pid in pids:
                os.kill(pid, what)
            time.sleep(0.2)
            assert all(map(there, pids))
        (os.killpg if who == "all" else os.kill)(run.pid, what)
        out, err = run.communicate(timeout=20)
        assert out.strip() == ("interrupted" if what == signal.SIGINT else "") and not err
        patience = 0 if what == signal.SIGINT else 10  # those of a killed one end when their stdin does
        until = time.monotonic() + patience
        while any(map(there, pids)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not any(map(there, pids)) and not list(tmp_path.iterdir())
    finally:
        run.kill()

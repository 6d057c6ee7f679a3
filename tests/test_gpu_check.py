"""What a GPU sends home: rehearsed here, packed within the limits, and put together again."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flextok_edu.apps.bench_training import TRAINING
from flextok_edu.apps.bench_writing import WRITING
from flextok_edu.apps.card import open_parts
from flextok_edu.apps.stage_table import PARTS as STAGES
from flextok_edu.apps.timing import VARIANTS, BenchConfig
from flextok_edu.apps.zoo import pack as pack_for_the_zoo
from flextok_edu.ar import ARModel
from flextok_edu.data.features import AttributeClassifier
from flextok_edu.engine.config import PRESETS
from flextok_edu.evaluation.report import load_report
from flextok_edu.tokenizer import FlexTok

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tools" / "gpu_check.sh"
GOOD_ROW = "good encode --preset micro --budgets 16 --repeats 1 --variants short short+graph"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("gpu_join")


def environment(work, **more):
    return os.environ | {"PYTHON": sys.executable, "WORK": str(work)} | more


def rehearse(out, work, **more):
    asked = [str(SCRIPT), str(out), "--rehearse"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=500, env=environment(work, **more))


def within_the_limits(out):
    files = list(out.iterdir())
    assert 0 < len(files) <= 8 and all(f.is_file() and f.stat().st_size <= 16 * 2**20 for f in files)
    return {f.name for f in files}


def test_a_rehearsal(tmp_path, tool):
    """All of it, once; the checks are one test, because it takes most of a minute."""
    out, work = tmp_path / "out", tmp_path / "work"
    done = rehearse(out, work)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    does_everything(out, work, done.stdout)
    hashes = tool.join(out, tmp_path / "run")
    pieces_are_joined(tmp_path / "run", work)
    can_be_shipped(tmp_path, work, hashes)
    misses_no_piece(out, tmp_path, tool)


def does_everything(out, work, said):
    names = within_the_limits(out)
    assert {"results.tar.gz", "weights_0.safetensors", "reconstructions.png", "samples.png"} < names
    parts = [line.split("\t")[:2] for line in (work / "logs" / "parts.tsv").read_text().splitlines()]
    assert parts == [[name, "0"] for name in ("smoke", "tests", "run", "rounding", "bench")]
    assert "recorded and not, the same" in said and "at most" in said
    with tarfile.open(out / "results.tar.gz") as archive:
        kept = archive.getnames()
    rows = [name for name in kept if name.startswith("logs/bench/") and name.endswith(".json")]
    assert len(rows) == 4 and {"run.json", "table.json", "vae/log.json", "logs/run.log"} < set(kept)
    for name in rows:
        found = json.loads((work / name).read_text())["rows"]
        assert found and all(row["device"] == "cpu" and row["precision"] in ("fp32", "bf16") for row in found)


def rounded(state):
    """As the format says, written once more: matrices and filters in float16."""
    return {k: x.half().float() if x.ndim > 1 and x.is_floating_point() else x for k, x in state.items()}


def pieces_are_joined(run, work):
    """What is loaded from the joined folder are the run's weights, rounded; and pictures are the same."""
    for part in STAGES:
        mine = load_file(run / part / "model.safetensors")
        its = rounded(load_file(work / "run" / part / "model.safetensors"))
        assert mine.keys() == its.keys() and all(torch.equal(mine[k], its[k]) for k in its), part
    tok = FlexTok.from_pretrained(run / "tokenizer")
    ar = ARModel.from_pretrained(run / "ar", tokenizer=tok)
    AttributeClassifier.from_pretrained(run / "classifier")
    vae, plain, plain_ar, _ = open_parts({part: work / "run" / part for part in STAGES})
    for model in (vae, plain, plain_ar):
        model.load_state_dict(rounded(model.state_dict()))
    ids = ar.generate(torch.tensor([0, 7]), guidance=2.0)
    assert torch.equal(ids, plain_ar.generate(torch.tensor([0, 7]), guidance=2.0))
    assert torch.equal(tok.detokenize(ids, steps=2), plain.detokenize(ids, steps=2))
    assert (run / "samples.png").exists() and (run / "logs" / "run.log").exists()
    assert set(json.loads((run / "rounding.json").read_text())) >= {"vae_mae", "equal_ids"}


def can_be_shipped(tmp_path, work, hashes):
    """The zoo takes it as it takes a run; its table is of these weights, and says that it is older."""
    card = load_report(tmp_path / "run").card
    assert card["weights"]["tokenizer"] == hashes["tokenizer"] and card["weights"]["ar"] == hashes["ar"]
    assert card["measured_before_rounding"]["vae"] == load_report(work / "run").card["weights"]["vae"]
    place = pack_for_the_zoo(tmp_path / "run", "joined", tmp_path / "zoo", same=0.0, near=1.0)
    assert (place / "table.json").exists() and len(list(place.iterdir())) == 4 + 4


def misses_no_piece(out, tmp_path, tool):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "results.tar.gz").write_bytes((out / "results.tar.gz").read_bytes())
    with pytest.raises(ValueError, match="a piece is missing"):
        tool.join(tmp_path / "some", tmp_path / "other")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        tool.join(out, tmp_path / "taken")


def test_a_part_that_fails_leaves_the_rest(tmp_path):
    """An impossible preset among the rows."""
    rows = tmp_path / "rows"
    rows.write_text(f"bad decode --preset impossible\n{GOOD_ROW}\n")
    done = rehearse(tmp_path / "out", tmp_path / "work", ROWS=str(rows), PARTS="bench run")
    assert done.returncode == 1 and "bad: FAILED" in done.stdout and "good: done" in done.stdout
    assert "no preset 'impossible'" in done.stdout, "and it says why"
    names = within_the_limits(tmp_path / "out")
    assert {"results.tar.gz", "weights_0.safetensors", "samples.png"} < names
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert {"logs/bench/good.json", "logs/bench/bad.log", "table.json"} < set(archive.getnames())


def test_rows_for_a_gpu_ask_for_what_there_is():
    """They run only on a GPU: here at least their words are right."""
    known = {
        "decode": VARIANTS,
        "encode": VARIANTS,
        "train": TRAINING,
        "generate": (*WRITING, "transformers"),
    }
    rows = [words.split() for words in re.findall(r"\w+ +(\w+ --preset .*)", SCRIPT.read_text())]
    assert len(rows) == 4 + 9
    for what, *words in rows:
        words = [word.strip('"') for word in words]
        assert words[1] in PRESETS and words.index("--variants") > 0
        assert set(words[words.index("--variants") + 1 :]) <= set(known[what]), words
        assert {w[2:] for w in words if w.startswith("--")} <= {f.name for f in fields(BenchConfig)}


def test_a_row_that_hangs_ends_alone(tmp_path):
    rows = tmp_path / "rows"
    slow = "slow decode --preset d12_d12 --steps 500 --timed-steps 500 --repeats 99"
    rows.write_text(f"{slow}\n{GOOD_ROW}\n")
    asked = [
        sys.executable,
        str(ROOT / "tools" / "gpu_bench.py"),
        str(rows),
        str(tmp_path),
        "cpu",
        "100",
        "9",
    ]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=200, env=environment(tmp_path))
    assert done.returncode == 1 and "slow: FAILED (-9)" in done.stdout and "good: done" in done.stdout
    assert (tmp_path / "good.json").exists() and not (tmp_path / "slow.json").exists()


def test_a_stop_from_outside_packs_too(tmp_path):
    process = subprocess.Popen(
        [str(SCRIPT), str(tmp_path / "out"), "--rehearse"],
        env=environment(tmp_path / "work", PARTS="smoke run"),
        stdout=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not (tmp_path / "work" / "logs" / "smoke.log").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "results in" in said and "== run" not in said
    assert within_the_limits(tmp_path / "out") == {"results.tar.gz"}


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "mine").write_text("mine")
    done = rehearse(tmp_path, tmp_path / "work")
    assert done.returncode == 2 and "is not empty" in done.stderr and (tmp_path / "mine").exists()


def test_what_is_missing_is_named(tmp_path):
    """A Python without packages, and no wheels: one line, and the status."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    done = rehearse(tmp_path / "out", tmp_path / "work", PYTHON=str(bare), PYTHONPATH="")
    assert done.returncode == 1 and "--wheels FOLDER" in done.stderr and "torch" in done.stderr
    assert within_the_limits(tmp_path / "out") == {"results.tar.gz"}


# --- the format ------------------------


def test_pieces_are_few_and_fit(tool):
    one = 2**20
    tensors = {
        f"t{i}": torch.zeros(size * one, dtype=torch.uint8) for i, size in enumerate((9, 6, 8, 7, 1, 14))
    }
    pieces = tool.deal(tensors)
    assert len(pieces) == 3 and sorted(k for p in pieces for k in p) == sorted(tensors)
    assert all(sum(x.nbytes for x in p.values()) <= 15 * one for p in pieces)
    with pytest.raises(ValueError, match="whole has 16.0 MiB, more than a piece of 15"):
        tool.deal({"whole": torch.zeros(16 * one, dtype=torch.uint8)})


def test_what_is_rounded(tool):
    kinds = {"matrix": torch.ones(2, 2) / 3, "bias": torch.ones(2) / 3, "count": torch.ones(2, 2).long()}
    kinds["huge"] = torch.full((2, 2), 1e6)
    found = {name: tool.small(x).dtype for name, x in kinds.items()}
    assert found.pop("matrix") == torch.float16 and found == {k: kinds[k].dtype for k in found}


def folder_with_pictures(work, *names):
    (work / "run").mkdir(parents=True)
    (work / "logs").mkdir()
    for name in names:
        (work / "run" / name).write_bytes(b"picture")


def test_pictures_without_room_go_into_the_archive(tool, tmp_path, monkeypatch):
    folder_with_pictures(tmp_path, *tool.PICTURES)
    monkeypatch.setattr(tool, "pack_weights", lambda run, to: 5)
    names = {f.name for f in tool.pack(tmp_path, tmp_path / "out")}
    assert names == {"results.tar.gz", "reconstructions.png", "samples.png"}
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert set(archive.getnames()) == {"quality.png", "losses.png"}


def test_a_large_picture_becomes_a_jpeg(tool, tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image

    folder_with_pictures(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "run" / "samples.png")
    monkeypatch.setattr(tool, "SIZE", 8000)
    assert {f.name for f in tool.pack(tmp_path, tmp_path / "out")} == {"results.tar.gz", "samples.jpg"}


def test_what_does_not_fit_is_refused_and_the_old_stays(tool, tmp_path, monkeypatch):
    folder_with_pictures(tmp_path)
    tool.pack(tmp_path, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").write_text("mine")
    old = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}
    (tmp_path / "logs" / "a.log").write_bytes(os.urandom(5000))
    monkeypatch.setattr(tool, "SIZE", 4000)
    with pytest.raises(ValueError, match="too large: results.tar.gz"):
        tool.pack(tmp_path, tmp_path / "out")
    monkeypatch.setattr(tool, "SIZE", 2**20)
    monkeypatch.setattr(tool, "FILES", 0)
    with pytest.raises(ValueError, match="at most 0 files"):
        tool.pack(tmp_path, tmp_path / "out")
    assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == old
    monkeypatch.setattr(tool, "FILES", 8)
    tool.pack(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").exists(), "only its own files give way"

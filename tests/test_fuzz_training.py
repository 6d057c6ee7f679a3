"""What a training reads back, changed in thousands of ways: checkpoints, shards, cache.json.

Each is used, passed over, or refused by a ValueError or OSError in words; nothing else comes out.
"""

import json
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import fuzzing
import flextok_edu.engine.checkpoint as engine_checkpoint
import flextok_edu.engine.files as engine_files
from flextok_edu.engine.shards import read_header, shard_path
from flextok_edu.io.build import Recipe, build_cache
from flextok_edu.io.cache import Cache
from flextok_edu.engine.config import StageConfig
from flextok_edu.engine.loader import Loader
from flextok_edu.engine.optim import EMA
from flextok_edu.engine.trainer import Objective, fit
from flextok_edu.engine.long_run import LongRun
from flextok_edu.engine.resume import changes_of


def put(path: Path, content: bytes) -> None:
    """A new file: the old one may be mapped."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in its session, with two checkpoints: the file of the newest is what is changed."""
    folder = tmp_path_factory.mktemp("run")
    x, seen = torch.rand(40, 2), []

    class Open(LongRun):
        def end(self, step, log):
            super().end(step, log)
            if step == 3:
                seen.append(self)

    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    objective = Objective(
        "net",
        lambda b, _: (net(b).square().mean(), {}),
        list(net.named_parameters()),
        StageConfig(lr=0.01),
        list(net.named_buffers()),
    )
    fit(
        [objective],
        Loader(40, 4, lambda rows, positions, step: x[rows]),
        4,
        EMA(net),
        progress=False,
        trainer=Open(
            folder, "cpu", steps=2, recipe={"stage": "net", "preset": {"lr": 0.01, "train_net": {"lr": 0.01}}}
        ),
    )
    return seen[0]


def test_checkpoints(run):
    newest = run.store.files()[-1]
    data = newest.read_bytes()
    tensors = {name: x.clone() for name, x in load_file(newest).items()}
    with safe_open(newest, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    steps = set()

    def case(rng: random.Random):
        action = rng.random()
        if action < 0.3:
            bad = fuzzing.mutated_bytes(rng, data)
        elif action < 0.5:
            bad = fuzzing.mutated_safetensors(rng, data, "facts")
        else:  # with the right hash: somebody meant it
            state, said = dict(tensors), facts
            if action < 0.75:
                said = fuzzing.mutated_json(rng, facts)
            else:
                name = rng.choice(list(state))
                x = state.pop(name)
                if rng.random() < 0.8:
                    other = rng.choice(
                        (
                            x[..., None],
                            x.flatten()[:1],
                            x.flatten()[:0],
                            x.double(),
                            x.long() if x.is_floating_point() else x.float(),
                            x.repeat(2, *[1] * (x.ndim - 1)) if x.ndim else x[None],
                            torch.zeros_like(x),
                            x,
                        )
                    )
                    state[
                        name
                        if rng.random() < 0.7
                        else rng.choice(
                            (
                                name + "x",
                                "x/" + name,
                                "weight/net/x",
                                "random/0/torch",
                                "optimizer/net/0.weight/x",
                                "optimizer/net",
                                "x",
                            )
                        )
                    ] = other.contiguous()
            try:
                text = json.dumps(said)
                bad = save(
                    {n: t.clone() for n, t in state.items()},
                    {"facts": text, "content": engine_checkpoint._content(state, text)},
                )
            except UnicodeEncodeError:
                return
        put(newest, bad)
        if action > 0.9:
            assert isinstance(changes_of(run.store.folder.parent), dict)
        found = run.store.newest()
        if found:
            steps.add(str(found[1].get("step")))
            run._agree(found[1], run.objectives)
            run._restore(*found)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        heard = fuzzing.fuzz("checkpoint", case)
    put(newest, data)
    assert (
        heard["fine"] > 0.3 * fuzzing.CASES
        and heard["ValueError"] > 0.1 * fuzzing.CASES
        and {"2", "4"} <= steps
    )
    run._restore(*run.store.newest())
    assert set(load_file(run.store.files()[-1])) == set(tensors)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")

    def load(start, stop):
        return torch.arange(start, stop), torch.arange(start, stop) % 3

    facts = {
        "kind": "tokens",
        "of": "numbers",
        "classes": ["a", "b", "c"],
        "vocabulary": 1000,
        "dtype": "uint16",
        "mirror": False,
        "tokenizer": "0" * 16,
    }

    def encode(x):
        return {"ids": (x[:, None, None] * torch.arange(4)).to(torch.uint16)}

    build_cache(
        folder,
        Recipe(encode, 16, load, facts),
        shard=8,
        batch=8,
        progress=False,
    )
    return folder


def everything(folder):
    c = Cache(folder, {})
    rows = torch.arange(min(len(c), 100))
    for name in c.row:
        c.take(name, rows)
    c.labels, c.items, c.classes, c.skipped


def test_shards(cached):
    path = shard_path(cached, "tokens", 1)
    data, tensors, facts = (
        path.read_bytes(),
        {n: x.clone() for n, x in load_file(path).items()},
        {k: v for k, v in read_header(path)[0].items() if k != "content"},
    )

    def case(rng: random.Random):
        action = rng.random()
        if action < 0.35:
            put(path, fuzzing.mutated_bytes(rng, data))
        elif action < 0.75:
            put(path, fuzzing.mutated_safetensors(rng, data, "flextok_edu.cache"))
        else:
            state, said = dict(tensors), facts
            if action < 0.85:
                said = fuzzing.mutated_json(rng, facts)
                said = said if isinstance(said, dict) else {"x": said}
            else:
                name = rng.choice(list(state))
                x = state.pop(name)
                if rng.random() < 0.8:
                    state[name if rng.random() < 0.8 else rng.choice(("x", "ids", "labels", ""))] = (
                        rng.choice(
                            (
                                x[..., None],
                                x[:1],
                                x[:0],
                                x.float(),
                                x.flatten(),
                                x.long() - 5000,
                                x.long() + 5000,
                                x.flip(0),
                                torch.zeros(()),
                            )
                        ).clone()
                    )
            try:
                put(
                    path,
                    save(
                        state,
                        {
                            "flextok_edu.cache": json.dumps(
                                {**said, "content": engine_files.weights_hash(state)}, sort_keys=True
                            )
                        },
                    ),
                )
            except UnicodeEncodeError:
                return
        everything(cached)

    heard = fuzzing.fuzz("shard", case)
    put(path, data)
    everything(cached)
    assert heard["DamagedShard"] > 0.6 * fuzzing.CASES


def test_cache_json(cached):
    path = cached / "cache.json"
    data = path.read_bytes()

    def case(rng: random.Random):
        action = rng.random()
        path.write_bytes(
            fuzzing.mutated_bytes(rng, data)
            if action < 0.3
            else fuzzing.deep()
            if action < 0.32
            else fuzzing.as_json(fuzzing.mutated_json(rng, json.loads(data)))
        )
        everything(cached)

    heard = fuzzing.fuzz("cache.json", case)
    put(path, data)
    everything(cached)
    assert heard["ValueError"] > 0.4 * fuzzing.CASES

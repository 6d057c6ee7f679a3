"""The benchmark times what it says: replays where a variant records, the trainer's own steps, whole lists."""

import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from planting import planted
from torch._dynamo.utils import counters

from flextok_edu.apps import bench_training, bench_writing, timing
from flextok_edu.apps.bench import bench
from flextok_edu.engine import flat_writing
from flextok_edu.engine.flat_writing import FlatWriter
from flextok_edu.apps.bench_writing import WRITING, bench_writer, copying, limits, step_weights
from flextok_edu.apps.timing import BenchConfig, can_run, in_turns
from flextok_edu.ar import ARModel
from flextok_edu.engine import graphs
from flextok_edu.engine.compiler import compiled
from flextok_edu.engine.optim import EMA
from flextok_edu.engine.trainer import SingleDevice
from flextok_edu.networks import Decoder, Encoder


def quiet(text):
    pass


def count(m, where, name):
    """Calls of a method, that can be set to zero."""
    calls, real = [], getattr(where, name)
    m.setattr(where, name, lambda self, *given, **named: calls.append(1) or real(self, *given, **named))
    return calls


def as_on_a_gpu(m):
    """Graphs are recorded here too, by a list of operations."""
    m.setattr(graphs, "CUDARecorder", graphs.OpRecorder)
    m.setattr(SingleDevice, "__init__", _tensors(SingleDevice.__init__))


def _tensors(real):
    def made(self, *given, **named):
        real(self, *given, **named)
        self.tensors = True

    return made


def watch_rounds(m, *calls):
    """Empties the lists of calls before the first round that counts: what is left happened while timing."""
    real = timing.in_turns

    def in_turns(runs, repeats, device, warm=1, around=None, **named):
        def started(name, run):
            turns = iter(range(-warm, repeats))

            def go():
                if next(turns) == 0 and name == next(iter(runs)):
                    for c in calls:
                        c.clear()
                return run()

            return go

        watched = {name: started(name, run) for name, run in runs.items()}
        found = real(watched, repeats, device, warm, around, **named)
        seen.extend(list(c) for c in calls)
        return found

    seen = []
    for module in (sys.modules["flextok_edu.apps.bench"], bench_training, bench_writing):
        m.setattr(module, "in_turns", in_turns)
    return seen


def replayed_decodes():
    with pytest.MonkeyPatch.context() as m:
        as_on_a_gpu(m)
        seen = watch_rounds(m, count(m, Decoder, "forward"), count(m, Encoder, "forward"))
        config = BenchConfig("micro", "cpu", 2, (3, 16), ("short+graph", "short+bf16+graph"), repeats=3)
        rows = bench("decode", config, quiet) + bench("encode", config, quiet)
    assert not any(map(len, seen)), "no Python in the rounds that count"
    assert [r["precision"] for r in rows] == ["fp32", "bf16"] * 4 and {r["device"] for r in rows} == {"cpu"}
    assert all(r["difference"] == 0 for r in rows[::2]) and all(0 < r["difference"] < 1 for r in rows[1::2])


def replayed_steps():
    with pytest.MonkeyPatch.context() as m:
        as_on_a_gpu(m)
        seen = watch_rounds(m, count(m, Encoder, "forward"), count(m, EMA, "move"))
        names = ("sorted+graph", "graph")
        config = BenchConfig("micro", "cpu", batch=8, micro=2, variants=names, repeats=3)
        replays = bench("train", config, quiet)
        assert not any(map(len, seen)), "no Python in the rounds that count"
        rows = bench("train", replace(config, variants=("sorted", "sorted+graph")), quiet)
    assert replays[1]["difference"] < 1e-4 and rows[1]["difference"] == 0, "the same gradient"


def replayed_lists():
    with pytest.MonkeyPatch.context() as m:
        as_on_a_gpu(m)
        seen = watch_rounds(m, steps := count(m, ARModel, "step"))
        config = BenchConfig("micro", "cpu", variants=("graph",), batches=(1, 3), repeats=2)
        bench("generate", config, quiet)
        bench("generate", replace(config, tokens=1), quiet)
        assert not any(map(len, seen)), "no Python in the rounds that count"
        steps.clear()
        rows = bench("generate", replace(config, variants=("eager", "graph")), quiet)
    assert len(rows) == 8 and all(r["same_ids"] == 1 for r in rows)


def too_few_rounds_before(monkeypatch):
    monkeypatch.setattr(sys.modules["flextok_edu.apps.bench"], "WARM", 1)


def decodes_without(monkeypatch):
    real = dict(timing.VARIANTS)
    for name, (*rest, _) in real.items():
        monkeypatch.setitem(timing.VARIANTS, name, (*rest, False))


def steps_without(monkeypatch):
    for name, (*rest, _) in dict(bench_training.TRAINING).items():
        monkeypatch.setitem(bench_training.TRAINING, name, (*rest, False))


def lists_without(monkeypatch):
    monkeypatch.setitem(WRITING, "graph", WRITING["eager"])


def one_model():
    """The optimisers do all their work, and every round is of the same weights: gradients agree."""
    config = BenchConfig("micro", "cpu", batch=8, micro=2, variants=("plain", "sorted"), repeats=3)
    assert bench("train", config, quiet)[1]["difference"] < 1e-4


def weights_move(monkeypatch):
    real = bench_training.replace

    def replace(made, **named):
        return real(made, **{k: v for k, v in named.items() if k != "lr"})

    monkeypatch.setattr(bench_training, "replace", replace)


def norm_moves(monkeypatch):
    real = bench_training.tokenizer_objective

    def objective(loss, weights, stage, statistics):
        statistics.norm = loss.tok.norm
        statistics.averages.move = lambda weight: None
        return real(loss, weights, stage, statistics)

    monkeypatch.setattr(bench_training, "tokenizer_objective", objective)


test_replays, test_replay_bugs = planted(
    [
        (replayed_decodes, too_few_rounds_before),
        (replayed_decodes, decodes_without),
        (replayed_steps, steps_without),
        (replayed_lists, lists_without),
        (one_model, weights_move),
        (one_model, norm_moves),
    ]
)


# --- writing ------------------------


def test_without_a_gpu_graphs_are_left_out():
    said = []
    assert can_run(("short", "short+graph"), "cpu", said.append) == ("short",)
    assert len(said) == 1 and "need CUDA" in said[0] and "short+graph" in said[0]
    with pytest.raises(ValueError, match="need CUDA graphs, and cpu has none"):
        can_run(("graph", "compile+graph"), "cpu")


@pytest.mark.parametrize(
    "wrong,says",
    (
        ({"variants": ("eager", "quick")}, "variant 'quick': use eager"),
        ({"variants": ("graph",)}, "need CUDA graphs"),
        ({"variants": ("transformers",)}, "at least one of eager"),
        ({"tokens": 17}, "1 .. 16, not 17"),
        ({"batches": (0,)}, "batches and repeats"),
        ({"guidance": ()}, "at least one guidance"),
        ({"precision": "int3"}, "precision 'int3'"),
    ),
)
def test_what_cannot_be_written_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        bench("generate", BenchConfig("micro", "cpu", **wrong), quiet)


class Llama(torch.nn.Module):
    """What is asked of transformers."""

    asked = []

    def __init__(self, config):
        super().__init__()
        self.config = config

    def generate(self, start, *, max_new_tokens, min_new_tokens, **rest):
        self.asked.append((len(start), max_new_tokens, min_new_tokens, rest))
        return torch.cat([start, torch.ones(len(start), max_new_tokens, dtype=torch.int64)], 1)


def test_a_llama_of_the_same_size_takes_its_turn(monkeypatch):
    module = types.ModuleType("transformers")
    module.LlamaConfig, module.LlamaForCausalLM = types.SimpleNamespace, Llama
    monkeypatch.setitem(sys.modules, "transformers", module)
    config = BenchConfig(
        "micro", "cpu", variants=("eager", "transformers"), batches=(3,), tokens=5, repeats=2
    )
    rows = bench("generate", config, quiet)
    assert [(r["guidance"], r["variant"]) for r in rows] == [
        (g, name) for g in (1, 2) for name in ("eager", "transformers")
    ]
    assert all(x[:3] == (3, 5, 5) and not x[3]["do_sample"] for x in Llama.asked) and len(Llama.asked) == 8
    assert [x[3].get("guidance_scale") for x in Llama.asked] == [None] * 4 + [2] * 4
    assert all(r["times_transformers"] == 1 for r in rows[1::2]) and rows[0]["times_transformers"] > 0
    made, c = (
        bench_writing.llama(bench_writer(config, torch.float32).config).config,
        bench_writing.preset("micro").ar,
    )
    assert (made.hidden_size, made.num_hidden_layers, made.vocab_size) == (c.width, c.depth, c.vocabulary)
    assert made.num_attention_heads * c.head_dim == c.width and math.isnan(rows[1]["same_ids"])


def test_flat_is_measured_flat_however_few_tokens(monkeypatch):
    monkeypatch.setattr(flat_writing, "LARGE", 0)
    written, real = [], FlatWriter.write
    monkeypatch.setattr(
        FlatWriter, "write", lambda self, *a, **k: written.append(self.quantize) or real(self, *a, **k)
    )
    config = BenchConfig(
        "micro", "cpu", variants=("eager", "flat", "int8"), batches=(2,), tokens=8, repeats=2
    )
    rows = bench("generate", config, quiet)
    assert written.count(None) == written.count("int8") == 8, "each a rehearsal, two rounds, the ids; twice"
    assert [r["precision"] for r in rows] == ["fp32", "fp32", "int8"] * 2
    assert all(r["same_ids"] == 1 for r in rows if r["variant"] == "flat")
    assert all(0.1 < r["last_quarter"] < 10 for r in rows), "positions are timed"
    int8, flat = rows[2], rows[1]
    assert math.isclose(
        int8["limit_tokens_per_second"], 4 * flat["limit_tokens_per_second"], rel_tol=1e-6
    ) or (flat["limit"] == "arithmetic")


def test_one_line_says_that_there_is_no_llama(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    config, said = (
        BenchConfig("micro", "cpu", variants=("eager", "transformers"), batches=(1,), repeats=1),
        [],
    )
    assert {r["variant"] for r in bench("generate", config, said.append)} == {"eager"}
    assert sum("transformers is not installed" in line for line in said) == 1


def test_the_limit_of_a_step():
    """All weights but the tables, once; with many rows, the arithmetic."""
    ar = bench_writer(BenchConfig("micro", "cpu"), torch.bfloat16)
    tables = (ar.start, ar.positions, ar.class_table.weight, ar.token_table.weight)
    assert step_weights(ar.config) == sum(w.numel() for w in ar.parameters()) - sum(w.numel() for w in tables)
    one = limits(ar.config, 1, torch.bfloat16, 1e9, 1e12)
    assert one["weights"] == step_weights(ar.config) * 2e-9 > one["arithmetic"]
    many = limits(ar.config, 10_000, torch.bfloat16, 1e9, 1e12)
    assert many["arithmetic"] == 10_000 * one["arithmetic"] > many["weights"] == one["weights"]
    copy, size = copying(torch.device("cpu"))
    copy()
    assert size == 2**27


def test_the_model_is_about_as_sure_as_a_trained_one():
    ar = bench_writer(BenchConfig("small", "cpu"), torch.float32)
    x = ar.norm(torch.randn(8, ar.config.width))
    p = ar.head(x).softmax(-1)
    nats = -(p * p.clamp_min(1e-30).log()).sum(-1)
    assert 3.5 < float(nats.mean()) < 6


def compiled_once():
    """One graph serves all blocks and all positions."""
    with pytest.MonkeyPatch.context() as m:
        real = torch.nn.Module.compile
        m.setattr(torch.nn.Module, "compile", lambda self, **named: real(self, backend="eager", **named))
        ar = bench_writer(BenchConfig("micro", "cpu"), torch.float32)
        plain = ar.generate(torch.tensor([0, 3]), guidance=2.0)
        ar.writer = WRITING["compile"][1]()
        torch.compiler.reset()
        counters.clear()
        with compiled(ar.blocks):
            ids = ar.generate(torch.tensor([0, 3]), guidance=2.0)
        assert counters["stats"]["unique_graphs"] == 1 and torch.equal(ids, plain)


def cache_grows(monkeypatch):
    monkeypatch.setitem(WRITING, "compile", WRITING["eager"])


def position_is_a_number(monkeypatch):
    real = ARModel.step
    monkeypatch.setattr(
        ARModel,
        "step",
        lambda self, x, cache, position, seen: real(
            self, x, [_Numbered(c) for c in cache], int(position), seen
        ),
    )


class _Numbered:
    def __init__(self, cache):
        self.cache = cache

    def add(self, k, v, position):
        return self.cache.add(k, v, torch.tensor([position]))


test_compiled_once, test_compiled_often = planted(
    [(compiled_once, cache_grows), (compiled_once, position_is_a_number)]
)


def test_entering_a_context_takes_no_time():
    import contextlib
    import time

    @contextlib.contextmanager
    def slow(name):
        time.sleep(0.05)
        yield
        time.sleep(0.05)

    assert max(in_turns({"a": lambda: None}, 2, around=slow)["a"]) < 0.04

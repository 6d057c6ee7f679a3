"""Search over prefixes: its traps, each with the bug that falls into it."""

import inspect

import pytest
import torch
from planting import planted, randomize

import flextok_edu.evaluation.priors as priors
import flextok_edu.evaluation.search as search
import flextok_edu.evaluation.verifiers as verifiers
from flextok_edu.ar import ARModel
from flextok_edu.data.scenes import KINDS
from flextok_edu.engine.config import ARConfig
from flextok_edu.evaluation.priors import ARPrior, Prior, UniformPrior, draw_different
from flextok_edu.evaluation.search import SearchConfig
from flextok_edu.evaluation.verifiers import RankSum, Verifier, make_verifier, ranks, register_verifier
from flextok_edu.flow import SamplingConfig
from flextok_edu.sampling import TokenSampling

V, K = 23, 16


class Tok:
    "Decodes a list to one pixel, and notes who was decoded from which noise."

    vocabulary, length, image_size, kind, identity = V, K, 1, "pretended", "1" * 16

    def __init__(self):
        self.calls = []

    def detokenize(self, ids, sampling=None, *, first_index=0, **settings):
        self.calls.append((ids.clone(), sampling.seed))
        noise = torch.tensor([seed % 97 for seed in sampling.seed]) / 97  # the noise is a part of the picture
        value = (ids.float().mean(1) / V + noise) / 2
        return (value * 2 - 1)[:, None, None, None].expand(-1, 3, 1, 1)

    def noises(self):
        return [seed for _, seeds in self.calls for seed in seeds]


class Liking(Verifier):
    "Likes what agrees with a list of each prompt; `pixels` makes it look at the picture alone."

    def __init__(self, prompts=3, pixels=False):
        self.target = torch.randint(V, (prompts, K), generator=torch.Generator().manual_seed(7))
        self.pixels = pixels

    def measure(self, images, ids, prompts):
        if self.pixels:
            return images.mean((1, 2, 3))[:, None]
        return (ids == self.target[prompts, : ids.shape[1]]).double().mean(1, keepdim=True)


class TokenPrior(Prior):
    "Probabilities that depend on the last token."

    def __init__(self, prompts=3, **sampling):
        self.prompts, self.vocabulary, self.length = prompts, V, K
        self.sampling = TokenSampling(**sampling)
        self.table = torch.randn(V + 1, V, generator=torch.Generator().manual_seed(5)) * 2

    def logits(self, ids, prompts):
        last = ids[:, -1] if ids.shape[1] else torch.full((len(ids),), V)
        return self.table[last] + 0.1 * prompts[:, None]


SMALL = dict(beams=3, candidates=4)


def small_ar(seed=0):
    torch.manual_seed(seed)
    ar = randomize(ARModel(ARConfig(V, K, 5, 64, 1, 64)), 0.3).eval()
    ar.tokenizer_identity = Tok().identity
    return ar


# --- the checks
# ------------------------------------------------------------------------------------------------


def check_same_noise_for_all_candidates():
    for method in ("beam", "lookahead"):
        for batch in (5, 250):  # also where a prompt's candidates are decoded in several batches
            tok = Tok()
            found = search.search(method, TokenPrior(3), tok, Liking(), batch=batch, **SMALL)
            assert all(len(ids) == len(seeds) for ids, seeds in tok.calls)
            assert len(set(tok.noises())) == 3 == len(set(found.noise)), (
                "one noise a prompt, another for each"
            )


def check_independent_noise_of_best_of_n():
    tok = Tok()
    search.best_of_n(TokenPrior(3), tok, Liking(), n=7)
    assert len(tok.noises()) == len(set(tok.noises())) == 21


def check_first_step_has_one_beam():
    tok = Tok()
    found = search.beam(TokenPrior(3), tok, Liking(), **SMALL)
    assert [s.ids.shape[1] for s in found.steps] == [4, 12, 12, 12, 12]  # at lengths 1, 2, 4, 8, 16
    assert found.decodes == 4 + 4 * 12 == len(tok.noises()) / 3


def check_only_the_last_token_branches():
    for method in ("beam", "lookahead"):
        found = search.search(method, TokenPrior(3), Tok(), Liking(), **SMALL)
        for before, step in zip(found.steps, found.steps[1:]):
            beams, j = before.best(), before.ids.shape[-1]
            for prompt in range(3):
                for beam in range(beams.shape[1]):
                    children = step.ids[prompt, step.parents == beam]
                    assert (children[:, :j] == beams[prompt, beam]).all(), "a child begins with its parent"
                    assert (children[:, :-1] == children[0, :-1]).all(), (
                        "the block is drawn once for each beam"
                    )
                    assert len(set(children[:, -1].tolist())) == 4, "without replacement"


def check_beams_draw_blocks_of_their_own():
    prior = UniformPrior(Tok(), 1)
    found = search.beam(prior, Tok(), Liking(1), schedule=(1, 16), **SMALL)
    blocks = {tuple(row[1:-1].tolist()) for row in found.steps[1].ids[0]}
    assert len(blocks) == 3, "three beams, three blocks"


def check_lookahead():
    prior = TokenPrior(3, guidance=1.0)
    found = search.lookahead(prior, Tok(), Liking(), ahead=5, **SMALL)
    for step, length in zip(found.steps, (1, 2, 4, 8, 16)):
        assert step.ids.shape[-1] == length and step.seen.shape[-1] == min(length + 5, 16)
        assert (step.seen[..., :length] == step.ids).all()
        for j in range(length, step.seen.shape[-1]):  # greedy
            assert (step.seen[..., j] == prior.table[step.seen[..., j - 1]].argmax(-1)).all()
        assert step.best().shape == (3, min(3, step.ids.shape[1]), length), "the unextended are kept"


def check_the_best_are_kept():
    for method in search.METHODS:
        tok, verifier = Tok(), Liking(pixels=True)
        found = search.search(method, TokenPrior(3), tok, verifier, **SMALL)
        last = found.steps[-1]
        assert torch.equal(found.scores, last.scores.amax(1))
        for step in found.steps:
            order = step.scores.sort(1, descending=True).values[:, : step.kept.shape[1]]
            assert torch.equal(step.scores.gather(1, step.kept), order)
        again = tok.detokenize(found.ids, SamplingConfig(seed=found.noise))
        assert (again - found.images).abs().max() < 0.01, "the picture that was judged, from its own noise"
        assert (found.scores - found.images.mean((1, 2, 3))).abs().max() < 1e-6


def check_batches_change_nothing():
    for method in search.METHODS:
        verifier = RankSum([Liking(5), Liking(5, pixels=True)])
        one, other = (
            search.search(method, TokenPrior(5), Tok(), verifier, batch=b, n=9, **SMALL) for b in (4, 1000)
        )
        assert torch.equal(one.ids, other.ids) and one.noise == other.noise and one.decodes == other.decodes
        assert torch.equal(one.scores, other.scores)
        assert all(torch.equal(a.scores, b.scores) for a, b in zip(one.steps, other.steps))
    few = search.beam(TokenPrior(2), Tok(), Liking(), **SMALL)
    assert torch.equal(few.ids, search.beam(TokenPrior(3), Tok(), Liking(), **SMALL).ids[:2]), (
        "nor do neighbours"
    )


def check_a_search_without_a_model_finds_what_is_asked():
    tok, verifier = Tok(), Liking(3)
    schedule = tuple(range(1, K + 1))
    found = search.beam(UniformPrior(tok, 3), tok, verifier, beams=1, candidates=V, schedule=schedule)
    assert torch.equal(found.ids, verifier.target), "every token is a candidate, so the best list is found"
    assert found.decodes == V * K


def check_candidates_differ():
    logits = torch.randn(200, V)
    for s in (
        TokenSampling(),
        TokenSampling(temperature=0.0),
        TokenSampling(top_k=2),
        TokenSampling(top_p=0.1),
    ):
        drawn = draw_different(logits, 6, s, range(200))
        assert all(len(set(row)) == 6 for row in drawn.tolist())
        best = logits.topk(6).indices
        if s.temperature == 0:
            assert torch.equal(drawn, best)
        if s.top_k:  # first the two that may be drawn, then the most probable of the others
            assert all(
                set(a[:2]) == set(b[:2]) and a[2:] == b[2:] for a, b in zip(drawn.tolist(), best.tolist())
            )
        assert torch.equal(drawn[1:], draw_different(logits[1:], 6, s, range(1, 200))), (
            "a row has its own seed"
        )


def check_the_prior_is_the_model():
    ar, labels = small_ar(), torch.tensor([0, 3, 5])
    for settings in (dict(), dict(guidance=2.5, temperature=0.7, top_k=9)):
        prior = ARPrior(ar, labels, **settings)
        none, seeds = torch.zeros(3, 0, dtype=torch.int64), [4, 5, 6]
        written = prior.extend(none, torch.arange(3), K, seeds)
        assert torch.equal(written, ar.generate(labels, seeds=seeds, **settings))
        assert torch.equal(Prior.extend(prior, none, torch.arange(3), K, seeds), written), "token by token"
        assert torch.equal(prior.extend(written[:, :7], torch.arange(3), K, seeds), written), (
            "wherever it goes on"
        )
        greedy = ar.generate(labels, **(settings | {"temperature": 0.0}))
        assert torch.equal(prior.extend(none, torch.arange(3), K), greedy)
        assert torch.equal(Prior.extend(prior, none, torch.arange(3), K), greedy)
    swapped = prior.extend(none[:2], torch.tensor([2, 0]), K, [6, 4])
    assert torch.equal(swapped, written[[2, 0]]), "each list has the condition of its prompt"


def check_ranks_within_a_prompt():
    values = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.1, 0.3, 0.2, 0.4]])
    assert ranks(values).tolist() == [[3.0, 0.0, 1.5, 1.5], [0.0, 2.0, 1.0, 3.0]]

    class Scaled(Liking):
        def measure(self, images, ids, prompts):
            return 1e6 * super().measure(images, ids, prompts)

    a, b = Liking(2), Scaled(2)
    b.target = torch.randint(V, b.target.shape, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(V, (8, K))
    values = RankSum([a, b]).measure(None, ids, torch.arange(2).repeat_interleave(4)).unflatten(0, (2, 4))
    expected = ranks(values[..., 0]) + ranks(values[..., 1])
    assert torch.equal(RankSum([a, b]).combine(values), expected)
    nested = RankSum([a, RankSum([a, b])])
    values = nested.measure(None, ids, torch.arange(2).repeat_interleave(4)).unflatten(0, (2, 4))
    assert values.shape[-1] == 3 and torch.equal(
        nested.combine(values), ranks(values[..., 0]) + ranks(expected)
    )


def check_likelihood():
    ar, labels = small_ar(), torch.tensor([2, 5])
    ids, prompts = torch.randint(V, (4, 6)), torch.tensor([1, 0, 0, 1])
    verifier = make_verifier("likelihood", ar=ar, cond=labels)
    with torch.no_grad():
        logp = ar(ids, labels[prompts]).log_softmax(-1)
    expected = torch.stack([logp[i, range(6), ids[i]].sum() for i in range(4)])
    assert not verifier.needs_images and torch.allclose(verifier.measure(None, ids, prompts)[:, 0], expected)
    tok = Tok()
    found = search.beam(ARPrior(ar, labels), tok, verifier, **SMALL)
    assert found.decodes == 1 and len(tok.noises()) == 2, "only the results are decoded"
    drawn = search.best_of_n(ARPrior(ar, labels), tok, verifier, n=1)
    assert (found.scores > drawn.scores).all()


# --- the bugs
# ------------------------------------------------------------------------------------------------


def rewritten(monkeypatch, module, name, *pairs):
    "A function of a module with some of its text replaced."
    text = inspect.getsource(getattr(module, name))
    for old, new in pairs:
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {name}"
        text = text.replace(old, new)
    scope = {}
    exec(compile(text, name, "exec"), vars(module) | {}, scope)
    original, changed = getattr(module, name), scope[name]
    space = vars(module)
    if inspect.isfunction(changed):
        code = changed.__code__
        monkeypatch.setattr(original, "__code__", code)
    else:
        for method, function in vars(changed).items():
            if inspect.isfunction(function):
                monkeypatch.setattr(space[name], method, function)


def bug(module, name, *pairs):
    def plant(monkeypatch):
        rewritten(monkeypatch, module, name, *pairs)

    plant.__name__ = f"{name}: {pairs[0][1][:50]}"
    return plant


PER_CANDIDATE = "noise = [[_named('noise', *c.name(i), j) for j in range(n)] for i in prompts.tolist()]"
test_passes, test_caught = planted(
    [
        (
            check_same_noise_for_all_candidates,
            bug(search, "_beam", ("noise = [[seed] * n for seed in same]", PER_CANDIDATE)),
        ),
        (
            check_same_noise_for_all_candidates,
            bug(search, "_beam", ('_named("noise", *c.name(i)) for', '_named("noise", c.seed) for')),
        ),
        (
            check_independent_noise_of_best_of_n,
            bug(search, "_best_of_n", ('_named("noise", *c.name(i), j)', '_named("noise", *c.name(i))')),
        ),
        (
            check_first_step_has_one_beam,
            bug(search, "_beam", ("torch.zeros(p, 1, 0,", "torch.zeros(p, c.beams, 0,")),
        ),
        (
            check_only_the_last_token_branches,
            bug(search, "_candidates", ("length - 1, seeds)", "length, seeds)[:, :-1].roll(1, 1)")),
        ),
        (
            check_only_the_last_token_branches,
            bug(
                search, "_candidates", ("[:, None].expand(-1, n, -1)", ".repeat(n, 1).unflatten(0, (-1, n))")
            ),
        ),
        (
            check_only_the_last_token_branches,
            bug(
                priors,
                "draw_different",
                (".topk(candidates, -1).indices", ".softmax(-1).multinomial(candidates, True)"),
            ),
        ),
        (
            check_beams_draw_blocks_of_their_own,
            bug(search, "_candidates", ('_named("tokens", *name)', '_named("tokens", *name[:2])')),
        ),
        (
            check_lookahead,
            bug(
                search,
                "_beam",
                (
                    "beams = steps[-1].best()",
                    "beams = seen.gather(1, kept[..., None].expand(-1, -1, seen.shape[-1]))",
                ),
            ),
        ),
        (
            check_lookahead,
            bug(
                search,
                "_beam",
                ("repeat_interleave(n), reach)", "repeat_interleave(n), reach, range(p * n))"),
            ),
        ),
        (
            check_lookahead,
            bug(
                search, "_beam", ("min(length + ahead, lengths[-1])", "min(length + ahead - 1, lengths[-1])")
            ),
        ),
        (
            check_the_best_are_kept,
            bug(search, "_beam", ("min(c.beams, n), 1)", "min(c.beams, n), 1, largest=False)")),
        ),
        (
            check_the_best_are_kept,
            bug(search, "_Search", ("best = scores.argmax(1)", "best = scores.argmin(1)")),
        ),
        (
            check_the_best_are_kept,
            bug(
                search,
                "_Search",
                ("[each[i] for each, i in zip(noise, best.tolist())]", "[each[0] for each in noise]"),
            ),
        ),
        (
            check_batches_change_nothing,
            bug(
                search,
                "_candidates",
                (
                    "(*s.config.name(i), j) for i in prompts.tolist()",
                    "(*s.config.name(i), j) for i in range(p)",
                ),
            ),
        ),
        (
            check_batches_change_nothing,
            bug(
                search,
                "_Search",
                (
                    "rows, flat = prompts.repeat_interleave(n)",
                    "rows, flat = prompts.repeat(n)",
                ),
            ),
        ),
        (
            check_a_search_without_a_model_finds_what_is_asked,
            bug(search, "_beam", ("for length in lengths:", "for length in lengths[::2] + lengths[-1:]:")),
        ),
        (
            check_candidates_differ,
            bug(priors, "draw_different", ("keys - keys.amax(-1, keepdim=True) - 1e6", "-1e9")),
        ),
        (
            check_candidates_differ,
            bug(priors, "draw_different", ("for s in seeds\n", "for s in range(len(seeds))\n")),
        ),
        (
            check_the_prior_is_the_model,
            bug(priors, "ARPrior", ("take(self.cond, prompts)", "take(self.cond, slice(len(prompts)))")),
        ),
        (check_the_prior_is_the_model, bug(priors, "ARPrior", ("self.guidance[ids.shape[1]]", "1"))),
        (check_the_prior_is_the_model, bug(priors, "Prior", ("chance[:, j : j + 1]", "chance[:, :1]"))),
        (check_the_prior_is_the_model, bug(priors, "Prior", ("temperature=0.0", "temperature=1.0"))),
        (
            check_ranks_within_a_prompt,
            bug(verifiers, "RankSum", ("sum(ranks(m.combine(part))", "sum((m.combine(part))")),
        ),
        (check_ranks_within_a_prompt, bug(verifiers, "ranks", ("larger + equal / 2", "larger"))),
        (
            check_likelihood,
            bug(
                verifiers,
                "LikelihoodVerifier",
                ("take(self.cond, prompts)", "self.cond[:1].expand(len(ids))"),
            ),
        ),
    ]
)


# --- what else
# ------------------------------------------------------------------------------------------------


def test_settings_that_cannot_be():
    tok = Tok()
    for named, words in (
        (dict(beams=0), "beams must be"),
        (dict(candidates=True - 1), "candidates must be"),
        (dict(ahead=-1), "ahead must be"),
        (dict(length=K + 1), "length must lie in 1 .. 16"),
        (dict(length=0), "length must lie in 1 .. 16"),
        (dict(schedule=(1, 4, 2, 16)), "a schedule rises"),
        (dict(schedule=(1, 2)), "a schedule rises"),
        (dict(schedule=(0, 16)), "a schedule rises"),
    ):
        with pytest.raises(ValueError, match=words):
            search.beam(TokenPrior(), tok, Liking(), **named)
    with pytest.raises(ValueError, match="no search 'bema'"):
        search.search("bema", TokenPrior(), tok, Liking())
    with pytest.raises(TypeError, match="no setting 'beam'"):
        search.beam(TokenPrior(), tok, Liking(), beam=3)
    prior = TokenPrior()
    prior.vocabulary = 24
    with pytest.raises(ValueError, match="out of 24"):
        search.beam(prior, tok, Liking())
    with pytest.raises(ValueError, match="candidates must lie in 1 .. 23"):
        draw_different(torch.zeros(2, V), 24, TokenSampling(), [0, 1])
    assert not tok.calls, "nothing was decoded"


def test_more_candidates_than_tokens_and_short_results():
    found = search.beam(TokenPrior(1), Tok(), Liking(1), beams=2, candidates=100, length=3)
    assert [s.ids.shape for s in found.steps] == [(1, 23, 1), (1, 46, 2), (1, 46, 3)]
    assert found.ids.shape == (1, 3) and "3 tokens" in repr(found)
    assert SearchConfig(length=6).lengths(16) == (1, 2, 4, 6) and SearchConfig().lengths(1) == (1,)
    alone = search.beam(TokenPrior(1), Tok(), Liking(1), beams=1, candidates=1)
    assert alone.decodes == 5, "one beam with one candidate is a sample"


def test_seeds_name_the_search():
    a, b, c = (search.beam(TokenPrior(), Tok(), Liking(), seed=s, **SMALL) for s in (0, 0, 1))
    assert torch.equal(a.ids, b.ids) and not torch.equal(a.ids, c.ids) and a.noise != c.noise


def test_verifiers_by_name(monkeypatch):
    monkeypatch.setattr(verifiers, "VERIFIERS", dict(verifiers.VERIFIERS))
    register_verifier("liking", lambda asked: Liking(**asked.more))
    both = make_verifier("liking+liking", more={"prompts": 2})
    assert isinstance(both, RankSum) and len(both.members) == 2
    for name in ("a+b", "", "liking"):
        with pytest.raises(ValueError, match="cannot be called"):
            register_verifier(name, lambda asked: Liking())
    with pytest.raises(ValueError, match="no verifier 'nobody': use attributes"):
        make_verifier("nobody")
    with pytest.raises(ValueError, match="needs reader= and wanted="):
        make_verifier("attributes")
    with pytest.raises(ValueError, match="needs cond="):
        make_verifier("likelihood", ar=small_ar())
    with pytest.raises(TypeError, match="no setting 'readers'"):
        make_verifier("attributes", readers=1)


def tiny_clip(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    text = small | dict(vocab_size=8, max_position_embeddings=16, eos_token_id=2, bos_token_id=1)
    config = CLIPConfig(
        text_config=text, vision_config=small | dict(image_size=32, patch_size=16), projection_dim=16
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    words = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "a", "boat", "star", "<unk>"])}
    tok = Tokenizer(models.WordLevel(words, "<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(
        pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    PreTrainedTokenizerFast(tokenizer_object=tok, **special).save_pretrained(folder)
    return model


def test_clip_of_a_folder(tmp_path):
    pytest.importorskip("transformers")
    model, images = tiny_clip(tmp_path / "clip"), torch.rand(3, 3, 32, 32) * 2 - 1
    verifier = make_verifier("clip", texts=["a boat", "a star"], clip=tmp_path / "clip")
    prompts = torch.tensor([1, 0, 1])
    found = verifier.measure(images, None, prompts)
    assert found.shape == (3, 1) and found.abs().max() <= 1
    assert not torch.equal(found, verifier.measure(images, None, 1 - prompts)), "each has its own text"
    mean, std = (torch.tensor(v)[:, None, None] for v in (verifiers._CLIP_MEAN, verifiers._CLIP_STD))
    pixels = ((images + 1) / 2 - mean) / std
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[3, 4], [3, 5]]), pixel_values=pixels)
    expected = (out.image_embeds * out.text_embeds[prompts]).sum(-1)
    assert torch.allclose(found[:, 0], expected, atol=1e-5)


def test_clip_that_is_not_there_or_is_a_pickle(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match="hf download .*pass the folder"):
        make_verifier("clip", texts=["a boat"], clip=tmp_path / "nothing")
    folder = tmp_path / "clip"
    model = tiny_clip(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="no safetensors"):
        make_verifier("clip", texts=["a boat"], clip=folder)


def test_dreamsim():
    references = torch.tensor([-1.0, 1.0])[:, None, None, None].expand(2, 3, 8, 8)

    def distance(a, b):
        assert a.shape == b.shape == (3, 3, 224, 224) and a.min() >= 0 and a.max() <= 1
        return (a - b).abs().mean((1, 2, 3))

    verifier = verifiers.DreamSimVerifier(references, distance)
    images = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 3, 8, 8)
    assert torch.allclose(
        verifier.measure(images, None, torch.tensor([0, 0, 0]))[:, 0], torch.tensor([0, -0.5, -1.0])
    )
    assert torch.allclose(
        verifier.measure(images, None, torch.tensor([1, 1, 1]))[:, 0], torch.tensor([-1.0, -0.5, 0])
    )
    with pytest.raises((ImportError, FileNotFoundError), match="(?i)dreamsim"):
        make_verifier("dreamsim", references=references)


def test_a_search_with_the_shipped_models():
    from flextok_edu.data.features import AttributeClassifier
    from flextok_edu.tokenizer import FlexTok

    tok, ar = FlexTok.from_pretrained("tiny"), ARModel.from_pretrained("tiny")
    labels = torch.tensor([2, 5])
    reader = AttributeClassifier.from_pretrained("tiny")
    wanted = [{"kind": KINDS[i], "light": "night"} for i in labels]
    prior, decoder = ARPrior(ar, labels, guidance=1.5), SamplingConfig(steps=2)
    verifier = make_verifier("attributes+likelihood", reader=reader, wanted=wanted, ar=ar, cond=labels)
    found = search.beam(prior, tok, verifier, sampling=decoder, length=8, **SMALL)
    assert found.ids.shape == (2, 8) and found.images.shape == (2, 3, 64, 64) and found.decodes == 4 + 3 * 12
    again = tok.detokenize(found.ids, sampling=decoder, seed=found.noise)
    assert (again - found.images).abs().max() < 0.01


def test_prompts_in_words():
    "A text-conditional model: each candidate has the text of its prompt, with guidance too."
    from flextok_edu.engine.conditions import TextFeatures, take
    from flextok_edu.engine.settings import TextConfig

    torch.manual_seed(0)
    config = ARConfig(V, K, 0, 64, 1, 64, text=TextConfig(encoder="pretended", width=12, length=6))
    ar = randomize(ARModel(config), 0.3).eval()
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
    text = TextFeatures(torch.randn(3, 4, 12), mask)
    ar.condition.set_null(TextFeatures(torch.randn(1, 2, 12), torch.ones(1, 2).bool()))
    prior, seeds = ARPrior(ar, text, guidance=2.0), [4, 5, 6]
    written = prior.extend(torch.zeros(3, 0, dtype=torch.int64), torch.arange(3), K, seeds)
    assert torch.equal(written, ar.generate(text, seeds=seeds, guidance=2.0))
    assert torch.equal(Prior.extend(prior, written[:, :3], torch.arange(3), K, seeds), written)
    alone = Prior.extend(prior, written[2:, :3], torch.tensor([2]), K, seeds[2:])
    assert torch.equal(alone, written[2:])
    verifier = make_verifier("likelihood", ar=ar, cond=text)
    values = verifier.measure(None, written[[2, 0]], torch.tensor([2, 0]))[:, 0]
    assert torch.allclose(values, ar.log_likelihood(written[[2, 0]], take(text, [2, 0])).sum(1))
    ar.tokenizer_identity = Tok().identity
    found = search.beam(prior, Tok(), verifier, **SMALL)
    assert found.ids.shape == (3, K)


def test_a_prompt_by_its_own_seed():
    "With seeds a prompt depends on no other, and on its place neither."
    ar, prompts = small_ar(), torch.tensor([2, 4, 1])
    seeds = (7, 3, 9)

    def found(which, method="beam"):
        liking = Liking(pixels=True)
        how = SMALL | {"seeds": tuple(seeds[i] for i in which), "n": 5}
        return search.search(method, ARPrior(ar, prompts[list(which)]), Tok(), liking, **how)

    for method in ("beam", "lookahead", "best_of_n"):
        together = found((0, 1, 2), method)
        for i in range(3):
            assert torch.equal(found((i,), method).ids[0], together.ids[i])
        assert torch.equal(found((2, 0), method).ids, together.ids[[2, 0]])
    with pytest.raises(ValueError, match="seeds must be 3"):
        search.beam(ARPrior(ar, prompts), Tok(), Liking(), seeds=(1, 2))


def test_what_a_model_cannot_be_asked_is_said_at_once():
    from flextok_edu.engine.conditions import TextFeatures
    from flextok_edu.engine.settings import TextConfig

    text = ARConfig(V, K, 0, 64, 1, 64, text=TextConfig(encoder="pretended", width=12, length=6))
    told = TextFeatures(torch.randn(1, 2, 12), torch.ones(1, 2).bool())
    for ar, cond, words in (
        (small_ar(), torch.tensor([99]), "classes must lie"),
        (ARModel(text), told, "set_null"),
        (small_ar(), told, "by class"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            ARPrior(ar, cond)
    other = small_ar()
    other.tokenizer_identity = "f" * 16
    with pytest.raises(ValueError, match="nonsense"):
        search.beam(ARPrior(other, torch.tensor([1])), Tok(), Liking(), **SMALL)
    with pytest.raises(ValueError, match="values"):
        bad = Liking()
        bad.measure = lambda images, ids, prompts: torch.zeros(len(ids))
        search.beam(ARPrior(small_ar(), torch.tensor([1])), Tok(), bad, **SMALL)

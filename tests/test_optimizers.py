"""The optimisers of engine: Muon against PyTorch's own and against the decomposition that it approximates;
where it computes, and in what precision.
"""

import inspect

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flextok_edu.engine.optim as engine_optim
from flextok_edu.engine.config import StageConfig, preset
from flextok_edu.engine.optim import Muon, make_optimizers, orthogonalise
from flextok_edu.vae import VAE

SHAPES = ((8, 4), (4, 8), (6, 6), (6, 6))


class Dtypes(TorchDispatchMode):
    """Remembers the dtype of every result."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, kinds, arguments=(), named=None):
        found = function(*arguments, **(named or {}))
        self.seen |= {x.dtype for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)}
        return found


def moved(kind, steps=4, **options):
    """Weights after some steps on random gradients, the same for every optimiser."""
    weights = [nn.Parameter(torch.ones(r, c)) for r, c in SHAPES]
    optimizer = kind(weights, lr=0.1, weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=generator)
        optimizer.step()
    return [w.detach() for w in weights]


def check_muon(kind):
    """Against PyTorch's, on the same gradients: equal to the eight bits of its bfloat16, a hundredth of the
    way that the weights went.
    """
    for name in (None, "original", "match_rms_adamw", "spectral_unclamped"):
        for nesterov in (True, False):
            options = {"adjust_lr_fn": name, "nesterov": nesterov}
            for a, b in zip(moved(kind, **options), moved(torch.optim.Muon, **options), strict=True):
                assert (a - b).norm() < 0.03 * (b - 1).norm()


def test_muon_is_pytorchs():
    check_muon(Muon)


@pytest.mark.parametrize(
    "old, new",
    (
        ('1 - group["momentum"]', 'group["momentum"]'),
        ('if group["nesterov"] else average', "if True else average"),
        ('1 - group["lr"] * group["weight_decay"]', '1 - group["weight_decay"]'),
        ("math.sqrt(r / c)}", "math.sqrt(c / r)}"),
    ),
    ids=("momentum", "nesterov", "decay", "size"),
)
def test_a_wrong_muon_is_found(old, new):
    source = inspect.getsource(Muon)
    assert old in source
    names = dict(vars(engine_optim))
    exec(source.replace(old, new), names)
    with pytest.raises(AssertionError):
        check_muon(names["Muon"])


@pytest.mark.parametrize("rows, columns", ((40, 96), (96, 40), (64, 64), (1, 7)))
def test_orthogonalised(rows, columns):
    """The singular vectors stay, the singular values come near 1: against the decomposition."""
    u, _ = torch.linalg.qr(
        torch.randn(3, rows, min(rows, columns), generator=torch.Generator().manual_seed(0))
    )
    v, _ = torch.linalg.qr(
        torch.randn(3, columns, min(rows, columns), generator=torch.Generator().manual_seed(1))
    )
    s = torch.linspace(1, 0.1, min(rows, columns))
    found = u.mT @ orthogonalise(u @ (s[:, None] * v.mT)) @ v
    diagonal = torch.diagonal(found, dim1=1, dim2=2)
    assert (
        0.6 < diagonal.min()
        and diagonal.max() < 1.25
        and (found - torch.diag_embed(diagonal)).abs().max() < 1e-4
    )
    assert torch.equal(orthogonalise(torch.zeros(2, rows, columns)), torch.zeros(2, rows, columns)), (
        "no gradient, no step, no NaN"
    )


def test_no_emulated_bfloat16():
    """PyTorch's own computes in bfloat16 wherever it is; on processors without it a step takes seconds."""
    for kind, expected in ((Muon, False), (torch.optim.Muon, True)):
        with Dtypes() as watch:
            moved(kind, 1)
        assert (torch.bfloat16 in watch.seen) == expected


def check_filters(kind):
    """A convolution's weight moves as the matrix with one row an output channel, whatever its layout in
    memory.
    """
    generator = torch.Generator().manual_seed(0)
    filters = nn.Parameter(torch.randn(6, 2, 3, 3, generator=generator).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(filters.detach().flatten(1).clone())
    first, second = (
        kind([w], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw") for w in (filters, matrix)
    )
    for _ in range(3):
        filters.grad = torch.randn(filters.shape, generator=generator)
        matrix.grad = filters.grad.flatten(1)
        first.step(), second.step()
    assert (
        torch.allclose(filters.flatten(1), matrix, atol=1e-6)
        and (filters - matrix.view(filters.shape)).abs().max() < 1e-6
    )


def test_filters_are_matrices():
    check_filters(Muon)
    with pytest.raises(ValueError, match="leave those to AdamW"):
        Muon([nn.Parameter(torch.ones(3))], lr=0.1)


def test_groups_as_pytorchs():
    """Parameter groups with settings of their own, and no weight twice."""
    a, b = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 2, 3, 3))
    optimizer = Muon([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.5] and optimizer.param_groups[1][
        "momentum"
    ] == 0.95
    with pytest.raises(ValueError, match="more than one parameter group"):
        Muon([{"params": [a]}, {"params": [a]}])


def test_filters_the_wrong_way_round_are_found():
    names = dict(vars(engine_optim))
    source = inspect.getsource(Muon)
    assert ".flatten(2)" in source
    exec(source.replace(".flatten(2)", ".flatten(1, -2)"), names)
    with pytest.raises((AssertionError, RuntimeError)):
        check_filters(names["Muon"])


def test_the_autoencoder_is_dealt():
    """Filters and matrices of levels and middle to Muon; what touches pixels and latents, gains and biases to
    AdamW.
    """
    model = VAE(preset("tiny").vae)
    names = {id(w): n for n, w in model.named_parameters()}
    adamw, muon = make_optimizers(model.named_parameters(), StageConfig(optimizer="muon"))
    moved = {names[id(w)] for g in muon.param_groups for w in g["params"]}
    rest = {names[id(w)] for g in adamw.param_groups for w in g["params"]}
    assert not moved & rest and moved | rest == set(names.values())
    assert (
        moved
        == {n for n, w in model.named_parameters() if w.ndim > 1 and (".levels." in n or ".middle." in n)}
        and "decoder.conv_out.weight" in rest
    )


def test_weights_are_dealt_once():
    """Matrices of blocks to Muon, everything else to AdamW, nothing twice; a weight without gradient stays
    where it is.
    """
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), "head": nn.Linear(4, 2)}
    )
    adamw, muon = make_optimizers(model.named_parameters(), StageConfig(optimizer="muon"))
    dealt = [id(w) for opt in (adamw, muon) for g in opt.param_groups for w in g["params"]]
    assert sorted(dealt) == sorted(id(w) for w in model.parameters()) and isinstance(muon, Muon)
    assert [id(w) for g in muon.param_groups for w in g["params"]] == [
        id(block.weight) for block in model["blocks"]
    ]
    before = model["blocks"][0].weight.detach().clone()
    model["blocks"][1].weight.grad = torch.ones(4, 4)
    muon.step()
    assert torch.equal(model["blocks"][0].weight, before) and model["blocks"][0].weight not in muon.state

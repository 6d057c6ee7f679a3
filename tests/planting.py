"""Shared by the tests that plant bugs: a check passes on the code as it is, and fails once the bug is in."""

import sys

import pytest
import torch


def randomize(module, scale=0.2):
    """Large random weights, so that nothing passes by being zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for w in module.parameters():
            w.copy_(torch.randn(w.shape, generator=generator) * scale)
    return module


def planted(pairs):
    """Two tests from pairs (check, bug).

    A check raises AssertionError if something is wrong; a bug takes monkeypatch and puts it wrong.
    """

    @pytest.mark.parametrize("check", dict.fromkeys(check for check, _ in pairs), ids=lambda f: f.__name__)
    def test_the_code_passes(check):
        check()

    @pytest.mark.parametrize("check,bug", pairs, ids=lambda f: f.__name__)
    def test_the_bug_is_caught(check, bug, monkeypatch):
        bug(monkeypatch)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check()

    return test_the_code_passes, test_the_bug_is_caught


def patch(monkeypatch, module, name, value):
    """Put `value` in the place of `module.name`, also in every module that has imported it."""
    original = getattr(module, name)
    for place in [m for n, m in sys.modules.items() if n.split(".")[0] == "flextok_edu"]:
        if vars(place).get(name) is original:
            monkeypatch.setattr(place, name, value)

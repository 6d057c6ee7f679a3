"""The drawn diagrams: in step with the code that draws them, and readable by anybody, in light and dark."""

import importlib.util
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "docs" / "diagrams").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("diagrams_tool", ROOT / "tools" / "diagrams.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def parsed(path: Path) -> ET.Element:
    return ET.fromstring(path.read_text(encoding="utf-8"))


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb", by WCAG."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_the_committed_files_are_what_the_code_draws(tool):
    assert tool.differing() == [], "run: python tools/diagrams.py"
    assert len(FILES) == len(tool.diagrams()) >= 26


def test_check_notices_a_change_a_loss_and_a_stray_file(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "FOLDER", tmp_path)
    assert tool.main([]) == 0 and tool.main(["--check"]) == 0
    (tmp_path / "fsq.svg").write_text("<svg/>")
    (tmp_path / "vae.svg").unlink()
    (tmp_path / "stray.svg").write_text("<svg/>")
    assert tool.main(["--check"]) == 1
    assert tool.differing() == ["fsq.svg", "stray.svg", "vae.svg"]


@pytest.mark.parametrize("path", FILES, ids=lambda f: f.stem)
class TestEveryDiagram:
    def test_says_what_it_shows(self, path):
        root = parsed(path)
        title, desc = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
        assert len(title.text) > 5 and len(desc.text) > 60
        assert root.get("aria-labelledby") == f"{title.get('id')} {desc.get('id')}"
        assert root.get("viewBox").startswith("0 0 810 ")

    def test_brings_its_ground_and_two_palettes(self, path):
        root = parsed(path)
        style = root.find(f"{SVG}style").text
        assert "@media (prefers-color-scheme: dark)" in style
        light, dark = style.split("@media")
        assert ".panel{" in light and ".panel{" in dark and ".ink{" in light and ".ink{" in dark
        ground = root.find(f"{SVG}rect")
        assert ground.get("class") == "panel" and ground.get("width") == "809"

    def test_needs_nothing_from_outside(self, path):
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        for word in (
            "http:",
            "https:",
            "href",
            "@import",
            "@font-face",
            "<image",
            "<script",
            "<foreignObject",
        ):
            assert word not in text, word
        ids = set(re.findall(r'\bid="([^"]+)"', text))
        assert set(re.findall(r"url\(#([^)]+)\)", text)) <= ids and all(i.startswith(path.stem) for i in ids)

    def test_text_is_large_enough_and_on_the_page(self, path):
        root = parsed(path)
        sizes = [float(x) for x in re.findall(r"font-size:([\d.]+)px", root.find(f"{SVG}style").text)]
        assert sizes and min(sizes) >= 13
        height = float(root.get("height"))
        for text in root.iter(f"{SVG}text"):
            size = {"h": 17, "s": 13, "m": 13}.get(text.get("class").split()[-1], 14)
            w = len(text.text) * size * 0.56  # of DejaVu Sans, which is wide
            x, anchor = float(text.get("x")), text.get("text-anchor", "start")
            left = x - {"start": 0, "middle": w / 2, "end": w}[anchor]
            assert 12 <= left and left + w <= 798 and 12 < float(text.get("y")) < height - 6, text.text


def test_every_drawing_is_shown_somewhere(tool):
    pages = [ROOT / "README.md", *(ROOT / "nbs").rglob("*.ipynb")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    assert not [name for name in tool.drawn() if f"diagrams/{name}" not in text]


def test_every_class_has_a_rule(tool):
    known = {name for selector in tool.all_styles() for name in re.findall(r"\.([\w-]+)", selector)}
    for path in FILES:
        used = {name for e in parsed(path).iter() for name in e.get("class", "").split()}
        assert used <= known, (path.name, used - known)


@pytest.mark.parametrize("scheme", (0, 1), ids=("light", "dark"))
def test_text_stands_out(tool, scheme):
    """4.5 : 1, what WCAG asks of text."""
    c = {name: pair[scheme] for name, pair in tool.COLOURS.items()}
    pairs = [(text, ground) for text in ("ink", "muted", "aim", "tok-text") for ground in ("panel", "band")]
    pairs += [("white", net) for net in ("vae", "tok", "ar")]
    pairs += [("ink", pale) for pale in ("vae-pale", "tok-pale", "ar-pale", "data", "patch")]
    pairs += [("aim", "aim-pale"), ("muted", "data"), ("dim-text", "panel"), ("dim-text", "dim-fill")]
    weak = {pair: round(contrast(*(c[x] for x in pair)), 2) for pair in pairs}
    for i in range(tool.SHADES):
        shade = tool.all_styles()[f".k{i}"]["fill"][scheme]
        weak["on-token", f"k{i}"] = contrast(c["on-token"], shade)
    assert not {pair: x for pair, x in weak.items() if x < 4.5}


def test_the_numbers_in_the_figures_are_right(tool):
    """FSQ's id by the package's own arithmetic; the filter of top-k and top-p."""
    import torch

    from flextok_edu.fsq import FSQ
    from flextok_edu.sampling import filter_top_k_top_p, sample_token

    q = FSQ((8, 5, 5))
    digits = torch.tensor([6.0, 3.0, 1.0])
    assert int(q.codes_to_ids((digits - q.step) / q.step)) == 70 and q.vocabulary == 200
    assert float(FSQ((5,))(torch.tensor([[0.9]]))) == 0.5
    logits = torch.tensor([tool.LOGITS])
    kept = tool.kept_tokens(tool.softmax([x / 0.7 for x in tool.LOGITS]), 5, 0.9)
    ours = filter_top_k_top_p(logits / 0.7, 5, 0.9).isfinite()[0].nonzero()[:, 0].tolist()
    assert sorted(kept) == ours
    assert int(sample_token(logits, torch.tensor([[0.55]]), 0.7, 5, 0.9)) == 1
    assert "id 1" in (ROOT / "docs" / "diagrams" / "sampling.svg").read_text(encoding="utf-8")


def test_the_mask_in_the_figure_is_the_encoder_s(tool):
    from flextok_edu.registers import encoder_mask

    mask = encoder_mask(6, 6)
    assert all(tool.attends(i, j) == bool(mask[i, j]) for i in range(12) for j in range(12))


def test_names_of_columns_may_have_lines(monkeypatch):
    """Two lines above a picture are two lines, inside of the sheet and above the pictures."""
    import torch

    import flextok_edu.engine.figures as figures

    sheets = []
    monkeypatch.setattr(figures, "_present", sheets.append)
    for heads in (["a", "b"], ["a house\nin the snow\nby day", "b"]):
        figures.show_rows({"row": torch.zeros(2, 3, 32, 32)}, heads)
    for fig, lines in zip(sheets, (1, 3)):
        fig.canvas.draw()
        head = next(t for t in fig.axes[0].texts if t.get_text().startswith("a"))
        box, ax = head.get_window_extent(), fig.axes[0].get_window_extent()
        assert head.get_text().count("\n") + 1 == lines and "\\x" not in head.get_text()
        assert ax.y1 <= box.y0 and box.y1 <= fig.bbox.y1, "between the pictures and the edge"

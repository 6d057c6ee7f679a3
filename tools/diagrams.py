"""The diagrams of the course, drawn as SVG by code, so that they stay in step with it.

    python tools/diagrams.py           # write docs/diagrams/*.svg
    python tools/diagrams.py --check   # exit status 1 if a file there differs from what this code draws

One language everywhere: data are light boxes with their shape in monospace (the letters of the course: b n k
d l v t, c h w), networks are filled (hatched where frozen), tokens are rows of squares, coarse to fine from
strong to pale, and a dashed square is a mask token. Every file brings its own background and two palettes.
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "diagrams"
WIDTH = 810
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

# ---------------------------------------------------------------------------------------------- palettes

COLOURS = {  # name: (light, dark)
    "panel": ("#ffffff", "#161b22"),
    "edge": ("#d5d9de", "#343b44"),
    "ink": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9aa5b1"),
    "line": ("#4b545d", "#a7b1bc"),
    "data": ("#f3f5f7", "#242b34"),
    "data-edge": ("#8c96a1", "#6d7885"),
    "tok-text": ("#0068a8", "#6db3e8"),
    "band": ("#f8f9fb", "#1b2129"),
    "white": ("#ffffff", "#ffffff"),
    "vae": ("#00785a", "#0f8264"),  # stage 0
    "vae-pale": ("#dcf1ea", "#173a32"),
    "tok": ("#0068a8", "#1d74b3"),  # stage 1
    "tok-pale": ("#dcebf7", "#17324a"),
    "ar": ("#8a4a9c", "#9a58ac"),  # stage 2
    "ar-pale": ("#f1e4f5", "#3a2442"),
    "aim": ("#b83a0b", "#f0875a"),  # losses, and what the clock says
    "aim-pale": ("#fdeee6", "#3b2319"),
    "patch": ("#a9c3d8", "#4d6b84"),
    "mask": ("#b06a00", "#e0a04a"),  # outline of a mask token
    "on-token": ("#231500", "#160d00"),
    "dim-fill": ("#f3f4f6", "#1c222a"),
    "dim-edge": ("#cdd2d8", "#3d454f"),
    "dim-text": ("#656e78", "#87919c"),
}
COARSE, FINE, SHADES = ("#e58a00", "#f7ab3e"), ("#fbe6c4", "#a98352"), 12  # tokens, first to last

STYLES = {  # class: property: name of a colour, or a value for both palettes
    "panel": {"fill": "panel", "stroke": "edge"},
    "ink": {"fill": "ink"},
    "muted": {"fill": "muted"},
    "on": {"fill": "white"},
    "ontok": {"fill": "on-token"},
    "b": {"font-weight": "600"},
    "h": {"font-weight": "600", "font-size": "17px"},
    "m": {"font-family": MONO, "font-size": "13px"},
    "s": {"font-size": "13px"},
    "sign": {"font-size": "20px"},
    "data": {"fill": "data", "stroke": "data-edge"},
    "bare": {"fill": "none", "stroke": "data-edge"},
    "vae": {"fill": "vae"},
    "tok": {"fill": "tok"},
    "ar": {"fill": "ar"},
    "vae-f": {"fill": "vae-pale", "stroke": "vae"},
    "tok-f": {"fill": "tok-pale", "stroke": "tok"},
    "ar-f": {"fill": "ar-pale", "stroke": "ar"},
    "any-f": {"fill": "data", "stroke": "data-edge"},
    "vae-h": {"stroke": "vae", "stroke-width": "1", "stroke-opacity": ".28"},
    "tok-h": {"stroke": "tok", "stroke-width": "1", "stroke-opacity": ".28"},
    "ar-h": {"stroke": "ar", "stroke-width": "1", "stroke-opacity": ".28"},
    "any-h": {"stroke": "data-edge", "stroke-width": "1", "stroke-opacity": ".38"},
    "vae-t": {"fill": "vae"},
    "aim": {"fill": "aim-pale", "stroke": "aim"},
    "aim-t": {"fill": "aim"},
    "ln": {"fill": "none", "stroke": "line", "stroke-width": "1.6"},
    "hd": {"fill": "line"},
    "ln-aim": {"fill": "none", "stroke": "aim", "stroke-width": "1.8"},
    "hd-aim": {"fill": "aim"},
    "dash": {"stroke-dasharray": "4 4"},
    "pt": {"fill": "patch"},
    "mk": {"fill": "none", "stroke": "mask", "stroke-width": "1.3", "stroke-dasharray": "3 2.4"},
    "pic": {"stroke": "data-edge"},
    "tok-t": {"fill": "tok-text"},
    "ln-tok": {"fill": "none", "stroke": "tok-text", "stroke-width": "1.8"},
    "hd-tok": {"fill": "tok-text"},
    "ln-faint": {"fill": "none", "stroke": "edge", "stroke-width": "1.2"},
    "grey": {"fill": "data-edge"},
    "plate": {"fill": "panel"},
    "level": {"fill": "none", "stroke": "data-edge"},
    "null": {"fill": "none", "stroke": "line", "stroke-width": "1.3", "stroke-dasharray": "3 2.4"},
    "ghost": {"fill": "none", "stroke": "data-edge", "stroke-dasharray": "3 2.4"},
    "band": {"fill": "band", "stroke": "edge"},
    "void": {"fill": "none", "stroke": "dim-edge"},
    "frame": {"fill": "none", "stroke": "aim", "stroke-width": "1.8"},
}
DIMMED = {  # what a class turns into inside a dimmed group
    "ink": {"fill": "dim-text"},
    "muted": {"fill": "dim-text"},
    "on": {"fill": "dim-text"},
    "ontok": {"fill": "dim-text"},
    "aim-t": {"fill": "dim-text"},
    **{c: {"fill": "dim-fill", "stroke": "dim-edge"} for c in ("data", "vae", "tok", "ar", "pt", "aim")},
    **{f"k{i}": {"fill": "dim-fill", "stroke": "dim-edge"} for i in range(SHADES)},
    **{c: {"fill": "dim-fill", "stroke": "dim-edge"} for c in ("vae-f", "tok-f", "ar-f", "any-f")},
    **{c: {"stroke": "dim-edge"} for c in ("vae-h", "tok-h", "ar-h", "any-h", "bare", "mk", "ln", "pic")},
    "ln-aim": {"stroke": "dim-edge"},
    **{c: {"fill": "dim-edge"} for c in ("hd", "hd-aim")},
    "art": {"opacity": ".28"},
}


def between(a: str, b: str, share: float) -> str:
    """A colour between two, "#rrggbb"."""
    pairs = [(int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(p + (q - p) * share):02x}" for p, q in pairs)


def all_styles() -> dict[str, dict[str, str | tuple[str, str]]]:
    """Selectors with their properties; a pair is (light, dark)."""
    found = {f".{name}": rules for name, rules in STYLES.items()}
    for i in range(SHADES):
        share = i / (SHADES - 1)
        found[f".k{i}"] = {"fill": tuple(between(COARSE[s], FINE[s], share) for s in (0, 1))}
    found |= {f".dim .{name}": rules for name, rules in DIMMED.items()}
    return {
        selector: {key: COLOURS.get(value, value) for key, value in rules.items()}
        for selector, rules in found.items()
    }


def stylesheet(body: str) -> str:
    """The rules of those classes that a drawing uses, light first, then what is different in the dark."""
    used = {name for names in re.findall(r'class="([^"]*)"', body) for name in names.split()}
    light, dark = [], []
    for selector, rules in all_styles().items():
        if not set(re.findall(r"\.([\w-]+)", selector)) <= used:
            continue
        light.append(selector + rule({k: v if isinstance(v, str) else v[0] for k, v in rules.items()}))
        if pairs := {k: v[1] for k, v in rules.items() if not isinstance(v, str)}:
            dark.append(selector + rule(pairs))
    base = f"text{{font-family:{SANS};font-size:14px}}"
    media = "@media (prefers-color-scheme: dark){\n" + "\n".join(dark) + "\n}"
    return "\n".join([base, *light, media])


def rule(properties: dict[str, str]) -> str:
    """Properties in braces."""
    return "{" + ";".join(f"{key}:{value}" for key, value in properties.items()) + "}"


# ------------------------------------------------------------------------------------------ the draughtsman


def num(x: float) -> str:
    """A coordinate, with at most one digit behind the point."""
    return f"{round(x, 1) + 0:g}"


@dataclass(frozen=True)
class Box:
    """A rectangle, and the points of its sides where arrows meet it."""

    x: float
    y: float
    w: float
    h: float

    @property
    def cx(self) -> float:
        return self.x + self.w / 2

    @property
    def cy(self) -> float:
        return self.y + self.h / 2

    @property
    def right(self) -> float:
        return self.x + self.w

    @property
    def bottom(self) -> float:
        return self.y + self.h


class Drawing:
    """An SVG that grows part by part."""

    def __init__(self, name: str, height: float, title: str, desc: str):
        self.name, self.height, self.title, self.desc = name, height, title, desc
        self.parts: list[str] = []
        self.hatches: dict[str, str] = {}

    def add(self, tag: str, cls: str = "", **attributes: float | str) -> None:
        """One element; numbers are rounded, _ in names is -."""
        pairs = {"class": cls} if cls else {}
        pairs |= {k.replace("_", "-"): v if isinstance(v, str) else num(v) for k, v in attributes.items()}
        self.parts.append(f"<{tag} " + " ".join(f'{k}="{v}"' for k, v in pairs.items()) + "/>")

    @contextmanager
    def group(self, cls: str = "", **attributes: str) -> Iterator[None]:
        """What is drawn inside belongs together; without a class or attributes nothing is wrapped."""
        pairs = ({"class": cls} if cls else {}) | attributes
        if pairs:
            self.parts.append("<g " + " ".join(f'{k}="{v}"' for k, v in pairs.items()) + ">")
        yield
        if pairs:
            self.parts.append("</g>")

    def text(self, x: float, y: float, words: str, cls: str = "ink", anchor: str = "middle") -> None:
        """A line of text on the baseline y."""
        at = f'x="{num(x)}" y="{num(y)}"' + ("" if anchor == "start" else f' text-anchor="{anchor}"')
        if not {"ink", "muted", "on", "ontok", "aim-t", "tok-t", "vae-t"} & set(cls.split()):
            cls = f"ink {cls}"
        self.parts.append(f'<text class="{cls}" {at}>{escape(words)}</text>')

    def lines(self, x: float, y: float, *lines: str | tuple[str, str], anchor: str = "middle") -> None:
        """Lines of text 18 px apart; each is a string, or a pair (string, classes)."""
        for i, line in enumerate(lines):
            words, cls = (line, "ink s") if isinstance(line, str) else line
            self.text(x, y + 18 * i, words, cls, anchor)

    def label(self, box: Box, *lines: str | tuple[str, str], on: str = "ink") -> None:
        """Lines of text in the middle of a box."""
        pairs = [(line, on) if isinstance(line, str) else line for line in lines]
        self.lines(box.cx, box.cy - 9 * (len(pairs) - 1) + 5, *pairs)

    def rect(self, box: Box, cls: str, rx: float = 7) -> None:
        self.add("rect", cls, x=box.x, y=box.y, width=box.w, height=box.h, rx=rx)

    def data(self, box: Box, *lines: str | tuple[str, str]) -> Box:
        """A light box: tensors, files, settings."""
        self.rect(box, "data")
        self.label(box, *lines)
        return box

    def net(self, box: Box, kind: str, *lines: str | tuple[str, str], frozen: bool = False) -> Box:
        """A network: of stage 0 ("vae"), 1 ("tok"), 2 ("ar"), or "any" other, which is frozen."""
        rx = min(7, box.h / 4)
        if frozen:
            self.rect(box, f"{kind}-f", rx)
            self.hatches[kind] = (
                f'<pattern id="{self.name}-{kind}" width="7" height="7" patternUnits="userSpaceOnUse" '
                f'patternTransform="rotate(45)"><path class="{kind}-h" d="M0 0V7"/></pattern>'
            )
            self.add(
                "rect",
                "",
                x=box.x,
                y=box.y,
                width=box.w,
                height=box.h,
                rx=rx,
                fill=f"url(#{self.name}-{kind})",
            )
        else:
            self.rect(box, kind, rx)
        self.label(box, *lines, on="ink" if frozen else "on")
        return box

    def op(self, box: Box, kind: str, *lines: str | tuple[str, str]) -> Box:
        """Something that computes and learns nothing: pale, in the colour of its stage."""
        self.rect(box, f"{kind}-f")
        self.label(box, *lines)
        return box

    def aim(self, box: Box, *lines: str | tuple[str, str]) -> Box:
        """What is made small: a loss; or what comes from the clock."""
        self.rect(box, "aim")
        self.label(box, *lines)
        return box

    def arrow(
        self, *points: tuple[float, float], kind: str = "", head: bool = True, dash: bool = False
    ) -> None:
        """A line through points with rounded corners, and a head at the last."""
        pts = list(points)
        (ax, ay), (bx, by) = pts[-2:]
        far = math.hypot(bx - ax, by - ay) or 1
        ux, uy = (bx - ax) / far, (by - ay) / far
        if head:
            pts[-1] = (bx - 6 * ux, by - 6 * uy)
        d = f"M{num(pts[0][0])} {num(pts[0][1])}"
        for before, corner, after in zip(pts, pts[1:], pts[2:]):
            (px, py), (qx, qy) = toward(corner, before), toward(corner, after)
            d += f"L{num(px)} {num(py)}Q{num(corner[0])} {num(corner[1])} {num(qx)} {num(qy)}"
        d += f"L{num(pts[-1][0])} {num(pts[-1][1])}"
        tail = f"-{kind}" if kind else ""
        self.add("path", f"ln{tail}" + (" dash" if dash else ""), d=d)
        if head:
            corners = [(bx, by)] + [
                (bx - 9 * ux + s * 4.2 * -uy, by - 9 * uy + s * 4.2 * ux) for s in (1, -1)
            ]
            self.add("polygon", f"hd{tail}", points=" ".join(f"{num(x)},{num(y)}" for x, y in corners))

    def squares(self, x: float, y: float, count: int, side: float, cls: str = "pt", gap: float = 2.5) -> Box:
        """A row of equal squares: patches, or vectors that all mean the same."""
        for i in range(count):
            self.add("rect", cls, x=x + i * (side + gap), y=y, width=side, height=side, rx=2.5)
        return Box(x, y, count * (side + gap) - gap, side)

    def tokens(
        self,
        box: Box,
        count: int,
        kept: int | None = None,
        ids: tuple[int, ...] = (),
        gap: float = 2.5,
        of: int | None = None,
    ) -> Box:
        """A row of tokens in a box, coarse to fine; from `kept` on they are mask tokens.

        Shades are those of a row of `of` tokens, by default of this one.
        """
        w = (box.w - gap * (count - 1)) / count
        for i in range(count):
            one = Box(box.x + i * (w + gap), box.y, w, box.h)
            if kept is not None and i >= kept:
                inset = Box(one.x + 0.7, one.y + 0.7, one.w - 1.4, one.h - 1.4)
                self.rect(inset, "mk", 2.5)
                continue
            self.rect(one, f"k{round(i / max((of or count) - 1, 1) * (SHADES - 1))}", 2.5)
            if i < len(ids):
                self.text(one.cx, one.cy + 4.7, str(ids[i]), "ontok m")
        return box

    def mosaic(self, box: Box, cells: int, colours: list[str]) -> Box:
        """Small squares of given colours: latents, noise."""
        w, h = box.w / cells, box.h / cells
        with self.group("art"):
            for i in range(cells * cells):
                x, y = box.x + i % cells * w, box.y + i // cells * h
                self.add("rect", "", x=x, y=y, width=w + 0.3, height=h + 0.3, fill=colours[i % len(colours)])
        self.add("rect", "bare", x=box.x, y=box.y, width=box.w, height=box.h)
        return box

    def noise(self, box: Box, cells: int = 6, seed: int = 0) -> Box:
        """Grey noise."""
        grey = random.Random(seed)
        shades = [f"#{int(min(max(grey.gauss(140, 52), 20), 245)):02x}" for _ in range(cells * cells)]
        return self.mosaic(box, cells, [s + s[1:] * 2 for s in shades])

    def latents(self, box: Box, cells: int = 6, noisy: float = 0.0, seed: int = 1) -> Box:
        """A small, coarse picture in unreal colours, mixed with noise."""
        r = random.Random(seed)
        colours = []
        for i in range(cells * cells):
            u, v = (i % cells + 0.5) / cells, (i // cells + 0.5) / cells
            clean = latent_colour(u, v, r.random())
            g = int(min(max(r.gauss(140, 52), 20), 245))
            colours.append(between(clean, f"#{g:02x}{g:02x}{g:02x}", noisy))
        return self.mosaic(box, cells, colours)

    def picture(self, box: Box, detail: float = 2) -> Box:
        """A house in a meadow. Detail 0: the ground alone; 1: a blob as well; … 2: all of it."""
        with self.group("art"):
            for shape, colour, numbers in SCENE[detail]:
                self.add(shape, "", **placed(box, shape, numbers), fill=colour)
        self.add("rect", "pic", x=box.x, y=box.y, width=box.w, height=box.h, fill="none")
        return box

    def mark(self, x: float, y: float, letter: str) -> None:
        """A letter in a circle, to point at from a text."""
        self.add("circle", "aim", cx=x, cy=y, r=11)
        self.text(x, y + 5, letter, "aim-t b")

    def caption(self, box: Box, *lines: str | tuple[str, str], gap: float = 17) -> None:
        """Lines of text below a box."""
        self.lines(box.cx, box.bottom + gap, *lines)

    def render(self) -> str:
        """The whole file."""
        body = "\n".join(self.parts)
        frame = (
            f'<rect class="panel" x=".5" y=".5" width="{WIDTH - 1}" height="{num(self.height - 1)}" rx="14"/>'
        )
        hatches = "".join(self.hatches.values())
        defs = f"<defs>{hatches}</defs>\n" if hatches else ""
        height = num(self.height)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img" aria-labelledby="{self.name}-t {self.name}-d">\n'
            f'<title id="{self.name}-t">{escape(self.title)}</title>\n'
            f'<desc id="{self.name}-d">{escape(self.desc)}</desc>\n'
            f"<style>\n{stylesheet(hatches + frame + body)}\n</style>\n{defs}{frame}\n{body}\n</svg>\n"
        )


def toward(a: tuple[float, float], b: tuple[float, float], step: float = 8) -> tuple[float, float]:
    """The point a step from a to b, at most half of the way."""
    far = math.hypot(b[0] - a[0], b[1] - a[1]) or 1
    s = min(step, far / 2) / far
    return a[0] + (b[0] - a[0]) * s, a[1] + (b[1] - a[1]) * s


def latent_colour(u: float, v: float, chance: float) -> str:
    """What latents of the picture below might look like at a place."""
    if 0.2 < u < 0.8 and 0.3 < v < 0.8:
        return between("#d05a7a", "#b0406a", chance)
    return between("#7fb6c9", "#5fa0c0", chance) if v < 0.62 else between("#b9c46a", "#98b05a", chance)


SKY, MEADOW = ("rect", "#bfe0f7", (0, 0, 1, 0.62)), ("rect", "#8fc46a", (0, 0.62, 1, 0.38))
SCENE = {  # of a picture: (element, colour, numbers in sides of the picture)
    0: [("rect", "#c3dff0", (0, 0, 1, 0.62)), ("rect", "#9cc77e", (0, 0.62, 1, 0.38))],
    0.5: [SKY, MEADOW, ("ellipse", "#d3c4ad", (0.5, 0.58, 0.36, 0.3))],
    1: [
        SKY,
        MEADOW,
        ("ellipse", "#d9a58f", (0.5, 0.56, 0.31, 0.27)),
        ("ellipse", "#cf8372", (0.5, 0.55, 0.22, 0.2)),
    ],
    1.5: [
        SKY,
        MEADOW,
        ("ellipse", "#6fa868", (0.12, 0.5, 0.12, 0.19)),
        ("rect", "#e9e1d2", (0.29, 0.43, 0.44, 0.37)),
        ("polygon", "#c8453a", (0.23, 0.45, 0.51, 0.18, 0.79, 0.45)),
    ],
    2: [
        SKY,
        MEADOW,
        ("ellipse", "#fbd23c", (0.83, 0.17, 0.09, 0.09)),
        ("ellipse", "#4f9a4b", (0.12, 0.47, 0.11, 0.15)),
        ("rect", "#86603c", (0.1, 0.58, 0.045, 0.17)),
        ("rect", "#e9e1d2", (0.29, 0.43, 0.44, 0.37)),
        ("polygon", "#c8453a", (0.23, 0.45, 0.51, 0.18, 0.79, 0.45)),
        ("rect", "#86603c", (0.36, 0.57, 0.12, 0.23)),
        ("rect", "#7fb4dd", (0.56, 0.53, 0.11, 0.11)),
        ("ellipse", "#e0568f", (0.85, 0.8, 0.05, 0.05)),
        ("ellipse", "#fbd23c", (0.85, 0.8, 0.02, 0.02)),
    ],
}


def placed(box: Box, shape: str, numbers: tuple[float, ...]) -> dict[str, float | str]:
    """Attributes of a shape of a scene, at its place in a box."""
    if shape == "polygon":
        pairs = zip(numbers[::2], numbers[1::2])
        return {"points": " ".join(f"{num(box.x + x * box.w)},{num(box.y + y * box.h)}" for x, y in pairs)}
    x, y, w, h = numbers
    at = (box.x + x * box.w, box.y + y * box.h, w * box.w, h * box.h)
    return dict(zip(("x", "y", "width", "height") if shape == "rect" else ("cx", "cy", "rx", "ry"), at))


# ----------------------------------------------------------------------------------------------- the whole

IDS = (712, 64, 903, 5, 341, 88, 620, 17)
VARIANTS = {  # name: (what this lesson builds, parts that are lit, what stands beside them)
    "": ("", "", ""),
    "scenes": ("pictures with known answers", "image", "answers"),
    "features": ("extractors that do not learn with us", "image back", "extractor"),
    "vae": ("stage 0, pictures to latents and back", "image vae latents vae-out out back", ""),
    "fsq": ("finite scalar quantisation", "registers fsq codes ids", ""),
    "transformer": ("the blocks of all three transformers", "encoder decoder ar", ""),
    "registers": ("the tokens, their order, and dropping them", "learned registers ids kept", ""),
    "flow": ("from noise to latents, step by step", "noise time velocity loop out", ""),
    "networks": (
        "encoder and decoder",
        "patches learned encoder registers kept noise time decoder velocity",
        "",
    ),
    "tokenizer": (
        "VAE, encoder, FSQ and flow decoder in one class",
        "image vae vae-out back latents patches learned encoder registers fsq codes ids kept noise time "
        "decoder velocity loop out",
        "",
    ),
    "objective": (
        "what the tokenizer learns from",
        "latents patches learned encoder registers fsq codes kept noise time decoder loss",
        "loss",
    ),
    "ar": ("a model that writes new ids", "class ar pick ids", ""),
    "released": (
        "the paper's weights in these boxes",
        "vae vae-out learned encoder fsq kept time decoder",
        "",
    ),
}
WHOLE = (
    "An image goes through the VAE encoder to latents, cut into patches. With learned registers they "
    "enter the encoder; a linear head maps its registers from d numbers to l, FSQ rounds them to codes, and "
    "those are ids. The first ids that a budget keeps, with mask tokens for the rest, condition a flow "
    "decoder that turns noise into latents, in Euler steps from time 1 to 0; the VAE decoder makes an image "
    "of them. An autoregressive transformer writes new ids for a class or a text."
)


class Whole(Drawing):
    """The whole system, some parts lit and the others dimmed."""

    def __init__(self, name: str, lit: str, beside: str, height: float, title: str, desc: str):
        super().__init__(name, height, title, desc)
        self.lit, self.beside = set(lit.split()), beside

    def part(self, name: str):
        """A group: dimmed unless it is lit, or everything is."""
        return self.group("" if not self.lit or name in self.lit else "dim")


def whole(variant: str) -> Drawing:
    """The whole system; a variant lights up what one lesson builds."""
    here, lit, beside = VARIANTS[variant]
    name = f"whole_{variant}" if variant else "whole"
    title = "The whole of FlexTok" + (f", and where we are: {here}" if here else "")
    more = f" Lit here: {here}." if here else ""
    d = Whole(name, lit, beside, 532, title, WHOLE + more)
    d.text(24, 34, "The whole of FlexTok", "ink h", "start")
    if here:
        you_are_here(d, here)
    else:
        d.text(786, 34, "a picture as a short list of integers, and back", "muted", "end")
    whole_encode(d)
    whole_ids(d)
    whole_decode(d)
    whole_beside(d)
    whole_legend(d)
    return d


def you_are_here(d: Drawing, here: str) -> None:
    """A pill at the top: what this lesson builds."""
    words = f"you are here: {here}"
    w = 7.9 * len(words) + 26
    d.rect(Box(786 - w, 15, w, 28), "aim", 14)
    d.text(786 - w / 2, 34, words, "aim-t")


def whole_encode(d: Whole) -> None:
    """First row: image to codes."""
    y = 131
    with d.part("image"):
        image = d.picture(Box(28, y - 38, 76, 76))
        d.caption(image, ("image", "ink"), ("(b 3 H W)", "muted m"))
    with d.part("vae"):
        vae = d.net(Box(126, y - 30, 76, 60), "vae", "VAE", "encoder")
        d.arrow((106, y), (vae.x - 2, y))
    with d.part("latents"):
        latents = d.latents(Box(228, y - 28, 56, 56))
        d.arrow((vae.right + 2, y), (latents.x - 2, y))
        d.caption(latents, ("latents", "ink"), ("(b c h w)", "muted m"))
    with d.part("patches"):
        patches = d.squares(318, 90, 6, 12)
        d.text(patches.cx, 82, "patches", "ink")
        d.text(patches.cx, 119, "(b n d)", "muted m")
        d.arrow((latents.right + 2, y - 12), (298, y - 12), (298, 96), (patches.x - 3, 96))
    with d.part("learned"):
        learned = d.squares(316, 159, 8, 9.5, "k4")
        d.text(learned.cx, 150, "learned registers", "ink s")
        d.text(learned.cx, 187, "(b k d)", "muted m")
    with d.part("encoder"):
        encoder = d.net(Box(432, 84, 70, 92), "tok", "encoder")
        d.arrow((patches.right + 3, 96), (encoder.x - 2, 96))
        d.arrow((learned.right + 3, 164), (encoder.x - 2, 164))
        head = d.net(Box(521, y - 22, 12, 44), "tok")
        d.arrow((encoder.right + 2, y), (head.x - 2, y))
        d.text(head.cx, y - 30, "head", "ink s")
        d.text(head.cx, y + 38, "d → l", "muted m")
    with d.part("registers"):
        registers = d.tokens(Box(555, y - 6, 64, 12), 8, gap=2)
        d.arrow((head.right + 2, y), (registers.x - 3, y))
        d.caption(registers, ("registers", "ink"), ("(b k l)", "muted m"), gap=20)
    with d.part("fsq"):
        fsq = d.op(Box(638, y - 22, 52, 44), "tok", "FSQ")
        d.arrow((registers.right + 3, y), (fsq.x - 2, y))
    with d.part("codes"):
        codes = d.tokens(Box(712, y - 6, 74, 12), 8, gap=2)
        d.arrow((fsq.right + 2, y), (codes.x - 3, y))
        d.text(codes.cx, y - 34, "codes", "ink")
        d.text(codes.cx, y - 16, "(b k l)", "muted m")
        d.arrow((750, y + 8), (750, 238))


def whole_ids(d: Whole) -> None:
    """Second row: the AR model writes the same ids that FSQ gives."""
    y = 254
    with d.part("ids"):
        ids = d.tokens(Box(482, y - 14, 304, 28), 8, ids=IDS)
        d.text(482, y - 24, "ids", "ink b", "start")
        d.text(508, y - 24, "(b k)", "muted m", "start")
        d.text(482, y + 32, "coarse", "muted s", "start")
        d.text(786, y + 32, "fine", "muted s", "end")
        d.arrow((534, y + 28), (752, y + 28))
    with d.part("class"):
        given = d.data(Box(142, y - 24, 92, 48), "class", "or text")
    with d.part("ar"):
        ar = d.net(Box(258, y - 28, 106, 56), "ar", "AR", "transformer")
        d.arrow((given.right + 2, y), (ar.x - 2, y))
    with d.part("pick"):
        pick = d.data(Box(388, y - 24, 70, 48), ("pick", "ink s"), ("a token", "ink s"))
        d.arrow((ar.right + 2, y), (pick.x - 2, y))
        d.arrow((pick.right + 2, y), (479, y))
        d.arrow((pick.cx, y + 26), (pick.cx, y + 44), (311, y + 44), (311, y + 30))


def whole_decode(d: Whole) -> None:
    """Third row, from right to left: ids that are kept, noise, the flow decoder, an image."""
    y = 408
    with d.part("kept"):
        kept = d.tokens(Box(626, 361, 160, 17), 8, kept=3)
        d.arrow((640, 271), (640, 358), dash=True)
        d.text(786, 351, "keep the budget", "ink s", "end")
        d.text(786, 395, "kept + mask tokens", "ink s", "end")
    with d.part("noise"):
        noise = d.noise(Box(626, 415, 48, 48))
        d.text(686, 436, "noise", "ink", "start")
        d.text(686, 454, "(b c h w)", "muted m", "start")
    with d.part("decoder"):
        decoder = d.net(Box(452, y - 46, 96, 92), "tok", "flow", "decoder")
        d.arrow((kept.x - 3, 370), (decoder.right + 2, 370))
        d.arrow((noise.x - 3, 440), (decoder.right + 2, 440))
    with d.part("time"):
        time = d.data(Box(466, 472, 68, 26), ("time t", "ink s"))
        d.arrow((time.cx, time.y - 2), (time.cx, decoder.bottom + 2))
    with d.part("out"):
        out = d.latents(Box(300, y - 28, 56, 56))
        d.caption(out, ("latents", "ink"), ("(b c h w)", "muted m"))
    with d.part("velocity"):
        d.arrow((decoder.x - 2, y), (out.right + 2, y))
        d.text(404, y + 22, "velocity", "ink s")
    with d.part("vae-out"):
        vae = d.net(Box(164, y - 30, 76, 60), "vae", "VAE", "decoder")
        d.arrow((out.x - 2, y), (vae.right + 2, y))
        d.arrow((vae.x - 2, y), (107, y))
    with d.part("back"):
        image = d.picture(Box(28, y - 38, 76, 76))
        d.caption(image, ("image", "ink"), ("(b 3 H W)", "muted m"))
    if d.beside != "loss":
        with d.part("loop"):
            d.arrow((404, y - 3), (404, 334), (500, 334), (500, decoder.y - 2))
            d.lines(436, 309, "Euler step, t from 1 to 0:", "x ← x − dt · velocity", anchor="start")


def whole_beside(d: Whole) -> None:
    """What a lesson adds beside the figure."""
    box = Box(24, 232, 84, 46)
    if d.beside == "extractor":
        d.net(Box(18, 232, 96, 56), "any", "feature", "extractor", frozen=True)
        d.arrow((66, 207), (66, 230))
        d.arrow((66, 367), (66, 290))
    elif d.beside == "metrics":
        d.aim(box, ("metrics", "aim-t b"))
        d.arrow((66, 207), (66, box.y - 2))
        d.arrow((66, 367), (66, box.bottom + 2))
    elif d.beside == "answers":
        d.data(
            Box(18, 232, 100, 64), ("kind, colour,", "ink s"), ("place, light,", "ink s"), ("pose", "ink s")
        )
        d.arrow((66, 230), (66, 209))
        d.text(68, 314, "known answers", "muted s")
    elif d.beside == "loss":
        d.aim(Box(296, 310, 320, 30), ("flow loss: velocity against noise − latents", "aim-t s"))
        d.arrow((500, 360), (500, 342), kind="aim")
        d.text(786, 486, "x_t = t · noise + (1 − t) · latents", "ink s", "end")


def whole_legend(d: Drawing) -> None:
    """What colours and the dashed arrow mean."""
    y = 508
    x = 24
    for cls, words, step in (
        ("vae", "stage 0: VAE", 114),
        ("tok", "stage 1: tokenizer", 146),
        ("ar", "stage 2: AR model", 153),
    ):
        d.rect(Box(x, y, 14, 14), cls, 3)
        d.text(x + 21, y + 12, words, "muted s", "start")
        x += step
    d.tokens(Box(x, y, 30, 14), 2)
    d.text(x + 37, y + 12, "token", "muted s", "start")
    d.tokens(Box(x + 86, y, 14, 14), 1, kept=0)
    d.text(x + 107, y + 12, "mask token", "muted s", "start")
    d.arrow((x + 193, y + 7), (x + 225, y + 7), dash=True)
    d.text(x + 232, y + 12, "cut to a budget", "muted s", "start")


# ------------------------------------------------------------------------------------- encoder, decoder block


def encoder_mask() -> Drawing:
    """The encoder's sequence and what each position attends to."""
    d = Drawing(
        "encoder_mask",
        452,
        "The encoder's sequence and its attention mask",
        "Left: patches and learned registers form one sequence; a patch attends to all patches and to no "
        "register, register i attends to all patches and to the registers up to i. Right: the same as a "
        "matrix, rows are queries, columns are keys, filled where a row attends to a column.",
    )
    d.text(24, 34, "What each position attends to in the encoder", "ink h", "start")
    sequence_in(d)
    for letter, y, row, words in (
        ("A", 178, 2, "a patch: all patches, no register"),
        ("B", 238, 6, "register 1: all patches, itself"),
        ("C", 298, 9, "register 4: all patches, registers 1 to 4"),
    ):
        d.mark(66, y + 20, letter)
        d.text(92, y, words, "ink s", "start")
        mask_row(d, Box(92, y + 10, 20, 20), row)
    d.arrow((311, 336), (311, 360))
    d.tokens(Box(244, 366, 135, 20), 6)
    d.text(230, 381, "registers go on: head, FSQ", "ink s", "end")
    words = "So the first registers are the same however many follow: a smaller budget begins the same list."
    d.text(24, 428, words, "muted", "start")
    mask_matrix(d, Box(494, 108, 20, 20))
    return d


def sequence_in(d: Drawing) -> None:
    """Patches of the latents, and learned registers, as one sequence."""
    latents = d.latents(Box(24, 80, 44, 44))
    patches = d.squares(92, 92, 6, 20, gap=3)
    d.squares(244, 92, 6, 20, "k4", gap=3)
    d.arrow((latents.right + 2, 102), (patches.x - 3, 102))
    d.text(patches.cx, 82, "n patches", "ink s")
    d.text(311, 82, "k registers, learned", "ink s")
    d.text(patches.cx, 130, "(b n d)", "muted m")
    d.text(311, 130, "(b k d)", "muted m")
    d.text(48, 143, "latents", "ink s")


def attends(row: int, column: int, n: int = 6) -> bool:
    """Patches attend to patches; registers to patches, and to registers up to themselves."""
    return column < n if row < n else column <= row


def mask_row(d: Drawing, first: Box, row: int, n: int = 6) -> None:
    """Keys of one query: filled where it attends."""
    for j in range(2 * n):
        x = first.x + j * (first.w + 3) + (14 if j >= n else 0)
        key = "pt" if j < n else f"k{round((j - n) * (SHADES - 1) / (n - 1))}"
        d.rect(Box(x, first.y, first.w, first.h), key if attends(row, j, n) else "void", 2.5)


def mask_matrix(d: Drawing, first: Box, n: int = 6) -> None:
    """The same for all queries, with headings."""
    step, side = first.w + 2, first.w
    edge = first.x + 2 * n * step - 2
    for i in range(2 * n):
        at = i * step + (4 if i >= n else 0)
        key = "pt" if i < n else f"k{round((i - n) * (SHADES - 1) / (n - 1))}"
        for head in (
            Box(first.x + at, first.y - step - 6, side, side),
            Box(first.x - step - 6, first.y + at, side, side),
        ):
            d.rect(head, key, 2.5)
            if i >= n:
                d.text(head.cx, head.cy + 5, str(i - n + 1), "ontok m")
        for j in range(2 * n):
            x = first.x + j * step + (4 if j >= n else 0)
            column = "pt" if j < n else f"k{round((j - n) * (SHADES - 1) / (n - 1))}"
            d.rect(Box(x, first.y + at, side, side), column if attends(i, j, n) else "void", 2.5)
    for letter, i in (("A", 2), ("B", 6), ("C", 9)):
        at = i * step + (4 if i >= n else 0)
        d.rect(Box(first.x - 3, first.y + at - 3, edge - first.x + 10, side + 6), "frame", 5)
        d.mark(edge + 24, first.y + at + side / 2, letter)
    d.text(first.x + 3 * step, first.y - 40, "keys: patches", "ink s")
    d.text(first.x + 9 * step + 4, first.y - 40, "registers", "ink s")
    d.text(first.x - 36, first.y + 3 * step - 14, "queries:", "ink s", "end")
    d.text(first.x - 36, first.y + 3 * step + 4, "patches", "ink s", "end")
    d.text(first.x - 36, first.y + 9 * step + 9, "registers", "ink s", "end")


def decoder_block() -> Drawing:
    """One adaLN-zero block, and where its modulations come from."""
    d = Drawing(
        "decoder_block",
        548,
        "One block of the flow decoder",
        "The sequence of patches and registers is normalised, scaled and shifted, goes through attention, "
        "is multiplied by a gate and added back; then the same with a SwiGLU MLP. Shifts, scales and "
        "gates come from the time t: a sinusoid of 256 numbers, an MLP, and a linear layer that starts at "
        "zero and gives six vectors for patches and six others for registers. Of parameters, attention has 4 "
        "d², the MLP 3 times 8/3 d² = 8 d², the linear layer of the modulations 12 d².",
    )
    d.text(24, 34, "One block of the flow decoder (adaLN-zero)", "ink h", "start")
    d.text(786, 34, "4 d², 8 d², 12 d²: parameters of this block", "muted s", "end")
    x = d.data(Box(24, 106, 88, 52), "x", ("(b n+k d)", "muted m"))
    half_block(d, 132, x.right, "1", "attention", "4 d²")
    d.arrow((621, 132), (650, 132), (650, 198), (60, 198), (60, 272), (137, 272))
    half_block(d, 272, None, "2", "SwiGLU MLP", "3 × 8/3 d² = 8 d²")
    y = d.data(Box(674, 246, 88, 52), "x", ("(b n+k d)", "muted m"))
    d.arrow((621, 272), (y.x - 2, 272))
    d.squares(672, 98, 1, 12)
    d.text(692, 109, "for patches", "ink s", "start")
    d.squares(672, 120, 1, 12, "k4")
    d.text(692, 131, "for registers", "ink s", "start")
    d.text(672, 154, "each a set of", "muted s", "start")
    d.text(672, 172, "their own", "muted s", "start")
    clockwork(d)
    return d


def half_block(d: Drawing, y: float, start: float | None, digit: str, *inside: str) -> None:
    """Norm, scale and shift, a network, gate, and the way around it."""
    norm = d.op(Box(139, y - 24, 56, 48), "tok", "norm")
    if start is not None:
        d.arrow((start + 2, y), (norm.x - 2, y))
    shift = d.aim(
        Box(215, y - 32, 120, 64), (f"× (1 + scale{digit})", "aim-t s"), (f"+ shift{digit}", "aim-t s")
    )
    name, parameters = inside
    net = d.net(Box(355, y - 30, 130, 60), "tok", name, (parameters, "on s"))
    gate = d.aim(Box(505, y - 26, 74, 52), (f"× gate{digit}", "aim-t s"))
    for box in (shift, gate):
        d.squares(box.right - 34, box.bottom - 6, 1, 12)
        d.squares(box.right - 18, box.bottom - 6, 1, 12, "k4")
    for a, b in ((norm, shift), (shift, net), (net, gate)):
        d.arrow((a.right + 2, y), (b.x - 2, y))
    d.arrow((gate.right + 2, y), (594, y))
    d.add("circle", "data", cx=607, cy=y, r=12)
    d.text(607, y + 6, "+", "ink sign")
    d.arrow((124, y), (124, y - 50), (607, y - 50), (607, y - 14))
    d.text(365, y - 57, "unchanged", "muted s")


def clockwork(d: Drawing) -> None:
    """From the time to twelve vectors."""
    y = 436
    d.text(24, 360, "Where the modulations come from", "ink b", "start")
    t = d.data(Box(24, y - 26, 60, 52), "t", ("(b,)", "muted m"))
    wave = d.op(Box(108, y - 26, 92, 52), "tok", "sinusoid", ("256", "muted m"))
    mlp = d.net(Box(224, y - 26, 64, 52), "tok", "MLP")
    last = d.net(Box(312, y - 35, 96, 70), "tok", "SiLU", "Linear", ("12 d²", "on s"))
    for a, b in ((t, wave), (wave, mlp), (mlp, last)):
        d.arrow((a.right + 2, y), (b.x - 2, y))
    d.caption(mlp, ("(b d)", "muted m"))
    d.caption(last, ("starts at zero", "muted s"))
    d.arrow((last.right + 2, y), (438, y))
    for j, name in enumerate(("gate1", "gate2", "shift1", "scale1", "shift2", "scale2")):
        x = 512 + 46 * j
        d.text(x + 21, y - 38, name, "aim-t s")
        for row, cls in ((0, "pt"), (1, "k4")):
            cell = Box(x, y - 28 + 30 * row, 42, 26)
            d.rect(cell, cls, 4)
            d.text(cell.cx, cell.cy + 4.5, "d", "ontok m" if row else "ink m")
    d.text(502, y - 10, "patches", "ink s", "end")
    d.text(502, y + 20, "registers", "ink s", "end")
    d.text(649, y + 52, "modulations (b 2 6 d)", "muted m")
    words = "At the start all gates are 0: the block passes x on as it is. The modulations depend on t alone."
    d.text(24, 526, words, "muted", "start")


# --------------------------------------------------------------------------------- stages, nested dropout


def three_stages() -> Drawing:
    """What each stage trains, keeps frozen, makes small, and hands on."""
    d = Drawing(
        "three_stages",
        610,
        "Three stages, trained one after the other",
        "Stage 0 trains the VAE on pixel, perceptual, KL and adversarial losses. Frozen, it turns all "
        "images into cached latents. Stage 1 trains encoder and flow decoder, with FSQ between them, on "
        "the flow loss. Frozen, the encoder turns the latents into cached ids. Stage 2 trains the "
        "autoregressive model to predict the next id.",
    )
    d.text(24, 34, "Three stages, one after the other", "ink h", "start")
    d.arrow((406, 29), (440, 29), dash=True)
    d.text(447, 34, "same weights", "muted s", "start")
    legend = Box(566, 21, 16, 16)
    d.rect(legend, "tok", 3)
    d.text(589, 34, "trained", "muted s", "start")
    d.net(Box(652, 21, 16, 16), "tok", frozen=True)
    d.text(675, 34, "frozen", "muted s", "start")
    d.rect(Box(734, 21, 16, 16), "aim", 3)
    d.text(757, 34, "loss", "muted s", "start")
    stage_vae(d, 52)
    stage_tokenizer(d, 252)
    stage_ar(d, 452)
    hand_on(d, 204, "all images", "VAE encoder", "vae", 198)
    hand_on(d, 404, "all latents", "encoder, FSQ", "tok", 230)
    return d


def stage(d: Drawing, y: float, kind: str, words: str, *losses: str) -> None:
    """The ground of one stage, with its objective."""
    d.rect(Box(24, y, 762, 140), "band", 12)
    d.rect(Box(24, y + 16, 6, 108), kind, 3)
    d.text(106, y + 27, words, "ink b", "start")
    d.aim(
        Box(556, y + 84 - 14 - 10 * len(losses), 214, 24 + 20 * len(losses)),
        *((w, "aim-t s") for w in losses),
    )


def stage_vae(d: Drawing, top: float) -> None:
    """Stage 0."""
    stage(d, top, "vae", "Stage 0: VAE", "pixel error + perceptual", "+ KL + adversarial")
    y = top + 84
    image = d.picture(Box(48, y - 32, 64, 64))
    encoder = d.net(Box(150, y - 28, 84, 56), "vae", "VAE", "encoder")
    latents = d.latents(Box(272, y - 24, 48, 48))
    decoder = d.net(Box(358, y - 28, 84, 56), "vae", "VAE", "decoder")
    back = d.picture(Box(466, y - 32, 64, 64))
    for a, b in ((image, encoder), (encoder, latents), (latents, decoder), (decoder, back)):
        d.arrow((a.right + 2, y), (b.x - 2, y))
    d.caption(latents, ("latents", "ink s"))
    d.arrow((back.right + 2, y), (554, y), kind="aim")
    d.text(663, y + 47, "explained in the lesson vae", "muted s")


def stage_tokenizer(d: Drawing, top: float) -> None:
    """Stage 1."""
    words = ("flow loss: velocity", "against noise − latents", "at a random budget")
    stage(d, top, "tok", "Stage 1: tokenizer", *words)
    y = top + 84
    cache = store(d, Box(44, y - 33, 92, 66), "latents", "(N c h w)")
    encoder = d.net(Box(160, y - 28, 74, 56), "tok", "encoder")
    fsq = d.op(Box(258, y - 20, 46, 40), "tok", "FSQ")
    kept = d.tokens(Box(328, y - 7, 86, 14), 6, kept=3)
    decoder = d.net(Box(440, y - 28, 84, 56), "tok", "flow", "decoder")
    for a, b in ((cache, encoder), (encoder, fsq), (fsq, kept), (kept, decoder)):
        d.arrow((a.right + 2, y), (b.x - 2, y))
    noise = d.noise(Box(355, y + 14, 32, 32))
    d.text(347, y + 36, "noise, t", "ink s", "end")
    d.arrow((noise.right + 2, y + 30), (416, y + 30), (416, y + 20), (decoder.x - 2, y + 20))
    d.arrow((decoder.right + 2, y), (554, y), kind="aim")


def stage_ar(d: Drawing, top: float) -> None:
    """Stage 2."""
    stage(
        d,
        top,
        "ar",
        "Stage 2: AR model",
        "cross-entropy:",
        "the next id, given the class",
        "and the ids before it",
    )
    y = top + 84
    cache = store(d, Box(44, y - 33, 92, 66), "ids, class", "(N k)")
    shown = d.tokens(Box(166, y - 10, 104, 20), 6)
    model = d.net(Box(300, y - 28, 100, 56), "ar", "AR", "transformer")
    logits = d.data(Box(430, y - 26, 94, 52), "logits", ("(b k v)", "muted m"))
    for a, b in ((cache, shown), (shown, model), (model, logits)):
        d.arrow((a.right + 2, y), (b.x - 2, y))
    d.arrow((logits.right + 2, y), (554, y), kind="aim")


def store(d: Drawing, box: Box, words: str, shape: str, cls: str = "muted m") -> Box:
    """A cache: what was computed once and is kept."""
    x, y, w, h = num(box.x), box.y, box.right, box.bottom
    r = f"{num(box.w / 2)} 7 0 0"
    side = f"M{x} {num(y + 7)}V{num(h - 7)}A{r} 0 {num(w)} {num(h - 7)}V{num(y + 7)}"
    d.add("path", "data", d=side)
    d.add("ellipse", "data", cx=box.cx, cy=y + 7, rx=box.w / 2, ry=7)
    d.lines(box.cx, box.cy + 5, (words, "ink s"), (shape, cls))
    return box


def hand_on(d: Drawing, y: float, source: str, network: str, kind: str, trained_x: float) -> None:
    """Between two stages: what was just trained is frozen, and fills a cache."""
    net = d.net(Box(150, y, 168, 36), kind, f"{network}, frozen", frozen=True)
    d.text(346, y + 23, source, "ink s", "start")
    d.arrow((340, y + 18), (net.right + 2, y + 18))
    d.arrow((net.x - 2, y + 18), (90, y + 18), (90, y + 97))
    d.text(440, y + 23, "once, into a cache", "muted s", "start")
    d.arrow((trained_x, y - 36 + 2), (trained_x, y - 2), dash=True)


def cut_list() -> Drawing:
    """Nested dropout: one list, cut to any length."""
    d = Drawing(
        "cut_list",
        486,
        "One list of 32 ids, cut to 1, 4 and 32",
        "A list of 32 ids, coarse to fine. Kept are the first 1, 4 or all 32, the rest are mask tokens. "
        "The same flow decoder draws a picture of each: with one id the colours of sky and ground, with "
        "four a blob where the house stands, with all the house, tree, sun and flower.",
    )
    d.text(24, 34, "One list, cut anywhere", "ink h", "start")
    d.tokens(Box(24, 64, 762, 24), 32, gap=3)
    d.text(24, 108, "coarse", "muted s", "start")
    d.text(786, 108, "fine", "muted s", "end")
    d.text(405, 108, "32 ids (1 k)", "muted m")
    decoder = d.net(Box(556, 132, 92, 300), "tok", "flow", "decoder")
    for row, budget in enumerate((1, 4, 32)):
        y = 178 + 104 * row
        d.tokens(Box(92, y - 8, 424, 16), 32, kept=budget, gap=2)
        d.text(24, y - 4, "budget", "muted s", "start")
        d.text(46, y + 18, str(budget), "ink h")
        rest = "no mask token" if budget == 32 else f"{32 - budget} mask tokens, all the same"
        d.text(92, y + 30, f"{budget} kept, {rest}", "muted s", "start")
        picture = d.picture(Box(694, y - 46, 92, 92), row)
        d.arrow((520, y), (decoder.x - 2, y))
        d.arrow((decoder.right + 2, y), (picture.x - 3, y))
    words = "Training draws the budget at random, so what matters most must sit in front."
    d.text(24, 464, words, "muted", "start")
    d.text(786, 464, "(pictures: sketches)", "muted s", "end")
    return d


# ------------------------------------------------------------------------------------------ scenes, VAE, FSQ


def scenes() -> Drawing:
    """Attributes to a picture, and what is known of it."""
    d = Drawing(
        "scenes",
        372,
        "A scene: drawn from its answers",
        "Attributes are drawn at random: kind, colour, place, light, pose. A renderer paints them; they "
        "are kept as labels and caption. A classifier that reads a picture, an original or a decoded one, "
        "can be held against them.",
    )
    d.text(24, 34, "A scene is painted from its answers", "ink h", "start")
    d.text(96, 70, "attributes, at random", "ink s")
    rows = (
        ("kind", "house"),
        ("colour", "red"),
        ("place", "meadow"),
        ("light", "day"),
        ("pose", "x, y, size, angle"),
    )
    for i, (name, value) in enumerate(rows):
        y = 82 + 38 * i
        box = Box(82, y, 132, 30)
        d.rect(box, "data")
        d.text(72, y + 20, name, "muted s", "end")
        d.text(box.cx, y + 20, value, "ink s")
        d.arrow((box.right + 2, y + 15), (234, y + 15), head=False)
    d.arrow((234, 97), (234, 249), head=False)
    render = d.op(Box(268, 136, 92, 56), "any", "draw", ("no network", "muted s"))
    d.arrow((234, 164), (render.x - 2, 164))
    picture = d.picture(Box(396, 98, 132, 132))
    d.arrow((render.right + 2, 164), (picture.x - 3, 164))
    d.caption(picture, ("image (c h w)", "muted m"))
    reader = d.net(Box(566, 136, 92, 56), "any", "attribute", "classifier", frozen=True)
    d.arrow((picture.right + 3, 164), (reader.x - 2, 164))
    seen = d.data(Box(686, 130, 100, 68), ("house?", "ink s"), ("red?", "ink s"), ("meadow? …", "ink s"))
    d.arrow((reader.right + 2, 164), (seen.x - 2, 164))
    known = d.data(
        Box(268, 286, 366, 58),
        ("labels: kind, colour, place, light", "ink s"),
        ("“a red house in a meadow by day”", "ink s"),
    )
    d.arrow((148, 268), (148, 315), (known.x - 2, 315))
    d.text(140, 338, "the known answers", "muted s")
    right = d.aim(Box(686, 294, 100, 42), ("read right?", "aim-t s"))
    d.arrow((known.right + 2, 315), (right.x - 2, 315))
    d.arrow((736, 200), (736, 292))
    return d


def vae() -> Drawing:
    """Stage 0 with its losses."""
    d = Drawing(
        "vae",
        426,
        "The VAE and its four losses",
        "An image goes through the encoder to mean and log-variance of the latents; a sample of them goes "
        "through the decoder to an image. Four losses: pixel error and perceptual distance between the "
        "two images, KL at mean and log-variance, and an adversarial loss by a critic applied to the "
        "output.",
    )
    d.text(24, 34, "Stage 0: the VAE and its four losses", "ink h", "start")
    y = 142
    image = d.picture(Box(28, y - 38, 76, 76))
    encoder = d.net(Box(128, y - 30, 76, 60), "vae", "VAE", "encoder")
    mean, spread = d.latents(Box(238, 78, 48, 48)), d.latents(Box(238, 164, 48, 48), seed=5, noisy=0.75)
    d.caption(mean, ("mean", "ink s"))
    d.caption(spread, ("log-variance", "ink s"))
    sample = d.op(Box(322, y - 24, 80, 48), "vae", "sample")
    noise = d.noise(Box(342, 196, 40, 40))
    latents = d.latents(Box(428, y - 26, 52, 52))
    decoder = d.net(Box(506, y - 30, 76, 60), "vae", "VAE", "decoder")
    output = d.picture(Box(606, y - 38, 76, 76))
    critic = d.net(Box(706, y - 26, 80, 52), "vae", "critic")
    for a, b in (
        (image, encoder),
        (sample, latents),
        (latents, decoder),
        (decoder, output),
        (output, critic),
    ):
        d.arrow((a.right + 2, y), (b.x - 2, y))
    for box, bend, at in ((mean, -6, 102), (spread, 6, 188)):
        d.arrow((encoder.right + 2, y + bend), (220, y + bend), (220, at), (box.x - 2, at))
        d.arrow((box.right + 2, at), (305, at), (305, y + bend), (sample.x - 2, y + bend))
    d.arrow((sample.cx, noise.y - 2), (sample.cx, sample.bottom + 2))
    d.text(noise.right + 8, 221, "noise", "ink s", "start")
    d.caption(image, ("image", "ink"), ("(b 3 H W)", "muted m"))
    d.caption(latents, ("latents", "ink"), ("(b c h w)", "muted m"))
    d.caption(output, ("image", "ink"), ("(b 3 H W)", "muted m"))
    vae_losses(d, critic)
    words = "Tokenizing takes the mean. Latents are normalised: mean and scale of each channel are measured."
    d.text(24, 404, words, "muted", "start")
    return d


def vae_losses(d: Drawing, critic: Box) -> None:
    """Where each of the four losses is attached."""
    d.aim(Box(200, 250, 124, 30), ("KL to N(0, 1)", "aim-t s"))
    d.arrow((262, 235), (262, 248), kind="aim")
    d.aim(Box(698, 210, 96, 30), ("adversarial", "aim-t s"))
    d.arrow((critic.cx, critic.bottom + 2), (critic.cx, 208), kind="aim")
    d.rect(Box(24, 296, 662, 78), "band", 10)
    d.aim(Box(118, 317, 116, 36), ("pixel error", "aim-t s"))
    eyes = d.net(Box(286, 311, 150, 48), "any", "feature extractor,", "frozen", frozen=True)
    far = d.aim(Box(464, 317, 162, 36), ("perceptual distance", "aim-t s"))
    d.arrow((eyes.right + 2, 335), (far.x - 2, 335), kind="aim")
    d.arrow((66, 224), (66, 294))
    d.arrow((644, 224), (644, 294))


def fsq() -> Drawing:
    """A number to a level, and several levels to an id."""
    z, levels, digits = 0.9, (8, 5, 5), (6, 3, 1)
    bounded = math.tanh(z) * 2 * 1.001
    d = Drawing(
        "fsq",
        492,
        "Finite scalar quantisation",
        "Three number lines with five levels: a real number z is squashed by tanh into the range of the "
        "levels, rounded to one of them, and divided to lie in -1 to 1. Below: the digits of three "
        "dimensions with 8, 5 and 5 levels make one id in mixed base, the first dimension counting "
        "fastest.",
    )
    d.text(24, 34, "FSQ: bound, round, count", "ink h", "start")
    d.text(786, 34, "first one dimension with L = 5 levels", "muted", "end")
    zoom, cx = 62, 400
    for y, reach, name in ((92, 3, "a real number"), (164, 2, "bound"), (236, 2, "round")):
        d.text(24, y + 5, name, "ink b", "start")
        d.arrow((cx - (reach + 0.3) * zoom, y), (cx + (reach + 0.3) * zoom, y), head=False)
        for v in range(-reach, reach + 1):
            d.arrow((cx + v * zoom, y - 4), (cx + v * zoom, y + 4), head=False)
            if y < 236:
                d.text(cx + v * zoom, y - 11, str(v).replace("-", "−"), "muted s")
    spots = (cx + z * zoom, 92), (cx + bounded * zoom, 164), (cx + round(bounded) * zoom, 236)
    d.arrow((spots[0][0], 99), (spots[0][0], 124), (spots[1][0], 132), (spots[1][0], 155), dash=True)
    d.arrow((spots[1][0], 171), (spots[1][0], 196), (spots[2][0], 204), (spots[2][0], 223), dash=True)
    for x, y in spots[:2]:
        d.add("circle", "k0", cx=x, cy=y, r=6)
    for v in range(-2, 3):
        d.rect(Box(cx + v * zoom - 11, 225, 22, 22), f"k{0}" if v == round(bounded) else "level", 4)
    for y, words in (
        (92, f"z = {z:.1f}"),
        (164, f"tanh(z) · 2 = {bounded:.2f}"),
        (236, "code = 1 / 2 = 0.5"),
    ):
        d.text(786, y + 5, words, "ink s", "end")
    d.arrow((252, 224), (252, 178), kind="aim")
    d.text(242, 206, "gradient: straight through", "aim-t s", "end")
    d.text(24, 300, "Several dimensions, one id", "ink b", "start")
    fsq_count(d, levels, digits)
    d.text(24, 470, "Nothing is learned here, and every id exists by construction.", "muted", "start")
    return d


def fsq_count(d: Drawing, levels: tuple[int, ...], digits: tuple[int, ...]) -> None:
    """Digits of some dimensions, and the number that they make."""
    x, weight, total = 24.0, 1, 0
    for i, (size, digit) in enumerate(zip(levels, digits)):
        d.text(x, 330, f"{size} levels", "ink s", "start")
        for j in range(size):
            cell = Box(x + 24 * j, 342, 21, 24)
            d.rect(cell, "k0" if j == digit else "level", 4)
            d.text(cell.cx, 359, str(j), "ontok m" if j == digit else "muted m")
        middle = x + 12 * size - 1.5
        d.text(middle, 394, f"{digit} · {weight}", "ink")
        x += 24 * size + 34
        if i < len(levels) - 1:
            d.text(x - 19, 394, "+", "ink")
        total, weight = total + digit * weight, weight * size
    d.arrow((x - 26, 354), (x + 16, 354))
    d.text(x - 8, 394, "=", "ink")
    box = Box(x + 20, 340, 64, 28)
    d.rect(box, "k0", 4)
    d.text(box.cx, 359, str(total), "ontok m")
    d.text(box.cx, 394, str(total), "ink b")
    d.text(box.right + 12, 359, f"id, one of {weight}", "ink s", "start")
    d.text(
        24, 430, "digit = code · (L // 2) + L // 2; the first dimension counts fastest", "muted s", "start"
    )


# ------------------------------------------------------------------------------------------------------- flow


def flow_path() -> Drawing:
    """Straight lines from latents to noise, and one step back along one of them."""
    d = Drawing(
        "flow_path",
        424,
        "The path of a rectified flow",
        "Latents as clusters at the left (t = 0), noise as a round cloud at the right (t = 1), joined by "
        "straight lines. On one line the point x_t = t noise + (1 - t) latents, its velocity noise - "
        "latents, which points to the noise, and one Euler step, which goes against it. At the right the "
        "same for one picture's latents at five times.",
    )
    d.text(24, 34, "Straight lines between latents and noise", "ink h", "start")
    pairs = flow_pairs()
    for (ax, ay), (bx, by) in pairs[1:]:
        d.arrow((ax, ay), (bx, by), kind="faint", head=False)
    for a, b in pairs[1:]:
        d.add("circle", "vae-t", cx=a[0], cy=a[1], r=4)
        d.add("circle", "grey", cx=b[0], cy=b[1], r=4)
    flow_step(d, *pairs[0])
    d.arrow((70, 352), (470, 352))
    d.text(70, 374, "t = 0", "ink s")
    d.text(70, 392, "latents", "ink b")
    d.text(455, 374, "t = 1", "ink s")
    d.text(455, 392, "noise", "ink b")
    for i, t in enumerate((0, 0.25, 0.5, 0.75, 1)):
        box = d.latents(Box(530 + 52 * i, 84, 46, 46), noisy=t)
        d.text(box.cx, 148, f"{t:g}", "muted s")
    d.text(524, 148, "t", "muted s", "end")
    for y, head, words in (
        (188, "a point on the way", "x_t = t · noise + (1 − t) · latents"),
        (246, "its velocity, to be predicted", "noise − latents"),
        (304, "one Euler step, from t = 1 to 0", "x ← x − dt · velocity"),
    ):
        d.text(530, y, head, "muted s", "start")
        d.text(530, y + 20, words, "ink b s", "start")
    d.text(530, 362, "The lines cross; a network can only", "muted s", "start")
    d.text(530, 380, "learn their mean at each (x_t, t).", "muted s", "start")
    return d


def flow_pairs() -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """Pairs of a latent and a noise; the first is the one that is shown."""
    r = random.Random(3)
    found = [((92, 112), (436, 248))]
    for i in range(13):
        cx, cy = ((84, 118), (70, 282))[i % 2]
        a = (cx + r.gauss(0, 16), cy + r.gauss(0, 16))
        found.append((a, (435 + r.gauss(0, 24), 198 + r.gauss(0, 50))))
    return found


def flow_step(d: Drawing, a: tuple[float, float], b: tuple[float, float], t: float = 0.62) -> None:
    """One pair: its line, the point between, velocity and step."""
    d.arrow(a, b, head=False)
    d.add("circle", "vae-t", cx=a[0], cy=a[1], r=7)
    d.add("circle", "grey", cx=b[0], cy=b[1], r=7)
    x, y = a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])
    far = math.hypot(b[0] - a[0], b[1] - a[1])
    ux, uy = (b[0] - a[0]) / far, (b[1] - a[1]) / far
    side = 11  # the arrows run beside the line
    px, py = x - uy * side, y + ux * side
    d.arrow((px, py), (px + 92 * ux, py + 92 * uy), kind="aim")
    qx, qy = x + uy * side, y - ux * side
    d.arrow((qx, qy), (qx - 62 * ux, qy - 62 * uy), kind="tok")
    d.add("circle", "k0", cx=x, cy=y, r=8)
    for words, cls, tx, ty in (
        ("x_t", "ink b", x - 26, y + 18),
        ("velocity", "aim-t b", px + 40 * ux - 24, py + 40 * uy + 28),
        ("step", "tok-t b", qx - 26 * ux + 14, qy - 26 * uy - 14),
    ):
        w = 8.8 * len(words) + 8
        d.rect(Box(tx - w / 2, ty - 14, w, 19), "plate", 4)
        d.text(tx, ty, words, cls)


# ------------------------------------------------------------------------------------------------- short cuts


SHORT_K, SHORT_KEPT = 16, 3  # registers, and those kept, of the figure
BUDGETS = (4, 16, 1, 8, 2, 1, 8, 2)  # of a batch of eight samples


def short_cuts() -> Drawing:
    """The four equalities of the lesson."""
    d = Drawing(
        "short_cuts",
        972,
        "Four exact short cuts",
        "First: registers are causal, so the encoder's sequence holds the patches and the registers within "
        "the budget, and the rest is left out. Second: thirteen equal mask tokens are one mask token whose "
        "attention logit gets plus log 13, and k null tokens are one with plus log k. Third: modulations "
        "depend on time alone, so those of all steps come from one matrix product before the first step. "
        "Fourth: in training the samples of a batch are sorted by budget and cut into micro-batches, each "
        "only as long as its longest budget.",
    )
    d.text(24, 34, "The same numbers for less arithmetic", "ink h", "start")
    words = f"in the figures: k = {SHORT_K} registers, {SHORT_KEPT} of them kept"
    d.text(786, 34, words, "muted s", "end")
    short_encoder(d, 52)
    short_mask(d, 226)
    short_modulations(d, 516)
    short_training(d, 700)
    return d


def short_row(d: Drawing, y: float, words: str, length: int) -> None:
    """A sequence: its name, n patches, and its length; the rest of it is drawn by the caller."""
    d.text(40, y + 5, words, "muted s", "start")
    d.squares(110, y - 9, 8, 18)
    d.text(770, y + 5, f"n + {length} positions", "ink s", "end")


def short_encoder(d: Drawing, top: float) -> None:
    """Registers beyond the budget need not be computed."""
    d.rect(Box(24, top, 762, 162), "band", 12)
    d.text(40, top + 27, "1  Encode only what you keep", "ink b", "start")
    y = top + 74
    short_row(d, y, "plain", SHORT_K)
    d.text(188, y - 18, "n patches", "muted s")
    row = d.squares(290, y - 9, SHORT_K, 18, "k4")
    d.text(row.cx, y - 18, "k learned registers", "muted s")
    y = top + 118
    short_row(d, y, "short", SHORT_KEPT)
    kept = d.squares(290, y - 9, SHORT_KEPT, 18, "k4")
    rest = d.squares(kept.right + 2.5, y - 9, SHORT_K - SHORT_KEPT, 18, "ghost")
    d.text(kept.cx, y - 16, f"{SHORT_KEPT} kept", "muted s")
    d.text(rest.cx, y - 16, "the rest is left out of the sequence", "muted s")
    words = "Registers are causal: those that are kept attend to no later one, so they come out the same."
    d.text(40, top + 149, words, "muted s", "start")


def short_mask(d: Drawing, top: float) -> None:
    """m equal tokens are one; so are k null tokens."""
    d.rect(Box(24, top, 762, 278), "band", 12)
    d.text(40, top + 27, "2  One mask token is enough", "ink b", "start")
    m = SHORT_K - SHORT_KEPT
    y = top + 74
    short_row(d, y, "plain", SHORT_K)
    d.tokens(Box(290, y - 9, 325.5, 18), SHORT_K, kept=SHORT_KEPT)
    d.text(188, y - 18, "n patches", "muted s")
    d.text(453, y - 18, f"{SHORT_KEPT} kept, m = {m} mask tokens, equal in every layer", "muted s")
    y = top + 112
    short_row(d, y, "short", SHORT_KEPT + 1)
    row = d.tokens(Box(290, y - 9, 79.5, 18), SHORT_KEPT + 1, kept=SHORT_KEPT, of=SHORT_K)
    short_bias(d, row.right, y, "+ log m")
    y = top + 172
    short_row(d, y, "plain", SHORT_K)
    for i in range(SHORT_K):
        d.rect(Box(290.7 + 20.5 * i, y - 8.3, 16.6, 16.6), "null", 3)
    d.text(453, y - 18, "null condition (no ids): k null tokens", "muted s")
    y = top + 210
    short_row(d, y, "short", 1)
    d.rect(Box(290.7, y - 8.3, 16.6, 16.6), "null", 3)
    short_bias(d, 308, y, "+ log k")
    words = "m equal keys with logit s weigh m · exp(s) = exp(s + log m): as one key with logit s + log m."
    d.text(40, top + 246, words, "muted s", "start")
    words = f"A step with guidance runs both: n + {SHORT_KEPT + 1} positions with the ids, n + 1 without."
    d.text(40, top + 265, words, "muted s", "start")


def short_bias(d: Drawing, x: float, y: float, words: str) -> None:
    """What is added to the attention logit of the token that ends at x."""
    d.aim(Box(x + 24, y - 14, 74, 28), (words, "aim-t s"))
    d.arrow((x + 22, y), (x + 4, y), kind="aim")
    d.text(x + 110, y + 5, "on its attention logit", "muted s", "start")


def short_modulations(d: Drawing, top: float) -> None:
    """All steps at once."""
    d.rect(Box(24, top, 762, 172), "band", 12)
    d.text(40, top + 27, "3  Modulations depend on t alone", "ink b", "start")
    y = top + 92
    for i in range(5):
        box = Box(40, top + 44 + 21 * i, 92, 18)
        d.rect(box, "aim", 4)
        d.text(box.cx, box.y + 13.6, f"t = {1 - 0.2 * i:.1f}".replace("1.0", "1"), "aim-t s")
    net = d.net(Box(170, y - 26, 130, 52), "tok", "MLP, Linear")
    d.text(net.cx, net.y - 9, "once, before step 1", "muted s")
    d.text(net.cx, net.bottom + 17, "all t as one batch", "muted s")
    d.arrow((136, y), (net.x - 2, y))
    d.arrow((net.right + 2, y), (334, y))
    for i in range(5):
        for j in range(12):
            d.rect(Box(340 + 17 * j, top + 44 + 21 * i, 14, 18), "pt" if j < 6 else "k4", 2.5)
    d.text(441, top + 163, "6 vectors for patches, 6 for registers", "muted s")
    net = d.net(Box(676, y - 40, 94, 80), "tok", "flow", "decoder")
    d.arrow((548, y), (net.x - 2, y))
    d.text(610, y - 10, "step i takes", "ink s")
    d.text(610, y + 18, "row i", "ink s")


def short_training(d: Drawing, top: float) -> None:
    """Sorted samples need shorter rectangles."""
    d.rect(Box(24, top, 762, 256), "band", 12)
    d.text(40, top + 27, "4  Train on what is kept", "ink b", "start")
    d.rect(Box(552, top + 16, 13, 13), "k4", 2.5)
    d.text(571, top + 27, "kept", "muted s", "start")
    d.rect(Box(622, top + 16, 13, 13), "bare", 2.5)
    d.text(641, top + 27, "computed, not kept", "muted s", "start")
    longest, micro = max(BUDGETS), 2
    d.text(158, top + 56, "a batch of 8 samples, in rows", "ink s")
    short_batch(d, Box(46, top + 78, 14, 17), BUDGETS)
    d.text(158, top + 247, f"{len(BUDGETS)} × {longest} = {len(BUDGETS) * longest} registers", "ink s")
    d.arrow((288, top + 144), (388, top + 144))
    d.text(336, top + 134, "sort by budget,", "ink s")
    d.text(336, top + 164, "cut into four", "ink s")
    d.text(400, top + 56, "micro-batches, each as long as its longest", "ink s", "start")
    y, lengths, ordered = top + 70, [], sorted(BUDGETS)
    for i in range(0, len(ordered), micro):
        part = ordered[i : i + micro]
        short_batch(d, Box(404, y, 14, 17), part)
        d.text(404 + 14 * max(part) + 12, y + 20, f"{micro} × {max(part)}", "ink s", "start")
        y, lengths = y + 42, [*lengths, max(part)]
    total = " + ".join(str(x) for x in lengths)
    d.text(400, top + 247, f"{micro} × ({total}) = {micro * sum(lengths)} registers", "ink s", "start")
    d.lines(656, top + 92, ("the gradient,", "muted s"), ("summed over all,", "muted s"), anchor="start")
    d.text(656, top + 128, "is the same", "muted s", "start")


def short_batch(d: Drawing, first: Box, budgets: tuple[int, ...] | list[int]) -> None:
    """A rectangle as long as the longest of its samples."""
    longest = max(budgets)
    for i, budget in enumerate(budgets):
        for j in range(longest):
            cell = Box(first.x + first.w * j, first.y + first.h * i, first.w - 2.5, first.h - 4)
            d.rect(cell, "k4" if j < budget else "bare", 2.5)
    frame = Box(first.x - 4, first.y - 4, first.w * longest + 5.5, first.h * len(budgets) + 4)
    d.rect(frame, "frame", 4)


# --------------------------------------------------------------------------------------------------- training


def training_loop() -> Drawing:
    """One step of training, and how it goes on after a stop."""
    d = Drawing(
        "training_loop",
        420,
        "The training loop",
        "Cache, batch, random numbers, forward, loss; then backward, clip, AdamW or Muon, EMA, and the "
        "next batch. Now and then everything is written to a checkpoint, from which a stopped training "
        "resumes as if nothing had happened.",
    )
    d.text(24, 34, "One step, again and again", "ink h", "start")
    y = 124
    cache = store(d, Box(24, y - 33, 92, 66), "latents", "(N c h w)")
    batch = d.data(Box(150, y - 28, 88, 56), "batch", ("(b c h w)", "muted m"))
    chance = d.data(
        Box(272, y - 38, 116, 76),
        ("noise, t,", "ink s"),
        ("budgets", "ink s"),
        ("by (seed, step)", "muted s"),
    )
    forward = d.net(Box(422, y - 38, 148, 76), "tok", "encoder, FSQ,", "flow decoder")
    loss = d.aim(Box(616, y - 28, 150, 56), ("flow loss", "aim-t"), ("(v − target)²", "aim-t s"))
    for a, b in ((cache, batch), (batch, chance), (chance, forward), (forward, loss)):
        d.arrow((a.right + 2, y), (b.x - 2, y))
    d.text(496, y - 48, "forward", "muted s")
    y = 242
    back = d.aim(Box(616, y - 26, 150, 52), ("backward", "aim-t"), ("gradients", "aim-t s"))
    clip = d.op(Box(478, y - 26, 92, 52), "tok", "clip", ("their norm", "muted s"))
    step = d.op(Box(312, y - 26, 140, 52), "tok", "AdamW or Muon", ("updates weights", "ink s"))
    ema = d.op(Box(182, y - 26, 102, 52), "tok", "EMA", ("their average", "muted s"))
    d.arrow((loss.cx, loss.bottom + 2), (back.cx, back.y - 2), kind="aim")
    for a, b in ((back, clip), (clip, step), (step, ema)):
        d.arrow((a.x - 2, y), (b.right + 2, y))
    d.arrow((step.cx, step.y - 2), (step.cx, 186), (496, 186), (496, 164))
    d.arrow((ema.x - 2, y), (134, y), (134, 138), (148, 138))
    d.text(124, 206, "next step", "ink b", "end")
    store(d, Box(330, 318, 240, 70), "checkpoint", "weights, EMA, optimizer, step", "muted s")
    d.arrow((233, 270), (233, 340), (328, 340))
    d.text(243, 312, "now and then", "muted s", "start")
    d.arrow((328, 370), (134, 370), (134, 246), kind="tok", dash=True)
    d.text(124, 312, "stopped?", "muted s", "end")
    d.text(124, 330, "resume here", "tok-t b", "end")
    return d


# --------------------------------------------------------------------------------------- autoregressive model


LOGITS = (2.3, 1.6, 1.1, 2.0, -0.6, 0.4, 0.9, -1.2)


def softmax(logits: tuple[float, ...] | list[float]) -> list[float]:
    """Probabilities."""
    top = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(top) for x in top]


def kept_tokens(p: list[float], top_k: int, top_p: float) -> set[int]:
    """The likeliest: at most top_k, and of those the fewest that reach top_p."""
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    whole, reached, kept = sum(p[i] for i in order), 0.0, set()
    for i in order:
        if reached >= top_p:
            break
        kept.add(i)
        reached += p[i] / whole
    return kept


def bars(d: Drawing, box: Box, values: list[float], dropped: set[int] = frozenset(), cls: str = "ar") -> None:
    """Bars that stand on the floor of a box; the largest value reaches its top."""
    w = box.w / len(values)
    for i, v in enumerate(values):
        h = max(v / max(values) * box.h, 1.5)
        bar = Box(box.x + i * w + 1.5, box.bottom - h, w - 3, h)
        d.rect(bar, "ghost" if i in dropped else cls, min(2.5, h / 2))
    d.arrow((box.x, box.bottom), (box.right, box.bottom), head=False)


def ar() -> Drawing:
    """Teacher forcing, and writing."""
    d = Drawing(
        "ar",
        492,
        "The autoregressive model: training and writing",
        "Above, training: the input is the class and the ids shifted by one, a causal transformer gives "
        "at every position a distribution over the next id, and the targets are the ids themselves. At "
        "the right the causal mask: each position attends to itself and to what came before. Below, "
        "writing: an id is picked, appended, and the model runs again. The distributions are sketches.",
    )
    d.text(24, 34, "Learning all ids at once, writing one at a time", "ink h", "start")
    ar_training(d)
    ar_mask(d, Box(622, 108, 24, 24))
    d.text(24, 322, "Writing", "ink b", "start")
    for step in range(3):
        ar_step(d, 24 + 268 * step, step)
    words = "Stop anywhere: the ids written so far are already a picture."
    d.text(24, 470, words, "muted", "start")
    d.text(786, 470, "(distributions: sketches)", "muted s", "end")
    return d


def odds(seed: int, peak: int, count: int = 7) -> list[float]:
    """A made-up distribution with a peak."""
    r = random.Random(seed)
    return [1.0 if i == peak else 0.12 + 0.5 * r.random() for i in range(count)]


def ar_training(d: Drawing) -> None:
    """Teacher forcing."""
    d.text(24, 66, "Training", "ink b", "start")
    d.net(Box(24, 178, 436, 40), "ar", "AR transformer")
    for j in range(5):
        x = 30 + 87 * j
        shade = f"k{2 * j}"
        d.rect(Box(x, 82, 76, 24), shade, 3)
        d.text(x + 38, 99, str(IDS[j]), "ontok m")
        bars(d, Box(x + 8, 114, 60, 38), odds(j, (3, 1, 5, 2, 4)[j]))
        d.arrow((x + 38, 176), (x + 38, 156))
        d.arrow((x + 38, 240), (x + 38, 220))
        if j:
            d.rect(Box(x, 242, 76, 24), f"k{2 * j - 2}", 3)
            d.text(x + 38, 259, str(IDS[j - 1]), "ontok m")
        else:
            d.data(Box(x, 242, 76, 24), ("class", "ink s"))
    for y, words, cls in (
        (99, "targets", "ink s"),
        (140, "p(next id)", "ink s"),
        (157, "(sketch)", "muted s"),
        (259, "shifted by one", "ink s"),
    ):
        d.text(474, y, words, cls, "start")
    d.text(474, 120, "cross-entropy", "aim-t s", "start")


def ar_mask(d: Drawing, first: Box) -> None:
    """Causal: each position attends to itself and to what came before."""
    step = first.w + 2
    for i in range(5):
        for head in (
            Box(first.x + i * step, first.y - step - 4, 24, 24),
            Box(first.x - step - 4, first.y + i * step, 24, 24),
        ):
            d.rect(head, f"k{2 * i - 2}" if i else "data", 3)
            d.text(head.cx, head.cy + 5, str(i) if i else "c", "ontok m" if i else "ink m")
        for j in range(5):
            cell = Box(first.x + j * step, first.y + i * step, 24, 24)
            d.rect(cell, "void" if j > i else f"k{2 * j - 2}" if j else "data", 3)
    d.text(first.x + 64, first.y + 5 * step + 18, "causal mask", "ink s")
    d.text(first.x + 64, first.y + 5 * step + 36, "row attends to column", "muted s")


def ar_step(d: Drawing, x: float, step: int) -> None:
    """Run, pick, append."""
    d.data(Box(x, 338, 52, 26), ("class", "ink s"))
    for i in range(step):
        d.rect(Box(x + 55 + 43 * i, 338, 40, 26), f"k{2 * i}", 3)
        d.text(x + 75 + 43 * i, 356, str(IDS[i]), "ontok m")
    model = d.net(Box(x, 388, 52, 44), "ar", "AR")
    d.arrow((x + 26, 366), (x + 26, 386))
    bars(d, Box(x + 78, 390, 62, 38), odds(step, (3, 1, 5)[step]))
    d.arrow((model.right + 2, 410), (x + 74, 410))
    d.arrow((x + 144, 410), (x + 166, 410))
    d.rect(Box(x + 168, 397, 40, 26), f"k{2 * step}", 3)
    d.text(x + 188, 415, str(IDS[step]), "ontok m")
    if step < 2:
        d.arrow((x + 210, 410), (x + 238, 410), (x + 238, 351), (x + 265, 351))
        d.text(x + 228, 384, "append", "muted s", "end")


PROMPT = ("[CLS]", "a", "red", "boat", "at", "night", "[SEP]", "", "")  # two positions of padding


def text_block() -> Drawing:
    """From a prompt to the cross-attention of a block."""
    d = Drawing(
        "text_block",
        478,
        "A block that reads a text",
        "A prompt is cut into pieces, with marks of beginning and end, and padded. A frozen text encoder "
        "gives each position a vector of width t, an MLP of ours makes it one of width d. Below, a block of "
        "the AR model: causal self-attention among the tokens, cross-attention with queries from the tokens "
        "and keys and values from the text, SwiGLU, each behind a norm and added back. Of parameters, both "
        "attentions have 4 d², SwiGLU 8 d².",
    )
    d.text(24, 34, "A block that reads a text", "ink h", "start")
    d.text(786, 34, "hatched: frozen, not trained with the rest", "muted s", "end")
    text_side(d)
    y, x = 352, d.data(Box(24, 326, 64, 52), "x", ("(b k d)", "muted m"))
    names = (("self-attn.", "4 d²"), ("cross-attn.", "4 d²"), ("SwiGLU", "8 d²"))
    before = x.right
    for i, inside in enumerate(names):
        before = residual_part(d, y, before, 112 + 210 * i, *inside)
    out = d.data(Box(744, y - 26, 48, 52), "x")
    d.arrow((before, y), (out.x - 2, y))
    d.text(229, y - 38, "causal: itself and earlier", "muted s")
    words = "The text is encoded once. Each block has its own keys and values of it, for all tokens."
    d.text(24, 452, words, "muted", "start")
    return d


def text_side(d: Drawing) -> None:
    """Pieces of the prompt, their features, and the text as the blocks see it."""
    step, w = 66, 62
    for i, piece in enumerate(PROMPT):
        x, padding = 24 + step * i, not piece
        d.rect(Box(x, 56, w, 26), "ghost" if padding else "data", 3)
        d.text(x + w / 2, 74, piece or "pad", "muted s" if padding else "ink m")
        for y in (152, 234):
            if padding:
                d.rect(Box(x + 22, y, 18, 18), "ghost", 2.5)
            else:
                d.squares(x + 22, y, 1, 18, "any-f" if y == 152 else "ar-f")
        if not padding:
            for y in (83, 138, 172, 220):
                d.arrow((x + w / 2, y), (x + w / 2, y + (14 if y != 83 else 16)))
    whole_width = step * len(PROMPT) - 4
    d.net(Box(24, 101, whole_width, 36), "any", "text encoder", frozen=True)
    d.net(Box(24, 188, whole_width, 31), "ar", "MLP, at each position by itself")
    for y, words, shape in ((74, "pieces", "(b l)"), (166, "features", "(b l t)"), (248, "text", "(b l d)")):
        d.text(632, y, words, "ink s", "start")
        d.text(786, y, shape, "muted m", "end")
    x = 322 + 70 + 47
    d.arrow((46, 260), (460, 260), head=False)
    d.arrow((x, 260), (x, 318))
    d.text(x + 12, 284, "keys, values", "ink s", "start")
    d.text(x + 12, 302, "padding is masked", "muted s", "start")


def residual_part(d: Drawing, y: float, before: float, start: float, name: str, count: str) -> float:
    """Norm, a network, and the way around it; returns where it ends."""
    norm = d.op(Box(start + 6, y - 22, 48, 44), "ar", "norm")
    net = d.net(Box(start + 70, y - 30, 94, 60), "ar", name, (count, "on s"))
    d.arrow((before, y), (norm.x - 2, y))
    d.arrow((norm.right + 2, y), (net.x - 2, y))
    d.arrow((net.right + 2, y), (start + 174, y), head=False)
    d.add("circle", "data", cx=start + 186, cy=y, r=12)
    d.text(start + 186, y + 6, "+", "ink sign")
    d.arrow((start - 6, y), (start - 6, y + 52), (start + 186, y + 52), (start + 186, y + 14))
    return start + 198


def sampling() -> Drawing:
    """Logits to one token."""
    d = Drawing(
        "sampling",
        458,
        "From logits to a token",
        "Logits of eight tokens; divided by a temperature below 1 and turned into probabilities they are "
        "sharper; top-k and top-p drop the unlikely ones. What is left is laid on the line from 0 to 1, "
        "and the token is picked on whose piece a uniform number falls.",
    )
    d.text(24, 34, "From logits to a token", "ink h", "start")
    temperature, top_k, top_p, u = 0.7, 5, 0.9, 0.55
    plain, sharp = softmax(LOGITS), softmax([x / temperature for x in LOGITS])
    kept = kept_tokens(sharp, top_k, top_p)
    signed_bars(d, Box(24, 92, 220, 110), LOGITS)
    high = max(sharp)
    bars(d, Box(295, 92 + 110 * (1 - max(plain) / high), 220, 110 * max(plain) / high), plain, set(range(8)))
    bars(d, Box(295, 92, 220, 110), sharp)
    bars(d, Box(566, 92, 220, 110), sharp, set(range(8)) - kept)
    for x, head, words in (
        (24, "logits (b v)", "any numbers"),
        (295, "temperature, softmax", f"T = {temperature}: sharper than T = 1 (dashed)"),
        (566, "top-k, then top-p", f"k = {top_k}, p = {top_p}: {8 - len(kept)} are dropped"),
    ):
        d.text(x, 74, head, "ink b", "start")
        d.text(x, 242, words, "muted s", "start")
        for i in range(8):
            d.text(x + 27.5 * i + 13.7, 220, str(i), "muted m")
    d.arrow((254, 150), (285, 150))
    d.arrow((525, 150), (556, 150))
    pick_on_line(d, [p if i in kept else 0.0 for i, p in enumerate(sharp)], u)
    words = "u belongs to (seed, sample, position), so a sample does not depend on its batch."
    d.text(24, 436, words, "muted", "start")
    return d


def signed_bars(d: Drawing, box: Box, values: tuple[float, ...]) -> None:
    """Bars up and down from zero."""
    low, high = min(values), max(values)
    zoom, w = box.h / (high - low), box.w / len(values)
    zero = box.y + high * zoom
    for i, v in enumerate(values):
        top = zero - max(v, 0) * zoom
        d.rect(Box(box.x + i * w + 1.5, top, w - 3, abs(v) * zoom), "ar", 2.5)
    d.arrow((box.x, zero), (box.right, zero), head=False)


def pick_on_line(d: Drawing, p: list[float], u: float) -> None:
    """The pieces of [0, 1], and where the uniform number falls."""
    whole, x = sum(p), 24.0
    d.text(24, 282, "cumulative sums: each token its piece of the line from 0 to 1", "ink b", "start")
    for i, share in enumerate(p):
        w = 762 * share / whole
        if not w:
            continue
        hit = x <= 24 + 762 * u < x + w
        piece = Box(x + 1, 330, w - 2, 32)
        d.rect(piece, "ar" if hit else "ar-f", 4)
        d.text(piece.cx, 351, str(i), "on m" if hit else "ink m")
        if hit:
            d.arrow((piece.cx, 364), (piece.cx, 382))
            token = Box(piece.cx - 32, 384, 64, 26)
            d.rect(token, "k0", 4)
            d.text(token.cx, 402, f"id {i}", "ontok m")
        x += w
    at = 24 + 762 * u
    d.arrow((at, 306), (at, 328), kind="aim")
    d.text(at + 10, 316, f"u = {u}", "aim-t b", "start")
    d.text(24, 380, "0", "muted s", "start")
    d.text(786, 380, "1", "muted s", "end")


# ------------------------------------------------------------------------------------------------- evaluation


def evaluation() -> Drawing:
    """One list at all budgets, and what is compared with what."""
    d = Drawing(
        "evaluation",
        590,
        "Quality at every token count",
        "One list of ids is cut to 1, 2, 4, 8 and 16; each cut is decoded and measured: MAE, PSNR and "
        "SSIM of each picture, the Fréchet distance of the set, the accuracy of attributes that a "
        "classifier reads. Below: reconstructions are compared with their own originals, samples as a set "
        "with the same originals, and other real pictures with them too, which gives the floor.",
    )
    d.text(24, 34, "One list, every budget, several numbers", "ink h", "start")
    evaluation_table(d)
    d.text(24, 376, "Compared with what?", "ink b", "start")
    mid = d.data(Box(318, 436, 150, 74), ("originals", "ink b"), ("held out", "muted s"))
    left = d.op(
        Box(24, 442, 140, 62), "tok", ("reconstructions", "ink b s"), ("of these originals", "muted s")
    )
    high = d.op(Box(636, 396, 150, 62), "ar", ("samples", "ink b s"), ("of the AR model", "muted s"))
    low = d.data(Box(636, 492, 150, 62), ("real pictures", "ink b s"), ("others, held out", "muted s"))
    d.arrow((left.right + 2, 464), (mid.x - 2, 464), kind="aim")
    d.arrow((left.right + 2, 490), (mid.x - 2, 490), kind="aim")
    d.text(240, 455, "picture by picture", "ink s")
    d.text(240, 508, "and as a set", "ink s")
    d.arrow((high.x - 2, 427), (552, 427), (552, 464), (mid.right + 2, 464), kind="aim")
    d.arrow((low.x - 2, 523), (552, 523), (552, 486), (mid.right + 2, 486), kind="aim")
    d.text(564, 418, "as a set", "ink s", "start")
    d.text(558, 541, "as a set:", "ink s", "start")
    d.text(558, 559, "the floor", "ink s", "start")
    d.text(24, 570, "Each number carries its conditions (the card).", "muted", "start")
    return d


def evaluation_table(d: Drawing) -> None:
    """A row for each budget; the bars show the usual shapes, not measurements."""
    columns = (
        ("MAE ↓", "tok", (0.95, 0.8, 0.62, 0.46, 0.36)),
        ("PSNR ↑", "tok", (0.3, 0.4, 0.55, 0.72, 0.86)),
        ("SSIM ↑", "tok", (0.25, 0.36, 0.52, 0.7, 0.84)),
        ("Fréchet ↓", "vae", (0.7, 0.5, 0.38, 0.32, 0.3)),
        ("accuracy ↑", "ar", (0.4, 0.6, 0.8, 0.92, 0.96)),
    )
    d.text(24, 86, "budget", "muted s", "start")
    for x, w, words in ((312, 276, "of each picture"), (606, 80, "of the set"), (704, 82, "attributes")):
        d.text(x + w / 2, 68, words, "muted s")
        d.arrow((x, 74), (x + w, 74), head=False)
    for j, (name, _, _) in enumerate(columns):
        d.text(312 + 98 * j + 40, 92, name, "ink s")
    for i, budget in enumerate((1, 2, 4, 8, 16)):
        y = 124 + 48 * i
        d.text(66, y + 5, str(budget), "ink b", "end")
        d.tokens(Box(82, y - 5, 150, 10), 16, kept=budget, gap=2)
        d.picture(Box(252, y - 20, 40, 40), (0, 0.5, 1, 1.5, 2)[i])
        for j, (_, cls, values) in enumerate(columns):
            d.rect(Box(312 + 98 * j, y - 7, 80, 14), "data", 4)
            d.rect(Box(312 + 98 * j, y - 7, 80 * values[i], 14), cls, 4)
    d.text(786, 352, "↓ lower is better; the bars show usual shapes, no measurements", "muted s", "end")


# ---------------------------------------------------------------------------------------------------- search

LOOKS = (  # length: (scores of its candidates, which of them go on)
    (1, (0.35, 0.8, 0.55), (1, 2)),
    (2, (0.45, 0.75, 0.3, 0.6, 0.9, 0.4), (1, 4)),
    (4, (0.5, 0.7, 0.85, 0.6, 0.95, 0.55), (2, 4)),
    (8, (0.8, 0.7, 0.85, 0.9, 0.75, 1.0), (5,)),
)


def search() -> Drawing:
    """Whole lists, and a beam over beginnings."""
    d = Drawing(
        "search",
        590,
        "Best of n, and a beam over beginnings of lists",
        "Above: best of n draws whole lists, decodes each, and a verifier scores the pictures; the best is "
        "kept. Below: a beam decodes beginnings of 1, 2, 4 and 8 tokens. At each length it keeps the two "
        "that score best and continues each with three different tokens; 3 + 6 + 6 + 6 = 21 decodes.",
    )
    d.text(24, 34, "Best of n", "ink h", "start")
    d.text(786, 34, "5 whole lists, 5 decodes", "muted s", "end")
    for i, score in enumerate((0.5, 0.35, 0.85, 0.25, 0.6)):
        candidate(d, Box(24 + 155 * i, 54, 142, 44), 8, score, i == 2)
    d.arrow((24, 122), (786, 122), head=False)
    d.text(24, 154, "Beam over beginnings", "ink h", "start")
    d.text(
        786, 154, "two go on, each with three different last tokens: 3 + 6 + 6 + 6 decodes", "muted s", "end"
    )
    before = []
    for column, (length, scores, kept) in enumerate(LOOKS):
        x, step = 24 + 207 * column, 58
        top = 206 + step * (6 - len(scores)) / 2
        d.text(x + 71, 184, f"{length} token" + "s" * (length > 1), "ink b s")
        here = [Box(x, top + step * i, 142, 44) for i in range(len(scores))]
        for i, box in enumerate(here):
            candidate(d, box, length, scores[i], i in kept)
            if before:
                parent = before[i // 3]
                middle = x - 38 + 14 * (i // 3)
                start, end = (parent.right + 3, parent.cy), (box.x - 3, box.cy)
                bend = ((middle, start[1]), (middle, end[1])) if abs(start[1] - end[1]) > 1 else ()
                d.arrow(start, *bend, end, kind="aim" if i in kept else "")
        before = [here[i] for i in kept]
    d.text(
        24,
        572,
        "Blue bar: what the verifier says of the picture. Framed: what is kept.",
        "muted s",
        "start",
    )
    return d


def candidate(d: Drawing, box: Box, length: int, score: float, kept: bool) -> None:
    """A beginning of a list, its picture and its score."""
    d.rect(box, "plate", 5)
    d.tokens(Box(box.x + 6, box.y + 8, 84, 12), 8, kept=length, gap=2)
    d.rect(Box(box.x + 6, box.y + 28, 84, 8), "data", 3)
    d.rect(Box(box.x + 6, box.y + 28, 84 * score, 8), "tok", 3)
    d.picture(Box(box.right - 44, box.y + 4, 36, 36), {1: 0, 2: 0.5, 4: 1, 8: 2}[length])
    d.rect(box, "frame" if kept else "bare", 5)


# --------------------------------------------------------------------------------------------------- budgets

DESCENTS = (  # detail that each look shows, its error, how many looks were good enough
    ((2, 2, 1, 0.5), (0.12, 0.15, 0.5, 0.85), 2),
    ((1, 1, 1, 1), (0.14, 0.16, 0.2, 0.24), 4),
    ((2, 1, 0.5, 0), (0.22, 0.55, 0.7, 0.9), 1),
)  # three pictures: with 8, 4, 2 and 1 tokens; errors for drawing only
ENOUGH = 0.3  # of the same scale


def budgets() -> Drawing:
    """A search from all tokens downward, for three pictures."""
    d = Drawing(
        "budgets",
        396,
        "From all tokens downward, until the picture is no longer good enough",
        "Three pictures are decoded with 8, 4, 2 and 1 tokens, always from the same noise. Bars show the "
        "error, a line the target. The search goes from left to right and stops at the first miss; the "
        "budget is the last count before it: 4, 1 and 8 tokens. What lies behind the miss is not decoded.",
    )
    d.text(24, 34, "Fewer tokens, as long as the error stays below the target", "ink h", "start")
    for column, k in enumerate((8, 4, 2, 1)):
        d.text(95 + 155 * column, 66, f"{k} token" + "s" * (k > 1), "ink b s")
    d.text(722, 66, "budget", "ink b s")
    for row, (details, errors, good) in enumerate(DESCENTS):
        y = 84 + 96 * row
        for column, (k, detail, error) in enumerate(zip((8, 4, 2, 1), details, errors)):
            box = Box(24 + 155 * column, y, 142, 76)
            with d.group("dim" if column > good else ""):
                look_at(d, box, k, detail, error)
                d.rect(box, "frame" if column == good - 1 else "bare", 5)
            if 0 < column <= good:
                d.arrow((box.x - 12, box.cy), (box.x - 1, box.cy), kind="aim")
        count = (8, 4, 2, 1)[good - 1]
        d.tokens(Box(664, y + 26, 116, 22), 8, kept=count, gap=2)
    d.text(
        24,
        380,
        "Framed: the last that is good enough. Dashed: the target. Pale: never decoded.",
        "muted s",
        "start",
    )
    return d


def look_at(d: Drawing, box: Box, k: int, detail: float, error: float) -> None:
    """One decode: its tokens, its picture, its error and the target."""
    d.rect(box, "plate", 5)
    d.tokens(Box(box.x + 6, box.y + 10, 74, 12), 8, kept=k, gap=2)
    d.picture(Box(box.right - 54, box.y + 8, 46, 46), detail)
    d.rect(Box(box.x + 6, box.y + 34, 74, 8), "data", 3)
    d.rect(Box(box.x + 6, box.y + 34, 74 * error, 8), "tok" if error <= ENOUGH else "aim", 3)
    x = box.x + 6 + 74 * ENOUGH
    d.arrow((x, box.y + 28), (x, box.y + 60), head=False, dash=True)
    d.text(x, box.y + 71, "target", "muted s")


# ------------------------------------------------------------------------------------------------- baselines


def baselines() -> Drawing:
    """The systems beside FlexTok: which registers see each other, and what a short list is."""
    rows = (
        ("FlexTok", "causal", "the first tokens, the rest mask tokens"),
        ("tail drop", "full", "the same; every token knows of all others"),
        ("TiTok", "full", "none: another length is another model"),
        ("grid", "", "the upper rows of the picture"),
        ("ALIT", "grows", "another list: all tokens are written anew"),
        ("KARL", "full", "as long as the wished error asks for"),
    )
    d = Drawing(
        "baselines",
        88 + 66 * len(rows) + 34,
        "Six tokenizers: which tokens see each other, and what half a list is",
        "A row for each tokenizer, with a square that shows which of its tokens may see which, a full list "
        "and half a list. FlexTok: a causal triangle, and the first half followed by mask tokens. Tail drop: "
        "a full square, and the first half. TiTok: a full square, and no half list. Grid: tokens at their "
        "places in the picture, and its upper half. ALIT: a list that grows in passes and is written anew "
        "each time. KARL: a full square, and a length that follows from the error that is wished for.",
    )
    d.text(24, 34, "The same decoder, other tokens", "ink h", "start")
    for x, words in ((150, "who sees whom"), (290, "all tokens"), (420, "half of them")):
        d.text(x, 66, words, "muted s")
    for i, (name, sees, words) in enumerate(rows):
        y = 84 + 66 * i
        d.text(24, y + 27, name, "ink b", "start")
        if sees:
            baseline_mask(d, Box(126, y, 48, 48), sees)
        if name == "grid":
            baseline_grid(d, Box(266, y, 48, 48), 16)
            baseline_grid(d, Box(396, y, 48, 48), 8)
        else:
            d.tokens(Box(236, y + 16, 108, 16), 8, gap=2)
            if name != "TiTok":
                d.tokens(Box(366, y + 16, 108, 16), 8, kept=4, gap=2, of=4 if name == "ALIT" else 8)
        d.text(488, y + 28, words, "muted s", "start")
    foot = "ALIT: four passes, two more tokens each; in every pass all tokens so far see each other."
    d.text(24, d.height - 18, foot, "muted s", "start")
    return d


def baseline_mask(d: Drawing, box: Box, sees: str, n: int = 8) -> None:
    """Which of n tokens (rows) may see which (columns)."""
    side = box.w / n
    for row in range(n):
        for column in range(n):
            cell = Box(box.x + column * side, box.y + row * side, side - 0.8, side - 0.8)
            seen = "k" + str(2 * (max(row, column) // 2)) if sees == "grows" else "tok"
            d.rect(cell, "data" if sees == "causal" and column > row else seen, 1)


def baseline_grid(d: Drawing, box: Box, kept: int, n: int = 4) -> None:
    """Tokens at their places in the picture."""
    side = box.w / n
    for i in range(n * n):
        cell = Box(box.x + i % n * side, box.y + i // n * side, side - 2, side - 2)
        d.rect(cell, "k3" if i < kept else "mk", 2)


# ------------------------------------------------------------------------------------------------- all of it


DRAWN = (
    encoder_mask,
    decoder_block,
    three_stages,
    cut_list,
    scenes,
    vae,
    fsq,
    flow_path,
    short_cuts,
    training_loop,
    ar,
    text_block,
    sampling,
    evaluation,
    search,
    budgets,
    baselines,
)


def diagrams() -> dict[str, Callable[[], Drawing]]:
    """Every diagram by the name of its file."""
    found = {f"whole_{v}" if v else "whole": lambda v=v: whole(v) for v in VARIANTS}
    return found | {draw.__name__: draw for draw in DRAWN}


def drawn() -> dict[str, str]:
    """Name of each file -> its text."""
    return {f"{name}.svg": draw().render() for name, draw in diagrams().items()}


def differing() -> list[str]:
    """Files that are missing, stray, or not what this code draws."""
    wanted, there = drawn(), {f.name: f.read_text(encoding="utf-8") for f in FOLDER.glob("*.svg")}
    return sorted(name for name in wanted | there if wanted.get(name) != there.get(name))


def main(arguments: list[str]) -> int:
    """Write the diagrams, or check them; the exit status."""
    if arguments == ["--check"]:
        names = differing()
        print(f"not what the code draws: {', '.join(names)}" if names else "all diagrams are in step")
        return 1 if names else 0
    if arguments:
        print(__doc__)
        return 2
    FOLDER.mkdir(parents=True, exist_ok=True)
    wanted = drawn()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text, encoding="utf-8", newline="\n")
    for stray in set(f.name for f in FOLDER.glob("*.svg")) - wanted.keys():
        (FOLDER / stray).unlink()
    print(f"{len(wanted)} diagrams in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Small line charts as SVG text: panels in a grid, the same lines in each, bars for 95 % intervals.

Nothing but strings: no browser, no plotting library. Greys and colours are read on white and on dark paper alike, and the
background is that of the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from raglan.metrics import Interval

WIDTH, HEIGHT, LEFT, TOP, GAP = 168, 118, 40, 46, 22  # of a panel, and what is beside and between them
BELOW = 34  # a panel's own numbers and words
INK, GRID = "#6e7781", "#8b949e"
COLOURS = ("#d9822b", "#2f7de1", "#2a9d6f", "#9b51b8")


@dataclass(frozen=True)
class Panel:
    """One chart: line's name → (x, share in [0, 1] with its interval), x rising."""

    title: str
    x: str
    lines: Mapping[str, Sequence[tuple[float, Interval]]]


def chart(panels: Sequence[Panel], *, columns: int, title: str, y: str) -> str:
    """One SVG of all panels, row by row; every panel has the whole range from 0 to 100 %.

    Raises:
        ValueError: no panel, or one in which no line has a point.
    """
    if not panels or not all(any(points for points in panel.lines.values()) for panel in panels):
        raise ValueError("a chart needs panels, and each of them a line with a point")
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    colours = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(names)}
    rows = -(-len(panels) // columns)
    width = LEFT + min(columns, len(panels)) * (WIDTH + GAP)
    height = TOP + rows * (HEIGHT + BELOW + GAP)
    body = [_text(8, 16, title, size=13, weight="600"), *_legend(colours, y)]
    for at, panel in enumerate(panels):
        left, top = LEFT + at % columns * (WIDTH + GAP), TOP + GAP + at // columns * (HEIGHT + BELOW + GAP)
        body += [f'<g transform="translate({left} {top})">', *_panel(panel, colours, numbers=at % columns == 0), "</g>"]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return "\n".join([f'{head} font-family="system-ui, sans-serif" role="img">', f"<title>{escape(title)}</title>", *body,
                      "</svg>", ""])  # fmt: skip


def _legend(colours: Mapping[str, str], y: str) -> list[str]:
    parts, x = [_text(8, 34, y, size=11)], 24 + 6.2 * len(y)
    for name, colour in colours.items():
        parts += [_stroke(x, 30, x + 18, 30, colour, 2), _text(x + 23, 34, name, size=11)]
        x += 44 + 6.2 * len(name)
    return parts


def _panel(panel: Panel, colours: Mapping[str, str], *, numbers: bool) -> list[str]:
    values = sorted({x for points in panel.lines.values() for x, _ in points})
    first, span = values[0], (values[-1] - values[0]) or 1.0
    parts = [_text(0, -6, panel.title, size=11, weight="600")]
    for percent in (0, 25, 50, 75, 100):
        parts.append(_stroke(0, _down(percent / 100), WIDTH, _down(percent / 100), GRID, 0.5, opacity=0.45))
        parts += [_text(-6, _down(percent / 100) + 3.5, str(percent), size=10, anchor="end")] if numbers else []
    for x in values:
        parts.append(_text(_across(x, first, span), HEIGHT + 13, f"{x:g}", size=10, anchor="middle"))
    parts.append(_text(WIDTH / 2, HEIGHT + 27, panel.x, size=10, anchor="middle"))
    for at, (name, points) in enumerate(panel.lines.items()):
        shift = 2.0 * (at - (len(panel.lines) - 1) / 2)  # intervals side by side
        dots = [(_across(x, first, span) + shift, own) for x, own in points]
        parts += [_stroke(x, _down(own.low), x, _down(own.high), colours[name], 1, opacity=0.7) for x, own in dots]
        parts += [_stroke(a, _down(p.mean), b, _down(q.mean), colours[name], 2) for (a, p), (b, q) in pairwise(dots)]
        parts += [f'<circle cx="{x:.1f}" cy="{_down(own.mean):.1f}" r="2.6" fill="{colours[name]}"/>' for x, own in dots]
    return parts


def _across(x: float, first: float, span: float) -> float:
    return 10 + (WIDTH - 20) * (x - first) / span


def _down(share: float) -> float:
    return HEIGHT * (1 - share)


def _stroke(x1: float, y1: float, x2: float, y2: float, colour: str, width: float, *, opacity: float = 1) -> str:
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width:g}"'
            f' stroke-opacity="{opacity:g}"/>')  # fmt: skip


def _text(x: float, y: float, words: str, *, size: int, anchor: str = "start", weight: str = "400") -> str:
    return (f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{INK}">'
            f"{escape(words)}</text>")  # fmt: skip

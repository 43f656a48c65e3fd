"""Drawings of traced calls as SVG: every class a panel, every step a box, the data from top to bottom.

Steps stand in rows by how many steps lie before them, and in a row as near below their inputs as they can. A
line that would cross a box goes round it on the left: that is what a residual connection looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from gallery_tracing import Node, Panel

COLUMN, ROW = 140, 64
BOX, HEIGHT, RADIUS = 126, 42, 12
MARGIN, TITLE, LANE, GAP, WIDEST = 16, 44, 22, 11, 910

STYLE = """\
<style>
  .page { fill: #ffffff; } .panel { fill: #f6f8fa; } .op { fill: #ffffff; stroke: #8c959f; }
  .linear { fill: #eaeef2; stroke: #8c959f; } .attn { fill: #ddf4ff; stroke: #0969da; }
  .mlp { fill: #fff1e5; stroke: #bc4c00; } .norm { fill: #dafbe1; stroke: #1a7f37; }
  .table { fill: #fbefff; stroke: #8250df; } text { fill: #1f2328; text-anchor: middle; }
  .soft { fill: #57606a; font-size: 11px; } .head { font-weight: 650; font-size: 15px; text-anchor: start; }
  .sub { text-anchor: start; } .line { fill: none; stroke: #57606a; stroke-width: 1.4; }
  .arrow { fill: none; stroke: #57606a; stroke-width: 1.4; marker-end: url(#tip); } .tip { fill: #57606a; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; } .panel { fill: #161b22; } .op { fill: #0d1117; stroke: #6e7681; }
    .linear { fill: #21262d; stroke: #6e7681; } .attn { fill: #0c2d4d; stroke: #58a6ff; }
    .mlp { fill: #3b1e08; stroke: #f0883e; } .norm { fill: #12311d; stroke: #3fb950; }
    .table { fill: #271b3d; stroke: #a371f7; } text { fill: #e6edf3; } .soft { fill: #adb7c2; }
    .line { stroke: #adb7c2; } .arrow { stroke: #adb7c2; } .tip { fill: #adb7c2; }
  }
</style>
<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" orient="auto">
<path class="tip" d="M0 0L10 5L0 10z"/></marker></defs>"""

#: What a box is, and its two lines of text.
Look = Callable[[Node], tuple[str, str, str]]


@dataclass
class Placed:
    """One panel laid out: for each node its row and its column, and the size of the whole in pixels."""

    panel: Panel
    rows: list[int]
    columns: list[float]
    lanes: int = 0

    @property
    def left(self) -> float:
        """Where column 0 has its middle, from the panel's edge."""
        return 12 + LANE * self.lanes + BOX / 2 - COLUMN * min(self.columns)

    @property
    def width(self) -> float:
        return self.left + COLUMN * max(self.columns) + BOX / 2 + 12

    @property
    def height(self) -> float:
        return TITLE + ROW * max(self.rows) + HEIGHT + 12

    def x(self, node: int) -> float:
        return self.left + COLUMN * self.columns[node]

    def y(self, node: int) -> float:
        return TITLE + ROW * self.rows[node] + HEIGHT / 2


def _rows(nodes: Sequence[Node]) -> list[int]:
    """How many steps lie before each; an input stands right above what uses it first."""
    rows: list[int] = []
    for node in nodes:
        rows.append(1 + max((rows[p] for p in node.parents), default=-1))
    for n, node in enumerate(nodes):
        if node.kind == "in":
            rows[n] = min(r for r, other in zip(rows, nodes, strict=True) if n in other.parents) - 1
    return rows


def _apart(wanted: list[float]) -> list[float]:
    """Places at least 1 apart, in the given order, as near to the wanted ones as that allows."""
    groups: list[tuple[float, int]] = []  # middle, members
    for place in wanted:
        groups.append((place, 1))
        while len(groups) > 1:
            (a, m), (b, n) = groups[-2:]
            if b - a >= (m + n) / 2:
                break
            groups[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [middle - (count - 1) / 2 + k for middle, count in groups for k in range(count)]


def _columns(nodes: Sequence[Node], rows: list[int]) -> list[float]:
    columns = [0.0] * len(nodes)
    inputs = [n for n, node in enumerate(nodes) if node.kind == "in"]
    for place, n in enumerate(inputs):
        columns[n] = float(place)
    middle = (len(inputs) - 1) / 2
    for row in range(max(rows) + 1):
        members = [n for n, r in enumerate(rows) if r == row]
        crossing = any(
            rows[p] < row < rows[n] and nodes[p].kind != "in"
            for n, node in enumerate(nodes)
            for p in node.parents
        )
        wanted = {}
        for n in members:
            # What comes in from the side does not move the main line.
            inner = [p for p in nodes[n].parents if nodes[p].kind != "in"] or nodes[n].parents
            above = [columns[p] for p in inner]
            wanted[n] = sum(above) / len(above) if above else columns[n]
            if len(members) == 1 and above and not crossing and len(inputs) == 1:
                wanted[n] = middle  # where branches meet again
        order = sorted(members, key=lambda n: (wanted[n], n))
        for n, place in zip(order, _apart([wanted[n] for n in order]), strict=True):
            columns[n] = place
    return columns


def _free(placed: Placed, column: float, top: int, bottom: int) -> bool:
    """Whether a line down this column meets no box between two rows."""
    return not any(
        top < r < bottom and abs(c - column) * COLUMN < BOX / 2 + 6
        for r, c in zip(placed.rows, placed.columns, strict=True)
    )


def lay_out(panel: Panel) -> Placed:
    rows = _rows(panel.nodes)
    placed = Placed(panel, rows, _columns(panel.nodes, rows))
    for n, node in enumerate(panel.nodes):
        for p in node.parents:
            if not any(_free(placed, placed.columns[k], rows[p], rows[n]) for k in (p, n)):
                placed.lanes = 1
    return placed


def _circle(node: Node) -> bool:
    return node.kind in ("add", "times")


def _path(placed: Placed, parent: int, child: int) -> str:
    """The line from one box to another: straight, with one step aside, or round on the left."""
    nodes, rows, columns = placed.panel.nodes, placed.rows, placed.columns
    x, y, to_x, to_y = placed.x(parent), placed.y(parent), placed.x(child), placed.y(child)
    start = y + (RADIUS if _circle(nodes[parent]) else HEIGHT / 2 if nodes[parent].kind != "in" else 10)
    end = to_y - (RADIUS if _circle(nodes[child]) else HEIGHT / 2)
    side = RADIUS if to_x < x else -RADIUS
    if x == to_x and _free(placed, columns[parent], rows[parent], rows[child]):
        return f"M{x:g} {start:g}V{end:g}"
    if _free(placed, columns[parent], rows[parent], rows[child]):
        if _circle(nodes[child]):
            return f"M{x:g} {start:g}V{to_y:g}H{to_x + side:g}"
        return f"M{x:g} {start:g}V{end - GAP:g}H{to_x:g}V{end:g}"
    if _free(placed, columns[child], rows[parent], rows[child]):
        return f"M{x:g} {start:g}V{start + 6:g}H{to_x:g}V{end:g}"
    lane = placed.left + COLUMN * min(columns) - BOX / 2 - LANE / 2
    if _circle(nodes[child]):
        return f"M{x:g} {start + 6:g}H{lane:g}V{to_y:g}H{to_x - RADIUS:g}"
    return f"M{x:g} {start + 6:g}H{lane:g}V{end - GAP:g}H{to_x:g}V{end:g}"


def _box(placed: Placed, n: int, look: Look) -> list[str]:
    node, x, y = placed.panel.nodes[n], placed.x(n), placed.y(n)
    if _circle(node):
        return [
            f'<circle class="op" cx="{x:g}" cy="{y:g}" r="{RADIUS}"/>',
            f'<text x="{x:g}" y="{y + 5:g}">{node.label}</text>',
        ]
    style, label, note = look(node)
    if style == "in":
        return [f'<text x="{x:g}" y="{y + 4:g}">{escape(label)}</text>']
    lines = [
        f'<rect class="{style}" x="{x - BOX / 2:g}" y="{y - HEIGHT / 2:g}" '
        f'width="{BOX}" height="{HEIGHT}" rx="6"/>'
    ]
    if note:
        lines.append(f'<text x="{x:g}" y="{y - 3:g}">{escape(label)}</text>')
        lines.append(f'<text class="soft" x="{x:g}" y="{y + 13:g}">{escape(note)}</text>')
    else:
        lines.append(f'<text x="{x:g}" y="{y + 4:g}">{escape(label)}</text>')
    return lines


def _draw(placed: Placed, look: Look, title: str, note: str) -> list[str]:
    lines = [
        f'<rect class="panel" width="{placed.width:g}" height="{placed.height:g}" rx="8"/>',
        f'<text class="head" x="12" y="24">{escape(title)}</text>',
    ]
    if note:
        lines.append(f'<text class="soft sub" x="12" y="40">{escape(note)}</text>')
    nodes = placed.panel.nodes
    for n, node in enumerate(nodes):
        lines += [f'<path class="arrow" d="{_path(placed, p, n)}"/>' for p in node.parents]
    for n in range(len(nodes)):
        lines += _box(placed, n, look)
    return lines


def drawing(panels: Sequence[Panel], look: Look, note: Callable[[Panel], str], title: str, about: str) -> str:
    """The panels in their order, each as high up on the page as it fits, and as far to the left."""
    body: list[str] = []
    taken: list[tuple[float, float, float, float]] = []  # left, top, right, bottom
    for placed in map(lay_out, panels):
        spots = []
        for x in (MARGIN, *(right + MARGIN for _, _, right, _ in taken)):
            if x + placed.width + MARGIN <= WIDEST or x == MARGIN:
                above = [b for a, _, c, b in taken if a < x + placed.width + MARGIN and x < c + MARGIN]
                spots.append((max(above, default=0.0) + MARGIN, x))
        y, x = min(spots)
        taken.append((x, y, x + placed.width, y + placed.height))
        body += [
            f'<g transform="translate({x:g} {y:g})">',
            *_draw(placed, look, placed.panel.name, note(placed.panel)),
            "</g>",
        ]
    widest, height = (max(box[k] for box in taken) + MARGIN for k in (2, 3))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {widest:g} {height:g}" '
            f'width="{widest:g}" role="img" '
            f'aria-labelledby="t d" font-family="system-ui, -apple-system, \'Segoe UI\', Roboto, '
            f'\'Noto Sans\', sans-serif" font-size="13">',
            f'<title id="t">{escape(title)}</title>',
            f'<desc id="d">{escape(about)}</desc>',
            STYLE,
            f'<rect class="page" width="{widest:g}" height="{height:g}" rx="10"/>',
            *body,
            "</svg>",
            "",
        ]
    )

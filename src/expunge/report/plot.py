"""Small SVG plots whose colours are the page's own, so that they follow light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from expunge.core.records import Estimate
from expunge.report.words import per_cent

# matplotlib only knows fixed colours: each stands for a CSS variable and is swapped in the finished SVG
INK, SOFT, RULE, BASE, GONE, KEPT = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
CSS = {INK: "--ink", SOFT: "--soft", RULE: "--rule", BASE: "--base", GONE: "--gone", KEPT: "--kept"}
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: searchable, readable aloud, in the page's font
    "svg.hashsalt": "expunge",  # same data, same bytes
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "xtick.color": SOFT,
    "ytick.color": INK,
}
MARKERS = "osD^v"
MARKER_WORDS = ("circle", "square", "diamond", "triangle", "inverted triangle")


def rate_plot(title: str, rows: Sequence[tuple[str, str, Estimate]], *, tone: str) -> str:
    """Plot one rate as dots with intervals: one line per arm, one marker per detector.

    rows: (arm, detector, estimate) with rates in [0, 1]; tone: the colour of every arm but base.
    """
    arms = list(dict.fromkeys(arm for arm, _, _ in rows))
    detectors = list(dict.fromkeys(detector for _, detector, _ in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.7, 0.72 + 0.42 * len(arms)), layout="constrained")
        axes = figure.add_subplot()
        for arm, detector, estimate in rows:
            row, mark = arms.index(arm), detectors.index(detector)
            height = row + 0.22 * (mark - (len(detectors) - 1) / 2)
            _dot(axes, estimate, height, color=BASE if arm == "base" else tone, marker=MARKERS[mark % len(MARKERS)])
        _frame(axes, arms)
        return svg(figure, title, _spoken(title, rows))


def layer_plot(layers: Mapping[str, float], label: str) -> str:
    """Plot where a change sits: the largest relative change ‖W′ − W‖ / ‖W‖ per block of the network, in its order."""
    blocks = by_block(layers)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 0.4 + 0.26 * len(blocks)), layout="constrained")
        axes = figure.add_subplot()
        axes.barh(range(len(blocks)), list(blocks.values()), height=0.62, color=GONE)
        axes.set_yticks(range(len(blocks)), list(blocks))
        axes.invert_yaxis()
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(axis="both", length=0)
        axes.set_xticks([])
        top = max(blocks.values(), default=0) or 1.0
        axes.set_xlim(0, top * 1.25)
        for row, value in enumerate(blocks.values()):
            axes.text(value + top * 0.015, row, per_cent(value), va="center", color=SOFT, size=9.5)
        return svg(figure, label, "; ".join(f"{block}: {per_cent(value)}" for block, value in blocks.items()))


def by_block(layers: Mapping[str, float]) -> dict[str, float]:
    """Return the largest relative change per block, blocks in the order the image passes them."""
    found: dict[str, float] = {}
    for path, change in layers.items():
        block = _block(path)
        found[block] = max(change, found.get(block, 0.0))
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def svg(figure: Figure, title: str, description: str) -> str:
    """Return a figure as inline SVG: scalable, described for screen readers, coloured by the page's variables."""
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = re.sub(r"\A.*?(?=<svg)", "", text, flags=re.DOTALL)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", text)
    for fixed, variable in CSS.items():
        text = text.replace(fixed, f"var({variable})")
    label = f"{title}. {description}".replace("&", "and").replace('"', "'").replace("<", "under ")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _dot(axes: Axes, estimate: Estimate, height: float, *, color: str, marker: str) -> None:
    axes.plot([estimate.low, estimate.high], [height, height], color=color, linewidth=2.2, solid_capstyle="round")
    axes.plot([estimate.value], [height], marker=marker, markersize=7, color=color, linestyle="none")


def _frame(axes: Axes, arms: Sequence[str]) -> None:
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(len(arms) - 0.45, -0.55)
    axes.set_yticks(range(len(arms)), arms)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(axis="both", length=0)


def _spoken(title: str, rows: Sequence[tuple[str, str, Estimate]]) -> str:
    return "; ".join(
        f"{arm} by {detector}: {100 * e.value:.0f} %, interval {100 * e.low:.0f} to {100 * e.high:.0f}"
        for arm, detector, e in rows
    )


def _block(path: str) -> str:
    parts = path.split(".")
    component, rest = parts[0], parts[1:]
    if rest and rest[0] in ("down_blocks", "up_blocks", "transformer_blocks", "single_transformer_blocks"):
        return f"{rest[0].removesuffix('_blocks')} {rest[1]}"
    if rest and rest[0] == "mid_block":
        return "middle"
    return component if component != "unet" else f"{component} {rest[0]}" if rest else component


def _order(block: str) -> tuple[int, str]:
    stages = ("text", "unet conv_in", "unet time", "down", "middle", "up", "unet conv_norm_out", "unet conv_out")
    return next((n for n, stage in enumerate(stages) if block.startswith(stage)), len(stages)), block

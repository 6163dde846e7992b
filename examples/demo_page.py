"""The demo's report: one HTML page without any file beside it, and the charts and pictures in it."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import jinja2
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from tools.drawing import chart

INK = "#123456"  # stands for the page's text colour, which is another one in the dark
BLUE, ORANGE = "#56b4e9", "#d55e00"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "apt",  # the same chart is the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def render(page: dict) -> str:
    """The page as HTML; ``page`` has what demo_page.html names."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("demo_page.html").render(page)


def data_uri(image: Image.Image, quality: int = 82) -> str:
    """A picture as the source of an <img>."""
    content = io.BytesIO()
    image.convert("RGB").save(content, "JPEG", quality=quality, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def training_curve(steps: Sequence[int], losses: Sequence[float]) -> str:
    """SVG of a loss: as it was logged, and a running mean of a fifth of it."""
    width = max(1, len(losses) // 5)
    means = [sum(losses[max(0, i + 1 - width) : i + 1]) / (i + 1 - max(0, i + 1 - width)) for i in range(len(losses))]
    with rc_context(STYLE):
        figure, axes = chart((4.8, 3))
        axes.plot(steps, losses, color=BLUE, alpha=0.6, linewidth=1, label="loss")
        axes.plot(steps, means, color=ORANGE, linewidth=2, label=f"mean of the last {width}")
        axes.set(xlabel="iteration", ylabel="loss", ylim=(0, None))
        axes.legend(frameon=False)
        return svg(figure)


def share_histogram(shares: Sequence[float], budget: float) -> str:
    """SVG of how many images keep which share of their tokens."""
    with rc_context(STYLE):
        figure, axes = chart((4.8, 3))
        axes.hist([100 * share for share in shares], bins=range(0, 101, 5), color=BLUE, edgecolor="none", rwidth=0.9)
        axes.axvline(100 * budget, color=ORANGE, linewidth=2, label=f"budget: {budget:.0%} on average")
        axes.set(xlabel="tokens kept, % of an image's", ylabel="images", xlim=(0, 100))
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, loc="upper left")
        return svg(figure)


def svg(figure: Figure) -> str:
    """A figure as an <svg> element that is as wide as its place and drawn in the page's text colour."""
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    text = content.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    head, _, body = text.partition(">")
    head = " ".join(part for part in head.split() if not part.startswith(("width=", "height=")))
    return f"{head}>{body}"

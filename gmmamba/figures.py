"""Pictures of slides, and what all pictures share: data URIs, so that a page needs no other file, style and colours.

Colours are Okabe and Ito's, which colour-blind people can tell apart; wherever a colour says something, a number or a
title says it too.
"""

import base64
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
HEAT = mpl.colormaps["viridis"]
_BRIGHT = np.array([mpl.colors.to_rgb(colour) for colour in OKABE_ITO]) * 255
GROUP_COLOURS = np.rint(np.concatenate([_BRIGHT, _BRIGHT / 2])).astype(np.uint8)  # (14, 3) RGB, in turn
PANEL_PX = 560  # width of a slide's picture; shown at about half, so that it is sharp when printed

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "svg.fonttype": "path",  # letters as shapes: the same on every machine
    "svg.hashsalt": "gmmamba",  # the same ids, so the same page, every time
}


def svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _data_uri("image/svg+xml", buffer.getvalue())


def jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=85)
    return _data_uri("image/jpeg", buffer.getvalue())


def _data_uri(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def colour_of(index: int) -> str:
    return OKABE_ITO[index % len(OKABE_ITO)]


class SlidePictures:
    """Draws one slide's thumbnail, and values of its patches on it.

    thumbnail: JPEG of the whole slide. coords (N, 2): (x, y) of the top-left corners, level-0 pixels; patch_px_level0:
    the side of a patch, level0_width: the width of the slide, level-0 pixels.
    """

    def __init__(self, thumbnail: Path, coords: np.ndarray, patch_px_level0: float, level0_width: int) -> None:
        picture = Image.open(thumbnail).convert("RGB")
        self.plain = picture.resize((PANEL_PX, max(1, round(picture.height * PANEL_PX / picture.width))))
        grey = np.asarray(self.plain.convert("L").convert("RGB"), dtype=np.float32)
        self.backdrop = 255 - (255 - grey) * 0.7  # paler, so that the colours stand out
        scale = PANEL_PX / level0_width
        self.corners = np.floor(coords * scale).astype(int)
        self.ends = np.ceil((coords + patch_px_level0) * scale).astype(int)

    def paint(self, colours: np.ndarray, opacity: np.ndarray) -> Image.Image:
        """The slide in grey with patch i in colours[i] (N, 3; 0..255) at opacity[i] (N,; 0..1)."""
        canvas = self.backdrop.copy()
        for (left, top), (right, bottom), colour, share in zip(self.corners, self.ends, colours, opacity, strict=True):
            window = canvas[top:bottom, left:right]
            window += (colour - window) * share
        return Image.fromarray(canvas.round().astype(np.uint8))

    def groups(self, labels: np.ndarray) -> Image.Image:
        """Each group (labels (N,) int) in a colour, its number at its centre."""
        image = self.paint(GROUP_COLOURS[labels % len(GROUP_COLOURS)].astype(float), np.full(len(labels), 0.6))
        draw = ImageDraw.Draw(image)
        font = ImageFont.load_default(size=22)
        for label in np.unique(labels):
            members = labels == label
            middle = (self.corners[members].mean(axis=0) + self.ends[members].mean(axis=0)) / 2
            draw.text(
                (float(middle[0]), float(middle[1])), str(label + 1), fill="black", font=font, anchor="mm",
                stroke_width=3, stroke_fill="white",
            )  # fmt: skip
        return image

    def attention(self, attention: np.ndarray) -> Image.Image:
        """The attention (N,) relative to the patch that has most; patches masked away (0) stay grey."""
        relative = attention / attention.max()
        return self.paint(HEAT(relative)[:, :3] * 255, np.where(attention > 0, 0.75, 0.0))

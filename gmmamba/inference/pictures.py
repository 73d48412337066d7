"""Maps of a slide's patches over its thumbnail, as pictures.

Values without sign (attention) go from dark to bright (viridis); contributions from blue (against the class) over white
(nothing) to orange (for it), which colour-blind people can tell apart. Every picture has its scale in words.
"""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from gmmamba.figures import GROUP_COLOURS

VIRIDIS = mpl.colormaps["viridis"]
DIVERGING = LinearSegmentedColormap.from_list("blue-white-orange", ["#0072B2", "#FFFFFF", "#D55E00"])
BAND, MARGIN = 46, 12  # px below a picture for its scale


def attention_colours(relative: NDArray[np.float64]) -> tuple[NDArray[np.uint8], float]:
    """RGB (N, 3) of attention, and the value of the brightest; values (N,) >= 0."""
    top = float(relative.max()) or 1.0
    return _rgb(VIRIDIS(relative / top)), top


def contribution_colours(values: NDArray[np.float64]) -> tuple[NDArray[np.uint8], float]:
    """RGB (N, 3) of contributions (N,), and the absolute value of the fullest colours."""
    top = float(np.abs(values).max()) or 1.0
    return _rgb(DIVERGING(0.5 + values / (2 * top))), top


def _rgb(rgba: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.rint(rgba[:, :3] * 255).astype(np.uint8)


def group_colour(label: int) -> tuple[int, int, int]:
    red, green, blue = GROUP_COLOURS[label % len(GROUP_COLOURS)].tolist()
    return red, green, blue


class SlideMap:
    """Paints patches on a slide's thumbnail.

    thumbnail: picture of the whole slide. coords (N, 2): (x, y) of the top-left corners, patch_px_level0 the side of a
    patch, level0_width the width of the slide, all in level-0 pixels.
    """

    def __init__(self, thumbnail: Path, coords: NDArray[np.int32], patch_px_level0: float, level0_width: int) -> None:
        picture = Image.open(thumbnail).convert("RGB")
        grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
        self.backdrop = 255 - (255 - grey) * 0.7  # paler, so that the colours stand out
        scale = picture.width / level0_width
        self.corners = np.floor(coords * scale).astype(int)
        self.ends = np.maximum(np.ceil((coords + patch_px_level0) * scale).astype(int), self.corners + 1)

    def paint(self, colours: NDArray[np.uint8], opacity: NDArray[np.float64]) -> Image.Image:
        """The slide in grey with patch i in colours[i] at opacity[i] (N,), 0 to 1; where patches overlap, the mean."""
        total = np.zeros((*self.backdrop.shape[:2], 4), np.float32)
        count = np.zeros(self.backdrop.shape[:2], np.float32)
        for (left, top), (right, bottom), colour, share in zip(self.corners, self.ends, colours, opacity, strict=True):
            total[top:bottom, left:right] += (*colour, share)
            count[top:bottom, left:right] += 1
        colour, share = np.split(total / np.maximum(count, 1)[..., None], [3], axis=2)
        return Image.fromarray((self.backdrop + (colour - self.backdrop) * share).round().astype(np.uint8))

    def attention(self, relative: NDArray[np.float64], title: str) -> Image.Image:
        """relative (N,): attention as a multiple of the mean patch's; what has none stays grey."""
        colours, top = attention_colours(relative)
        painted = self.paint(colours, np.where(relative > 0, 0.75, 0.0))
        return _with_scale(painted, title, VIRIDIS, ("0", f"{top:.3g} times the mean patch"))

    def contribution(self, values: NDArray[np.float64], name: str, title: str) -> Image.Image:
        """values (N,): log-odds of the class `name`, or what each patch adds to them."""
        colours, top = contribution_colours(values)
        painted = self.paint(colours, 0.25 + 0.65 * np.abs(values) / top)
        return _with_scale(painted, title, DIVERGING, (f"against {name}: -{top:.3g}", f"for {name}: +{top:.3g}"))

    def groups(
        self, labels: NDArray[np.int64], importance: dict[int, float], kept: NDArray[np.float64] | None, title: str
    ) -> Image.Image:
        """Each group (labels (N,)) in a colour, with its number and, if known, its importance in percent; the less of
        the models keep a patch (kept (N,), 0 to 1), the paler it is."""
        palette = np.array([group_colour(label) for label in range(labels.max() + 1)], np.uint8)
        image = self.paint(palette[labels], np.full(len(labels), 0.6) if kept is None else 0.15 + 0.45 * kept)
        draw = ImageDraw.Draw(image)
        for label in np.unique(labels):
            members = labels == label
            x, y = (self.corners[members].mean(axis=0) + self.ends[members].mean(axis=0)) / 2
            text = f"{label + 1}" + (f"\n{importance[label]:.0%}" if label in importance else "")
            draw.multiline_text((x, y), text, fill="black", font=_font(18), anchor="mm", align="center",
                                stroke_width=3, stroke_fill="white")  # fmt: skip
        return _with_scale(image, title, None, ("", ""))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _with_scale(
    image: Image.Image, title: str, colours: mpl.colors.Colormap | None, ends: tuple[str, str]
) -> Image.Image:
    """The picture with its title and its scale of colours below, as wide as the text needs."""
    font = _font(14)
    bar = 160
    lengths = [ImageDraw.Draw(image).textlength(text, font=font) for text in (*ends, title)]
    needed = max(int(lengths[0] + lengths[1]) + bar + 4 * MARGIN, int(lengths[2]) + 2 * MARGIN)
    whole = Image.new("RGB", (max(image.width, needed), image.height + BAND), "white")
    whole.paste(image, ((whole.width - image.width) // 2, 0))
    draw = ImageDraw.Draw(whole)
    draw.text((MARGIN, image.height + 4), title, fill="black", font=font)
    if colours is not None:
        top, left = image.height + 25, 2 * MARGIN + int(lengths[0])
        ramp = np.rint(colours(np.linspace(0, 1, bar))[None, :, :3] * 255).astype(np.uint8).repeat(14, axis=0)
        whole.paste(Image.fromarray(ramp), (left, top))
        draw.rectangle((left, top, left + bar - 1, top + 13), outline="black")
        draw.text((MARGIN, top - 2), ends[0], fill="black", font=font)
        draw.text((left + bar + MARGIN, top - 2), ends[1], fill="black", font=font)
    return whole

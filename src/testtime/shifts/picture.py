"""A page that shows corruptions: a row each, the five severities beside one another."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from testtime.shifts.corruptions import CORRUPTIONS, Corruption, Table

if TYPE_CHECKING:
    from PIL.Image import Image

# Smaller images are shown with whole multiples of their pixels, at least this wide.
SHOWN_SIDE = 96


def picture(
    image: Tensor,
    names: Iterable[str] = CORRUPTIONS,
    *,
    seed: int = 0,
    table: Table | None = None,
    textures: str | None = None,
) -> "Image":
    """Draw one image under every corruption at five severities, labelled.

    Args:
        image: ``[3, H, W]`` in [0, 1], H and W at least 16.
        names: the corruptions, a row each; the clean image is the first of every row.
        seed: of the draws; they are the same whatever the other rows are.
        table: whose constants to use, see ``Corruption``.
        textures: where those of frost come from, see ``Corruption``. Its label says which served.

    Returns:
        A page of Pillow; ``page.save("OUT.png")`` writes it.

    Raises:
        ValueError, TypeError: as ``corrupt``; there are no names.
        ImportError: pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError("A picture needs pillow: pip install 'testtime[data]'.") from error
    names = list(names)
    if not names:
        raise ValueError("A picture needs at least one corruption, found none; name one.")
    rows = []
    for name in names:
        given = textures if name == "frost" else None
        severities = [Corruption(name, s, table, cut=True, textures=given) for s in range(1, 6)]
        generator = torch.Generator(image.device)
        shown = [image, *(one(image, generator.manual_seed(seed)) for one in severities)]
        record = severities[0].record(*image.shape[1:])
        rows.append((_label(name, record.get("textures")), shown))

    factor = max(1, -(-SHOWN_SIDE // min(image.shape[1:])))
    height, width = (factor * side for side in image.shape[1:])
    font = ImageFont.load_default(size=14)
    margin = 12 + max(int(font.getlength(line)) for label, _ in rows for line in label.split("\n"))
    head, gap = 26, 4
    page_size = margin + 6 * (width + gap), head + len(rows) * (height + gap)
    page = Image.new("RGB", page_size, "white")
    pen = ImageDraw.Draw(page)
    for column, title in enumerate(["clean", *map(str, range(1, 6))]):
        middle = margin + column * (width + gap) + width // 2
        pen.text((middle, head // 2), title, "black", font, anchor="mm")
    for row, (label, shown) in enumerate(rows):
        top = head + row * (height + gap)
        pen.multiline_text((6, top + height // 2), label, "black", font, anchor="lm")
        for column, one in enumerate(shown):
            levels = (255 * one).round().byte().permute(1, 2, 0).contiguous().cpu()
            size = (levels.shape[1], levels.shape[0])
            tile = Image.frombytes("RGB", size, bytes(levels.flatten().tolist()))
            tile = tile.resize((width, height), Image.Resampling.NEAREST)
            page.paste(tile, (margin + column * (width + gap), top))
    return page


def _label(name: str, textures: str | None) -> str:
    words = name.replace("_", "\n")
    return f"{words}\n({textures})" if textures else words

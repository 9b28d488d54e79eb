"""AugMix by Pillow, in 8 bits and on the host: the authors' code of MEMO to the last level."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from testtime.adaptation.views.augmix import OPERATIONS, WIDTH, Mixtures


def chains(x: Tensor, drawn: Mixtures) -> tuple[Tensor, Tensor]:
    """Return what ``chains`` does, by Pillow in 8 bits; what lies beyond is (128, 0, 0), dark red.

    The authors give Pillow the colour 128, meant as a grey, which it takes as that of three bytes.

    Raises:
        ImportError: there is no Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Augmentations in Pillow need it: pip install 'testtime[data]'."
        ) from error
    levels = (255 * x.detach().clamp(0, 1)).round().to(torch.uint8).permute(0, 2, 3, 1)
    pictures = [Image.fromarray(picture) for picture in levels.cpu().numpy()]
    plain, ends = [], []
    for view in range(len(drawn.shares)):
        cropped = [_crop(p, drawn.boxes[view].tolist(), bool(drawn.flips[view])) for p in pictures]
        plain.append(cropped)
        ends.append([[_chain(p, drawn, view, k) for p in cropped] for k in range(WIDTH)])
    return _images(plain, x), _images(ends, x)


def _images(pictures: Any, x: Tensor) -> Tensor:
    if not isinstance(pictures, list):
        levels = torch.frombuffer(bytearray(pictures.tobytes()), dtype=torch.uint8)
        shaped = levels.view(*x.shape[-2:], 3).permute(2, 0, 1)
        return shaped.to(device=x.device, dtype=x.dtype) / 255
    return torch.stack([_images(picture, x) for picture in pictures])


def _crop(picture: Any, box: list[float], flip: bool) -> Any:
    from PIL import Image

    top, left, height, width = map(int, box)
    part = picture.crop((left, top, left + width, top + height))  # black beyond the picture
    if part.size != picture.size:
        part = part.resize(picture.size, Image.Resampling.BILINEAR)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else part


def _chain(picture: Any, drawn: Mixtures, view: int, chain: int) -> Any:
    rows = (drawn.operations, drawn.levels, drawn.negative)
    for operation, level, negative in zip(*(t[view, chain].tolist() for t in rows), strict=True):
        if operation >= 0:
            picture = _in_pillow(OPERATIONS[operation], picture, level, -1 if negative else 1)
    return picture


def _in_pillow(name: str, picture: Any, level: float, sign: int) -> Any:
    from PIL import Image, ImageOps

    kind, _, axis = name.partition("_")
    if kind == "rotate":
        degrees = sign * int(3 * level)
        return picture.rotate(degrees, resample=Image.Resampling.BILINEAR, fillcolor=128)
    if kind in ("shear", "translate"):
        side = picture.size[axis == "y"]
        value = sign * (0.03 * level if kind == "shear" else int(level * side / 30))
        place = {"shear": {"x": 1, "y": 3}, "translate": {"x": 2, "y": 5}}[kind][axis]
        matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        matrix[place] = value
        return picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            matrix,
            resample=Image.Resampling.BILINEAR,
            fillcolor=128,
        )
    pointwise: dict[str, Callable[[], Any]] = {
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
        "solarize": lambda: ImageOps.solarize(picture, 256 - int(25.6 * level)),
        "posterize": lambda: ImageOps.posterize(picture, 4 - int(0.4 * level)),
    }
    return pointwise[name]()

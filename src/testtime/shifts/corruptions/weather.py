"""Weather: snow, frost and fog."""

import torch
from torch import Tensor

from testtime.shifts.corruptions.filters import LUMINANCE, clipped_zoom, cut, motion_filter
from testtime.shifts.corruptions.noise import Draws, Random, integers, normals, uniforms
from testtime.shifts.corruptions.textures import textures_for


def draw_snow(x: Tensor, *constants: float, generator: Random) -> Draws:
    """Draw a standard normal for each pixel, and in which direction it snows, in degrees."""
    batch, _, height, width = x.shape
    flakes = normals((batch, height, width), x, generator)
    return flakes, 90 * uniforms((batch,), x, generator) - 135


def snow(
    x: Tensor,
    mean: float,
    deviation: float,
    zoom: float,
    threshold: float,
    radius: float,
    sigma: float,
    weight: float,
    noise: Tensor,
    degrees: Tensor,
) -> Tensor:
    """Whiten the image, and add flakes with trails; the same flakes twice, once turned around."""
    flakes = (mean + deviation * noise)[:, None]
    if zoom > 1:
        flakes = clipped_zoom(flakes, zoom)
    flakes = cut(torch.where(flakes < threshold, 0, flakes).clamp_(0, 1)).div_(255)
    flakes = motion_filter(flakes, radius, sigma, degrees)
    flakes += flakes.rot90(2, dims=(2, 3))
    white = 1.5 * luminance(x) + 0.5
    return (weight * x + (1 - weight) * torch.maximum(x, white)).add_(flakes).clamp_(0, 1)


def luminance(x: Tensor) -> Tensor:
    """Return the grey image ``[B, 1, H, W]``."""
    red, green, blue = (weight * x[:, c, None] for c, weight in enumerate(LUMINANCE))
    return red + green + blue


def draw_frost(
    x: Tensor,
    image_weight: float,
    frost_weight: float,
    shrink: int,
    generator: Random,
    textures: str | None = None,
) -> Draws:
    """Draw a window of one of the five textures for each image.

    Args:
        x: the images.
        image_weight: not used.
        frost_weight: not used.
        shrink: every which pixel of the textures is taken.
        generator: of the draws.
        textures: where the textures come from, as for ``corrupt``.
    """
    batch, _, height, width = x.shape
    sheet = textures_for(textures, shrink, height, width, x.device)
    which = integers(len(sheet.heights), (batch,), x, generator)
    top, left = uniforms((2, batch), x, generator)
    row = (top * (sheet.heights[which] - height)).long()
    column = (left * (sheet.widths[which] - width)).long()
    first = sheet.starts[which] + row * sheet.widths[which] + column
    down = sheet.widths[which, None] * torch.arange(height, device=x.device)
    pixels = (first[:, None] + down)[..., None] + torch.arange(width, device=x.device)
    return (sheet.levels[:, pixels].transpose(0, 1),)


def frost(
    x: Tensor, image_weight: float, frost_weight: float, shrink: int, texture: Tensor
) -> Tensor:
    """Mix in a photograph of frost; texture is ``[B, 3, H, W]`` in levels from 0 to 255."""
    return torch.add(image_weight * x, texture, alpha=frost_weight / 255).clamp_(0, 1)


def draw_fog(x: Tensor, amount: float, decay: float, generator: Random) -> Draws:
    """Draw uniforms in (-1, 1) for the plasma maps, coarse to fine.

    One array [3, B, n, n] for each of n = 1, 2, 4, ... up to half the side of the map: centres of
    the squares, then both kinds of diamonds. The side is the next power of two that holds an image.
    """
    draws = []
    n = 1
    while n < max(x.shape[-2:]):
        draws.append(uniforms((3, len(x), n, n), x, generator).mul_(2).sub_(1))
        n *= 2
    return tuple(draws)


def fog(x: Tensor, amount: float, decay: float, *displacements: Tensor) -> Tensor:
    """Mix in a plasma map, and darken until the brightest value of the image is what it was."""
    height, width = x.shape[-2:]
    haze = plasma(decay, *displacements)[:, None, :height, :width]
    brightest = x.amax(dim=(1, 2, 3), keepdim=True)
    return torch.add(x, haze, alpha=amount).mul_(brightest / (brightest + amount)).clamp_(0, 1)


def plasma(decay: float, *displacements: Tensor) -> Tensor:
    """Build maps [B, S, S] that span [0, 1] from the draws of fog: diamond-square on a torus.

    Each level halves the step between the points known. It displaces the new ones by up to the
    square of a scale that starts at 100 and is divided by decay.
    """
    points = torch.zeros_like(displacements[0][0])
    scale = 100.0
    for at_centres, at_rights, at_belows in displacements:
        right, below = points.roll(-1, dims=2), points.roll(-1, dims=1)
        corners = points + right + below + right.roll(-1, dims=1)
        centres = corners / 4 + scale**2 * at_centres
        above, left = centres.roll(1, dims=1), centres.roll(1, dims=2)
        rights = (points + right + centres + above) / 4 + scale**2 * at_rights
        belows = (points + below + centres + left) / 4 + scale**2 * at_belows
        even_rows = torch.stack([points, rights], dim=3).flatten(2)
        odd_rows = torch.stack([belows, centres], dim=3).flatten(2)
        points = torch.stack([even_rows, odd_rows], dim=2).flatten(1, 2)
        scale /= decay
    lowest, highest = points.amin(dim=(1, 2), keepdim=True), points.amax(dim=(1, 2), keepdim=True)
    return points.sub_(lowest).div_(highest - lowest)

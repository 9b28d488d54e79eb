"""The page of corruptions."""

import pytest
import torch

from testtime.shifts import corrupt
from testtime.shifts.picture import picture

IMAGE = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))


def pixels(page):
    return torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).view(
        page.height, page.width, 3
    )


def test_the_images_are_there_at_five_severities():
    page = pixels(picture(IMAGE, ["contrast"]))
    # 20 x 30 pixels are shown five times as large; the tiles end 4 pixels before the right edge.
    for severity in range(1, 6):
        expected = corrupt(IMAGE[None], "contrast", severity, cut=True)[0]
        left = page.shape[1] - 154 * (6 - severity)
        tile = page[26 : 26 + 100 : 5, left : left + 150 : 5].permute(2, 0, 1)
        assert torch.equal(tile, (255 * expected).round().byte())


def test_a_row_does_not_depend_on_the_others():
    both = pixels(picture(IMAGE, ["fog", "gaussian_noise"]))
    alone = pixels(picture(IMAGE, ["gaussian_noise"]))
    assert torch.equal(both[-104:, -924:], alone[-104:, -924:])


def test_textures_are_named():
    made = pixels(picture(IMAGE, ["frost"], textures="procedural"))
    plain = pixels(picture(IMAGE, ["fog"]))
    assert made.shape[1] > plain.shape[1]  # "(procedural)" takes more room than "fog"


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="at least one corruption"):
        picture(IMAGE, [])
    with pytest.raises(ValueError, match="Did you mean 'frost'"):
        picture(IMAGE, ["forst"])

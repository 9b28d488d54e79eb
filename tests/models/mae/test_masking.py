"""What is hidden and what is predicted, worked out by hand."""

import pytest
import torch

from testtime.models.mae import (
    keep_count,
    masked_loss,
    masking,
    patchify,
    resize_table,
    sincos_table,
    targets,
    unpatchify,
)
from testtime.models.mae.masking import grid_of, require_both


def test_patches_lie_row_by_row_and_the_channel_runs_fastest() -> None:
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float64).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for patch, (top, left) in enumerate((r, c) for r in (0, 2) for c in (0, 2, 4)):
        expected = images[:, :, top : top + 2, left : left + 2].permute(0, 2, 3, 1).flatten(1)
        assert torch.equal(patches[:, patch], expected)
    assert torch.equal(unpatchify(patches, 2, (2, 3)), images)


def test_a_masking_is_its_order_cut_in_two() -> None:
    order = torch.tensor([[2, 0, 3, 1], [1, 2, 0, 3]])
    hidden = masking(order, 1)
    assert hidden.keep.tolist() == [[2], [1]]
    assert hidden.mask.tolist() == [[True, True, False, True], [True, False, True, True]]
    shuffled = torch.stack([row[o] for row, o in zip(torch.arange(8).view(2, 4), order)])  # noqa: B905
    assert torch.equal(shuffled.gather(1, hidden.restore), torch.arange(8).view(2, 4))


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(196, 0.75, 49), (100, 0.9, 9), (10, 0.9, 0)]
)
def test_the_kept_count_is_truncated(patches: int, ratio: float, kept: int) -> None:
    assert keep_count(patches, ratio) == kept


@pytest.mark.parametrize(
    ("ratio", "said"), [(0.0, "hides none"), (1.0, "hides all"), (0.99, "all")]
)
def test_a_mask_needs_both_kinds(ratio: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        require_both(16, ratio)


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan")])
def test_a_ratio_is_a_share(ratio: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        keep_count(16, ratio)


def test_an_order_has_a_row_an_image() -> None:
    with pytest.raises(ValueError, match=r"shape is \[4\].*\[1, L\]"):
        masking(torch.arange(4), 2)


@pytest.mark.parametrize(
    ("size", "patch"), [((30, 32), 4), ((32, 30), 4), ((4, 4), 8), ((4, 4), 0)]
)
def test_patches_divide_the_image(size: tuple[int, int], patch: int) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        grid_of(size, patch)


def test_normalised_targets_are_patch_by_patch_with_the_unbiased_variance() -> None:
    patches = torch.tensor([[[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]]], dtype=torch.float64)
    target = targets(patches, normalised=True)
    root = (14 / 3 + 1e-6) ** 0.5
    expected = torch.tensor([-2, -1, 0, 3], dtype=torch.float64) / root
    torch.testing.assert_close(target[0, 0], expected, rtol=1e-14, atol=0)
    assert target[0, 1].tolist() == [0, 0, 0, 0]
    assert targets(patches, normalised=False) is patches


def test_every_hidden_patch_counts_the_same() -> None:
    prediction = torch.zeros(2, 3, 2)
    target = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1).expand(2, 3, 2)
    mask = torch.tensor([[1, 1, 1], [0, 0, 1]])
    assert masked_loss(prediction, target, mask).item() == pytest.approx((1 + 4 + 9 + 9) / 4)


def test_the_column_comes_first_in_a_table() -> None:
    table = sincos_table(8, 2, 3)
    assert table.shape == (7, 8)
    assert table[0].abs().max() == 0
    # The patch in row 1, column 2; frequencies 1 and 1/100.
    angles = torch.tensor([2, 0.02, 1, 0.01], dtype=torch.float64).view(2, 2)
    expected = torch.stack([angles.sin(), angles.cos()], 1).flatten()
    torch.testing.assert_close(table[1 + 3 + 2], expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("dim", "grid", "said"), [(6, 2, "divisible by 4"), (8, 0, "Give a grid")])
def test_tables_that_cannot_be(dim: int, grid: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sincos_table(dim, grid, grid)


def test_resizing_keeps_the_prefix_and_refuses_another_grid() -> None:
    table = torch.rand(1, 2 + 6, 4)
    resized = resize_table(table, (2, 3), (4, 6), prefix=2)
    assert resized.shape == (1, 26, 4)
    assert torch.equal(resized[:, :2], table[:, :2])
    with pytest.raises(ValueError, match="Give the grid"):
        resize_table(table, (2, 3), (4, 6))

"""Data that were read: what they hold, which are taken, what is said about them."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from testtime.shifts import Data

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
DATA = Data("six", IMAGES, torch.arange(6), "abc", timestamps=torch.arange(6).double())


class Lazy:
    """Samples that note which were asked for."""

    def __init__(self, images):
        self.images, self.asked = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked += index
        return self.images[index]


def test_samples_are_read_when_they_are_asked_for():
    lazy = Lazy(IMAGES)
    data = Data("lazy", lazy, torch.arange(6), "")
    taken = data.take([4, 2])
    assert lazy.asked == []
    assert torch.equal(taken[1][0], IMAGES[2])
    assert lazy.asked == [2]
    assert torch.equal(taken.load().samples, IMAGES[[4, 2]])
    assert torch.equal(data.images, IMAGES)
    assert data.images is data.images


def test_a_loop_over_data_ends():
    assert [label for _, label in DATA] == [0, 1, 2, 3, 4, 5]
    assert DATA[-1][1] == 5
    with pytest.raises(IndexError, match="six has 6 samples, there is no number 6"):
        DATA[6]


def test_a_loader_takes_them():
    (images, labels), _ = DataLoader(DATA, batch_size=4)
    assert torch.equal(images, IMAGES[:4])
    assert labels.tolist() == [0, 1, 2, 3]


def test_taken_by_mask_or_index():
    taken = DATA.take(DATA.labels > 3)
    assert taken.labels.tolist() == [4, 5]
    assert taken.timestamps.tolist() == [4, 5]
    assert taken.fingerprint() == DATA.take([4, 5]).fingerprint()
    assert taken.fingerprint() != DATA.take([5, 4]).fingerprint()
    with pytest.raises(IndexError):
        DATA.take([6])


def test_the_fingerprint_is_plain():
    assert json.loads(json.dumps(DATA.fingerprint())) == {
        "name": "six",
        "count": 6,
        "order": "as stored",
        "sha256": "abc",
        "sha256_of": "file",
        "preprocessing": "none",
    }


@pytest.mark.parametrize(
    ("images", "labels", "error", "said"),
    [
        (IMAGES, torch.arange(5), ValueError, r"6 samples but labels of shape \[5\]"),
        (IMAGES, torch.arange(6.0), TypeError, "labels of bad are torch.float32. Give integers"),
        (IMAGES[:0], torch.arange(0), ValueError, "bad has no samples"),
    ],
)
def test_what_does_not_fit_is_refused(images, labels, error, said):
    with pytest.raises(error, match=said):
        Data("bad", images, labels, "")


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="groups of shape"):
        Data("bad", IMAGES, torch.arange(6), "", groups=torch.arange(3))

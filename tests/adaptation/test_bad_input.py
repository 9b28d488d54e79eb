"""What cannot work is refused with a sentence, before anything changes."""

import pytest
import torch

import testtime as tt
from testtime.models.tiny import tiny

CONV, _ = tiny("batchnorm2d")
IMAGES = tiny("batchnorm2d")[1][0]


def unchanged(adapted, before):
    now = adapted.snapshot()
    assert now.batch == before.batch
    for path, tensor in now.tensors().items():
        assert torch.equal(tensor, before.tensors()[path]), path


def refused(adapted, x, error, *words, **kwargs):
    before = adapted.snapshot()
    with pytest.raises(error) as caught:
        adapted(x, **kwargs)
    for word in words:
        assert word in str(caught.value)
    unchanged(adapted, before)


def test_one_row_where_statistics_need_more():
    model, batches = tiny("batchnorm1d")
    adapted = tt.adapt(model, "tent")
    adapted(batches[0])
    refused(adapted, batches[0][:1], ValueError, "Tent", "one value a channel", "larger batches")

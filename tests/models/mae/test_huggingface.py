"""transformers opens what is written here, and gives the same numbers."""

from pathlib import Path

import pytest
import torch

from testtime.models.mae import MAE, Sizes, load_mae, save_mae
from testtime.models.mae.huggingface import to_huggingface


@pytest.mark.parametrize("normalised", [False, True])
def test_transformers_reads_what_is_written_and_is_read(tmp_path: Path, normalised: bool) -> None:
    from transformers import ViTMAEForPreTraining

    torch.manual_seed(0)
    mae = MAE(16, 4, Sizes(16, 2, 4), Sizes(8, 1, 2), normalised=normalised)
    for parameter in mae.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    mae.double()
    save_mae(mae, tmp_path, "huggingface")
    theirs = ViTMAEForPreTraining.from_pretrained(tmp_path, dtype=torch.float64).eval()
    noise = torch.rand(2, 16, dtype=torch.float64)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    out, made = theirs(x, noise=noise), mae.reconstruct(x, noise.argsort(1))
    torch.testing.assert_close(made.prediction, out.logits, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(made.loss, out.loss, rtol=1e-10, atol=0)
    out.loss.backward()
    made.loss.backward()
    trained = {k: p.grad for k, p in mae.named_parameters() if p.grad is not None}
    grads = dict(theirs.named_parameters())
    for name, grad in to_huggingface(trained, "memory").items():
        torch.testing.assert_close(grad, grads[name].grad, rtol=1e-9, atol=1e-12)
    theirs.save_pretrained(tmp_path / "again")
    back = load_mae(tmp_path / "again")
    assert back.normalised is normalised
    torch.testing.assert_close(dict(back.state_dict()), dict(mae.state_dict()), rtol=0, atol=0)

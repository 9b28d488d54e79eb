"""The replay of layers and of their training can say no."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.parity.__main__ import ABOVE, UNKNOWN, judge
from tests.parity.test_parity import changed, expect_above


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("mttt/mlp_t8_sgd_stops_at_4", "out/0/y"),
        ("mttt/mlp_t8_sgd_stops_at_4", "out/0/inner_loss"),
        ("mttt/mlp_t8_sgd_stops_at_4", "grad/decoder_LN/bias"),
        ("mttt/mlp_t0_full", "grad/phi/kernel"),
        ("mttt/linear_t1_full_ln_w0", "extra/0/W_T"),
        ("mttt/linear_t1_full_ln_w0", "extra/0/inner_loss_instance"),
        ("mttt/outer_adam_frozen_w0", "state/4/head/bias"),
        ("mttt/mixup", "out/labels"),
        ("vittt/rope", "extra/table"),
        ("vittt/dwc_step_lr_conv", "grad/v"),
        ("vittt/layer_rope", "extra/0/w3"),
        ("vittt/block_hvit3", "grad/mlp.dwc.bias"),
    ],
)
def test_a_perturbed_tensor_is_above_the_bar(tmp_path: Path, name: str, tensor: str) -> None:
    expect_above(tmp_path, name, tensor)


@pytest.mark.parametrize(
    ("name", "config", "code"),
    [
        ("mttt/mlp_t8_sgd_stops_at_4", {"T": 4, "eta": [1.0] * 4}, ABOVE),
        ("mttt/linear_t1_full_ln_w0", {"eta": [0.5]}, ABOVE),
        ("mttt/linear_t1_full_ln_w0", {"learner": "mlp"}, UNKNOWN),
        ("mttt/linear_t1_full_ln_w0", {"ln_eps": 1e-5}, UNKNOWN),
        ("mttt/linear_t1_full_ln_w0", {"gelu": "erf"}, UNKNOWN),
        ("mttt/linattn_elu_adaptive", {"feature_map": "identity"}, ABOVE),
        ("mttt/linattn_elu_adaptive", {"normaliser": "constant"}, ABOVE),
        ("mttt/outer_adam_frozen_w0", {"train_w0": True}, ABOVE),
        ("mttt/outer_adam_frozen_w0", {"clip": 2.0}, ABOVE),
        ("mttt/outer_adam_frozen_w0", {"weight_decay": 0.0}, ABOVE),
        ("mttt/outer_adam_frozen_w0", {"warmup_steps": 1}, ABOVE),
        ("mttt/outer_adam_frozen_w0", {"first_moment": "float32"}, UNKNOWN),
        ("mttt/schedule_90_epochs", {"total_steps": 112_000}, ABOVE),
        ("vittt/glu_step_zero_columns", {"inner_lr": 0.5}, ABOVE),
        ("vittt/glu_step_zero_columns", {"scale": 0.5}, ABOVE),
        ("vittt/glu_step_zero_columns", {"squash": "row"}, UNKNOWN),
        ("vittt/layer_rope", {"rope": False}, ABOVE),
        ("vittt/layer_rope", {"height": 5, "width": 3}, ABOVE),
        ("vittt/layer_rope", {"scale": 0.5}, UNKNOWN),
        ("vittt/block_hvit3", {"kind": "plain"}, UNKNOWN),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_config_is_obeyed_or_refused(
    tmp_path: Path, name: str, config: dict[str, Any], code: int
) -> None:
    path = changed(tmp_path, name, lambda meta, tensors: meta["config"].update(config))
    assert judge(path)[0] == code


def test_a_recorded_order_is_used(tmp_path: Path) -> None:
    def reverse(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["draw/0/order"] = tensors["draw/0/order"].flip(1).contiguous()

    assert judge(changed(tmp_path, "mttt/mlp_t8_sgd_stops_at_4", reverse))[0] == ABOVE

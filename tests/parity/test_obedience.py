"""What the recordings of ETA, EATA, DeYO, COME, TTT and TTT++ say is compared and obeyed."""

import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.parity.__main__ import ABOVE, judge
from tests.parity.test_parity import changed


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("eata/eata_steps", "in/0/fisher.4.weight"),
        ("eata/eata_steps", "extra/1/cosine.2"),
        ("eata/eata_steps", "extra/3/probs.0"),
        ("eata/eata_steps", "extra/3/optim.1.bias.momentum_buffer"),
        ("eata/eata_bn1d", "state/2/9.running_var"),
        ("come/sar_bn_empty", "out/3/loss"),
        ("ttt-rotation/threshold_edge_gn", "out/3/ssh_conf"),
        ("ttt-rotation/threshold_edge_gn", "state/1/head.5.weight"),
        ("ttt-plus-plus/align_mmd", "extra/init/mmd_ssh"),
        ("ttt-plus-plus/align_mmd", "out/5/test_logits"),
        ("ttt-plus-plus/align_mmd", "extra/4/opt/ext.3.weight/momentum_buffer"),
        ("ttt-rotation/train_joint_bn_rand", "extra/3/lr"),
        ("ttt-rotation/train_joint_bn_rand", "state/2/net.layer1.0.bn1.running_mean"),
        ("come/tent_gn_steps2", "out/1/loss"),
        ("come/eata_gn_fisher_empty", "extra/0/current_model_probs"),
        ("deyo/patch_bn_resize18", "extra/0/x_prime"),
        ("deyo/patch_bn_resize18", "extra/1/plpd"),
        ("deyo/patch_bn_resize18", "out/2/loss"),
    ],
)
def test_a_perturbed_tensor_is_above_the_bar(tmp_path: Path, name: str, tensor: str) -> None:
    def perturb(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[tensor].view(-1)[0] += 1e-7 * max(float(tensors[tensor].abs().max()), 1.0)

    code, text = judge(changed(tmp_path, name, perturb))
    assert code == ABOVE
    assert tensor in text


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("eata/eata_steps", {"fisher_alpha": 21.0}),
        ("eata/eata_steps", {"d_margin": 0.1}),
        ("eata/eata_steps", {"e_margin_factor_of_ln_classes": 0.3, "e_margin": 0.3 * math.log(7)}),
        ("eata/eata_steps", {"regularised": False}),
        ("deyo/patch_bn_resize18", {"plpd_threshold": 0.9}),
        ("deyo/patch_bn_resize18", {"reweight_plpd": 0}),
        ("deyo/patch_bn_resize18", {"params": ["1.weight"]}),
        ("ttt-rotation/threshold_edge_gn", {"threshold": 0.1496}),
        ("ttt-rotation/threshold_edge_gn", {"online": True}),
        ("ttt-rotation/threshold_edge_gn", {"fix_ssh": True}),
        ("ttt-plus-plus/align_mmd", {"divergence": "all"}),
        ("ttt-plus-plus/align_mmd", {"scale_ssh": 0.3}),
        ("ttt-plus-plus/align_mmd", {"bnepoch": 0}),
        ("ttt-plus-plus/align_mmd", {"fix_ssh": False}),
        ("ttt-plus-plus/align_mmd", {"batch_size_align": 6, "queue_size": 6}),
        ("ttt-rotation/train_joint_bn_rand", {"weight_decay": 0.0}),
        ("ttt-rotation/train_joint_bn_rand", {"gamma": 0.2}),
        ("ttt-rotation/train_joint_bn_rand", {"batches_per_epoch": 4, "epochs": 1}),
        ("come/tent_gn_steps2", {"prior_mass": 6}),
        ("come/eata_gn_fisher_empty", {"d_margin": 0.9}),
        ("come/sar_bn_empty", {"margin_e0": 0.6}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_config_is_obeyed(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    path = changed(tmp_path, name, lambda meta, tensors: meta["config"].update(config))
    assert judge(path)[0] == ABOVE


@pytest.mark.parametrize("name", ["eata/eata_steps", "eata/eata_bn1d"])
def test_resets_are_obeyed(tmp_path: Path, name: str) -> None:
    path = changed(tmp_path, name, lambda meta, tensors: meta["protocol"].update(reset_before=[]))
    assert judge(path)[0] == ABOVE

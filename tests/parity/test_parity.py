"""Every recording in tests/goldens replays, and the tool that says so can say no."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import testtime as tt
from tests.parity.__main__ import ABOVE, UNKNOWN, WITHIN, judge, main
from tests.parity.errors import relative_error
from tests.parity.recording import Config, Unreplayable
from tests.parity.systems.bn import BN
from tests.parity.systems.tent import Tent

GOLDENS = Path(__file__).parents[1] / "goldens"
FILES = sorted(GOLDENS.glob("*/*.safetensors"))

Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


def changed(tmp_path: Path, name: str, change: Change) -> str:
    """Return the path of a recording with a change to its description or its tensors."""
    with safe_open(GOLDENS / f"{name}.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["recording"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - no mapping
    change(meta, tensors)
    path = tmp_path / "changed.safetensors"
    save_file(tensors, path, {"recording": json.dumps(meta)})
    return str(path)


def expect_above(tmp_path: Path, name: str, tensor: str) -> None:
    """Change one value of a recorded tensor by ten times the bar, and expect that to be found."""

    def perturb(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        group = tensor.split("/")[0]
        floats = [t for k, t in tensors.items() if k.startswith(group) and t.is_floating_point()]
        largest = max(float(t.abs().max()) for t in floats)
        scale = max(float(tensors[tensor].abs().max()), 1e-3 * largest)
        tensors[tensor].view(-1)[0] += 1e-8 * scale

    code, text = judge(changed(tmp_path, name, perturb))
    assert code == ABOVE
    assert tensor in text


@pytest.mark.parametrize("path", FILES, ids=[f"{p.parent.name}/{p.stem}" for p in FILES])
def test_replays(path: Path) -> None:
    before = torch.get_default_dtype()
    code, text = judge(str(path))
    assert code == WITHIN, text
    assert "not used" not in text
    assert torch.get_default_dtype() == before


def test_every_recording_is_named_in_the_readme() -> None:
    readme = (GOLDENS / "README.md").read_text()
    assert FILES
    assert [p for p in FILES if f"`{p.parent.name}/{p.stem}`" not in readme] == []


# A number that is off by ten times the bar, in each kind of quantity.
@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("tent/bn_adam_decay", "out/4/logits"),
        ("tent/bn_adam_decay", "state/0/1.weight"),
        ("tent/bn_adam_decay", "extra/4/optim.4.bias.exp_avg"),
        ("tent/bn_adam_decay", "extra/0/loss.0"),
        ("bn/norm_no_stats", "out/2/logits"),
        ("bn/alpha", "state/3/4.running_var"),
        ("sar/gn_steps", "extra/3/loss_second.0"),
        ("sar/gn_steps", "extra/3/entropy_second.1"),
        ("sar/gn_steps", "extra/4/ema"),
        ("sar/vit_deep", "extra/1/momentum.blocks.8.norm2.bias"),
        ("cotta/vit", "extra/2/ema.head.bias"),
        ("cotta/vit", "extra/0/anchor_confidence"),
        ("cotta/vit", "state/0/pos_embed"),
        ("cotta/episodic", "extra/1/loss.1"),
        ("cotta/episodic", "extra/1/optim.0.weight.exp_avg_sq"),
        ("cotta/augment", "out/7/view"),
        ("roid/bn_window3_reset", "out/5/logits"),
        ("roid/bn_window3_reset", "extra/2/weights"),
        ("roid/gn_bn1d_window4", "state/4/7.running_var"),
        ("roid/gn_no_weighting", "out/0/loss"),
        ("memo/imagenet_bn_prior4_adamw", "out/1/view_logits"),
        ("memo/imagenet_bn_prior4_adamw", "extra/1/source_logits"),
        ("memo/imagenet_bn_prior4_adamw", "extra/1/opt/8.bias/exp_avg_sq"),
        ("memo/augmix_moves", "out/views"),
        ("rotta/bn1d", "extra/1/ema.9.running_var"),
        ("rotta/bn1d", "extra/1/update.0.loss"),
        ("rotta/ties_last", "extra/1/mem.uncertainty"),
        ("ttt-mae/init-sincos", "out/table_512_14"),
        ("ttt-mae/target-loss", "grad/pred_norm"),
        ("ttt-mae/ttt-sgd-accum", "out/6/logits"),
        ("ttt-mae/ttt-sgd-accum", "out/2/loss_1"),
        ("ttt-mae/ttt-sgd-accum", "state/1/mask_token"),
        ("ttt-mae/ttt-sgd-accum", "extra/3/grad_norm"),
    ],
)
def test_a_perturbed_tensor_is_above_the_bar(tmp_path: Path, name: str, tensor: str) -> None:
    expect_above(tmp_path, name, tensor)


def test_a_count_that_is_off_by_one_is_above_the_bar(tmp_path: Path) -> None:
    def count(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["state/1/1.num_batches_tracked"] += 1

    code, text = judge(changed(tmp_path, "bn/norm_no_stats", count))
    assert code == ABOVE
    assert "state inf (state/1/1.num_batches_tracked)" in text


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("sar/gn_steps", "extra/2/mask_first.0"),
        ("sar/gn_steps", "extra/2/mask_second.1"),
        ("sar/gn_steps", "extra/3/recovered.0"),
        ("cotta/vit", "extra/1/augmented"),
    ],
)
def test_another_decision_is_above_the_bar(tmp_path: Path, name: str, tensor: str) -> None:
    path = changed(tmp_path, name, lambda meta, tensors: tensors[tensor].logical_not_())
    code, text = judge(path)
    assert code == ABOVE
    assert f"extra inf ({tensor})" in text


# SAR's average and loss are recorded whenever there is one.
@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (lambda m, t: t.update({"extra/0/ema": torch.ones(())}), "extra/0/ema"),
        (lambda m, t: t.update({"extra/2/loss_second": torch.ones(())}), "extra/2/loss_second"),
        (lambda m, t: t.pop("extra/3/ema"), "extra/3/ema"),
        (lambda m, t: t.pop("extra/3/loss_second"), "extra/3/loss_second"),
    ],
)
def test_what_one_has_and_the_other_lacks_is_above_the_bar(
    tmp_path: Path, change: Change, tensor: str
) -> None:
    code, text = judge(changed(tmp_path, "sar/gn_empty_first", change))
    assert code == ABOVE
    assert f"extra inf ({tensor})" in text


# Everything that a description says is obeyed, so a wrong word there gives wrong numbers.
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("tent/bn_adam_decay", {"lr": 0.004}),
        ("tent/bn_adam_decay", {"betas": [0.7, 0.999]}),
        ("tent/bn_adam_decay", {"eps": 1e-4}),
        ("tent/bn_adam_decay", {"weight_decay": 0.0}),
        ("tent/bn_adam_decay", {"optimizer": "SGD"}),
        ("tent/bn_adam_decay", {"episodic": True}),
        ("tent/bn_adam_decay", {"steps": 2}),
        ("tent/bn_adam_decay", {"adapted": ["1.weight", "1.bias"]}),
        ("tent/bn_sgd_decay", {"momentum": 0.9}),
        ("tent/bn_sgd_decay", {"nesterov": True}),
        ("tent/bn1d_head", {"norm": "affine parameters of BatchNorm1d, BatchNorm2d"}),
        ("bn/norm_no_stats", {"eps": 1e-5}),
        ("bn/norm_no_stats", {"reset_stats": True}),
        ("bn/norm_no_stats", {"no_stats": False}),
        ("bn/norm_reset_stats", {"momentum": 0.1}),
        ("bn/norm_reset_stats", {"reset_stats": False}),
        ("bn/alpha", {"alpha": 0.2}),
        ("bn/mean_only", {"adapt_var": True}),
        ("bn/var_only", {"adapt_mean": True}),
        ("bn/moving_average", {"momentum": 0.2}),
        ("bn/cumulative", {"variant": "batch_wise"}),
        ("sar/gn_steps", {"lr": 0.04}),
        ("sar/gn_steps", {"momentum": 0.8}),
        ("sar/gn_steps", {"weight_decay": 0.1}),
        ("sar/gn_steps", {"rho": 0.06}),
        ("sar/gn_steps", {"reset_constant": 0.1}),
        ("sar/gn_steps", {"margin_factor_of_ln_classes": 0.2, "margin_e0": 0.2 * math.log(7)}),
        ("sar/gn_steps", {"ema_survives_recovery": False}),
        ("sar/gn_steps", {"momentum_survives_reset": False}),
        ("sar/gn_steps", {"steps": 1}),
        ("sar/gn_steps", {"episodic": True}),
        ("sar/gn_recovery_paper", {"ema_survives_recovery": True}),
        ("sar/crossvit_norm", {"adapted": ["norm.0.weight"]}),
        ("cotta/episodic", {"betas": [0.8, 0.999]}),
        ("cotta/vit", {"teacher_rate": 0.9}),
        ("cotta/vit", {"anchor_threshold": 0.0}),
        ("cotta/vit", {"nesterov": True}),
        ("cotta/vit", {"adapted": ["cls_token"]}),
        ("cotta/imagenet", {"loss": "cross-entropy to the teacher"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_config_is_obeyed(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    path = changed(tmp_path, name, lambda meta, tensors: meta["config"].update(config))
    assert judge(path)[0] == ABOVE


@pytest.mark.parametrize("name", ["tent/bn1d_head", "tent/gn_sgd", "bn/norm", "sar/gn_steps"])
def test_resets_are_obeyed(tmp_path: Path, name: str) -> None:
    path = changed(tmp_path, name, lambda meta, tensors: meta["protocol"].update(reset_before=[]))
    assert judge(path)[0] == ABOVE


def test_episodes_are_resets_from_outside(tmp_path: Path) -> None:
    def stream(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        meta["config"]["episodic"] = False
        meta["protocol"].update(mode="continual")

    def never_reset(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        stream(meta, tensors)
        meta["protocol"].update(reset_before=[])

    assert judge(changed(tmp_path, "cotta/episodic", stream))[0] == WITHIN
    assert judge(changed(tmp_path, "cotta/episodic", never_reset))[0] == ABOVE


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("cotta/vit", "0/views"),
        ("cotta/vit", "1/restore.head.weight"),
        ("cotta/episodic", "2/views.1"),
        ("cotta/episodic", "2/restore.0.0.weight"),
        ("cotta/augment", "3/noise"),
    ],
)
def test_recorded_draws_are_used(tmp_path: Path, name: str, draw: str) -> None:
    def other(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        value = tensors[f"draw/{draw}"]
        value[0] = ~value[0] if value.dtype == torch.bool else value[0] / 2

    assert judge(changed(tmp_path, name, other))[0] == ABOVE


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m, t: m["config"].update(anchor_threshold=1.1), "'draw/1/views'"),
        (lambda m, t: t.pop("draw/2/restore.head.bias"), "'draw/2/restore.head.bias'"),
        (lambda m, t: m["config"].update(views=8), "'views' of shape [8, 6, 3, 8, 8]"),
    ],
)
def test_a_draw_that_the_authors_did_not_make_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change, says: str
) -> None:
    code, text = judge(changed(tmp_path, "cotta/vit", change))
    assert code == ABOVE
    assert says in text
    assert "LookupError" in capsys.readouterr().err


def test_recorded_masks_are_used(tmp_path: Path) -> None:
    def flip(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["draw/1/dropout.7.1"][0] ^= True  # a whole image: single entries may be zero

    assert judge(changed(tmp_path, "tent/dropout", flip))[0] == ABOVE


def test_a_mask_that_is_missing_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def drop(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors["draw/1/dropout.7.1"]

    code, text = judge(changed(tmp_path, "tent/dropout", drop))
    assert code == ABOVE
    assert "draw/1/dropout.7.1" in text
    assert "LookupError" in capsys.readouterr().err


def test_nan_in_the_output_is_above_the_bar(tmp_path: Path) -> None:
    def poison(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors["in/2/x"][0, 0, 0, 0] = math.nan  # on a first batch the library refuses it

    code, text = judge(changed(tmp_path, "tent/bn_sgd_decay", poison))
    assert code == ABOVE
    assert "out inf (out/2/logits)" in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m, t: m.update(system="tnet"), "'tnet' is not implemented yet"),
        (lambda m, t: m.update(kind="layer"), "'layer' is not implemented yet for 'tent'"),
        (lambda m, t: m.update(preset="paper"), "preset 'paper'"),
        (lambda m, t: m.update(format=2), "format is 2"),
        (lambda m, t: m.update(dtype="bfloat16"), "description"),
        (lambda m, t: m.pop("config"), "config"),
        (lambda m, t: m["config"].pop("lr"), "'lr'"),
        (lambda m, t: m["config"].update(optimizer="Rprop"), "'Rprop'"),
        (lambda m, t: m["config"].update(dampening=0.5), "dampening"),
        (lambda m, t: m["config"].update(norm="all"), "norm='all'"),
        (lambda m, t: m.update(network={"builder": "none", "args": {}}), "kind that is not known"),
        (lambda m, t: m["network"]["sequential"][1].__setitem__(0, "Norm"), "no attribute 'Norm'"),
        (lambda m, t: t.pop("init/1.weight"), "Missing key(s)"),
        (lambda m, t: t.pop("out/1/logits"), "no tensor 'out/1/logits'"),
        (lambda m, t: t.update({"extra/1/fisher": torch.ones(2)}), "knows its extra/1/fisher"),
        (lambda m, t: t.update({"extra/1/loss.1": torch.ones(())}), "knows its extra/1/loss.1"),
        (lambda m, t: t.update({"out/1/pred": torch.ones(2)}), "knows its out/1/pred"),
        (lambda m, t: t.update({"in/1/mask": torch.ones(2)}), "knows its in/1/mask"),
        (lambda m, t: t.update({"draw/1/views": torch.ones(2)}), "knows its draw/1/views"),
        (lambda m, t: t.update({"state/9/1.weight": torch.ones(2)}), "knows its state/9/1.weight"),
        (lambda m, t: [t.pop(k) for k in list(t) if k[:5] != "init/"], "nothing to compare"),
    ],
    ids=lambda value: value if isinstance(value, str) else "when",
)
def test_what_is_not_known_is_refused(tmp_path: Path, change: Change, says: str) -> None:
    code, text = judge(changed(tmp_path, "tent/bn_sgd_decay", change))
    assert code == UNKNOWN
    assert says in text


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("sar/gn_empty_first", {"ema_rate": 0.2}, "a rate of 0.2"),
        ("sar/gn_empty_first", {"margin_e0": 2.5}, "margin_e0 is not 0.389"),
        ("cotta/vit", {"loss": "squares"}, "loss 'squares'"),
        ("cotta/augment", {"padding": 4}, "padding is 4"),
        ("cotta/augment", {"blur_kernel": 3}, "blur_kernel is 3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-",
)
def test_what_the_library_lacks_is_refused(
    tmp_path: Path, name: str, change: dict[str, Any], says: str
) -> None:
    code, text = judge(changed(tmp_path, name, lambda m, t: m["config"].update(change)))
    assert code == UNKNOWN
    assert says in text


@pytest.mark.parametrize("torn", [b"", b"no header", None])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, torn: bytes | None) -> None:
    whole = (GOLDENS / "bn" / "norm_no_stats.safetensors").read_bytes()
    path = tmp_path / "torn.safetensors"
    path.write_bytes(whole[:-100] if torn is None else torn)
    for unreadable in (path, tmp_path, tmp_path / "missing.safetensors"):
        code, text = judge(str(unreadable))
        assert code == UNKNOWN
        assert "cannot be read" in text


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    code, text = judge(str(tmp_path / "weights.safetensors"))
    assert code == UNKNOWN
    assert "describes no recording" in text


def test_the_worst_code_wins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = str(GOLDENS / "bn" / "norm_no_stats.safetensors")
    above = changed(tmp_path, "bn/norm_no_stats", lambda m, t: m["config"].update(eps=1.0))
    threads = torch.get_num_threads()
    assert main([good]) == WITHIN
    assert main([good, "missing"]) == UNKNOWN
    assert main(["missing", above, good]) == ABOVE
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].split()[:3] == [good, "within", "1e-09:"]


def test_bad_usage_is_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "FILE" in capsys.readouterr().err


def test_the_command_runs() -> None:
    root = GOLDENS.parents[1]
    command = [sys.executable, "-W", "error", "-m", "tests.parity"]
    files = [str(GOLDENS / "bn" / "norm_no_stats.safetensors"), "missing"]
    done = subprocess.run(
        [*command, *files],
        cwd=root,
        env={"PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == UNKNOWN, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["within", "not"]


@pytest.mark.parametrize(
    ("got", "recorded", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([1e-6], [0.0], 1e-5),  # by the floor: a thousandth of the largest of the group, 100
        ([math.nan], [1.0], math.inf),
        ([math.inf], [1.0], math.inf),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([math.inf, 1.0], [math.nan, 1.0], math.inf),
        ([-math.inf], [math.inf], math.inf),
        ([1.0], [math.nan], math.inf),
        ([1.0, 1.0], [1.0], math.inf),
    ],
)
def test_the_rule_of_errors(got: list[float], recorded: list[float], error: float) -> None:
    found = relative_error(torch.tensor(got), torch.tensor(recorded), largest=100.0)
    assert found == pytest.approx(error)


def test_integers_and_masks_are_equal_or_not() -> None:
    assert relative_error(torch.tensor(10**9 + 1), torch.tensor([10**9]), 1.0) == math.inf
    assert relative_error(torch.tensor(3.0), torch.tensor([3]), 1.0) == 0.0
    mask = torch.tensor([True, False])
    assert relative_error(mask, mask, 1.0) == 0.0
    assert relative_error(~mask, mask, 1.0) == math.inf


def test_exact_zeros_are_held_to() -> None:
    zeros = torch.zeros(2)
    assert relative_error(zeros, zeros, 0.0) == 0.0
    assert relative_error(zeros + 1e-30, zeros, 0.0) == math.inf


# Values that no file here carries.
@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"variant": "prior", "prior": 0.25}, {"variant": "mix", "prior": 0.25}),
        ({"variant": "prior", "prior": 0.25, "N": 4, "n": 12}, {"prior": 0.25}),
        ({"variant": "prior", "N": 4, "n": 12}, {"prior": 0.25}),
        ({"variant": "parts", "adapt_mean": True, "adapt_var": True}, {"parts": ("mean", "var")}),
        ({"variant": "none", "adapt_mean": False, "adapt_var": False}, {"parts": ()}),
        ({"variant": "batch_wise"}, {"variant": "batch", "running": "source", "eps": None}),
        (
            {"variant": "norm", "eps": 0.1, "momentum": 0.2, "reset_stats": 1, "no_stats": 1},
            {"running": "none", "eps": 0.1},
        ),
    ],
)
def test_variants_of_bn(config: dict[str, Any], expected: dict[str, Any]) -> None:
    method = BN().method(Config(config))
    assert {k: getattr(method, k) for k in expected} == expected
    assert method.layers == (nn.BatchNorm2d,)


@pytest.mark.parametrize(
    "config", [{"variant": "other"}, {"variant": "prior", "prior": 0.5, "N": 4, "n": 12}]
)
def test_what_bn_does_not_have_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(Unreplayable):
        BN().method(Config(config))


def test_removed_statistics_that_were_reset_leave_reset_counters(tmp_path: Path) -> None:
    def reset(meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        meta["config"]["reset_stats"] = True
        for name in tensors:
            if name.startswith("state/"):
                tensors[name] = torch.zeros_like(tensors[name])

    code, text = judge(changed(tmp_path, "bn/norm_no_stats", reset))
    assert code == WITHIN, text


def test_pytorchs_defaults_stand_where_a_config_is_silent() -> None:
    norm = "affine parameters of BatchNorm2d, LayerNorm"
    silent = Tent().method(Config({"optimizer": "SGD", "lr": 0.1, "norm": norm}))
    assert silent.optimizer == tt.adaptation.SGD(lr=0.1)
    assert silent.steps == 1
    assert silent.train
    assert silent.layers == (nn.BatchNorm2d, nn.LayerNorm)

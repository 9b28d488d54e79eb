"""TTT-MAE: operators and networks of masked autoencoders with gradients; the loop step by step."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.parity.errors import Comparison
from tests.parity.networks import BUILDERS, build
from tests.parity.recording import Recording, Unreplayable
from tests.parity.systems._ttt_mae_loop import replay_steps
from testtime.models.mae import (
    MAE,
    MAEClassifier,
    Sizes,
    keep_count,
    masked_loss,
    masking,
    patchify,
    resize_table,
    sincos_table,
    targets,
)
from testtime.models.mae.checkpoints import read_state
from testtime.models.mae.huggingface import from_huggingface, to_huggingface
from testtime.models.mae.parts import EPS


def build_mae(**args: Any) -> MAE:
    """Return the network of the recorded arguments."""
    head = args["head"]
    return MAE(
        args["img"],
        args["patch"],
        Sizes(args["dim"], args["depth"], args["heads"]),
        Sizes(args["dec_dim"], args["dec_depth"], args["dec_heads"]),
        head=head
        if head == "linear"
        else Sizes(args["cls_dim"], args["cls_depth"], args["cls_heads"]),
        classes=args["classes"],
        normalised=args["norm_pix"],
        task="rotation" if args.get("rotation_prediction") else "reconstruction",
    )


def build_finetuned(**args: Any) -> MAEClassifier:
    """Return the fine-tuned classifier of the recorded arguments."""
    return MAEClassifier(
        args["img"],
        args["patch"],
        Sizes(args["dim"], args["depth"], args["heads"]),
        pool="mean" if args["global_pool"] else "token",
        classes=args["classes"],
    )


BUILDERS.update(mae_vit=build_mae, mae_vit_finetuned=build_finetuned)


def replay_operator(recording: Recording) -> Comparison:
    """Replay the function whose inputs or config the file holds."""
    config = recording.config
    for key, replay in _OPERATORS.items():
        if key in config or key in recording:
            return replay(recording)
    raise Unreplayable("it is of no operator that is known here")


def replay_tables(recording: Recording) -> Comparison:
    """Replay position tables, whole, by rows and by sums, and the resizing of one."""
    config, comparison = recording.config, Comparison(recording)
    for dim, grid in config.get("small"):
        table = sincos_table(dim, grid, grid)
        comparison.check(f"out/table_{dim}_{grid}", table)
        comparison.check(f"out/param_{dim}_{grid}", table.float())
    for dim, grid in config.get("large"):
        table, name = sincos_table(dim, grid, grid), f"{dim}_{grid}"
        comparison.check(f"out/table_{name}", table[recording[f"in/rows_{name}"]])
        comparison.check(f"extra/0/sum_{name}", table.sum())
        comparison.check(f"extra/0/sumsq_{name}", table.square().sum())
    resize = config.get("resize")
    sizes = [(resize[key],) * 2 for key in ("from_grid", "to_grid")]
    resized = resize_table(recording["in/resize_from"], *sizes)
    comparison.check("out/resize_to", resized)
    return comparison


def replay_masks(recording: Recording) -> Comparison:
    """Replay orders, masks and restoring permutations."""
    comparison = Comparison(recording)
    for case, (length, ratio, kept) in enumerate(recording.config.get("length_ratio_kept")):
        noise = recording[f"in/noise_{case}"]
        hidden = masking(noise.argsort(dim=1, stable=True), keep_count(length, ratio))
        comparison.require(f"out/kept_{case}.count", hidden.keep.shape[1] == kept)
        comparison.check(f"out/kept_{case}", hidden.keep)
        comparison.check(f"out/mask_{case}", hidden.mask)
        comparison.check(f"out/restore_{case}", hidden.restore)
    order = recording["in/order"]
    images = recording["out/order_mask"].shape[0]
    # Its ratio is in the notes alone; what it keeps is what it comes to.
    given = masking(order.expand(images, -1), recording["out/order_kept"].shape[1])
    comparison.check("out/order_kept", given.keep)
    comparison.check("out/order_mask", given.mask)
    comparison.check("out/order_restore", given.restore)
    return comparison


def replay_targets(recording: Recording) -> Comparison:
    """Replay both kinds of targets, the loss and its gradient."""
    comparison, config = Comparison(recording), recording.config
    for key, rule in (("floor", "1e-6 added to the variance"), ("variance", "unbiased")):
        if not config.get(key).startswith(rule):
            raise Unreplayable(f"its {key} is '{config.get(key)}', and the library's is {rule}")
    patches = patchify(recording["in/x"], config.get("patch"))
    for kind, normalised in (("pix", False), ("norm", True)):
        prediction = recording["in/pred"].clone().requires_grad_()
        target = targets(patches, normalised)
        loss = masked_loss(prediction, target, recording["in/mask"])
        comparison.check(f"out/target_{kind}", target)
        comparison.check(f"out/loss_{kind}", loss)
        comparison.check(f"grad/pred_{kind}", torch.autograd.grad(loss, prediction)[0])
    return comparison


def replay_fresh(recording: Recording) -> Comparison:
    """Hold fresh parameters of as many seeds against the recorded range and rms, by chance."""
    comparison, seeds = Comparison(recording), recording.config.get("seeds")
    largest: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        for name, value in build_mae(**recording.network["args"]).named_parameters():
            value = value.detach()
            largest[name] = value.abs().max().maximum(largest.get(name, value.new_zeros(())))
            squares[name] = squares.get(name, 0) + value.square().mean() / seeds
    names = [name.removeprefix("0/rms.") for name in recording.under("extra") if "/rms." in name]
    comparison.require("extra.names", sorted(names) == sorted(largest))
    sizes = {k: p.numel() for k, p in build_mae(**recording.network["args"]).named_parameters()}
    for name in names:
        rms, maximum = recording[f"extra/0/rms.{name}"], recording[f"extra/0/maxabs.{name}"]
        drawn = not (rms == 0 or rms == maximum or "pos_embed" in name)
        if not drawn:
            comparison.check(f"extra/0/rms.{name}", squares[name].sqrt())
            comparison.check(f"extra/0/maxabs.{name}", largest[name])
            continue
        chance = 6 / math.sqrt(seeds * sizes[name])
        near = abs(float(squares[name].sqrt() / rms) - 1) <= chance
        uniform = not name.endswith("token")
        within = float(largest[name]) <= float(rms) * math.sqrt(3) * (1 + chance)
        comparison.require(f"extra.{name}", near and (within or not uniform))
    return comparison


def replay_families(recording: Recording) -> Comparison:
    """Tell the ten families apart, and write each back under the names it came with."""
    comparison, families = Comparison(recording), recording.config.get("families")
    recording.config.get("wrapping")
    found = set()
    for title, entries in families.items():
        state = {name: torch.rand(shape) for name, shape in entries}
        checkpoint = read_state(state)
        found.add(checkpoint.family)
        written = checkpoint.as_written()
        shapes = sorted((name, list(tensor.shape)) for name, tensor in written.items())
        comparison.require(f"out.{title}.names", shapes == sorted(map(tuple, entries)))
        same = all(torch.equal(written[name], state[name]) for name in state)
        comparison.require(f"out.{title}.values", same)
    comparison.require("out.families", len(found) == len(families))
    comparison.check("in/none", recording["in/none"])  # the file holds nothing else to compare
    return comparison


def replay_model(recording: Recording) -> Comparison:
    """Replay a forward and a backward of the network that the file describes."""
    if "names_hub" in recording.config:
        return replay_huggingface(recording)
    network = build(recording)
    if recording.network["builder"] == "mae_vit_finetuned":
        return replay_finetuned(recording, network)
    if isinstance(network, MAE) and network.task == "rotation":
        return replay_rotation(recording, network)
    assert isinstance(network, MAE)
    return replay_mae(recording, network)


def replay_mae(recording: Recording, network: MAE) -> Comparison:
    """Replay a masked pass, a classification, or both at once."""
    config, comparison = recording.config, Comparison(recording)
    for key in ("batch", "head_type", "norm_pix_loss", "timm"):
        config.get(key)
    comparison.require("config.layer_norm_eps", config.get("layer_norm_eps") == EPS)
    network.train(config.get("training_mode"))
    x, mode = recording["in/0/x"], config.get("mode")
    outputs: dict[str, Tensor] = {}
    ratio = config.get("mask_ratio")
    if ratio:
        order = recording["draw/0/noise"].argsort(dim=1, stable=True)
        made = network.reconstruct(x, order, ratio)
        latent, loss = made.latent, made.loss
        outputs |= {"latent": latent, "pred": made.prediction, "target": made.target}
        outputs |= {"mask": made.masking.mask, "ids_restore": made.masking.restore}
        comparison.check("extra/0/patches", patchify(x, network.patch))
    else:
        latent = network.features(x)
    outputs["cls_latent"] = latent[:, 0]
    if mode != "mae":
        logits = network.classify(latent)
        outputs["logits"] = logits
        loss_class = F.cross_entropy(logits, recording["in/0/y"])
        if ratio and config.get("joint_loss") == "0.01 * classification + mae":
            outputs |= {"loss_class": loss_class, "loss_mae": loss}
            loss = 0.01 * loss_class + loss
        else:
            loss = loss_class
    config.get("joint_loss", None)
    outputs["loss"] = loss
    for name in recording.under("out"):
        comparison.check(f"out/{name}", outputs.get(name.removeprefix("0/")))
    _check_gradients(recording, comparison, network, loss)
    for name in recording.under("state/0"):
        comparison.check(f"state/0/{name}", network.state_dict()[name])
    return comparison


def replay_finetuned(recording: Recording, network: nn.Module) -> Comparison:
    """Replay the fine-tuned classifier, which trains its position table too."""
    comparison, config = Comparison(recording), recording.config
    assert isinstance(network, MAEClassifier)
    comparison.require("config.pool", config.get("global_pool") == (network.pool == "mean"))
    _check_names(comparison, network.state_dict(), config.get("names"))
    logits = network(recording["in/0/x"])
    loss = F.cross_entropy(logits, recording["in/0/y"])
    comparison.check("out/0/logits", logits)
    comparison.check("out/0/loss", loss)
    _check_gradients(recording, comparison, network, loss)
    return comparison


def replay_rotation(recording: Recording, network: MAE) -> Comparison:
    """Replay the rotation baseline on turned images."""
    comparison, config = Comparison(recording), recording.config
    config.get("mask_ratio")
    _check_names(comparison, network.state_dict(), config.get("names"))
    logits = network.turns(recording["in/0/x"])
    loss = F.cross_entropy(logits, recording["in/0/rotations"])
    comparison.check("out/0/pred", logits)
    comparison.check("out/0/loss", loss)
    _check_gradients(recording, comparison, network, loss)
    return comparison


def replay_huggingface(recording: Recording) -> Comparison:
    """Replay Hugging Face's model on its own names, at its norm floor and at the authors'."""
    config, comparison = recording.config, Comparison(recording)
    hub = {name: recording[f"init/{name}"] for name in recording.under("init")}
    state = from_huggingface(hub)
    spelled = {
        "names_official": state,
        "names_hub": to_huggingface(state, "hub"),
        "names_runtime": to_huggingface(state, "memory"),
        "names_saved_again": to_huggingface(state, "saved"),
    }
    for key, tensors in spelled.items():
        _check_names(comparison, tensors, config.get(key))
        if key != "names_official":
            back = from_huggingface(tensors)
            same = back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in back)
            comparison.require(f"out.{key}", same)
    config.get("largest_difference_to_official")
    args = {**recording.network["args"], "norm_pix": config.get("norm_pix_loss")}
    network = build_mae(**args)
    # Hugging Face's model has no head; it is there, unused, in the network of the arguments.
    missing, unexpected = network.load_state_dict(state, strict=False)
    only_head = all(re.match(r"(bn|head)\.", name) for name in missing)
    comparison.require("out.names", not unexpected and only_head)
    order = recording["draw/0/noise"].argsort(dim=1, stable=True)
    x, ratio = recording["in/0/x"], config.get("mask_ratio")
    ours = network.reconstruct(x, order, ratio)
    for which in ("eps_1e-6", "official"):
        comparison.check(f"extra/0/pred_{which}", ours.prediction)
        comparison.check(f"extra/0/loss_{which}", ours.loss)
    for layer in network.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = config.get("layer_norm_eps")
    for table in (network.pos_embed, network.decoder_pos_embed):
        table.requires_grad_(True)
    theirs = network.reconstruct(x, order, ratio)
    comparison.check("out/0/pred", theirs.prediction)
    comparison.check("out/0/loss", theirs.loss)
    comparison.check("out/0/mask", theirs.masking.mask)
    comparison.check("out/0/ids_restore", theirs.masking.restore)
    theirs.loss.backward()
    grads = {k: p.grad for k, p in network.named_parameters() if p.grad is not None}
    for name, grad in to_huggingface(grads, "memory").items():
        comparison.check(f"grad/{name}", grad)
    return comparison


def _check_gradients(
    recording: Recording, comparison: Comparison, network: nn.Module, loss: Tensor
) -> None:
    parameters = dict(network.named_parameters())
    loss.backward()
    none = {name for name, parameter in parameters.items() if parameter.grad is None}
    if "no_grad" in recording.config:
        expected = set(recording.config.get("no_grad"))
        comparison.require("grad.none", none == expected)
    for name in recording.under("grad"):
        grad = parameters[name].grad
        comparison.check(
            f"grad/{name}", torch.zeros_like(parameters[name]) if grad is None else grad
        )


def _check_names(comparison: Comparison, state: dict[str, Tensor], recorded: list[Any]) -> None:
    names = [entry if isinstance(entry, str) else entry[0] for entry in recorded]
    shapes = {entry[0]: entry[1] for entry in recorded if not isinstance(entry, str)}
    same = sorted(names) == sorted(state)
    fits = same and all(list(state[name].shape) == shape for name, shape in shapes.items())
    comparison.require("config.names", fits)


_OPERATORS: dict[str, Callable[[Recording], Comparison]] = {
    "small": replay_tables,
    "seeds": replay_fresh,
    "families": replay_families,
    "length_ratio_kept": replay_masks,
    "in/pred": replay_targets,
}

KINDS = {"operator": replay_operator, "model": replay_model, "steps": replay_steps}

"""TTT-Linear and TTT-MLP: operators fed at once and in pieces, layers, blocks, models, decoding."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests import operators  # noqa: F401 - before anything imports transformers
from tests.parity.errors import Comparison
from tests.parity.recording import Config, Recording, Unreplayable
from tests.parity.systems import Replay
from testtime.layers.ttt import TTTLayer
from testtime.models.ttt_lm import TTTBlock, TTTCache, TTTConfig, TTTForCausalLM
from testtime.ops.ttt.run import Output
from testtime.ops.ttt.state import State

Operator = Callable[..., Output]
INPUTS = ("q", "k", "v", "lr", "token_coef", "ln_weight", "ln_bias")


def kinds(operator: Operator, names: Sequence[str]) -> dict[str, Replay]:
    """Return the replays of a system.

    Args:
        operator: ``ttt_linear`` or ``ttt_mlp``, as the authors have it.
        names: what recordings call its parameters.
    """

    def replay_operator(recording: Recording) -> Comparison:
        comparison = Comparison(recording)
        _note_sizes(recording)
        leaves = {n: recording[f"in/{n}"].requires_grad_() for n in (*INPUTS, *names)}
        start = [leaves[name] for name in names]
        _require_chunk(comparison, recording, leaves["token_coef"])
        found = operator(
            *(leaves[name] for name in INPUTS), start, eps=recording.config.get("ln_eps")
        )
        read = zip(names, found.state.read(), strict=True)
        outputs = {"o": found.o} | {f"{name}_last": tensor for name, tensor in read}
        for name, tensor in outputs.items():
            comparison.check(f"out/{name}", tensor)
        given = {name: recording[f"grad_out/{name}"] for name in recording.under("grad_out")}
        torch.autograd.backward([outputs[n] for n in given], list(given.values()))
        for name, leaf in leaves.items():
            comparison.check(f"grad/{name}", _gradient(leaf))
        return comparison

    def replay_steps(recording: Recording) -> Comparison:
        comparison = Comparison(recording)
        _note_sizes(recording)
        coefficient, weight, bias = (recording[f"init/{n}"] for n in INPUTS[4:])
        _require_chunk(comparison, recording, coefficient)
        state: State | list[Tensor] = [recording[f"init/{name}"] for name in names]
        for step in recording.steps():
            tokens = [recording[f"in/{step}/{name}"] for name in INPUTS[:4]]
            found = operator(
                *(*tokens, coefficient, weight, bias, state), eps=recording.config.get("ln_eps")
            )
            state = found.state
            comparison.check(f"out/{step}/o", found.o)
            _check_state(comparison, recording, f"extra/{step}/", names, state)
        return comparison

    def replay_layer(recording: Recording) -> Comparison:
        comparison = Comparison(recording)
        network = _network(recording, names)
        x = recording["in/0/x"].requires_grad_()
        y = network(x)
        comparison.check("out/0/y", y)
        y.backward(recording["grad_out/y"])
        comparison.check("grad/x", x.grad)
        _check_gradients(comparison, recording, network)
        return comparison

    def replay_model(recording: Recording) -> Comparison:
        comparison = Comparison(recording)
        network = _network(recording, names)
        ids = recording["in/0/input_ids"]
        found = network(ids, labels=ids, use_cache=False)
        comparison.check("out/0/logits", found.logits)
        comparison.check("out/0/loss", found.loss)
        found.loss.backward()
        _check_gradients(comparison, recording, network)
        return comparison

    def replay_decoding(recording: Recording) -> Comparison:
        comparison = Comparison(recording)
        network = _network(recording, names)
        # Their convolution caches hold four columns, one more than is needed.
        cache = TTTCache(network.config, remember=1)
        pieces = [recording[f"in/{step}/input_ids"] for step in recording.steps()]
        with torch.no_grad():
            whole = network(torch.cat(pieces, 1)).logits
            comparison.check("out/full/logits", whole)
            for step, ids in enumerate(pieces):
                logits = network(ids, cache=cache).logits
                comparison.check(f"out/{step}/logits", logits)
                for number, layer in enumerate(cache.layers):
                    prefix = f"extra/{step}/layers.{number}."
                    _check_state(comparison, recording, prefix, names, layer.state)
                    for theirs, mine in TAILS.items():
                        if f"{prefix}{theirs}" in recording:
                            recorded = recording[f"{prefix}{theirs}"]
                            tail = layer.tails[mine][:, -recorded.shape[2] :].mT
                            comparison.check(f"{prefix}{theirs}", tail)
        return comparison

    def replay_pieces(recording: Recording) -> Comparison:
        return (replay_decoding if recording.network else replay_steps)(recording)

    return {
        "operator": replay_operator,
        "layer": replay_layer,
        "model": replay_model,
        "steps": replay_pieces,
    }


TAILS = {"pre_conv": "pre", "ttt_conv_q": "q", "ttt_conv_k": "q"}


def _network(recording: Recording, names: Sequence[str]) -> nn.Module:
    """Return the layer, block or model of a recording with its recorded weights."""
    _note_sizes(recording)
    described = recording.network.get("args", {})
    for name in described:
        recording.config.get(name, None)
    arguments = Config(described)
    mlp = len(names) == 4
    eps = arguments.get("ln_eps")
    if arguments.get("rms_norm_eps", eps) != eps:
        raise Unreplayable("its RMSNorm and LayerNorm have different eps")
    config = TTTConfig(
        vocab_size=arguments.get("vocab", 2),
        hidden_size=arguments.get("hidden_size"),
        intermediate_size=arguments.get("intermediate_size", 2),
        num_hidden_layers=arguments.get("layers", 1),
        num_attention_heads=arguments.get("heads"),
        ttt_layer_type="mlp" if mlp else "linear",
        ttt_base_lr=arguments.get("base_lr"),
        mini_batch_size=arguments.get("chunk"),
        share_qk=arguments.get("share_qk"),
        use_gate=arguments.get("gate"),
        pre_conv=arguments.get("pre_conv"),
        conv_kernel=arguments.get("conv_kernel"),
        rope_theta=arguments.get("rope_theta"),
        rms_norm_eps=eps,
        tie_word_embeddings=arguments.get("tied", True),
        eos_token_id=None,
    )
    builder = recording.network.get("builder")
    if builder == "ttt_lm":
        if arguments.get("layer") != ("mlp" if mlp else "linear"):
            raise Unreplayable("its layers are of another system")
        network: nn.Module = TTTForCausalLM(config)
    elif builder == "ttt_block":
        network = TTTBlock(config)
    elif builder == ("ttt_mlp_layer" if mlp else "ttt_linear_layer"):
        network = TTTBlock(config).seq_modeling_block
    else:
        raise Unreplayable(f"its network is of a kind that is not known: {builder!r}")
    for module in network.modules():
        if isinstance(module, TTTLayer):
            module.official = True
            module.lr_scale = arguments.get("ttt_lr_mult", 1.0)
    weights = {name: recording[f"init/{name}"] for name in recording.under("init")}
    if builder == "ttt_lm" and config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise Unreplayable(f"its network cannot be built ({error})") from error
    return network.to(recording.dtype).eval()


def _check_gradients(comparison: Comparison, recording: Recording, network: nn.Module) -> None:
    """Compare the gradients of all parameters; one without counts as zero."""
    for name, parameter in network.named_parameters():
        comparison.check(f"grad/{name}", _gradient(parameter))


def _check_state(
    comparison: Comparison, recording: Recording, prefix: str, names: Sequence[str], state: State
) -> None:
    """Compare the parameters at the chunk's start and the sums, where they were recorded."""
    for name, start, total in zip(names, state.now.start, state.sums(), strict=True):
        if f"{prefix}{name}_states" in recording:
            comparison.check(f"{prefix}{name}_states", start)
            comparison.check(f"{prefix}{name}_grad", total)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _require_chunk(comparison: Comparison, recording: Recording, coefficient: Tensor) -> None:
    comparison.require("config.chunk", recording.config.get("chunk") == len(coefficient))


# What the shapes of the tensors say, or what made the random numbers.
SIZES = ("heads", "head_dim", "batch", "length", "seed", "inner_hidden", "per_sequence_state")


def _note_sizes(recording: Recording) -> None:
    if recording.preset != "official":
        raise Unreplayable(f"its preset '{recording.preset}' is not known")
    for name in (*SIZES, "pieces"):
        recording.config.get(name, None)

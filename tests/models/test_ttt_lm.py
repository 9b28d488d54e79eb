"""TTT language models in transformers: logits first, then everything that generates."""

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from tests import operators  # noqa: F401 - before anything imports transformers
from tests.ops.cases import error
from testtime.models.ttt_lm import (
    SIZES,
    TTTCache,
    TTTConfig,
    TTTForCausalLM,
    TTTModel,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

VOCAB = 40
every = pytest.mark.parametrize(
    ("kind", "mamba"), [(kind, mamba) for kind in ("linear", "mlp") for mamba in (False, True)]
)
both = pytest.mark.parametrize("kind", ["linear", "mlp"])


def made(kind: str, mamba: bool = True, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    torch.manual_seed(0)
    changes = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0} | changes
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = TTTConfig.sized(
        "tiny",
        mamba=mamba,
        **sizes | {"vocab_size": VOCAB, "ttt_layer_type": kind, "mini_batch_size": 4} | changes,
    )
    model = TTTForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.model.embed_tokens.weight[0] = 0
    return model.to(dtype).eval()


def ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], side: str) -> tuple[Tensor, Tensor]:
    tokens, longest = ids(len(lengths), max(lengths)), max(lengths)
    place = torch.arange(longest)
    mask = torch.stack([place >= longest - n if side == "left" else place < n for n in lengths])
    return torch.where(mask, tokens, 0), mask.long()


@every
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(kind: str, mamba: bool, side: str) -> None:
    model, lengths = made(kind, mamba), [11, 6, 1]
    tokens, mask = padded(lengths, side)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask).logits
        for row in range(3):
            real = mask[row].bool()
            assert error(logits[row, real], model(tokens[row : row + 1, real]).logits[0]) < 1e-12


@every
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_logits_with_a_cache_are_those_without(kind: str, mamba: bool, name: str) -> None:
    model = made(kind, mamba)
    for seed in range(3):
        tokens, cache = ids(2, 19, seed), TTTCache(model.config)
        with torch.no_grad():
            whole = model(tokens).logits
            pieces = [
                model(tokens[:, a:b], **{name: cache}).logits
                for a, b in pairwise([0, 1, 6, 7, 8, 9, 10, 19])
            ]
        assert error(torch.cat(pieces, 1), whole) < 1e-11
        assert cache.get_seq_length() == 19


def greedy(model: Any, tokens: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """Return tokens and logits of a loop that knows no cache."""
    logits = []
    for _ in range(new):
        with torch.no_grad():
            logits.append(model(tokens, use_cache=False).logits[:, -1])
        tokens = torch.cat((tokens, logits[-1].argmax(-1, keepdim=True)), 1)
    return tokens, torch.stack(logits, 1)


@every
def test_generate_is_the_loop_without_cache(kind: str, mamba: bool) -> None:
    model = made(kind, mamba)
    for seed in range(3):
        tokens = ids(2, 5 + seed, seed)
        expected, logits = greedy(model, tokens, 9)
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=9,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(found.sequences, expected)
        assert error(torch.stack(found.logits, 1), logits) < 1e-5  # generate keeps float32


@both
def test_generate_with_left_padding(kind: str) -> None:
    model, lengths = made(kind), [9, 4, 1]
    tokens, mask = padded(lengths, "left")
    found = model.generate(tokens, attention_mask=mask, max_new_tokens=7, do_sample=False)
    for row in range(3):
        alone = tokens[row : row + 1, mask[row].bool()]
        assert torch.equal(found[row, 9:], greedy(model, alone, 7)[0][0, -7:])


@every
def test_beams_are_those_without_cache(kind: str, mamba: bool) -> None:
    model = made(kind, mamba)
    for seed in range(2):
        tokens = ids(2, 6, seed)
        options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "num_beams": 3}
        with_cache, without = (
            model.generate(tokens, do_sample=False, use_cache=use, **options)
            for use in (True, False)
        )
        assert torch.equal(with_cache, without)


@both
def test_sampling_and_several_answers(kind: str) -> None:
    model, tokens = made(kind), ids(1, 6)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": True}
    found = []
    for use in (True, False):
        torch.manual_seed(0)
        found.append(model.generate(tokens, num_return_sequences=3, use_cache=use, **options))
    assert torch.equal(*found)


@every
def test_prompt_lookup_rolls_back(kind: str, mamba: bool) -> None:
    model = made(kind, mamba)
    for seed in range(2):
        tokens = ids(1, 4, seed).repeat(1, 4)  # something to look up, mostly wrong
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=12,
            do_sample=False,
            prompt_lookup_num_tokens=5,
        )
        assert torch.equal(found, greedy(model, tokens, 12)[0])


@both
def test_assisted_decoding_rolls_back(kind: str) -> None:
    model = made(kind)
    for assistant in (made("linear", num_hidden_layers=1), made(kind)):
        tokens = ids(1, 7)
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=9,
            do_sample=False,
            assistant_model=assistant,
        )
        assert torch.equal(found, greedy(model, tokens, 9)[0])


@both
def test_generation_goes_on_from_a_cache(kind: str) -> None:
    model, tokens = made(kind), ids(1, 6)
    options = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 5}
    first = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    name = "cache" if "cache" in first else "past_key_values"
    more = torch.cat((first.sequences, ids(1, 3, 5)), 1)
    # All ids again: generate cuts off those that the cache has seen.
    second = model.generate(
        more, attention_mask=torch.ones_like(more), **options, **{name: first[name]}
    )
    assert torch.equal(second.sequences, greedy(model, more, 5)[0])


@both
def test_crops_are_exact_and_bounded(kind: str) -> None:
    model, tokens = made(kind), ids(3, 14)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    mask[2, 9:12] = 0  # absent, and cropped over
    cache = TTTCache(model.config, remember=5)
    with torch.no_grad():
        model(tokens[:, :12], attention_mask=mask[:, :12], cache=cache)
        cache.crop(-3)
        assert cache.get_seq_length() == 9
        logits = model(tokens[:, 9:], attention_mask=torch.ones(3, 14), cache=cache).logits
        mask[2, 9:12] = 1
        whole = model(tokens, attention_mask=mask).logits
    assert error(logits, whole[:, 9:]) < 1e-11
    for wrong in (-6, 1, -20):
        with pytest.raises(ValueError, match="cropped"):
            cache.crop(wrong)
    cache = TTTCache(model.config)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="remembers 0"):
        cache.crop(-1)


@both
def test_caches_are_reset_and_multiplied(kind: str) -> None:
    model, tokens = made(kind), ids(2, 9)
    cache = TTTCache(model.config)
    with torch.no_grad():
        whole = model(tokens).logits
        model(tokens[:, :3], cache=cache)
        assert cache.batch_size == 2
        cache.batch_repeat_interleave(2)
        again = model(tokens.repeat_interleave(2, 0)[:, 3:], cache=cache).logits
        assert error(again, whole.repeat_interleave(2, 0)[:, 3:]) < 1e-11
        cache.reset()
        # From the learned start, not from zero.
        assert error(model(tokens, cache=cache).logits, whole) < 1e-11


@every
def test_packed_sequences(kind: str, mamba: bool) -> None:
    model, tokens = made(kind, mamba), ids(1, 17)
    parts = [(0, 3), (3, 12), (12, 17)]
    places = torch.cat([torch.arange(b - a) for a, b in parts])[None]
    with torch.no_grad():
        alone = torch.cat([model(tokens[:, a:b]).logits for a, b in parts], 1)
        assert error(model(tokens, position_ids=places).logits, alone) < 1e-12
        boundaries = torch.tensor([0, 3, 12, 17])
        assert error(model(tokens, cu_seq_lens_q=boundaries).logits, alone) < 1e-12


@every
def test_gradient_checkpointing(kind: str, mamba: bool) -> None:
    model, tokens = made(kind, mamba).train(), ids(2, 9)
    leaves = list(model.parameters())
    expected = torch.autograd.grad(model(tokens, labels=tokens).loss, leaves)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        for leaf, gradient in zip(leaves, expected, strict=True):
            assert (
                error(leaf.grad, gradient) < 1e-9
                or float((leaf.grad - gradient).abs().max()) < 1e-12
            )


@both
@pytest.mark.parametrize("tied", [True, False])
def test_saves_and_loads(kind: str, tied: bool, tmp_path: Path) -> None:
    model, tokens = made(kind, dtype=torch.float32, tie_word_embeddings=tied), ids(1, 9)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert ("lm_head.weight" in names) != tied
    assert {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.conv.norm.weight",
        "model.layers.1.conv.conv.bias",
        "model.layers.1.seq_modeling_block.conv_q.weight",
        "model.layers.1.seq_modeling_block.learnable_ttt_lr_weight",
        "model.layers.1.seq_modeling_block.W1",
        "model.layers.1.mlp.gate_proj.weight",
    } <= names
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TTTConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, TTTForCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        base = AutoModel.from_pretrained(tmp_path).eval()
        assert isinstance(base, TTTModel)
        hidden = base(tokens).last_hidden_state
        assert torch.equal(hidden, model.model(tokens).last_hidden_state)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@both
def test_what_must_stay_float32_does(kind: str, tmp_path: Path) -> None:
    model = made(kind, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    layer = half.model.layers[0].seq_modeling_block
    wide = {n for n, p in half.named_parameters() if p.dtype == torch.float32}
    assert {n.rpartition(".")[2] for n in wide} == {
        *("W1", "b1", "learnable_token_idx", "ttt_norm_weight", "ttt_norm_bias"),
        *("learnable_ttt_lr_weight", "learnable_ttt_lr_bias"),
        *(("W2", "b2") if kind == "mlp" else ()),
    }
    assert layer.q_proj.weight.dtype == torch.bfloat16
    tokens = ids(2, 20)
    with torch.no_grad():
        cache = TTTCache(half.config)
        pieces = [
            half(tokens[:, a:b], cache=cache).logits for a, b in ((0, 13), (13, 14), (14, 20))
        ]
        expected = model(tokens).logits
    assert pieces[0].dtype == torch.float32
    assert cache.layers[0].state.now.start[0].dtype == torch.float32
    assert (torch.cat(pieces, 1) - expected).norm() / expected.norm() < 0.1


@both
def test_embeddings_logits_and_outputs(kind: str) -> None:
    model, tokens = made(kind), ids(2, 9)
    with torch.no_grad():
        whole = model(tokens, labels=tokens, output_hidden_states=True)
        embeds = model.get_input_embeddings()(tokens)
        assert torch.equal(model(inputs_embeds=embeds).logits, whole.logits)
        assert error(model(tokens, logits_to_keep=2).logits, whole.logits[:, -2:]) < 1e-13
        some = model(tokens, logits_to_keep=torch.tensor([0, 4])).logits
        assert error(some, whole.logits[:, [0, 4]]) < 1e-13
        summed = model(tokens, labels=tokens, num_items_in_batch=4).loss
        assert error(summed, whole.loss * 16 / 4) < 1e-13
        assert torch.equal(model(tokens, return_dict=False)[0], whole.logits)
    assert len(whole.hidden_states) == 3
    assert "cache" not in model(tokens, use_cache=False)
    found = model.generate(
        inputs_embeds=embeds[:1],
        max_new_tokens=5,
        do_sample=False,
        attention_mask=torch.ones(1, 9, dtype=torch.long),
    )
    assert torch.equal(found, greedy(model, tokens[:1], 5)[0][:, -5:])


def test_sizes_are_the_published_ones() -> None:
    expected = {"125m": 125, "350m": 350, "760m": 760, "1b": 1300}
    for size, millions in expected.items():
        config = TTTConfig.sized(size)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = TTTForCausalLM(config)
        count = sum(p.numel() for p in model.parameters())
        assert count / 1e6 == pytest.approx(millions, rel=0.12), size
    assert set(SIZES) == {"tiny", *expected}
    with pytest.raises(ValueError, match="no size '2b'"):
        TTTConfig.sized("2b")


def test_it_starts_as_the_authors_start() -> None:
    model = TTTForCausalLM(TTTConfig.sized("tiny", ttt_layer_type="mlp"))
    layer = model.model.layers[0].seq_modeling_block
    assert layer.base_lr == 0.1
    for weight in (layer.W1, layer.W2, layer.q_proj.weight, model.model.embed_tokens.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    bound = float(layer.conv_q.weight.detach().abs().max())
    assert 0.4 < bound <= 0.5
    assert not layer.b2.any()
    assert float(layer.ttt_norm_weight.detach().min()) == 1


def test_what_does_not_fit_is_refused() -> None:
    model, tokens = made("linear"), ids(2, 5)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="found DynamicCache"):
        model(tokens, cache=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask"):
        model(tokens, attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="'linear' or 'mlp'"):
        made("conv")
    with pytest.raises(ValueError, match="even head dimension"):
        made("linear", num_attention_heads=3)
    cache = TTTCache(model.config)
    model(tokens, cache=cache)
    with pytest.raises(ValueError, match="rows"):
        model(tokens[:1], cache=cache)

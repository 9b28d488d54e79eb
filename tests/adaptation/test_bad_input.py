"""What cannot work is refused with a sentence, before anything changes."""

import resource
import signal
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import testtime as tt
from testtime.models.tiny import tiny

MODEL, BATCHES = tiny("batchnorm2d")
X = BATCHES[0]


def refused(adapted, x, error, *words, **kwargs):
    before = adapted.snapshot()
    with pytest.raises(error) as caught:
        adapted(x, **kwargs)
    for word in words:
        assert word in str(caught.value)
    now = adapted.snapshot()
    assert now.batch == before.batch
    for path, tensor in now.tensors().items():
        assert torch.equal(tensor, before.tensors()[path]), path


@pytest.fixture(params=["fresh", "running"])
def adapted(request):
    adapted = tt.adapt(MODEL, "tent")
    if request.param == "running":
        adapted(X)
    return adapted


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (X[:0], ValueError, ("empty", "[0, 3, 8, 8]")),
        (torch.zeros(()), ValueError, ("empty", "float32 tensor []")),
        (X.double(), TypeError, ("float64", "works in float32", "x.to(torch.float32)")),
        (X.half(), TypeError, ("float16", "works in float32")),
        ((X * 255).byte(), TypeError, ("uint8", "x / 255")),
        ((X * 255).long(), TypeError, ("int64", "x / 255")),
        (X > 0.5, TypeError, ("bool",)),
        (X.to("meta"), ValueError, ("meta", "cpu")),
        ([X], TypeError, ("must be a tensor", "list", "fit()")),
        (X.numpy(), TypeError, ("must be a tensor", "ndarray")),
        (None, TypeError, ("must be a tensor", "NoneType")),
    ],
    ids=lambda value: f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else None,
)
def test_wrong_input(adapted, x, error, words):
    refused(adapted, x, error, *words)


@pytest.mark.parametrize("x", [X[:, :2], X[:, 0]], ids=["channels", "dimensions"])
def test_a_shape_that_the_model_refuses(adapted, x):
    refused(adapted, x, RuntimeError, "3 channels")
    with pytest.raises(RuntimeError) as caught:
        adapted(x)
    [note] = caught.value.__notes__
    assert f"float32 tensor {list(x.shape)}" in note
    assert "Nothing has changed" in note


def test_no_input(adapted):
    with pytest.raises(TypeError, match="no input"):
        adapted()
    with pytest.raises(TypeError, match=r"no input: .*'scale'"):
        adapted(scale=2)


def test_range_and_nan_are_looked_at_on_the_first_batch():
    adapted = tt.adapt(MODEL, "tent")
    bad = X.clone()
    bad[2, 0, 0, 0] = torch.nan
    bad[4] = torch.inf
    refused(adapted, X * 255, ValueError, "0 to 255", "Divide by 255")
    refused(adapted, bad, ValueError, "2 of 6 rows", "NaN or infinite")
    adapted(X)
    adapted(bad)  # later it is counted, and changes nothing
    assert adapted.report().skipped == 1
    adapted.reset()
    assert adapted.report().skipped == 1  # of all since it was built
    assert int(adapted.snapshot().skipped) == 0
    refused(adapted, bad, ValueError, "2 of 6 rows")


def test_strict_looks_at_every_batch():
    adapted = tt.adapt(MODEL, "tent", strict=True)
    adapted(X)
    refused(adapted, X * torch.nan, ValueError, "NaN or infinite")
    refused(adapted, X * 255, ValueError, "0 to 255")


def test_one_row_where_statistics_need_more():
    model, batches = tiny("batchnorm1d")
    adapted = tt.adapt(model, "tent")
    adapted(batches[0])
    refused(adapted, batches[0][:1], ValueError, "Tent", "one value a channel", "larger batches")


def test_one_class():
    model = nn.Sequential(nn.Flatten(), nn.LayerNorm(192), nn.Linear(192, 1))
    refused(tt.adapt(model, "tent"), X, ValueError, "one class")


@dataclass(frozen=True)
class WantsTwo(tt.Method):
    smallest_batch = 2


def test_a_batch_smaller_than_the_method_works_on():
    refused(tt.adapt(MODEL, WantsTwo()), X[:1], ValueError, "WantsTwo needs batches of at least 2")


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: tt.adapt(MODEL, "tnet"), ValueError, ("no method 'tnet'", "Did you mean 'tent'")),
        (lambda: tt.adapt(MODEL, tt.Tent), TypeError, ("Call it: Tent()",)),
        (lambda: tt.adapt(MODEL, None), TypeError, ("must be a Method",)),
        (lambda: tt.adapt(lambda x: x, "tent"), TypeError, ("torch.nn.Module", "function")),
        (lambda: tt.adapt(MODEL, "tent", episodic="samples"), ValueError, ("'samples'",)),
        (lambda: tt.adapt(MODEL, "tent", episodic=True), ValueError, ("True",)),
        (lambda: tt.adapt(MODEL, "tent", many="lop"), ValueError, ("'lop'",)),
        (lambda: tt.adapt(MODEL, "tent", reset_every=0), ValueError, ("reset_every=0",)),
        (lambda: tt.adapt(MODEL, "tent", reset_every=-1), ValueError, ("reset_every=-1",)),
        (lambda: tt.adapt(MODEL, "tent", mean=0.5), ValueError, ("go together",)),
        (lambda: tt.adapt(MODEL, "tent", mean=(0.5, 0.5), std=(1.0,)), ValueError, ("2 values",)),
        (lambda: tt.Tent(steps=0), ValueError, ("steps=0",)),
        (lambda: tt.Tent.preset("offical"), ValueError, ("Did you mean 'official'",)),
        (lambda: tt.adapt(tiny("none")[0], "tent"), ValueError, ("nothing to adapt", "2 Conv2d")),
        (lambda: tt.adapt(nn.Identity(), "bn"), ValueError, ("nothing to adapt", "no parameters")),
    ],
)
def test_wrong_arguments(build, error, words):
    with pytest.raises(error) as caught:
        build()
    for word in words:
        assert word in str(caught.value)


# Files


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*state\.bin"):
        tt.adapt(MODEL, "tent").load(tmp_path / "state.bin")
    with pytest.raises(FileNotFoundError, match="no file"):
        tt.adapt(MODEL, "tent").load(tmp_path)


@pytest.mark.parametrize("what", ["text", "empty", "torn", "torn_head", "foreign"])
def test_unreadable_files(what, tmp_path):
    from safetensors.torch import save_file

    adapted, path = tt.adapt(MODEL, "tent"), tmp_path / "state.safetensors"
    adapted(X)
    adapted.save(path)
    whole = path.read_bytes()
    if what == "foreign":
        save_file(dict(MODEL.state_dict()), path)
    else:
        contents = {"text": b"no state at all", "empty": b"", "torn": whole[:-9]}
        path.write_bytes(contents.get(what, whole[:20]))
    before = adapted.snapshot()
    with pytest.raises(ValueError, match=r"no state of an adapted model|cannot be read"):
        adapted.load(path)
    assert all(torch.equal(t, before.tensors()[k]) for k, t in adapted.snapshot().tensors().items())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (lambda: tt.adapt(MODEL, "bn"), "another method: .*method was tent and is bn"),
        (lambda: tt.adapt(MODEL, tt.Tent(steps=2)), "another method: .*steps was 1 and is 2"),
        (
            lambda: tt.adapt(tiny("batchnorm2d", seed=1)[0], "tent"),
            "another model: .*first '0.weight'",
        ),
        (lambda: tt.adapt(tiny("groupnorm")[0], "tent"), "another model"),
        (lambda: tt.adapt(tiny("batchnorm1d")[0], "tent"), "another model"),
    ],
)
def test_states_of_another_model_or_method(other, words, tmp_path):
    adapted, target = tt.adapt(MODEL, "tent"), other()
    adapted(X)
    adapted.save(tmp_path / "state")
    before = target.snapshot().tensors()
    with pytest.raises(ValueError, match=words):
        target.load(tmp_path / "state")
    assert all(torch.equal(t, before[k]) for k, t in target.snapshot().tensors().items())


def test_a_state_that_was_tampered_with():
    adapted = tt.adapt(MODEL, tt.Tent(statistics="source"))
    adapted(X)
    state = adapted.state_dict()
    for wrong in (
        {k: t for k, t in state.items() if k != "state.generator"},
        {k: t for k, t in state.items() if k != "start.generator"},
        {k: t for k, t in state.items() if k != "start.buffers.1.running_mean"},
        {**state, "state.weights.1.weight": torch.zeros(3)},
        {**state, "identity": torch.zeros(9, dtype=torch.uint8)},
    ):
        before = adapted.snapshot().tensors()
        with pytest.raises(ValueError, match=r"The state|no state"):
            adapted.load_state_dict(wrong)
        assert all(torch.equal(t, before[k]) for k, t in adapted.snapshot().tensors().items())


def test_a_snapshot_of_another():
    with pytest.raises(ValueError, match="does not fit"):
        tt.adapt(MODEL, "tent").restore(tt.adapt(tiny("groupnorm")[0], "tent").snapshot())


def test_a_full_disk_leaves_the_old_file(tmp_path):
    adapted, path = tt.adapt(MODEL, "tent"), tmp_path / "state.safetensors"
    adapted.save(path)
    old = path.read_bytes()
    adapted(X)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.SIG_IGN
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written .* unchanged"):
            adapted.save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="could not be written"):
        tt.adapt(MODEL, "tent").save(tmp_path / "nowhere" / "state")

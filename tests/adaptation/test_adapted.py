"""What an adapted model does beyond its laws: states, resets, threads, capture-readiness."""

import contextlib
import copy
import pickle
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import testtime
import testtime as tt
from testtime.adaptation.methods import METHODS
from testtime.models.tiny import KINDS, tiny


def equal(one, other):
    a, b = one.tensors(), other.tensors()
    assert a.keys() == b.keys()
    assert one.batch == other.batch
    return all(torch.equal(a[k], b[k]) for k in a)


@dataclass(frozen=True)
class Anchored(tt.Method):
    """Keeps the mean of the first batch, and answers relative to it."""

    def begin(self, net, x, draw):
        return {"first": net(x).mean(0) + draw("noise", lambda g: torch.randn((), generator=g))}

    def predict(self, net, x, memory):
        return net(x) - memory["first"]


def test_looking_begins_nothing():
    model, batches = tiny("batchnorm2d")
    adapted, looked = tt.adapt(model, Anchored()), tt.adapt(model, Anchored())
    looked.predict(batches[1])
    looked.reset()
    assert torch.equal(looked(batches[0]), adapted(batches[0]))
    expected = model(batches[0]).mean(0)
    noise = torch.randn((), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(adapted.learner.state.memory["first"], expected + noise)


@dataclass(frozen=True)
class Remembering(tt.Method):
    def begin(self, net, x, draw):
        return {"mean": torch.zeros(5)}

    def loss(self, net, x, memory, draw):
        logits = net(x)
        return tt.Objective(logits=logits, memory={"mean": logits.mean(0)})


def test_a_loaded_state_stays_as_it_was():
    model, batches = tiny("batchnorm2d")
    adapted = tt.adapt(model, Remembering())
    adapted(batches[0])
    state = adapted.state_dict()
    before = {k: t.clone() for k, t in state.items()}
    adapted.load_state_dict(state)
    adapted(batches[1])
    assert all(torch.equal(t, before[k]) for k, t in state.items())


def test_snapshot_and_restore():
    model, batches = tiny("batchnorm2d")
    adapted = tt.adapt(model, "tent")
    adapted(batches[0])
    snapshot = adapted.snapshot()
    kept = snapshot.clone()
    answers = [adapted(x) for x in batches[1:]]
    assert equal(snapshot, kept)
    adapted.restore(snapshot)
    assert equal(adapted.snapshot(), kept)
    assert all(map(torch.equal, [adapted(x) for x in batches[1:]], answers))
    assert equal(snapshot, kept)


def test_a_snapshot_from_before_the_first_batch():
    model, batches = tiny("batchnorm2d")
    adapted = tt.adapt(model, Anchored())
    snapshot = adapted.snapshot()
    answers = [adapted(x) for x in batches]
    adapted.restore(snapshot)
    assert equal(adapted.snapshot(), snapshot)
    assert all(map(torch.equal, [adapted(x) for x in batches], answers))


def test_reset_every():
    model, batches = tiny("groupnorm")
    adapted, plain = tt.adapt(model, "tent", reset_every=2), tt.adapt(model, "tent")
    first = [plain(x) for x in batches[:2]]
    stream = [*batches[:2], *batches[:2], *batches[:2]]
    assert all(map(torch.equal, [adapted(x) for x in stream], first * 3))
    assert adapted.report().batches == 2
    by_method = tt.adapt(model, tt.Tent(reset_every=2))
    assert all(map(torch.equal, [by_method(x) for x in stream], first * 3))
    overridden = tt.adapt(model, tt.Tent(reset_every=2), reset_every=3)
    assert not torch.equal([overridden(x) for x in stream][2], first[0])


def test_episodes_of_batches_start_from_the_source():
    model, batches = tiny("groupnorm")
    method = tt.Tent(steps=3, optimizer=tt.SGD(lr=0.1))
    adapted = tt.adapt(model, method, episodic="batch")
    for x in batches:
        assert torch.equal(adapted(x), tt.adapt(model, method)(x))
        assert adapted.report().batches == 1


@pytest.mark.parametrize("many", ["vmap", "loop"])
def test_episodes_of_samples_keep_nothing(many):
    model, batches = tiny("groupnorm")
    method = tt.Tent(steps=2, optimizer=tt.SGD(lr=0.1))
    adapted = tt.adapt(model, method, episodic="sample", many=many)
    before = adapted.snapshot()
    answers = adapted(batches[0])
    assert adapted.report().batches == 1
    after = adapted.snapshot()
    after.batch = 0
    assert equal(before, after)
    for row, answer in zip(batches[0].split(1), answers, strict=True):
        alone = tt.adapt(model, method)(row)
        assert torch.allclose(answer, alone[0], rtol=1e-5, atol=1e-6)


def test_one_nan_sample_leaves_the_others():
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model, "tent", episodic="sample")
    clean = adapted(batches[0])
    spoiled = batches[0].clone()
    spoiled[2] = torch.nan
    answers = adapted(spoiled)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(answers[others], clean[others])
    assert adapted.report().skipped == 1


def test_fit_is_calling_without_the_answers():
    model, batches = tiny("batchnorm2d")
    labels = torch.zeros(6, dtype=torch.int64)
    called = tt.adapt(model, "tent")
    for x in batches * 2:
        called(x)
    for stream in (batches, [(x, labels) for x in batches], [{"input": x} for x in batches]):
        fitted = tt.adapt(model, "tent")
        assert fitted.fit(stream, passes=2) is fitted
        assert equal(fitted.snapshot(), called.snapshot())
    with pytest.raises(
        ValueError, match=r"passes=2.* needs batches that can be gone through again"
    ):
        tt.adapt(model, "tent").fit(iter(batches), passes=2)
    data = torch.utils.data.TensorDataset(torch.cat(batches), labels.repeat(3))
    loader = torch.utils.data.DataLoader(data, batch_size=6)
    assert equal(tt.adapt(model, "tent").fit(loader, passes=2).snapshot(), called.snapshot())


class Slow(nn.Module):
    """Waits in its forward until it is told to go on."""

    def __init__(self):
        super().__init__()
        self.net = tiny("groupnorm")[0]
        self.inside, self.go = threading.Event(), threading.Event()

    def __deepcopy__(self, memo):
        other = Slow.__new__(Slow)
        nn.Module.__init__(other)
        other.net = copy.deepcopy(self.net, memo)
        other.inside, other.go = self.inside, self.go
        return other

    def forward(self, x):
        self.inside.set()
        assert self.go.wait(10)
        return self.net(x)


def test_a_second_thread_is_refused_and_disturbs_nothing():
    model, x = Slow(), tiny("groupnorm")[1][0]
    adapted = tt.adapt(model, "tent")
    answers = []
    thread = threading.Thread(target=lambda: answers.append(adapted(x)))
    thread.start()
    try:
        assert model.inside.wait(10)
        for f in (adapted, adapted.predict, adapted.source):
            with pytest.raises(RuntimeError, match="in the middle of another call"):
                f(x)
        for f in (adapted.reset, adapted.snapshot, adapted.state_dict):
            with pytest.raises(RuntimeError, match="in the middle of another call"):
                f()
    finally:
        model.go.set()
        thread.join()
    assert torch.equal(answers[0], tt.adapt(model.net, "tent")(x))
    adapted(x)  # free again


def test_a_failed_call_frees_the_turn():
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model, "tent")
    with pytest.raises(RuntimeError):
        adapted(batches[0][:, :1])
    adapted(batches[0])


def test_a_deep_copy_goes_on_by_itself():
    model, batches = tiny("batchnorm2d")
    adapted = tt.adapt(model, tt.BNAdapt("moving"))
    adapted(batches[0])
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin(batches[1]), adapted(batches[1]))
    twin(batches[0])
    twin.reset()
    assert not torch.equal(twin.predict(batches[1]), adapted.predict(batches[1]))
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    twin(batches[0])
    with pytest.raises(RuntimeError, match="changed in place since"):
        adapted(batches[0])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))])
def test_copies_go_on_alone(how):
    model, batches = tiny("batchnorm2d")
    with torch.no_grad():
        model[0].weight.mul_(1)  # changed in place before: not after adapt()
    adapted = tt.adapt(model, "tent")
    adapted(batches[0])
    other = how(adapted)
    before = adapted.snapshot()
    answers = [other(x) for x in batches[1:]]
    assert equal(adapted.snapshot(), before)
    assert all(map(torch.equal, [adapted(x) for x in batches[1:]], answers))


def test_saved_here_goes_on_in_a_new_process(tmp_path):
    model, batches = tiny("batchnorm2d", batches=5)
    running = {}
    for method in METHODS:
        # Refused at once: those that need source data or another kind of network.
        with contextlib.suppress(ValueError):
            running[method] = tt.adapt(model, method)
    assert {"source", "bn", "tent", "sar", "cotta"} <= running.keys()
    for method, adapted in running.items():
        for x in batches[:3]:
            adapted(x)
        adapted.save(tmp_path / method)
    code = f"""
import torch, testtime as tt
from safetensors.torch import save_file
from testtime.models.tiny import tiny
torch.set_num_threads({torch.get_num_threads()})
model, batches = tiny("batchnorm2d", batches=5)
for method in {list(running)}:
    adapted = tt.adapt(model, method).load(method)
    answers = {{str(k): adapted(x) for k, x in enumerate(batches[3:])}}
    save_file(answers | adapted.state_dict(), method + ".after")
"""
    place = str(Path(testtime.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": place}, check=True
    )
    for method, adapted in running.items():
        after = load_file(tmp_path / f"{method}.after")
        expected = {str(k): adapted(x) for k, x in enumerate(batches[3:])} | adapted.state_dict()
        assert after.keys() == expected.keys()
        assert [k for k in after if not torch.equal(after[k], expected[k])] == []


def test_half_a_save_is_none(tmp_path, monkeypatch):
    adapted, path = tt.adapt(tiny("groupnorm")[0], "tent"), tmp_path / "state"
    adapted.save(path)
    old = path.read_bytes()

    def stops_half_way(tensors, name):
        save_file(tensors, name)
        Path(name).write_bytes(Path(name).read_bytes()[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("testtime.adaptation.persistence.save_file", stops_half_way)
    with pytest.raises(OSError, match="No space left on device"):
        adapted.save(path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


# Capture-readiness: a step can be recorded once and replayed.


class Recorder(TorchDispatchMode):
    """Writes down every operator, with the shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.equal.default and args[0].dtype == torch.uint8:
            return func(*args)  # states of a generator, which are on the host
        self.seen.append((str(func), *(list(a.shape) for a in args if isinstance(a, torch.Tensor))))
        return func(*args, **(kwargs or {}))


LOOKS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal.default", "unique")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.* stay as they are:UserWarning")
def test_steps_are_alike_and_do_not_look(method, kind):
    model, batches = tiny(kind, batches=4)
    try:
        adapted = tt.adapt(model, method, source=batches)
        adapted(batches[0])
    except ValueError:
        pytest.skip("the method does not fit this kind of network")
    addresses = {k: t.data_ptr() for k, t in adapted.learner.state.tensors().items()}
    addresses.pop("generator")  # on the host
    runs = []
    for x in batches[1:]:
        with Recorder() as recorder:
            adapted(x)
        runs.append(recorder.seen)
    if not METHODS[method]().looks:  # a method that must look says so
        assert runs[0] == runs[1] == runs[2]
        assert [name for name, *_ in runs[0] if any(look in name for look in LOOKS)] == []
    now = {k: t.data_ptr() for k, t in adapted.learner.state.tensors().items() if k in addresses}
    assert now == addresses
    adapted.reset()
    now = {k: t.data_ptr() for k, t in adapted.learner.state.tensors().items() if k in addresses}
    assert now == addresses

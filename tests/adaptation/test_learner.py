"""What the engine does for methods: source data, coupling, counts, randomness, arguments."""

import os
import threading
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import testtime as tt
from testtime.adaptation import Method, Objective, select
from testtime.adaptation.objectives import entropy
from testtime.models.tiny import tiny


@dataclass(frozen=True)
class Informed(tt.Tent):
    """Computes the mean squared gradient of source batches first, as a Fisher pass does."""

    needs_source = True

    def prepare(self, learner, batches):
        def loss(net, x, memory):
            return Objective(loss=net(x).logsumexp(1).mean())

        found = [learner.gradient(loss)[1] for _ in batches]
        return {k: sum(grads[k].square() for grads in found) / len(found) for k in found[0]}


def test_source_data_become_constants():
    model, batches = tiny("groupnorm")
    with pytest.raises(ValueError, match="needs source data, but none was given"):
        tt.adapt(model, Informed())
    adapted = tt.adapt(model, Informed(), source=batches)
    assert adapted.learner.constants.keys() == adapted.learner.state.weights.keys()
    assert all((t > 0).any() for t in adapted.learner.constants.values())
    assert not adapted.notes
    labelled = tt.adapt(model, Informed(), source=[(x, None) for x in batches])
    for name, constant in adapted.learner.constants.items():
        assert torch.equal(constant, labelled.learner.constants[name])
    with pytest.raises(ValueError, match="The source data of Informed held no batch"):
        tt.adapt(model, Informed(), source=[])
    assert torch.equal(adapted(batches[0]), tt.adapt(model, tt.Tent())(batches[0]))


def test_source_data_that_are_not_numbers_are_refused():
    model, batches = tiny("groupnorm")
    batches[1] = batches[1].clone()
    batches[1][0] = torch.nan
    with pytest.raises(ValueError, match="computed from the source data is not finite"):
        tt.adapt(model, Informed(), source=batches)


def test_a_head_made_in_configure_is_the_same_every_time_and_part_of_the_identity(tmp_path):
    @dataclass(frozen=True)
    class Headed(tt.Tent):
        def configure(self, module):
            super().configure(module)
            module[0].extra = nn.Linear(3, 4)  # of no use, but there
            return module

    model, batches = tiny("groupnorm")
    before = torch.get_rng_state()
    one, two = tt.adapt(model, Headed()), tt.adapt(model, Headed())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.learner.module[0].extra.weight, two.learner.module[0].extra.weight)
    one(batches[0])
    one.save(tmp_path / "state")
    two.load(tmp_path / "state")
    with pytest.raises(ValueError, match=r"belongs to another model.*0\.extra\.weight"):
        tt.adapt(model, Headed(), seed=1).load(tmp_path / "state")


def test_rows_that_are_alike_do_not_hide_that_they_couple():
    model, batches = tiny("batchnorm2d")
    x = batches[0].clone()
    x[1] = x[0]
    adapted = tt.adapt(model, "tent")
    adapted(x)
    assert adapted.report().couples


def test_coupling_is_measured_once_there_are_two_rows_and_kept_in_a_saved_state():
    model, batches = tiny("batchnorm2d")
    adapted = tt.adapt(model, "tent")
    adapted(batches[0][:1])
    assert adapted.report().couples is None
    adapted(batches[0])
    assert adapted.report().couples
    other = tt.adapt(model, "tent")
    other.load_state_dict(adapted.state_dict())
    assert other.report().couples


class Fixed(nn.Module):
    """Takes batches of four alone."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(x.view(4, 6)))


def test_a_model_that_takes_no_two_rows_is_adapted_all_the_same_and_that_is_said():
    adapted = tt.adapt(Fixed(), "tent")
    with pytest.warns(UserWarning, match="does not take one or two rows"):
        adapted(torch.rand(4, 6))
    adapted(torch.rand(4, 6))
    assert adapted.report().couples


@dataclass(frozen=True)
class Views(Method):
    """Eight views a row: forwards and backwards are of all of them."""

    optimizer: tt.SGD = tt.SGD(lr=1e-3)
    adapts = "norms"

    def select(self, module):
        return select.norm_affine(module)

    def loss(self, net, x, memory, draw):
        return Objective(loss=entropy(net(x.repeat_interleave(8, 0))).mean())


def test_what_is_counted_is_what_ran():
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model, Views())
    adapted(batches[0])
    before, rows = adapted.report(), batches[1].shape[0]
    adapted(batches[1])
    after = adapted.report()
    assert after.forwards - before.forwards == 9 * rows  # and the answer
    assert after.backwards - before.backwards == 8 * rows
    assert adapted.answers == "after"
    sar = tt.adapt(model, "sar")
    sar(batches[0])
    before = sar.report()
    sar(batches[1])
    assert sar.report().forwards - before.forwards == 2 * rows
    assert sar.report().backwards - before.backwards == 2 * rows


def test_notes_of_samples_are_those_of_all():
    model, batches = tiny("groupnorm")
    x = torch.cat(batches * 3)[:21]
    for many in ("vmap", "loop"):
        method = tt.Tent(statistics="source", steps=2)
        adapted = tt.adapt(model, method, episodic="sample", many=many)
        adapted(x)
        assert [loss.shape[0] for loss in adapted.notes["loss"]] == [21, 21]


def test_classes_along_another_dimension_are_noticed_when_their_count_changes():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.norm(x))

    adapted = tt.adapt(Tokens(), "tent")
    adapted(torch.rand(2, 7, 6))
    with pytest.raises(ValueError, match="had 7 classes along dimension 1 and have 9 now"):
        adapted(torch.rand(2, 9, 6))
    right = tt.adapt(Tokens(), "tent", logits=lambda output: output.transpose(1, 2))
    right(torch.rand(2, 7, 6))
    right(torch.rand(2, 9, 6))


def test_arguments_that_the_model_writes_to_stay_the_users():
    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

        def forward(self, x, scale):
            scale.mul_(2)
            return self.head(self.norm(x)) * scale[:, None]

    model, x = Scales(), torch.rand(4, 6)
    scale = torch.ones(4)
    answer = tt.adapt(model, "source")(x, scale)
    assert torch.equal(scale, torch.ones(4))
    assert torch.equal(answer, model(x, torch.ones(4)))


def test_threads_with_an_adapted_model_each_do_not_meet():
    model, batches = tiny("batchnorm2d")
    model = nn.Sequential(model, nn.Dropout(0.5))
    method = tt.Tent.preset("official")

    def run():
        adapted = tt.adapt(model, method)
        return [adapted(x) for x in batches]

    alone, before, found = run(), torch.get_rng_state(), {}
    threads = [threading.Thread(target=lambda k=k: found.update({k: run()})) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), before)
    for answers in found.values():
        assert all(torch.equal(a, b) for a, b in zip(answers, alone, strict=True))


def test_a_step_that_fails_has_reset_nothing():
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model, "tent", episodic="batch")
    adapted(batches[0])
    before = adapted.snapshot().tensors()
    with pytest.raises((ValueError, RuntimeError)):
        adapted(batches[0][:, :1])
    after = adapted.snapshot().tensors()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_reset_that_is_due_happens_though_its_batch_is_skipped():
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model, "tent", reset_every=2)
    adapted(batches[0]), adapted(batches[1])
    adapted(batches[2] * torch.nan)
    start = adapted.learner.start.weights
    assert all(torch.equal(w, start[k]) for k, w in adapted.snapshot().weights.items())
    assert adapted.report().skipped == 1


def test_a_snapshot_of_the_beginning_goes_back_to_it():
    model, batches = tiny("groupnorm")
    adapted = tt.adapt(model, "sar")
    fresh = adapted.snapshot()
    first = adapted(batches[0])
    adapted.restore(fresh)
    assert torch.equal(adapted(batches[0]), first)
    with pytest.raises(TypeError, match="takes what snapshot"):
        adapted.restore(adapted.state_dict())


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda m: m.fit(torch.rand(4, 3)), TypeError, "takes batches, but one Tensor"),
        (lambda m: m.fit([], passes=0), ValueError, "passes=0"),
        (lambda m: m.export(statistics="lsat"), ValueError, "'lsat'"),
        (lambda m: m.double(), TypeError, "keeps its dtype"),
        (lambda m: nn.Sequential(m).state_dict(), TypeError, "inside another module"),
    ],
)
def test_what_cannot_be_is_refused(make, error, said):
    with pytest.raises(error, match=said):
        make(tt.adapt(tiny("groupnorm")[0], "tent"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tt.BNAdapt("mix", parts=("means",)), "'means'"),
        (lambda: tt.BNAdapt(running="sorce"), "running='sorce'"),
        (lambda: tt.BNAdapt("cumulative", prior=0.5), "read under variant='mix' alone"),
        (lambda: tt.BNAdapt("mix", source_size=-16), "source_size=-16"),
        (lambda: tt.BNAdapt("moving", momentum=7.0), "momentum=7.0"),
        (lambda: tt.BNAdapt(steps=2), "no loss to descend"),
        (lambda: tt.Tent(steps="2"), "steps=2"),
        (lambda: tt.Tent(statistics="batches"), "statistics='batches'"),
    ],
)
def test_hyper_parameters_that_would_be_read_as_something_else(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_an_optimiser_of_torchs_own_is_refused():
    with pytest.raises(TypeError, match="an update rule of testtime"):
        tt.Tent(optimizer=torch.optim.Adam)


def test_a_saved_file_is_as_readable_as_others(tmp_path):
    adapted, path = tt.adapt(tiny("groupnorm")[0], "tent"), tmp_path / "state"
    adapted.save(path)
    (tmp_path / "other").write_bytes(b"")
    assert os.stat(path).st_mode == os.stat(tmp_path / "other").st_mode
    with pytest.raises(OSError, match="no regular file"):
        adapted.save(os.devnull)


def test_source_statistics_are_saved_to_a_file_and_begin_another(tmp_path):
    model, batches = tiny("groupnorm")
    file = tmp_path / "source.safetensors"
    with pytest.raises(ValueError, match="Tent has computed nothing from source data"):
        tt.adapt(model, tt.Tent()).save_source(file)
    assert not file.exists()
    made = tt.adapt(model, Informed(), source=batches)
    made.save_source(file)
    read = tt.adapt(model, Informed(steps=2), source=file)
    assert not read.report().said  # steps do not matter to them
    for name, constant in made.learner.constants.items():
        assert torch.equal(constant, read.learner.constants[name])
    with pytest.warns(UserWarning, match="computed with other settings: train was False"):
        tt.adapt(model, Informed(train=True), source=str(file))
    with pytest.raises(ValueError, match="belongs to another model"):
        tt.adapt(tiny("layernorm")[0], Informed(), source=file)
    with pytest.raises(ValueError, match="statistics of informed, but the method is tent"):
        tt.adapt(model, tt.Tent(), source=file)
    made.save(tmp_path / "state")
    with pytest.raises(ValueError, match="holds no statistics of source data"):
        tt.adapt(model, Informed(), source=tmp_path / "state")
    with pytest.raises(FileNotFoundError):
        tt.adapt(model, Informed(), source=tmp_path / "absent")

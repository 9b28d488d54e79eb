"""Streams: what they yield, that it repeats, and that nothing reaches back from the future."""

import hashlib
import json
import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from testtime.shifts import (
    Data,
    continual,
    corrupt,
    gradual,
    load_stream,
    mixed,
    natural,
    repeating,
    shifted,
    single,
    slow,
)
from testtime.shifts import stream as stream_module
from testtime.shifts.seeds import derive

ORDERS = ("natural", "shuffled", "class", "dirichlet:0.1")


def some(count=12, side=16, name="some", **more):
    generator = torch.Generator().manual_seed(count)
    images = torch.rand(count, 3, side, side, generator=generator)
    return Data(name, images, torch.arange(count) % 3, name, **more)


DATA = some()
READ = {"fog:5": some(name="a"), "usps": some(7, name="b")}

# One of every builder.
STREAMS = {
    "single": lambda **o: single(DATA, "fog:5", **o),
    "natural": lambda batch_size, seed: natural(DATA, batch_size=batch_size, seed=seed),
    "continual": lambda **o: continual(DATA, ["fog:5", "contrast:3", "clean"], **o),
    "continual of read data": lambda **o: continual(READ, **o),
    "gradual": lambda **o: gradual(DATA, ["fog", "gaussian_noise"], (1, 5, 1), **o),
    "mixed": lambda **o: mixed(DATA, ["fog:5", "gaussian_noise:3", "clean"], **o),
    "repeating": lambda **o: repeating(DATA, ["fog:5", "contrast:3"], times=3, **o),
    "slow": lambda **o: slow(DATA, ["fog", "contrast", "gaussian_noise"], samples=40, step=9, **o),
    "by class": lambda **o: continual(DATA, ["fog:5", "clean"], order="class", **o),
    "by Dirichlet": lambda **o: continual(DATA, ["fog:5", "clean"], order="dirichlet:0.1", **o),
}


def make(name, batch_size=5, seed=0):
    return STREAMS[name](batch_size=batch_size, seed=seed)


def whole(stream):
    """Images, labels, indices and shifts of all samples, in their order."""
    batches = list(stream)
    tensors = [torch.cat([getattr(b, x) for b in batches]) for x in ("images", "labels", "index")]
    return *tensors, [shift for b in batches for shift in b.shifts]


def digest(stream):
    """A hash of every byte that a stream yields, batch by batch."""
    marks = hashlib.sha256()
    for batch in stream:
        for tensor in (batch.images, batch.labels, batch.index, batch.severities):
            marks.update(tensor.numpy().tobytes())
        marks.update(repr((len(batch), batch.shifts, batch.timestamps)).encode())
    return marks.hexdigest()


@pytest.mark.parametrize("name", STREAMS)
def test_it_says_what_it_yields(name):
    stream = make(name)
    batches = list(stream)
    assert len(batches) == len(stream)
    assert sum(map(len, batches)) == stream.samples
    assert {shift for b in batches for shift in b.shifts} == set(stream.shifts)
    planned = list(stream.plan())
    assert [b.index.tolist() for b in batches] == [index.tolist() for index, _ in planned]
    assert [b.shifts for b in batches] == [shifts for _, shifts in planned]
    if name != "mixed":
        assert all(len(set(b.shifts)) == 1 for b in batches)
    described = json.loads(json.dumps(stream.describe()))
    assert (described["samples"], described["batches"]) == (stream.samples, len(stream))
    assert described["seed"] == 0


@pytest.mark.parametrize("name", STREAMS)
def test_images_and_labels_are_those_of_their_index_and_shift(name):
    stream = make(name)
    for batch in stream:
        for image, label, index, shift in zip(
            batch.images, batch.labels, batch.index.tolist(), batch.shifts, strict=True
        ):
            if isinstance(stream.data, Data):
                wanted = shifted(DATA, shift)[index]
            else:
                wanted = stream.data[shift][index]
            assert torch.equal(image, wanted[0])
            assert label == wanted[1]


def test_it_is_the_same_to_the_byte_in_another_process():
    here = {name: digest(make(name)) for name in STREAMS}
    assert here == {name: digest(make(name)) for name in STREAMS}
    code = (
        "import json, torch\nfrom tests.shifts.test_streams import STREAMS, digest, make\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "print(json.dumps({name: digest(make(name)) for name in STREAMS}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == here


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "natural"])
def test_the_seed_changes_it(name):
    assert digest(make(name, seed=1)) != digest(make(name, seed=0))


@pytest.mark.parametrize("name", STREAMS)
def test_the_batch_size_changes_no_sample(name):
    alone, seven, all_of_them = (whole(make(name, size)) for size in (1, 7, 1000))
    for images, labels, index, shifts in (alone, seven):
        assert torch.equal(images, all_of_them[0])
        assert torch.equal(labels, all_of_them[1])
        assert torch.equal(index, all_of_them[2])
        assert shifts == all_of_them[3]


class Noting:
    """Samples that note which were asked for."""

    def __init__(self, images):
        self.images, self.asked = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.asked += index
        return self.images[index]


# Streams over data that the stream corrupts itself.
OWN = [name for name in STREAMS if "read" not in name]


@pytest.mark.parametrize("name", OWN)
def test_nothing_is_read_ahead(name):
    samples = Noting(DATA.images)
    stream = replace(make(name, 4), data=replace(DATA, samples=samples))
    first = next(iter(stream))
    assert sorted(samples.asked) == sorted(first.index.tolist())


@pytest.mark.parametrize("name", OWN)
def test_a_future_sample_changes_no_past_batch(name):
    stream = make(name, 4)
    changed = replace(stream, data=black_after(stream, 2))
    for batches, (before, after) in enumerate(zip(stream, changed, strict=True), 1):
        same = torch.equal(before.images, after.images)
        assert same or batches > 2
    assert not all(torch.equal(a.images, b.images) for a, b in zip(stream, changed, strict=True))


def black_after(stream, batches):
    """The data, with each image black that the first batches do not hold."""
    seen = torch.cat([index for index, _ in list(stream.plan())[:batches]])
    images = torch.zeros_like(DATA.images)
    images[seen] = DATA.images[seen]
    return replace(DATA, samples=images)


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (continual(DATA, ["fog:5"]), continual(DATA, ["fog:5", "contrast:5"])),
        (repeating(DATA, ["fog:5"], times=1), repeating(DATA, ["fog:5"], times=3)),
        (
            slow(DATA, ["fog", "contrast"], samples=16, step=8, batch_size=8),
            slow(DATA, ["fog", "contrast"], samples=50, step=8, batch_size=8),
        ),
        (mixed(DATA, ["fog:5", "clean"], passes=1), mixed(DATA, ["fog:5", "clean"], passes=2)),
    ],
)
def test_a_longer_stream_begins_as_the_shorter_one(short, long):
    images, labels, _, shifts = whole(short)
    longer = whole(long)
    assert torch.equal(longer[0][: len(images)], images)
    assert torch.equal(longer[1][: len(images)], labels)
    assert longer[3][: len(images)] == shifts


def test_a_batch_ends_with_its_shift():
    short = list(continual(DATA, ["fog:5"], batch_size=5))
    long = list(continual(DATA, ["fog:5", "clean"], batch_size=5))
    assert [len(b) for b in long] == [5, 5, 2, 5, 5, 2]
    assert all(torch.equal(a.images, b.images) for a, b in zip(short, long, strict=False))


# Draws.


def test_draws_depend_on_seed_index_corruption_and_severity_alone():
    same = Data("same", torch.full((4, 3, 16, 16), 0.5), torch.arange(4), "")
    noise = shifted(same, "gaussian_noise:3", seed=1)
    images = noise.images
    assert len({tuple(image.flatten().tolist()) for image in images}) == 4
    for index in ([2], [3, 2, 1], [2, 2, 2, 2]):
        assert torch.equal(noise.samples[index], images[index])
    drawn = (images - 0.5) / 0.08
    others = [
        shifted(same, "gaussian_noise:3", seed=2).images,
        shifted(same, "gaussian_noise:4", seed=1).images,
    ]
    sigmas = 0.08, 0.09
    for other, sigma in zip(others, sigmas, strict=True):
        assert not torch.allclose((other - 0.5) / sigma, drawn, atol=0.1)


def test_one_corruption_upon_the_other():
    both = shifted(DATA, "fog:3+gaussian_noise:2", seed=4)[5][0]
    first = shifted(DATA, "fog:3", seed=4)[5][0]
    seed = derive(4, "gaussian_noise", 2) + 5
    noisy = corrupt(first[None], "gaussian_noise", 2, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(both, noisy[0])


def test_a_shift_names_the_data():
    assert shifted(DATA, "fog:5").name == "some, fog:5"
    assert shifted(DATA, "clean") is DATA
    assert shifted(DATA, "fog:5").fingerprint()["sha256"] == "some"


# What each builder is for.


@pytest.mark.parametrize("order", ORDERS)
def test_a_pass_has_every_sample_once(order):
    stream = continual(DATA, ["clean", "fog:1"], order=order)
    index = whole(stream)[2]
    for part in (index[:12], index[12:]):
        assert part.sort().values.tolist() == list(range(12))


def test_passes_have_orders_of_their_own():
    index = whole(repeating(some(100), ["clean"], times=2))[2]
    assert index[:100].tolist() != index[100:].tolist()


def test_labels_by_class_and_by_dirichlet():
    data = some(3000)
    labels = whole(single(data, order="class"))[1]
    assert int((labels.diff() != 0).sum()) == 2

    def classes(order):
        plan = single(data, order=order, batch_size=100, seed=3).plan()
        tops = [data.labels[index].bincount().max() for index, _ in plan]
        return float(torch.stack(tops).float().mean()) / 100

    few, some_, many = classes("dirichlet:0.01"), classes("dirichlet:1"), classes("shuffled")
    assert few > 0.95
    assert few > some_ > many
    assert many < 0.45


@pytest.mark.parametrize("concentration", ["0.0000001", "0.1", "1000000"])
def test_dirichlet_at_its_ends(concentration):
    index = whole(single(some(50), order=f"dirichlet:{concentration}"))[2]
    assert index.sort().values.tolist() == list(range(50))


def test_gradual_grows_and_fades():
    stream = gradual(DATA, ["fog", "contrast"], batch_size=12)
    severities = [int(batch.severities[0]) for batch in stream]
    assert severities == [1, 2, 3, 4, 5, 4, 3, 2, 1] * 2
    assert stream.shifts[:2] == ("fog:1", "fog:2")


def test_mixed_comes_to_every_sample_under_every_shift():
    shifts = ["fog:5", "gaussian_noise:3", "clean"]
    stream = mixed(DATA, shifts, batch_size=12)
    assert stream.samples == 36
    seen = [
        (int(i), shift)
        for index, names in stream.plan()
        for i, shift in zip(index, names, strict=True)
    ]
    assert len(set(seen)) == 36
    for index, names in stream.plan():
        assert len(set(index.tolist())) == 12
        assert len(set(names)) > 1
    assert len(seen) == 36
    assert mixed(DATA, shifts, passes=1).samples == 12


def test_repeating_shows_the_same_images_again():
    images, _, index, _ = whole(repeating(DATA, ["gaussian_noise:5"], times=2))
    assert torch.equal(images[:12][index[:12].argsort()], images[12:][index[12:].argsort()])


def test_slow_moves_by_small_steps():
    names = ["fog", "contrast", "gaussian_noise"]
    stream = slow(DATA, names, samples=3000, step=50, batch_size=50)
    steps = [shifts[0] for _, shifts in stream.plan()]
    assert len(steps) == 60
    levels = [
        {name: int(s) for name, s in (part.split(":") for part in step.split("+"))}
        for step in steps
    ]
    assert all(sum(level.values()) == 5 for level in levels)
    for before, after in pairwise(levels):
        changes = [after.get(name, 0) - before.get(name, 0) for name in names]
        assert sorted(changes) == [-1, 0, 1]
    assert {name for level in levels for name in level} == set(names)


def test_a_long_stream_takes_no_memory_for_its_samples():
    stream = slow(DATA, ["fog", "contrast"])
    assert stream.samples == 7_500_000
    assert len(stream) == 7500 * 16
    assert len(pickle.dumps(stream.runs)) < 500_000
    assert len(next(iter(stream))) == 64


def test_natural_is_in_time():
    stamps = torch.arange(12) * 0.25
    data = some(timestamps=stamps.double())
    batches = list(natural(data, "fog:1", batch_size=5))
    assert torch.cat([b.index for b in batches]).tolist() == list(range(12))
    assert torch.equal(torch.cat([b.timestamps for b in batches]), stamps.double())
    assert all(b.timestamps is None for b in natural(DATA))
    with pytest.raises(ValueError, match="go back 1 times, first at sample 11"):
        natural(some(timestamps=stamps.double()[[*range(10), 11, 10]]))
    with pytest.raises(TypeError, match="order"):
        natural(data, order="shuffled")


def test_data_for_each_shift_may_be_of_several_sizes():
    batches = list(continual(READ, batch_size=6))
    assert [(b.shifts[0], len(b)) for b in batches] == [
        ("fog:5", 6),
        ("fog:5", 6),
        ("usps", 6),
        ("usps", 1),
    ]
    assert batches[0].severities.tolist() == [5] * 6
    assert batches[2].severities.tolist() == [0] * 6


def test_severities():
    assert [
        stream_module.severity(s) for s in ("clean", "fog:3", "fog:3+contrast:4", "usps:new")
    ] == [
        0,
        3,
        4,
        0,
    ]


# Saved.


@pytest.mark.parametrize("name", STREAMS)
def test_a_saved_stream_comes_back_whatever_is_drawn_later(name, tmp_path, monkeypatch):
    stream = make(name)
    stream.save(tmp_path / "saved")
    before = digest(stream)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    monkeypatch.setattr(stream_module.Stream, "_draw", None)
    again = load_stream(tmp_path / "saved", stream.data)
    assert digest(again) == before
    assert again.describe() == stream.describe()
    assert [len(index) for index, _ in replace(again, batch_size=1).plan()] == [1] * stream.samples


def test_a_saved_stream_over_other_data_is_refused(tmp_path):
    single(DATA, "fog:5").save(tmp_path / "saved")
    with pytest.raises(ValueError, match="over other data"):
        load_stream(tmp_path / "saved", some(13))


def test_a_saved_stream_that_is_damaged_is_refused(tmp_path):
    path = tmp_path / "saved"
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_stream(path, DATA)
    single(DATA, "fog:5").save(path)
    for damaged in (path.read_bytes()[:-1], b"", b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no stream that was saved whole"):
            load_stream(path, DATA)


def test_a_saved_stream_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def fail(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        single(DATA, "fog:5").save(tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


# Bad input.


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: single(DATA, "fgo:5"), "There is no corruption 'fgo'.*Did you mean 'fog'"),
        (lambda: single(DATA, "fog"), "no severity from 1 to 5"),
        (lambda: single(DATA, "fog:6"), "no severity from 1 to 5"),
        (lambda: single(DATA, "fog:5+clean"), "no severity from 1 to 5"),
        (lambda: continual(READ, ["usbs"]), "no data for the shift 'usbs'.*mean 'usps'"),
        (lambda: continual(DATA, []), "The stream is empty"),
        (lambda: repeating(DATA, ["fog:5"], times=0), "The stream is empty"),
        (lambda: mixed(DATA, ["fog:5"], passes=0), "The stream is empty"),
        (lambda: mixed(DATA, []), "The stream is empty"),
        (lambda: single(DATA, batch_size=0), "at least 1 sample, found 0"),
        (lambda: single(DATA, order="random"), "no order 'random'"),
        (lambda: single(DATA, order="shufled"), "Did you mean 'shuffled'"),
        (lambda: single(DATA, order="dirichlet"), "no order 'dirichlet'"),
        (lambda: single(DATA, order="dirichlet:0"), "needs a concentration above 0"),
        (lambda: single(DATA, order="dirichlet:a"), "needs a concentration above 0"),
        (lambda: single(DATA, order="class:1"), "no order 'class:1'"),
        (lambda: mixed(READ), r"same samples under each shift, found 12 \(fog:5\), 7 \(usps\)"),
        (lambda: slow(DATA, ["fog"]), "Found 1 names"),
        (lambda: slow(DATA, ["fog", "contrast"], step=0), "step 0"),
        (lambda: slow(DATA, ["fog", "contrast"], severity=6), "severity 6"),
        (lambda: slow(DATA, ["fog", "fgo"]), "Did you mean 'fog'"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once(build, said):
    with pytest.raises(ValueError, match=said):
        build()


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: continual(DATA, "fog:5"), r"Give a list of shifts, found 'fog:5'"),
        (lambda: continual(DATA), "Say which shifts"),
        (lambda: single([(DATA.images, 1)]), "found list. Read it first, with read_pairs"),
        (lambda: continual({"fog:5": DATA.images}), "found Tensor. Read it first"),
        (lambda: mixed(DATA.images, ["clean"]), "found Tensor"),
    ],
)
def test_what_is_of_another_type_is_refused(build, said):
    with pytest.raises(TypeError, match=said):
        build()


def test_tables_stream_but_are_not_corrupted():
    table = Data("table", torch.rand(6, 4), torch.arange(6), "")
    assert next(iter(natural(table))).images.shape == (6, 4)
    with pytest.raises(ValueError, match="Corruptions take images"):
        list(single(table, "fog:5"))

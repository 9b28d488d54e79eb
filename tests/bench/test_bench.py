"""The bench: data that are read, rows that are true, files that are whole."""

import io
import json
import resource
import signal

import pytest
import torch

import testtime as tt
from testtime import demo
from testtime.bench import Data, load_data, run
from testtime.bench.ledger import append
from testtime.bench.run import shifted
from testtime.shifts import Corruption
from testtime.shifts.corruptions.textures import find_textures

DIGITS = load_data("digits")
FEW = Data("few digits", DIGITS.images[:130], DIGITS.labels[:130], DIGITS.sha256)


def rows(**options):
    model = demo.load("resnet_bn")[0]
    settings = {"name": "resnet_bn", "methods": ["source"], "shifts": ["clean"]} | options
    return list(run(model, FEW, **settings))


def test_the_error_is_that_of_the_answers():
    (row,) = rows(methods=["tent"], shifts=["contrast:5"], batch_size=50)
    model = demo.load("resnet_bn")[0]
    adapted = tt.adapt(model, tt.Tent())
    images = shifted(FEW.images, "contrast", 5, seed=0)
    predicted = torch.cat([adapted(x) for x in images.split(50)]).argmax(1)
    assert row.error == float((predicted != FEW.labels).double().mean())
    assert row.top_class == float(predicted.bincount().max()) / 130
    assert (row.images, row.batch_size, row.skipped) == (130, 50, 0)


def test_a_row_says_how_it_was_made():
    (row,) = rows(shifts=["fog:3"], seed=7)
    kept = json.loads(json.dumps(row.json()))
    assert (kept["shift"], kept["severity"], kept["seed"]) == ("fog", 3, 7)
    assert kept["data_sha256"] == demo.sha256()
    assert kept["versions"]["torch"] == torch.__version__
    assert kept["configuration"]["steps"] == "1"
    assert kept["corruption"] == Corruption("fog", 3).record(32, 32)
    assert rows()[0].corruption == {}


def test_a_row_says_which_textures_served():
    (row,) = rows(shifts=["frost:3"])
    assert row.corruption["textures"] == find_textures()


def test_rows_repeat_and_each_starts_from_the_source():
    both = rows(methods=["tent", "tent"], shifts=["gaussian_noise:5"])
    assert both[0].error == both[1].error
    assert rows(methods=["tent"], shifts=["gaussian_noise:5"])[0].error == both[0].error


def test_the_seed_decides_the_draws():
    one, same, other = (shifted(FEW.images, "gaussian_noise", 5, seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("shift", ["fog", "fog:0", "fog:6", "clean:3", "fog:"])
def test_a_shift_without_a_severity_is_refused(shift):
    with pytest.raises(ValueError, match="no severity from 1 to 5"):
        rows(shifts=[shift])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shifts": ["fogg:5"]}, "There is no corruption 'fogg'.* Did you mean 'fog'"),
        ({"methods": ["tnet"]}, "There is no method 'tnet'.* Did you mean 'tent'"),
    ],
)
def test_unknown_names(options, said):
    with pytest.raises(ValueError, match=said):
        rows(**options)


def test_data_of_one_class_are_refused():
    ones = Data("ones", FEW.images, torch.ones(130, dtype=torch.int64), "")
    with pytest.raises(ValueError, match="are of one class, so an error says nothing"):
        list(run(demo.load()[0], ones, name="", methods=["source"], shifts=["clean"]))


def parquet(path, images, labels):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from PIL import Image

    encoded = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "png")
        encoded.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"img": encoded, "label": labels}), path)


def test_parquet_comes_back_to_the_bit(tmp_path):
    levels = torch.randint(256, (3, 3, 8, 6), dtype=torch.uint8)
    parquet(tmp_path / "some.parquet", levels, [2, 0, 1])
    data = load_data(f"cifar10:{tmp_path / 'some.parquet'}")
    assert torch.equal(data.images, levels / 255)
    assert data.labels.tolist() == [2, 0, 1]
    assert data.name == "cifar10 (some.parquet)"


def test_data_that_are_not_there_or_of_another_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_data(f"cifar10:{tmp_path / 'none.parquet'}")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match="not a parquet file of images and labels"):
        load_data(f"cifar10:{tmp_path / 'torn.parquet'}")
    with pytest.raises(ValueError, match="are not known"):
        load_data("imagenet:here")


def test_rows_are_appended(tmp_path):
    for number in range(3):
        append(tmp_path / "rows.jsonl", {"number": number})
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == [0, 1, 2]


def test_a_full_disk_leaves_the_rows_that_were_there(tmp_path):
    path = tmp_path / "rows.jsonl"
    append(path, {"number": 0})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(OSError, match="What was there before is unchanged"):
            append(path, {"text": "long " * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before

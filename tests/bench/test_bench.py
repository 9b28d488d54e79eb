"""The bench: rows that are true and repeat, grids that go on where they were."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import testtime as tt
from testtime import demo
from testtime.bench import Ledger, Model, Spec, grid, load_data, measure, metrics, parse_method
from testtime.bench.ledger import outcome
from testtime.bench.run import execute
from testtime.shifts import shifted

DIGITS = load_data("digits")
NETWORK = Model("net", demo.load("resnet_bn")[0])


def spec(**changes):
    return Spec("net", DIGITS.name, **{"images": 130, "batch_size": 50, **changes})


def row(**changes):
    return measure(spec(**changes), NETWORK, DIGITS)


def test_a_row_is_what_the_method_answers():
    found = row(method="tent", shifts=("contrast:5",))
    adapted = tt.adapt(NETWORK.module, tt.Tent())
    images = shifted(DIGITS.take(range(130)), "contrast:5").images
    logits = torch.cat([adapted(x) for x in images.split(50)])
    labels = DIGITS.labels[:130]
    wrong = logits.argmax(1) != labels
    results = found["results"]
    assert results["error"] == float(wrong.double().mean())
    assert results["nll"] == pytest.approx(metrics.nll(logits, labels))
    assert results["source_error"] == row(shifts=("contrast:5",))["results"]["error"]
    assert results["error_by_class"]["3"] == float(wrong[labels == 3].double().mean())
    assert results["worst_shift"] == "contrast:5"
    assert (results["images"], found["skipped"], found["status"]) == (130, 0, "done")
    clean = torch.cat([adapted.predict(x) for x in DIGITS.images[:797].split(50)]).argmax(1)
    # Forgetting is measured on as many of the first clean images as there are, up to 1,000.
    assert results["clean_error_after"] == float((clean != DIGITS.labels).double().mean())


def test_a_row_says_how_it_was_made():
    found = json.loads(json.dumps(row(shifts=("fog:3",), method="tent:steps=2", seed=7)))
    assert found["spec"]["seed"] == 7
    assert found["data"]["sha256"] == demo.sha256()
    assert found["method"]["configuration"]["steps"] == "2"
    assert found["versions"]["torch"] == torch.__version__
    assert found["forwards"] == pytest.approx(2, abs=0.1)
    assert found["measured"]["seconds_per_image"]["median"] > 0
    assert found["measured"]["peak_mib"] is None or found["measured"]["peak_mib"] >= 0


def test_rows_repeat_whatever_ran_before():
    first = row(method="tent", shifts=("gaussian_noise:5",))
    row(method="cotta:views=2", shifts=("fog:5",))
    assert outcome(row(method="tent", shifts=("gaussian_noise:5",))) == outcome(first)
    other = row(method="tent", shifts=("gaussian_noise:5",), seed=1)
    assert outcome(other)["results"] != outcome(first)["results"]


def test_continual_never_resets_and_tells_each_shift():
    shifts = ("contrast:5", "fog:5")
    found = row(method="tent", shifts=shifts, protocol="continual")
    assert list(found["shifts"]) == list(shifts)
    alone = row(method="tent", shifts=("contrast:5",))
    assert found["shifts"]["contrast:5"]["error"] == alone["results"]["error"]
    later = row(method="tent", shifts=("fog:5",))
    assert found["shifts"]["fog:5"]["nll"] != later["results"]["nll"]
    assert len(found["results"]["error_over_stream"]) == 20


def test_batch_size_and_window_do_not_change_the_images():
    one, many = (row(shifts=("gaussian_noise:5",), batch_size=size) for size in (1, 130))
    assert one["results"]["error"] == many["results"]["error"]
    windowed = row(method="tent", batch_size=1, window=16, shifts=("contrast:5",))
    assert windowed["status"] == "done"
    with pytest.raises(ValueError, match="gathers single images, but batch_size=50"):
        spec(window=4).check()


def test_a_row_that_fails_says_so_and_does_not_stop_the_others():
    model = {"net": demo.load("resnet_gn")[0]}
    ledger = tt.bench.run(model, "digits", ["bn", "source"], images=64)
    assert [found["status"] for found in ledger] == ["failed", "done"]
    assert ledger.rows[0]["error"].startswith("ValueError: BNAdapt finds nothing to adapt")


def test_a_model_with_fewer_classes_than_the_labels_fails_in_words():
    small = Model("small", nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)))
    found = measure(spec(), small, DIGITS)
    assert "answers [50, 4], but the labels go up to 9" in found["error"]


def test_pairs_of_ones_own():
    pairs = [(DIGITS.images[k], int(DIGITS.labels[k])) for k in range(40)]
    (found,) = tt.bench.run({"net": NETWORK.module}, pairs, ["source"])
    assert found["results"]["images"] == 40


def test_a_released_benchmark(tmp_path):
    np = pytest.importorskip("numpy")
    levels = (DIGITS.images[:20] * 255).byte().permute(0, 2, 3, 1).numpy()
    np.save(tmp_path / "fog.npy", np.concatenate([levels] * 5))
    np.save(tmp_path / "labels.npy", DIGITS.labels[:20].repeat(5).numpy())
    (found,) = tt.bench.run({"net": NETWORK.module}, f"cifar10-c:{tmp_path}", ["source"], ["fog:5"])
    assert found["status"] == "done"
    assert found["results"]["clean_error_after"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tent", tt.Tent()),
        ("tent:lr=0.01", tt.Tent(optimizer=tt.Adam(lr=0.01))),
        ("tent:imagenet:momentum=0.5:steps=2", None),
        ("sar:official:vit:rho=0.1", None),
    ],
)
def test_methods_by_specification(text, expected):
    method = parse_method(text)
    if expected is not None:
        assert method == expected
    elif text.startswith("tent"):
        assert (method.optimizer, method.steps) == (tt.SGD(lr=0.00025, momentum=0.5), 2)
    else:
        assert (method.rho, method.optimizer.lr, method.train) == (0.1, 0.001, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["tnet"]}, "There is no method 'tnet'.* Did you mean 'tent'"),
        ({"methods": ["tent:offical"]}, "no preset 'offical'.* Did you mean 'official'"),
        ({"methods": ["tent:ler=1"]}, "Tent has no setting 'ler'.* Did you mean 'lr'"),
        ({"methods": ["tent:steps=0"]}, "tent:steps=0: .*at least 1"),
        ({"shifts": ["fogg:5"]}, "There is no corruption 'fogg'.* Did you mean 'fog'"),
        ({"shifts": ["fog"]}, "no severity from 1 to 5"),
        ({"protocols": ["onlin"]}, "There is no protocol 'onlin'.* Did you mean 'online'"),
        ({"batch_sizes": [0]}, "batch_size=0: it must be at least 1"),
        ({"images": 0}, "images=0"),
    ],
)
def test_what_is_unknown_is_refused_before_anything_runs(changes, message):
    with pytest.raises(ValueError, match=message):
        grid(["net"], "digits", **{"methods": ["source"], **changes})


def test_a_grid_is_a_list_of_rows():
    shifts = ["fog:5", "contrast:5"]
    rows = grid(["net"], "d", ["source", "tent"], shifts, ["online", "continual"], seeds=[0, 1])
    assert len(rows) == 2 * 2 * (2 + 1)
    assert rows[0].shifts == ("fog:5",)
    assert rows[-1].shifts == tuple(shifts)


def test_preprocessing_that_does_not_fit_stops_the_run_unless_allowed():
    network = demo.load("resnet_bn")[0]
    network.default_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    with pytest.raises(ValueError, match="do not fit the model's preprocessing"):
        tt.bench.run({"net": network}, "digits", ["source"], images=64)
    (found,) = tt.bench.run(
        {"net": network}, "digits", ["source"], images=64, allow=["preprocessing"]
    )
    assert found["model"]["preprocessing"].startswith("mean (0.485")


GRID = """
import sys
import testtime as tt
from testtime import demo
model = {"net": demo.load("resnet_bn")[0]}
shifts = ["clean", "contrast:5", "gaussian_noise:5"]
tt.bench.run(model, "digits", ["source", "tent"], shifts, images=130, out=sys.argv[1])
"""


def test_a_bench_that_is_killed_goes_on_where_it_was(tmp_path):
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    call = [sys.executable, "-W", "ignore", "-c", GRID]
    subprocess.run([*call, str(whole)], check=True, timeout=120)
    process = subprocess.Popen([*call, str(torn)])
    deadline = time.monotonic() + 60
    while not (torn.exists() and torn.read_bytes().count(b"\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = torn.read_bytes()
    with torn.open("ab") as file:
        file.write(b'{"format": 1, "spec": {"mod')  # as a kill in the middle of a line leaves it
    subprocess.run([*call, str(torn)], check=True, timeout=120)
    assert torn.read_bytes().startswith(kept)
    assert [outcome(r) for r in Ledger.read(torn)] == [outcome(r) for r in Ledger.read(whole)]


def test_rows_that_are_there_are_not_run_again(tmp_path):
    out = tmp_path / "rows.jsonl"
    for methods in (["source"], ["source", "bn"]):
        tt.bench.run({"net": NETWORK.module}, "digits", methods, images=64, out=out)
    assert [r["method"]["name"] for r in Ledger.read(out)] == ["source", "bn"]
    # Another model under the same name is another row.
    other = {"net": demo.load("resnet_gn")[0]}
    tt.bench.run(other, "digits", ["source"], images=64, out=out)
    assert len(Ledger.read(out)) == 3
    assert any("'net' had 2 different contents" in s for s in Ledger.read(out).check())


def test_ray_runs_the_same_rows_and_loses_nothing_to_a_killed_worker(tmp_path):
    ray = pytest.importorskip("ray")
    specs = [spec(method=m, images=64) for m in ("source", "bn", "tent")]
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    try:
        suicide = Model("net", _KillsItsProcessOnce(NETWORK.module, str(tmp_path / "died")))
        models, ledger = {"net": suicide}, Ledger()
        list(execute(specs, models, DIGITS, None, ledger, "ray"))
    finally:
        ray.shutdown()
    assert (tmp_path / "died").exists()
    here = [measure(s, models["net"], DIGITS) for s in specs]
    found = {r["key"]: outcome(r)["results"] for r in ledger}
    assert found == {r["key"]: outcome(r)["results"] for r in here}


class _KillsItsProcessOnce(nn.Module):
    def __init__(self, network, mark):
        super().__init__()
        self.network, self.mark, self.home = network, mark, os.getpid()

    def forward(self, x):
        if os.getpid() != self.home and not os.path.exists(self.mark):
            open(self.mark, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.network(x)

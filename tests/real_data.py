"""The readers on real files: ``python -m tests.real_data FOLDER``.

The folder holds CIFAR-10, one image for each class of ImageNet, MNIST, USPS, MIT-BIH beats, and
electricity and weather in time, as parquet and npz. Nothing here is needed by the tests.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from testtime.shifts import Data, Decode, continual, natural, read_npz, read_parquet, shifted
from testtime.shifts.wnids import WNIDS


def cifar10(folder: Path) -> list[Data]:
    test = read_parquet(folder / "cifar10/test.parquet", x="img")
    train = read_parquet(sorted((folder / "cifar10").glob("train-*.parquet")), x="img")
    assert test.labels.bincount().tolist() == [1000] * 10
    assert train.labels.bincount().tolist() == [5000] * 10
    # The per-channel means of CIFAR-10 that everybody normalises with.
    means = train.load().images.mean(dim=(0, 2, 3))
    assert torch.allclose(means, torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4)
    return [test, train]


def imagenet(folder: Path) -> list[Data]:
    import pyarrow.parquet as pq

    data = read_parquet(folder / "imagenet1k/sample-1000.parquet", x="img")
    wnids = pq.read_table(folder / "imagenet1k/sample-1000.parquet", columns=["wnid"])["wnid"]
    assert [WNIDS[label] for label in data.labels] == wnids.to_pylist()
    assert shifted(data, "fog:3", seed=1)[7][0].shape == (3, 224, 224)
    return [data]


def mnist_to_usps(folder: Path) -> list[Data]:
    mnist = read_parquet(folder / "mnist/test.parquet", x="img", decode=Decode(channels=1))
    usps = read_parquet(folder / "usps/test.parquet", x="img", decode=Decode(28, channels=1))
    stream = continual({"mnist": mnist, "usps": usps}, batch_size=500)
    sizes = [(batch.shifts[0], *batch.images.shape[1:]) for batch in stream]
    assert sizes == [("mnist", 1, 28, 28)] * 20 + [("usps", 1, 28, 28)] * 5
    return [mnist, usps]


def ecg_by_patient(folder: Path) -> list[Data]:
    import numpy as np

    beats = read_npz(folder / "ecg/mitbih_beats.npz", x="beats", y="label", groups="patient")
    ds2 = torch.from_numpy(np.load(folder / "ecg/mitbih_beats.npz")["ds2"].astype("int64"))
    others = beats.take(torch.isin(beats.groups, ds2))
    assert others.labels.bincount().tolist() == [3300, 546, 1185, 176, 7]
    assert others.images.shape == (5214, 128)
    return [beats, others]


def in_time(folder: Path) -> list[Data]:
    elec = read_parquet(folder / "streams/elec.parquet", y="class")
    weather = read_parquet(folder / "streams/weather.parquet", y="target")
    for data, columns in ((elec, 6), (weather, 8)):
        batches = list(natural(data, batch_size=1000))
        assert torch.cat([batch.index for batch in batches]).equal(torch.arange(len(data)))
        assert batches[0].images.shape == (1000, columns)
    return [elec, weather]


CHECKS: tuple[Callable[[Path], list[Data]], ...] = (
    cifar10,
    imagenet,
    mnist_to_usps,
    ecg_by_patient,
    in_time,
)


def main(folder: str) -> None:
    for check in CHECKS:
        started = time.perf_counter()
        read = check(Path(folder))
        print(f"{check.__name__}: {time.perf_counter() - started:.1f} s")
        for data in read:
            print(f"    {data.fingerprint()}")


if __name__ == "__main__":
    main(*sys.argv[1:])

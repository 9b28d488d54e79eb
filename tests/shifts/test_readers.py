"""Readers, on small files of exactly the layouts of the releases."""

import io
import re

import pytest
import torch

from testtime.shifts import (
    Decode,
    read_cifar_c,
    read_folder,
    read_huggingface,
    read_imagenet,
    read_imagenet_c,
    read_npz,
    read_pairs,
    read_parquet,
)
from testtime.shifts.wnids import WNIDS

np = pytest.importorskip("numpy")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

RANDOM = np.random.default_rng(0)


def levels(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def expected(array):
    return torch.from_numpy(array).permute(0, 3, 1, 2) / 255


def picture(array, kind="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def put(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".JPEG": "jpeg", ".jpg": "jpeg", ".png": "png"}[path.suffix]
    path.write_bytes(picture(array, kind, **options))


# CIFAR-10-C and CIFAR-100-C: NAME.npy, uint8 [5 * N, 32, 32, 3], and labels.npy, [5 * N].


@pytest.fixture
def cifar_c(tmp_path):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "fog.npy", levels(20, 32, 32, 3))
    np.save(folder / "gaussian_noise.npy", levels(20, 32, 32, 3))
    np.save(folder / "labels.npy", np.tile(np.array([3, 8, 8, 0], dtype=np.uint8), 5))
    return folder


def test_cifar_c(cifar_c):
    fog = np.load(cifar_c / "fog.npy")
    for severity in range(1, 6):
        data = read_cifar_c(cifar_c, f"fog:{severity}")
        assert torch.equal(data.images, expected(fog[4 * (severity - 1) : 4 * severity]))
        assert data.images.dtype == torch.float32
        assert data.labels.tolist() == [3, 8, 8, 0]
        assert data.name == f"CIFAR-10-C fog:{severity}"
    assert torch.equal(data[2][0], expected(fog)[18])


def test_cifar_c_has_the_hash_of_what_is_read(cifar_c):
    marks = {read_cifar_c(cifar_c, f"fog:{s}").sha256 for s in (1, 2, 2)}
    assert len(marks) == 2


@pytest.mark.parametrize(
    ("shift", "error", "said"),
    [
        ("fogg:5", FileNotFoundError, r"has no fogg.npy \(it has: fog, gau.*Did you mean 'fog'"),
        ("fog:6", ValueError, "no severity from 1 to 5"),
        ("fog", ValueError, "no severity from 1 to 5"),
        ("clean", ValueError, "no severity from 1 to 5"),
    ],
)
def test_cifar_c_without_that_shift(cifar_c, shift, error, said):
    with pytest.raises(error, match=said):
        read_cifar_c(cifar_c, shift)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def save(array):
    return lambda path: np.save(path, array)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("fog.npy", cut, "fog.npy is damaged, or shorter than its header says"),
        ("fog.npy", lambda path: path.write_bytes(b""), "fog.npy is damaged"),
        ("fog.npy", lambda path: path.write_bytes(b"<html>"), "fog.npy is damaged"),
        ("fog.npy", save(levels(20, 3, 32, 32)), "holds uint8 .20, 3, 32, 32., not"),
        ("fog.npy", save(np.zeros((20, 32, 32, 3))), "holds float64"),
        ("fog.npy", save(levels(15, 32, 32, 3)), "fog.npy has 15 images. One of the two is short"),
        ("labels.npy", cut, "labels.npy is damaged"),
        ("labels.npy", save(np.arange(20)), "doesn't repeat the same labels"),
        ("labels.npy", save(np.zeros(20)), "labels.npy holds float64"),
        ("labels.npy", lambda path: path.unlink(), "There is no file"),
    ],
)
def test_cifar_c_that_is_damaged(cifar_c, file, damage, said):
    damage(cifar_c / file)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        read_cifar_c(cifar_c, "fog:5")


# ImageNet-C: CORRUPTION/SEVERITY/WNID/ILSVRC2012_val_NUMBER.JPEG, 224 x 224; the archives hold
# several corruptions each (weather.tar: snow, frost, fog, brightness).


@pytest.mark.parametrize("archive", [".", "weather"])
def test_imagenet_c(tmp_path, archive):
    root = tmp_path / "imagenet-c"
    for name, severity in (("fog", 5), ("snow", 5), ("fog", 1)):
        for wnid, number in (("n02099601", 3), ("n01440764", 293), ("n01440764", 12)):
            file = f"{wnid}/ILSVRC2012_val_{number:08}.JPEG"
            put(root / archive / name / str(severity) / file, levels(224, 224, 3))
    data = read_imagenet_c(root, "fog:5")
    assert data.labels.tolist() == [0, 0, 207]
    assert data.name == "imagenet-c fog:5"
    first = root / archive / "fog" / "5" / "n01440764" / "ILSVRC2012_val_00000012.JPEG"
    assert torch.equal(data[0][0], expected(np.array(Image.open(first))[None])[0])
    assert data.fingerprint()["sha256_of"] == "paths and sizes"
    with pytest.raises(FileNotFoundError, match=r"no snow/1 \(it has at this severity: fog\)"):
        read_imagenet_c(root, "snow:1")


# ImageNet-A: WNID/0.000116_digital clock _ digital clock_0.865662.jpg; ImageNet-R:
# WNID/art_0.jpg; ImageNet-Sketch: WNID/sketch_0.JPEG; ImageNet-V2: 0 to 999 for the class's index,
# hash.jpeg. The first two have a README.txt beside the folders.


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        (["n01498041/0.000116_digital clock _ digital clock_0.865662.jpg"], [6]),
        (["n01443537/art_0.jpg", "n01443537/art_1.jpg", "n12267677/toy_9.jpg"], [1, 1, 988]),
        (["n01440764/sketch_0.JPEG", "n15075141/sketch_7.JPEG"], [0, 999]),
        (["10/a1b2.jpg", "2/ffee.jpg", "999/0011.jpg"], [10, 2, 999]),
    ],
    ids=["A", "R", "Sketch", "V2"],
)
def test_imagenets_relatives(tmp_path, files, labels):
    for file in files:
        put(tmp_path / file, levels(300, 260, 3))
    (tmp_path / "README.txt").write_text("ImageNet")
    (tmp_path / ".DS_Store").write_bytes(b"")
    data = read_imagenet(tmp_path, name="relative")
    assert data.labels.tolist() == labels
    assert data.images.shape == (len(labels), 3, 224, 224)
    assert data.fingerprint()["preprocessing"] == (
        "RGB, shorter side 256 (bilinear), centre 224 x 224"
    )


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("n01440765", "none of the 1,000 classes of ImageNet: n01440765.*mean 'n01440764'"),
        ("1000", "none of the 1,000 classes"),
        ("cats", "1 of 2 folders of"),
        ("7", "folders of both kinds"),
    ],
)
def test_folders_that_are_no_classes_of_imagenet(tmp_path, folder, said):
    put(tmp_path / "n01443537" / "a.jpg", levels(8, 8, 3))
    put(tmp_path / folder / "b.jpg", levels(8, 8, 3))
    with pytest.raises(ValueError, match=said):
        read_imagenet(tmp_path)


def test_the_list_of_classes():
    assert len(set(WNIDS)) == 1000
    assert list(WNIDS) == sorted(WNIDS)
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in WNIDS)
    # tench, goldfish, golden retriever, tabby, toilet tissue
    known = {0: "n01440764", 1: "n01443537", 207: "n02099601", 281: "n02123045", 999: "n15075141"}
    assert {i: WNIDS[i] for i in known} == known


# Folders of images.


def test_a_folder_for_each_class(tmp_path):
    cats, dogs = levels(2, 9, 7, 3), levels(1, 9, 7, 3)
    put(tmp_path / "dog" / "deep" / "1.png", dogs[0])
    put(tmp_path / "cat" / "b.png", cats[1])
    put(tmp_path / "cat" / "a.png", cats[0])
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    data = read_folder(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1]
    assert torch.equal(data.images, expected(np.concatenate([cats, dogs])))


def test_the_fingerprint_sees_another_size_or_name(tmp_path):
    put(tmp_path / "cat" / "a.png", levels(9, 7, 3))
    before = read_folder(tmp_path).sha256
    put(tmp_path / "cat" / "a.png", levels(9, 9, 3))
    larger = read_folder(tmp_path).sha256
    (tmp_path / "cat" / "a.png").rename(tmp_path / "cat" / "b.png")
    assert len({before, larger, read_folder(tmp_path).sha256}) == 3


def test_a_broken_image_is_named_when_it_is_read(tmp_path):
    put(tmp_path / "cat" / "a.png", levels(9, 7, 3))
    for kind in ("png", "jpg"):
        path = tmp_path / "cat" / f"b.{kind}"
        put(path, levels(90, 70, 3))
        path.write_bytes(path.read_bytes()[:500])
        data = read_folder(tmp_path)
        assert data[0][0].shape == (3, 9, 7)
        with pytest.raises(ValueError, match=f"cat/b.{kind} is not a whole image"):
            data[1]
        path.unlink()


def test_other_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        read_folder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no image"):
        read_folder(tmp_path)
    put(tmp_path / "a.png", levels(9, 7, 3))
    with pytest.raises(ValueError, match=r"1 images lie in .* itself, in no class: a.png"):
        read_folder(tmp_path)


def test_sizes_that_do_not_fit_into_a_batch(tmp_path):
    put(tmp_path / "cat" / "a.png", levels(9, 7, 3))
    put(tmp_path / "cat" / "b.png", levels(9, 8, 3))
    data = read_folder(tmp_path)
    assert [image.shape[2] for image, _ in data] == [7, 8]
    with pytest.raises(ValueError, match=r"b.png has 8 x 9 pixels and .*a.png 7 x 9.*Decode"):
        _ = data.images
    with pytest.raises(ValueError, match=r"a.png has 7 x 9 pixels, fewer than the crop of 8"):
        _ = read_folder(tmp_path, decode=Decode(crop=8))[0]


def test_decoding_is_that_of_torchvision():
    array = levels(50, 33, 3)
    transforms = pytest.importorskip("torchvision.transforms")
    for side, crop in ((40, 32), (20, 20), (65, 64), (33, 7)):
        ours = Decode(resize=side, crop=crop)(picture(array), "image")
        chain = [transforms.Resize(side), transforms.CenterCrop(crop), transforms.PILToTensor()]
        assert torch.equal(ours, transforms.Compose(chain)(Image.fromarray(array)))


def test_channels_and_modes():
    grey = levels(9, 7)
    assert torch.equal(Decode()(picture(grey), "")[2], torch.from_numpy(grey))
    assert torch.equal(Decode(channels=1)(picture(grey), "")[0], torch.from_numpy(grey))
    assert Decode()(picture(levels(9, 7, 4)), "").shape == (3, 9, 7)
    with pytest.raises(ValueError, match=r"x.png has the mode I;16, more than 8 bits"):
        Decode()(picture(grey.astype("uint16")), "x.png")
    for bad in ({"channels": 2}, {"resize": 0}, {"interpolation": "cubic"}):
        with pytest.raises(ValueError, match=r"found|Unknown"):
            Decode(**bad)


# .npz


def npz(path, **arrays):
    np.savez(path / "some.npz", **arrays)
    return path / "some.npz"


@pytest.mark.parametrize(
    ("array", "shape"),
    [
        (levels(4, 9, 7, 3), (4, 3, 9, 7)),
        (levels(4, 3, 9, 7), (4, 3, 9, 7)),
        (levels(4, 9, 7, 1), (4, 1, 9, 7)),
        (levels(4, 9, 7), (4, 1, 9, 7)),
        (levels(4, 9, 7, 3) / np.float32(255), (4, 3, 9, 7)),
        (levels(4, 3, 9, 7) / 255, (4, 3, 9, 7)),
    ],
)
def test_npz_of_images(tmp_path, array, shape):
    data = read_npz(npz(tmp_path, x=array, y=np.arange(4)), x="x", y="y")
    assert data.images.shape == shape
    assert data.images.dtype == torch.float32
    whole = array.astype("float64") / (255 if array.dtype == np.uint8 else 1)
    assert data.images.sum().item() == pytest.approx(whole.sum(), rel=1e-5)
    if array.shape[-1] == 3:
        assert data.images[2, 1, 5, 6].item() == pytest.approx(whole[2, 5, 6, 1])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype="int16").reshape(3, 4) - 6,
        np.linspace(-3, 900, 12).reshape(3, 4),
        np.linspace(-3, 900, 24).reshape(3, 2, 4),
    ],
)
def test_signals_and_tables_are_taken_as_they_are(tmp_path, array):
    path = npz(tmp_path, beats=array, y=np.array([0, 1, 4], "uint8"), patient=np.array([7, 7, 9]))
    data = read_npz(path, x="beats", y="y", groups="patient", name="ecg")
    assert torch.equal(data.images, torch.from_numpy(array).float())
    assert data.groups.tolist() == [7, 7, 9]
    assert data.labels.dtype == torch.int64
    assert data.name == "ecg"


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": levels(4, 9, 7, 3)}, r"no array 'y' for y \(it has: x\)"),
        ({"z": levels(4, 9, 7, 3), "y": np.arange(4)}, r"no array 'x' for x \(it has: z, y\)"),
        ({"x": levels(4, 9, 7, 3), "y": np.arange(3)}, "4 samples but labels of shape"),
        ({"x": levels(4, 9, 7, 3), "y": np.arange(4) / 2}, "the labels are float64. Give integers"),
        ({"x": 255.0 * np.ones((4, 3, 9, 7)), "y": np.arange(4)}, "floats from 255 to 255"),
        ({"x": np.full((4, 2), np.nan), "y": np.arange(4)}, "array x: 8 values are NaN"),
        ({"x": np.array(["a"] * 4), "y": np.arange(4)}, "the samples are <U1"),
        ({"x": np.array([{}] * 4), "y": np.arange(4)}, "not a whole .npz file"),
    ],
)
def test_npz_that_is_not_what_it_should_be(tmp_path, arrays, said):
    with pytest.raises(ValueError, match=said):
        read_npz(npz(tmp_path, **arrays), x="x", y="y")


def test_npz_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_npz(tmp_path / "none.npz", x="x", y="y")
    path = npz(tmp_path, x=levels(40, 9, 7, 3), y=np.arange(40))
    for damaged in (path.read_bytes()[:-40], b"", b"<html>"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is not a whole .npz file"):
            read_npz(path, x="x", y="y")


# parquet


def parquet(path, name="some.parquet", **columns):
    pq.write_table(pa.table(columns), path / name)
    return path / name


def encoded(arrays):
    return [{"bytes": picture(array), "path": None} for array in arrays]


def test_parquet_of_encoded_images(tmp_path):
    arrays = levels(3, 9, 7, 3)
    for column in (encoded(arrays), [picture(array) for array in arrays]):
        data = read_parquet(parquet(tmp_path, image=column, label=[2, 0, 1]), x="image")
        assert torch.equal(data.images, expected(arrays))
        assert data.labels.tolist() == [2, 0, 1]
    assert data.preprocessing == "RGB"


def test_several_parquet_files_are_one(tmp_path):
    arrays = levels(3, 9, 7, 3)
    paths = [
        parquet(tmp_path, "a.parquet", image=encoded(arrays[:2]), label=[2, 0]),
        parquet(tmp_path, "b.parquet", image=encoded(arrays[2:]), label=[1]),
    ]
    data = read_parquet(paths, x="image")
    assert torch.equal(data.images, expected(arrays))
    assert data.sha256 != read_parquet(paths[::-1], x="image").sha256


def test_parquet_of_arrays(tmp_path):
    arrays = levels(3, 9, 7, 3)
    nested = pa.array(arrays.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))
    data = read_parquet(parquet(tmp_path, pixels=nested, label=[2, 0, 1]), x="pixels")
    assert torch.equal(data.images, expected(arrays))
    fixed = pa.array([[0.5, -2.0]] * 3, pa.list_(pa.float32(), 2))
    data = read_parquet(parquet(tmp_path, signal=fixed, label=[2, 0, 1]), x="signal")
    assert data.images.tolist() == [[0.5, -2.0]] * 3


def test_parquet_of_a_table_in_time(tmp_path):
    import datetime as dt

    times = [dt.datetime(2026, 1, 1, hour, tzinfo=dt.UTC) for hour in (1, 2, 3)]
    path = parquet(
        tmp_path, at=times, a=[1.5, 2.5, 3.5], b=[1, 2, 3], where=[5, 5, 6], rain=[0, 1, 1]
    )
    data = read_parquet(path, y="rain", timestamps="at", groups="where")
    assert data.images.tolist() == [[1.5, 1], [2.5, 2], [3.5, 3]]
    assert data.timestamps.diff().tolist() == [3600, 3600]
    assert data.timestamps.dtype == torch.float64
    assert read_parquet(path, x=["b"], y="rain").images.tolist() == [[1], [2], [3]]


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"a": [1.0], "label": [1]}, {"x": "b"}, r"no column 'b' \(it has: a, label\)"),
        ({"a": [1.0], "labels": [1]}, {"x": "a"}, "no column 'label'.*Did you mean 'labels'"),
        ({"a": ["x"], "label": [1]}, {}, "column a holds string"),
        ({"label": [1]}, {}, "no columns for the samples"),
        ({"a": [1.0, None], "label": [1, 2]}, {}, "column a: 1 values are missing"),
        ({"a": [1.0, 2.0], "label": [1, None]}, {}, "column label: 1 values are missing"),
        ({"a": [1.0], "label": [0.5]}, {}, "the labels are float64"),
        ({"a": [1.0], "label": ["cat"]}, {}, "column label holds string"),
        ({"a": [[1.0], [1.0, 2.0]], "label": [1, 2]}, {"x": "a"}, "lengths from 1 to 2"),
        ({"a": [float("nan")], "label": [1]}, {}, "1 values are NaN"),
    ],
)
def test_parquet_that_is_not_what_it_should_be(tmp_path, columns, options, said):
    with pytest.raises(ValueError, match=said):
        read_parquet(parquet(tmp_path, **columns), **options)


def test_parquet_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_parquet(tmp_path / "none.parquet")
    path = parquet(tmp_path, a=[1.0], label=[1])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"some.parquet is not a parquet file"):
        read_parquet(path)


def test_broken_images_in_parquet_are_named_when_they_are_read(tmp_path):
    rows = [*encoded(levels(1, 9, 7, 3)), {"bytes": b"no", "path": None}, {"bytes": None}]
    data = read_parquet(parquet(tmp_path, image=rows, label=[1, 2, 3]), x="image")
    with pytest.raises(ValueError, match="column image, row 1 is not a whole image"):
        data[1]
    with pytest.raises(ValueError, match="column image, row 2 is empty"):
        data[2]


# Hugging Face


def test_hugging_face(tmp_path):
    datasets = pytest.importorskip("datasets", reason="a part of the extra data")
    arrays = levels(3, 9, 7, 3)
    made = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(a) for a in arrays], "label": [2, 0, 1], "z": [1.0, 2.0, 3.0]},
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "label": datasets.ClassLabel(names=["a", "b", "c"]),
                "z": datasets.Value("float32"),
            }
        ),
    )
    data = read_huggingface(made, name="three")
    assert torch.equal(data.images, expected(arrays))
    assert data.labels.tolist() == [2, 0, 1]
    turned = made.select([2, 1])
    assert torch.equal(read_huggingface(turned).images, expected(arrays)[[2, 1]])
    assert data.sha256 != read_huggingface(turned).sha256
    assert data.sha256 == read_huggingface(made.select([0, 1, 2])).sha256
    assert read_huggingface(made, x=["z"]).images.tolist() == [[1], [2], [3]]
    put(tmp_path / "a.png", arrays[0])
    paths = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png")], "label": [1]})
    paths = paths.cast_column("image", datasets.Image())
    assert torch.equal(read_huggingface(paths).images, expected(arrays[:1]))
    with pytest.raises(ValueError, match=r"no column 'img' \(it has: image, label, z\)"):
        read_huggingface(made, x="img")
    with pytest.raises(TypeError, match="Found IterableDataset"):
        read_huggingface(made.to_iterable_dataset())
    with pytest.raises(TypeError, match=r"Found splits \(test\)"):
        read_huggingface(datasets.DatasetDict({"test": made}))


@pytest.mark.parametrize("other", [[(1, 2)], {"test": 1}, "cifar10"])
def test_what_is_no_hugging_face_data_set(other):
    with pytest.raises(TypeError, match=r"not a datasets.Dataset"):
        read_huggingface(other)


# pairs


class Indexed:
    """A PyTorch data set: no iterator, and no error at its end."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index % len(self.y)], self.y[index % len(self.y)]


def test_pairs_of_every_kind():
    array = levels(5, 9, 7, 3)
    x, y = expected(array), torch.tensor([4, 3, 2, 1, 0])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    kinds = [
        list(zip(x, y, strict=True)),
        ((image, int(label)) for image, label in zip(array, y, strict=True)),
        [[Image.fromarray(image), label] for image, label in zip(array, y, strict=True)],
        Indexed(array, y),
        loader,
    ]
    read = [read_pairs(pairs, name="some") for pairs in kinds]
    for data in read:
        assert torch.equal(data.images, x)
        assert torch.equal(data.labels, y)
    assert len({data.sha256 for data in read}) == 2  # floats, and bytes


def test_an_indexable_data_set_is_read_when_it_is_asked_for():
    array = levels(5, 9, 7, 3)
    dataset = Indexed([Image.fromarray(image) for image in array], [0, 1, 2, 3, 4])
    data = read_pairs(dataset, name="lazy", labels=dataset.y)
    assert data.fingerprint()["sha256_of"] == "labels"
    dataset.x[3] = Image.fromarray(array[0])
    assert torch.equal(data.images, expected(array[[0, 1, 2, 0, 4]]))
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    dataset.x[2] = Image.fromarray(array[2][:5])
    with pytest.raises(ValueError, match=r"Pair 2 of lazy has samples of shape \[5, 7, 3\]"):
        read_pairs(dataset, name="lazy", labels=dataset.y).load()
    with pytest.raises(ValueError, match="5 samples but labels of shape"):
        read_pairs(dataset, name="lazy", labels=[1, 2])


@pytest.mark.parametrize(
    ("pairs", "error", "said"),
    [
        ([], ValueError, "some has no pairs. An iterator can be read only once"),
        ([torch.zeros(3, 8, 8)], TypeError, "Pair 0 of some is a Tensor, not"),
        ([(torch.zeros(3, 8, 8), 1), (1, 2, 3)], TypeError, "Pair 1 of some is a tuple, not"),
        ([(torch.zeros(4, 3, 8, 8), [1, 2])], ValueError, "Give one label a sample"),
        ([(torch.zeros(3, 8), 1), (torch.zeros(3, 9), 1)], ValueError, "Bring all to one shape"),
        ([(torch.full((3, 8, 8), 255.0), 1)], ValueError, "floats from 255 to 255"),
        ([(torch.zeros(3, 8, 8), 1.5)], ValueError, "the labels are float64"),
    ],
)
def test_pairs_that_are_not_what_they_should_be(pairs, error, said):
    with pytest.raises(error, match=said):
        read_pairs(pairs, name="some")

"""Corrupted copies of folders: what is written, what a kill leaves, what is refused."""

import fcntl
import hashlib
import io
import json
import os
import subprocess
import sys

import pytest
import torch

from testtime.shifts import Decode, corrupt, read_imagenet_c
from testtime.shifts import files as module
from testtime.shifts.files import corrupt_folder

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

SHIFTS = ["fog:1", "fog:5", "gaussian_noise:3"]
LAYOUT = {
    "n01440764/ILSVRC2012_val_00000293.JPEG": (40, 30),
    "n01440764/b.png": (16, 17),
    "n02099601/deep/c.webp": (20, 20),
}


@pytest.fixture
def source(tmp_path):
    random = np.random.default_rng(0)
    for path, (width, height) in LAYOUT.items():
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        array = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "in" / path)
    (tmp_path / "in" / "README.txt").write_text("no image")
    return tmp_path / "in"


def tree(folder):
    """Every file below a folder, with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def lines(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def levels(data):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)


def test_the_same_tree_for_every_corruption_and_severity(source, tmp_path):
    done = []
    outcome = corrupt_folder(source, tmp_path / "out", SHIFTS, progress=done.append)
    assert (outcome.written, outcome.kept, outcome.broken) == (9, 0, {})
    assert sum(done) == 9
    folders = ("fog/1", "fog/5", "gaussian_noise/3")
    assert set(tree(tmp_path / "out")) == {
        "manifest.jsonl",
        *(f"{folder}/{path}" for folder in folders for path in LAYOUT),
    }
    data = read_imagenet_c(tmp_path / "out", "fog:5", decode=Decode(crop=16))
    assert data.labels.tolist() == [0, 0, 207]
    assert len(data.images) == 3


def test_the_manifest_says_how_each_file_was_made(source, tmp_path):
    corrupt_folder(source, tmp_path / "out", SHIFTS, seed=3)
    run, *made = lines(tmp_path / "out")
    assert run["run"]["seed"] == 3
    assert set(run["run"]["versions"]) == {"testtime", "torch", "pillow"}
    assert len(made) == 9
    for line in made:
        original = (source / line["source"]).read_bytes()
        assert hashlib.sha256(original).hexdigest() == line["source_sha256"]
        generator = torch.Generator().manual_seed(line["seed"])
        changed = corrupt(
            levels(original)[None] / 255,
            line["type"],
            line["severity"],
            generator=generator,
            table=line["table"],
        )
        cut = (changed[0].double() * 255 + 1e-4).floor().to(torch.uint8)
        data = (tmp_path / "out" / line["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (line["bytes"], line["sha256"])
        if line["source"].endswith(".JPEG"):
            buffer = io.BytesIO()
            array = cut.permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(array).save(buffer, "JPEG", quality=85, optimize=True)
            assert data == buffer.getvalue()
        else:
            assert torch.equal(levels(data), cut)


def test_whole_levels_stay():
    whole = torch.arange(256).float().view(1, 16, 16).repeat(3, 1, 1) / 255
    assert torch.equal(levels(module._encode(whole, ".png"))[0].flatten(), torch.arange(256))


def test_a_file_does_not_depend_on_the_others(source, tmp_path):
    corrupt_folder(source, tmp_path / "all", SHIFTS)
    (source / "n01440764" / "ILSVRC2012_val_00000293.JPEG").unlink()
    corrupt_folder(source, tmp_path / "some", SHIFTS[:0:-1])
    every, few = tree(tmp_path / "all"), tree(tmp_path / "some")
    del few["manifest.jsonl"]
    assert len(few) == 4
    assert few.items() <= every.items()


def test_size_and_table_are_chosen(source, tmp_path):
    decode = Decode(resize=140, crop=128)
    corrupt_folder(source, tmp_path / "out", ["fog:5"], decode=decode)
    assert {(line["height"], line["table"]) for line in lines(tmp_path / "out")[1:]} == {
        (128, "imagenet")
    }
    corrupt_folder(source, tmp_path / "small", ["fog:5"])
    assert {line["table"] for line in lines(tmp_path / "small")[1:]} == {"cifar"}


class Killed(BaseException):
    """Stands for a kill in this process."""


@pytest.mark.parametrize("at", ["write_bytes", "replace"])
@pytest.mark.parametrize("number", [1, 4, 9])
def test_a_run_that_was_broken_off_goes_on_to_the_same_bytes(
    source, tmp_path, monkeypatch, at, number
):
    corrupt_folder(source, tmp_path / "whole", SHIFTS)
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == number:
            raise Killed
        return real(*args)

    place = os if at == "replace" else module.Path
    real = getattr(place, at)
    with monkeypatch.context() as patch:
        patch.setattr(place, at, stop)
        with pytest.raises(Killed):
            corrupt_folder(source, tmp_path / "out", SHIFTS)
    outcome = corrupt_folder(source, tmp_path / "out", SHIFTS)
    assert (outcome.kept, outcome.written) == (number - 1, 10 - number)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_after_kill_9_it_goes_on_to_the_same_bytes(source, tmp_path):
    corrupt_folder(source, tmp_path / "whole", SHIFTS)
    code = (
        "import os, signal\nfrom testtime.shifts.files import corrupt_folder\n"
        "real, calls = os.replace, []\n"
        "def replace(*args):\n"
        "    calls.append(args)\n"
        "    if len(calls) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    real(*args)\n"
        "os.replace = replace\n"
        f"corrupt_folder({str(source)!r}, {str(tmp_path / 'out')!r}, {SHIFTS})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    assert {".part", "manifest.jsonl"} < set(tree(tmp_path / "out"))
    assert len(lines(tmp_path / "out")) == 6  # the last file is not in its place yet
    corrupt_folder(source, tmp_path / "out", SHIFTS)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("torn", [b'{"file": "fog/1/n', b"\n", None])
def test_a_torn_manifest_is_mended(source, tmp_path, torn):
    corrupt_folder(source, tmp_path / "out", SHIFTS)
    whole = tree(tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.jsonl"
    text = manifest.read_bytes()
    if torn == b"\n":  # the last line is whole, its file is not there
        (tmp_path / "out" / lines(tmp_path / "out")[-1]["file"]).unlink()
    elif torn is None:  # killed in the middle of the first line
        manifest.write_bytes(text[:30])
        for path in (tmp_path / "out").rglob("*.*"):
            if path != manifest:
                path.unlink()
    else:
        manifest.write_bytes(text + torn)
    corrupt_folder(source, tmp_path / "out", SHIFTS)
    assert tree(tmp_path / "out") == whole


def test_more_shifts_and_images_are_added(source, tmp_path):
    corrupt_folder(source, tmp_path / "out", SHIFTS[:1])
    Image.new("RGB", (16, 16)).save(source / "n01440764" / "new.png")
    outcome = corrupt_folder(source, tmp_path / "out", SHIFTS)
    assert (outcome.kept, outcome.written) == (3, 9)
    assert len(lines(tmp_path / "out")) == 13


def test_a_file_that_went_missing_is_made_again(source, tmp_path):
    corrupt_folder(source, tmp_path / "out", SHIFTS)
    path = tmp_path / "out" / "fog" / "1" / "n01440764" / "b.png"
    before = path.read_bytes()
    path.write_bytes(b"")
    assert corrupt_folder(source, tmp_path / "out", SHIFTS).written == 1
    assert path.read_bytes() == before


@pytest.fixture
def broken(source):
    (source / "n02099601" / "cut.png").write_bytes((source / "n01440764/b.png").read_bytes()[:300])
    (source / "n02099601" / "text.jpg").write_text("no image")
    Image.new("RGB", (15, 30)).save(source / "n02099601" / "thin.png")
    return source


def test_broken_images_are_named_and_left_out(broken, tmp_path):
    done = []
    outcome = corrupt_folder(broken, tmp_path / "out", SHIFTS, progress=done.append)
    assert sum(done) == 18
    assert outcome.written == 9
    assert set(outcome.broken) == {
        f"n02099601/{name}" for name in ("cut.png", "text.jpg", "thin.png")
    }
    said = outcome.broken.values()
    assert all(text.startswith("n02099601/") for text in said)
    assert sum("is not a whole image" in text for text in said) == 2
    assert sum("at least 16" in text for text in said) == 1
    again = corrupt_folder(broken, tmp_path / "out", SHIFTS)
    assert again.broken == outcome.broken


def test_strict_stops_at_a_broken_image(broken, tmp_path):
    with pytest.raises(ValueError, match=r"n02099601/cut.png is not a whole.*do without strict"):
        corrupt_folder(broken, tmp_path / "out", SHIFTS, strict=True)


def test_all_images_broken_is_an_error(broken, tmp_path):
    for path in LAYOUT:
        (broken / path).unlink()
    with pytest.raises(ValueError, match=r"None of the 3 images .* could be used"):
        corrupt_folder(broken, tmp_path / "out", SHIFTS)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "holds another run: seed 0, now 1"),
        ({"table": "imagenet"}, "table imagenet from 128 pixels on, else cifar, now imagenet"),
        ({"decode": Decode(crop=16)}, "decode"),
    ],
)
def test_the_folder_of_another_run_is_refused(source, tmp_path, options, said):
    corrupt_folder(source, tmp_path / "out", SHIFTS[:1])
    before = tree(tmp_path / "out")
    with pytest.raises(FileExistsError, match=said):
        corrupt_folder(source, tmp_path / "out", SHIFTS, **options)
    assert tree(tmp_path / "out") == before


def test_images_of_another_folder_and_version_are_another_run(source, tmp_path, monkeypatch):
    corrupt_folder(source, tmp_path / "out", SHIFTS[:1])
    monkeypatch.setattr(torch, "__version__", "1.0")
    source.rename(tmp_path / "moved")
    with pytest.raises(FileExistsError, match=r"another run: source .*/in, now .*/moved; versions"):
        corrupt_folder(tmp_path / "moved", tmp_path / "out", SHIFTS)


def test_other_output_folders_are_refused(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_bytes(b"mine")
    (tmp_path / "file").write_bytes(b"mine")
    for out, error, said in (
        (tmp_path / "full", FileExistsError, "holds files but no manifest.jsonl"),
        (tmp_path / "file", FileExistsError, "is a file"),
        (source / "out", ValueError, "lies in"),
        (source, ValueError, "lies in"),
    ):
        before = tree(tmp_path)
        with pytest.raises(error, match=said):
            corrupt_folder(source, out, SHIFTS)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("text", ["{}\n", "words\n", '{"run": 3}\n', "[]\n"])
def test_a_damaged_manifest_is_refused(source, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.jsonl").write_text(text)
    with pytest.raises(FileExistsError, match="is damaged, or no manifest"):
        corrupt_folder(source, tmp_path / "out", SHIFTS)
    assert (tmp_path / "out" / "manifest.jsonl").read_text() == text


def test_a_manifest_with_a_damaged_end_is_refused(source, tmp_path):
    corrupt_folder(source, tmp_path / "out", SHIFTS)
    with (tmp_path / "out" / "manifest.jsonl").open("a") as file:
        file.write("edited\n")
    with pytest.raises(FileExistsError, match=r"manifest.jsonl is damaged"):
        corrupt_folder(source, tmp_path / "out", SHIFTS)


def test_a_second_process_is_refused(source, tmp_path):
    corrupt_folder(source, tmp_path / "out", SHIFTS[:1])
    with (tmp_path / "out" / "manifest.jsonl").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BlockingIOError, match="Another process is writing"):
            corrupt_folder(source, tmp_path / "out", SHIFTS)


def test_a_full_disk_leaves_whole_files_only(source, tmp_path, monkeypatch):
    calls = []

    def full(path, data):
        calls.append(path)
        if len(calls) == 3:
            real(path, data[:10])
            raise OSError(28, "No space left on device", str(path))
        return real(path, data)

    real = module.Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(module.Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            corrupt_folder(source, tmp_path / "out", SHIFTS)
    made = tree(tmp_path / "out")
    assert len(made) == 3
    assert len(lines(tmp_path / "out")) == 3
    corrupt_folder(source, tmp_path / "out", SHIFTS)
    assert made.keys() < tree(tmp_path / "out").keys()


@pytest.mark.parametrize("shifts", [["fgo:5"], ["fog:6"], ["clean"], [], ["fog:5+contrast:5"]])
def test_unknown_shifts_write_nothing(source, tmp_path, shifts):
    with pytest.raises(ValueError, match=r"no corruption|no severity|one each"):
        corrupt_folder(source, tmp_path / "out", shifts)
    assert not (tmp_path / "out").exists()


def test_no_images_write_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        corrupt_folder(tmp_path / "none", tmp_path / "out", SHIFTS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no image"):
        corrupt_folder(tmp_path / "empty", tmp_path / "out", SHIFTS)
    assert not (tmp_path / "out").exists()

"""What every corruption keeps, what its draws are like, and what is refused.

Recorded outputs of the published code are replayed in tests/corruptions.
"""

import inspect
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.corruptions.replay import recorded_draws
from testtime.shifts import CORRUPTIONS, Corruption, corrupt
from testtime.shifts import corruptions as suite
from testtime.shifts.corruptions import CONSTANTS, IMAGENET_SIDE, STANDARD, draw, filters, noise
from testtime.shifts.corruptions.blur import _copied_from, disk
from testtime.shifts.corruptions.jpeg import jpeg_compression
from testtime.shifts.corruptions.spatter import canny, edge_distance, equalize
from testtime.shifts.corruptions.textures import FILES, find_textures
from testtime.shifts.corruptions.weather import plasma

SEVERITIES = (1, 2, 3, 4, 5)
NAMES = list(CORRUPTIONS)
RANDOM = [
    name for name in NAMES if draw(name, torch.zeros(1, 3, 16, 16), CONSTANTS[name]["cifar"][2])
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parents[1] / "goldens" / "corruptions_exact.npz") as file:
        return dict(file)


def test_there_are_15_and_4_in_the_order_of_the_published_tables():
    assert len(STANDARD) == 15
    assert len(NAMES) == 19
    assert list(CONSTANTS) == NAMES
    assert all(line and "\n" not in line for line in CORRUPTIONS.values())
    for tables in CONSTANTS.values():
        assert [len(severities) for severities in tables.values()] == [5, 5]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("table", ["cifar", "imagenet"])
@pytest.mark.parametrize(("height", "width"), [(16, 45), (131, 70)])
def test_shape_range_and_dtype_stay(name, table, height, width):
    x = torch.rand(2, 3, height, width, generator=seeded())
    before = x.clone()
    for severity in SEVERITIES if height == 16 else (3,):
        y = corrupt(x, name, severity, table=table, generator=seeded())
        assert y.shape == x.shape
        assert y.dtype == x.dtype
        assert y.min() >= 0
        assert y.max() <= 1
        assert not torch.equal(y, x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_float_dtypes(name, dtype):
    x = torch.rand(2, 3, 20, 20, generator=seeded()).to(dtype)
    y = corrupt(x, name, 3, generator=seeded())
    assert y.dtype == dtype
    if dtype == torch.float64:
        if name in RANDOM:  # other draws: the same ones, in the other precision
            c = CONSTANTS[name]["cifar"][2]
            draws = draw(name, x, c, seeded())
            y = suite.apply(name, x, c, draws)
            halves = tuple(d.float() if d.dtype == torch.float64 else d for d in draws)
            z = suite.apply(name, x.float(), c, halves)
        else:
            z = corrupt(x.float(), name, 3)
        assert ((y - z).abs() < 1.01 / 255).double().mean() > 0.99
    else:
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_black_and_white_images_stay_finite(name, value):
    for severity in SEVERITIES:
        y = corrupt(torch.full((2, 3, 16, 20), value), name, severity, generator=seeded())
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("name", RANDOM)
def test_a_generator_makes_it_repeatable_and_alone_is_drawn_from(name):
    x = torch.rand(2, 3, 24, 24)
    state = torch.get_rng_state()
    first, second = (corrupt(x, name, 5, generator=seeded(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, corrupt(x, name, 5, generator=seeded(8)))


@pytest.mark.parametrize("name", RANDOM)
def test_each_image_has_draws_of_its_own(name):
    x = torch.rand(1, 3, 32, 32, generator=seeded()).expand(2, -1, -1, -1)
    y = corrupt(x, name, 5, generator=seeded())
    assert not torch.equal(y[0], y[1])


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(RANDOM)))
def test_deterministic_ones_treat_an_image_the_same_in_any_batch(name):
    x = torch.rand(3, 3, 32, 40, generator=seeded())
    whole, alone = corrupt(x, name, 3), corrupt(x[1:2], name, 3)
    torch.testing.assert_close(whole[1:2], alone, rtol=0, atol=1e-5)


def test_what_is_drawn_does_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(noise, "PARALLEL", 100)
    x = torch.rand(2, 3, 16, 16)
    threads = torch.get_num_threads()
    try:
        draws = []
        for number in (1, 2):
            torch.set_num_threads(number)
            draws.append([draw(name, x, CONSTANTS[name]["cifar"][2], seeded()) for name in RANDOM])
    finally:
        torch.set_num_threads(threads)
    for first, second in zip(*draws, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    halves = draws[0][0][0].flatten().tensor_split(2)
    assert not torch.equal(*halves)


class Looks(TorchDispatchMode):
    """Counts the operations that make a host wait for its device."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal.default", "unique")
        self.found += any(word in str(function) for word in waits)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", [32, 140])
def test_nothing_looks_at_values_beyond_the_check(name, side):
    x = torch.rand(2, 3, side, side)
    corrupt(x, name, 3)  # tables are made once
    with Looks() as looks:
        corrupt(x, name, 3, check=False)
    assert looks.found == 0


@pytest.mark.parametrize("name", NAMES)
def test_no_loop_over_images(name):
    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.total += 1
            return function(*args, **(kwargs or {}))

    counts = []
    for batch in (1, 5):
        x = torch.rand(batch, 3, 32, 32)
        corrupt(x, name, 3)
        with Count() as count:
            corrupt(x, name, 3)
        counts.append(count.total)
    assert counts[0] == counts[1]


def test_the_callers_autocast_and_gradients_change_nothing():
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    plain = corrupt(x, "gaussian_blur", 5)
    assert not plain.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain, corrupt(x, "gaussian_blur", 5))
    with torch.inference_mode():
        assert torch.equal(plain, corrupt(x, "gaussian_blur", 5))


def test_images_of_one_size_take_their_table():
    small = torch.rand(1, 3, 32, 32)
    large = torch.rand(1, 3, IMAGENET_SIDE, IMAGENET_SIDE + 4)
    for x, table, other in ((small, "cifar", "imagenet"), (large, "imagenet", "cifar")):
        assert torch.equal(corrupt(x, "contrast", 2), corrupt(x, "contrast", 2, table=table))
        assert not torch.equal(corrupt(x, "contrast", 2), corrupt(x, "contrast", 2, table=other))
        assert Corruption("contrast", 2).record(*x.shape[2:])["table"] == table


# The transform and what it says of itself.


def test_a_corruption_survives_pickling_and_takes_single_images():
    x = torch.rand(2, 3, 32, 32)
    fog = pickle.loads(pickle.dumps(Corruption("fog", 3, cut=True)))
    assert fog == Corruption("fog", 3, cut=True)
    expected = corrupt(x, "fog", 3, generator=seeded(), cut=True)
    assert torch.equal(fog(x, seeded()), expected)
    single = corrupt(x[:1], "fog", 3, generator=seeded())[0]
    assert torch.equal(Corruption("fog", 3)(x[0], seeded()), single)


def test_cut_gives_levels_rounded_down():
    x = torch.rand(2, 3, 20, 20)
    plain, levels = (255 * corrupt(x, "contrast", 3, cut=c) for c in (False, True))
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert (plain - levels > -1e-3).all()
    assert (plain - levels < 1).all()


def test_every_8_bit_level_survives_the_cut():
    for dtype in (torch.float32, torch.float64):
        levels = torch.arange(256, dtype=dtype)
        assert torch.equal(filters.cut(levels / 255), levels)


def test_jpeg_is_saving_the_cut_images_at_85():
    x = torch.rand(2, 3, 20, 20)
    levels = corrupt(x, "contrast", 3, cut=True)
    assert torch.equal(corrupt(x, "contrast", 3, jpeg=True), jpeg_compression(levels, 85))


@pytest.mark.parametrize("quality", [7, 40, 85])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (16, 18)])
def test_jpeg_equals_libjpeg(quality, height, width):
    import io

    from PIL import Image

    noise = torch.rand(4, 3, height // 4 + 1, width // 4 + 1, generator=seeded())
    smooth = torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    levels = (255 * smooth).round().byte()
    saved = []
    for image in levels:
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        saved.append(torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1))
    off = (255 * jpeg_compression(levels / 255, quality) - torch.stack(saved)).abs()
    # The others are coefficients on the edge between two steps.
    assert (off < 0.5).double().mean() > 0.95
    assert off.max() < 25.5


@pytest.mark.parametrize("factor", [0.95, 0.65, 0.4, 0.25])
def test_pixelate_equals_pillow(factor):
    from PIL import Image

    levels = torch.randint(0, 256, (1, 3, 50, 67), generator=seeded()).byte()
    image = Image.fromarray(levels[0].permute(1, 2, 0).numpy())
    small = image.resize((int(67 * factor), int(50 * factor)), Image.Resampling.BOX)
    large = torch.from_numpy(np.array(small.resize((67, 50), Image.Resampling.BOX)))
    result = suite.apply("pixelate", levels / 255, (factor,))
    assert torch.equal((255 * result[0]).round().byte(), large.permute(2, 0, 1))


def test_the_record_says_how_images_are_made():
    assert Corruption("frost", 2, jpeg=True, textures="procedural").record(32, 48) == {
        "corruption": "frost",
        "severity": 2,
        "table": "cifar",
        "constants": [1, 0.3, 5],
        "cut": True,
        "jpeg": 85,
        "textures": "procedural",
    }
    assert "textures" not in Corruption("fog", 2).record(32, 32)


# Frost's textures.


def package_of_textures(folder, name):
    from PIL import Image

    (folder / name / "frost").mkdir(parents=True)
    (folder / name / "__init__.py").write_text("raise RuntimeError('imported')")
    for i, file in enumerate(FILES):
        Image.new("RGB", (330 + i, 331), (40 * i, 0, 255)).save(folder / name / "frost" / file)


@pytest.fixture
def without_textures(monkeypatch):
    monkeypatch.setattr("testtime.shifts.corruptions.textures._folder", lambda package: None)


def test_textures_are_found_in_a_package_without_importing_it(tmp_path, monkeypatch):
    package_of_textures(tmp_path, "imgcorr")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_textures() == "imgcorr"
    y = corrupt(torch.zeros(8, 3, 16, 16), "frost", 5, textures=str(tmp_path / "imgcorr" / "frost"))
    levels = (255 * y / 0.45).round()  # the red of a texture says which it is
    assert set(levels[:, 0].unique().tolist()) <= {0, 40, 80, 120, 160}
    assert (levels[:, 2] == 255).all()


def test_without_the_files_made_textures_serve_and_say_so(without_textures):
    assert Corruption("frost", 1).record(32, 32)["textures"] == "procedural"
    y = corrupt(torch.zeros(64, 3, 32, 32), "frost", 5, generator=seeded())
    assert 0.2 < y.mean() < 0.35  # the photographs give 0.28


@pytest.mark.parametrize("side", [32, 224, 700])
def test_made_textures_hold_images_of_any_size(side):
    x = torch.zeros(2, 3, side, side + 9)
    assert corrupt(x, "frost", 3, textures="procedural", generator=seeded()).std() > 0.01


def test_missing_textures_are_refused(without_textures, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'imgcorr' holds no frost1\.png"):
        Corruption("frost", 1, textures="imgcorr")
    with pytest.raises(FileNotFoundError, match=r'or ask for "procedural" textures'):
        Corruption("frost", 1, textures=str(tmp_path))
    with pytest.raises(ValueError, match="Textures are for frost alone"):
        Corruption("fog", 1, textures="procedural")


# Draws, and the parts of the recordings.


GREY = torch.full((64, 3, 32, 32), 0.5)


@pytest.mark.parametrize(
    ("name", "deviation"),
    [("gaussian_noise", 0.08), ("shot_noise", math.sqrt(0.5 / 100)), ("speckle_noise", 0.06)],
)
def test_the_strength_of_noise(name, deviation):
    y = corrupt(GREY, name, 3, generator=seeded())
    assert y.mean() == pytest.approx(0.5, abs=1e-3)
    assert y.std() == pytest.approx(deviation, rel=0.02)


def test_impulses_are_half_salt_and_half_pepper_by_channel():
    y = corrupt(GREY, "impulse_noise", 5, generator=seeded())
    assert (y == 1).double().mean() == pytest.approx(0.035, rel=0.05)
    assert (y == 0).double().mean() == pytest.approx(0.035, rel=0.05)
    assert ((y != 0.5).sum(1) == 1).any()


@pytest.mark.parametrize(("name", "low", "high"), [("motion_blur", -45, 45), ("snow", -135, -45)])
def test_angles_fill_their_range(name, low, high):
    angles = draw(name, torch.zeros(4000, 3, 16, 16), CONSTANTS[name]["cifar"][0], seeded())[-1]
    assert low <= angles.min() < low + 1
    assert high - 1 < angles.max() < high


def test_maps_of_fog_spread_as_the_recorded_ones_do():
    draws = draw("fog", GREY.repeat(4, 1, 1, 1), CONSTANTS["fog"]["cifar"][0], seeded())
    maps = plasma(3, *draws)
    assert maps.mean() == pytest.approx(0.5, abs=0.03)
    assert maps.mean((1, 2)).std() == pytest.approx(0.09, abs=0.015)
    assert maps.amin((1, 2)).abs().max() == 0
    assert (maps.amax((1, 2)) == 1).all()


def test_fog_map_is_the_next_power_of_two():
    assert draw("fog", torch.rand(2, 3, 40, 65), (1.0, 2.0))[-1].shape == (3, 2, 64, 64)


def test_fog_on_black_is_black():
    assert not corrupt(torch.zeros(1, 3, 16, 16), "fog", 5).any()


def test_plasma_equals_the_recorded_map(golden):
    constants = CONSTANTS["fog"]["imagenet"][2]
    draws = recorded_draws("fog", constants, torch.zeros(1, 3, 224, 224), int(golden["seed"]))
    result = plasma(constants[1], *draws)[0, :224:7, :224:7]
    recorded = torch.from_numpy(golden["part_plasma_224_3"])
    torch.testing.assert_close(result, recorded, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("table", "key"), [("cifar", "32_5"), ("imagenet", "224_4"), ("imagenet", "224_5")]
)
def test_disk_equals_the_recorded_kernel(golden, table, key):
    kernel = disk(*CONSTANTS["defocus_blur"][table][int(key[-1]) - 1])
    recorded = torch.from_numpy(golden[f"part_disk_{key}"]).double()
    torch.testing.assert_close(kernel, recorded, rtol=0, atol=1e-7)


def test_steps_of_water_equal_the_recorded_ones(golden):
    def part(step, name):
        return torch.from_numpy(golden[f"part_spatter_32_1_step{step}_{name}"])[None, None]

    edges = part(0, "Canny") > 0
    distance = part(1, "distanceTransform").clamp(max=20)
    torch.testing.assert_close(edge_distance(edges), distance, rtol=0, atol=1e-4)
    even = equalize((part(2, "blur") + 1e-5).floor())
    assert torch.equal(even, part(3, "equalizeHist").float())


# Fast forms against plain ones.


@pytest.mark.parametrize("border", ["nearest", "reflect"])
@pytest.mark.parametrize("sigma", [0.05, 0.7, 3.0])
def test_both_forms_of_the_gaussian_are_equal(border, sigma):
    x = torch.rand(2, 3, 70, 90, dtype=torch.float64)
    taps = filters._gaussian_by_taps(x, sigma, 4, border)
    down, across = (filters._gaussian_matrix(sigma, side, 4, border) for side in x.shape[2:])
    torch.testing.assert_close(taps, down @ x @ across.T)


def test_a_filter_wider_than_the_image_reflects_again_and_again():
    x = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    blurred = filters.gaussian_filter(x, 40, truncate=3, border="reflect")
    torch.testing.assert_close(blurred, x.mean().expand_as(x), rtol=0.02, atol=0)


@pytest.mark.parametrize("reach", [1, 2, 3, 4])
def test_glass_equals_a_walk_over_the_pixels(reach):
    height, width = 24, 20
    codes = noise.integers(
        (2 * reach) ** 2, (1, height - 2 * reach, width - 2 * reach), GREY, seeded()
    )
    walked = torch.arange(height * width).view(height, width)
    for row in range(height - reach, reach, -1):
        for column in range(width - reach, reach, -1):
            code = int(codes[0, row - reach - 1, column - reach - 1])
            down, across = code // (2 * reach) - reach, code % (2 * reach) - reach
            walked[row, column] = walked[row + down, column + across]
    result = _copied_from(codes, reach, height, width)
    assert torch.equal(result.view(height, width).long(), walked)


@pytest.mark.parametrize(("name", "side"), [("motion_blur", 32), ("motion_blur", 70), ("snow", 70)])
def test_both_forms_of_motion_are_equal(name, side, monkeypatch):
    x = torch.randint(0, 256, (3, 3, side, side + 5), generator=seeded()) / 255
    plain, other = [], []
    for forms, few in ((plain, 1000), (other, 0)):
        monkeypatch.setattr(filters, "FEW_PIXELS", few)
        forms.append(
            corrupt(x, name, 3, table="imagenet" if side > 32 else "cifar", generator=seeded())
        )
    off = (255 * (plain[0] - other[0])).abs()
    assert off.max() < 1.01
    assert (off < 0.01).double().mean() > 0.999


def test_distance_equals_the_shortest_way():
    edges = torch.rand(2, 1, 30, 26, generator=seeded()) > 0.995
    steps = {(1, 0): 1, (0, 1): 1, (1, 1): 1.4, (1, 2): 2.1969, (2, 1): 2.1969}
    steps = {(a * p, b * q): c for (a, b), c in steps.items() for p in (1, -1) for q in (1, -1)}
    way = torch.where(edges, 0.0, 20.0)
    for _ in range(20):
        padded = torch.nn.functional.pad(way, [2] * 4, value=20)
        for (down, across), cost in steps.items():
            window = padded[..., 2 + down : 32 + down, 2 + across : 28 + across]
            way = torch.minimum(way, window + cost)
    torch.testing.assert_close(edge_distance(edges), way, rtol=0, atol=1e-4)


def test_edges_of_a_square_are_its_rim():
    levels = torch.zeros(1, 1, 20, 20)
    levels[..., 6:14, 6:14] = 200
    edges = canny(levels, 50, 150)
    assert edges.sum() == pytest.approx(30, abs=4)
    assert not edges[..., 8:12, 8:12].any()


# What is refused.

X = torch.full((1, 3, 16, 16), 0.5)


@pytest.mark.parametrize(
    ("x", "name", "severity", "error", "said"),
    [
        (X, "gausian_noise", 1, ValueError, r"Did you mean 'gaussian_noise'\?"),
        (X, "sepia", 1, ValueError, "known: gaussian_noise, "),
        (X, 3, 1, ValueError, "no corruption '3'"),
        (X, "fog", 0, ValueError, "found 0"),
        (X, "fog", 6, ValueError, "found 6"),
        (X, "fog", 2.5, ValueError, "found 2.5"),
        (X, "fog", "3", ValueError, "found '3'"),
        (X[0], "fog", 1, ValueError, r"found \[3, 16, 16\]"),
        (X[:0], "fog", 1, ValueError, r"B at least 1 .* found \[0, 3, 16, 16\]"),
        (X[:, :1], "fog", 1, ValueError, r"found \[1, 1, 16, 16\]"),
        (torch.cat([X, X[:, :1]], 1), "fog", 1, ValueError, r"found \[1, 4, 16, 16\]"),
        (X[..., :15], "fog", 1, ValueError, r"found \[1, 3, 16, 15\]"),
        ((255 * X).byte(), "fog", 1, TypeError, "found torch.uint8; divide"),
        (X.long(), "fog", 1, TypeError, "found torch.int64"),
        (255 * X, "fog", 1, ValueError, "from 127.5 to 127.5; .* divide 8-bit images by 255"),
        (X - 1, "fog", 1, ValueError, "from -0.5 to -0.5"),
        (X * float("nan"), "fog", 1, ValueError, "from nan to nan"),
        (X / 0, "fog", 1, ValueError, "to inf"),
    ],
)
def test_errors_say_what_was_wrong_and_what_to_do(x, name, severity, error, said):
    with pytest.raises(error, match=said):
        corrupt(x, name, severity)


def test_one_nan_among_many_is_found():
    x = torch.rand(4, 3, 32, 32)
    x[2, 1, 5, 7] = float("nan")
    with pytest.raises(ValueError, match="from nan"):
        corrupt(x, "contrast", 1)


def test_an_unknown_table_is_refused():
    with pytest.raises(ValueError, match='"cifar" or "imagenet"'):
        corrupt(X, "fog", 1, table="cifar10")


def test_a_generator_on_another_device_is_refused():
    with pytest.raises(ValueError, match=r"make it with torch.Generator\('meta'\)"):
        corrupt(X.to("meta"), "fog", 1, generator=torch.Generator())


def test_every_corruption_says_what_it_does():
    assert all(inspect.getdoc(function) for function in suite._APPLY.values())

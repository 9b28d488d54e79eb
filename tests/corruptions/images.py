"""Images for recordings, by a specification."""

import importlib.util
import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

FORMS = """\
images: FILE.parquet (a column of encoded images), FILE.npy or FILE.npz (uint8 [n, H, W, 3]), a
folder of images in the order of their names, each with [FIRST:LAST] behind it to take a part; or
"sklearn", eight crops of scikit-learn's two photographs; or crops:SIDE:FILE@TOP,LEFT;FILE@... with
the place of each crop
"""

CROPS = (
    "crops:224:china.jpg@0,40;china.jpg@0,300;china.jpg@203,0;china.jpg@203,330;"
    "flower.jpg@0,100;flower.jpg@60,330;flower.jpg@203,40;flower.jpg@203,400"
)


def read_images(spec: str, count: int | None = None) -> Tensor:
    """Return images ``[n, 3, H, W]``, uint8, the first ``count`` of them if there are more."""
    if spec == "sklearn":
        spec = CROPS
    if spec.startswith("crops:"):
        return _crops(spec)
    place, _, part = spec.partition("[")
    first, _, last = part.rstrip("]").partition(":")
    chosen = slice(int(first or 0), int(last) if last else None)
    path = Path(place)
    if path.suffix == ".parquet":
        arrays = map(_decode, _parquet(path)[chosen][:count])
    elif path.suffix in (".npy", ".npz"):
        file = np.load(path)
        arrays = (file if path.suffix == ".npy" else file[file.files[0]])[chosen][:count]
    elif path.is_dir():
        arrays = map(_open, sorted(p for p in path.iterdir() if p.is_file())[chosen][:count])
    else:
        raise FileNotFoundError(f"There are no images at {spec}.\n{FORMS}")
    return _stack(arrays)


def _stack(arrays: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(list(arrays))).permute(0, 3, 1, 2).contiguous()


def _open(path: Path) -> np.ndarray:
    return _decode(path.read_bytes())


def _decode(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def _parquet(path: Path) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    column = next(field.name for field in table.schema if pa.types.is_struct(field.type))
    encoded: list[bytes] = table[column].combine_chunks().field("bytes").to_pylist()
    return encoded


def _crops(spec: str) -> Tensor:
    _, side, crops = spec.split(":", 2)
    arrays = []
    for crop in crops.split(";"):
        file, _, corner = crop.partition("@")
        top, left = map(int, corner.split(","))
        pixels = _open(_find(file))
        arrays.append(pixels[top : top + int(side), left : left + int(side)])
    return _stack(arrays)


def _find(file: str) -> Path:
    if Path(file).is_file():
        return Path(file)
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"There is no {file}; scikit-learn would bring it.")
    return Path(spec.origin).parent / "datasets" / "images" / file

"""Columns of parquet files and of Hugging Face datasets: encoded images, arrays, numbers."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from testtime._suggest import suggest
from testtime.shifts.data import Data, extra_data
from testtime.shifts.decode import Decode
from testtime.shifts.readers.arrays import assemble, samples_of
from testtime.shifts.readers.folders import AS_STORED, stack

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Encoded:
    """Encoded images in a column of bytes, or of structs of bytes and path."""

    column: Any
    where: str
    decode: Decode

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: list[int], /) -> Tensor:
        names = [f"{self.where}, row {i}" for i in index]
        images = []
        for i, name in zip(index, names, strict=True):
            value = self.column[i].as_py()
            if isinstance(value, dict):
                path = value.get("path")
                value = value.get("bytes") or (Path(path) if path else None)
            if value is None:
                raise ValueError(f"{name} is empty. Leave such rows out.")
            images.append(self.decode(value, name))
        return stack(images, names)


def read_parquet(
    path: str | Path | Sequence[str | Path],
    *,
    x: str | Sequence[str] | None = None,
    y: str = "label",
    groups: str | None = None,
    timestamps: str | None = None,
    decode: Decode = AS_STORED,
    name: str | None = None,
) -> Data:
    """Read a parquet file, or several in that order: images, arrays, or rows of a table.

    >>> cifar10 = read_parquet("cifar10/test.parquet", x="img")  # doctest: +SKIP
    >>> elec = read_parquet("elec.parquet", y="class")  # doctest: +SKIP

    Encoded images stay so in memory, and are decoded when they are asked for.

    Args:
        path: the file or files.
        x: a column of encoded images (bytes, or the struct of bytes and path of Hugging Face) or of
            arrays (nested lists; see ``read_npz``); or several columns of numbers. If not given,
            all columns that are not named here, which are numbers then.
        y: the column of labels, integers.
        groups: the column of patients, places ..., integers.
        timestamps: the column of times, timestamps or seconds.
        decode: size and channels of encoded images; as stored, if not given.
        name: what the data are called in results; the (first) file's name if not given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is damaged, a column is missing or not what it should be; on reading, an
            image is broken or its size differs from that of its batch.
        ImportError: reading needs the extra ``data``.
    """
    paths = [Path(p) for p in ([path] if isinstance(path, (str, Path)) else path)]
    for file in paths:
        if not file.is_file():
            raise FileNotFoundError(
                f"There is no file {file}. Give the parquet file with the images."
            )
    with extra_data(f"Reading {paths[0].name}"):
        import numpy  # noqa: F401 - needed below
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        columns = _columns(pq.read_schema(paths[0]).names, str(paths[0]), x, y, groups, timestamps)
        table = pa.concat_tables([pq.read_table(file, columns=columns.all()) for file in paths])
    except pa.ArrowException as error:
        raise ValueError(
            f"{', '.join(map(str, paths))} is not a parquet file of images and labels, or is "
            f"damaged ({error})."
        ) from error
    digests = []
    for file in paths:
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return _data(
        table,
        columns,
        str(paths[0]),
        decode,
        name=name or paths[0].name,
        sha256=digests[0] if len(paths) == 1 else _sha256("".join(digests)),
        sha256_of="file" if len(paths) == 1 else "the files' sha256",
    )


def read_huggingface(
    dataset: Any,
    *,
    x: str | Sequence[str] | None = "image",
    y: str = "label",
    groups: str | None = None,
    timestamps: str | None = None,
    decode: Decode = AS_STORED,
    name: str | None = None,
) -> Data:
    """Read a Hugging Face ``datasets.Dataset``: images, arrays, or rows of a table.

    >>> from datasets import load_dataset  # doctest: +SKIP
    >>> data = read_huggingface(load_dataset("cifar10", split="test"), x="img")  # doctest: +SKIP

    A stream of it (``IterableDataset``) goes into ``read_pairs``, as pairs.

    Args:
        dataset: one split.
        x: as in ``read_parquet``.
        y: as in ``read_parquet``.
        groups: as in ``read_parquet``.
        timestamps: as in ``read_parquet``.
        decode: as in ``read_parquet``.
        name: what the data are called in results; the data set's own name if not given.

    Raises:
        TypeError: it is no ``Dataset`` (a stream, or a dictionary of splits).
        ValueError: a column is missing or not what it should be.
        ImportError: reading needs the extra ``data``.
    """
    if not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"Found {type(dataset).__name__}, not a datasets.Dataset. Of a stream, give the pairs "
            "to read_pairs."
        )
    if isinstance(dataset, dict):
        raise TypeError(
            f"Found splits ({', '.join(dataset)}), not a datasets.Dataset. Choose one, as in "
            f"dataset[{next(iter(dataset), 'test')!r}]."
        )
    with extra_data("Reading columns"):
        import numpy  # noqa: F401 - needed below
    label = name or ", ".join(
        str(part) for part in (dataset.info.dataset_name, dataset.split) if part
    )
    label = label or "a Hugging Face data set"
    columns = _columns(dataset.column_names, label, x, y, groups, timestamps)
    table = dataset.select_columns(columns.all()).with_format("arrow")[:]
    digest = hashlib.sha256()
    for column in columns.all():
        digest.update(column.encode())
        for value in table[column]:
            digest.update(_bytes(value.as_py()))
    return _data(
        table,
        columns,
        label,
        decode,
        name=label,
        sha256=digest.hexdigest(),
        sha256_of="values",
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes(value: Any) -> bytes:
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        # An image that stayed in its file, whose folder differs from machine to machine.
        path = Path(value["path"])
        return f"{path.name} {path.stat().st_size}".encode()
    return repr(value).encode()


@dataclass(frozen=True)
class _Columns:
    x: str | tuple[str, ...]
    beside: dict[str, str]

    def all(self) -> list[str]:
        return [*((self.x,) if isinstance(self.x, str) else self.x), *self.beside.values()]


def _columns(
    known: Sequence[str],
    where: str,
    x: str | Sequence[str] | None,
    y: str,
    groups: str | None,
    timestamps: str | None,
) -> _Columns:
    named = {"y": y, "groups": groups, "timestamps": timestamps}
    beside = {what: column for what, column in named.items() if column is not None}
    if x is None:
        x = [column for column in known if column not in beside.values()]
    columns = _Columns(x if isinstance(x, str) else tuple(x), beside)
    for column in columns.all():
        if column not in known:
            raise ValueError(
                f"{where} has no column '{column}' (it has: {', '.join(known)})."
                f"{suggest(column, known)}"
            )
    if not columns.x:
        raise ValueError(f"{where} has no columns for the samples. Name them as x.")
    return columns


def _data(table: Any, columns: _Columns, where: str, decode: Decode, **about: str) -> Data:
    import numpy as np
    import pyarrow as pa

    def array(column: str) -> "np.ndarray[Any, Any]":
        return _array(table[column], f"{where}, column {column}")

    beside = {what: array(column) for what, column in columns.beside.items()}
    if not isinstance(columns.x, str):
        rows = np.stack([array(column).astype("float32") for column in columns.x], axis=1)
        return assemble(samples_of(rows, where), beside, where, **about)
    column, kind = table[columns.x], table.schema.field(columns.x).type
    where_x = f"{where}, column {columns.x}"
    if pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        samples = Encoded(column, where_x, decode)
        return assemble(samples, beside, where, preprocessing=str(decode), **about)
    return assemble(samples_of(array(columns.x), where_x), beside, where, **about)


def _array(column: Any, where: str) -> "np.ndarray[Any, Any]":
    """Turn a column of numbers, times, or nested lists of one shape into an array.

    Raises:
        ValueError: it holds something else, nothing in places, or lists of several lengths.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks)
    shape = [len(values)]
    lists = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    while True:
        values = getattr(values, "storage", values)
        if values.null_count:
            raise ValueError(f"{where}: {values.null_count} values are missing. Leave them out.")
        kind = values.type
        if not any(is_list(kind) for is_list in lists):
            break
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1:
            raise ValueError(
                f"{where}: the lists have lengths from {min(lengths)} to {max(lengths)}. Cut or "
                "fill them to one."
            )
        shape.append(lengths[0])
        values = values.flatten()
    if pa.types.is_timestamp(kind):
        seconds = values.cast(pa.timestamp("us")).cast(pa.int64())
        return np.asarray(seconds.to_numpy(zero_copy_only=False)) / 1e6
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ValueError(f"{where} holds {kind}. Name columns of numbers, or encoded images as x.")
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(shape)

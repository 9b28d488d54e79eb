"""A grid of rows, run one after another here, or in parallel by Ray."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from os import PathLike
from typing import Any, Literal, cast

from torch import nn

from testtime.adaptation.preprocessing import declared, mismatch
from testtime.bench.data import Released, load_data
from testtime.bench.ledger import Ledger, Row, opened
from testtime.bench.row import Model, key, measure, some
from testtime.bench.spec import Spec, grid
from testtime.models.load import load_model
from testtime.shifts.data import Data
from testtime.shifts.readers import read_pairs
from testtime.shifts.shift import CLEAN

Engine = Literal["local", "ray"]
Watch = Callable[[Spec, int, int], None]

LOOKED_AT = 64  # images, to see whether data and model fit


def run(
    models: Mapping[str, nn.Module | str] | str,
    data: Data | Released | str | Iterable[Any],
    methods: Sequence[str] = ("source", "bn", "tent"),
    shifts: Sequence[str] = (CLEAN,),
    protocols: Sequence[str] = ("online",),
    seeds: Sequence[int] = (0,),
    *,
    batch_sizes: Sequence[int] = (64,),
    source: Data | str | Iterable[Any] | None = None,
    out: str | PathLike[str] | None = None,
    engine: Engine = "local",
    allow: Sequence[str] = (),
    watch: Watch = lambda spec, images, wrong: None,
    **fixed: Any,
) -> Ledger:
    """Run every method on every model under every shift, and return the rows.

    >>> import testtime as tt
    >>> model, images, labels = tt.demo.load()
    >>> ledger = tt.bench.run({"digits": model}, "digits", ["source", "tent"], images=128)
    >>> [round(row["results"]["error"], 2) for row in ledger]  # doctest: +SKIP

    Args:
        models: modules or specifications by name, or one specification.
        data: what was read, a specification, or batches or samples ``(x, y)``.
        methods: such as ``tent:lr=1e-4``; see :func:`parse_method`.
        shifts: ``clean``, ``fog:5``, ``fog:3+snow:2``.
        protocols: ``online`` (each shift from the source model), ``continual``, ``mixed``,
            ``repeating``.
        seeds: of streams, corruptions and methods.
        batch_sizes: samples a batch.
        source: clean data for methods that need them; without, their rows fail.
        out: a file of JSON lines that rows are appended to; rows that it holds are not run again.
        engine: ``local``, one after another; ``ray``, in parallel on this machine or the cluster
            that it is part of.
        allow: checks that may fail: ``preprocessing``.
        watch: called after each batch with its row, images, and wrong answers (``local``); after
            each row (``ray``).
        fixed: further fields of :class:`Spec`: ``images``, ``order``, ``window``, ``device``.

    Raises:
        ValueError: something is unknown, or model and data do not fit.
    """
    named = {models: models} if isinstance(models, str) else dict(models)
    held, own, theirs = load(named), read(data), None if source is None else read_source(source)
    for model in held.values():
        check_fit(model, own, allow)
    specs = grid(
        list(named),
        own.name,
        methods,
        shifts,
        protocols,
        batch_sizes,
        seeds,
        source="" if theirs is None else theirs.name,
        **fixed,
    )
    with ExitStack() as stack:
        ledger = Ledger() if out is None else stack.enter_context(opened(out))
        for _ in execute(specs, held, own, theirs, ledger, engine, watch):
            pass
    return ledger


def execute(
    specs: Sequence[Spec],
    models: Mapping[str, Model],
    data: Data | Released,
    source: Data | None,
    ledger: Ledger,
    engine: Engine = "local",
    watch: Watch = lambda spec, images, wrong: None,
    command: str = "",
) -> Iterator[Row]:
    """Yield the row of every specification, appended to the ledger as it is done; none twice."""
    done = ledger.keys()
    waiting = []
    for spec in specs:
        if key(spec, models[spec.model], data) in done:
            watch(spec, samples(spec, data), 0)
        else:
            waiting.append(spec)
    run_all = {"local": _locally, "ray": _by_ray}[engine]
    for row in run_all(waiting, models, data, source, watch):
        ledger.append({**row, "command": command})
        yield row


def samples(spec: Spec, data: Data | Released) -> int:
    """Return how many samples a row goes through."""
    if isinstance(data, Data):
        return spec.stream(some(data, spec.images)).samples
    return spec.stream({s: some(data.at(s), spec.images) for s in spec.shifts}).samples


def load(models: Mapping[str, nn.Module | str]) -> dict[str, Model]:
    """Return the models, those that are specifications loaded."""
    return {
        name: Model(name, load_model(module) if isinstance(module, str) else module)
        for name, module in models.items()
    }


def read_source(data: Data | str | Iterable[Any]) -> Data:
    """Return source data, which are clean.

    Raises:
        ValueError: a released benchmark was named, which holds corrupted data.
    """
    found = read(data)
    if isinstance(found, Released):
        raise ValueError(f"Source data are clean, but {found.name} is corrupted. Name others.")
    return found


def read(data: Data | Released | str | Iterable[Any]) -> Data | Released:
    """Return the data, read if they are a specification or pairs."""
    if isinstance(data, Data | Released):
        return data
    if isinstance(data, str):
        return load_data(data)
    return read_pairs(cast(Iterable[tuple[Any, Any]], data), name="pairs")


def check_fit(model: Model, data: Data | Released, allow: Sequence[str] = ()) -> None:
    """Refuse data that are not preprocessed as the model says, unless that is allowed by name.

    Raises:
        ValueError: the values do not fit.
    """
    wanted = declared(model.module)
    if wanted is None or "preprocessing" in allow or isinstance(data, Released):
        return  # strongly corrupted images may leave most of the range unused
    sentence = mismatch(some(data, LOOKED_AT).images, wanted)
    if sentence:
        raise ValueError(
            f"{model.name} on {data.name}: {sentence} To run it all the same, allow it by name: "
            "--allow preprocessing."
        )


def _locally(
    specs: Sequence[Spec],
    models: Mapping[str, Model],
    data: Data | Released,
    source: Data | None,
    watch: Watch,
) -> Iterator[Row]:
    for spec in specs:

        def progress(images: int, wrong: int, spec: Spec = spec) -> None:
            watch(spec, images, wrong)

        row = measure(spec, models[spec.model], data, source, progress)
        if row["status"] == "failed":  # so that the bar goes on
            watch(spec, samples(spec, data), 0)
        yield row


def _by_ray(
    specs: Sequence[Spec],
    models: Mapping[str, Model],
    data: Data | Released,
    source: Data | None,
    watch: Watch,
) -> Iterator[Row]:
    """Run a task for each row; Ray runs one again whose worker dies."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("--engine ray needs ray: pip install 'testtime[ray]'.") from error
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, include_dashboard=False)
    try:
        held = {name: ray.put(model) for name, model in models.items()}
        shared = ray.put(data), ray.put(source)
        task = ray.remote(max_retries=-1)(_task)
        waiting = {
            task.options(num_gpus=1 if spec.device.startswith("cuda") else 0).remote(
                spec, held[spec.model], *shared
            ): spec
            for spec in specs
        }
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            spec = waiting.pop(ready)
            yield ray.get(ready)
            watch(spec, samples(spec, data), 0)
    finally:
        if started:
            ray.shutdown()


def _task(spec: Spec, model: Model, data: Data | Released, source: Data | None) -> Row:
    return measure(spec, model, data, source)

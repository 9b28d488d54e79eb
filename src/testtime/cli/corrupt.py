"""Write corrupted copies of a folder of images, as in ImageNet-C."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

if TYPE_CHECKING:
    from testtime.shifts.decode import Decode


def _list(context: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    from testtime.shifts.corruptions import CORRUPTIONS

    width = max(map(len, CORRUPTIONS))
    for name, line in CORRUPTIONS.items():
        click.echo(f"{name:<{width}}  {line}")
    context.exit()


@click.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--type",
    "types",
    multiple=True,
    help="fog, or fog,snow; or all. May be repeated. Needed, but for --picture.",
)
@click.option("--severity", "levels", default="1-5", show_default=True, help="3, 1-5 or 1,3,5.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--table",
    type=click.Choice(["cifar", "imagenet"]),
    help="Constants made for 32 or 224 pixels; by each image's size, if not given.",
)
@click.option("--resize", type=click.IntRange(1), help="First bring the shorter side to this.")
@click.option("--crop", type=click.IntRange(1), help="Then cut out the centre of this side.")
@click.option(
    "--picture",
    is_flag=True,
    help="IN is one image, OUT a page of it under each corruption at five severities.",
)
@click.option("--strict", is_flag=True, help="Stop at an image that cannot be used.")
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list,
    help="List the corruptions, a line each, and stop.",
)
def command(
    source: Path,
    out: Path,
    types: tuple[str, ...],
    levels: str,
    seed: int,
    table: Literal["cifar", "imagenet"] | None,
    resize: int | None,
    crop: int | None,
    picture: bool,
    strict: bool,
) -> None:
    """Write corrupted copies of a folder of images, as in ImageNet-C.

    IN/a/b.jpg becomes OUT/fog/1/a/b.jpg and so on. OUT/manifest.jsonl says how each file was made.
    Killed and called again, it goes on; with more types or severities, it adds them. To make
    ImageNet-C from the validation images: --type all --resize 256 --crop 224.

    testtime corrupt photo.jpg page.png --picture shows what each does.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from testtime.shifts.decode import Decode, image_files

    if picture:
        _picture(source, out, types or ("all",), seed, table, Decode(resize=resize, crop=crop))
        return
    if not types:
        raise click.UsageError("Missing option '--type'. Name corruptions, or all.")
    from testtime.shifts.files import MANIFEST, corrupt_folder
    from testtime.shifts.shift import parse_corruptions

    shifts = [f"{name}:{level}" for name in _names(types) for level in _severities(levels)]
    try:
        for shift in shifts:
            parse_corruptions(shift)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--type") from None
    console = Console(stderr=True)
    columns = (TextColumn(out.name), BarColumn(), MofNCompleteColumn(), TextColumn("files"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=len(image_files(source)) * len(shifts))
        outcome = corrupt_folder(
            source,
            out,
            shifts,
            seed=seed,
            table=table,
            decode=Decode(resize=resize, crop=crop),
            strict=strict,
            progress=lambda files: bar.advance(task, files),
        )
    for said in outcome.broken.values():
        click.echo(f"Left out: {said}", err=True)
    if outcome.broken:
        click.echo(f"{len(outcome.broken)} images were left out.", err=True)
    click.echo(
        f"{outcome.written} files were written to {out}, {outcome.kept} were there; "
        f"{out / MANIFEST} says how each was made."
    )


def _picture(
    source: Path,
    out: Path,
    types: tuple[str, ...],
    seed: int,
    table: Literal["cifar", "imagenet"] | None,
    decode: "Decode",
) -> None:
    from testtime.shifts.picture import picture

    if not source.is_file():
        raise click.UsageError(f"--picture takes one image, but {source} is no file.")
    image = decode(source, str(source)) / 255
    page = picture(image, _names(types), seed=seed, table=table)
    page.save(out)
    click.echo(f"The page is in {out}.")


def _names(types: tuple[str, ...]) -> list[str]:
    from testtime.shifts.corruptions import CONSTANTS

    names = [name.strip() for given in types for name in given.split(",")]
    return list(CONSTANTS) if names == ["all"] else list(dict.fromkeys(names))


def _severities(levels: str) -> list[int]:
    found: set[int] = set()
    for part in levels.split(","):
        ends = re.fullmatch(r"([1-5])(?:-([1-5]))?", part.strip())
        wanted = range(int(ends[1]), int(ends[2] or ends[1]) + 1) if ends else ()
        if not wanted:
            raise click.BadParameter(
                f"'{levels}' is no severity from 1 to 5. Write 3, 1-5 or 1,3,5.",
                param_hint="--severity",
            )
        found.update(wanted)
    return sorted(found)

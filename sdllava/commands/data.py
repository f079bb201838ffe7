"""The commands of `sdllava data`. Heavy imports happen inside the commands."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Prepare and check LLaVA's two training sets.")


class Set(StrEnum):
    """The published training sets."""

    llava_558k = "llava-558k"
    mix_665k = "mix-665k"


SetArgument = Annotated[Set, typer.Argument(help="llava-558k (stage 1) or mix-665k (stage 2).")]
FolderArgument = Annotated[Path, typer.Argument(help="The folder of the sets, in the recipes 'data'.")]
FilesOption = Annotated[int, typer.Option(min=0, help="Missing images to list per source.")]


@app.command()
def prepare(name: SetArgument, folder: FolderArgument) -> None:
    """List what to download from where, unpack the archives that are there, and repair file extensions."""
    from ..data.published_sets import SETS, downloads, repair, unpack

    for archive in unpack(name.value, folder):
        typer.echo(f"unpacked {archive}")
    if (folder / SETS[name.value].annotations).is_file():
        renamed = repair(name.value, folder)
        typer.echo(f"{len(renamed)} images renamed to the names in the annotations")
    wanted = downloads(name.value, folder)
    if not wanted:
        typer.echo(f"Nothing to download. Check the images with: sdllava data verify {name.value} {folder}")
        return
    typer.echo("Download these files, then run the same command again:")
    for url, place, remark in wanted:
        typer.echo(f"  {url}\n    to {place}" + (f"\n    {remark}" if remark else ""))
    raise typer.Exit(1)


@app.command()
def verify(name: SetArgument, folder: FolderArgument, files: FilesOption = 5) -> None:
    """Check the numbers of samples, and report missing and empty images by source. Exit status 1 if any."""
    from ..data.published_sets import SETS, verify

    found = verify(name.value, folder)
    for source in sorted({*found.samples, *found.expected}):
        missing, empty = found.missing.get(source, []), found.empty.get(source, [])
        expected = f" (published: {found.expected[source]:,})" if source in found.expected else ""
        typer.echo(
            f"{source or 'all'}: {found.samples[source]:,} samples{expected}, {found.images[source]:,} images, "
            f"{len(missing):,} missing, {len(empty):,} empty"
        )
        for image in (missing + empty)[:files]:
            typer.echo(f"  {image}")
    if SETS[name.value].citation:
        typer.echo(f"Published numbers: {SETS[name.value].citation}")
    if not found.complete:
        raise typer.Exit(1)

"""The commands of `sdllava data`. Heavy imports happen inside the commands."""

import hashlib
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
DownloadOption = Annotated[bool, typer.Option(help="Download the files that the Hub has.")]
HashesOption = Annotated[bool, typer.Option("--hashes", help="Read every image and compare its CRC-32; takes long.")]


@app.command()
def prepare(name: SetArgument, folder: FolderArgument, download: DownloadOption = True) -> None:
    """Download what the Hub has, unpack, repair file extensions, and list what to download from other servers."""
    from ..data.published_sets import SETS, downloads, fetch, repair, unpack

    for url, place, _ in downloads(name.value, folder) if download else ():
        try:
            if fetch(url, place):
                typer.echo(f"downloaded {place}")
        except Exception as error:  # of the Hub, the network's library or the disk
            typer.echo(f"not downloaded: {url} ({_first_line(error)})")
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
def verify(name: SetArgument, folder: FolderArgument, files: FilesOption = 5, hashes: HashesOption = False) -> None:
    """Check the numbers of samples and the hashes, and report bad images by source. Exit status 1 if any."""
    from ..data.published_sets import SETS, verify

    found = verify(name.value, folder, hashes)
    annotations_fit = _annotations_fit(name.value, folder)
    for source in sorted({*found.samples, *found.expected}):
        missing, empty, damaged = (kind.get(source, []) for kind in (found.missing, found.empty, found.damaged))
        expected = f" (published: {found.expected[source]:,})" if source in found.expected else ""
        typer.echo(
            f"{source or 'all'}: {found.samples[source]:,} samples{expected}, {found.images[source]:,} images, "
            f"{len(missing):,} missing, {len(empty):,} empty, {len(damaged):,} not as in the archive"
        )
        for image in (missing + empty + damaged)[:files]:
            typer.echo(f"  {image}")
    if SETS[name.value].citation:
        typer.echo(f"Published numbers: {SETS[name.value].citation}")
    if not found.complete or not annotations_fit:
        raise typer.Exit(1)


def _annotations_fit(name: str, folder: Path) -> bool:
    """Compare the hash of the annotations with the Hub's and print the result. Without the Hub nothing is compared."""
    from ..data.published_sets import SETS, published_sha256

    with open(folder / SETS[name].annotations, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    try:
        expected = published_sha256(name)
    except Exception as error:  # of the Hub or the network's library
        expected, reason = None, _first_line(error)
    else:
        reason = "the Hub states none"
    if expected is None:
        typer.echo(f"annotations: SHA-256 {found}, not compared ({reason})")
        return True
    typer.echo(f"annotations: SHA-256 {found}, " + ("as on the Hub" if found == expected else f"on the Hub {expected}"))
    return found == expected


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]

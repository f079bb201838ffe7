"""`sdllava push`. Heavy imports happen inside, so that help is instant."""

from pathlib import Path
from typing import Annotated, Any

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that a run or save_pretrained wrote, or an adapter's.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made where it does not exist.")] = None,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="Folder of an evaluation to report; those in FOLDER are found.")
    ] = None,
    bundle_frozen: Annotated[
        bool, typer.Option(help="Push frozen parts too, or have them fetched from their own repositories.")
    ] = True,
    space: Annotated[
        Path | None, typer.Option(help="Also write a folder for a Space that shows the repository on a page.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files, their sizes, and the card.")] = False,
) -> None:
    """Push a checkpoint to the Hub, with its code, recipe and model card. Log in first with `hf auth login`."""
    from huggingface_hub.utils import validate_repo_id

    from ..hub.push import push_folder

    validate_repo_id(repo)
    if space is not None:
        from ..demo.space import write_space

        write_space(space, repo)
        typer.echo(f"wrote {space}", err=True)
    if dry_run:
        _show(folder, repo, results or [], bundle_frozen)
        return
    options: dict[str, Any] = {"private": private or None, "revision": revision, "create_pr": pull_request}
    if message is not None:
        options["commit_message"] = message
    commit = push_folder(folder, repo, results=results or (), bundle_frozen=bundle_frozen, **options)
    typer.echo(commit.pr_url or commit.commit_url)


def _show(folder: Path, repo: str, results: list[Path], bundle_frozen: bool) -> None:
    from tempfile import TemporaryDirectory

    from ..hub.push import collect, leave_out_frozen, results_of

    with TemporaryDirectory() as small:
        if not bundle_frozen:
            leave_out_frozen(folder, small)
            results = [Path(place) for place in results_of(folder, results)]
        files = collect(folder if bundle_frozen else small, repo, results)
        sizes = {name: len(x) if isinstance(x, bytes) else x.stat().st_size for name, x in files.items()}
        card = files["README.md"]
        text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    for name, size in sizes.items():
        typer.echo(f"{size:>14,}  {name}")
    typer.echo(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files, for {repo}\n")
    typer.echo(text)

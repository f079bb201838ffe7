"""The command `push`. Heavy imports happen inside the command."""

from pathlib import Path
from typing import Annotated, Any

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="Folder that a run or save_pretrained wrote, or an adapter's folder.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to. It is created if it does not exist.")
    ] = None,
    pull_request: Annotated[bool, typer.Option("--pull-request", help="Open a pull request instead.")] = False,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of an evaluation to report, in addition to those in FOLDER. Repeatable."),
    ] = None,
    bundle_frozen: Annotated[
        bool, typer.Option(help="Push frozen parts too, or have them loaded from their own repositories.")
    ] = True,
    space: Annotated[
        Path | None, typer.Option(help="Also write a folder for a Space with the demo page of this repository.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the files, their sizes, and the card.")] = False,
) -> None:
    """Push a checkpoint to the Hub, with its code, recipe and model card. Log in first with `hf auth login`."""
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo)
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is not a folder. Give one that a run or save_pretrained wrote.")
    if space is not None:
        from ..demo.space import write_space

        write_space(space, repo)
        typer.echo(f"wrote {space}", err=True)
    if dry_run:
        _show(folder, repo, results or [], bundle_frozen)
        return
    from ..hub.push import push_folder

    options: dict[str, Any] = {"private": private or None, "revision": revision, "create_pr": pull_request}
    if message is not None:
        options["commit_message"] = message
    commit = push_folder(folder, repo, results=results or (), bundle_frozen=bundle_frozen, **options)
    typer.echo(commit.pr_url or commit.commit_url)


def _show(folder: Path, repo: str, results: list[Path], bundle_frozen: bool) -> None:
    from ..hub.push import files_to_push

    with files_to_push(folder, repo, results, bundle_frozen=bundle_frozen) as files:
        sizes = {name: len(x) if isinstance(x, bytes) else x.stat().st_size for name, x in files.items()}
        card = files["README.md"]
        text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    for name, size in sizes.items():
        typer.echo(f"{size:>14,}  {name}")
    typer.echo(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files, for {repo}\n")
    typer.echo(text)

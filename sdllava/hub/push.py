"""Pushing checkpoints to the Hub: which files, the model card, one commit."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..remote_code import save_code
from . import endpoint
from .card import HUB_ID, is_by_hand, make_card
from .eval_results import FOLDER as EVAL_RESULTS
from .eval_results import eval_result_files
from .records import AUTHOR_FILE, TRAINING_FILE, Records, read_records, without_paths

UPLOADED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "diffusion_tokenizer*/*",
    "LICENSE*",
    "NOTICE*",
    f"{EVAL_RESULTS}/*.yaml",
    TRAINING_FILE,
    AUTHOR_FILE,
)
"""The files of a checkpoint's folder that are pushed. Pickles, optimizer states and a run's checkpoints are not."""

Files = dict[str, Path | bytes]
"""What a push uploads: local files or contents, by path in the repository."""


def collect(
    folder: str | os.PathLike, repo_id: str, results: Sequence[str | os.PathLike] = (), tags: Sequence[str] = ()
) -> Files:
    """The files that a push of a checkpoint's folder uploads.

    Args:
        folder: The checkpoint's folder.
        repo_id: The repository, for the card.
        results: Folders of evaluations to report, in addition to those below `folder`.
        tags: Further tags of the card.

    Raises:
        FileNotFoundError: The folder holds no checkpoint, no safetensors, or not all of its shards.
        ValueError: Its LoRA is not merged, an adapter's base model is a local one, or the card's metadata is not valid
            on the Hub.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{str(root)!r} is not a folder. Give one that a run or save_pretrained wrote.")
    records = read_records(root, results)
    _check_weights(root)
    _check_base(records)
    files: Files = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and any(fnmatch(name, pattern) for pattern in UPLOADED) and _is_own(name):
            files[name] = path
    if records.config is not None:
        files |= _code()
        files["handler.py"] = Path(endpoint.__file__)
        files["requirements.txt"] = endpoint.REQUIREMENTS.encode()
    if records.stages:
        files["recipe.yaml"] = _recipe(records)
    for number, evaluation in enumerate(records.results, 1):
        name = f"results/{number:02}-{evaluation['benchmark']}/results.json"
        files[name] = json.dumps(evaluation, indent=2).encode() + b"\n"
    files = {**eval_result_files(records.results), **files}
    card = root / "README.md"
    if card.is_file() and is_by_hand(card.read_text(encoding="utf-8")):
        files["README.md"] = card
    else:
        files["README.md"] = make_card(root, repo_id, results, tags).content.encode()
    return files


def _is_own(name: str) -> bool:
    """Whether a path belongs to the checkpoint itself, not to a checkpoint inside a run's folder."""
    return "/" not in name or name.startswith(("diffusion_tokenizer", EVAL_RESULTS))


def _check_weights(root: Path) -> None:
    if (root / "unet_adapter.json").is_file():
        raise ValueError(
            f"{str(root)!r} holds a LoRA of the UNet that is not merged. Run `sdllava merge {root} NEW` and push NEW."
        )
    for index in root.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shard for shard in shards if not (root / shard).is_file()):
            raise FileNotFoundError(
                f"{str(root)!r} is incomplete: {index.name} names {missing[0]!r}, which is missing. Save the model "
                "again."
            )
    if not any(root.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{str(root)!r} holds no safetensors, the only weights that are pushed. Save the model with "
            "save_pretrained."
        )


def _check_base(records: Records) -> None:
    base = records.adapter and records.adapter.get("base_model_name_or_path")
    if base and (Path(base).exists() or not HUB_ID.fullmatch(base)):
        raise ValueError(
            f"The adapter's base model is {base!r}, which only this machine can read. Push that first and write its id "
            "into base_model_name_or_path of adapter_config.json, or push the result of `sdllava merge`."
        )


def _code() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        save_code(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _recipe(records: Records) -> bytes:
    import yaml

    stage = records.stages[-1]
    text = yaml.safe_dump({"stage": stage["stage"], **without_paths(stage["settings"])}, sort_keys=False)
    return f"# sdllava train --config recipe.yaml; paths of the run are shortened to their last part.\n{text}".encode()


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    results: Sequence[str | os.PathLike] = (),
    tags: Sequence[str] | None = None,
    bundle_frozen: bool = True,
    **options: Any,
) -> CommitInfo:
    """Push a checkpoint's folder with its processor, code, recipe and model card.

    Args:
        folder: The checkpoint's folder.
        repo_id: The repository, `owner/name`.
        results: Folders of evaluations to report in the card, in addition to those below `folder`.
        tags: Further tags of the card.
        bundle_frozen: False leaves out frozen parts; see `SDLlavaPreTrainedModel.save_pretrained`.
        options: Options of [`upload`].

    Raises:
        FileNotFoundError: As [`collect`].
        ValueError: As [`collect`], or the frozen parts cannot be left out.
        PermissionError: The Hub does not accept the token.
    """
    options.setdefault("commit_message", "Upload model")
    with files_to_push(folder, repo_id, results, tags or (), bundle_frozen) as files:
        return upload(files, repo_id, **options)


@contextmanager
def files_to_push(
    folder: str | os.PathLike,
    repo_id: str,
    results: Sequence[str | os.PathLike] = (),
    tags: Sequence[str] = (),
    bundle_frozen: bool = True,
) -> Iterator[Files]:
    """The files of [`collect`], with or without the frozen parts. They exist while the context is open.

    Args:
        folder: The checkpoint's folder.
        repo_id: The repository, for the card.
        results: Folders of evaluations to report, in addition to those below `folder`.
        tags: Further tags of the card.
        bundle_frozen: False leaves out frozen parts.

    Yields:
        `Files`: Local files or contents, by path in the repository.
    """
    if bundle_frozen:
        yield collect(folder, repo_id, results, tags)
        return
    reported = [*([folder] if read_records(folder).results else []), *results]
    with tempfile.TemporaryDirectory() as small:
        copy_without_frozen(folder, small)
        yield collect(small, repo_id, reported, tags)


def copy_without_frozen(folder: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a checkpoint without its frozen parts.

    Args:
        folder: The checkpoint's folder.
        target: An existing, empty folder.

    Raises:
        ValueError: The folder does not hold a whole model of this package, or the parts cannot be left out.
    """
    from ..modeling_sdllava import SDLlavaForConditionalGeneration

    config = read_records(folder).config
    if config is None or config.get("model_type") != "sdllava":
        raise ValueError(
            f"{str(folder)!r} is not a whole vision-language model of this package, so no part can be left out of it. "
            "Push it with its frozen parts."
        )
    model = SDLlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    for path in Path(folder).iterdir():
        if path.is_dir() and path.name.startswith(("diffusion_tokenizer", EVAL_RESULTS)):
            shutil.copytree(path, Path(target, path.name))
        elif path.is_file() and ".safetensors" not in path.name:
            shutil.copy(path, target)
    model.save_pretrained(target, bundle_frozen=False)


def upload(
    files: Files,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str,
    commit_description: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Upload files in one commit.

    An interrupted upload resumes: large files that arrived are not sent again. Weights of an earlier upload that the
    new ones replace are deleted. A card in the repository that was written by hand is kept.

    Args:
        files: Local files or contents, by path in the repository.
        repo_id: The repository, `owner/name`. It is created if it does not exist.
        private: Whether a new repository is private.
        revision: The branch. It is created if it does not exist.
        create_pr: Open a pull request instead of committing.
        commit_message: First line of the commit message.
        commit_description: The rest of it.
        token: Default: the token of `hf auth login` or of HF_TOKEN.

    Raises:
        PermissionError: The Hub does not accept the token.
    """
    api = HfApi(token=token, library_name="sdllava")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if isinstance(files.get("README.md"), bytes) and _has_card_by_hand(api, repo_id, revision):
            files = {name: content for name, content in files.items() if name != "README.md"}
        stale = _stale_weights(files, api.list_repo_files(repo_id, revision=revision))
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(CommitOperationDelete(name) for name in stale),
        ]
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, commit_description=commit_description,
            revision=revision, create_pr=create_pr,
        )  # fmt: skip
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            reason = str(error.server_message or error).strip().splitlines()[-1]
            raise PermissionError(
                f"The token cannot write to {repo_id!r} ({error.response.status_code}: {reason}). Log in with "
                "`hf auth login`, or set HF_TOKEN to a token that can write."
            ) from error
        raise


def _stale_weights(files: Files, present: Sequence[str]) -> list[str]:
    """Weights in the repository that would be read instead of the new ones, or in addition to them."""
    patterns = [p for p in ("model*.safetensors*", "adapter_model*.safetensors*") if any(fnmatch(f, p) for f in files)]
    return [name for name in present if name not in files and any(fnmatch(name, pattern) for pattern in patterns)]


def _has_card_by_hand(api: HfApi, repo_id: str, revision: str | None) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            card = api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder)
        except EntryNotFoundError:
            return False
        return is_by_hand(Path(card).read_text(encoding="utf-8"))


def push_files(folder: str | os.PathLike, repo_id: str, **options: Any) -> CommitInfo:
    """Push all files of a folder, without a card, such as those of a processor.

    Args:
        folder: The folder.
        repo_id: The repository, `owner/name`.
        options: Options of [`upload`], which needs a `commit_message`.
    """
    root = Path(folder)
    files: Files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    return upload(files, repo_id, **options)

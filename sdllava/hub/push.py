"""Pushing checkpoints to the Hub: which files, the model card, one commit."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..remote_code import save_code
from .card import HUB_ID, is_by_hand, make_card
from .records import AUTHOR_FILE, TRAINING_FILE, Records, public, read_records

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
    TRAINING_FILE,
    AUTHOR_FILE,
)
"""The files of a checkpoint's folder that go to the Hub. Pickles, optimizer states and checkpoints of a run do not."""

Files = dict[str, Path | bytes]


def collect(folder: str | os.PathLike, repo_id: str, results: Sequence[str | os.PathLike] = (), tags=()) -> Files:
    """What a push of a checkpoint's folder uploads, by its path in the repository.

    Args:
        results: folders of evaluations to report, beside those below `folder`.
        tags: added to the card's.

    Raises:
        FileNotFoundError: the folder holds no checkpoint, no safetensors, or not all of its shards.
        ValueError: its LoRA is not merged, an adapter's base model is a local one, or the card's metadata is not what
            the Hub expects.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: give one that a run or save_pretrained wrote")
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
    if records.stages:
        files["recipe.yaml"] = _recipe(records)
    for number, evaluation in enumerate(records.results, 1):
        name = f"results/{number:02}-{evaluation['benchmark']}/results.json"
        files[name] = json.dumps(evaluation, indent=2).encode() + b"\n"
    card = root / "README.md"
    if card.is_file() and is_by_hand(card.read_text(encoding="utf-8")):
        files["README.md"] = card
    else:
        files["README.md"] = make_card(root, repo_id, results, tags).content.encode()
    return files


def _is_own(name: str) -> bool:
    """Whether a path is the checkpoint's own and not that of a checkpoint within a run's folder."""
    return "/" not in name or name.startswith("diffusion_tokenizer")


def _check_weights(root: Path) -> None:
    if (root / "unet_adapter.json").is_file():
        raise ValueError(f"{root} holds LoRA of the UNet apart from its weights: `sdllava merge {root} NEW`, push NEW")
    for index in root.glob("*.safetensors.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(shard for shard in shards if not (root / shard).is_file()):
            raise FileNotFoundError(f"{root} is not whole: {index.name} names {missing[0]}, which is missing")
    if not any(root.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{root} holds no safetensors, and nothing else is pushed: save the model with save_pretrained"
        )


def _check_base(records: Records) -> None:
    base = records.adapter and records.adapter.get("base_model_name_or_path")
    if base and (Path(base).exists() or not HUB_ID.fullmatch(base)):
        raise ValueError(
            f"the adapter's base model is {base!r}, which nobody else can read: push that first and write its id into "
            "base_model_name_or_path of adapter_config.json, or push what `sdllava merge` makes"
        )


def _code() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        save_code(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _recipe(records: Records) -> bytes:
    import yaml

    stage = records.stages[-1]
    text = yaml.safe_dump({"stage": stage["stage"], **public(stage["settings"])}, sort_keys=False)
    return f"# sdllava train --config recipe.yaml; paths are those of the run, shortened.\n{text}".encode()


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    results: Sequence[str | os.PathLike] = (),
    tags: Sequence[str] | None = None,
    bundle_frozen: bool = True,
    **options,
) -> CommitInfo:
    """Push a checkpoint's folder with its processor, code, recipe and model card.

    Args:
        results: folders of evaluations to report in the card, beside those below `folder`.
        tags: added to the card's.
        bundle_frozen (`bool`): False leaves out frozen parts; see `SDLlavaPreTrainedModel.save_pretrained`.
        options: of [`upload`].

    Raises:
        FileNotFoundError, ValueError: as [`collect`].
        PermissionError: the Hub does not accept the token.
    """
    options.setdefault("commit_message", "Upload model")
    if bundle_frozen:
        return upload(collect(folder, repo_id, results, tags or ()), repo_id, **options)
    with tempfile.TemporaryDirectory() as small:
        leave_out_frozen(folder, small)
        return upload(collect(small, repo_id, results_of(folder, results), tags or ()), repo_id, **options)


def results_of(folder: str | os.PathLike, results: Sequence[str | os.PathLike] = ()) -> list[str | os.PathLike]:
    """Where the evaluations lie that a push of `folder` reports."""
    return [*([folder] if read_records(folder).results else []), *results]


def leave_out_frozen(folder: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copy a checkpoint without its frozen parts.

    Raises:
        ValueError: it is no whole model of this package, or the parts cannot be left out.
    """
    from ..modeling_sdllava import SDLlavaForConditionalGeneration

    config = read_records(folder).config
    if config is None or config.get("model_type") != "sdllava":
        raise ValueError(f"{folder} is no whole vision-language model of this package: nothing can be left out of it")
    model = SDLlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    for path in Path(folder).iterdir():
        if path.is_dir() and path.name.startswith("diffusion_tokenizer"):
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
    """Upload files in one commit. What an interrupted upload had sent is not sent again. Weights of an earlier upload that
    the new ones replace are deleted; a card that was written by hand is not replaced by one made here.

    Args:
        private (`bool`, *optional*): for a repository that does not exist yet.
        revision (`str`, *optional*): the branch; made where it does not exist.
        create_pr (`bool`): open a pull request instead of committing.
        token: default the one of `hf auth login` or of HF_TOKEN.

    Raises:
        PermissionError: the Hub does not accept the token.
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
                f"the Hub does not let this token write to {repo_id} ({error.response.status_code}: {reason}): log in "
                "with `hf auth login`, or set HF_TOKEN to a token that may write"
            ) from error
        raise


def _stale_weights(files: Files, present: Sequence[str]) -> list[str]:
    """Weights in the repository that would be read instead of, or beside, the new ones."""
    patterns = [p for p in ("model*.safetensors*", "adapter_model*.safetensors*") if any(fnmatch(f, p) for f in files)]
    return [name for name in present if name not in files and any(fnmatch(name, pattern) for pattern in patterns)]


def _has_card_by_hand(api: HfApi, repo_id: str, revision: str | None) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            card = api.hf_hub_download(repo_id, "README.md", revision=revision, local_dir=folder)
        except EntryNotFoundError:
            return False
        return is_by_hand(Path(card).read_text(encoding="utf-8"))


def push_model(
    model: Any, repo_id: str, *, max_shard_size: int | str = "50GB", bundle_frozen: bool = True, **options
) -> CommitInfo:
    """`push_to_hub` of this package's models: weights, configuration, generation configuration, code and card.

    Args:
        max_shard_size, bundle_frozen: of `save_pretrained`.
        options: of [`push_folder`].
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size, bundle_frozen=bundle_frozen)
        return push_folder(folder, repo_id, **options)


def push_processor(processor: Any, repo_id: str, **options) -> CommitInfo:
    """`push_to_hub` of the processor: its files and the code, with the options of [`upload`]; a card needs a model."""
    options.setdefault("commit_message", "Upload processor")
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        root = Path(folder)
        files: Files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
        return upload(files, repo_id, **options)

"""Checkpoints: the code beside them, safetensors only, and frozen parts that may be left out.

A frozen part that was left out is read from the repository that it came from, and used only if its hash is the one
that the checkpoint records.
"""

import copy
import hashlib
import os
import re
from typing import Any

import torch
from huggingface_hub import metadata_load
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file, has_file
from transformers.utils.hub import extract_commit_hash

from .remote_code import save_code

FROZEN_PARTS = {"diffusion": "diffusion_tower.backbone", "vision": "vision_tower"}
"""Parts that a checkpoint can leave out, as the configuration's `components` names them, and their modules."""

PICKLED_WEIGHTS = re.compile(r"(pytorch_|adapter_|diffusion_pytorch_)?model.*\.(bin|ckpt|pkl|pickle|pt|pth)")


class CheckpointMixin:
    """Saves the code beside the weights, reads weights as safetensors only, and freezes what is frozen again."""

    def freeze(self) -> None:
        """Stop gradients to what never trains by default; loading gives every parameter its gradient back."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`, with the code beside it for processes without this package."""
        save_code(save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`, from safetensors only.

        A `quantization_config` that names no modules to skip quantises the language model's body alone.

        Raises:
            ValueError: the weights are pickles, or the checkpoint lacks frozen weights that the configuration needs.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False asks for pickles, which this package never reads: leave it out")
        source = pretrained_model_name_or_path
        if source is not None:
            check_adapter(source, **kwargs)
            kwargs["use_safetensors"] = True
        _quantize_language_model_only(kwargs.get("quantization_config"))
        want_info = kwargs.pop("output_loading_info", False)
        try:
            loaded, info = super().from_pretrained(  # type: ignore[misc]
                source, *args, output_loading_info=True, **kwargs
            )
        except OSError as error:
            if source is not None:
                refuse_pickle(os.fspath(source), error, **kwargs)
            raise
        _refuse_missing(source, loaded, info["missing_keys"])
        for module in loaded.modules():
            if isinstance(module, CheckpointMixin):
                module.freeze()
        return (loaded, info) if want_info else loaded


def _refuse_missing(source: Any, model: Any, missing_keys: Any) -> None:
    lacking = sorted(key for key in missing_keys if re.search(r"(^|\.)(backbone|vision_tower)\.", key))
    if lacking and not getattr(model.config, "left_out", None):
        raise ValueError(
            f"{source!r} lacks {len(lacking)} frozen weights that this configuration needs, {lacking[0]} first: it was "
            "saved with other taps, or cut behind them; compose it again with these taps, or with truncate=False"
        )


_NOT_QUANTIZED = [
    r"(model\.)?(vision_tower|diffusion_tower|fusion|implicit_captioner|multi_modal_projector)",
    "lm_head",
]


def _quantize_language_model_only(quantization_config: Any) -> None:
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if quantization_config is not None and getattr(quantization_config, name, []) is None:
            setattr(quantization_config, name, list(_NOT_QUANTIZED))


def refuse_pickle(source: str, error: Exception | None = None, **options) -> None:
    """Explain why weights could not be read, where that is because they are pickles.

    Raises:
        ValueError: a folder below `source`, or the repository, has pickles where safetensors should be.
    """
    if not os.path.isdir(source):
        names = ("pytorch_model.bin", "adapter_model.bin")
        found = next((name for name in names if _in_repository(source, name, options)), None)
    else:
        found = None
        for folder, _, files in os.walk(source):
            pickles = sorted(name for name in files if PICKLED_WEIGHTS.fullmatch(name))
            if found is None and pickles and not any(name.endswith(".safetensors") for name in files):
                found = os.path.relpath(os.path.join(folder, pickles[0]), source)
    if found is not None:
        raise ValueError(
            f"{source!r} holds weights as {found}, a pickle, which can run any code when it is read, and no "
            "safetensors: ask its author for safetensors, or convert it where nothing can be harmed (torch.load with "
            "weights_only=True, then safetensors.torch.save_file)"
        ) from error


def _in_repository(source: str, name: str, options: dict[str, Any]) -> bool:
    try:
        return has_file(source, name, **_hub_options(options))
    except OSError:
        return False


def check_adapter(source: str | os.PathLike, **options) -> None:
    """Refuse an adapter whose weights are pickled; what is no adapter passes.

    Args:
        options: of `from_pretrained`, such as `token` and `revision`.

    Raises:
        ValueError: it holds no safetensors.
    """
    if _file(source, "adapter_config.json", options) and not _file(source, "adapter_model.safetensors", options):
        refuse_pickle(os.fspath(source), **options)


def _file(source: str | os.PathLike, name: str, options: dict[str, Any] | None = None) -> str | None:
    """Path of a file of a folder or repository, or None where it has none."""
    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **_hub_options(options or {}))
    except OSError:
        return None


def _hub_options(options: dict[str, Any]) -> dict[str, Any]:
    names = ("cache_dir", "local_files_only", "token", "revision")
    return {name: options[name] for name in names if options.get(name) is not None}


def describe_source(source: str, revision: str | None = None) -> dict[str, Any]:
    """Where a part comes from, for the configuration's `components`.

    Args:
        source (`str`): a repository id, or a local folder, whose path is not recorded.

    Returns:
        `dict`: `id` and `revision` (the commit) for a repository; `license` and `language`, where its card names them.
    """
    options = {"revision": revision}
    described: dict[str, Any] = {}
    if not os.path.isdir(source):
        described["id"] = source
        known = next((p for n in ("config.json", "model_index.json") if (p := _file(source, n, options))), None)
        if (commit := extract_commit_hash(known, None)) is not None:
            described["revision"] = commit
    card = _file(source, "README.md", options)
    metadata = (metadata_load(card) if card else None) or {}
    licence = metadata.get("license")
    licence = metadata.get("license_name") or licence if licence == "other" else licence
    if isinstance(licence, str):
        described["license"] = licence
    if language := metadata.get("language"):
        described["language"] = [language] if isinstance(language, str) else list(language)
    return described


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over a module's tensors in float32, by name: the same for every dtype that holds the same values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def leave_out_frozen(model: PreTrainedModel) -> tuple[dict[str, str], set[str]]:
    """What can be left out of a checkpoint of `model`.

    Returns:
        the hash of each part's published weights, and the names of the tensors that need not be saved.

    Raises:
        ValueError: the diffusion model is not recorded as a repository's, or its weights are no longer the published
            ones.
    """
    body = getattr(model, "model", model)
    parts = _parts(model)
    if "diffusion" not in parts:
        raise ValueError(
            "bundle_frozen=False leaves out frozen parts that came from a repository, but the configuration records "
            f"none for the diffusion model (components={model.config.components}): save it with its weights"
        )
    hashes: dict[str, str] = {}
    names: set[str] = set()
    prefix = "" if body is model else "model."
    for part, path in parts.items():
        module = body.get_submodule(path)
        published = _load_part(model.config, part)
        for name, tensor in published.state_dict().items():
            own = module.state_dict().get(name)
            if own is None or not torch.equal(own.cpu(), tensor.to(own.dtype)):
                where = model.config.components[part]
                raise ValueError(
                    f"the {part} weights are not those of {where['id']} at {where.get('revision')} ({name} differs): "
                    "save them with the checkpoint"
                )
        hashes[part] = weights_hash(published)
        names |= {f"{prefix}{path}.{name}" for name in module.state_dict()}
    return hashes, names


def fetch_frozen(model: PreTrainedModel) -> None:
    """Fill the parts that a checkpoint left out, in place.

    Raises:
        OSError: a repository cannot be read.
        ValueError: it holds other weights than those that the checkpoint was saved with.
    """
    body = getattr(model, "model", model)
    for part, expected in model.config.left_out.items():
        published = _load_part(model.config, part)
        if (found := weights_hash(published)) != expected:
            where = model.config.components[part]
            raise ValueError(
                f"{where['id']} at {where.get('revision')} holds other {part} weights (hash {found[:16]}) than those "
                f"that this checkpoint left out ({expected[:16]}): find a copy of the original"
            )
        module = body.get_submodule(FROZEN_PARTS[part])
        if part == "diffusion" and model.config.diffusion_config.vae_in_fp32:
            module.vae.float()  # tensors that no file holds were made in the model's own dtype
        own = module.state_dict()
        with torch.no_grad():
            for name, tensor in published.state_dict().items():
                own[name].copy_(tensor)
    model.config.left_out = None


def _parts(model: PreTrainedModel) -> dict[str, str]:
    components = model.config.components or {}
    configured = {"diffusion": model.config.diffusion_config, "vision": model.config.vision_config}
    return {
        part: path
        for part, path in FROZEN_PARTS.items()
        if configured[part] is not None and components.get(part, {}).get("id")
    }


def _load_part(config, part: str) -> nn.Module:
    """A frozen part from its repository, in float32 and cut as the model is."""
    from .components import load_vision
    from .diffusion_loading import load_tower

    where = config.components[part]
    source = f"{where['id']}@{where['revision']}" if where.get("revision") else where["id"]
    if part == "diffusion":
        return load_tower(source, copy.deepcopy(config.diffusion_config), torch.float32).backbone
    return load_vision(source, config.vision_config, torch.float32)

"""Checkpoints: the code saved next to them, safetensors only, and frozen parts that may be left out.

A frozen part that was left out is read from the repository that it came from, and used only if its hash is the one
that the checkpoint records.
"""

import copy
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any, ClassVar, Concatenate

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from .backbones import load_backbone
from .checkpoint_files import CheckpointError, check_files, compare_shapes, damage_reported
from .fingerprints import weights_hash
from .remote_code import save_code
from .repositories import check_adapter, refuse_pickle
from .vision import load_vision

FROZEN_PARTS = {"diffusion": "diffusion_tower.backbone", "vision": "vision_tower"}
"""Parts that a checkpoint can leave out, as the configuration's `components` names them, and their modules."""

_FROZEN = re.compile(r"(^|\.)(backbone|vision_tower)\.")
_NOT_QUANTIZED = [
    r"(model\.)?(vision_tower|fusion|implicit_captioner|multi_modal_projector)",
    r"(model\.)?(diffusion_tower\.)?(ensemble|backbone\.(?!text_encoder\w*\.encoder\.block)\w+)",  # T5 has these blocks
    "lm_head",
]


PushFolder = Callable[Concatenate[str, str, ...], Any]
"""Pushes a folder to a repository: (folder, repository id, options)."""


class CheckpointMixin:
    """Saves the code next to the weights, reads weights as safetensors only, and re-freezes the frozen modules."""

    push_folder: ClassVar[PushFolder | None] = None
    """Pushes a saved model to the Hub with a model card. Set by `registration.register`, since the code that travels
    with a checkpoint cannot write cards."""

    def freeze(self) -> None:
        """Stop gradients to what never trains by default; loading resets `requires_grad` to True."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.save_pretrained`, with the code next to it for processes without this package."""
        save_code(save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # a mixin's base

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As `PreTrainedModel.push_to_hub`, with the code and, where `sdllava` is installed, a model card."""
        push = type(self).push_folder
        if push is None:
            return super().push_to_hub(repo_id, **kwargs)  # type: ignore[misc]  # a mixin's base
        saved = {name: kwargs.pop(name) for name in ("max_shard_size", "bundle_frozen") if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **saved)
            return push(folder, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, from safetensors only.

        A `quantization_config` that names no modules to skip quantises only the language model's body and the blocks
        of a T5 text encoder, which transformers does without their output projections `wo`.

        Raises:
            CheckpointError: A file is damaged or missing, or the configuration does not fit the weights. It is raised
                before memory for the weights is allocated, except for weights that are missing. With
                `output_loading_info=True`, the caller checks `missing_keys` instead.
            ValueError: The weights are pickles, or the checkpoint lacks frozen weights that the configuration needs.
        """
        if kwargs.pop("use_safetensors", None) is False:
            raise ValueError("use_safetensors=False would read pickles, which this package never does. Leave it out.")
        source = pretrained_model_name_or_path
        if source is not None:
            check_adapter(source, **kwargs)
            kwargs["use_safetensors"] = True
        _quantize_language_models_only(kwargs.get("quantization_config"))
        want_info = kwargs.pop("output_loading_info", False)
        try:
            if source is not None and kwargs.get("state_dict") is None:
                cls._check_files(source, kwargs)
            loaded, info = super().from_pretrained(  # type: ignore[misc]  # a mixin's base
                source, *args, output_loading_info=True, **kwargs
            )
        except OSError as error:
            if source is not None:
                refuse_pickle(source, error, **kwargs)
            if source is None or isinstance(error, CheckpointError) or not os.path.isdir(source):
                raise
            raise CheckpointError.of(source, str(error).strip().splitlines()[0]) from error
        _require_frozen(source, loaded, info["missing_keys"])
        if not want_info and kwargs.get("state_dict") is None:
            _require_trained(source, info["missing_keys"])
        for module in loaded.modules():
            if isinstance(module, CheckpointMixin):
                module.freeze()
        return (loaded, info) if want_info else loaded

    @classmethod
    def _check_files(cls, source: str | os.PathLike, options: dict[str, Any]) -> None:
        """Compare the headers of the weights with the configuration, and with the model that it describes."""
        found = check_files(source, options)
        kind: Any = cls.config_class  # type: ignore[attr-defined]  # of PreTrainedModel
        changes = kind.__dataclass_fields__.keys() - {"dtype"} | {"config", "key_mapping", "ignore_mismatched_sizes"}
        if found is None or any(options.get(name) is not None for name in changes):
            return
        fields, shapes = found
        if fields.get("model_type") != kind.model_type or "quantization_config" in fields:
            return
        with damage_reported(source, "the model's configuration"), torch.device("meta"), no_init_weights():
            built: Any = cls(kind.from_dict(fields))  # type: ignore[call-arg]  # of PreTrainedModel
        compare_shapes(source, {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}, shapes)


def _require_trained(source: Any, missing_keys: Any) -> None:
    """Raise where transformers would leave weights at random values, with a warning."""
    if lacking := sorted(key for key in missing_keys if not _FROZEN.search(key)):
        raise CheckpointError.of(source, f"it lacks {len(lacking)} weights, {lacking[0]!r} first")


def _require_frozen(source: Any, model: PreTrainedModel, missing_keys: Any) -> None:
    lacking = sorted(key for key in missing_keys if _FROZEN.search(key))
    if lacking and not getattr(model.config, "left_out", None):
        raise ValueError(
            f"{str(source)!r} lacks {len(lacking)} frozen weights that this configuration needs, {lacking[0]!r} first. "
            "It was saved with other taps, or cut after them; or without frozen parts, which only the whole model "
            "loads. Compose it again with these taps, or with truncate=False."
        )


def _quantize_language_models_only(quantization_config: Any) -> None:
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if quantization_config is not None and getattr(quantization_config, name, []) is None:
            setattr(quantization_config, name, list(_NOT_QUANTIZED))


def leave_out_frozen(model: PreTrainedModel) -> tuple[dict[str, str], set[str]]:
    """What can be left out of a checkpoint of `model`.

    Returns:
        The hash of each part's published weights, and the names of the tensors that need not be saved.

    Raises:
        ValueError: The diffusion model does not come from a recorded repository, or its weights are no longer the
            published ones.
    """
    body = getattr(model, "model", model)
    parts = _parts(model)
    if "diffusion" not in parts:
        raise ValueError(
            f"bundle_frozen=False leaves out frozen parts that came from a repository, but components="
            f"{model.config.components} records none for the diffusion model. Save it with its weights."
        )
    hashes: dict[str, str] = {}
    names: set[str] = set()
    prefix = "" if body is model else "model."
    for part, path in parts.items():
        module = body.get_submodule(path)
        published = _load_part(model.config, part)
        own = module.state_dict()
        for name, tensor in published.state_dict().items():
            if name not in own or not torch.equal(own[name].cpu(), tensor.to(own[name].dtype)):
                where = model.config.components[part]
                raise ValueError(
                    f"The {part} weights differ from those of {where['id']!r} at revision {where.get('revision')!r}, "
                    f"{name!r} first. Save them with the checkpoint."
                )
        hashes[part] = weights_hash(published)
        names |= {f"{prefix}{path}.{name}" for name in own}
    return hashes, names


def fetch_frozen(model: PreTrainedModel) -> None:
    """Fill the parts that a checkpoint left out, in place.

    Raises:
        OSError: A repository cannot be read.
        ValueError: It holds other weights than those that the checkpoint was saved with.
    """
    body = getattr(model, "model", model)
    for part, expected in model.config.left_out.items():
        published = _load_part(model.config, part)
        if (found := weights_hash(published)) != expected:
            where = model.config.components[part]
            raise ValueError(
                f"{where['id']!r} at revision {where.get('revision')!r} holds other {part} weights (hash {found[:16]}) "
                f"than those that this checkpoint left out (hash {expected[:16]}). Find a copy of the original."
            )
        module = body.get_submodule(FROZEN_PARTS[part])
        if part == "diffusion" and model.config.diffusion_config.vae_in_fp32 and hasattr(module, "vae"):
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


def _load_part(config: Any, part: str) -> nn.Module:
    """A frozen part from its repository, in float32 and cut as the model is."""
    where = config.components[part]
    source = f"{where['id']}@{where['revision']}" if where.get("revision") else where["id"]
    if part == "diffusion":
        return load_backbone(source, copy.deepcopy(config.diffusion_config), torch.float32)
    return load_vision(source, config.vision_config, torch.float32)

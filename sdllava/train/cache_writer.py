"""Writing a feature cache: which images and questions the data needs, and what is kept of them."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm
from transformers.utils import logging

from ..data.images import open_image
from ..data.prompts import possible_prompts
from ..data.records import Record, RecordError
from .cache import begin_cache, image_key, write_shards
from .collator import SDLlavaCollator

if TYPE_CHECKING:
    from ..modeling_sdllava import SDLlavaForConditionalGeneration
    from ..processors import SDLlavaProcessor

logger = logging.get_logger(__name__)

KINDS = ("latents", "static", "conditional")
VISION_FIELDS = ("vision_image_size", "vision_feature_layer", "vision_feature_select_strategy")
DIFFUSION_FIELDS = ("taps", "timesteps", "grid_size", "noise_seed")


@dataclass(frozen=True)
class CacheItem:
    """One thing to compute: an image, and for conditional features what the diffusion model is asked about it."""

    key: str
    image: Any
    folder: str | None
    prompt: str
    name: str


def cache_record(
    model: "SDLlavaForConditionalGeneration", processor: "SDLlavaProcessor", kind: str, dtype: str
) -> dict[str, Any]:
    """What makes a cache of this kind what it is: weights, settings, preprocessing, noise and dtype.

    Weights are named by a digest of a sample of their values, rounded to bfloat16, so that the same weights held in
    another dtype, or in another checkpoint, are the same.
    """
    config, tower = model.config, model.model.diffusion_tower
    if tower is None:
        raise ValueError("the model has no diffusion tower, and so nothing costly to cache")
    diffusion = config.diffusion_config
    record: dict[str, Any] = {
        "kind": kind,
        "dtype": dtype,
        "image_size": diffusion.image_size,
        "weights": {"vae": _digest(tower.vae)},
        "preprocessing": {"mean_colour": processor._mean_colour()},
    }
    if kind == "latents":
        return record
    record |= {name: getattr(diffusion, name) for name in DIFFUSION_FIELDS}
    record["weights"] |= {"unet": _digest(tower.unet), "text_encoder": _digest(tower.text_encoder)}
    if model.model.vision_tower is not None:
        record |= {name: getattr(config, name) for name in VISION_FIELDS}
        record["weights"]["vision_tower"] = _digest(model.model.vision_tower)
        record["preprocessing"]["pad_to_square"] = processor.pad_to_square
    return record


def cached_tensors(model: "SDLlavaForConditionalGeneration", kind: str, prompts: str) -> list[str]:
    """The names of what a cache keeps of each key, for runs whose diffusion prompt is `prompts`."""
    if kind == "latents":
        return ["latents"]
    names = [] if model.model.vision_tower is None else ["vision_features"]
    names += ["image_embeds"] if model.model.implicit_captioner is not None else []
    names.append("unconditional_features")
    if kind == "conditional":
        return [*names, "conditional_features"]
    asked = prompts != "none" and any(s != 0 for s in model.config.diffusion_config.guidance_scales)
    return [*names, "latents"] if asked else names


def write_cache(
    model: "SDLlavaForConditionalGeneration",
    collator: SDLlavaCollator,
    rows: Iterable[Mapping[str, Any]],
    folder: str | Path,
    kind: str,
    dtype: str = "bfloat16",
    batch_size: int = 16,
    process: int = 0,
    num_processes: int = 1,
    shard_bytes: int = 1 << 30,
) -> int:
    """Compute what is frozen and costly for all images of the data, and keep it; what the folder holds already stays.

    Args:
        kind: "latents" (the VAE's, whatever the noise and the question), "static" (static and unconditional features,
            and latents where the run asks questions) or "conditional" (a question's features as well).
        dtype: in which tensors are kept; latents are read back as float32.
        process, num_processes: this process and how many share the work.

    Returns:
        The number of keys that this process wrote.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no cache of kind {kind!r}: choose one of {KINDS}")
    if kind == "conditional" and (collator.prompts.source == "none" or all(s == 0 for s in _scales(model))):
        raise ValueError("the run asks the diffusion model nothing (empty prompt or s = 0): write a static cache")
    names = cached_tensors(model, kind, collator.prompts.source)
    record = {**cache_record(model, collator.processor, kind, dtype), "tensors": names}
    cache = begin_cache(Path(folder), record | {"model": model.config._name_or_path or "assembled from parts"})
    items = {item.key: item for item in _items(rows, collator, kind)}
    own = sorted(items)[process::num_processes]  # whatever the others have written by now
    missing = [items[key] for key in own if key not in cache]
    if not missing:
        return 0
    first = next(_compute(model, collator, missing[:1], names, dtype, 1), None)
    if first is not None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in first[1].values())
        print(
            f"{len(items)} keys of {size / 1024:.1f} KiB: {len(items) * size / 1024**3:.3f} GiB in all; "
            f"{len(missing)} left for process {process} of {num_processes}"
        )
    computed = _compute(model, collator, missing, names, dtype, batch_size)
    shown = tqdm(computed, desc="cache", total=len(missing), unit="key", disable=process > 0)
    return write_shards(Path(folder), shown, process, shard_bytes)


def _scales(model: Any) -> list[float]:
    return model.config.diffusion_config.guidance_scales


def _items(rows: Iterable[Mapping[str, Any]], collator: SDLlavaCollator, kind: str) -> Iterator[CacheItem]:
    folders: dict[str, str | None] = {}
    for number, row in enumerate(rows):
        try:
            record: Record = collator.record(row, number)
        except RecordError as error:
            _refuse(collator, row.get("name") or f"sample {number}", error)
            continue
        prompts = possible_prompts(record, collator.prompts)
        for image, asked in zip(record["images"], prompts, strict=True):
            for prompt in asked if kind == "conditional" else [None]:
                key = image_key(image, prompt)
                if folders.setdefault(key, record["folder"]) != record["folder"]:
                    raise ValueError(
                        f"{record['name']}: two image folders, {folders[key]} and {record['folder']}, hold an image of "
                        f"the same name, {image!r}: one cache cannot tell them apart"
                    )
                yield CacheItem(key, image, record["folder"], prompt or "", record["name"])


@torch.no_grad()
def _compute(
    model: Any, collator: SDLlavaCollator, items: list[CacheItem], names: list[str], dtype: str, batch_size: int
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    for start in range(0, len(items), batch_size):
        opened = [(item, _open(item, collator)) for item in items[start : start + batch_size]]
        kept = [(item, image) for item, image in opened if image is not None]
        if not kept:
            continue
        inputs = collator.processor(images=[image for _, image in kept], return_tensors="pt").to(model.device)
        if "conditional_features" in names:
            questions = collator.processor.tokenize_questions([item.prompt for item, _ in kept], return_tensors="pt")
            inputs.update({name: ids.to(model.device) for name, ids in questions.items()})
        tensors = _encode(model, inputs, names)
        held = {name: tensor.to("cpu", getattr(torch, dtype)) for name, tensor in tensors.items()}
        for i, (item, _) in enumerate(kept):
            yield item.key, {name: tensor[i].clone() for name, tensor in held.items()}


def _encode(model: Any, inputs: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    tower = model.model.diffusion_tower
    if names == ["latents"]:
        return {"latents": tower.encode_latents(inputs["diffusion_pixel_values"])}
    found = dict(model.encode_images(inputs.get("pixel_values"), inputs["diffusion_pixel_values"]))
    if "unconditional_features" not in found:
        found["unconditional_features"] = tower(latents=found["latents"]).unconditional_features
    if "conditional_features" in names:
        found["conditional_features"] = tower(
            latents=found["latents"],
            input_ids=inputs["diffusion_input_ids"],
            input_ids_2=inputs.get("diffusion_input_ids_2"),
            unconditional_features=found["unconditional_features"],
        ).conditional_features
    return {name: found[name] for name in names}


def _open(item: CacheItem, collator: SDLlavaCollator) -> Any:
    try:
        return open_image(item.image, item.folder)
    except RecordError as error:
        _refuse(collator, item.name, error)
        return None


def _refuse(collator: SDLlavaCollator, name: str, error: RecordError) -> None:
    if not collator.skip_bad_samples:
        raise ValueError(f"{name} {error}") from error
    logger.warning(f"skipped: {name} {error}")


def _digest(module: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in module.state_dict().values():
        values = tensor.detach().flatten()
        sample = values[:: max(1, values.numel() // 4096)].to("cpu", torch.bfloat16).contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

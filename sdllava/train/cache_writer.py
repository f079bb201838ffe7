"""Computing a feature cache: which images and questions the data needs, and their latents and features."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from torch import nn
from tqdm import tqdm
from transformers.utils import logging

from ..data.images import local_size, open_image
from ..data.prompts import possible_prompts
from ..data.records import Record, RecordError
from ..fingerprints import weights_hash
from .cache import RECORD, SHARD_BYTES, CacheEntry, FeatureCache, begin_cache, cache_kind, image_key, write_shards
from .collator import SDLlavaCollator

if TYPE_CHECKING:
    from ..modeling_sdllava import SDLlavaForConditionalGeneration
    from ..processors import SDLlavaProcessor

logger = logging.get_logger(__name__)

VISION_FIELDS = ("vision_image_size", "vision_feature_layer", "vision_feature_select_strategy")
DIFFUSION_FIELDS = ("taps", "timesteps", "grid_size", "noise_seed")


@dataclass(frozen=True)
class CacheItem:
    """One item to compute: an image, and for conditional features the diffusion model's prompt."""

    key: str
    image: Any
    folder: str | None
    prompt: str
    name: str


def cache_record(
    model: "SDLlavaForConditionalGeneration",
    processor: "SDLlavaProcessor",
    kind: str,
    dtype: str,
    found: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What determines the tensors of a cache: weights, settings, preprocessing, noise and dtype.

    Args:
        model: The model that computes or uses the tensors.
        processor: Its processor.
        kind: One of [`~sdllava.train.cache.KINDS`].
        dtype: The dtype of the saved tensors.
        found: The record of an existing cache, whose form of fingerprint is used.

    Raises:
        ValueError: The model has no diffusion tower.
    """
    config, tower = model.config, model.model.diffusion_tower
    if tower is None:
        raise ValueError("The model has no diffusion tower, so there is nothing to cache. Train without a cache.")
    frozen = _frozen_parts(tower, found)
    earlier = found is not None and len(found["weights"].get("vae", "")) == 16
    fingerprint = _earlier_fingerprint if earlier else weights_hash
    diffusion: Any = config.diffusion_config
    record: dict[str, Any] = {
        "kind": kind,
        "dtype": dtype,
        "image_size": diffusion.image_size,
        "weights": {"vae": fingerprint(frozen.pop("vae"))} if "vae" in frozen else {},
        "preprocessing": {"mean_colour": processor._mean_colour()},
    }
    if kind == "latents":
        return record
    record |= {name: getattr(diffusion, name) for name in DIFFUSION_FIELDS}
    record |= {} if diffusion.add_noise else {"add_noise": False}  # earlier records have no such entry
    record["weights"] |= {name: fingerprint(part) for name, part in frozen.items()}
    if model.model.vision_tower is not None:
        record |= {name: getattr(config, name) for name in VISION_FIELDS}
        record["weights"]["vision_tower"] = fingerprint(model.model.vision_tower)
        record["preprocessing"]["pad_to_square"] = processor.pad_to_square
    return record


def _frozen_parts(tower: Any, found: Mapping[str, Any] | None) -> dict[str, nn.Module]:
    """The parts of the diffusion model. Every denoiser has the name "unet", as in the records of earlier versions.

    Those of models with several text encoders only have the first one.
    """
    backbone = tower.backbone
    parts = {"unet" if part is backbone.denoiser else name: part for name, part in backbone.named_children()}
    if found is not None and "text_encoder" in found["weights"] and "text_encoder_2" not in found["weights"]:
        parts = {name: part for name, part in parts.items() if name not in ("text_encoder_2", "text_encoder_3")}
    return parts


def cached_tensors(model: "SDLlavaForConditionalGeneration", kind: str, prompts: str) -> list[str]:
    """The names of the tensors that a cache holds per key.

    Args:
        model: The model of the run.
        kind: One of [`~sdllava.train.cache.KINDS`].
        prompts: The source of the run's prompts, see [`~sdllava.data.prompts.PromptOptions`].
    """
    if kind == "latents":
        return ["latents"]
    names = [] if model.model.vision_tower is None else ["vision_features"]
    names += ["image_embeds"] if model.model.implicit_captioner is not None else []
    names.append("unconditional_features")
    if kind == "conditional":
        return [*names, "conditional_features"]
    is_conditioned = prompts != "none" and any(s != 0 for s in _scales(model))
    return [*names, "latents"] if is_conditioned else names


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
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Compute the frozen features of all images of the data and save them. Keys that the folder holds are kept.

    Batches are the same in every run, and a shard ends with a batch. The shards of an interrupted run therefore equal
    those of an uninterrupted one, byte by byte, in the same environment.

    Args:
        model: The model of the run.
        collator: The collator of the run, which determines prompts and preprocessing.
        rows: The data.
        folder: The cache's folder.
        kind: "latents" (the VAE's latents, which depend on neither noise nor question), "vision" (the vision encoder's
            and the unconditional features, and latents where the run has prompts) or "conditional" (these and the
            features of each question).
        dtype: The dtype of the saved tensors. Latents are read back as float32.
        batch_size: Images in one forward pass.
        process: The number of this process.
        num_processes: The number of processes that share the work.
        shard_bytes: Size at which a shard is written.

    Returns:
        `int`: The number of keys that this process wrote.

    Raises:
        ValueError: The kind is unknown or does not fit the run, the folder holds another cache, or a sample is not
            valid and the collator does not skip it.
    """
    kind = cache_kind(kind)
    folder = Path(folder)
    if kind == "conditional" and (collator.prompts.source == "none" or all(s == 0 for s in _scales(model))):
        raise ValueError(
            "The run does not condition the diffusion model (empty prompt or guidance scale 0). Write a cache of kind "
            "'vision'."
        )
    names = cached_tensors(model, kind, collator.prompts.source)
    found = FeatureCache(folder).record if (folder / RECORD).exists() else None
    record = {**cache_record(model, collator.processor, kind, dtype, found), "tensors": names}
    cache = begin_cache(folder, record, model.config._name_or_path or "assembled from parts")
    skipped = SkippedSamples(collator)
    items = {item.key: item for item in _items(rows, collator, cache, skipped)}
    own = sorted(items)[process::num_processes]  # independent of what other processes have written by now
    missing = {key for key in own if key not in cache}
    if not missing:
        return 0
    batches = [[items[key] for key in own[start : start + batch_size]] for start in range(0, len(own), batch_size)]
    batches = [batch for batch in batches if any(item.key in missing for item in batch)]
    first = next(_compute(model, collator, [batches[0][:1]], names, dtype, SkippedSamples(collator)), [])
    if first:
        size = sum(tensor.numel() * tensor.element_size() for tensor in first[0].tensors.values())
        print(
            f"{len(items)} keys of {size / 1024:.1f} KiB, {len(items) * size / 1024**3:.3f} GiB in total; "
            f"{len(missing)} left for process {process} of {num_processes}"
        )
    computed = _compute(model, collator, batches, names, dtype, skipped)
    progress = tqdm(computed, desc="cache", total=len(batches), unit="batch", disable=process > 0)
    wanted = ([entry for entry in batch if entry.key in missing] for batch in progress)
    written = write_shards(folder, wanted, process, shard_bytes)
    if skipped.names:
        print(f"{len(skipped.names)} of {skipped.seen} samples were skipped, because they cannot be used")
    return written


class SkippedSamples:
    """Counts the samples that cannot be used, and compares them with the limit of the run.

    Args:
        collator: Whether samples are skipped, and the largest share.
    """

    def __init__(self, collator: SDLlavaCollator):
        self.collator, self.names, self.seen = collator, set[str](), 0

    def add(self, name: str, error: RecordError) -> None:
        """Count a sample.

        Raises:
            ValueError: Samples are not skipped, or too many of them.
        """
        if not self.collator.skip_bad_samples:
            raise ValueError(f"{name} {error}") from error
        logger.warning(f"Skipped: {name} {error}")
        self.names.add(name)
        self.collator.check_skipped(len(self.names), self.seen)


def _scales(model: Any) -> list[float]:
    return model.config.diffusion_config.guidance_scales


def _items(
    rows: Iterable[Mapping[str, Any]], collator: SDLlavaCollator, cache: FeatureCache, skipped: SkippedSamples
) -> Iterator[CacheItem]:
    folders: dict[str, str | None] = {}
    for number, row in enumerate(rows):
        skipped.seen += 1
        try:
            record: Record = collator.record(row, number)
        except RecordError as error:
            skipped.add(row.get("name") or f"sample {number}", error)
            continue
        prompts: list[Any] = [[None]] * len(record["images"])
        if cache.kind == "conditional":
            prompts = possible_prompts(record, collator.prompts)
        for image, possible in zip(record["images"], prompts, strict=True):
            for prompt in possible:
                key = image_key(image, prompt)
                if folders.setdefault(key, record["folder"]) != record["folder"]:
                    raise ValueError(
                        f"{record['name']}: image {image!r} exists in two image folders, {folders[key]!r} and "
                        f"{record['folder']!r}, which one cache cannot tell apart. Write one cache per folder."
                    )
                try:
                    cache.require_same_file(key, image, record["folder"])
                except RecordError as error:
                    raise ValueError(f"{record['name']} {error}.") from error
                yield CacheItem(key, image, record["folder"], prompt or "", record["name"])


@torch.no_grad()
def _compute(
    model: Any,
    collator: SDLlavaCollator,
    batches: list[list[CacheItem]],
    names: list[str],
    dtype: str,
    skipped: SkippedSamples,
) -> Iterator[list[CacheEntry]]:
    for batch in batches:
        opened = [(item, _open(item, skipped)) for item in batch]
        kept = [(item, image) for item, image in opened if image is not None]
        if not kept:
            continue
        inputs = collator.processor(images=[image for _, image in kept], return_tensors="pt").to(model.device)
        if "conditional_features" in names:
            questions = collator.processor.tokenize_questions([item.prompt for item, _ in kept], return_tensors="pt")
            inputs.update({name: ids.to(model.device) for name, ids in questions.items()})
        tensors = _encode(model, inputs, names)
        held = {name: tensor.to("cpu", getattr(torch, dtype)) for name, tensor in tensors.items()}
        yield [
            CacheEntry(
                item.key,
                {name: tensor[i].clone() for name, tensor in held.items()},
                local_size(item.image, item.folder),
            )
            for i, (item, _) in enumerate(kept)
        ]


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
            input_ids_3=inputs.get("diffusion_input_ids_3"),
            unconditional_features=found["unconditional_features"],
        ).conditional_features
    return {name: found[name] for name in names}


def _open(item: CacheItem, skipped: SkippedSamples) -> PIL.Image.Image | None:
    try:
        return open_image(item.image, item.folder)
    except RecordError as error:
        skipped.add(item.name, error)
        return None


def _earlier_fingerprint(module: nn.Module) -> str:
    """The fingerprint in caches of earlier versions, 16 digits over a sample of the values, so that they still fit."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in module.state_dict().values():
        values = tensor.detach().flatten()
        sample = values[:: max(1, values.numel() // 4096)].to("cpu", torch.bfloat16).contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""The commands `sdllava train` and `sdllava cache`: parse, build, check, train, save."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from ..data.image_files import check_image_files
from ..data.sources import DataSource, endless, in_batches, load_data
from ..modeling_sdllava import SDLlavaForConditionalGeneration
from ..processors import SDLlavaProcessor
from ..registration import register
from ..run_records import begin_run, check_settings, locked, read_run
from .adapters import language_lora
from .arguments import AdapterArguments, DataArguments, ModelArguments
from .build import (
    ModelSource,
    build_model,
    build_processor,
    hold_trained_in_float32,
    hold_vae_in_float32,
    read_source,
)
from .cache import FeatureCache
from .cache_writer import cache_record, write_cache
from .callbacks import TrainingRecordCallback
from .check import check_data, require_supervision
from .collator import SDLlavaCollator
from .machine import CHECKPOINTING, recomputes_activations
from .memory import print_memory
from .recipe_loading import chosen_arguments, parse_arguments
from .tokens import LLAVA_PLAIN
from .trainer import SDLlavaTrainer

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

RUN_FILE = "run.json"


class RunArguments(NamedTuple):
    """The arguments of a run."""

    model: ModelArguments
    adapter: AdapterArguments
    data: DataArguments
    training: SFTConfig
    chosen: frozenset[str] = frozenset()
    """The names of the arguments that the user sets."""


def train(arguments: Sequence[str]) -> None:
    """Run `sdllava train`.

    Args:
        arguments: The command-line arguments.

    Raises:
        BlockingIOError: Another process trains to the output folder.
        NotWrittenError: The disk is full, for example. Earlier checkpoints are whole.
        ValueError: An argument, the data or the output folder does not fit the run.
        FileNotFoundError: The recipe or the checkpoint does not exist.
    """
    register()
    run = parse_run(arguments)
    source = read_source(run.model, run.adapter)
    collator = build_collator(run, build_processor(source))
    train_data = load_sources(run, run.data.datasets)
    checked = [(train_data, run.data.datasets, collator)]
    if run.data.eval_datasets:
        sources = run.data.eval_datasets
        checked.append((load_sources(run, sources), sources, collator.for_evaluation()))
    if run.data.check_data:
        for data, _, used in checked:
            print_check(data if run.data.streaming else in_batches(data), used)
        return
    if run.training.process_index == 0:
        for data, sources, used in checked:
            require_image_files(run, used, data, sources)
            require_supervision(data.take(100) if run.data.streaming else in_batches(data), used)
    with locked(run.training.output_dir, run.training.process_index):
        checkpoint = checkpoint_to_resume(run)
        trainer = build_trainer(run, source, collator, train_data)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_final_model()


def cache(arguments: Sequence[str], folder: str, kind: str, dtype: str, batch_size: int) -> int:
    """Run `sdllava cache`. Several processes share the work under torchrun or accelerate launch.

    Args:
        arguments: The command-line arguments of the run that will use the cache.
        folder: The cache's folder.
        kind: One of [`~sdllava.train.cache.KINDS`].
        dtype: The dtype of the saved tensors.
        batch_size: Images in one forward pass.

    Returns:
        `int`: The number of keys that this process wrote.

    Raises:
        BlockingIOError: Another process with the same rank writes to the folder.
        ValueError: The cache does not fit the run, or the folder holds another cache.
    """
    register()
    run = parse_run(arguments)
    source = read_source(run.model, run.adapter)
    collator = build_collator(run, build_processor(source))
    rows = load_sources(run, run.data.datasets)
    require_image_files(run, collator, rows, run.data.datasets)
    process, num_processes = run.training.process_index, run.training.world_size
    with locked(folder, process):
        model = build_model(source).to(run.training.device).eval()
        return write_cache(model, collator, rows, folder, kind, dtype, batch_size, process, num_processes)


def parse_run(arguments: Sequence[str]) -> RunArguments:
    """Parse the command line of a run, and set the training arguments that this package's data needs.

    Raises:
        ValueError: The global batch size is not divisible or given twice, or streaming data has no max_steps.
        FileNotFoundError: The recipe does not exist.
    """
    kinds = (ModelArguments, AdapterArguments, DataArguments, SFTConfig)
    model, adapter, data, training = parse_arguments(kinds, arguments)
    run = RunArguments(model, adapter, data, training, frozenset(chosen_arguments(arguments)))
    training.remove_unused_columns = False
    if run.data.streaming and training.max_steps <= 0:
        raise ValueError("Streaming data has no known length. Set max_steps.")
    if "gradient_accumulation_steps" in run.chosen:
        if "global_batch_size" in run.chosen:
            raise ValueError(
                f"gradient_accumulation_steps={training.gradient_accumulation_steps} and "
                f"global_batch_size={model.global_batch_size} both set the samples of a step. Leave one out."
            )
        model.global_batch_size = None  # of the recipe
    if run.model.global_batch_size is not None:
        per_pass = training.per_device_train_batch_size * training.world_size
        if run.model.global_batch_size % per_pass:
            raise ValueError(
                f"global_batch_size={run.model.global_batch_size} is not a multiple of {per_pass} "
                f"({training.per_device_train_batch_size} samples on each of {training.world_size} processes). Change "
                "it, or per_device_train_batch_size."
            )
        training.gradient_accumulation_steps = run.model.global_batch_size // per_pass
    return run


def build_collator(run: RunArguments, processor: SDLlavaProcessor) -> SDLlavaCollator:
    """The collator of a run. A chat template that the run names replaces the processor's, also in what is saved."""
    if run.training.chat_template_path:
        processor.chat_template = Path(run.training.chat_template_path).read_text(encoding="utf-8")
    is_align = run.model.stage == "align"
    return SDLlavaCollator(
        processor=processor,
        prompts=run.data.prompt_options(),
        template=LLAVA_PLAIN if is_align else None,
        seed=run.training.seed,
        max_length=run.training.max_length,
        require_images=is_align,
        skip_bad_samples=run.data.bad_samples == "skip",
        max_bad_samples=run.data.max_bad_samples,
        fixed_noise=run.data.fixed_noise,
        cache=FeatureCache(run.data.feature_cache) if run.data.feature_cache else None,
    )


def load_sources(run: RunArguments, sources: list[DataSource]) -> "Dataset | IterableDataset":
    """The rows of a run's data, indexed or streamed."""
    return load_data(
        sources,
        streaming=run.data.streaming,
        one_record_per_turn=run.data.question_choice == "each_turn",
        shuffle_buffer=run.data.shuffle_buffer,
        seed=run.training.seed,
    )


def print_check(rows: Iterable[Mapping[str, Any]], collator: SDLlavaCollator) -> None:
    """Read all rows as training would, and print the report.

    Raises:
        ValueError: A sample cannot be used, and the run does not skip such samples.
    """
    report = check_data(rows, collator)
    print(report.summary())
    if report.bad and not collator.skip_bad_samples:
        raise ValueError(
            f"{len(report.bad)} of {report.samples} samples cannot be used. Correct those named above, or set "
            "bad_samples: skip."
        )


def require_image_files(
    run: RunArguments, collator: SDLlavaCollator, data: "Dataset | IterableDataset", sources: list[DataSource]
) -> None:
    """Check that the data's image files exist, where the run reads them.

    Raises:
        FileNotFoundError: A source lacks more images than the run may skip.
    """
    if collator.needs_images():
        allowed = run.data.max_bad_samples if collator.skip_bad_samples else 0.0
        check_image_files(data, sources, allowed, run.training.seed)


def build_trainer(
    run: RunArguments, source: ModelSource, collator: SDLlavaCollator, train_data: "Dataset | IterableDataset"
) -> SDLlavaTrainer:
    """Build the model of a run, check its cache, and build its trainer.

    Raises:
        ValueError: The model or the cache does not fit the run.
        FileNotFoundError: The checkpoint does not exist.
    """
    set_seed(run.training.seed)
    with outside_zero_init(run.training):
        model = build_model(source)
    if run.chosen.isdisjoint(CHECKPOINTING):
        for name in CHECKPOINTING:
            setattr(run.training, name, recomputes_activations(model))
    adapter = language_lora(model, run.adapter)
    if collator.cache is not None:
        trains_diffusion = bool(run.adapter.unet_lora_r or model.config.implicit_caption_tokens)
        check_cache(collator.cache, collator, model, trains_diffusion)
    trainer = SDLlavaTrainer(
        model=model,
        args=run.training,
        data_collator=collator,
        train_dataset=endless(train_data) if run.data.streaming else train_data,
        eval_dataset=load_sources(run, run.data.eval_datasets) if run.data.eval_datasets else None,
        processing_class=collator.processor,
        peft_config=adapter,
        callbacks=[TrainingRecordCallback(run_settings(run))],
        n_sample_answers=run.data.n_sample_answers,
    )
    keeps_own_copy = run.training.deepspeed_plugin is not None or run.adapter.load_in_4bit
    if (run.training.bf16 or run.training.fp16) and not keeps_own_copy:
        hold_trained_in_float32(trainer.model)  # with LoRA only SFTTrainer knows what is trained
    if run.training.deepspeed_plugin is not None and not trainer.is_deepspeed_enabled:
        raise ValueError(
            "A DeepSpeed configuration is given, but accelerate does not use it, because ACCELERATE_USE_CPU is set. "
            "Start the processes with torchrun and --use_cpu true instead of accelerate launch --cpu."
        )
    if trainer.is_world_process_zero():
        length = run.training.max_length or 2048
        batch_size = run.training.per_device_train_batch_size
        print_memory(trainer.model, batch_size, length, run.training.gradient_checkpointing)
    if run.training.deepspeed_plugin is not None:
        hold_vae_in_float32(model)
    return trainer


@contextmanager
def outside_zero_init(training: SFTConfig) -> Iterator[None]:
    """Build whole modules in the block under ZeRO-3, too. DeepSpeed divides their parameters when training begins.

    Its `zero.Init`, which divides them while modules are built, does not support modules on the meta device.

    Args:
        training: The training arguments. Without DeepSpeed nothing changes.
    """
    if training.deepspeed_plugin is None:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(getattr(training, "hf_deepspeed_config", None) or training.deepspeed_plugin.dschf)


def check_cache(
    cache: FeatureCache, collator: SDLlavaCollator, model: SDLlavaForConditionalGeneration, trains_diffusion: bool
) -> None:
    """Check that a cache was made by this model with these settings, and that the run can use it.

    Args:
        cache: The cache. Its features are read in the dtype of the model.
        collator: The collator of the run.
        model: The model of the run.
        trains_diffusion: Whether the run trains parts of the diffusion model or its prompt.

    Raises:
        ValueError: It does not fit. The message names the difference.
    """
    where = f"The feature cache {str(cache.folder)!r} holds {cache.kind} features"
    if trains_diffusion and cache.kind != "latents":
        raise ValueError(
            f"{where}, but the run trains what computes them (LoRA on the UNet, or the implicit captioner). Write a "
            "cache of kind 'latents'."
        )
    cache.check(cache_record(model, collator.processor, cache.kind, cache.record["dtype"], cache.record))
    tower: Any = model.model.diffusion_tower
    cache.read_as = tower.unet.dtype
    if cache.kind == "latents":
        return
    if not collator.fixed_noise:
        raise ValueError(f"{where} for one noise map, but the run draws noise per sample. Set fixed_noise: true.")
    if cache.kind == "vision" and "latents" not in cache.record["tensors"] and collator.prompts.source != "none":
        raise ValueError(
            f"{where} without latents, so the diffusion model cannot be conditioned. Set diffusion_prompt: none."
        )


_TRAINING_SETTINGS = (
    "seed",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_length",
    "train_sampling_strategy",
    "chat_template_path",
)


def run_settings(run: RunArguments) -> dict[str, Any]:
    """The settings that determine a run's results, as JSON values."""
    settings = {
        **asdict(run.model),
        **asdict(run.adapter),
        **asdict(run.data),
        **{name: getattr(run.training, name) for name in _TRAINING_SETTINGS},
    }
    for without_effect in ("check_data", "n_sample_answers", "bad_samples", "max_bad_samples"):
        del settings[without_effect]
    return json.loads(json.dumps(settings))


def checkpoint_to_resume(run: RunArguments) -> str | None:
    """The checkpoint that the run names, or the last one in its output folder. None starts from the beginning.

    Raises:
        ValueError: The output folder holds checkpoints of a run with other settings.
    """
    folder = Path(run.training.output_dir)
    named = run.training.resume_from_checkpoint
    if named and named.lower() != "true":
        return named
    record = folder / RUN_FILE
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is None and not run.training.should_save:
        return None  # the first process replaces the record
    if last is None:
        record.unlink(missing_ok=True)  # of a run without a checkpoint
    wanted = run_settings(run)
    if found := read_run(record):
        names = found.keys() & wanted.keys()  # an earlier version recorded other settings
        check_settings({name: found[name] for name in names}, {name: wanted[name] for name in names}, folder)
    elif run.training.should_save:
        begin_run(record, wanted)
    return last

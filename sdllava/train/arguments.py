"""The arguments of a training run in addition to TRL's `SFTConfig`: the model, its adapters and the data."""

import inspect
import re
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..configuration import SDLlavaConfig, SDLlavaDiffusionConfig
from ..data.prompts import PromptOptions, read_pseudo_captions
from ..data.sources import DataSource
from ..miniature.shipped import shipped_model

Class = TypeVar("Class", bound=type)

_SET_BY_THE_PARTS = (
    "null_input_ids",
    "null_input_ids_2",
    "null_input_ids_3",
    "image_token_index",
    "is_trained",
    "tie_word_embeddings",
)
"""Fields of a configuration that the published parts determine, like every field that holds a configuration."""


def _argument_types(config: type) -> dict[str, Any]:
    """The types of the configuration fields that a run may set, as `HfArgumentParser` can parse them."""
    declared = {item.name: item.type for item in fields(config) if item.name in config.__annotations__}
    found = {name: _parsed_type(kind) for name, kind in declared.items() if name not in _SET_BY_THE_PARTS}
    return {name: kind for name, kind in found.items() if kind is not None}


def _parsed_type(kind: Any) -> Any:
    """The argument parser's type: lists win over single values, floats over integers; None for a configuration."""
    kinds = [part for part in (get_args(kind) if _is_union(kind) else (kind,)) if part is not type(None)]
    if dict in kinds or Any in kinds or any(get_origin(part) is dict for part in kinds):
        return None
    kind = next((part for part in kinds if get_origin(part) is list), kinds[-1])
    if get_origin(kind) is list and _is_union(get_args(kind)[0]):
        return list[_parsed_type(get_args(kind)[0])]  # type: ignore[misc]  # the element's type is computed
    return kind


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, UnionType)


DIFFUSION_FIELDS = _argument_types(SDLlavaDiffusionConfig)
"""The fields of `SDLlavaDiffusionConfig` that a run may set, with the types of their arguments."""

MODEL_FIELDS = _argument_types(SDLlavaConfig)
"""The fields of `SDLlavaConfig` that a run may set, with the types of their arguments."""


def _documented_arguments(config: type) -> dict[str, str]:
    """The description of each argument in the `Args:` section of a class's docstring."""
    section = (inspect.getdoc(config) or "").partition("\nArgs:\n")[2]
    found = {}
    for entry in re.split(r"\n(?= {4}\S)", section):
        names, _, text = entry.partition(":")
        found.update(dict.fromkeys(re.findall(r"\w+", names.partition("(")[0]), " ".join(text.split())))
    return found


def with_configuration_fields(arguments: Class) -> Class:
    """Class decorator that adds an optional argument for each configuration field that a run may set."""
    for config, names in ((SDLlavaDiffusionConfig, DIFFUSION_FIELDS), (SDLlavaConfig, MODEL_FIELDS)):
        descriptions = _documented_arguments(config)
        for name, kind in names.items():
            text = re.sub(r"\[`~?([^`]+)`\]", r"\1", descriptions.get(name) or f"Field of {config.__name__}.")
            arguments.__annotations__[name] = kind | None
            setattr(arguments, name, field(default=None, metadata={"help": text.replace("%", "%%")}))
    return arguments


@dataclass
@with_configuration_fields
class ModelArguments:
    """The model: assembled from published parts, or a checkpoint to continue from.

    Each field of `SDLlavaDiffusionConfig` and `SDLlavaConfig` that the published parts leave open is an argument, too.
    None keeps the default.
    """

    stage: Literal["align", "finetune"] = field(
        default="finetune",
        metadata={"help": "align: projector and fusion train; finetune: the language model trains as well (S3, 5.2)."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Samples per optimizer step over all processes; sets gradient_accumulation_steps."},
    )
    init_from: str | None = field(
        default=None,
        metadata={"help": "An SDLlava checkpoint, an adapter of one, a LLaVA, mini or smol, to continue from."},
    )
    diffusion: str | None = field(
        default=None, metadata={"help": "Repository, repository@revision or folder of the diffusion model."}
    )
    vision: str | None = field(default=None, metadata={"help": "Repository or folder of CLIP, SigLIP or DINOv2."})
    language_model: str | None = field(default=None, metadata={"help": "Repository or folder of the language model."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Data type of the weights."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation of the language model."}
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.init_from is not None:
            self.init_from = shipped_model(self.init_from) or self.init_from

    def overrides(self) -> dict[str, Any]:
        """The fields of both configurations that the run sets."""
        return {**self.diffusion_overrides(), **self.model_overrides()}

    def diffusion_overrides(self) -> dict[str, Any]:
        """The fields of `SDLlavaDiffusionConfig` that the run sets."""
        return {name: getattr(self, name) for name in DIFFUSION_FIELDS if getattr(self, name) is not None}

    def model_overrides(self) -> dict[str, Any]:
        """The fields of `SDLlavaConfig` that the run sets."""
        return {name: getattr(self, name) for name in MODEL_FIELDS if getattr(self, name) is not None}


@dataclass
class AdapterArguments:
    """LoRA on the language model and, independently, on the UNet's cross-attention. Rank 0 turns an adapter off."""

    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the language model."})
    lora_alpha: int = field(default=256, metadata={"help": "Scale of LoRA on the language model; divided by its rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of both adapters."})
    train_projector: bool = field(
        default=True,
        metadata={
            "help": "With LoRA on the language model: also train projector and fusion, at the same learning rate."
        },
    )
    unet_lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the UNet's cross-attention (S4, 6.1)."})
    unet_lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA on the UNet; divided by its rank."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: load the language model in 4 bits."})


@dataclass
class DataArguments:
    """The data, and the diffusion model's prompts for its images."""

    datasets: list[DataSource] = field(
        default_factory=list,
        metadata={"help": "Sources (in a recipe): path, image_folder, weight, config, split, revision."},
    )
    eval_datasets: list[DataSource] = field(
        default_factory=list, metadata={"help": "Sources for evaluation, in the same form."}
    )
    train_data: str | None = field(default=None, metadata={"help": "A single source, replaces `datasets`."})
    image_folder: str | None = field(default=None, metadata={"help": "The image folder of `train_data`."})
    streaming: bool = field(default=False, metadata={"help": "Read the data without an index; needs max_steps."})
    shuffle_buffer: int = field(default=0, metadata={"help": "Streaming: samples to draw from; 0 keeps the order."})
    bad_samples: Literal["skip", "fatal"] = field(
        default="fatal", metadata={"help": "What an unreadable sample does: skip it with a warning, or end the run."}
    )
    max_bad_samples: float = field(
        default=0.01,
        metadata={"help": "With bad_samples: skip, the largest share of missing images and of skipped samples, 0..1."},
    )
    check_data: bool = field(default=False, metadata={"help": "Read all data, report on it, and do not train."})
    diffusion_prompt: Literal["none", "question", "caption", "noisy_caption"] = field(
        default="question", metadata={"help": "The diffusion model's prompt in training."}
    )
    question_choice: Literal["random", "last", "each_turn"] = field(
        default="random", metadata={"help": "Which question of a conversation; each_turn: one sample per answer."}
    )
    word_dropout: float = field(default=0.3, metadata={"help": "noisy_caption: probability of dropping each word."})
    prompt_dropout: float = field(default=0.0, metadata={"help": "Probability of an empty prompt."})
    pseudo_captions: str | None = field(
        default=None, metadata={"help": "File of captions by image, added to the question."}
    )
    fixed_noise: bool = field(default=False, metadata={"help": "Use the evaluation's noise map in training as well."})
    feature_cache: str | None = field(default=None, metadata={"help": "Folder that `sdllava cache` wrote."})
    n_sample_answers: int = field(default=0, metadata={"help": "Answers to print at each evaluation."})

    def __post_init__(self) -> None:
        for name in ("datasets", "eval_datasets"):
            sources = getattr(self, name) or []
            sources = sources if isinstance(sources, list) else [sources]
            setattr(self, name, [_source(source) for source in sources])
        check_values(self)
        if not 0 <= self.max_bad_samples <= 1:
            raise ValueError(f"max_bad_samples is {self.max_bad_samples!r}. Use a share in 0..1, such as 0.01.")
        if self.train_data is not None:
            self.datasets = [DataSource(self.train_data, image_folder=self.image_folder)]

    def prompt_options(self) -> PromptOptions:
        """How the collator makes the diffusion model's prompts."""
        return PromptOptions(
            source=self.diffusion_prompt,
            question="random" if self.question_choice == "random" else "last",
            word_dropout=self.word_dropout,
            dropout=self.prompt_dropout,
            pseudo_captions=read_pseudo_captions(self.pseudo_captions) if self.pseudo_captions else None,
        )


def check_values(arguments: Any) -> None:
    """Check the values that TrlParser takes from a recipe unchecked: choices and lists.

    Args:
        arguments: A dataclass instance.

    Raises:
        ValueError: A value is not one of the choices, or not a list. The message names the argument and valid values.
    """
    for name, hint in get_type_hints(type(arguments)).items():
        value, kinds = getattr(arguments, name), [hint, *get_args(hint)]
        if value is None and type(None) in kinds:
            continue
        for kind in kinds:
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(
                    f"Unknown value {value!r} for {name}. Use one of {', '.join(map(repr, get_args(kind)))}."
                )
            if get_origin(kind) is list and not isinstance(value, list):
                raise ValueError(f"Value {value!r} for {name} is not a list. Use a list, for example [{value}].")


def _source(source: Any) -> DataSource:
    known = [item.name for item in fields(DataSource)]
    if isinstance(source, str):
        return DataSource(source)
    if isinstance(source, dict) and "path" in source and set(source) <= set(known):
        return DataSource(**source)
    if isinstance(source, DataSource):
        return source
    raise ValueError(
        f"Data source {source!r} is not valid. Use a path, or a mapping with 'path' and any of {', '.join(known[1:])}."
    )

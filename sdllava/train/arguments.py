"""What a training run is told, beside TRL's `SFTConfig`: the model, its adapters and the data."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..data.prompts import PromptOptions, read_pseudo_captions
from ..data.sources import DataSource

DIFFUSION_FIELDS = (
    "taps",
    "timesteps",
    "guidance_scales",
    "ensemble",
    "grid_size",
    "image_size",
    "noise_seed",
    "conditioning",
    "implicit_caption_tokens",
    "truncate",
)
MODEL_FIELDS = ("fusion", "fusion_grid_size", "spatial_merge_size", "vision_image_size", "fusion_num_attention_heads")


@dataclass
class ModelArguments:
    """The model: assembled from published parts, or a checkpoint to continue from. None keeps the default."""

    stage: Literal["align", "finetune"] = field(
        default="finetune",
        metadata={"help": "align: projector and fusion train; finetune: the language model, too (S3, 5.2)."},
    )
    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Samples per optimizer step, all processes together; sets gradient_accumulation_steps."},
    )
    init_from: str | None = field(
        default=None, metadata={"help": "A checkpoint of ours, an adapter of one, or a LLaVA to continue from."}
    )
    diffusion: str | None = field(
        default=None, metadata={"help": "Repository, repository@revision or folder of the diffusion model."}
    )
    vision: str | None = field(default=None, metadata={"help": "Repository or folder of CLIP, SigLIP or DINOv2."})
    language_model: str | None = field(default=None, metadata={"help": "Repository or folder of the language model."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Dtype in which the weights are held."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention of the language model."})
    taps: list[str] | None = field(default=None, metadata={"help": "Where the UNet is read, by name."})
    timesteps: list[int] | None = field(default=None, metadata={"help": "Noise levels, 0..999."})
    guidance_scales: list[float] | None = field(default=None, metadata={"help": "Guidance scales s (S3, equation 1)."})
    ensemble: Literal["concat", "mean", "learned"] | None = field(
        default=None, metadata={"help": "How taps, timesteps and scales become one."}
    )
    grid_size: int | None = field(default=None, metadata={"help": "Height and width of the diffusion features."})
    image_size: int | None = field(default=None, metadata={"help": "Pixels that the VAE sees, height and width."})
    noise_seed: int | None = field(default=None, metadata={"help": "Seed of the fixed noise map."})
    conditioning: Literal["question", "caption", "none"] | None = field(
        default=None, metadata={"help": "What the diffusion model is asked at inference."}
    )
    implicit_caption_tokens: int | None = field(default=None, metadata={"help": "Prompt tokens made by CLIP; 0: none."})
    truncate: bool | None = field(default=None, metadata={"help": "Cut away what lies behind the deepest tap."})
    fusion: Literal["cross_attention", "concat", "concat_tokens", "gated", "none"] | None = field(
        default=None, metadata={"help": "How both encoders' features become one sequence."}
    )
    fusion_grid_size: int | None = field(default=None, metadata={"help": "Resize the CLIP queries to this grid."})
    fusion_num_attention_heads: int | None = field(default=None, metadata={"help": "Heads of the cross-attention."})
    spatial_merge_size: int | None = field(default=None, metadata={"help": "Merge squares of this many tokens."})
    vision_image_size: int | None = field(default=None, metadata={"help": "Pixels that the vision tower sees."})

    def __post_init__(self):
        check_values(self)

    def overrides(self, names: tuple[str, ...] = DIFFUSION_FIELDS + MODEL_FIELDS) -> dict[str, Any]:
        """The configuration fields among `names` that the run sets."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class AdapterArguments:
    """LoRA on the language model and, apart from it, on the UNet's cross-attention. Rank 0: none."""

    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the language model."})
    lora_alpha: int = field(default=256, metadata={"help": "Scale of LoRA on the language model, over its rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of both adapters."})
    unet_lora_r: int = field(default=0, metadata={"help": "Rank of LoRA on the UNet's cross-attention (S4, 6.1)."})
    unet_lora_alpha: int = field(default=32, metadata={"help": "Scale of it, over its rank."})
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: hold the language model in 4 bits."})


@dataclass
class DataArguments:
    """The data, and what the diffusion model is asked about its images."""

    datasets: list[DataSource] = field(
        default_factory=list,
        metadata={"help": "Sources (in a recipe): path, image_folder, weight, config, split, revision."},
    )
    eval_datasets: list[DataSource] = field(
        default_factory=list, metadata={"help": "Sources for evaluation, in the same form."}
    )
    train_data: str | None = field(default=None, metadata={"help": "One source in place of `datasets`."})
    image_folder: str | None = field(default=None, metadata={"help": "The image folder of `train_data`."})
    streaming: bool = field(default=False, metadata={"help": "Read on instead of indexing first; needs max_steps."})
    shuffle_buffer: int = field(default=0, metadata={"help": "Streaming: samples to draw from; 0 keeps the order."})
    bad_samples: Literal["skip", "fatal"] = field(
        default="fatal", metadata={"help": "What an unreadable sample does: skip it by name, or end the run."}
    )
    check_data: bool = field(default=False, metadata={"help": "Read all data, report on it, and do not train."})
    diffusion_prompt: Literal["none", "question", "caption", "noisy_caption"] = field(
        default="question", metadata={"help": "What the diffusion model is asked in training."}
    )
    question_choice: Literal["random", "last", "each_turn"] = field(
        default="random", metadata={"help": "Which question of a conversation; each_turn: a sample per answer."}
    )
    word_dropout: float = field(default=0.3, metadata={"help": "noisy_caption: each word is dropped with this."})
    prompt_dropout: float = field(default=0.0, metadata={"help": "The prompt is emptied with this probability."})
    pseudo_captions: str | None = field(
        default=None, metadata={"help": "File of captions by image, added to the question."}
    )
    fixed_noise: bool = field(default=False, metadata={"help": "The evaluation's noise map in training, too."})
    feature_cache: str | None = field(default=None, metadata={"help": "Folder that `sdllava cache` wrote."})
    n_sample_answers: int = field(default=0, metadata={"help": "Answers to show at each evaluation."})

    def __post_init__(self):
        for name in ("datasets", "eval_datasets"):
            sources = getattr(self, name) or []
            sources = sources if isinstance(sources, list) else [sources]
            setattr(self, name, [_source(source) for source in sources])
        check_values(self)
        if self.train_data is not None:
            self.datasets = [DataSource(self.train_data, image_folder=self.image_folder)]

    def prompt_options(self) -> PromptOptions:
        """What the collator asks the diffusion model."""
        return PromptOptions(
            source=self.diffusion_prompt,
            question="random" if self.question_choice == "random" else "last",
            word_dropout=self.word_dropout,
            dropout=self.prompt_dropout,
            pseudo_captions=read_pseudo_captions(self.pseudo_captions) if self.pseudo_captions else None,
        )


def check_values(arguments: Any) -> None:
    """Check what TrlParser takes from a recipe as it is: one of several choices, and lists.

    Raises:
        ValueError: naming the argument, its value and what would be right.
    """
    for name, hint in get_type_hints(type(arguments)).items():
        value, kinds = getattr(arguments, name), [hint, *get_args(hint)]
        if value is None and type(None) in kinds:
            continue
        for kind in kinds:
            if get_origin(kind) is Literal and value not in get_args(kind):
                raise ValueError(f"{name} is {value!r}; it should be one of {', '.join(get_args(kind))}")
            if get_origin(kind) is list and not isinstance(value, list):
                raise ValueError(f"{name} is {value!r}; it should be a list, e.g. [{value}]")


def _source(source: Any) -> DataSource:
    known = [item.name for item in fields(DataSource)]
    if isinstance(source, str):
        return DataSource(source)
    if isinstance(source, dict) and "path" in source and set(source) <= set(known):
        return DataSource(**source)
    if isinstance(source, DataSource):
        return source
    raise ValueError(f"the data source {source!r} is no path and no mapping with `path` and any of {known}")

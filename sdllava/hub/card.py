"""The model card: metadata and text from the records of a checkpoint. What was not recorded is left out."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from jinja2 import Environment

from ..atomic_files import write_text
from .records import Records, read_records

MARK = "<!-- Made by sdllava from the records of this model. Without this line, the card is left as it is. -->"
TEMPLATE = Path(__file__).with_name("card.md.jinja")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.json)(?<!\.jsonl)(?<!\.parquet)(?<!\.arrow)(?<!\.tar)")
"""A repository on the Hub, owner/name, without a revision. A path that ends like a data file does not match."""

WIDGET = [
    {
        "src": "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/pipeline-cat-chonk.jpeg",
        "text": "What is the animal doing?",
    }
]
"""The example of a model of published parts, in the form of the Hub's widget for visual question answering."""

_SETTINGS = {
    "diffusion_prompt": "prompt of the diffusion model",
    "prompt_dropout": "probability of an empty prompt",
    "word_dropout": "probability of dropping a word of a noisy caption",
    "global_batch_size": "batch size",
    "per_device_train_batch_size": "batch size per process",
    "gradient_accumulation_steps": "gradient accumulation",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warm-up",
    "weight_decay": "weight decay",
    "optim": "optimizer",
    "num_train_epochs": "epochs",
    "lora_r": "LoRA rank (language model)",
    "unet_lora_r": "LoRA rank (UNet)",
    "max_length": "maximum length, in tokens",
    "dtype": "dtype",
    "seed": "seed",
}


@strict
@dataclass
class CardMetadata:
    """The schema of a card's metadata. Other fields raise an error."""

    library_name: Literal["transformers", "peft"]
    pipeline_tag: Literal["visual-question-answering", "image-text-to-text"]
    tags: list[str]
    base_model: list[str] | None = None
    base_model_relation: Literal["adapter", "finetune", "merge", "quantized"] | None = None
    datasets: list[str] | None = None
    language: list[str] | None = None
    license: str | None = None
    license_name: str | None = None
    model_index: list[dict] | None = None
    widget: list[dict] | None = None

    def validate_identifiers(self) -> None:
        """Check repository ids and language codes."""
        for name in ("base_model", "datasets"):
            for value in getattr(self, name) or ():
                if not HUB_ID.fullmatch(value):
                    raise ValueError(f"{name}: {value!r} is not a repository on the Hub. Use owner/name.")
        for code in self.language or ():
            if not re.fullmatch(r"[a-z]{2,3}|multilingual|code", code):
                raise ValueError(f"language: {code!r} is not an ISO 639 code. Use one such as 'en'.")

    def validate_licence(self) -> None:
        """Check the licence's identifier and name."""
        for value in (self.license, self.license_name):
            if value is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+_-]*", value):
                raise ValueError(f"license: {value!r} is not an identifier. Use one such as 'apache-2.0'.")
        if (self.license == "other") != (self.license_name is not None):
            raise ValueError(
                f"license_name: {self.license_name!r} with license {self.license!r}. Give a name with 'other' only."
            )

    def validate_widget(self) -> None:
        """Check that every example has the address of an image and a question, and nothing else but an output."""
        for example in self.widget or ():
            if not {"src", "text"} <= example.keys() <= {"src", "text", "example_title", "output"}:
                raise ValueError(f"widget: {example!r} is not an example. Give src and text.")

    def validate_results(self) -> None:
        """Check that every result has a data set and a number."""
        for entry in self.model_index or ():
            for result in entry["results"]:
                for metric in result["metrics"]:
                    if not isinstance(metric["value"], int | float) or not result["dataset"]["type"]:
                        raise ValueError(f"model-index: {result!r} needs a data set and a number.")


def check_metadata(metadata: dict[str, Any]) -> None:
    """Check a card's metadata against [`CardMetadata`], offline.

    Args:
        metadata: The metadata, as `ModelCardData.to_dict` gives it.

    Raises:
        ValueError: A field is unknown or has a wrong value. The message names it.
    """
    named = {name.replace("-", "_"): value for name, value in metadata.items()}
    unknown = set(named) - {f.name for f in fields(CardMetadata)}
    if unknown:
        known = ", ".join(f.name for f in fields(CardMetadata))
        raise ValueError(f"The card's metadata has the unknown field {sorted(unknown)[0]!r}. Use {known}.")
    try:
        CardMetadata(**named)
    except (StrictDataclassError, TypeError, KeyError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"The card's metadata is not valid on the Hub: {reason}") from error


def make_card(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    results: Sequence[str | os.PathLike] = (),
    tags: Sequence[str] = (),
) -> ModelCard:
    """Make the card of a checkpoint from its records; see [`~sdllava.hub.records.read_records`].

    Args:
        folder: The checkpoint's folder.
        repo_id: Its future repository. Without it, the examples use the name in `card.json`.
        results: Folders of evaluations to report, in addition to those below `folder`.
        tags: Further tags.

    Raises:
        ValueError: The metadata that the records give is not valid on the Hub.
    """
    records = read_records(folder, results)
    name = records.author.get("name") or (repo_id or "model").split("/")[-1]
    data = _metadata(records, name, tags)
    environment = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    content = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(),
        mark=MARK,
        name=name,
        repo_id=repo_id or records.author.get("name") or "path/to/this/folder",
        **_text(records),
    )
    check_metadata(data.to_dict())
    return ModelCard(re.sub(r"\n{3,}", "\n\n", content))


def write_card(folder: str | os.PathLike, repo_id: str | None = None) -> bool:
    """Write `README.md` into a checkpoint's folder, unless it has a card that was written by hand.

    Args:
        folder: The checkpoint's folder.
        repo_id: Its future repository.

    Returns:
        `bool`: Whether it was written.
    """
    path = Path(folder) / "README.md"
    if path.is_file() and is_by_hand(path.read_text(encoding="utf-8")):
        return False
    write_text(path, make_card(folder, repo_id).content)
    return True


def is_by_hand(card: str) -> bool:
    """Whether a person wrote a card, rather than this package, the Trainer, or nobody (an unfilled template)."""
    return not any(mark in card for mark in (MARK, "generated_from_trainer", "[More Information Needed]"))


def _components(records: Records) -> list[dict[str, Any]]:
    components = (records.config or {}).get("components") or {}
    names = sorted(components, key=("diffusion", "vision", "llava", "language_model").index)
    return [{"name": name.replace("_", " "), **components[name]} for name in names]


def _metadata(records: Records, name: str, tags: Sequence[str]) -> ModelCardData:
    components = _components(records)
    adapter = records.adapter and records.adapter.get("base_model_name_or_path")
    base = [adapter] if adapter else [part["id"] for part in components if part.get("id")]
    base = [entry for entry in base if HUB_ID.fullmatch(entry)]
    language = records.author.get("language") or _languages(components)
    datasets = records.author.get("datasets") or [d for stage in records.stages for d in _datasets(stage)]
    datasets = [entry for entry in dict.fromkeys(datasets) if HUB_ID.fullmatch(entry)]
    evaluations = [result for results in records.results if (result := _eval_result(results)) is not None]
    optional: dict[str, Any] = {
        "base_model": base,
        "language": language,
        "datasets": datasets,
        "widget": records.author.get("widget", WIDGET if base and not adapter else []),
        **_licence(records, components),
    }
    if adapter:
        optional["base_model_relation"] = "adapter"
    if evaluations:
        optional.update(model_name=name, eval_results=evaluations)
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="visual-question-answering",
        tags=["sdllava", "stable-diffusion", "llava", *([] if adapter else ["custom_code"]), *tags],
        **{key: value for key, value in optional.items() if value},
    )


def _licence(records: Records, components: list[dict[str, Any]]) -> dict[str, str | None]:
    """The author's choice; else the licence that all parts share; else "other", which refers to the parts."""
    if chosen := records.author.get("license"):
        return {"license": chosen}
    found = {part.get("license") for part in components}
    if len(found) == 1 and None not in found:
        return {"license": found.pop()}
    return {"license": "other", "license_name": "licences-of-the-parts"} if found - {None} else {}


def _languages(components: list[dict[str, Any]]) -> list[str]:
    """The languages in the card of the language model."""
    named = [p.get("language") or [] for p in components if p["name"] in ("language model", "llava")]
    return named[0] if named else []


def _datasets(stage: dict[str, Any]) -> list[str]:
    return [source["path"] for source in stage["settings"].get("datasets") or []]


def _eval_result(results: dict[str, Any]) -> EvalResult | None:
    value = results["scores"].get(results["metric"])
    data = results.get("data") or {}
    if value is None or not data.get("id"):
        return None
    return EvalResult(
        task_type="visual-question-answering",
        dataset_type=data["id"],
        dataset_name=results["benchmark"],
        dataset_revision=data.get("revision"),
        metric_type=results["metric"],
        metric_value=round(value, 2),
    )


def _text(records: Records) -> dict[str, Any]:
    config = records.config or {}
    components = _components(records)
    tower = config.get("diffusion_config") or {}
    adapter = records.adapter and records.adapter.get("base_model_name_or_path")
    dropout = records.stages[-1]["settings"].get("prompt_dropout") if records.stages else None
    licensed = [(part["name"], part["license"]) for part in components if part.get("license")]
    rail = [f"{part} ({licence})" for part, licence in licensed if "openrail" in licence.lower()]
    return {
        "summary": records.author.get("summary") or _summary(config, bool(adapter)),
        "untrained": not records.stages,
        "system": _system(config),
        "components": [
            {"id": None, "revision": None, "license": None, **part} for part in components if part.keys() > {"name"}
        ],
        "published_parts": any(part.get("id") for part in components),
        "openrail": rail,
        "left_out": list(config.get("left_out") or ()),
        "adapter": adapter,
        "stages": [_stage(stage) for stage in records.stages],
        "evaluations": [_evaluation(results) for results in records.results],
        "leakage": bool(tower) and tower.get("conditioning") != "none",
        "dropout": dropout,
        "limits": records.author.get("limits", []),
    }


def _summary(config: dict[str, Any], is_adapter: bool) -> str:
    if is_adapter:
        return "An adapter of a LLaVA-style vision-language model that encodes images with a diffusion model."
    diffusion = config.get("diffusion_config")
    vision = "a vision encoder and " if config.get("vision_config") else ""
    question = "" if (diffusion or {}).get("conditioning") == "none" else ", conditioned on the question"
    how = f" It encodes them with {vision}a frozen text-to-image diffusion model{question}." if diffusion else ""
    return f"A LLaVA-style vision-language model that answers questions about images.{how}"


def _system(config: dict[str, Any]) -> list[tuple[str, str]]:
    tower, vision = config.get("diffusion_config") or {}, config.get("vision_config") or {}
    text = config.get("text_config") or {}
    listed = {name: ", ".join(map(str, tower.get(name) or ())) for name in ("taps", "timesteps", "guidance_scales")}
    rows = [
        ("language model", text.get("model_type")),
        ("vision encoder", vision.get("model_type")),
        ("fusion", config.get("fusion")),
        ("taps", listed["taps"]),
        ("timesteps", listed["timesteps"]),
        ("guidance scales", listed["guidance_scales"]),
        ("ensemble", tower.get("ensemble") if len(tower.get("guidance_scales") or ()) > 1 else None),
        ("conditioning", tower.get("conditioning")),
        ("noise seed", tower.get("noise_seed") if tower.get("add_noise", True) else "no noise"),
        ("diffusion image size", tower.get("image_size") and f"{tower['image_size']} pixels"),
        ("dtype", config.get("dtype")),
        ("written by sdllava", config.get("sdllava_version")),
    ]
    return [(label, str(value)) for label, value in rows if value not in (None, "")]


def _stage(stage: dict[str, Any]) -> dict[str, Any]:
    settings = stage["settings"]
    without_lora = {name for name in ("lora_r", "unet_lora_r") if settings.get(name) == 0}
    rows = [(label, settings.get(name)) for name, label in _SETTINGS.items() if name not in without_lora]
    hours = stage["seconds"] / 3600
    rows += [
        ("data", ", ".join(_datasets(stage))),
        ("optimizer steps", stage["steps"]),
        ("hardware", f"{stage['processes']} x {stage['hardware']}"),
        ("hours", f"{hours:.2f}" if hours >= 0.1 else f"{hours:.4f}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in stage["versions"].items())),
    ]
    kept = [(label, str(value)) for label, value in rows if value is not None and value != ""]
    return {"name": stage["stage"], "rows": kept}


def _evaluation(results: dict[str, Any]) -> dict[str, Any]:
    intervals, chance = results.get("intervals_95") or {}, results.get("chance") or {}
    blind = (results.get("blind") or {}).get("scores", {})
    rows = []
    for name, value in results["scores"].items():
        interval = f"{intervals[name][0]:.2f} to {intervals[name][1]:.2f}" if name in intervals else ""
        others = [f"{found[name]:.2f}" if name in found else "" for found in (chance, blind)]
        rows.append([f"**{name}**" if name == results["metric"] else name, f"{value:.2f}", interval, *others])
    data, protocol = results.get("data") or {}, results.get("protocol") or {}
    said = [
        protocol.get("description"),
        data.get("id") and f"data {data['id']}" + (f" at {data['revision']}" if data.get("revision") else ""),
        results.get("samples") and f"{results['samples']} samples",
        results.get("unparsed") is not None and f"{results['unparsed']} unparsed replies",
        results.get("guidance_scales") and "guidance " + ", ".join(map(str, results["guidance_scales"])),
        (results.get("diffusion_prompt") or {}).get("choice")
        and f"diffusion prompt: {results['diffusion_prompt']['choice']}",
        results.get("dtype"),
    ]
    return {"name": results["benchmark"], "description": "; ".join(str(part) for part in said if part), "rows": rows}

"""What the commands of `sdllava inspect` share: their options, the features they read, the files they write."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .options import check_device, check_outputs, model_path, parse_integers, parse_numbers, split_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..analysis.images import DatasetImages, DatasetPrompt, ImageFiles
    from ..analysis.loading import AnalysisModel
    from ..analysis.sweep import ComputedFeatures, FeatureSelection, Sweep

InspectedModelOption = Annotated[
    str, typer.Option("--model", help="Folder or repository of a model or of a whole diffusion model, or 'mini'.")
]
ImageArgument = Annotated[list[str], typer.Argument(help="Image files, folders of images, or one dataset.")]
QuestionOption = Annotated[
    str | None, typer.Option(help="Question about every image. Default: a dataset's own prompts, or the empty prompt.")
]
TapsOption = Annotated[
    str | None, typer.Option(help="Comma-separated, see `sdllava taps`, or 'all'. Default: the papers' taps.")
]
TimestepsOption = Annotated[str | None, typer.Option(help="0..999, comma-separated. Default: the model's.")]
ScalesOption = Annotated[str | None, typer.Option("--guidance-scales", help="Comma-separated, such as 0,1,4.")]
OutputOption = Annotated[
    list[Path], typer.Option("--output", "-o", help=".png or .svg for the picture, .npz or .json for the numbers.")
]
PromptOption = Annotated[str, typer.Option(help="Prompt of a dataset's images: question, caption or none.")]
ImageFolderOption = Annotated[str | None, typer.Option(help="Folder of the image paths of a dataset.")]
SweepOption = Annotated[Path | None, typer.Option(help="Folder that `inspect sweep` wrote, instead of images.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Images per batch.")]

UNUSED_WITH_SWEEP = (
    "model", "question", "taps", "timesteps", "guidance_scales", "prompt", "image_folder", "device"
)  # fmt: skip
"""Parameters that say how features are computed. A sweep has its features already."""

OUTPUT_SUFFIXES = (".png", ".svg", ".npz", ".json")

PAPER_TAPS = (
    "D-L2-R0-B0-Cross-Q",
    "U-L1-R1-Res-Out",
    "U-L1-R1-B0-Cross-Q",
    "U-L1-R1-B0-Out",
    "U-L1-R1-Vit-Out",
    "U-L1-R2-B0-Cross-Q",
    "U-L2-R1-B0-Cross-Q",
    "U-L2-R2-Res-Out",
)
"""The taps of S3's Figures 2, 5, 8, 9 and 12 and of its Table 3."""


@dataclass(frozen=True)
class Selected:
    """Taps, timesteps and guidance scales as the command line gives them.

    Args:
        taps (`str`, *optional*): Comma-separated names, or "all".
        timesteps (`str`, *optional*): Comma-separated noise levels.
        guidance_scales (`str`, *optional*): Comma-separated scales.

    Raises:
        ValueError: A timestep or a scale is not a number.
    """

    taps: str | None
    timesteps: str | None
    guidance_scales: str | None = None

    def __post_init__(self) -> None:
        parse_integers(self.timesteps, "--timesteps")
        parse_numbers(self.guidance_scales, "--guidance-scales")

    def of(self, model: "AnalysisModel", has_questions: bool) -> "FeatureSelection":
        """The selection for a model, completed with its configuration."""
        from ..analysis.reading import available_taps
        from ..analysis.sweep import select_features

        available = [tap.name for tap in available_taps(model.tower)]
        if self.taps == "all":
            names = available
        elif self.taps is not None:
            names = split_names(self.taps)
        else:
            configured = [tap.name for tap in model.tower.taps] if model.tower.config.truncate else []
            names = [name for name in available if name in PAPER_TAPS or name in configured]
        timesteps = parse_integers(self.timesteps, "--timesteps")
        scales = parse_numbers(self.guidance_scales, "--guidance-scales")
        return select_features(model, has_questions, names or None, timesteps, scales)


def open_model(model: str, device: str | None) -> "AnalysisModel":
    """Load what `--model` names, without log messages and progress bars."""
    path = model_path(model)
    if device is not None:
        check_device(device)
    from transformers.utils import logging

    import sdllava

    from ..analysis.loading import load_analysis_model

    sdllava.register()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load_analysis_model(path, device=device)


def open_prompted(
    images: list[str], question: str | None, prompt: str = "question", image_folder: str | None = None
) -> "ImageFiles | DatasetImages":
    """Open the images of a command.

    Raises:
        ValueError: `prompt` is not a kind of prompt.
        FileNotFoundError: A source does not exist.
    """
    from ..analysis.images import open_images

    if prompt not in ("question", "caption", "none"):
        raise ValueError(f"--prompt is question, caption or none, not {prompt!r}.")
    return open_images(images, question, cast("DatasetPrompt", prompt), image_folder)


@dataclass
class FeatureSource:
    """Features of a sweep, or of images.

    Args:
        features ([`ComputedFeatures`] or [`Sweep`]): The features.
        model (`str`): The model's name, for titles.
        images ([`ImageFiles`] or [`DatasetImages`], *optional*): None for a sweep.
    """

    features: "ComputedFeatures | Sweep"
    model: str
    images: "ImageFiles | DatasetImages | None" = None


def open_source(
    sweep: Path | None,
    images: list[str] | None,
    model: str,
    device: str | None,
    question: str | None,
    selected: Selected,
    prompt: str,
    image_folder: str | None,
) -> FeatureSource:
    """Open a sweep, or images with a model.

    Raises:
        ValueError: Both or neither of them are given.
    """
    from ..analysis.sweep import ComputedFeatures, Sweep

    if (sweep is None) == (not images):
        raise ValueError("Give images, or --sweep with a folder that `sdllava inspect sweep` wrote.")
    if sweep is not None:
        source = Sweep(sweep)
        return FeatureSource(source, source.settings["model"])
    opened = open_prompted(images or [], question, prompt, image_folder)
    loaded = open_model(model, device)
    features = ComputedFeatures(loaded, opened, selected.of(loaded, opened.has_questions))
    return FeatureSource(features, loaded.name, opened)


def check_sweep_options(context: typer.Context) -> None:
    """Check that a command with `--sweep` has no option that only applies to images.

    Raises:
        ValueError: It has one.
    """
    if context.params["sweep"] is None:
        return
    for name in UNUSED_WITH_SWEEP:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(
                f"--{name.replace('_', '-')} {context.params[name]!r} does not change the features of --sweep. Remove "
                "it, or give images instead of --sweep."
            )


def check_files(outputs: list[Path]) -> None:
    """Check the files that `--output` names, before anything is computed."""
    check_outputs(outputs, "--output", OUTPUT_SUFFIXES)


def write_outputs(
    outputs: list[Path], draw: "Callable[[], Figure]", arrays: dict[str, Any], meta: dict[str, Any]
) -> None:
    """Write pictures and numbers, by the suffix of each file.

    Args:
        outputs: The files.
        draw: Returns the figure. It is called once per picture, since matplotlib is only needed for pictures.
        arrays: The numbers by name.
        meta: What the numbers are, as JSON values.
    """
    from ..analysis.numbers import NUMBER_SUFFIXES, save_numbers

    for path in outputs:
        if path.suffix.lower() in NUMBER_SUFFIXES:
            save_numbers(path, arrays, meta)
        else:
            from ..analysis.plots import save_figure

            save_figure(draw(), path)
        typer.echo(f"wrote {path}", err=True)

"""The commands of `sdllava inspect`. Heavy imports happen inside the commands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from .inspect_inputs import (
    BatchOption,
    ImageArgument,
    ImageFolderOption,
    InspectedModelOption,
    OutputOption,
    PromptOption,
    QuestionOption,
    ScalesOption,
    Selected,
    SweepOption,
    TapsOption,
    TimestepsOption,
    check_files,
    check_sweep_options,
    open_model,
    open_prompted,
    open_source,
    write_outputs,
)
from .options import DeviceOption, parse_integers, split_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..analysis.features import RegisterReport

LEAST_PAIRS, LEAST_IMAGES = 5, 30
"""Below these numbers, similarity and CKA print a warning, and draw it."""

app = typer.Typer(
    no_args_is_help=True, help="Analyse the diffusion model: attention and features, drawn or as numbers."
)


@app.command()
def attention(
    image: Annotated[str, typer.Argument(help="Path of an image.")],
    question: Annotated[str, typer.Argument(help="Question about the image.")],
    output: OutputOption,
    model: InspectedModelOption = "mini",
    layers: Annotated[
        str | None, typer.Option(help="One row per layer, such as U-L1-R1-B0,U-L1-R2-B0, or 'all'.")
    ] = None,
    timesteps: TimestepsOption = None,
    maps: Annotated[
        str,
        typer.Option(
            help="attention, or concepts: the words compared with the image in the output of joint attention "
            "(ConceptAttention; Stable Diffusion 3 and FLUX)."
        ),
    ] = "attention",
    device: DeviceOption = None,
) -> None:
    """Draw the attention to each word of a question (S3, Figures 4 and 11); without --layers, averaged at 16x16."""
    check_files(output)
    if maps not in ("attention", "concepts"):
        raise ValueError(f"--maps is attention or concepts, not {maps!r}.")
    names = None if layers in (None, "all") else split_names(layers or "")
    if names == []:
        raise ValueError(f"--layers takes layers separated by commas or 'all', not {layers!r}.")
    steps = parse_integers(timesteps, "--timesteps")
    from ..analysis.attention import attention_by_word, capture_question, default_resolution, prompt_tokenizers
    from ..image_loading import load_rgb

    picture = load_rgb(image)
    loaded = open_model(model, device)
    captured = capture_question(
        loaded.tower, loaded.processor, picture, question, names, steps, concepts=maps == "concepts"
    )
    if layers is not None:
        choices: list[tuple[str, dict[str, Any]]] = [(layer, {"layers": [layer]}) for layer in captured.layers]
    else:
        resolution = default_resolution(captured, loaded.tower)
        choices = [(f"t = {t}", {"timesteps": [t], "resolution": resolution}) for t in captured.timesteps]
    tokenizers = prompt_tokenizers(loaded.tower, loaded.processor)
    rows = [(label, attention_by_word(captured, tokenizers, [picture], **chosen)[0]) for label, chosen in choices]
    place = (
        f"t = {', '.join(map(str, captured.timesteps))}"
        if layers is not None
        else rows[0][1].description.split(", t =")[0]
    )

    def draw() -> "Figure":
        from ..analysis.plots import attention_figure

        what = "Attention to" if maps == "attention" else "Concept maps of"
        return attention_figure(rows, f"{what} “{question}”\n{loaded.name}, {place}, conditional pass")

    words = [{"text": w.text, "tokens": w.tokens, "special": w.special} for w in rows[0][1].words]
    meta = {"model": loaded.name, "image": image, "question": question, "words": words, "unit": rows[0][1].unit}
    places = {label: found.description for label, found in rows}
    write_outputs(output, draw, {label: found.maps for label, found in rows}, {**meta, "places": places})


@app.command()
def features(
    images: ImageArgument,
    output: OutputOption,
    model: InspectedModelOption = "mini",
    question: QuestionOption = None,
    taps: TapsOption = None,
    timesteps: TimestepsOption = None,
    guidance_scales: ScalesOption = None,
    fit_per: Annotated[
        str, typer.Option(help="One PCA per: tap, timestep, guidance_scale. The rest shares a PCA.")
    ] = "tap",
    batch_size: BatchOption = 8,
    device: DeviceOption = None,
) -> None:
    """Draw features as the colours of a joint PCA, and list their register tokens (S3, Figures 2, 5 and 8)."""
    check_files(output)
    fields = split_names(fit_per)
    if not set(fields) <= {"tap", "timestep", "guidance_scale"}:
        raise ValueError(f"--fit-per takes tap, timestep and guidance_scale, not {fit_per!r}.")
    selected = Selected(taps, timesteps, guidance_scales or (question and "0,1,4") or None)
    from ..analysis.features import find_registers, pca_maps
    from ..analysis.sweep import ComputedFeatures, gather

    opened = open_prompted(images, question)
    loaded = open_model(model, device)
    found = gather(ComputedFeatures(loaded, opened, selected.of(loaded, opened.has_questions)), batch_size)
    groups = cast(list[Literal["tap", "timestep", "guidance_scale"]], fields)
    colours, registers = pca_maps(found, groups), [find_registers(feature) for feature in found]

    def draw() -> "Figure":
        from ..analysis.plots import pca_figure

        title = f"Features, {f'“{question}”' if question else 'empty prompt'}\n{loaded.name}"
        return pca_figure([entry.image for entry in opened], colours, title, registers)

    arrays: dict[str, Any] = {}
    for feature, pca_map in zip(found, colours, strict=True):
        name = f"{feature.tap}|{feature.timestep}|{feature.guidance_scale:g}"
        arrays |= {f"features|{name}": feature.values.float().cpu().numpy(), f"colours|{name}": pca_map.colours}
    _print_registers(registers)
    names = [entry.name for entry in opened]
    meta = {"model": loaded.name, "images": names, "question": question}
    write_outputs(output, draw, arrays, {**meta, "registers": [_register_record(r) for r in registers]})


def _register_record(report: "RegisterReport") -> dict[str, Any]:
    """A report of register tokens as JSON values; what is not a number is None."""
    import numpy as np

    return {
        "tap": report.tap,
        "timestep": report.timestep,
        "guidance_scale": report.guidance_scale,
        "positions": np.argwhere(report.outlying).tolist(),
        "largest_norm_ratio": float(report.norm_ratio.max()),
        "variance_share": report.variance_share,
        "shared_similarity": None if np.isnan(report.shared_similarity) else report.shared_similarity,
        "ordinary_similarity": None if np.isnan(report.ordinary_similarity) else report.ordinary_similarity,
    }


def _print_registers(registers: "list[RegisterReport]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "tap", "t", "s", "registers per image", "largest norm", "variance", "shared", "others", box=None
    )  # fmt: skip
    for r in registers:
        numbers = (r.per_image, r.norm_ratio.max(), r.variance_share, r.shared_similarity, r.ordinary_similarity)
        table.add_row(r.tap, str(r.timestep), f"{r.guidance_scale:g}", *(f"{number:.2f}" for number in numbers))
    Console(width=140).print(table)


@app.command()
def delta(
    image: Annotated[str, typer.Argument(help="Path of an image.")],
    questions: Annotated[list[str], typer.Argument(help="One or more questions about the image.")],
    output: OutputOption,
    model: InspectedModelOption = "mini",
    taps: TapsOption = None,
    timesteps: TimestepsOption = None,
    device: DeviceOption = None,
) -> None:
    """Draw the effect of a question: conditional minus unconditional features (S3, Figures 5, 7 and 12)."""
    check_files(output)
    selected = Selected(taps, timesteps, "0,1")
    from ..analysis.features import delta_maps
    from ..analysis.images import PromptedImage
    from ..analysis.sweep import ComputedFeatures, gather
    from ..image_loading import load_rgb

    picture = load_rgb(image)
    loaded = open_model(model, device)
    prompted = [PromptedImage(image, picture, question) for question in questions]
    found = delta_maps(gather(ComputedFeatures(loaded, prompted, selected.of(loaded, True))))

    def draw() -> "Figure":
        from ..analysis.plots import delta_figure

        title = f"Effect of the question\n{loaded.name}, s = 1 minus s = 0"
        return delta_figure([picture] * len(questions), questions, found, title)

    arrays: dict[str, Any] = {}
    for one in found:
        name = f"{one.tap}|{one.timestep}"
        arrays |= {f"heat|{name}": one.heat, f"difference|{name}": one.difference}
    meta = {"model": loaded.name, "image": image, "questions": questions, "unit": "relative to the mean |X_u|"}
    write_outputs(output, draw, arrays, meta)


@app.command()
def similarity(
    context: typer.Context,
    output: OutputOption,
    images: Annotated[
        list[str] | None, typer.Argument(help="Pairs in order: image files, a folder or a dataset.")
    ] = None,
    model: InspectedModelOption = "mini",
    question: QuestionOption = None,
    taps: TapsOption = None,
    timesteps: TimestepsOption = None,
    guidance_scales: ScalesOption = None,
    reference: Annotated[
        list[str] | None, typer.Option(help="Also compare by a CLIP, SigLIP or DINOv2 repository.")
    ] = None,
    sweep: SweepOption = None,
    prompt: PromptOption = "question",
    image_folder: ImageFolderOption = None,
    batch_size: BatchOption = 8,
    device: DeviceOption = None,
) -> None:
    """Compare images 1 and 2, 3 and 4, ... by cosine similarity per tap and timestep (S3, Figure 2c)."""
    check_files(output)
    check_sweep_options(context)
    selected = Selected(taps, timesteps, guidance_scales)
    if reference and sweep is not None:
        raise ValueError("--reference needs the images themselves. Give images instead of --sweep.")
    from ..analysis.similarity import similarity_grid
    from ..analysis.vision_encoder import VisionEncoder

    source = open_source(sweep, images, model, device, question, selected, prompt, image_folder)
    grid = similarity_grid(source.features, batch_size)
    references, pooled = {}, {}
    opened = list(source.images or ()) if reference else []
    for path in reference or []:
        encoder = VisionEncoder(path)
        pairs = [
            encoder.similarity([first.image], [second.image])
            for first, second in zip(opened[::2], opened[1::2], strict=True)
        ]
        references[encoder.name] = sum(float(p.positions[0]) for p in pairs) / len(pairs)
        pooled[encoder.name] = sum(float(p.pooled[0]) for p in pairs) / len(pairs)

    warning = _warn_of_few(grid.num_pairs, LEAST_PAIRS, "pairs")

    def draw() -> "Figure":
        from ..analysis.similarity_plots import similarity_figure

        pairs = f"{grid.num_pairs} pair{'s' * (grid.num_pairs != 1)} of images"
        title = _title(f"Similarity of {pairs}", question, source.model)
        return similarity_figure(grid, references, f"{title}{warning}")

    axes = {"taps": grid.taps, "timesteps": grid.timesteps, "guidance_scales": grid.guidance_scales}
    others = {"references": references, "references_pooled": pooled, "num_pairs": grid.num_pairs}
    arrays = {"positions": grid.positions, "pooled": grid.pooled}
    write_outputs(output, draw, arrays, {"model": source.model, **axes, **others})


@app.command()
def cka(
    context: typer.Context,
    output: OutputOption,
    images: Annotated[list[str] | None, typer.Argument(help="Image files, folders of images, or one dataset.")] = None,
    model: InspectedModelOption = "mini",
    question: QuestionOption = None,
    taps: TapsOption = None,
    timesteps: TimestepsOption = None,
    guidance_scales: ScalesOption = None,
    sweep: SweepOption = None,
    prompt: PromptOption = "caption",
    image_folder: ImageFolderOption = None,
    method: Annotated[
        str, typer.Option(help="minibatch (unbiased), or full: all images at once, as Kornblith et al. do.")
    ] = "minibatch",
    batch_size: BatchOption = 16,
    device: DeviceOption = None,
) -> None:
    """Compute linear CKA between taps, and of each guidance scale with s = 0 (S3, Figures 5c and 9)."""
    check_files(output)
    check_sweep_options(context)
    selected = Selected(taps, timesteps, guidance_scales)
    if method not in ("minibatch", "full"):
        raise ValueError(f"--method is minibatch or full, not {method!r}.")
    from ..analysis.similarity import cka as compute

    source = open_source(sweep, images, model, device, question, selected, prompt, image_folder)
    result = compute(source.features, batch_size, cast(Literal["minibatch", "full"], method))

    warning = _warn_of_few(result.num_images, LEAST_IMAGES, "images")

    def draw() -> "Figure":
        from ..analysis.similarity_plots import cka_figure

        title = _title(f"Linear CKA ({method}) over {result.num_images} images", question, source.model)
        return cka_figure(result, f"{title}{warning}")

    meta = {"model": source.model, "keys": result.keys, "num_images": result.num_images, "method": method}
    write_outputs(output, draw, {"matrix": result.matrix}, meta)


@app.command()
def sweep(
    images: ImageArgument,
    folder: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write. An interrupted sweep resumes there.")
    ],
    model: InspectedModelOption = "mini",
    question: QuestionOption = None,
    taps: TapsOption = None,
    timesteps: TimestepsOption = None,
    guidance_scales: ScalesOption = None,
    prompt: PromptOption = "question",
    image_folder: ImageFolderOption = None,
    batch_size: BatchOption = 8,
    device: DeviceOption = None,
) -> None:
    """Write features at every tap, timestep and scale. Run it under torchrun to share the work."""
    import os

    selected = Selected(taps, timesteps, guidance_scales)
    from ..analysis.sweep import write_sweep

    process, num_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device is None and "LOCAL_RANK" in os.environ and _has_cuda():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    opened = open_prompted(images, question, prompt, image_folder)
    loaded = open_model(model, device)
    selection = selected.of(loaded, opened.has_questions)

    def progress(done: int, todo: int) -> None:
        typer.echo(f"process {process}: {done} of {todo} images", err=True)

    written = write_sweep(loaded, opened, selection, folder, batch_size, process, num_processes, progress)
    typer.echo(f"wrote {written} images to {folder}", err=True)


def _title(what: str, question: str | None, model: str) -> str:
    """The title of a figure: what it shows, the question if there is one for all images, and the model."""
    return "\n".join(filter(None, (what, question, model)))


def _warn_of_few(count: int, least: int, what: str) -> str:
    """Print a warning where a statistic has too few samples, and return it as a line of a title."""
    from ..analysis.plots import few_samples

    warning = few_samples(count, least, what)
    if warning:
        typer.secho(f"Warning: {warning}", fg="yellow", err=True)
    return f"\n{warning}" if warning else ""


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()

"""`sdllava inspect`. Nothing heavy is imported before a command runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Look inside: what the diffusion model sees, as numbers and pictures.")

ModelOption = Annotated[
    str, typer.Option(help="Folder or repository of a model, or of a diffusion model (read whole); 'mini'.")
]
ImageArgument = Annotated[list[str], typer.Argument(help="Image files, folders of images, or one dataset.")]
QuestionOption = Annotated[str | None, typer.Option(help="Asked about every image; default the empty prompt.")]
TapsOption = Annotated[
    str | None, typer.Option(help="Comma-separated, see `sdllava taps`; 'all'. Default: the papers'.")
]
TimestepsOption = Annotated[str | None, typer.Option(help="0..999, comma-separated. Default: the model's.")]
ScalesOption = Annotated[str | None, typer.Option("--guidance-scales", help="Comma-separated, e.g. 0,1,4.")]
OutputOption = Annotated[
    list[Path], typer.Option("--output", "-o", help=".png or .svg for the picture, .npz or .json for the numbers.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, mps. Default: CUDA where there is one.")]
PromptOption = Annotated[str, typer.Option(help="Of a dataset, ask each image its: question, caption, none.")]
ImageFolderOption = Annotated[str | None, typer.Option(help="Where a dataset's image paths are looked up.")]
SweepOption = Annotated[Path | None, typer.Option(help="Use what `inspect sweep` wrote, instead of images.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Images at once.")]

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
"""Places that S3 looks at (Figures 2, 5, 8, 9 and 12, Table 3)."""


@app.command()
def attention(
    image: Annotated[str, typer.Argument(help="Path of an image.")],
    question: Annotated[str, typer.Argument(help="What is asked about it.")],
    output: OutputOption,
    model: ModelOption = "mini",
    layers: Annotated[str | None, typer.Option(help="A row each, e.g. U-L1-R1-B0,U-L1-R2-B0; 'all'.")] = None,
    timesteps: TimestepsOption = None,
    device: DeviceOption = None,
) -> None:
    """Where each word of a question looks (S3, Figures 4 and 11); without --layers, averaged at 16x16."""
    _check_outputs(output)
    from ..analysis.attention import attention_by_word, capture_question, default_resolution
    from ..image_loading import load_rgb

    picture = load_rgb(image)
    subject = _subject(model, device)
    names = None if layers in (None, "all") else _split(layers)
    if names == []:
        raise ValueError(f"--layers takes layers separated by commas or 'all', not {layers!r}")
    steps = _integers(timesteps, "--timesteps")
    maps = capture_question(subject.tower, subject.processor, picture, question, names, steps)
    if layers is not None:
        choices: list[tuple[str, dict[str, Any]]] = [(layer, {"layers": [layer]}) for layer in maps.layers]
    else:
        resolution = default_resolution(maps, subject.tower)
        choices = [(f"t = {t}", {"timesteps": [t], "resolution": resolution}) for t in maps.timesteps]
    tokenizer = subject.processor.diffusion_tokenizer
    rows = [(label, attention_by_word(maps, tokenizer, [picture], **chosen)[0]) for label, chosen in choices]
    place = (
        f"t = {', '.join(map(str, maps.timesteps))}" if layers is not None else rows[0][1].description.split(", t =")[0]
    )

    def draw():
        from ..analysis.plots import attention_figure

        return attention_figure(rows, f"Attention to “{question}”\n{subject.name}, {place}, the prompt's own pass")

    arrays = {f"{label}": found.maps for label, found in rows}
    words = [{"text": w.text, "tokens": w.tokens, "special": w.special} for w in rows[0][1].words]
    meta = {"model": subject.name, "image": image, "question": question, "words": words, "unit": "share of attention"}
    _write(output, draw, arrays, {**meta, "places": {label: found.description for label, found in rows}})


@app.command()
def features(
    images: ImageArgument,
    output: OutputOption,
    model: ModelOption = "mini",
    question: QuestionOption = None,
    taps: TapsOption = None,
    timesteps: TimestepsOption = None,
    guidance_scales: ScalesOption = None,
    fit_per: Annotated[str, typer.Option(help="Keep apart: tap, timestep, guidance_scale; join the rest.")] = "tap",
    batch_size: BatchOption = 8,
    device: DeviceOption = None,
) -> None:
    """Features as the colours of a joint PCA, and their register tokens (S3, Figures 2, 5 and 8)."""
    _check_outputs(output)
    import numpy as np

    from ..analysis.features import find_registers, pca_maps
    from ..analysis.sweep import ComputedFeatures, gather

    fields: Any = _split(fit_per)
    if not set(fields) <= {"tap", "timestep", "guidance_scale"}:
        raise ValueError(f"--fit-per takes tap, timestep and guidance_scale, not {fit_per!r}")
    subject, asked = _open(model, device, images, question)
    places = _places(subject, asked, taps, timesteps, guidance_scales or (question and "0,1,4") or None)
    found = gather(ComputedFeatures(subject, asked, places), batch_size)
    colours, registers = pca_maps(found, fields), [find_registers(feature) for feature in found]

    def draw():
        from ..analysis.plots import pca_figure

        about = f"“{question}”" if question else "empty prompt"
        return pca_figure([a.image for a in asked], colours, f"Features, {about}\n{subject.name}", registers)

    arrays: dict[str, Any] = {}
    for feature, pca_map in zip(found, colours):
        name = f"{feature.tap}|{feature.timestep}|{feature.guidance_scale:g}"
        arrays |= {f"features|{name}": feature.values.float().cpu().numpy(), f"colours|{name}": pca_map.colours}
    report = [
        {
            "tap": r.tap,
            "timestep": r.timestep,
            "guidance_scale": r.guidance_scale,
            "positions": np.argwhere(r.outlying).tolist(),
            "largest_norm_ratio": float(r.norm_ratio.max()),
            "variance_share": r.variance_share,
            "shared_similarity": None if np.isnan(r.shared_similarity) else r.shared_similarity,
            "ordinary_similarity": None if np.isnan(r.ordinary_similarity) else r.ordinary_similarity,
        }
        for r in registers
    ]
    _print_registers(registers)
    meta = {"model": subject.name, "images": [a.name for a in asked], "question": question, "registers": report}
    _write(output, draw, arrays, meta)


@app.command()
def delta(
    image: Annotated[str, typer.Argument(help="Path of an image.")],
    questions: Annotated[list[str], typer.Argument(help="One or more questions about it.")],
    output: OutputOption,
    model: ModelOption = "mini",
    taps: TapsOption = None,
    timesteps: TimestepsOption = None,
    device: DeviceOption = None,
) -> None:
    """What a question moved: conditional minus unconditional features (S3, Figures 5, 7 and 12)."""
    _check_outputs(output)
    from ..analysis.features import delta_maps
    from ..analysis.images import PromptedImage
    from ..analysis.sweep import ComputedFeatures, gather
    from ..image_loading import load_rgb

    picture = load_rgb(image)
    subject = _subject(model, device)
    places = _places(subject, True, taps, timesteps, "0,1")
    asked = [PromptedImage(image, picture, question) for question in questions]
    found = delta_maps(gather(ComputedFeatures(subject, asked, places)))

    def draw():
        from ..analysis.plots import delta_figure

        title = f"What the question moved\n{subject.name}, s = 1 minus s = 0"
        return delta_figure([picture] * len(questions), questions, found, title)

    arrays: dict[str, Any] = {}
    for one in found:
        name = f"{one.tap}|{one.timestep}"
        arrays |= {f"heat|{name}": one.heat, f"difference|{name}": one.difference}
    meta = {"model": subject.name, "image": image, "questions": questions, "unit": "relative to the mean |X_u|"}
    _write(output, draw, arrays, meta)


@app.command()
def similarity(
    output: OutputOption,
    images: Annotated[list[str] | None, typer.Argument(help="Pairs in order: files, a folder, a dataset.")] = None,
    model: ModelOption = "mini",
    question: QuestionOption = None,
    taps: TapsOption = None,
    timesteps: TimestepsOption = None,
    guidance_scales: ScalesOption = None,
    reference: Annotated[list[str] | None, typer.Option(help="Compare with a CLIP or DINOv2 repository.")] = None,
    sweep: SweepOption = None,
    prompt: PromptOption = "question",
    image_folder: ImageFolderOption = None,
    batch_size: BatchOption = 8,
    device: DeviceOption = None,
) -> None:
    """Cosine similarity of images 1 and 2, 3 and 4, ... by tap and timestep (S3, Figure 2c)."""
    _check_outputs(output)
    from ..analysis.similarity import similarity_grid
    from ..analysis.vision_encoder import VisionEncoder

    source, name, asked = _source(
        sweep, images, model, question, taps, timesteps, guidance_scales, prompt, image_folder, device
    )
    grid = similarity_grid(source, batch_size)
    references, pooled = {}, {}
    for path in reference or []:
        if asked is None:
            raise ValueError("--reference needs the images themselves: give them instead of --sweep")
        encoder = VisionEncoder(path)
        pairs = [encoder.similarity([asked[i].image], [asked[i + 1].image]) for i in range(0, len(asked), 2)]
        references[encoder.name] = sum(float(p.positions[0]) for p in pairs) / len(pairs)
        pooled[encoder.name] = sum(float(p.pooled[0]) for p in pairs) / len(pairs)

    def draw():
        from ..analysis.plots import similarity_figure

        return similarity_figure(grid, references, f"Similarity of {grid.num_pairs} image pair(s)\n{name}")

    axes = {"taps": grid.taps, "timesteps": grid.timesteps, "guidance_scales": grid.guidance_scales}
    others = {"references": references, "references_pooled": pooled, "num_pairs": grid.num_pairs}
    _write(output, draw, {"positions": grid.positions, "pooled": grid.pooled}, {"model": name, **axes, **others})


@app.command()
def cka(
    output: OutputOption,
    images: Annotated[list[str] | None, typer.Argument(help="Image files, folders, or one dataset.")] = None,
    model: ModelOption = "mini",
    question: QuestionOption = None,
    taps: TapsOption = None,
    timesteps: TimestepsOption = None,
    guidance_scales: ScalesOption = None,
    sweep: SweepOption = None,
    prompt: PromptOption = "caption",
    image_folder: ImageFolderOption = None,
    batch_size: BatchOption = 16,
    device: DeviceOption = None,
) -> None:
    """Linear CKA between taps, and of each guidance scale with s = 0 (S3, Figures 5c and 9)."""
    _check_outputs(output)
    from ..analysis.similarity import cka as compute

    source, name, _ = _source(
        sweep, images, model, question, taps, timesteps, guidance_scales, prompt, image_folder, device
    )
    result = compute(source, batch_size)

    def draw():
        from ..analysis.plots import cka_figure

        return cka_figure(result, f"Linear CKA over {result.num_images} images\n{name}")

    meta = {"model": name, "keys": result.keys, "num_images": result.num_images}
    _write(output, draw, {"matrix": result.matrix}, meta)


@app.command()
def sweep(
    images: ImageArgument,
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder; an interrupted sweep goes on there.")],
    model: ModelOption = "mini",
    question: QuestionOption = None,
    taps: TapsOption = None,
    timesteps: TimestepsOption = None,
    guidance_scales: ScalesOption = None,
    prompt: PromptOption = "question",
    image_folder: ImageFolderOption = None,
    batch_size: BatchOption = 8,
    device: DeviceOption = None,
) -> None:
    """Write features at every tap, timestep and scale; run it under torchrun for several processes."""
    import os

    from ..analysis.sweep import write_sweep

    process, num_processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device is None and "LOCAL_RANK" in os.environ and _has_cuda():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    subject, asked = _open(model, device, images, question, prompt, image_folder)
    places = _places(subject, asked, taps, timesteps, guidance_scales)

    def progress(done: int, todo: int) -> None:
        typer.echo(f"process {process}: {done} of {todo} images", err=True)

    written = write_sweep(subject, asked, places, folder, batch_size, process, num_processes, progress)
    typer.echo(f"wrote {written} images to {folder}", err=True)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str | None, name: str, kind: type) -> list | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in _split(text)]
    except ValueError as error:
        raise ValueError(f"{name} takes numbers separated by commas, e.g. 0,1,4, not {text!r}") from error


def _integers(text: str | None, name: str) -> list[int] | None:
    return _numbers(text, name, int)


def _subject(model: str, device: str | None):
    from transformers.utils import logging

    import sdllava

    from ..analysis.loading import load_analysis_model
    from .options import check_device, model_path

    if device is not None:
        check_device(device)
    sdllava.register()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load_analysis_model(model_path(model), device=device)


def _open(model, device, images, question, prompt="question", image_folder=None):
    """What is looked into, and the images."""
    from ..analysis.images import open_images

    if prompt not in ("question", "caption", "none"):
        raise ValueError(f"--prompt is question, caption or none, not {prompt!r}")
    asked = open_images(images, question, prompt, image_folder)
    return _subject(model, device), asked


def _source(sweep, images, model, question, taps, timesteps, guidance_scales, prompt, image_folder, device):
    """Features from a sweep or from images, the model's name, and the images where they were given."""
    from ..analysis.sweep import ComputedFeatures, Sweep

    if (sweep is None) == (not images):
        raise ValueError("give images, or --sweep with a folder that `sdllava inspect sweep` wrote")
    if sweep is not None:
        source = Sweep(sweep)
        return source, source.settings["model"], None
    subject, asked = _open(model, device, images, question, prompt, image_folder)
    places = _places(subject, asked, taps, timesteps, guidance_scales)
    return ComputedFeatures(subject, asked, places), subject.name, asked


def _places(subject, asked: Any, taps: str | None, timesteps: str | None, guidance_scales: str | None):
    """Where features are read. `asked`: the images with their questions, or whether there are any."""
    from ..analysis.reading import available_taps
    from ..analysis.sweep import select_features

    reachable = [tap.name for tap in available_taps(subject.tower)]
    if taps == "all":
        names = reachable
    elif taps is not None:
        names = _split(taps)
    else:
        configured = [tap.name for tap in subject.tower.taps] if subject.tower.config.truncate else []
        names = [name for name in reachable if name in PAPER_TAPS or name in configured]
    has_question = asked if isinstance(asked, bool) else asked[0].question is not None
    scales = _numbers(guidance_scales, "--guidance-scales", float)
    return select_features(subject, has_question, names or None, _integers(timesteps, "--timesteps"), scales)


def _check_outputs(outputs: list[Path]) -> None:
    for path in outputs:
        if path.suffix.lower() not in (".png", ".svg", ".npz", ".json"):
            raise ValueError(f"--output {path.name!r}: pictures are .png or .svg, numbers .npz or .json")


def _write(outputs: list[Path], draw, arrays: dict, meta: dict) -> None:
    from ..analysis.numbers import NUMBER_SUFFIXES, save_numbers

    for path in outputs:
        if path.suffix.lower() in NUMBER_SUFFIXES:
            save_numbers(path, arrays, meta)
        else:
            from ..analysis.plots import save_figure

            save_figure(draw(), path)
        typer.echo(f"wrote {path}", err=True)


def _print_registers(registers) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tap", "t", "s", "registers an image", "largest norm", "variance", "shared", "others", box=None)
    for r in registers:
        numbers = (r.per_image, r.norm_ratio.max(), r.variance_share, r.shared_similarity, r.ordinary_similarity)
        table.add_row(r.tap, str(r.timestep), f"{r.guidance_scale:g}", *(f"{number:.2f}" for number in numbers))
    Console(width=140).print(table)

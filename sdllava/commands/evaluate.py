"""The command `evaluate`, and what it shares with `match`. Heavy imports happen inside the commands."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..evaluation.benchmarks import BENCHMARKS, check_name
from .options import (
    AutoDType,
    check_device,
    check_outputs,
    check_source,
    parse_numbers,
    split_names,
)
from .reporting import progress_bar

if TYPE_CHECKING:
    from ..evaluation.compare import Comparison
    from ..evaluation.evaluate import EvaluationOptions
    from ..evaluation.judge import Judge

PANEL_DATA, PANEL_DIFFUSION, PANEL_JUDGE, PANEL_OTHER = "Data", "Diffusion prompt", "Judge", "Instead of scoring"

# the options, in the order of the commands' help
RunsOption = Annotated[list[Path] | None, typer.Argument(help="With --compare: results folders.", show_default=False)]
ModelsOption = Annotated[list[str] | None, typer.Option("--model", help="Folder, Hub id, mini or smol. Repeatable.")]
BenchmarkOption = Annotated[
    str | None,
    typer.Option(help=f"Names, comma-separated: {', '.join(BENCHMARKS)}."),
]
OutputOption = Annotated[Path, typer.Option(help="Results are written to OUTPUT/MODEL/BENCHMARK.")]
ProtocolOption = Annotated[
    str,
    typer.Option(
        help="default (greedy, a published parser) or official (the authors' script). Some benchmarks have others: "
        "captions plain, easy_vqa and own short, shapes val, nlvr even."
    ),
]
LimitOption = Annotated[int | None, typer.Option(help="Approximate number of samples, spread evenly, in whole pairs.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Samples per batch. Results do not depend on it.")]
BlindOption = Annotated[bool, typer.Option(help="Also run with grey images in place of the images.")]
SeedOption = Annotated[int, typer.Option(help="Seed of sampling.")]
ModelRevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")]
DtypeOption = Annotated[AutoDType, typer.Option(help="Type of the weights.")]
DeviceOption = Annotated[str | None, typer.Option(help="For example cuda:1. Default: the accelerator, else the CPU.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        help="Folder in the published layout, a folder of such folders by benchmark name, a Hub id, or own questions: "
        "a .jsonl file of image, question, answer, options, category.",
        rich_help_panel=PANEL_DATA,
    ),
]
RevisionOption = Annotated[str | None, typer.Option(help="Hub revision of the data.", rich_help_panel=PANEL_DATA)]
ImagesOption = Annotated[
    str | None,
    typer.Option(help="Folder of COCO's images, if the annotations come without them.", rich_help_panel=PANEL_DATA),
]
DiffusionPromptOption = Annotated[
    str,
    typer.Option(help="question, prompt, caption, question+caption, none, or other.", rich_help_panel=PANEL_DIFFUSION),
]
CaptionsOption = Annotated[
    str | None,
    typer.Option(help="File of pseudo-captions: JSON Lines of image, caption.", rich_help_panel=PANEL_DIFFUSION),
]
GuidanceOption = Annotated[
    str | None,
    typer.Option(help="Guidance scales, comma-separated, instead of the model's.", rich_help_panel=PANEL_DIFFUSION),
]
SweepOption = Annotated[
    str | None,
    typer.Option(
        help="Evaluate at several guidance scales: guidance=0,2,4,6,8. One table.", rich_help_panel=PANEL_DIFFUSION
    ),
]
JudgeOption = Annotated[
    str | None, typer.Option(help="Judge model: at --judge-url, else a local one.", rich_help_panel=PANEL_JUDGE)
]
JudgeUrlOption = Annotated[
    str | None, typer.Option(help="OpenAI-compatible address, such as https://host/v1.", rich_help_panel=PANEL_JUDGE)
]
WritePseudoCaptionsOption = Annotated[
    Path | None, typer.Option(help="Caption the benchmark's images into this file.", rich_help_panel=PANEL_OTHER)
]
PassesOption = Annotated[
    int,
    typer.Option(
        min=1, help="Captions: each reply is the diffusion prompt of the next pass.", rich_help_panel=PANEL_OTHER
    ),
]
LeakageOption = Annotated[
    bool,
    typer.Option(
        help="Leakage on captions by guidance scale, next to the scores of all named benchmarks.",
        rich_help_panel=PANEL_OTHER,
    ),
]
ScalesOption = Annotated[
    str, typer.Option(help="Guidance scales of --leakage without --sweep.", rich_help_panel=PANEL_OTHER)
]
AllDonorCaptionsOption = Annotated[
    bool,
    typer.Option(help="Leakage: score against all captions of the donor image.", rich_help_panel=PANEL_OTHER),
]
CompareOption = Annotated[
    bool,
    typer.Option(
        "--compare", help="Compare finished results with each other and the papers.", rich_help_panel=PANEL_OTHER
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(help="With --compare: draw tasks or patterns (.png, .svg, .pdf).", rich_help_panel=PANEL_OTHER),
]
HeatmapOption = Annotated[
    Path | None,
    typer.Option(
        help="With --compare: draw scores by tap and timestep (.png, .svg, .pdf).", rich_help_panel=PANEL_OTHER
    ),
]


def evaluate(
    runs: RunsOption = None,
    model: ModelsOption = None,
    benchmark: BenchmarkOption = None,
    output: OutputOption = Path("results"),
    protocol: ProtocolOption = "default",
    limit: LimitOption = None,
    batch_size: BatchSizeOption = 8,
    blind: BlindOption = False,
    seed: SeedOption = 0,
    model_revision: ModelRevisionOption = None,
    dtype: DtypeOption = AutoDType.auto,
    device: DeviceOption = None,
    data: DataOption = None,
    revision: RevisionOption = None,
    images: ImagesOption = None,
    diffusion_prompt: DiffusionPromptOption = "question",
    captions: CaptionsOption = None,
    guidance: GuidanceOption = None,
    sweep: SweepOption = None,
    judge: JudgeOption = None,
    judge_url: JudgeUrlOption = None,
    write_pseudo_captions: WritePseudoCaptionsOption = None,
    passes: PassesOption = 1,
    leakage: LeakageOption = False,
    scales: ScalesOption = "0,1,1.5,2,4,6,8",
    all_donor_captions: AllDonorCaptionsOption = False,
    compare: CompareOption = False,
    plot: PlotOption = None,
    heatmap: HeatmapOption = None,
) -> None:
    """Evaluate models on the papers' benchmarks, compare results, write captions, or measure leakage."""
    if compare:
        _compare(runs or [], plot, heatmap)
        return
    if runs:
        raise ValueError(f"To compare the results folder {str(runs[0])!r}, add --compare.")
    if not benchmark and data and data.endswith(".jsonl"):
        benchmark = "own"
    if not model or not benchmark:
        raise ValueError(
            "Name at least one --model and one --benchmark, or a .jsonl file with --data, or results folders with "
            "--compare."
        )
    if plot or heatmap:
        raise ValueError("--plot and --heatmap go with --compare.")
    guidance_scales = parse_numbers(guidance, "--guidance")
    swept_scales = _parse_sweep(sweep)
    if swept_scales and (guidance or write_pseudo_captions or passes != 1):
        raise ValueError(
            "--sweep sets the scales of scored runs. Leave out --guidance, --passes and --write-pseudo-captions."
        )
    leakage_scales = swept_scales or parse_numbers(scales, "--scales") or []
    names = split_names(benchmark)
    check_named(BENCHMARKS, names, model)
    if device is not None:
        check_device(device)
    from ..evaluation.evaluate import EvaluationOptions
    from ..evaluation.judge import make_judge

    options = EvaluationOptions(
        protocol=protocol,
        data=data,
        revision=revision,
        images=images,
        limit=limit,
        diffusion_prompt=diffusion_prompt,
        captions=captions,
        guidance=tuple(guidance_scales) if guidance_scales else None,
        seed=seed,
        batch_size=batch_size,
        blind=blind,
    )
    _check_names(names, options, model, write_pseudo_captions, passes, leakage)
    load = {"revision": model_revision, "dtype": dtype.value, "device": device}
    with leaving_process_group():
        if leakage:
            _leakage(
                model, names, output, options, leakage_scales, make_judge(judge, judge_url), all_donor_captions, load
            )
        elif write_pseudo_captions:
            _pseudo_captions(model[0], names[0], write_pseudo_captions, options, load)
        else:
            _score(model, names, output, options, passes, swept_scales, make_judge(judge, judge_url), load)


def _parse_sweep(sweep: str | None) -> list[float]:
    """The guidance scales of `--sweep guidance=0,2,4`, none without the option."""
    if sweep is None:
        return []
    name, _, values = sweep.partition("=")
    scales = parse_numbers(values, "--sweep guidance=") if name == "guidance" else None
    if not scales or len(set(scales)) < len(scales):
        raise ValueError(f"--sweep {sweep!r} is not a sweep. Write guidance= and distinct scales: guidance=0,2,4,6,8.")
    return scales


@contextmanager
def leaving_process_group() -> Iterator[None]:
    """Leave the group of processes of `accelerate launch` at the end, so that the process exits cleanly."""
    try:
        yield
    finally:
        if "torch" in sys.modules:
            from ..evaluation.processes import leave_group

            leave_group()


def check_named(benchmarks: dict[str, tuple[str, str]], names: Sequence[str], models: Sequence[str]) -> None:
    """Check the names of benchmarks and models without importing or loading them."""
    for name in names:
        check_name(benchmarks, name)
    for model in models:
        if model not in ("mini", "smol") and not model.startswith("open_clip:"):
            check_source(model, "a model")


def _check_names(
    names: Sequence[str],
    options: "EvaluationOptions",
    models: Sequence[str],
    pseudo_captions: Path | None,
    passes: int,
    leakage: bool,
) -> None:
    """Check the names and their combination before a model is loaded."""
    from ..evaluation.benchmarks import get_benchmark

    for name in names:
        get_benchmark(name, options.protocol)
    if pseudo_captions and (len(names) > 1 or len(models) > 1):
        raise ValueError("Pseudo-captions take one --benchmark and one --model.")
    if leakage and len([name for name in names if "captions" in name]) != 1:
        raise ValueError("--leakage needs one captioning benchmark: name captions or mini_captions in --benchmark.")
    if leakage and (options.guidance or options.blind or options.diffusion_prompt != "question" or passes != 1):
        raise ValueError(
            "--leakage sets prompts and scales itself. Leave out --guidance, --diffusion-prompt, --blind and --passes."
        )
    if passes != 1 and not all("captions" in name for name in names):
        raise ValueError("--passes is for the captioning benchmarks.")


def _score(
    models: Sequence[str],
    names: Sequence[str],
    output: Path,
    options: "EvaluationOptions",
    passes: int,
    scales: Sequence[float],
    judge: "Judge | None",
    load: dict[str, Any],
) -> None:
    from ..evaluation.captioning import refine
    from ..evaluation.evaluate import LoadedModel, evaluate, run_name
    from ..evaluation.guidance_sweep import guidance_sweep

    for model in models:
        loaded = LoadedModel.load(model, **load)
        for name in names:
            folder = output / run_name(model) / name
            with progress_bar(f"{model} on {name}") as progress:
                if scales:
                    finished = guidance_sweep(loaded, name, folder, scales, options, judge, progress)
                elif passes > 1:
                    results = refine(loaded, name, folder, passes, options, progress)
                    finished = [folder / f"pass-{k}" for k in range(1, passes + 1)] if all(results) else []
                else:
                    finished = [folder] if evaluate(loaded, name, folder, options, judge, progress) else []
            if finished:
                print_comparison(finished)
                typer.echo(f"Results: {folder}")


def print_comparison(paths: Sequence[Path]) -> "list[Comparison]":
    """Print the tables of finished runs, and return their comparisons."""
    from ..evaluation.compare import compare, markdown

    comparisons = compare(paths)
    for comparison in comparisons:
        typer.echo(markdown(comparison))
    return comparisons


def _compare(runs: Sequence[Path], plot: Path | None, heatmap: Path | None) -> None:
    if not runs:
        raise ValueError("Name the results folders to compare: sdllava evaluate --compare A B.")
    for option, picture in (("--plot", plot), ("--heatmap", heatmap)):
        check_outputs([picture] if picture else [], option, (".png", ".svg", ".pdf"))
    comparisons = print_comparison(runs)
    if plot:
        from ..evaluation.plots import plot_parts

        drawable = [comparison for comparison in comparisons if comparison.parts] or comparisons[:1]
        for comparison in drawable:
            path = plot if len(drawable) == 1 else plot.with_stem(f"{plot.stem}-{comparison.benchmark}")
            plot_parts(comparison, path)
            typer.echo(f"Picture: {path}")
    if heatmap:
        from ..evaluation.plots import plot_timesteps

        for comparison in comparisons:
            path = heatmap if len(comparisons) == 1 else heatmap.with_stem(f"{heatmap.stem}-{comparison.benchmark}")
            plot_timesteps(comparison, path)
            typer.echo(f"Picture: {path}")


def _pseudo_captions(model: str, name: str, file: Path, options: "EvaluationOptions", load: dict[str, Any]) -> None:
    from ..evaluation.captioning import write_pseudo_captions
    from ..evaluation.evaluate import LoadedModel

    with progress_bar(f"{model} captions {name}") as progress:
        count = write_pseudo_captions(LoadedModel.load(model, **load), name, file, options, progress)
    if count:
        typer.echo(f"{count} captions: {file}")


def _leakage(
    models: Sequence[str],
    names: Sequence[str],
    output: Path,
    options: "EvaluationOptions",
    scales: Sequence[float],
    judge: "Judge | None",
    all_donor_captions: bool,
    load: dict[str, Any],
) -> None:
    from ..evaluation.evaluate import LoadedModel, load_samples, run_name
    from ..evaluation.guidance_sweep import guidance_sweep, sweep_scores
    from ..evaluation.leakage import LeakageSetting, leakage_markdown, leakage_sweep
    from ..evaluation.plots import plot_leakage

    (captions,) = (name for name in names if "captions" in name)
    setting = LeakageSetting.make(*load_samples(captions, options), options, all_donor_captions)
    loaded = [(run_name(model), LoadedModel.load(model, **load)) for model in models]
    tasks: dict[str, dict[float, dict[str, Any]]] = {}
    for label, model in loaded:
        for name in names:
            if name != captions:
                with progress_bar(f"{label} on {name}") as progress:
                    runs = guidance_sweep(model, name, output / label / name, scales, options, judge, progress)
                for scale, found in sweep_scores(runs).items():
                    tasks.setdefault(label, {}).setdefault(scale, {}).update(found)
    folder = output / "leakage"
    with progress_bar("leakage") as progress:
        result = leakage_sweep(loaded, setting, folder, scales, progress, tasks)
    if result:
        plot_leakage(result, folder / "leakage.png")
        typer.echo(leakage_markdown(result))
        typer.echo(f"Results: {folder}")

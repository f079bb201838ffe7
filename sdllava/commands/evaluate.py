"""`sdllava evaluate` and `sdllava match`. Nothing heavy is imported before a command runs."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

Text = typer.Option
PANEL_DATA, PANEL_DIFFUSION, PANEL_JUDGE, PANEL_OTHER = "Data", "Diffusion prompt", "Judge", "Instead of scoring"


@contextmanager
def one_sentence() -> Iterator[None]:
    """Expected errors end the command with their sentence and exit status 1, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        typer.secho(str(error), fg="red", err=True)
        raise typer.Exit(1) from error
    finally:
        if "torch" in sys.modules:
            from ..evaluation.processes import leave_group

            leave_group()


@contextmanager
def progress_bar(title: str) -> Iterator:
    """A bar on standard error while the context is open; gives a function of (done, total)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} takes numbers separated by commas, such as 0,1.5,4, not {text!r}.") from None


# the options, in the order of the commands' help
RunsOption = Annotated[list[Path] | None, typer.Argument(help="With --compare: results folders.", show_default=False)]
ModelOption = Annotated[list[str] | None, Text(help="Folder or Hub id, or mini; may be given several times.")]
BenchmarkOption = Annotated[
    str | None,
    Text(help="Names, comma-separated: mmvp, naturalbench, blink, gqa, llava_bench, captions, mini, mini_captions."),
]
OutputOption = Annotated[Path, Text(help="Results go to OUTPUT/MODEL/BENCHMARK.")]
ProtocolOption = Annotated[
    str, Text(help="default (greedy, a published parser); official (the authors' script); captions: plain.")
]
LimitOption = Annotated[int | None, Text(help="About this many samples, spread evenly, pairs kept whole.")]
BatchSizeOption = Annotated[int, Text(min=1, help="Results do not depend on it.")]
BlindOption = Annotated[bool, Text(help="Also ask with grey images in place of the images.")]
ModelRevisionOption = Annotated[str | None, Text(help="Branch, tag or commit of the model.")]
DtypeOption = Annotated[str, Text(help="auto, float32, bfloat16 or float16.")]
DeviceOption = Annotated[str | None, Text(help="For example cuda:1; default the accelerator, else the CPU.")]
DataOption = Annotated[
    str | None,
    Text(
        help="Folder in the published layout (or one folder per benchmark in it), or a Hub id.",
        rich_help_panel=PANEL_DATA,
    ),
]
RevisionOption = Annotated[str | None, Text(help="Hub revision of the data.", rich_help_panel=PANEL_DATA)]
ImagesOption = Annotated[
    str | None,
    Text(help="Folder of COCO's images, where the annotations come without.", rich_help_panel=PANEL_DATA),
]
DiffusionPromptOption = Annotated[
    str,
    Text(help="question, prompt, caption, question+caption, none, or other.", rich_help_panel=PANEL_DIFFUSION),
]
CaptionsOption = Annotated[
    str | None, Text(help="File of pseudo-captions: JSON Lines of image, caption.", rich_help_panel=PANEL_DIFFUSION)
]
GuidanceOption = Annotated[
    str | None, Text(help="Guidance scale(s) in place of the checkpoint's.", rich_help_panel=PANEL_DIFFUSION)
]
JudgeOption = Annotated[
    str | None, Text(help="Judge model: at --judge-url, else a local one.", rich_help_panel=PANEL_JUDGE)
]
JudgeUrlOption = Annotated[
    str | None, Text(help="OpenAI-compatible address, e.g. https://host/v1.", rich_help_panel=PANEL_JUDGE)
]
WritePseudoCaptionsOption = Annotated[
    Path | None, Text(help="Caption the benchmark's images into this file.", rich_help_panel=PANEL_OTHER)
]
PassesOption = Annotated[
    int, Text(help="Captions: each reply is the next pass's diffusion prompt.", rich_help_panel=PANEL_OTHER)
]
LeakageOption = Annotated[
    bool, Text(help="Captions: sweep guidance scales, task score beside leakage.", rich_help_panel=PANEL_OTHER)
]
ScalesOption = Annotated[str, Text(help="The sweep's guidance scales.", rich_help_panel=PANEL_OTHER)]
AllDonorCaptionsOption = Annotated[
    bool, Text(help="Leakage: score against all captions of the donor image.", rich_help_panel=PANEL_OTHER)
]
CompareOption = Annotated[
    bool,
    Text("--compare", help="Set finished results and the papers' rows side by side.", rich_help_panel=PANEL_OTHER),
]
PlotOption = Annotated[
    Path | None,
    Text(help="With --compare: draw tasks or patterns (.png, .svg, .pdf).", rich_help_panel=PANEL_OTHER),
]
MatchModelOption = Annotated[
    list[str],
    Text(help="Diffusers repository or folder, CLIP-style model of transformers, or open_clip:ARCH/PRETRAINED."),
]
MatchBenchmarkOption = Annotated[str | None, Text(help="Names, comma-separated: mmvp_vlm, winoground, mini_pairs.")]
ImageOption = Annotated[list[Path] | None, Text(help="Instead of a benchmark: images ...")]
TextOption = Annotated[list[str] | None, Text(help="... and texts, every one scored with every image.")]
MatchDataOption = Annotated[str | None, Text(help="Folder in the published layout, or a Hub id.")]
MatchRevisionOption = Annotated[str | None, Text(help="Hub revision of the data.")]
MatchLimitOption = Annotated[int | None, Text(help="About this many items, spread evenly.")]
StepsOption = Annotated[int, Text(help="How many timesteps, by the released rule; 5 and 10 are the papers'.")]
TimestepsOption = Annotated[str | None, Text(help="Timesteps instead, comma-separated, e.g. 89,489.")]
LayersOption = Annotated[str, Text(help="last, all, or Cross-Q taps, comma-separated.")]
UnconditionalOption = Annotated[bool, Text(help="Take the empty prompt's half into the mean.")]
TokensOption = Annotated[str, Text(help="Keys to sum over: all, no_padding or text.")]
BiasOption = Annotated[bool, Text(help="Add the released code's difference of noise errors.")]
TrialsOption = Annotated[int, Text(help="Noise draws.")]
PrefixOption = Annotated[str | None, Text(help="Put before every text; default the benchmark's own.")]
MatchDtypeOption = Annotated[str, Text(help="Of the diffusion model: float32, bfloat16 or float16.")]
MatchDeviceOption = Annotated[str | None, Text(help="For example cuda:1.")]


def evaluate(
    runs: RunsOption = None,
    model: ModelOption = None,
    benchmark: BenchmarkOption = None,
    output: OutputOption = Path("results"),
    protocol: ProtocolOption = "default",
    limit: LimitOption = None,
    batch_size: BatchSizeOption = 8,
    blind: BlindOption = False,
    seed: int = 0,
    model_revision: ModelRevisionOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    data: DataOption = None,
    revision: RevisionOption = None,
    images: ImagesOption = None,
    diffusion_prompt: DiffusionPromptOption = "question",
    captions: CaptionsOption = None,
    guidance: GuidanceOption = None,
    judge: JudgeOption = None,
    judge_url: JudgeUrlOption = None,
    write_pseudo_captions: WritePseudoCaptionsOption = None,
    passes: PassesOption = 1,
    leakage: LeakageOption = False,
    scales: ScalesOption = "0,1,1.5,2,4,6,8",
    all_donor_captions: AllDonorCaptionsOption = False,
    compare: CompareOption = False,
    plot: PlotOption = None,
) -> None:
    """Measure models on the papers' benchmarks; compare results; caption; measure leakage."""
    with one_sentence():
        if compare:
            _compare(runs or [], plot)
            return
        if runs:
            raise ValueError(f"{runs[0]} is taken for a results folder to compare: add --compare.")
        if not model or not benchmark:
            raise ValueError("Name at least one --model and one --benchmark (or results folders with --compare).")
        if plot:
            raise ValueError("--plot goes with --compare.")
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
            guidance=_numbers(guidance, "--guidance"),
            seed=seed,
            batch_size=batch_size,
            blind=blind,
        )
        names = [name.strip() for name in benchmark.split(",")]
        _check_names(names, options, model, write_pseudo_captions, passes, leakage)
        load = {"revision": model_revision, "dtype": dtype, "device": device}
        if leakage:
            _leakage(model, names[0], output, options, _numbers(scales, "--scales"), all_donor_captions, load)
        elif write_pseudo_captions:
            _pseudo_captions(model[0], names[0], write_pseudo_captions, options, load)
        else:
            _score(model, names, output, options, passes, make_judge(judge, judge_url), load)


def _check_names(names, options, models, pseudo_captions, passes, leakage) -> None:
    """Everything that can be wrong in the names, before a model is loaded."""
    from ..evaluation.benchmarks import get_benchmark

    for name in names:
        get_benchmark(name, options.protocol)
    single = len(names) == 1 and (len(models) == 1 or leakage)
    if (pseudo_captions or leakage) and not single:
        raise ValueError("Pseudo-captions and leakage take one benchmark, pseudo-captions one model.")
    if leakage and (options.guidance or options.blind or options.diffusion_prompt != "question" or passes != 1):
        raise ValueError(
            "--leakage sets prompts and scales itself: leave out --guidance, --diffusion-prompt, --blind and --passes."
        )
    if passes != 1 and not all("captions" in name for name in names):
        raise ValueError("--passes is for the captioning benchmarks.")


def _score(models, names, output, options, passes, judge, load) -> None:
    from ..evaluation.captioning import refine
    from ..evaluation.evaluate import LoadedModel, evaluate, run_name

    for model in models:
        loaded = LoadedModel.load(model, **load)
        for name in names:
            folder = output / run_name(model) / name
            with progress_bar(f"{model} on {name}") as progress:
                if passes > 1:
                    results = refine(loaded, name, folder, passes, options, progress)
                else:
                    results = [evaluate(loaded, name, folder, options, judge, progress)]
            if all(results):
                _print_comparison([folder / f"pass-{k}" for k in range(1, passes + 1)] if passes > 1 else [folder])
                typer.echo(f"Results: {folder}")


def _print_comparison(paths) -> list:
    from ..evaluation.compare import compare, markdown

    comparisons = compare(paths)
    for comparison in comparisons:
        typer.echo(markdown(comparison))
    return comparisons


def _compare(runs: list[Path], plot: Path | None) -> None:
    if not runs:
        raise ValueError("Name the results folders to compare: sdllava evaluate --compare A B.")
    comparisons = _print_comparison(runs)
    if plot:
        from ..evaluation.plots import plot_parts

        drawable = [comparison for comparison in comparisons if comparison.parts] or comparisons[:1]
        for comparison in drawable:
            path = plot if len(drawable) == 1 else plot.with_stem(f"{plot.stem}-{comparison.benchmark}")
            plot_parts(comparison, path)
            typer.echo(f"Picture: {path}")


def _pseudo_captions(model, name, file, options, load) -> None:
    from ..evaluation.captioning import write_pseudo_captions
    from ..evaluation.evaluate import LoadedModel

    with progress_bar(f"{model} captions {name}") as progress:
        count = write_pseudo_captions(LoadedModel.load(model, **load), name, file, options, progress)
    if count:
        typer.echo(f"{count} captions: {file}")


def _leakage(models, name, output, options, scales, all_donor_captions, load) -> None:
    from ..evaluation.evaluate import LoadedModel, load_samples, run_name
    from ..evaluation.leakage import LeakageSetting, leakage_markdown, leakage_sweep
    from ..evaluation.plots import plot_leakage

    setting = LeakageSetting.make(*load_samples(name, options), options, all_donor_captions)
    loaded = [(run_name(model), LoadedModel.load(model, **load)) for model in models]
    folder = output / "leakage"
    with progress_bar("leakage") as progress:
        result = leakage_sweep(loaded, setting, folder, scales, progress)
    plot_leakage(result, folder / "leakage.png")
    typer.echo(leakage_markdown(result))
    typer.echo(f"Results: {folder}")


def match(
    model: MatchModelOption,
    benchmark: MatchBenchmarkOption = None,
    image: ImageOption = None,
    text: TextOption = None,
    output: OutputOption = Path("results"),
    data: MatchDataOption = None,
    revision: MatchRevisionOption = None,
    limit: MatchLimitOption = None,
    model_revision: ModelRevisionOption = None,
    steps: StepsOption = 5,
    timesteps: TimestepsOption = None,
    layers: LayersOption = "last",
    unconditional: UnconditionalOption = True,
    tokens: TokensOption = "all",
    bias: BiasOption = False,
    trials: TrialsOption = 3,
    seed: int = 0,
    prefix: PrefixOption = None,
    batch_size: BatchSizeOption = 8,
    dtype: MatchDtypeOption = "float32",
    device: MatchDeviceOption = None,
) -> None:
    """Score images against texts with a diffusion model's cross-attention, or with a CLIP-style model."""
    with one_sentence():
        if bool(benchmark) == bool(image or text) or bool(image) != bool(text):
            raise ValueError("Give a --benchmark, or at least one --image and one --text.")
        from ..evaluation.matching import MatchingOptions, published_timesteps

        chosen = _numbers(timesteps, "--timesteps") or published_timesteps(steps)
        if fractions := [t for t in chosen if t % 1]:
            raise ValueError(f"A timestep is a whole number, not {fractions[0]}.")
        options = MatchingOptions(
            timesteps=tuple(sorted(map(int, chosen))),
            layers=layers if layers in ("last", "all") else tuple(layers.split(",")),
            unconditional=unconditional,
            tokens=tokens,
            bias=bias,
            trials=trials,
            seed=seed,
        )
        if benchmark:
            from ..evaluation.benchmarks import get_matching_benchmark

            for name in benchmark.split(","):
                get_matching_benchmark(name)
        from ..evaluation.match import load_matcher

        for name in model:
            matcher = load_matcher(name, options, model_revision, batch_size, dtype, device)
            if benchmark:
                facts = {"id": name, "revision": model_revision, "dtype": dtype}
                _match_benchmarks(
                    matcher, name, facts, benchmark.split(","), output, options, data, revision, limit, prefix
                )
            else:
                _match_files(matcher, image, text, prefix or "")


def _match_benchmarks(matcher, model, facts, names, output, options, data, revision, limit, prefix) -> None:
    from ..evaluation.evaluate import run_name
    from ..evaluation.match import match, timestep_markdown

    for name in names:
        folder = output / run_name(model) / name
        with progress_bar(f"{model} on {name}") as progress:
            results = match(matcher, name, folder, facts, options, data, revision, limit, prefix, progress)
        if results:
            typer.echo(timestep_markdown(results))
            _print_comparison([folder])
            typer.echo(f"Results: {folder}")


def _match_files(matcher, images, texts, prefix) -> None:
    from ..evaluation.benchmarks.base import open_image

    scores = matcher.score([open_image(path, str(path)) for path in images], [prefix + text for text in texts])
    mean, spread = scores.mean(axis=1).mean(axis=0), scores.mean(axis=1).std(axis=0)
    typer.echo("| text | " + " | ".join(path.name for path in images) + " |")
    typer.echo("|---|" + "---|" * len(images))
    for text, row, spreads in zip(texts, mean, spread):
        cells = [f"{value:.4f} ± {around:.4f}" for value, around in zip(row, spreads)]
        typer.echo(f"| {text} | " + " | ".join(cells) + " |")

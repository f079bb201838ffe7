"""The command `match`. Heavy imports happen inside the command."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..evaluation.benchmarks import MATCHING_BENCHMARKS
from .evaluate import (
    BatchSizeOption,
    DeviceOption,
    ModelRevisionOption,
    OutputOption,
    SeedOption,
    check_named,
    leaving_process_group,
    print_comparison,
)
from .options import DType, check_device, parse_integers, split_names
from .reporting import progress_bar

if TYPE_CHECKING:
    from ..evaluation.match import Matcher
    from ..evaluation.matching import MatchingOptions

MatchModelsOption = Annotated[
    list[str],
    typer.Option(
        "--model", help="Diffusers repository or folder, 'mini', CLIP-style model, or open_clip:ARCH/PRETRAINED."
    ),
]
MatchBenchmarkOption = Annotated[
    str | None, typer.Option(help="Names, comma-separated: mmvp_vlm, winoground, sugarcrepe, mini_pairs.")
]
ImageOption = Annotated[list[Path] | None, typer.Option(help="Instead of a benchmark: images ...")]
TextOption = Annotated[list[str] | None, typer.Option(help="... and texts. Every text is scored with every image.")]
MatchDataOption = Annotated[str | None, typer.Option(help="Folder in the published layout, or a Hub id.")]
MatchRevisionOption = Annotated[str | None, typer.Option(help="Hub revision of the data.")]
MatchLimitOption = Annotated[int | None, typer.Option(help="Approximate number of items, spread evenly.")]
StepsOption = Annotated[int, typer.Option(help="Number of timesteps, by the released rule. The papers use 5 and 10.")]
TimestepsOption = Annotated[str | None, typer.Option(help="Timesteps instead of --steps, comma-separated: 89,489.")]
ScoreOption = Annotated[str, typer.Option(help="attention, attention-relative (to the empty prompt), or denoising.")]
ReadingOption = Annotated[
    str,
    typer.Option(help="How attention is pooled: as the released code does, or as S3 or S4 describes (code, s3, s4)."),
]
LayersOption = Annotated[
    str | None,
    typer.Option(help="last, all, or Cross-Q or Joint-Q taps, comma-separated. Default: those of --reading."),
]
UnconditionalOption = Annotated[bool, typer.Option(help="Average attention with the pass with the empty prompt.")]
TokensOption = Annotated[str, typer.Option(help="Keys to pool: all, no_padding or text.")]
BiasOption = Annotated[bool, typer.Option(help="Add the released code's difference of noise errors.")]
TrialsOption = Annotated[int, typer.Option(min=1, help="Noise draws.")]
PrefixOption = Annotated[str | None, typer.Option(help="Put before every text. Default: the benchmark's own.")]
MatchDtypeOption = Annotated[DType, typer.Option(help="Type of the diffusion model's weights.")]


def match(
    model: MatchModelsOption,
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
    score: ScoreOption = "attention",
    reading: ReadingOption = "code",
    layers: LayersOption = None,
    unconditional: UnconditionalOption = True,
    tokens: TokensOption = "all",
    bias: BiasOption = False,
    trials: TrialsOption = 3,
    seed: SeedOption = 0,
    prefix: PrefixOption = None,
    batch_size: BatchSizeOption = 8,
    dtype: MatchDtypeOption = DType.float32,
    device: DeviceOption = None,
) -> None:
    """Score images against texts by a diffusion model's attention or denoising error, or by a CLIP-style model."""
    if bool(benchmark) == bool(image or text) or bool(image) != bool(text):
        raise ValueError("Give a --benchmark, or at least one --image and one --text.")
    given = parse_integers(timesteps, "--timesteps")
    names = split_names(benchmark or "")
    check_named(MATCHING_BENCHMARKS, names, model)
    if device is not None:
        check_device(device)
    from ..evaluation.matching import READINGS, MatchingOptions, published_timesteps

    if reading not in READINGS:
        raise ValueError(f"Unknown reading {reading!r}. Choose one of {', '.join(READINGS)}.")
    chosen = layers or READINGS[reading]["layers"]
    options = MatchingOptions(
        timesteps=tuple(sorted(given or published_timesteps(steps))),
        score=score,
        pooling=READINGS[reading]["pooling"],
        layers=chosen if chosen in ("last", "all") else tuple(split_names(chosen)),
        unconditional=unconditional,
        tokens=tokens,
        bias=bias,
        trials=trials,
        seed=seed,
    )
    from ..evaluation.match import load_matcher

    with leaving_process_group():
        for name in model:
            matcher = load_matcher(name, options, model_revision, batch_size, dtype.value, device)
            if names:
                facts = {"id": name, "revision": model_revision, "dtype": dtype.value}
                source = {"data": data, "revision": revision, "limit": limit, "prefix": prefix}
                _match_benchmarks(matcher, facts, names, output, options, source)
            else:
                _match_files(matcher, image or [], text or [], prefix or "")


def _match_benchmarks(
    matcher: "Matcher",
    model: dict[str, Any],
    names: Sequence[str],
    output: Path,
    options: "MatchingOptions",
    source: dict[str, Any],
) -> None:
    from ..evaluation.evaluate import run_name
    from ..evaluation.match import match, timestep_markdown

    for name in names:
        folder = output / run_name(model["id"]) / name
        with progress_bar(f"{model['id']} on {name}") as progress:
            results = match(matcher, name, folder, model, options, **source, progress=progress)
        if results:
            typer.echo(timestep_markdown(results))
            print_comparison([folder])
            typer.echo(f"Results: {folder}")


def _match_files(matcher: "Matcher", images: Sequence[Path], texts: Sequence[str], prefix: str) -> None:
    from ..evaluation.benchmarks.base import open_image

    scores = matcher.score([open_image(path, str(path)) for path in images], [prefix + text for text in texts])
    mean, spread = scores.mean(axis=1).mean(axis=0), scores.mean(axis=1).std(axis=0)
    typer.echo("| text | " + " | ".join(path.name for path in images) + " |")
    typer.echo("|---|" + "---|" * len(images))
    for text, row, spreads in zip(texts, mean, spread, strict=True):
        cells = [f"{value:.4f} ± {around:.4f}" for value, around in zip(row, spreads, strict=True)]
        typer.echo(f"| {text} | " + " | ".join(cells) + " |")

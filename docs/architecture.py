"""Draws `docs/architecture.svg`: `python docs/architecture.py > docs/architecture.svg`."""

from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1180, 520
INK, LINE = "#1f2933", "#52606d"
FROZEN, BOTH, SECOND, DATA = "#dbe7f5", "#d5efdc", "#fde6c8", "#ffffff"


@dataclass(frozen=True)
class Box:
    """A part of the model, by its upper left corner, its size, its lines of text and its colour."""

    x: int
    y: int
    width: int
    height: int
    lines: tuple[str, ...]
    colour: str

    @property
    def left(self) -> tuple[int, int]:
        """The middle of the left side."""
        return self.x, self.y + self.height // 2

    @property
    def right(self) -> tuple[int, int]:
        """The middle of the right side."""
        return self.x + self.width, self.y + self.height // 2

    @property
    def top(self) -> tuple[int, int]:
        """The middle of the upper side."""
        return self.x + self.width // 2, self.y

    @property
    def bottom(self) -> tuple[int, int]:
        """The middle of the lower side."""
        return self.x + self.width // 2, self.y + self.height


IMAGE = Box(20, 150, 100, 50, ("image",), DATA)
QUESTION = Box(20, 400, 100, 50, ("question",), DATA)
CLIP = Box(300, 60, 200, 60, ("CLIP ViT-L/14", "336 pixels"), FROZEN)
VAE = Box(180, 200, 120, 60, ("VAE encoder", "512 pixels"), FROZEN)
NOISE = Box(350, 200, 150, 60, ("add noise, t = 50", "64 x 64 x 4"), DATA)
UNET = Box(550, 190, 150, 80, ("UNet", "up to its tap", "U-L1-R1-B0-Cross-Q"), FROZEN)
TEXT = Box(300, 330, 200, 60, ("Stable Diffusion's", "text encoder"), FROZEN)
GUIDANCE = Box(550, 320, 190, 80, ("guidance", "X = Xu + s (Xc − Xu)", "16 x 16 x 1280"), DATA)
FUSION = Box(800, 120, 150, 80, ("fusion", "queries: CLIP", "keys: diffusion"), BOTH)
PROJECTOR = Box(800, 260, 150, 60, ("projector", "2-layer MLP"), BOTH)
LANGUAGE = Box(800, 390, 150, 70, ("language model", "Vicuna-7B"), SECOND)
ANSWER = Box(1040, 400, 100, 50, ("answer",), DATA)
BOXES = (IMAGE, QUESTION, CLIP, VAE, NOISE, UNET, TEXT, GUIDANCE, FUSION, PROJECTOR, LANGUAGE, ANSWER)

Points = tuple[tuple[int, int], ...]
ARROWS: tuple[Points, ...] = (
    (IMAGE.top, (70, 90), CLIP.left),
    (IMAGE.bottom, (70, 230), VAE.left),
    (VAE.right, NOISE.left),
    (NOISE.right, UNET.left),
    ((95, 400), (95, 360), TEXT.left),
    ((TEXT.x + 160, TEXT.y), (460, 300), (590, 300), (590, 270)),
    ((660, 270), (660, 320)),
    (CLIP.right, (875, 90), FUSION.top),
    ((740, 360), (770, 360), (770, 160), FUSION.left),
    (FUSION.bottom, PROJECTOR.top),
    (PROJECTOR.bottom, LANGUAGE.top),
    (QUESTION.right, LANGUAGE.left),
    (LANGUAGE.right, ANSWER.left),
)
LABELS = (
    (560, 82, "24 x 24 x 1024"),
    (885, 234, "576 tokens"),
    (885, 360, "in place of the image tokens"),
    (108, 352, "question, and empty prompt"),
    (210, 417, "chat template"),
    (672, 300, "Xc, Xu"),
)
LEGEND = ((FROZEN, "frozen"), (BOTH, "trains in stage 1 and 2"), (SECOND, "trains in stage 2"))


def _text(x: int, y: int, line: str, size: int = 14, weight: str = "normal", anchor: str = "middle") -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" {style}>{escape(line)}</text>'


def _box(box: Box) -> Iterator[str]:
    place = f'x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="8"'
    dashes = ' stroke-dasharray="5 4"' if box.colour == DATA else ""
    yield f'<rect {place} fill="{box.colour}" stroke="{LINE}" stroke-width="1.5"{dashes}/>'
    first = box.y + box.height // 2 + 5 - 9 * (len(box.lines) - 1)
    for number, line in enumerate(box.lines):
        size, weight = (14, "600") if number == 0 else (12, "normal")
        yield _text(box.x + box.width // 2, first + 18 * number, line, size, weight)


def _legend() -> Iterator[str]:
    for number, (colour, label) in enumerate(LEGEND):
        x, y = 180 + 190 * number, HEIGHT - 34
        yield f'<rect x="{x}" y="{y}" width="20" height="16" rx="3" fill="{colour}" stroke="{LINE}"/>'
        yield _text(x + 28, y + 13, label, 13, anchor="start")


def drawing() -> str:
    """The figure, as the text of an SVG file."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="How an image and a question become an answer" font-family="Helvetica, Arial, sans-serif" '
        f'fill="{INK}">',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="{LINE}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#fbfcfd"/>',
    ]
    for points in ARROWS:
        path = " ".join(f"{x},{y}" for x, y in points)
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.6" marker-end="url(#tip)"/>'
        )
    lines += [part for box in BOXES for part in _box(box)]
    lines += [_text(x, y, label, 12, anchor="start") for x, y, label in LABELS]
    lines += [*_legend(), "</svg>"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(drawing(), end="")

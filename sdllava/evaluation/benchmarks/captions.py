"""COCO captions, Karpathy's test split: 5,000 images with at least five captions each.

The published annotations contain no images: these are in COCO's val2014 folder. Scores are times 100, as in the papers
(S3 Table 5, S4 Table 4).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.captioned_images import coco_rows
from ..caption_metrics import caption_units, scores_from_means
from ..tokenization import ptb_missing, spice, tokenize
from .base import Benchmark, ImageSource, Sample, inside, read_json_lines, read_parquet, require_columns

INSTRUCTION = "Describe the image briefly."


class CocoCaptions(Benchmark):
    """Captioning from Karpathy's JSON, COCO's annotations, parquet or JSON Lines, scored on PTB tokens with Java."""

    name = "captions"
    hub_id = "yerevann/coco-karpathy"
    split = "test"
    metric = "CIDEr"
    max_new_tokens = 64
    files = ("*test*", "*/*test*")
    protocols = {
        "default": "greedy, lmms-eval's instruction, 64 tokens",
        "plain": "greedy, no instruction: only the image tokens, LLaVA's template of the first stage (S3 4.3)",
    }

    def __init__(self, protocol: str = "default"):
        super().__init__(protocol)
        self.template = "plain" if protocol == "plain" else "chat"
        self.tokenizer = "simple" if ptb_missing() else "ptb"
        if self.tokenizer == "simple":
            self.metric = "CIDEr (simple tokens)"

    def read(self, folder: Path) -> list[Sample]:
        """The images of the split with all of their captions."""
        rows = self._rows(folder)
        if not rows:
            raise ValueError(f"{str(folder)!r} has no captions of the split {self.split!r}. Complete the folder.")
        return [self._sample(folder, row) for row in rows]

    def _rows(self, folder: Path) -> list[dict]:
        if (folder / "dataset_coco.json").is_file():
            found = coco_rows(folder / "dataset_coco.json")
            if found is None or not all("split" in row for row in found):
                name = str(folder / "dataset_coco.json")
                raise ValueError(f"{name!r} has no images with sentences and split. Use Karpathy's file.")
            rows = [row for row in found if row["split"] == self.split]
        elif files := sorted(folder.glob("captions_val*.json")) or sorted(folder.glob("captions_*.json")):
            if len(files) > 1:
                names = [file.name for file in files]
                raise ValueError(f"{str(folder)!r} has several annotation files: {names}. Keep one of them.")
            rows = coco_rows(files[0]) or []
        elif files := sorted(folder.glob("*.jsonl")):
            rows = [row for file in files for row in read_json_lines(file)]
            rows = [{"filename": row.get("image"), "sentences": row.get("captions"), **row} for row in rows]
        elif (dataset := read_parquet(folder, f"*{self.split}*.parquet")) is not None:
            rows = dataset.to_list()
        else:
            raise FileNotFoundError(
                f"{str(folder)!r} has neither dataset_coco.json nor captions_*.json nor *{self.split}*.parquet "
                "(filename, sentences) nor *.jsonl (image, captions). Add one of them."
            )
        for row in rows:
            require_columns(self.name, [key for key, value in row.items() if value], ("filename", "sentences"))
        return rows

    def _sample(self, folder: Path, row: dict) -> Sample:
        image = self._image(folder, row["filename"], row.get("filepath"))
        return self.sample(row["filename"], [caption.strip() for caption in row["sentences"]], image)

    def sample(self, name: str, captions: list[str], image: ImageSource) -> Sample:
        """One image with its reference captions."""
        prompt = "" if self.template == "plain" else INSTRUCTION
        return Sample(name, prompt, (image,), target=captions, question=prompt, image_ids=(name,))

    def _image(self, folder: Path, name: str, subfolder: str | None) -> Path:
        root = self.image_folder or folder
        candidates = [f"{subfolder}/{name}"] if subfolder else []
        for candidate in (*candidates, name, f"images/{name}"):
            if (root / candidate).is_file():
                return inside(root, candidate)
        raise FileNotFoundError(
            f"The image {name!r} is missing from {str(root)!r}. COCO's annotations contain no images: give the folder "
            "of images (val2014) with --images."
        )

    def parse(self, sample: Sample, reply: str) -> str | None:
        """The reply itself, or None if it is empty."""
        return reply.strip() or None

    def is_correct(self, sample: Sample, parsed: Any) -> None:
        """None, because captions are scored over the whole corpus."""

    def units(self, records: Sequence[dict]) -> dict[str, dict[str, float]]:
        """The numbers of each image that the caption scores are summed from.

        Inverse document frequencies come from the evaluated references. Notes on the tokenizer and on SPICE are added
        to `notes`.
        """
        captions = [caption for record in records for caption in (record["reply"], *record["target"])]
        tokens = iter(tokenize(captions, self.tokenizer)[0])
        candidates, references = {}, {}
        for record in records:
            candidates[record["id"]] = next(tokens)
            references[record["id"]] = [next(tokens) for _ in record["target"]]
        units = caption_units(candidates, references)
        by_image, absent = spice(candidates, references)
        self.notes["tokenizer"] = self.tokenizer
        if absent:
            self.notes["SPICE"] = f"absent: {absent}"
        if self.tokenizer == "simple":
            self.notes["PTB tokens"] = f"absent: {ptb_missing()}; scores on simple tokens have that in their names"
        for image, value in by_image.items():
            units[image]["spice"] = value
        return units

    def scores(self, means: dict[str, float]) -> dict[str, float]:
        """All caption scores, times 100, with the tokenizer in their names unless it is PTB."""
        suffix = "" if self.tokenizer == "ptb" else " (simple tokens)"
        return {f"{name}{suffix}": value for name, value in scores_from_means(means).items()}

"""LLaVA's two training sets on disk: what to download, unpacking, repairs, and a check of what is missing.

Places and numbers are those of LLaVA's repository. Its README gives the layout and the addresses; the counts are from
the cited threads. Nothing here imports a large library before it downloads.
"""

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..atomic_files import move_into_place, write_text

HUB = "https://huggingface.co/datasets"
LLAVA = "https://github.com/haotian-liu/LLaVA"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp")
TEXT_ONLY = "text only"


@dataclass(frozen=True)
class ImageSource:
    """The images of one source.

    Attributes:
        name: The first part of its image paths, or the empty string if it is the only source.
        urls: The address of each archive, by the name that the archive has in the set's folder.
        unpacks_to: The folder into which the archives are unpacked.
        samples: Samples with an image of this source, None where no citable number exists.
        remark: What to know about it.
    """

    name: str
    urls: dict[str, str]
    unpacks_to: str
    samples: int | None = None
    remark: str = ""


@dataclass(frozen=True)
class PublishedSet:
    """A published training set.

    Attributes:
        annotations: The file of samples, relative to the set's folder.
        url: The address of that file.
        images: The folder to which image paths are relative.
        sources: Where its images come from.
        samples: All samples, None where no citable number exists.
        text_only: Samples without an image, None where no citable number exists.
        citation: Where the numbers are from.
    """

    annotations: str
    url: str
    images: str
    sources: tuple[ImageSource, ...]
    samples: int | None = None
    text_only: int | None = None
    citation: str = ""


SETS = {
    "llava-558k": PublishedSet(
        annotations="LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
        url=f"{HUB}/liuhaotian/LLaVA-Pretrain/resolve/main/blip_laion_cc_sbu_558k.json",  # LLaVA's docs/Data.md
        images="LLaVA-Pretrain/images",
        sources=(
            ImageSource(
                "",
                {"images.zip": f"{HUB}/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip"},
                "LLaVA-Pretrain/images",
            ),
        ),
    ),
    "mix-665k": PublishedSet(
        annotations="llava_v1_5_mix665k.json",
        url=f"{HUB}/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json",  # LLaVA's README
        images=".",
        sources=(
            ImageSource(
                "coco",
                {"train2017.zip": "http://images.cocodataset.org/zips/train2017.zip"},
                "coco",
                364_100,  # LLaVA, issue 657, like the next four
            ),
            ImageSource(
                "gqa",
                {"gqa_images.zip": "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip"},
                "gqa",
                72_140,
            ),
            ImageSource(
                "ocr_vqa",
                {
                    "ocr_vqa_images_llava_v15.zip": f"{HUB}/weizhiwang/llava_v15_instruction_images/resolve/main/"
                    "ocr_vqa_images_llava_v15.zip"  # LLaVA, pull request 1458
                },
                "ocr_vqa/images",
                80_000,
                # LLaVA, pull request 1458 and issues 593 and 1618
                "The original download script misses images, because addresses have expired. The archive is a copy of "
                "all. Some images are GIF files whose name in the annotations ends in .jpg.",
            ),
            ImageSource(
                "textvqa",
                {"train_val_images.zip": "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"},
                "textvqa",
                21_953,
            ),
            ImageSource(
                "vg",
                {  # the archives contain the folders VG_100K and VG_100K_2
                    "vg_images.zip": "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
                    "vg_images2.zip": "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
                },
                "vg",
                86_417,
            ),
        ),
        samples=665_298,  # the sum of the five sources and of the text
        text_only=40_688,  # LLaVA, issues 546 and 657
        citation=f"{LLAVA}/issues/657",
    ),
}


@dataclass
class Verification:
    """What a check found.

    Attributes:
        samples: Samples by source; those without an image under "text only".
        expected: The published number of samples by source, where there is one.
        images: Distinct images by source.
        missing: Paths of missing images by source.
        empty: Paths of images of zero bytes by source.
        damaged: Paths of images that differ from their archive, in size or, where hashes were checked, in CRC-32.
    """

    samples: Counter[str] = field(default_factory=Counter)
    expected: dict[str, int] = field(default_factory=dict)
    images: Counter[str] = field(default_factory=Counter)
    missing: dict[str, list[str]] = field(default_factory=dict)
    empty: dict[str, list[str]] = field(default_factory=dict)
    damaged: dict[str, list[str]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all images are there and all known numbers fit."""
        counts = all(self.samples[name] == number for name, number in self.expected.items())
        return counts and not self.missing and not self.empty and not self.damaged


def downloads(name: str, folder: Path) -> list[tuple[str, Path, str]]:
    """What is still to be downloaded for a set: address, place in the folder, and remark.

    An archive is not needed once it has been unpacked.

    Args:
        name: One of `SETS`.
        folder: The set's folder, in the recipes `data`.
    """
    published = SETS[name]
    wanted = []
    if not (folder / published.annotations).is_file():
        wanted.append((published.url, folder / published.annotations, ""))
    for source in published.sources:
        for archive, url in source.urls.items():
            if not (folder / archive).is_file() and not _unpacked(folder, source, archive):
                wanted.append((url, folder / archive, source.remark))
    return wanted


def fetch(url: str, place: Path) -> bool:
    """Download a file of the Hub. An interrupted download resumes.

    Args:
        url: An address of `downloads`.
        place: Where to put it.

    Returns:
        `bool`: Whether the Hub has the file. Files of other servers are not downloaded.

    Raises:
        Exception: The Hub cannot be reached, or the disk is full.
    """
    if not url.startswith(HUB):
        return False
    from huggingface_hub import hf_hub_download

    repo_id, filename = _hub_file(url)
    hf_hub_download(repo_id, filename, repo_type="dataset", local_dir=place.parent)
    return True


def published_sha256(name: str) -> str | None:
    """The SHA-256 of a set's annotations that the Hub states, None where it states none.

    Raises:
        Exception: The Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    repo_id, filename = _hub_file(SETS[name].url)
    (found,) = HfApi().get_paths_info(repo_id, filename, repo_type="dataset")
    return getattr(getattr(found, "lfs", None), "sha256", None)


def _hub_file(url: str) -> tuple[str, str]:
    repo_id, _, filename = url.removeprefix(f"{HUB}/").partition("/resolve/main/")
    return repo_id, filename


def unpack(name: str, folder: Path) -> list[str]:
    """Unpack the archives that are there and not unpacked yet, and record their files' sizes and CRC-32 for `verify`.

    Args:
        name: One of `SETS`.
        folder: The set's folder.

    Returns:
        `list[str]`: The names of the archives that were unpacked.

    Raises:
        ValueError: An archive is damaged, or has a path that leaves its folder.
    """
    done = []
    for source in SETS[name].sources:
        for archive in source.urls:
            path = folder / archive
            if path.is_file() and not _unpacked(folder, source, archive):
                members = _extract(path, folder / source.unpacks_to)
                lines = (f"{member.CRC:08x} {member.file_size} {member.filename}\n" for member in members)
                write_text(_marker(folder, source, archive), "".join(lines))
                done.append(archive)
    return done


def repair(name: str, folder: Path) -> dict[str, str]:
    """Rename images that are there under another extension than the annotations give, for example GIF files.

    Image libraries recognise a format from the content, so the extension is only a name.

    Args:
        name: One of `SETS`.
        folder: The set's folder.

    Returns:
        `dict[str, str]`: The new name of each renamed file, relative to the set's image folder.

    Raises:
        FileNotFoundError: The annotations are not there.
        ValueError: The annotations are not a list of samples.
    """
    root, renamed = folder / SETS[name].images, {}
    for image in sorted({image for sample in read_samples(name, folder) for image in _images(sample)}):
        target = root / image
        if target.exists():
            continue
        others = (target.with_suffix(suffix) for suffix in EXTENSIONS if suffix != target.suffix)
        if (found := next((other for other in others if other.is_file()), None)) is not None:
            move_into_place(found, target)
            renamed[found.relative_to(root).as_posix()] = image
    return renamed


def verify(name: str, folder: Path, hashes: bool = False) -> Verification:
    """Compare a set on disk with its annotations, with the archives of its images, and with the published numbers.

    Args:
        name: One of `SETS`.
        folder: The set's folder.
        hashes: Read every image and compare its CRC-32 with that in its archive.

    Raises:
        FileNotFoundError: The annotations are not there.
        ValueError: The annotations are not a list of samples.
    """
    published = SETS[name]
    root, found, seen = folder / published.images, Verification(), set()
    recorded = _recorded(folder, published)
    for sample in read_samples(name, folder):
        images = _images(sample)
        found.samples[_source(published, images[0]) if images else TEXT_ONLY] += 1
        for image in images:
            if image in seen:
                continue
            seen.add(image)
            source = _source(published, image)
            found.images[source] += 1
            size, crc = recorded.get(_stem(image), (None, None))
            try:
                found_size = (root / image).stat().st_size
                if not found_size:
                    found.empty.setdefault(source, []).append(image)
                elif size not in (None, found_size) or (hashes and crc not in (None, _crc32(root / image))):
                    found.damaged.setdefault(source, []).append(image)
            except OSError:
                found.missing.setdefault(source, []).append(image)
    found.expected = {source.name: source.samples for source in published.sources if source.samples is not None}
    if published.text_only is not None:
        found.expected[TEXT_ONLY] = published.text_only
    return found


def read_samples(name: str, folder: Path) -> list[dict[str, Any]]:
    """The samples of a set's annotations.

    Raises:
        FileNotFoundError: The annotations are not there.
        ValueError: They are not a list of samples.
    """
    published = SETS[name]
    path = folder / published.annotations
    if not path.is_file():
        raise FileNotFoundError(f"There are no annotations at {str(path)!r}. Download {published.url} to this place.")
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The annotations {str(path)!r} are not JSON ({error}). Download them again.") from error
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise ValueError(f"The annotations {str(path)!r} are not a list of samples. Download them again.")
    return samples


def _images(sample: dict[str, Any]) -> list[str]:
    image = sample.get("image") or []
    return [image] if isinstance(image, str) else [str(name) for name in image]


def _source(published: PublishedSet, image: str) -> str:
    """The source of an image path; another first folder is a source of its own."""
    if len(published.sources) == 1:
        return published.sources[0].name
    return PurePosixPath(image).parts[0]


def _marker(folder: Path, source: ImageSource, archive: str) -> Path:
    return folder / source.unpacks_to / f".{archive}.unpacked"


def _unpacked(folder: Path, source: ImageSource, archive: str) -> bool:
    return _marker(folder, source, archive).exists()


def _recorded(folder: Path, published: PublishedSet) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of each unpacked file, by its path in the image folder without extension, which `repair` changes.

    Archives that earlier versions unpacked have no record.
    """
    found = {}
    for source in published.sources:
        for archive in source.urls:
            if _unpacked(folder, source, archive):
                for line in _marker(folder, source, archive).read_text(encoding="utf-8").splitlines():
                    crc, size, name = line.split(" ", 2)
                    path = (PurePosixPath(source.unpacks_to) / name).relative_to(published.images)
                    found[_stem(path.as_posix())] = (int(size), int(crc, 16))
    return found


def _stem(path: str) -> str:
    return PurePosixPath(path).with_suffix("").as_posix()


def _crc32(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


def _members(archive: zipfile.ZipFile) -> Iterator[zipfile.ZipInfo]:
    for member in archive.infolist():
        if member.is_dir():
            continue
        parts = PurePosixPath(member.filename).parts
        if member.filename.startswith("/") or ".." in parts:
            raise ValueError(
                f"The archive {archive.filename!r} has the path {member.filename!r}, which leaves its folder. Download "
                "it again."
            )
        yield member


def _extract(path: Path, target: Path) -> list[zipfile.ZipInfo]:
    """Unpack an archive. Files that are there with their full size are kept, so an interrupted run resumes."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = list(_members(archive))
            for member in members:
                place = target / member.filename
                if not place.is_file() or place.stat().st_size != member.file_size:
                    archive.extract(member, target)
            return members
    except zipfile.BadZipFile as error:
        raise ValueError(f"The archive {str(path)!r} is damaged ({error}). Download it again.") from error

"""How much each part of the study reads and trains. Budgets are in scenes and epochs, so they are the same anywhere."""

from dataclasses import dataclass

from ..scales import LETTERS_OFTEN, StageBudget


@dataclass(frozen=True)
class StudyScale:
    """Args:
    readout: (a) scenes to fit and to test the read-out of attributes.
    match_items, match_trials: (b) minimal pairs in all, and noise draws.
    align, finetune, questions: (c) both stages of every variant, and samples of `mini` to answer.
    captions, described: (d) the first stage with captions, and scenes of `mini_captions` to describe.
    leakage: (d) scenes to fit and to test the read-out of colours.
    asked: (e) questions to fit and to test the read-out of answers.
    pairs: (f) minimal pairs of each pattern.
    groups, group_size: (f) disjoint groups of scenes, each of which gives one CKA.
    heads: of the cross-attention fusion.
    """

    readout: tuple[int, int]
    match_items: int
    match_trials: int
    align: StageBudget
    finetune: StageBudget
    questions: int
    captions: StageBudget
    described: int
    leakage: tuple[int, int]
    asked: tuple[int, int]
    pairs: int
    groups: int
    group_size: int
    heads: int = 6


STUDY_SCALES = {
    "smoke": StudyScale(
        readout=(6, 4),
        match_items=9,
        match_trials=1,
        align=StageBudget(4, 1, 4),
        finetune=StageBudget(4, 1, 4, turns=2),
        questions=24,
        captions=StageBudget(4, 1, 4),
        described=4,
        leakage=(6, 6),
        asked=(12, 12),
        pairs=1,
        groups=2,
        group_size=4,
        heads=2,
    ),
    "mini": StudyScale(
        readout=(800, 400),
        match_items=90,
        match_trials=3,
        align=StageBudget(4000, 2, 32),
        finetune=StageBudget(8000, 4, 32, turns=5, patterns=LETTERS_OFTEN),
        questions=900,
        captions=StageBudget(3000, 4, 32),
        described=300,
        leakage=(1200, 800),
        asked=(2400, 1200),
        pairs=25,
        groups=8,
        group_size=64,
    ),
}

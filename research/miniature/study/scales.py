"""The budgets of the study, in scenes and epochs, so that they do not depend on the machine."""

from dataclasses import dataclass

from ..scales import LETTERS_OFTEN, StageBudget


@dataclass(frozen=True)
class StudyScale:
    """Budgets of the study's parts.

    Args:
        readout: (a) Scenes to fit and to test the read-out of attributes.
        match_items: (b) Minimal pairs in total.
        match_trials: (b) Noise draws.
        align: (c) Stage 1 of every variant.
        finetune: (c) Stage 2 of every variant.
        questions: (c) Samples of the benchmark `mini`.
        captions: (d) Stage 1 with captions.
        described: (d) Scenes of the benchmark `mini_captions`.
        leakage: (d) Scenes to fit and to test the read-out of colours.
        answers: (e) Questions to fit and to test the read-out of answers.
        pairs: (f) Minimal pairs per pattern.
        groups: (f) Disjoint groups of scenes, each of which gives one value of CKA.
        group_size: (f) Scenes per group.
        systems: (g) and (l) Stage 2 of every system.
        heads: Heads of the cross-attention fusion.
        transformer: (h) Scenes to fit and to test the read-outs of leakage.
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
    answers: tuple[int, int]
    pairs: int
    groups: int
    group_size: int
    systems: StageBudget
    heads: int = 6
    transformer: tuple[int, int] = (600, 400)


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
        answers=(12, 12),
        pairs=1,
        groups=2,
        group_size=4,
        heads=2,
        transformer=(6, 6),
        systems=StageBudget(4, 1, 4, turns=2),
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
        answers=(2400, 1200),
        pairs=25,
        groups=8,
        group_size=64,
        systems=StageBudget(4000, 4, 32, turns=5, patterns=LETTERS_OFTEN),
    ),
}

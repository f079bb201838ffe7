"""
Operations of the UNet's pass, whole and up to the papers' tap, counted on the meta device: what a cut can gain at most.

    python benchmarks/operations.py                     # SD 1.5, SD 2.1-base and SDXL, full size; takes seconds
"""

import torch
import typer
from features import Subject, unet_calls
from measure import Size, count_gflop
from rich.console import Console
from rich.table import Table


def main(size: Size = "full") -> None:
    """One prompt and both halves of the guidance, stock and ours."""
    table = Table("GFLOP", "whole UNet", "to the tap", "ratio", "both halves, whole", "ours", "ratio", box=None)
    for model in ("sd15", "sd21", "sdxl"):
        subject = Subject(model, size, torch.device("meta"), torch.float32, batch=1)
        cells = []
        with torch.inference_mode():
            for halves in (1, 2):
                whole, ours = (count_gflop(call)[0] for call in unet_calls(subject, halves).values())
                cells += [f"{whole:.0f}", f"{ours:.0f}", f"{whole / ours:.2f}"]
        table.add_row(model, *cells)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)

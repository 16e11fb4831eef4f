"""SCORE with each of its ingredients off: python -m benchmarks.ablation [--targets banana cat]

The validation's concepts, drawings and judges (benchmarks.validation), never a suite's; one erasure a row and target.
Rows are kept in runs/ablation as they are counted, so a killed run continues. Prints counts; --save writes them to
results/.
"""

import argparse
import json
import platform
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.validation import AIMS, Count, one, show

RESULTS = Path(__file__).parent / "results"
OFF = {
    "whole": (),
    "no game": ("adversarial=0",),
    "game that is not stationary at independence": ("form=flipped",),
    "nothing kept": ("kept=0",),
    "unconditional not kept": ("uncond=0",),
    "early states not kept": ("early=0",),
    "no direction": ("direction=0",),
    "direction for the first fifth only": ("warm=0.2",),
    "no mask": ("share=1",),
    "mask by Fisher": ("saliency=fisher",),
    "no R1": ("r1=0",),
}


def kept(job: tuple[str, str], args: argparse.Namespace) -> Count:
    """Count one row and target, or read what was counted before."""
    name, target = job
    file = args.out / Path(args.model).name / f"{name.replace(' ', '_')}-{target}.json"
    if not file.exists():
        own = argparse.Namespace(model=args.model, undo=False, set=[f"score.{pair}" for pair in OFF[name]])
        count = one(("score", target), own)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(asdict(count)))
        part.replace(file)
    found = json.loads(file.read_text())
    return Count(name, target, {judge: (a, b) for judge, (a, b) in found["hits"].items()})


def main() -> None:
    """Count every row on every target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--targets", nargs="*", default=["banana", "cat"], choices=list(AIMS))
    parser.add_argument("--rows", nargs="*", default=list(OFF), choices=list(OFF))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs") / "ablation")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/ablation-MODEL.json")
    args = parser.parse_args()
    jobs = [(name, target) for name in args.rows for target in args.targets]
    with torch.multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        counts = pool.map(partial(kept, args=args), jobs, chunksize=1)
    show(counts)
    if args.save:
        facts = {"model": args.model, "machine": platform.machine(), "torch": torch.__version__}
        facts |= {"off": OFF, "counts": [asdict(count) for count in counts]}
        (RESULTS / f"ablation-{Path(args.model).name}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()

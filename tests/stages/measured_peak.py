"""One erasure in a process of its own: prints by how many bytes its resident memory rose at the most.

Usage: python measured_peak.py MODEL METHOD JSON-OPTIONS FOLDER [checkpointing]. Linux only: the peak is in /proc.
"""

import json
import sys
from pathlib import Path

from expunge.core.eraser import Run
from expunge.stages import plan
from expunge.stages.erase import erase
from expunge.stages.recipe import ConceptEntry, MethodChoice, ModelChoice, Recipe, TargetEntry


def resident(field: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return 1024 * int(line.split()[1])


def planned(model: str, method: str, options: dict) -> Recipe:
    """The recipe of what `plan` rehearses."""
    (target,), (anchor,), (kept,) = plan.REQUEST.target, plan.REQUEST.anchor, plan.REQUEST.retain
    return Recipe(
        model=ModelChoice(name=model),
        method=MethodChoice(name=method, options=options),
        target=(TargetEntry(name=target.name, anchor=ConceptEntry(name=anchor.name)),),
        retain=(ConceptEntry(name=kept.name),),
    )


def measure(model: str, method: str, options: dict, folder: Path, checkpointing: bool) -> int:
    # what libraries load and allocate on first use is theirs, not the erasure's
    toy = "tiny-flux" if "flux" in model else "tiny-unet"
    erase(planned(toy, method, options), folder / "warm", Run(), recorded=False)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    erase(planned(model, method, options), folder / "run", Run(), recorded=False, checkpointing=checkpointing)
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(
        measure(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]), "checkpointing" in sys.argv[5:])
    )

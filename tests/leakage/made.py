"""An invented certificate whose controls hold."""

from expunge.leakage.record import (
    DELTA,
    Controls,
    Design,
    DetectorRow,
    FamilyRow,
    LeakageCertificate,
    Lower,
    Scope,
    Structural,
)

PATCH = "1" * 64


def made(*, bits: float, method: str = "uce", concept: str = "strawberry", patch: str = PATCH) -> LeakageCertificate:
    """Heads find `bits`, the one detector nothing, attribution a fifth."""
    return LeakageCertificate(
        scope=Scope(
            model_hash="0" * 64,
            patch_hash=patch,
            method=method,
            concept=concept,
            anchor="banana",
            prompts_hash="ab" * 32,
            tier="name and synonyms",
            threat="prompts",
            attack="none",
            budget="none",
            sampler="DDIMScheduler, 25 steps",
            cfg=4.0,
            n_prompts=250,
            images_per_prompt=1,
        ),
        design=Design(
            delta=DELTA,
            level="quick",
            splits=(125, 50, 75),
            tau=0.01,
            seed_policy="independent of C and of each other",
            clusters=250,
        ),
        lower=_lower(bits),
        attribution=_lower(bits / 5),
        detector=(
            DetectorRow(
                name="judge",
                hash="cd" * 32,
                thr=0.0,
                tpr=0.0,
                fpr=0.0,
                ci={"tpr": (0.0, 0.02), "fpr": (0.0, 0.02)},
                I_lo=0.0,
                I_hi=0.0183,
                sens=0.98,
                spec=0.99,
                corrected_rate_ci={
                    "concept": (0.0, 0.02),
                    "anchor": (0.0, 0.02),
                    "base-concept": (0.93, 1.0),
                    "difference": (-0.02, 0.02),
                },
            ),
        ),
        family=(FamilyRow(kind="pixels", B=1.0, n=500, vinfo_hi=0.2),),
        structural=Structural(),
        path=None,
        attack=(),
        controls=Controls(null_p=0.4, ceiling_bits=0.9, spike_limit=0.05, spike_power={"0.2": 1.0, "0.05": 0.85}),
    )


def _lower(bits: float) -> Lower:
    return Lower(head="pixels", acc=bits / 2, chan=0.0, log=bits, portfolio_bits=bits, tv_lo=bits, p=0.3)

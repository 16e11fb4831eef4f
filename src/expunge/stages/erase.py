"""Erase: recipe → artifact."""

import dataclasses
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import expunge
from expunge.core.card import Card
from expunge.core.concept import Concept, Request
from expunge.core.eraser import Eraser, Run
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.core.patch import Patch
from expunge.models.load import load as load_model
from expunge.stages import _chain, _files, artifact
from expunge.stages._prompts import without_encoders
from expunge.stages._provenance import code, source_of
from expunge.stages._training import Foreign, Halted, Training, halting
from expunge.stages._watching import Show, unseen, watching
from expunge.stages.recipe import ModelChoice, Recipe, read

# Last rows of two prompts nearer than this are one to the text encoder: batches of float32 round otherwise.
_SAME = 1e-5


def erase(
    recipe: Recipe,
    out: Path,
    run: Run,
    *,
    recorded: bool = True,
    checkpointing: bool = False,
    offload: bool = False,
    drop_encoders: bool = False,
    preview: int = 0,
    show: Show = unseen,
) -> Path:
    """Load the model, run the method, save recipe.toml and artifact/ in `out`; return the artifact.

    With `on` in the recipe's model, the method sees the model as that artifact leaves it, and what is saved holds both.
    A finished artifact of the same recipe and base is checked and kept; of another one it is an InputError that names
    both. The recipe's seed wins over the run's. `recorded=False` saves without naming the code and the card says so.
    checkpointing, offload: as `load` has them; no part of the recipe, as gradients are the same up to rounding.
    drop_encoders: no more is it: see `_prompts`; to certify and save, the model is opened again.
    preview: steps of training from one grid of pictures in out/preview/ to the next, 0 for none; `show` is told of
    each. In a team every process calls this; the first one writes. Raises InputError where the recipe has a budget, or
    the work is in parts, and the method trains nothing.
    """
    run = dataclasses.replace(run, seed=recipe.seed, accumulate=recipe.accumulate or 1)
    folder, eraser, request = out / "artifact", recipe.eraser(), recipe.request()
    before = artifact.load(Path(recipe.model.on)) if recipe.model.on else None
    if folder.exists():
        _check_finished(artifact.load(folder), recipe, eraser, request, run.parts)
    opened = partial(_loaded, recipe.model, run, checkpointing=checkpointing, offload=offload)
    model = opened()
    source = source_of(model, recipe.model.name)
    leads = run.team is None or run.team.rank == 0
    if folder.exists():
        _check_base(artifact.read_card(folder), source.revision, folder)
        return folder
    seen = before.on(model) if before else model
    check(seen, recipe.method.name, eraser, request)
    job = _job(recipe, eraser, request, run.parts)
    said = artifact.said(model, job)
    if before:
        _chain.check(before.card, before.patch, said, eraser.composes, before.folder)
    training = Training(out, of=_told(recipe, source.revision, run.parts), writes=leads)
    training.check()
    if drop_encoders:
        seen = model = without_encoders(seen, eraser, request, run, job.method)
    if not leads:
        _trained(job, seen, run, training, 0, unseen)
        return folder
    made_by, fresh, start = code(recorded=recorded), not out.exists(), time.monotonic()
    _begun(recipe, out, training)
    with _withdrawn(out, training, fresh):
        patch = _trained(job, seen, run, training, preview, show)
    seconds, model = time.monotonic() - start, opened() if drop_encoders else model
    whole = _chain.after(before.card, before.patch, said, patch) if before else patch
    artifact.save(folder, whole, model, job, source=source, made_by=made_by, seconds=seconds, log=training.rows)
    training.remove()
    return folder


def _loaded(choice: ModelChoice, run: Run, *, checkpointing: bool, offload: bool) -> Generator:
    run.progress(f"load {choice.name}", 0, 1)
    heavy = {"checkpointing": checkpointing, "offload": offload}
    model = load_model(choice.name, device=run.device, dtype=choice.dtype, **heavy)
    run.progress(f"load {choice.name}", 1, 1)
    return model


def _begun(recipe: Recipe, out: Path, training: Training) -> None:
    """Leave the recipe in the folder, and nothing of a killed writer."""
    out.mkdir(parents=True, exist_ok=True)
    for folder in (out, training.folder):
        _files.sweep(folder)
    recipe.write(out / "recipe.toml")


def _job(recipe: Recipe, eraser: Eraser, request: Request, parts: int) -> artifact.Job:
    return artifact.Job(
        method=recipe.method.name,
        eraser=eraser,
        given=tuple(recipe.method.options),
        request=request,
        seed=recipe.seed,
        budget=recipe.budget,
        parts=parts,
    )


def _trained(job: artifact.Job, model: Generator, run: Run, training: Training, preview: int, show: Show) -> Patch:
    """Run the method, watched and logged; refuse words about a training where there was none."""
    out, own = training.folder.parent, logged(run, training)
    watch = watching(model, job.request, own, out, budget=job.budget, preview=preview, show=show)
    own = dataclasses.replace(own, watch=watch)
    patch = halting(lambda kept: job.eraser.erase(model, job.request, dataclasses.replace(own, kept=kept)), training)
    asked = {"budget": job.budget is not None, "more than one loss a step": job.parts > 1}
    if any(asked.values()) and not any(row["name"] == "loss" for row in training.rows):
        what = next(name for name in asked if asked[name])
        raise InputError(f"method {job.method!r} trains nothing, so {what} has no meaning for it")
    return patch


def _told(recipe: Recipe, revision: str, parts: int) -> str:
    """Name all that the bits of a training depend on, but for the machine."""
    said = f"{recipe.to_toml()}\n{parts}\n{revision}\n{expunge.__version__}\n{torch.__version__}"
    return _files.sha256(said.encode())


@contextmanager
def _withdrawn(out: Path, training: Training, fresh: bool) -> Iterator[None]:
    """Leave no recipe, and no folder that was not there, of what a method refused, but all that can be gone on with."""
    try:
        yield
    except (Foreign, Halted):
        raise
    except InputError:
        training.remove()
        (out / "recipe.toml").unlink(missing_ok=True)
        if fresh and not any(out.iterdir()):  # previews stay
            out.rmdir()
        raise


def check(model: Generator, name: str, eraser: Eraser, request: Request) -> None:
    """Refuse what cannot work before any time is spent: a foreign family, unspeakable words, weights that hold NaN."""
    check_family(model, name, type(eraser))
    forms = ("{}", *getattr(eraser, "templates", ()))  # the encoder must not cut the sentences of a method either
    for concept in (*request.target, *request.anchor, *request.retain):
        for prompt in concept.prompts if concept else ():
            for form in forms:
                _check_sentence(model, concept, form.replace("{}", prompt))
    for path, _ in model.network.named_parameters():
        if not bool(model.weight(path).isfinite().all()):
            named = ", ".join(repr(concept.name) for concept in request.target)
            raise InputError(
                f"cannot erase {named}: base {model.name!r} holds values in {path} that are not finite; "
                "take another copy of it"
            )
    _check_apart(model, request)


def _check_sentence(model: Generator, concept: Concept | None, text: str) -> None:
    try:
        model.check_prompt(text)
    except InputError as error:
        raise InputError(f"concept {concept.name if concept else ''!r}: {error}") from None


def _check_apart(model: Generator, request: Request) -> None:
    """Refuse a target that the text encoder reads as another target or a retained concept, whatever their letters."""
    others = [*((c, "target") for c in request.target), *((c, "retained concept") for c in request.retain)]
    prompts = [(concept, role, prompt) for concept, role in others for prompt in concept.prompts]
    parts = [prompts[start : start + 64] for start in range(0, len(prompts), 64)]
    rows = torch.cat([model.encode([prompt for _, _, prompt in part]).subject for part in parts]).double()
    for i, (target, role, prompt) in enumerate(prompts):
        if role == "target":
            apart = (rows - rows[i]).norm(dim=1) / rows[i].norm()
            for other, whose, same in (prompts[j] for j in (apart < _SAME).nonzero().flatten().tolist()):
                if other is not target:
                    raise InputError(
                        f"target {target.name!r} ({prompt!r}) and {whose} {other.name!r} ({same!r}) read the same to "
                        f"{model.name!r}: nothing parts them; name one of them"
                    )


def check_family(model: Generator, name: str, method: type[Eraser]) -> None:
    """Raise InputError for a method that does not edit models of this family."""
    if model.family not in method.families:
        legal = ", ".join(sorted(method.families))
        raise InputError(f"method {name!r} edits {legal}; model {model.name!r} is of family {model.family!r}")


def logged(run: Run, training: Training) -> Run:
    """Return a run whose log also goes to an unfinished training, and which goes on where that was killed."""

    def log(name: str, step: int, value: float) -> None:
        run.log(name, step, value)
        training.log(name, step, value)

    return dataclasses.replace(run, log=log, kept=training)


def _check_same(card: Card, recipe: Recipe, eraser: Eraser, request: Request, parts: int, folder: Path) -> None:
    """Compare what the card says was done with what is asked; raises InputError naming both and the difference."""
    asked = _plain(
        {
            "method": recipe.method.name,
            "model": recipe.model.name,
            "dtype": recipe.model.dtype,
            "seed": recipe.seed,
            "budget": recipe.budget,
            "parts": parts,
            "config": dataclasses.asdict(eraser),
            "request": dataclasses.asdict(request),
        }
    )
    made = _plain(
        {
            "method": card.method,
            "model": card.base.name,
            "dtype": card.run.dtype,
            "seed": card.run.seed,
            "budget": card.run.budget,
            "parts": card.run.parts or 1,
            "config": card.config,
            "request": dataclasses.asdict(_request(card)),
        }
    )
    differ = [key for key in asked if asked[key] != made[key]]
    if differ:
        raise InputError(
            f"{folder} holds a finished artifact of {_title(card.method, _request(card))}; asked for "
            f"{_title(recipe.method.name, request)}, which differs in {', '.join(differ)}: choose another folder"
        )


def _check_finished(made: artifact.Artifact, recipe: Recipe, eraser: Eraser, request: Request, parts: int) -> None:
    """Compare what a folder holds with what is asked; a chain of edits by its recipe, as its card is of them all."""
    if not recipe.model.on:
        _check_same(made.card, recipe, eraser, request, parts, made.folder)
    elif read(made.folder.parent / "recipe.toml") != recipe:
        raise InputError(f"{made.folder} holds a finished artifact of another recipe: choose another folder")


def _check_base(card: Card, revision: str, folder: Path) -> None:
    # a folder of weights keeps its name when its content changes
    if card.base.revision != revision:
        raise InputError(
            f"{folder} holds a finished artifact of base {card.base.name!r} ({card.base.revision[7:19]}), "
            f"whose weights have changed since (now {revision[7:19]}): choose another folder"
        )


def _request(card: Card) -> Request:
    return Request(target=card.target, anchor=card.anchor, retain=card.retain)


def _title(method: str, request: Request) -> str:
    return f"{method} on {', '.join(concept.name for concept in request.target)}"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(values, default=dict))
    return plain

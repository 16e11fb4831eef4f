"""`expunge list`: what there is, without importing torch."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from expunge.cli.console import Out
from expunge.cli.facts import Facts, facts
from expunge.cli.options import Json
from expunge.core.registry import catalogue

listing = typer.Typer(help="List methods, models, suites, detectors or attacks.", no_args_is_help=True)


@listing.command()
def methods(json: Json = False) -> None:
    """List the erasers with their papers and settings."""
    screen = Out(machine=json)
    known = [facts(name, path) for name, path in catalogue("methods").items()]
    screen.emit({"methods": [_method(entry) for entry in known]})
    rows = [[entry.name, entry.description, entry.attributes.get("paper", ""), _status(entry)] for entry in known]
    screen.table(("method", "what it does", "paper", ""), rows)
    for entry in known:
        screen.say(f"\n{entry.name} --set " + " ".join(f"{field.name}={field.default}" for field in entry.fields))


def _method(entry: Facts) -> dict[str, Any]:
    return {
        "name": entry.name,
        "description": entry.description,
        "paper": entry.attributes.get("paper", ""),
        "families": entry.attributes.get("families", []),
        "reconstruction": entry.attributes.get("reconstruction", False),
        "uses_anchor": entry.attributes.get("uses_anchor", True),
        "uses_retain": entry.attributes.get("uses_retain", True),
        "fields": [asdict(field) for field in entry.fields],
    }


def _status(entry: Facts) -> str:
    return "reconstruction" if entry.attributes.get("reconstruction") else ""


@listing.command()
def models(json: Json = False) -> None:
    """List the models that have a name; any local diffusers folder works as well."""
    from expunge.models._names import EMBEDDED, TINY, embedded_names

    screen = Out(machine=json)
    known = [(name, "embedded", _weights(EMBEDDED / name)) for name in embedded_names()]
    known += [(name, "toy, random weights", 0) for name in TINY]
    screen.emit({"models": [{"name": name, "kind": kind, "bytes": size} for name, kind, size in known]})
    rows = [[name, kind, f"{size / 1e6:.1f} MB" if size else "–"] for name, kind, size in known]
    screen.table(("model", "kind", "weights"), rows)


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@listing.command()
def suites(json: Json = False) -> None:
    """List the suites with their targets."""
    from expunge.suites.load import catalogue as known_suites
    from expunge.suites.load import load

    screen = Out(machine=json)
    known = [load(name) for name in known_suites()]
    data = [
        {
            "name": suite.name,
            "version": suite.version,
            "sha256": suite.digest,
            "targets": [target.concept.name for target in suite.targets],
            "cases": len(suite.cases),
            "detectors": list(suite.detectors),
            "sampler": asdict(suite.sampler),
        }
        for suite in known
    ]
    screen.emit({"suites": data})
    rows = [
        [suite.name, str(len(suite.cases)), ", ".join(target.concept.name for target in suite.targets)]
        for suite in known
    ]
    screen.table(("suite", "cases", "targets"), rows)


@listing.command()
def detectors(json: Json = False) -> None:
    """List the detectors."""
    screen = Out(machine=json)
    known = [facts(name, path) for name, path in catalogue("detectors").items()]
    screen.emit({"detectors": [{"name": entry.name, "description": entry.description} for entry in known]})
    screen.table(("detector", "what it sees"), [[entry.name, entry.description] for entry in known])


@listing.command()
def attacks(json: Json = False) -> None:
    """List the attacks with what they may touch and their settings."""
    screen = Out(machine=json)
    known = [facts(name, path) for name, path in catalogue("attacks").items()]
    data = [
        {
            "name": entry.name,
            "description": entry.description,
            **{key: entry.attributes.get(key, "") for key in ("paper", "access", "threat", "families")},
            "fields": [asdict(field) for field in entry.fields],
        }
        for entry in known
    ]
    screen.emit({"attacks": data})
    rows = [[each["name"], each["description"], each["threat"], each["access"], each["paper"]] for each in data]
    screen.table(("attack", "what it does", "threat", "access", "paper"), rows)
    for entry in known:
        screen.say(f"\n{entry.name} --set " + " ".join(f"{field.name}={field.default}" for field in entry.fields))

"""Where an artifact came from: base model, package versions, commit, sources, memory."""

import hashlib
import inspect
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch
from torch import Tensor

import expunge
from expunge.core.card import Provenance
from expunge.core.errors import InputError
from expunge.core.generator import Generator
from expunge.models._folder import file_header
from expunge.models._names import EMBEDDED, TINY, embedded_names, parted
from expunge.stages import _files

PACKAGES = ("diffusers", "numpy", "peft", "safetensors", "torch", "transformers")
ROOT = Path(expunge.__file__).parent


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the base model came from."""

    name: str
    revision: str
    licence: str


def source_of(model: Generator, name: str) -> Source:
    """Describe a base model; its revision is the hash of its content, which no name or folder can replace unseen."""
    return Source(name=name, revision=f"sha256:{model_fingerprint(model)}", licence=_licence(name))


def _licence(name: str) -> str:
    """Return the `license:` line of the model folder's README, as hubs write it, or what a file's header says."""
    if name in TINY:
        return "none: random weights"
    if (found := parted(name)) is not None:
        about = file_header(found[0])
        return about.get("modelspec.license") or about.get("licence") or "not stated in the file"
    folder = EMBEDDED / name if name in embedded_names() else Path(name)
    readme = folder / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
    stated = [line.partition(":")[2].strip() for line in lines if line.startswith("license:")]
    return stated[0] if stated else "not stated in the model folder"


def model_fingerprint(model: Generator) -> str:
    """SHA-256 over everything a base model draws with: all tensors of all components, and its scheduler's settings."""
    settings = json.dumps(sampler_settings(model), sort_keys=True, default=str)
    return _files.sha256((settings + hash_tensors(model.network.state_dict())).encode())


def sampler_settings(model: Generator) -> dict[str, object]:
    """Return the settings of a denoiser's scheduler; token models have none."""
    scheduler = getattr(model, "scheduler", None)
    found = dict(scheduler.config) if scheduler is not None else {}
    # diffusers' private entries list names in an order that changes from process to process
    return {key: value for key, value in found.items() if not key.startswith("_")}


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def packages() -> dict[str, str]:
    """Return the versions of Python, this library and what it computes with; an absent optional package is left out."""
    found = {"python": platform.python_version(), "expunge": expunge.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> tuple[str | None, bool | None]:
    """Return the commit of the library's source and whether the source differs from it.

    Found in the git checkout that tracks this package, or else in pip's record of a `git+https` install; (None, None)
    for a wheel or an unpacked archive, which have none. Raises InputError where there is one that git does not tell.
    """
    if not (ROOT.parents[1] / ".git").exists() and _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return _pinned_commit()
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", ".")
    if not head or changes is None:
        raise InputError(f"{ROOT} is a git checkout, but git does not tell its commit; pass --no-provenance to go on")
    return head, bool(changes)


def package_sha256(root: Path = ROOT) -> str:
    """SHA-256 over the names and contents of all Python files below a folder, sorted by name."""
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        digest.update(f"{file.relative_to(root).as_posix()} {_files.sha256(file.read_bytes())}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Code:
    """Which code is running: the sources' hash, and their commit where they came out of git."""

    sha256: str | None
    commit: str | None
    dirty: bool | None


def code(*, recorded: bool) -> Code:
    """Find out which code is running, or nothing if it shall not be recorded; raises InputError as `commit` does.

    To be asked before the work: source files may change while it runs.
    """
    if not recorded:
        return Code(sha256=None, commit=None, dirty=None)
    head, dirty = commit()
    return Code(sha256=package_sha256(), commit=head, dirty=dirty)


def provenance(
    method: type,
    run: Mapping[str, object],
    seconds: float,
    made_by: Code,
    *,
    budget: float | None = None,
    parts: int = 1,
) -> Provenance:
    """Collect everything about how a patch was made; `run` holds seed, device and dtype."""
    return Provenance(
        seed=int(str(run["seed"])),
        device=str(run["device"]),
        dtype=str(run["dtype"]),
        seconds=round(seconds, 3),
        peak_bytes=_peak_bytes(),
        packages=packages(),
        source_sha256=_files.sha256(Path(inspect.getfile(method)).read_bytes()),
        package_sha256=made_by.sha256,
        commit=made_by.commit,
        dirty=made_by.dirty,
        recorded=made_by.sha256 is not None,
        budget=budget,
        parts=parts if parts > 1 else None,
    )


def _git(*words: str) -> str | None:
    # safe.directory: the checkout may belong to another user (containers); reading it is harmless
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _pinned_commit() -> tuple[str | None, bool | None]:
    try:
        text = distribution("expunge").read_text("direct_url.json")
    except PackageNotFoundError:
        return None, None
    pinned = json.loads(text).get("vcs_info", {}).get("commit_id") if text else None
    return (pinned, False) if pinned else (None, None)


def _peak_bytes() -> int:
    # resident set of this process; Linux counts KiB, macOS bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""What can be said without asking anybody: packages, settings, switches, keys."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import os
import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tlm_tracing import _config
from tlm_tracing._doctor._check import Check, ok, problem, skipped, told
from tlm_tracing.exceptions import ConfigurationError

OPENAI_KEY = "OPENAI_API_KEY"
CLEANLAB_KEY = "CLEANLAB_TLM_API_KEY"

# The same module in a smaller package.
_INSTEAD = {"mlflow": "mlflow-tracing"}
_ELSEWHERE = "CLEANLAB_API_BASE_URL"
_SAMPLING = "MLFLOW_TRACE_SAMPLING_RATIO"
_NO_OPENTELEMETRY = "OTEL_SDK_DISABLED"
_COPY_AGAIN = "Copy the key again: without quotes, blanks or line breaks, and nothing else."


def versions() -> Iterator[Check]:
    """Python and the packages, against what this package's own metadata asks for."""
    try:
        wanted = SpecifierSet(metadata.metadata("tlm_tracing")["Requires-Python"] or "")
        requirements = [Requirement(text) for text in metadata.requires("tlm_tracing") or ()]
    except metadata.PackageNotFoundError:
        yield problem(
            "tlm_tracing", "is not installed, only its files are there.", "Install it with pip."
        )
        return
    yield _python(wanted)
    for requirement in sorted(requirements, key=lambda one: one.name):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def _python(wanted: SpecifierSet) -> Check:
    version = platform.python_version()
    if wanted.contains(version, prereleases=True):
        return ok("python", version)
    return problem("python", f"{version} is not supported.", f"Use Python {wanted}.")


def _package(requirement: Requirement) -> Check:
    name = requirement.name
    installed = _installed(name) or _installed(_INSTEAD.get(name, name))
    install = f'Run: pip install "{name}{requirement.specifier}"'
    if installed is None:
        return problem(name, "is not installed.", install)
    name, version = installed
    if not requirement.specifier.contains(version, prereleases=True):
        return problem(name, f"{version} is not supported ({requirement.specifier}).", install)
    if name in _INSTEAD and (small := _installed(_INSTEAD[name])) and small[1] != version:
        return problem(
            name,
            f"{version} is installed beside {' '.join(small)}, whose files are the same.",
            f'Run: pip install "{name}=={version}" "{small[0]}=={version}"',
        )
    try:
        importlib.import_module(requirement.name.replace("-", "_"))
    except Exception as error:
        return problem(name, f"{version} can't be imported: {told(error)}", "Install it anew.")
    return ok(name, version)


def _installed(name: str) -> tuple[str, str] | None:
    try:
        return name, metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def settings() -> Iterator[Check]:
    """What is set by ``TLM_TRACING_...``; values are not told, they may be anything."""
    known = _config.environment_names()
    near = [name for name in sorted(os.environ) if name.upper().startswith("TLM_TRAC")]
    faults = _config.environment_faults()
    for name in near:
        if name in faults:
            yield problem(name, f"{faults[name]}. Nothing is recorded.", "Change it or unset it.")
        elif name not in known:
            yield _unknown(name, known)
    right = [name for name in near if name in known and name not in faults]
    if right or not near:
        yield ok("settings", f"from {', '.join(right)}" if right else "none in the environment")


def _unknown(name: str, known: list[str]) -> Check:
    if name.upper() in known:
        return problem(name, "is not read: names are in capitals.", f"Set {name.upper()}.")
    setting = name.rpartition("TLM_TRACING_")[2].lower()
    if setting in {field.name for field in dataclasses.fields(_config.Config)}:
        return problem(
            name,
            "is not read: the environment can't give this setting.",
            f"Use tlm_tracing.configure({setting}=...).",
        )
    likely = difflib.get_close_matches(name.upper(), known, 1, 0.8)
    advice = f"Did you mean {likely[0]}?" if likely else f"There are: {', '.join(known)}."
    return problem(name, "is no setting.", advice)


def switches() -> Iterator[Check]:
    """What turns recording or scoring off."""
    try:
        config = _config.base()
    except ConfigurationError:
        yield skipped("recording", "the settings have to be right first")
    else:
        yield _recording(config)
    yield _opentelemetry() or _sampling()


def _recording(config: _config.Config) -> Check:
    if not config.enabled:
        return problem(
            "recording",
            "TLM_TRACING_ENABLED is false: nothing is recorded or scored.",
            "Unset TLM_TRACING_ENABLED, if that is not what you want.",
        )
    if config.mode == "off":
        return ok("recording", "on; scoring is off by TLM_TRACING_MODE")
    return ok("recording", f"on, scores in mode {config.mode}")


def _opentelemetry() -> Check | None:
    if os.environ.get(_NO_OPENTELEMETRY, "").strip().lower() != "true":
        return None
    return problem(
        "sampling",
        f"{_NO_OPENTELEMETRY} is true: MLflow, which traces by OpenTelemetry, records nothing.",
        f"Unset {_NO_OPENTELEMETRY}.",
    )


def _sampling() -> Check:
    text = os.environ.get(_SAMPLING)
    try:
        ratio = 1.0 if text is None else float(text)
    except ValueError:
        ratio = math.nan
    if not 0 <= ratio <= 1:
        return problem("sampling", f"{_SAMPLING} is no number from 0 to 1.", "Change or unset it.")
    if ratio == 0:
        return problem(
            "sampling", f"{_SAMPLING} is 0: MLflow records nothing.", f"Unset {_SAMPLING}."
        )
    return ok("sampling", f"MLflow records {ratio:.4g} of all traces" if text else "every trace")


def keys() -> Iterator[Check]:
    """Whether the keys are there and can be keys; nothing of them is told."""
    yield _key(OPENAI_KEY, "Set it to a key from https://platform.openai.com/api-keys.")
    yield _key(
        CLEANLAB_KEY,
        "Set it to a key from https://tlm.cleanlab.ai; without one nothing is scored.",
    )


def _key(name: str, get_one: str) -> Check:
    key = os.environ.get(name)
    if key is None:
        if name == OPENAI_KEY and os.environ.get("AZURE_OPENAI_API_KEY"):
            return skipped(name, "is not set, AZURE_OPENAI_API_KEY is")
        if name == CLEANLAB_KEY and not _wants_hosted():
            return skipped(name, "is not set, nor needed: TLM_TRACING_SCORER is none")
        return problem(name, "is not set.", get_one)
    if not key.strip():
        return problem(name, "is blank.", get_one)
    if (fault := _config.key_fault(key)) is not None:
        return problem(name, f"{fault}.", _COPY_AGAIN)
    if name == CLEANLAB_KEY and key.startswith("sk-") and not os.environ.get(_ELSEWHERE):
        return problem(name, "is a key for OpenAI by its looks.", get_one)
    return ok(name, "is set")


def _wants_hosted() -> bool:
    return os.environ.get("TLM_TRACING_SCORER", "").strip().lower() != "none"

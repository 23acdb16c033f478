"""Packages: torch and what it was built for, those that training needs, and those that make it faster."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache
from importlib import metadata

from packaging.requirements import Requirement

from metro_megatron import nvidia
from metro_megatron.machine.finding import Finding

SOURCE = "pip install -c constraints.txt -e ."
EXTRAS = {
    "finetune": "fine-tuning",
    "parquet": "Parquet as input",
    "ray": "preprocessing on a Ray cluster",
}
"""What an extra of setup.cfg is for, of those that a cluster's user may want."""


def packages(wants_gpu: bool) -> Iterator[Finding]:
    """Everything that is installed, or might be."""
    yield from _torch(wants_gpu)
    yield _required()
    if not torch_fault():
        yield from _kernels(wants_gpu)
    yield from _extras()


@cache
def torch_fault() -> str:
    """Why torch does not load; empty where it does."""
    try:
        import torch  # noqa: F401
    except (ImportError, OSError) as error:
        return str(error).strip().splitlines()[0]
    return ""


def _torch(wants_gpu: bool) -> Iterator[Finding]:
    if fault := torch_fault():
        remedy = f"pip uninstall torch, and again: {SOURCE}"
        yield Finding("torch", "wrong", fault, "nothing can be trained", remedy, is_needed=True)
        return
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    if torch.version.cuda or not wants_gpu:
        yield Finding("torch", "works", f"{torch.__version__}, built for {built}")
    else:
        yield Finding(
            "torch",
            "wrong",
            f"{torch.__version__} is built for {built}",
            "no GPU is used",
            "pip install --force-reinstall torch, from the index of a CUDA that the driver knows (pytorch.org)",
            is_needed=True,
        )
    if wants_gpu and torch.version.cuda:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        yield Finding("NCCL", "works", f"{version}, torch's own")


def _required() -> Finding:
    """What setup.cfg requires, by release."""
    try:
        requirements = requirements_of("metro_megatron")
    except metadata.PackageNotFoundError:
        return Finding("packages", "wrong", "metro_megatron itself is not installed", "", SOURCE, is_needed=True)
    always = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    misfits = [fault for one in always if (fault := misfit(one))]
    if misfits:
        return Finding("packages", "wrong", "; ".join(misfits), "it may fail anywhere", SOURCE, is_needed=True)
    return Finding("packages", "works", f"all {len(always)} that setup.cfg requires, in its ranges")


def requirements_of(package: str) -> list[Requirement]:
    """What an installed package requires, its extras too. Raises PackageNotFoundError."""
    return [Requirement(line) for line in metadata.requires(package) or []]


def misfit(requirement: Requirement) -> str:
    """What is wrong with the installed release of a package; empty where nothing is."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed, {requirement.specifier} is needed"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} is {version}, {requirement.specifier} is needed"


def _kernels(wants_gpu: bool) -> Iterator[Finding]:
    """What makes training on a GPU faster; said, but missed by no CPU."""
    from fused.dispatch import LEAST_TRITON, MISSING, WITHOUT

    if WITHOUT:
        least = ".".join(map(str, LEAST_TRITON))
        cost = "attention, LayerNorm and the vocabulary's loss in plain torch: slower, and more memory"
        found = MISSING or f"{_version('triton')}, kernels need {least}"
        yield Finding("Triton", "absent", found, cost if wants_gpu else "", f"pip install 'triton>={least}'")
    else:
        yield Finding("Triton", "works", _version("triton"))
    for subject, package, fault_of, cost in (
        ("Transformer Engine", "transformer_engine", nvidia.transformer_engine_fault, "no FP8"),
        ("Apex", "apex", nvidia.apex_fault, "nothing: torch's fused Adam does as well"),
    ):
        is_there = importlib.util.find_spec(package) is not None  # before one that does not load is hidden
        if not (wants_gpu or is_there):
            continue
        if fault := fault_of():  # which names what mends it
            yield Finding(subject, "wrong" if is_there else "absent", fault, cost)
        else:
            yield Finding(subject, "works", _version(package))


def _extras() -> Iterator[Finding]:
    try:
        import gigatoken  # noqa: F401
    except (ImportError, OSError) as error:
        yield Finding(
            "gigatoken", "wrong", str(error), "preprocessing encodes several times slower", "pip install gigatoken"
        )
    else:
        yield Finding("gigatoken", "works", metadata.version("gigatoken"))
    try:
        requirements = requirements_of("metro_megatron")
    except metadata.PackageNotFoundError:
        return  # said above
    for extra, purpose in EXTRAS.items():
        own = [one for one in requirements if one.marker and one.marker.evaluate({"extra": extra})]
        own = [one for one in own if not one.marker or not one.marker.evaluate({"extra": ""})]
        faults = [fault for one in own if (fault := misfit(one))]
        if faults:
            remedy = f"pip install -c constraints.txt -e '.[{extra}]'"
            yield Finding(f"extra {extra}", "absent", "; ".join(faults), f"no {purpose}", remedy)
        else:
            yield Finding(f"extra {extra}", "works", purpose)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # built in place
        return "built in place"

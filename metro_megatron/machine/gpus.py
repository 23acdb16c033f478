"""GPUs: what they do when asked to compute and to talk."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from fused.dispatch import describe
from metro_megatron.machine.driver import SMI
from metro_megatron.machine.finding import Finding
from metro_megatron.plan.gpus import peak_tflops

LEAST_SHARE = 0.5
"""Of the data sheet's rate, that large products in bf16 reach on a healthy GPU; they reach some 0.7."""
SIZE = 8192
"""Of the matrices."""
SUMMED = 64 << 20
"""FP32 numbers."""


def gpus(wanted: int) -> Iterator[Finding]:
    """Whether those that are wanted can be used, and each works."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        remedy = "a newer driver, or a torch built for an older CUDA; and CUDA_VISIBLE_DEVICES must name GPUs"
        yield Finding("CUDA", "wrong", str(error).splitlines()[0], "no GPU is used", remedy, is_needed=True)
        return
    count = torch.cuda.device_count()
    if count < wanted:
        found = f"{count} GPUs can be used, {wanted} are wanted"
        yield Finding("GPUs", "wrong", found, "", f"CUDA_VISIBLE_DEVICES, or --gpus {count}", is_needed=True)
    for number in range(count):
        yield _at_work(torch.device("cuda", number))
    if count > 1:
        yield _in_talk(count)


@torch.no_grad()
def _at_work(device: torch.device) -> Finding:
    """Large products, whose result is known and whose rate is compared with the data sheet's."""
    subject = f"GPU {device.index} at work"
    try:
        ones = torch.ones(SIZE, SIZE, dtype=torch.bfloat16, device=device)
        product = ones @ ones
        rate = _rate(ones)
        if not bool((product == SIZE).all()):
            remedy = "take it out: whatever it trains is wrong"
            return Finding(subject, "wrong", f"a product of ones is not {SIZE}", "", remedy, is_needed=True)
    except RuntimeError as error:
        remedy = f"see who uses it ({SMI}); another machine if it comes again"
        return Finding(subject, "wrong", str(error).splitlines()[0], "", remedy, is_needed=True)
    peak = peak_tflops(torch.cuda.get_device_name(device), "bf16")
    share = f", {rate / peak:.0%} of its data sheet" if peak else ""
    if peak and rate < LEAST_SHARE * peak:
        cost = "all ranks wait for the slowest GPU"
        return Finding(
            subject, "wrong", f"{rate:,.0f} TFLOP/s in bf16{share}", cost, f"see who uses it ({SMI}), clocks"
        )
    return Finding(subject, "works", f"{rate:,.0f} TFLOP/s in bf16{share}. {describe(device)}")


@torch.no_grad()
def _in_talk(count: int) -> Finding:
    """A sum over all GPUs of this machine, whose result is known."""
    subject = f"NCCL between {count} GPUs"
    remedy = "NCCL_DEBUG=INFO says how they are joined"
    try:
        parts = [torch.full((SUMMED,), number + 1.0, device=f"cuda:{number}") for number in range(count)]
        torch.cuda.nccl.all_reduce(parts)
        torch.cuda.synchronize()
        if any(bool((part != count * (count + 1) / 2).any()) for part in parts):
            return Finding(subject, "wrong", "a sum over them is wrong", "", remedy, is_needed=True)
        start = time.monotonic()
        torch.cuda.nccl.all_reduce(parts)
        for number in range(count):
            torch.cuda.synchronize(number)
    except RuntimeError as error:
        return Finding(subject, "wrong", str(error).splitlines()[0], "", remedy, is_needed=True)
    # What each link has to carry of a ring's sum.
    moved = 2 * (count - 1) / count * 4 * SUMMED
    return Finding(subject, "works", f"{moved / (time.monotonic() - start) / 1e9:,.0f} GB/s of bus bandwidth")


def _rate(ones: torch.Tensor, repeats: int = 20) -> float:
    """TFLOP/s of products of a square matrix with itself."""
    torch.cuda.synchronize(ones.device)
    start = time.monotonic()
    for _ in range(repeats):
        ones @ ones
    torch.cuda.synchronize(ones.device)
    return repeats * 2 * ones.size(0) ** 3 / (time.monotonic() - start) / 1e12

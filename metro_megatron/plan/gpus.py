"""What GPUs can do at best, and how much of it is reckoned with."""

from __future__ import annotations

from dataclasses import dataclass

NODE = 8
"""GPUs that NVLink joins."""


@dataclass(frozen=True)
class Gpu:
    """Data sheet figures of one GPU in a node of NODE; bandwidths in bytes a second, of links per direction."""

    tflops: float
    """Dense matrix products in bf16 or fp16, FP32 sums."""
    tflops_fp32: float
    """Of FP32 without TF32, torch's default."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    nvlink: float
    network: float
    """Of the adapter that each GPU of a node has: HDR 200 Gb/s (DGX A100), NDR 400 Gb/s (DGX H100 and later)."""
    devices: tuple[str, ...]
    """Names that the driver gives to devices of this peak."""

    def peak(self, precision: str) -> float:
        """TFLOP/s of a run in train.precision."""
        return self.tflops_fp32 if precision == "fp32" else self.tflops


GPUS = {
    "a100-40g": Gpu(312, 19.5, 40e9, 1.555e12, 300e9, 25e9, ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")),
    "a100-80g": Gpu(312, 19.5, 80e9, 2.039e12, 300e9, 25e9, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
    "h100": Gpu(989, 67, 80e9, 3.35e12, 450e9, 50e9, ("NVIDIA H100 80GB HBM3",)),
    "h200": Gpu(989, 67, 141e9, 4.8e12, 450e9, 50e9, ("NVIDIA H200",)),
    "b200": Gpu(2250, 75, 180e9, 8.0e12, 900e9, 50e9, ("NVIDIA B200",)),
}
"""By the name that tools/plan.py takes: NVIDIA's data sheets of the SXM modules, without sparsity."""


def peak_tflops(device: str, precision: str) -> float | None:
    """Of a device by the driver's name, in a run of this precision; None where it is not known."""
    return next((gpu.peak(precision) for gpu in GPUS.values() if device in gpu.devices), None)

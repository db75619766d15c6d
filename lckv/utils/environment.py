"""What a run records about where it ran: versions, the machine, a GPU's peak speed and the peak memory."""

from __future__ import annotations

import os
import platform
import re
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import lckv
from lckv.utils.processes import SPIN_COUNT

# Dense tensor-core FLOP/s with 16-bit inputs, from the makers' data sheets; the first name found in the device's wins.
_PEAK_FLOPS_16_BIT = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A30": 165e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def versions() -> dict[str, str]:
    """What figures were made with."""
    return {
        "lckv": lckv.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """What decides how fast a process of this machine computes.

    Returns:
        `device`: the name of the accelerator, or of the processor; `num_cores`: of the machine; `num_threads`: of this
        process; `spin_count`: for how many turns they wait before they sleep, if that was said.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    threads = {"num_threads": torch.get_num_threads(), "spin_count": os.environ.get(SPIN_COUNT)}
    return {"device": name, "num_cores": os.cpu_count(), **threads}


def _processor_name() -> str:
    """Linux tells the model only there; elsewhere the architecture must do."""
    file = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", file.read_text(), re.MULTILINE) if file.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device, or `None` where it is not known.

    Args:
        device: where the model trains.
        precision: as in `trainer.precision`. For "fp32" there is no figure: it depends on whether TF32 is allowed.
    """
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_FLOPS_16_BIT.items() if key in name), None)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: of the GPU by torch, else of the machine by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

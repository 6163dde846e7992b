"""What a measurement ran on."""

import os
import platform
from pathlib import Path

import torch


def hardware() -> str:
    """Processor and what of it torch uses, or the GPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")] or [platform.processor()]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    return f"{names[0]}, {os.cpu_count()} cores; {device}"

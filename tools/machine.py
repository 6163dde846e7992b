"""What tools run on."""

import argparse
import os
import platform
from pathlib import Path

import torch


def processor() -> str:
    """The processor's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def hardware(device: str | None = None) -> str:
    """The processor, and what of it torch uses or the GPU; of the device, or of the GPU if there is one."""
    on_gpu = torch.cuda.is_available() if device is None else device != "cpu"
    device = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)"
    return f"{processor()}, {os.cpu_count()} cores; {device}"


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=_device, default=default, help="default: a GPU if there is one")


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text} is no device; use cuda or cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch finds no GPU and driver; use cpu")
    return device

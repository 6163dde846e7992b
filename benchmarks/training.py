"""One training step of a trunk: the dense model's full fine-tune against the short fine-tune of adaptive ones."""

import torch

from apt_backbones.freeze import is_new

from .cases import Case, core
from .clock import Laps, saved_bytes
from .hosts import Trunk
from .images import Batch


class TrainingStep(Trunk):
    """Forward and backward in mixed precision. Dense modes train all weights at full resolution; adaptive ones only
    ConvDown and ZeroMLP, with everything else frozen (APT, arXiv 2510.18091, section 3.4). No optimizer step."""

    measures = {"training step": None}

    def __init__(self, cases: list[Case], batches: list[Batch], device: torch.device, dtype: torch.dtype):
        # Without new layers there is nothing to fine-tune.
        trainable = [case for case in cases if not case.is_adaptive or case.name.startswith("apt")]
        super().__init__(trainable, batches, device, torch.float32)
        self.precision = dtype

    def step(self, case: Case, batch: Batch, lap: Laps) -> None:
        self._loss(case, batch).backward()
        lap("training step")
        case.model.zero_grad()

    def _loss(self, case: Case, batch: Batch) -> torch.Tensor:
        for name, parameter in case.model.named_parameters():
            parameter.requires_grad_(is_new(name) or not case.is_adaptive)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            return sum(feature_map.float().square().mean() for feature_map in self.forward(case, batch))

    def describe(self) -> None:
        super().describe()
        for case in self.cases:
            batch = self.batches[0]
            activations = saved_bytes(lambda: self._loss(case, batch), core(case.model))  # noqa: B023
            trained = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
            case.gflops = {}  # of the forward pass only; what the backward pass adds depends on what trains
            case.extra = {
                "activations_gb": activations / 1e9,
                "gradients_gb": sum(parameter.nbytes for parameter in trained) / 1e9,
                "trained_parameters": sum(parameter.numel() for parameter in trained),
            }

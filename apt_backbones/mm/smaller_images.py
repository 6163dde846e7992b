"""What merging competes with: a network that learned, without labels, to read smaller images."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ..distance import merging_off
from ..distill import ViewSettings
from .feature_matching import Matching, distance_from, train


class SmallerImages(Matching):
    """The model learns to say of smaller images what it says of whole ones, without merging. All is frozen but low-rank
    additions to every linear layer of the trunk's blocks (LoRA, arXiv 2106.09685).

    Args:
        model, outputs, loss: see ``Matching``; outputs of maps are resampled to the whole image's cells.
        sizes: height and width of the smaller image in pixels, of every iteration.
        rank: of the additions.
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Callable[[Tensor], Tensor],
        sizes: Sequence[tuple[int, int]],
        loss: str = "features",
        rank: int = 16,
    ):
        super().__init__(model.eval().requires_grad_(False), outputs, loss)
        # timm's EVA multiplies by the weight itself, past what LoRA adds, unless the bias is added afterwards.
        self.fused = [part for part in self.trunk.modules() if getattr(part, "qkv_bias_separate", True) is False]
        for part in self.fused:
            part.qkv_bias_separate = True
        within = self.trunk.blocks.named_modules(prefix="blocks")
        layers = [name for name, layer in within if isinstance(layer, nn.Linear)]
        options = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
        self.lora = [get_peft_model(self.trunk, options)]  # in a list: its weights belong to the model
        self.sizes = sizes
        self.register_buffer("iteration", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> "SmallerImages":
        return super().train(False)

    def forward(self, pixels: Tensor, mode: str = "loss") -> dict[str, Tensor]:
        """``loss``, and for the log ``distance``, the same."""
        pixels = pixels.float()
        smaller = F.interpolate(pixels, self.sizes[self.iteration], mode="bicubic", antialias=True)
        self.iteration += 1
        with merging_off(self.trunk):
            with torch.no_grad(), self.lora[0].disable_adapter():
                dense = self.outputs(pixels).float()
            found = self.outputs(smaller).float()
        if found.shape != dense.shape:
            found = F.interpolate(found, dense.shape[2:], mode="bilinear")
        distance = distance_from(dense, found, self.loss)
        return {"loss": distance, "distance": distance.detach()}

    def merge(self) -> None:
        """Add what was learned to the layers themselves, so that it costs nothing."""
        self.lora[0].merge_and_unload()
        for part in self.fused:
            part.qkv_bias_separate = False


def finetune_for_smaller_images(
    model: nn.Module,
    outputs: Callable[[Tensor], Tensor],
    sizes: Sequence[tuple[int, int]],
    paths: Sequence[Path],
    views: ViewSettings,
    work_dir: Path,
    loss: str = "features",
    rank: int = 16,
    iterations: int = 450,
    **options,
) -> dict[str, list[float]]:
    """Tune a model's trunk in place, with LoRA that is merged in the end, to read smaller images; an interrupted run
    goes on from its last checkpoint.

    Args:
        model, outputs, loss, rank: see ``SmallerImages``.
        sizes: heights and widths of smaller images, which take turns at random.
        paths, views, work_dir, iterations, options: see ``train``; views are whole images.

    Returns:
        The curve: "distance" -> value of every iteration.

    Raises:
        ValueError: fewer than 2 iterations.
    """
    chance = random.Random(0)
    turns = [chance.choice(sizes) for _ in range(iterations)]
    matching = SmallerImages(model, outputs, turns, loss, rank)
    curve = train(matching, paths, views, work_dir, iterations, **options)
    matching.merge()
    return curve

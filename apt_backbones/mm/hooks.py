"""How many tokens a run keeps, beside its loss and metrics."""

from collections.abc import Sequence

import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook, LoggerHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from ..embed import AdaptivePatchEmbed
from ..layout import PatchLayout

_RESUMED = "token_counts"  # name in the message hub, which checkpoints carry


@HOOKS.register_module()
class TokenCountHook(Hook):
    """Report the share of tokens that adaptive trunks keep, content and padding apart.

    A token is content if its patch begins inside the image, and padding if it begins in what a batch adds at the right
    and bottom (``img_shape`` of the data samples tells). Per logging interval in training, and at the end of a
    validation or test, it logs

    - ``tokens``: patch tokens per image, padding included;
    - ``content_kept``, ``padding_kept``: tokens / base cells over all images;
    - ``..._kept_min``, ``..._kept_max``: the same of the image with the smallest and the largest share;
    - ``images_per_batch``, not in training: the mean of one process, whose last batch may be smaller than the others.

    Padding is not reported if there is none. At the end of a test they are among the metrics that the run returns.
    Host and device synchronize only when reporting. A model without an adaptive trunk has nothing to report.
    """

    def __init__(self):
        self._counts: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
        self._mode = "train"
        self._shapes: list[Sequence[int]] = []
        self._handles: list[RemovableHandle] = []

    def before_run(self, runner: Runner) -> None:
        embeddings = [module for module in runner.model.modules() if isinstance(module, AdaptivePatchEmbed)]
        if not embeddings:
            print_log("TokenCountHook: the model has no adaptive trunk, so no tokens are counted", "current")
        self._handles = [embedding.register_forward_pre_hook(self._count) for embedding in embeddings]

    def after_run(self, runner: Runner) -> None:
        for handle in self._handles:
            handle.remove()

    def before_train(self, runner: Runner) -> None:
        if _RESUMED in runner.message_hub.runtime_info:
            self._counts["train"] = runner.message_hub.get_info(_RESUMED)
        runner.message_hub.update_info(_RESUMED, self._counts["train"])

    def before_val_epoch(self, runner: Runner) -> None:
        self._counts["val"].clear()

    def before_test_epoch(self, runner: Runner) -> None:
        self._counts["test"].clear()

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, mode: str = "train") -> None:
        self._mode = mode
        samples = data_batch.get("data_samples", ())
        # Test-time augmentation gives a list per augmentation; images without a shape are all content.
        self._shapes = [sample.img_shape[:2] for sample in samples if "img_shape" in sample]

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: dict | None = None
    ) -> None:
        interval = next((hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)), 1)
        if self.every_n_inner_iters(batch_idx, interval):
            self._report(runner, "train")

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        metrics.update(self._report(runner, "val", runner.val_dataloader))

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        metrics.update(self._report(runner, "test", runner.test_dataloader))

    def _count(self, embedding: nn.Module, inputs: tuple) -> None:
        layout = inputs[1]
        # Several crops of one image go through together in segmentation's sliding tests.
        is_cropped = layout.batch_size != len(self._shapes)
        height, width = (cells * layout.patch_size for cells in layout.grid)
        shapes = [(height, width)] * layout.batch_size if is_cropped else self._shapes
        self._counts[self._mode].append(count_tokens(layout, shapes).detach())

    def _report(self, runner: Runner, mode: str, loader: DataLoader | None = None) -> dict[str, float]:
        counts = [count.cpu() for count in self._counts[mode]]
        self._counts[mode].clear()
        counts = [count for of_process in all_gather_object(counts) for count in of_process]
        shares = token_shares(torch.cat(counts)) if counts else {}
        if shares and loader is not None:
            shares["images_per_batch"] = len(loader.sampler) / len(loader)
        for name, value in shares.items():
            runner.message_hub.update_scalar(f"{mode}/{name}", value)
        return shares


def count_tokens(layout: PatchLayout, image_shapes: Sequence[Sequence[int]]) -> Tensor:
    """Per image: content tokens, content cells, padding tokens, padding cells; int64 (B, 4) on the layout's device.

    Args:
        layout: a batch.
        image_shapes: (height, width) in pixels of each image before padding. A batch that is smaller than its images,
            as a sliding window is, is all content.
    """
    height, width = layout.grid
    cells = [
        (min(-(-rows // layout.patch_size), height), min(-(-columns // layout.patch_size), width))
        for rows, columns in image_shapes
    ]
    cells_B2 = torch.tensor(cells, device=layout.row_T.device)
    is_content_T = (layout.row_T < cells_B2[layout.image_T, 0]) & (layout.column_T < cells_B2[layout.image_T, 1])
    kinds_T2 = torch.stack([is_content_T, ~is_content_T], dim=1) & ~layout.is_prefix_T[:, None]
    tokens_B2 = cells_B2.new_zeros(layout.batch_size, 2).index_add_(0, layout.image_T, kinds_T2.long())
    content_B = cells_B2.prod(1)
    return torch.stack([tokens_B2[:, 0], content_B, tokens_B2[:, 1], height * width - content_B], dim=1)


def token_shares(counts_B4: Tensor) -> dict[str, float]:
    """What ``TokenCountHook`` reports, of the counts of some images."""
    counts_B4 = counts_B4.double()
    shares = {"tokens": float(counts_B4[:, [0, 2]].sum(1).mean())}
    for name, column in (("content", 0), ("padding", 2)):
        tokens_B, cells_B = counts_B4[counts_B4[:, column + 1] > 0, column : column + 2].T
        if len(cells_B):
            share_B = tokens_B / cells_B
            shares[f"{name}_kept"] = float(tokens_B.sum() / cells_B.sum())
            shares[f"{name}_kept_min"], shares[f"{name}_kept_max"] = float(share_B.min()), float(share_B.max())
    return shares

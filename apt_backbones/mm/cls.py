"""Image classification with timm ViTs on mmengine's runner: data, model, metric and throughput (APT, section 4.2)."""

import time
from collections.abc import Sequence

import timm
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from timm.data import Mixup, create_transform, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose

from ..backbones.timm_vit import adapt, timm_weights
from ..trunk import find_trunk


def transform_of(model: str, img_size: int | None = None, is_training: bool = False, **options) -> Compose:
    """timm's transform of an image for a network; arguments as of ``FolderOfClasses``."""
    of_model = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(model).to_dict())
    if img_size is not None:
        of_model["input_size"] = (3, img_size, img_size)
    return create_transform(is_training=is_training, **{**of_model, **options})


@DATASETS.register_module()
class FolderOfClasses(ImageFolder):
    """Images in one folder per class, as ImageNet is usually laid out, through timm's transforms.

    Args:
        data_root: the folder that holds a folder per class.
        model: timm's name of the network, whose normalization, interpolation and crop are applied.
        img_size: side in pixels of what the network gets; None for its own.
        is_training: random crops, flips and the other augmentation of timm, or the central crop.
        transform: further arguments of ``timm.data.create_transform``, such as ``auto_augment`` and ``crop_pct``.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no images in folders. (A class that is only tested may
            lack images, but not its folder, by which classes are numbered.)
    """

    def __init__(
        self,
        data_root: str,
        model: str,
        img_size: int | None = None,
        is_training: bool = False,
        transform: dict | None = None,
    ):
        transform = transform_of(model, img_size, is_training, **(transform or {}))
        super().__init__(data_root, transform, allow_empty=not is_training)
        if not self.samples:
            raise FileNotFoundError(f"no images in the folders of {data_root}")
        self.metainfo = {"classes": tuple(self.classes)}  # mmengine stores it in checkpoints

    def __getitem__(self, index: int) -> dict:
        """``inputs`` (3, img_size, img_size) and the class as ``labels``."""
        image, label = super().__getitem__(index)
        return {"inputs": image, "labels": label}


@MODELS.register_module()
class TimmClassifier(BaseModel):
    """A timm ViT with its own classifier; adaptive with thresholds, and timm's own code without.

    timm's pooling works as ever: merged tokens are repeated over the cells that they cover, so a mean over tokens
    weighs them by area.

    Args:
        model: timm's name.
        num_classes: of the classifier.
        new_classifier: keep this model's own, untrained classifier where a checkpoint has none or one of another number
            of classes: the start of fine-tuning a pretrained network, or on another data set.
        img_size: side in pixels that positions are made for; None for the model's own.
        drop_path_rate: of timm's blocks.
        with_cp: recompute block activations in the backward pass instead of storing them.
        mixup: arguments of ``timm.data.Mixup`` (``mixup_alpha``, ``cutmix_alpha``, ``label_smoothing``, ...).
        model_options: others of ``timm.create_model``, such as ``global_pool``.
        thresholds, scorer, merge: see ``AdaptiveTrunk.set_up``; ``options`` are its others.

    Raises:
        TypeError, ValueError: as ``adapt``.
    """

    def __init__(
        self,
        model: str,
        num_classes: int = 1000,
        new_classifier: bool = False,
        img_size: int | None = None,
        drop_path_rate: float = 0.0,
        with_cp: bool = False,
        mixup: dict | None = None,
        model_options: dict | None = None,
        thresholds: dict[int, float] | None = None,
        scorer: str = "entropy",
        merge: str = "apt",
        **options,
    ):
        super().__init__()
        size = {} if img_size is None else {"img_size": img_size}
        trunk = timm.create_model(
            model, num_classes=num_classes, drop_path_rate=drop_path_rate, **size, **(model_options or {})
        )
        # Without an option it would stay an ordinary timm model where nothing merges, which layer decay does not know.
        options.setdefault("padding", "coarsest")
        self.trunk = adapt(trunk, thresholds, scorer, merge, **options)
        self.trunk.with_cp = with_cp
        self.new_classifier = new_classifier
        self.mixup = None if mixup is None else Mixup(num_classes=num_classes, **mixup)

    def init_weights(self) -> None:
        """Nothing: timm's networks initialize themselves, and mmengine would do so again, new layers included."""

    def adapt_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Fit weights of timm's, or of the authors in a form that timm converts, to this model, in place."""
        if not any(name.startswith("trunk.") for name in state_dict):
            weights = timm_weights(self.trunk, state_dict)
            state_dict.clear()
            state_dict.update({f"trunk.{name}": tensor for name, tensor in weights.items()})
        if self.new_classifier:
            for name, tensor in self.state_dict().items():
                fits = name in state_dict and state_dict[name].shape == tensor.shape
                if name.startswith(("trunk.head.", "trunk.fc_norm.")) and not fits:
                    state_dict[name] = tensor

    def forward(self, inputs: Tensor, labels: Tensor, mode: str = "tensor") -> Tensor | dict | list[dict]:
        """Logits (B, classes) ("tensor"), the loss ("loss"), or ``logits`` and ``label`` per image ("predict").

        Args:
            inputs: normalized images (B, 3, height, width).
            labels: class indices (B,).
        """
        if mode == "loss" and self.mixup is not None:
            if len(inputs) % 2:  # timm mixes pairs
                inputs, labels = (torch.cat([x, x[:1]]) for x in (inputs, labels))
            inputs, targets = self.mixup(inputs, labels)
            return {"loss": SoftTargetCrossEntropy()(self.trunk(inputs).float(), targets)}
        logits = self.trunk(inputs).float()
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(logits, labels)}
        if mode == "predict":
            return [{"logits": row, "label": label} for row, label in zip(logits, labels)]
        return logits


@METRICS.register_module()
class TopAccuracy(BaseMetric):
    """``top1`` and ``top5``: percent of the images whose class is the most probable, or among the five most probable.
    (With fewer than five classes, among all of them.)"""

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        for sample in data_samples:
            best = sample["logits"].topk(min(5, len(sample["logits"]))).indices == sample["label"]
            self.results.append((bool(best[0]), bool(best.any())))

    def compute_metrics(self, results: list[tuple[bool, bool]]) -> dict[str, float]:
        return {f"top{k}": 100 * sum(hits) / len(hits) for k, hits in zip((1, 5), zip(*results))}


@HOOKS.register_module()
class ClassesHook(Hook):
    """Raises ValueError for a data set of other classes than those of the training, in this run or in that of the
    checkpoint: they are numbered by their folders, and one that is missing would shift the others."""

    def __init__(self):
        self._trained: tuple[str, ...] | None = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self._trained = (checkpoint["meta"].get("dataset_meta") or {}).get("classes")

    def before_train(self, runner: Runner) -> None:
        self._trained = None  # a checkpoint to start from may be of other classes
        self._trained = self._check(runner, runner.train_dataloader)

    def before_val(self, runner: Runner) -> None:
        self._check(runner, runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        self._check(runner, runner.test_dataloader)

    def _check(self, runner: Runner, loader: DataLoader) -> tuple[str, ...] | None:
        """The classes of a data set; None if it does not name them."""
        found = getattr(loader.dataset, "metainfo", {}).get("classes")
        if found is None:
            return None
        root, count = getattr(loader.dataset, "root", "the data set"), len(found)
        if count > find_trunk(runner.model).num_classes:
            raise ValueError(f"{root} has {count} folders of classes; set model.num_classes={count}")
        if self._trained is not None and tuple(found) != tuple(self._trained):
            differ = ", ".join(sorted({*found} ^ {*self._trained})[:5])
            raise ValueError(
                f"{root} has other classes than the model was trained on, which differ in {differ}; a "
                "class without images needs an empty folder"
            )
        return found


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Adds ``images_per_second`` to a test's metrics: of the network alone, on this process's device, without the
    first batch."""

    def before_test_epoch(self, runner: Runner) -> None:
        self._images: list[int] = []
        self._times: list[float] = []
        self._handles = [
            runner.model.register_forward_pre_hook(lambda *_: self._times.append(now())),
            runner.model.register_forward_hook(lambda *_: self._times.append(now())),
        ]

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs: list | None = None
    ) -> None:
        self._images.append(len(outputs))

    def after_test_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        for handle in self._handles:
            handle.remove()
        seconds = sum(self._times[3::2]) - sum(self._times[2::2])
        if seconds:
            metrics["images_per_second"] = sum(self._images[1:]) / seconds


def now() -> float:
    """Seconds, when the device has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()

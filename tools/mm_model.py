"""A detector or segmenter with its weights, for tools that look at single images."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from PIL import Image
from torch import Tensor, nn

from apt_backbones import load_converted, read_checkpoint
from apt_backbones.distance import FeatureDistance, dense_features, feature_distance, merging_off
from apt_backbones.trunk import AdaptiveTrunk, find_trunk
from tools.mm_config import backbone_weights, is_classifier, read_config

NEEDS_FILE = ("LoadImageFromFile", "LoadAnnotations", "CheckSegMap")  # steps that images at hand go without


class Crops(NamedTuple):
    """Parts of one image, as the trunk gets them.

    Attributes:
        images: normalized and padded (B, 3, h, w).
        places: top and left of each in the pixels of the whole.
        size: height and width of the whole without padding.
        content_BHW: which base cells begin inside the image, not in padding.
    """

    images: Tensor
    places: list[tuple[int, int]]
    size: tuple[int, int]
    content_BHW: Tensor


def adaptive_model(cfg: Config, checkpoint: str | None) -> tuple[nn.Module, AdaptiveTrunk]:
    """The model of a configuration with its weights, and its trunk; without a checkpoint the weights that its backbone
    names, and the heads untrained.

    Raises:
        FileNotFoundError, ValueError: as ``MMModel``.
    """
    init_default_scope(cfg.get("default_scope", "mmengine"))
    model = MODELS.build(cfg.model.get("module", cfg.model)).eval()  # test-time augmentation wraps the model
    trunk = find_trunk(model)
    if not trunk.thresholds:
        raise ValueError(f"{cfg.filename} has no thresholds: its model is dense; name an adaptive configuration")
    if checkpoint is not None:
        load_converted(model, read_checkpoint(checkpoint), checkpoint)
    elif backbone_weights(cfg):
        model.backbone.init_weights()
    else:
        raise ValueError(f"{cfg.filename} names no weights of its backbone; give those of the model with --weights")
    return model, trunk


class MMModel:
    """The model of an mmdetection or mmsegmentation configuration, ready for inference on a CPU.

    Args:
        config: configuration file.
        checkpoint: .pth or .safetensors; read safely and loaded strictly, except that ConvDown and ZeroMLP may be
            missing. None takes the weights that the configuration's backbone names, for its features.

    Raises:
        FileNotFoundError, ValueError: files that are missing, damaged, or do not fit each other; a dense model, or a
            classifier.
    """

    def __init__(self, config: str, checkpoint: str | None):
        self.cfg = read_config(config)
        if is_classifier(self.cfg):
            raise ValueError(f"{config} is a classifier's; this is for detectors and segmenters")
        self.model, self.trunk = adaptive_model(self.cfg, checkpoint)
        self.pipeline = Compose([step for step in self.cfg.test_pipeline if step["type"] not in NEEDS_FILE])

    def crops(self, image: Image.Image) -> Crops:
        """What of an image goes through the trunk at a time: all for detectors, the crops of segmenters that slide
        (here side by side, the last ones at the far edge)."""
        batch = self.model.data_preprocessor(self._batch(image), False)
        inputs, size = batch["inputs"], batch["data_samples"][0].img_shape[:2]
        test_cfg = self.model.test_cfg or {}
        sides = inputs.shape[2:]
        if test_cfg.get("mode") == "slide":
            sides = [min(side, crop) for side, crop in zip(sides, test_cfg["crop_size"])]
        tops, lefts = (
            sorted({min(start, length - side) for start in range(0, length, side)})
            for length, side in zip(inputs.shape[2:], sides)
        )
        places = [(top, left) for top in tops for left in lefts]
        crops = torch.cat([inputs[..., y : y + sides[0], x : x + sides[1]] for y, x in places])
        cell = self.trunk.patch_size
        rows, columns = (torch.arange(0, side, cell) for side in sides)
        content = [((rows + y)[:, None] < size[0]) & ((columns + x) < size[1]) for y, x in places]
        return Crops(crops, places, tuple(size), torch.stack(content))

    def features(self, crops: Crops) -> tuple[Tensor, ...]:
        """The trunk's feature maps without merging."""
        return dense_features(self.trunk, crops.images)

    def error(self, crops: Crops, dense: tuple[Tensor, ...] | None = None) -> FeatureDistance:
        """Feature error of merging, cell by cell; ``dense`` is what ``features`` gives, if it is known already."""
        return feature_distance(self.trunk, crops.images, dense)

    def draw_predictions(self, image: Image.Image, score: float = 0.3) -> Image.Image:
        """The image with what the model predicts, drawn by its toolbox; boxes from a score on."""
        with torch.no_grad():
            (sample,) = self.model.test_step(self._batch(image))
        # A name of its own, because mmengine keeps visualizers by name.
        visualizer = VISUALIZERS.build(dict(type=self.cfg.visualizer.type, name=uuid.uuid4().hex))
        dataset = self.cfg.test_dataloader.dataset
        with DATASETS.switch_scope_and_registry(None) as datasets:
            meta = datasets.get(dataset.type)._load_metainfo(dataset.get("metainfo"))
        if "decode_head" in self.cfg.model and not meta.get("palette"):
            meta["palette"] = np.random.RandomState(0).randint(0, 256, (len(meta["classes"]), 3)).tolist()
        visualizer.dataset_meta = meta
        options = {"pred_score_thr": score} if "pred_instances" in sample else {"with_labels": False}
        state = np.random.get_state()
        np.random.seed(0)  # mmdet jitters the colours of masks: the same in every picture
        visualizer.add_datasample("prediction", np.asarray(image), sample.cpu(), draw_gt=False, **options)
        np.random.set_state(state)
        return Image.fromarray(visualizer.get_image())

    @contextmanager
    def dense(self) -> Iterator[None]:
        """The same weights without merging, for the time being."""
        with merging_off(self.trunk):
            yield

    def _batch(self, image: Image.Image) -> dict:
        pixels = np.ascontiguousarray(np.asarray(image)[..., ::-1])  # the toolboxes read BGR
        size = pixels.shape[:2]
        results = dict(img=pixels, img_path="", img_id=0, img_shape=size, ori_shape=size, seg_fields=[])
        return pseudo_collate([self.pipeline(results)])

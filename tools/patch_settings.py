"""Which patches a model uses and how large it sees its images, by its configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from apt_backbones.scores import check_thresholds

MAX_SIDE = 8192  # pixels to which images are enlarged at most


@dataclass(frozen=True)
class PatchSettings:
    """Settings of one model.

    Attributes:
        patch_size: side of the base patch in pixels.
        thresholds: merged size -> threshold.
        scorer: whose unit the thresholds have.
        prepare: an image as its file has it -> as the model sees it, without the padding of a detector's or segmenter's
            batch; LLaVA's squares, whose padding the language model gets, too, are with it. A classifier's are cropped.
    """

    patch_size: int
    thresholds: dict[int, float]
    scorer: str
    prepare: Callable[[Image.Image], Image.Image]


def settings_of(config: str) -> PatchSettings:
    """Settings by a detection, segmentation or classification configuration, or by the folder of a LLaVA model.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is not such a configuration.
    """
    is_llava = Path(config).is_dir() or Path(config).name == "config.json"
    return _llava_settings(Path(config)) if is_llava else _mm_settings(config)


def with_longest_side(pixels: int | None) -> Callable[[Image.Image], Image.Image]:
    """Resizing to a longest side, for models without a configuration; None leaves images as they are.

    Raises:
        ValueError: more than ``MAX_SIDE`` pixels.
    """
    if pixels and pixels > MAX_SIDE:
        raise ValueError(f"--resize {pixels} would take gigabytes; use at most {MAX_SIDE}")

    def prepare(image: Image.Image) -> Image.Image:
        scale = pixels / max(image.size) if pixels else 1
        return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)

    return prepare


def _mm_settings(config: str) -> PatchSettings:
    from tools.mm_config import is_classifier, read_config

    cfg = read_config(config)
    model = cfg.model.get("module", cfg.model)  # test-time augmentation wraps the model
    if is_classifier(cfg):
        backbone, prepare = model, _cls_prepare(cfg.test_dataloader.dataset)
    else:
        backbone = model.get("backbone", {})
        resizes = [step for step in cfg.get("test_pipeline", []) if step["type"] == "Resize"]
        prepare = _mm_resize(resizes[0]) if resizes else with_longest_side(None)
    patch_size = patch_size_of(backbone) if "model" in backbone else backbone.get("patch_size", 16)
    thresholds = {int(size): float(threshold) for size, threshold in (backbone.get("thresholds") or {}).items()}
    scorer = backbone.get("scorer", "entropy")
    return PatchSettings(patch_size, check_thresholds(thresholds, patch_size), scorer, prepare)


def native_side(model: str) -> int:
    """Side in pixels of the images that a model of timm's is made for."""
    import timm

    return timm.get_pretrained_cfg(model).input_size[-1]


def patch_size_of(model: dict) -> int:
    """Of a model of timm's, as a configuration has it."""
    import timm
    import torch

    with torch.device("meta"):
        return timm.create_model(model["model"], **model.get("model_options", {})).patch_embed.patch_size[0]


def _cls_prepare(dataset: dict) -> Callable[[Image.Image], Image.Image]:
    """The steps of a test's transform that are made on images."""
    from torchvision.transforms import Compose

    from apt_backbones.mm.cls import transform_of

    transform = transform_of(dataset["model"], dataset.get("img_size"), **dataset.get("transform", {}))
    return Compose([step for step in transform.transforms if hasattr(step, "size")])


def _mm_resize(step: dict) -> Callable[[Image.Image], Image.Image]:
    """What mmcv's Resize does to an image, with its interpolation: other pixels have other scores."""
    from mmcv.transforms import Resize

    resize = Resize(**{name: value for name, value in step.items() if name != "type"})
    return lambda image: Image.fromarray(resize({"img": np.asarray(image)})["img"])


def _llava_settings(path: Path) -> PatchSettings:
    from llava_apt import LlavaAptConfig
    from llava_apt.image_processing import LlavaAptImageProcessor

    folder = path if path.is_dir() else path.parent
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"no config.json in {folder}; name the folder of a LLaVA model, or a configuration file"
        )
    vision = LlavaAptConfig.from_pretrained(folder).vision_config
    processor = LlavaAptImageProcessor.from_pretrained(folder)

    def prepare(image: Image.Image) -> Image.Image:
        seen = processor(image, thresholds={}, do_rescale=False, do_normalize=False, return_tensors="np")
        return Image.fromarray(seen["pixel_values"][0].round().clip(0, 255).astype("uint8").transpose(1, 2, 0))

    return PatchSettings(vision.patch_size, dict(vision.thresholds), vision.scorer, prepare)

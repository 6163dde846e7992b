"""LLaVA's image processor plus the patch layout, scored once, in float32, on the pixels that are handed on."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature
from transformers.models.llava.image_processing_llava import LlavaImageProcessor
from transformers.processing_utils import ImagesKwargs

from apt_backbones.selection import undo_normalization

from .configuration import refuse_misspelt
from .patches import check_modes, patch_sides, resolve_thresholds

MAX_ASPECT_RATIO = 50  # the longer side after resizing the shorter one, before the crop, in units of the shorter
MAX_PIXELS = 100_000_000  # 300 MB; of a file that is decoded, and of an image that is padded to a square


class LlavaAptImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    patch_size (`int`): side of the base patch in pixels.
    thresholds, scorer, merge: as in `AptClipVisionConfig`; give model and processor the same.
    """

    patch_size: int
    thresholds: dict | None
    scorer: str
    merge: str


class LlavaAptImageProcessor(LlavaImageProcessor):
    """``LlavaImageProcessor`` that also returns ``patch_sides`` (B, H, W): the side in pixels of the patch that covers
    each base cell. Images are turned upright by their EXIF tag, and 16-bit images scaled to 8 bits."""

    valid_kwargs = LlavaAptImageProcessorKwargs
    model_input_names = ["pixel_values", "patch_sides"]
    size = {"shortest_edge": 336}
    crop_size = {"height": 336, "width": 336}
    patch_size = 14
    thresholds = None
    scorer = "entropy"
    merge = "apt"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        refuse_misspelt(kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    def process_image(self, image, **kwargs) -> Tensor:
        if isinstance(image, Image.Image):
            image = eight_bits(ImageOps.exif_transpose(image))
        elif getattr(image, "dtype", None) in (torch.uint16, np.uint16):  # of a path or address, too
            image = torch.as_tensor(image).int()
            image = (image // 256 if image.max() > 255 else image).byte()
        return super().process_image(image, **kwargs)

    def _preprocess(
        self,
        images: list[Tensor],
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean,
        image_std,
        do_pad: bool | None,
        patch_size: int,
        thresholds: dict | None,
        scorer: str,
        merge: str,
        return_tensors: str | None,
        **kwargs,
    ) -> BatchFeature:
        check_modes(scorer, merge)
        thresholds = resolve_thresholds(thresholds, patch_size)
        for image in images:
            shorter, longer = sorted(image.shape[-2:])
            if do_pad and longer**2 > MAX_PIXELS:
                raise ValueError(
                    f"an image of {image.shape[-1]} x {image.shape[-2]} pixels, padded to a square, has more than "
                    f"{MAX_PIXELS}; make it smaller"
                )
            if not do_pad and longer > MAX_ASPECT_RATIO * shorter:
                raise ValueError(
                    f"an image of {image.shape[-1]} x {image.shape[-2]} pixels is too narrow to crop; pass do_pad=True"
                )
        in_unit_range = images[0].is_floating_point()
        features = super()._preprocess(
            images,
            do_rescale=do_rescale,
            rescale_factor=rescale_factor,
            do_normalize=do_normalize,
            image_mean=image_mean,
            image_std=image_std,
            do_pad=do_pad,
            return_tensors=None,
            **kwargs,
        )
        if len({image.shape for image in features["pixel_values"]}) > 1:
            raise ValueError("images have several sizes after processing; leave do_center_crop or do_pad on")
        pixels = torch.stack(list(features["pixel_values"])).float()
        scale = 1 / rescale_factor if do_rescale else 255 if in_unit_range else 1
        mean, std = (np.broadcast_to(x, 3) for x in ((image_mean, image_std) if do_normalize else (0, 1)))
        pixels = undo_normalization(pixels, (scale * mean).tolist(), (scale * std).tolist())
        sides_BHW = patch_sides(pixels, thresholds, patch_size, scorer, merge)
        if (bad := (sides_BHW < 0).flatten(1).any(1)).any():
            raise ValueError(f"images {bad.nonzero().flatten().tolist()} of the batch have NaN or infinite pixels")
        features["patch_sides"] = list(sides_BHW)
        return BatchFeature(features.data, tensor_type=return_tensors)


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey images of more than 8 bits with the upper 8 of 16, if these are used: PIL's conversion to RGB clips at 255.

    Raises:
        ValueError: a floating point image, whose range is unknown.
    """
    if image.mode == "F":
        raise ValueError("floating point images have no known range; convert the image to 8 bits first")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = image.convert("I")
        return (image.point(lambda value: value / 256) if image.getextrema()[1] > 255 else image).convert("L")
    return image

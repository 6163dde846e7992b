"""LLaVA's processor with as many image placeholders as the image has patches."""

import math

from transformers import LlavaProcessor

from .configuration import refuse_misspelt
from .image_processing import LlavaAptImageProcessor
from .patches import count_tokens


class LlavaAptProcessor(LlavaProcessor):
    r"""
    ``LlavaProcessor``; what changes: the number of placeholders follows the image's content, and ``patch_sides`` goes
    to the model beside ``pixel_values``. Loads from stock LLaVA-1.5 checkpoints and from saved adapted ones.
    ``from_pretrained`` takes the image processor's options by name: ``thresholds``, ``scorer``, ``merge``, ``do_pad``
    (LLaVA's own square padding; the checkpoints in transformers' layout crop instead).

    Args:
        image_tokens (`str`): as in `LlavaAptConfig`: "merged", or "repeated" for the stock number of placeholders.
        image_processor, tokenizer, ...: as in `LlavaProcessor`; another CLIP image processor is converted.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token="<image>",
        num_additional_image_tokens=0,
        image_tokens="merged",
        **kwargs,
    ):
        if image_tokens not in ("merged", "repeated"):
            raise ValueError(f"unknown image_tokens {image_tokens!r}; choose merged or repeated")
        if not isinstance(image_processor, LlavaAptImageProcessor):
            image_processor = LlavaAptImageProcessor.from_dict(image_processor.to_dict())
        if patch_size is not None:
            image_processor.patch_size = patch_size
        self.image_tokens = image_tokens
        super().__init__(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=image_processor.patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )

    def __call__(self, *args, **kwargs):
        """As in `LlavaProcessor`. Raises ValueError at an option that looks like a misspelt one of ours."""
        refuse_misspelt(kwargs)
        return super().__call__(*args, **kwargs)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        # transformers would build the class that the stock checkpoint names, and drop our options.
        image_processor = LlavaAptImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)
        return [image_processor, tokenizer]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        sides_HW = image_inputs["patch_sides"][image_idx]
        patches = (
            math.prod(sides_HW.shape) if self.image_tokens == "repeated" else count_tokens(sides_HW, self.patch_size)
        )
        keeps_class_token = self.vision_feature_select_strategy == "full"
        return self.image_token * (patches + keeps_class_token)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Known without the pixels only if every cell has its token, which is what vLLM relies on."""
        if image_sizes is not None and self.image_tokens == "merged":
            raise ValueError(
                "the number of image tokens depends on the image's content, not on its size; "
                'load processor and model with image_tokens="repeated" for frameworks that count by size'
            )
        return super()._get_num_multimodal_tokens(image_sizes, **kwargs)

"""LLaVA-1.5 with adaptive patches (APT, arXiv 2510.18091) for transformers.

    from llava_apt import LlavaAptForConditionalGeneration, LlavaAptProcessor
    model = LlavaAptForConditionalGeneration.from_pretrained("llava-hf/llava-1.5-7b-hf")
    processor = LlavaAptProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf")

Reading order: patches, configuration, tower, modeling, image_processing, processing, new_layers, data, finetune.
"""

import transformers
from packaging.version import Version

OLDEST_TRANSFORMERS = "5.20"
if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"llava_apt needs transformers >= {OLDEST_TRANSFORMERS}, found {transformers.__version__}; "
        "pip install --upgrade transformers"
    )

from .configuration import AptClipVisionConfig, LlavaAptConfig  # noqa: E402
from .image_processing import LlavaAptImageProcessor  # noqa: E402
from .modeling import LlavaAptForConditionalGeneration, LlavaAptModel  # noqa: E402
from .new_layers import load_new_layers, options_of, save_new_layers  # noqa: E402
from .processing import LlavaAptProcessor  # noqa: E402
from .register import register  # noqa: E402
from .tower import AptClipVisionModel  # noqa: E402

register()

__all__ = [
    "AptClipVisionConfig",
    "AptClipVisionModel",
    "LlavaAptConfig",
    "LlavaAptForConditionalGeneration",
    "LlavaAptImageProcessor",
    "LlavaAptModel",
    "LlavaAptProcessor",
    "load_new_layers",
    "options_of",
    "save_new_layers",
]

"""What transformers' Auto classes and checkpoint loader have to know."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .configuration import AptClipVisionConfig, LlavaAptConfig
from .image_processing import LlavaAptImageProcessor
from .modeling import LlavaAptForConditionalGeneration, LlavaAptModel
from .processing import LlavaAptProcessor
from .tower import AptClipVisionModel


def register() -> None:
    """Make ``Auto*.from_pretrained`` find the classes, and stock checkpoints load under their hub names.

    transformers converts the hub's names by class and model type; without the same conversions for our names a stock
    checkpoint would leave the tower random, with no more than a warning.
    """
    AutoConfig.register(AptClipVisionConfig.model_type, AptClipVisionConfig)
    AutoConfig.register(LlavaAptConfig.model_type, LlavaAptConfig)
    AutoModel.register(AptClipVisionConfig, AptClipVisionModel)
    AutoModel.register(LlavaAptConfig, LlavaAptModel)
    AutoModelForImageTextToText.register(LlavaAptConfig, LlavaAptForConditionalGeneration)
    AutoImageProcessor.register(LlavaAptConfig, image_processor_classes={"torchvision": LlavaAptImageProcessor})
    AutoProcessor.register(LlavaAptConfig, LlavaAptProcessor)
    for stock, ours in (
        ("llava", LlavaAptConfig.model_type),
        ("LlavaModel", LlavaAptModel.__name__),
        ("CLIPVisionModel", AptClipVisionModel.__name__),
    ):
        register_checkpoint_conversion_mapping(ours, get_checkpoint_conversion_mapping(stock), overwrite=True)

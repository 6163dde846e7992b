"""Configuration of LLaVA with adaptive patches: LLaVA's own plus what APT adds to the vision tower."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig, LlavaConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .patches import check_modes, resolve_thresholds

TOWER_OPTIONS = ("thresholds", "scorer", "merge", "adapter_rank")
OPTIONS = (*TOWER_OPTIONS, "image_tokens", "do_pad", "patch_size")


def refuse_misspelt(options: Iterable[str]) -> None:
    """transformers passes over options that it does not know. Raise ValueError at those that look like one of ours."""
    for name in options:
        if name not in (*OPTIONS, "image_token") and (meant := get_close_matches(name, OPTIONS, 1, cutoff=0.8)):
            raise ValueError(
                f"unknown option {name!r}; did you mean {meant[0]!r}? The options are {', '.join(OPTIONS)}"
            )


@strict
class AptClipVisionConfig(CLIPVisionConfig):
    r"""
    Args:
        thresholds (`dict[int, float]`, *optional*): merged patch side in pixels -> threshold in the scorer's units.
            None gives the paper's (5.75 bits at twice the base patch), an empty dictionary the dense model.
        scorer (`str`): "entropy", "laplacian", "upsample_mse", or the .safetensors file of a learned scorer.
        merge (`str`): "apt", or the paper's baselines "resizing" (no new layers) and "random" (cells are dropped).
        adapter_rank (`int`): of low-rank layers for merged patches' tokens in every encoder layer; 0 for none.
        image_mean, image_std: the normalization that images underwent, in 0..1. Read only if the model is called
            without the processor's patch layout.
    """

    model_type = "apt_clip_vision_model"

    thresholds: dict | None = None
    scorer: str = "entropy"
    merge: str = "apt"
    adapter_rank: int = 0
    image_mean: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_STD)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_modes(self.scorer, self.merge)
        self.thresholds = resolve_thresholds(self.thresholds, self.patch_size)


@strict
class LlavaAptConfig(LlavaConfig):
    r"""
    LLaVA's configuration whose `vision_config` is an [`AptClipVisionConfig`]; that of a stock LLaVA-1.5 checkpoint is
    turned into one. `from_pretrained` takes `thresholds`, `scorer`, `merge` and `adapter_rank` by
    name.

    Args:
        image_tokens (`str`): "merged" hands one token per patch to the language model; "repeated" repeats every
            token over the base cells of its patch, so that each image has as many tokens as in the stock model.
    """

    model_type = "llava_apt"
    sub_configs_defaults = {
        **LlavaConfig.sub_configs_defaults,
        "vision_config": SubConfigSpec(
            config_class=AptClipVisionConfig,
            model_type="apt_clip_vision_model",
            init_kwargs=LlavaConfig.sub_configs_defaults["vision_config"].init_kwargs,
        ),
    }

    image_tokens: Literal["merged", "repeated"] = "merged"

    def __post_init__(self, **kwargs):
        if isinstance(self.vision_config, dict):
            kind = self.vision_config.get("model_type", "clip_vision_model")
            if kind not in ("clip_vision_model", AptClipVisionConfig.model_type):
                raise ValueError(f"the vision tower is a {kind!r}; adaptive patches need LLaVA's CLIP tower")
            self.vision_config = {**self.vision_config, "model_type": AptClipVisionConfig.model_type}
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        kind = config_dict.get("model_type")
        if "mm_vision_tower" in config_dict:
            raise ValueError(
                f"{pretrained_model_name_or_path} is in the original LLaVA layout; use its transformers conversion, "
                "for instance llava-hf/llava-1.5-7b-hf"
            )
        if kind not in ("llava", cls.model_type):
            raise ValueError(f"{pretrained_model_name_or_path} is a {kind!r} checkpoint, not LLaVA-1.5 (llava)")
        return {**config_dict, "model_type": cls.model_type}, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Also of ``AutoConfig``; options of the tower take the place of saved ones."""
        tower_options = {name: kwargs.pop(name) for name in TOWER_OPTIONS if name in kwargs}
        config_dict = {**config_dict, "vision_config": {**config_dict.get("vision_config", {}), **tower_options}}
        return super().from_dict(config_dict, **kwargs)

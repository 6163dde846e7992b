"""LLaVA whose vision tower hands on one token per patch, or per base cell ("repeated")."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import select_hidden_states

from apt_backbones import PatchLayout
from apt_backbones.freeze import is_new

from .configuration import LlavaAptConfig, refuse_misspelt
from .tower import AptClipVisionModel, PackedVisionOutput


class LlavaAptModel(LlavaModel):
    """``LlavaModel``; what changes: image features differ in number per image, and are checked against the
    placeholders of each image."""

    config: LlavaAptConfig
    vision_tower: AptClipVisionModel

    def __init__(self, config: LlavaAptConfig):
        super().__init__(config)
        # Those of layers that the language model gets nothing from would have no gradient.
        layers, count = config.vision_feature_layer, config.vision_config.num_hidden_layers + 1
        used = max(layer % count for layer in ([layers] if isinstance(layers, int) else layers))
        self.vision_tower.token_adapters = self.vision_tower.token_adapters[:used]

    @merge_with_config_defaults
    @can_return_tuple
    @select_hidden_states("vision_feature_layer")
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        patch_sides: Tensor | None = None,
        **kwargs,
    ) -> PackedVisionOutput:
        """The tower's output; ``pooler_output`` is a list with each image's projected tokens (n_i, D), raster order.

        Args:
            pixel_values, patch_sides: as the processor gives them (``AptClipVisionModel.forward``).
            vision_feature_layer, vision_feature_select_strategy: as in LLaVA; "full" keeps the CLS token in front.
        """
        outputs = self.vision_tower(pixel_values, patch_sides=patch_sides, return_dict=True, **kwargs)
        layers = [vision_feature_layer] if isinstance(vision_feature_layer, int) else vision_feature_layer
        x_TD = torch.cat([outputs.hidden_states[layer][0] for layer in layers], dim=-1)
        x_TD = self.multi_modal_projector(x_TD)
        outputs.pooler_output = self._per_image(x_TD, outputs.layout, vision_feature_select_strategy == "full")
        return outputs

    def _per_image(self, x_TD: Tensor, layout: PatchLayout, keep_class_token: bool) -> list[Tensor]:
        patches = layout.split(x_TD)
        if self.config.image_tokens == "repeated":
            # get_image_features may run on another device than the tower under a device map
            patches = list(x_TD[layout.token_BHW.flatten(1).to(x_TD.device)])
        if not keep_class_token:
            return patches
        class_tokens = (tokens[:1] for tokens in x_TD.split(layout.images.lengths))
        return [torch.cat(pair) for pair in zip(class_tokens, patches)]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        mm_encoder_outputs: dict | None = None,
        patch_sides: Tensor | None = None,
        **kwargs,
    ):
        """As ``LlavaModel.forward``, plus ``patch_sides`` (``AptClipVisionModel.forward``)."""
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("pass either pixel_values or mm_encoder_outputs, not both")
        features = dict(
            vision_feature_layer=vision_feature_layer, vision_feature_select_strategy=vision_feature_select_strategy
        )
        if pixel_values is not None:
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values, patch_sides=patch_sides, **features)}
        image = (mm_encoder_outputs or {}).get("image")
        if image is not None:
            # ``generate`` cuts its prefill, and image features with it; slices come without a layout.
            if getattr(image, "layout", None) is not None:
                self._check_placeholders(input_ids, inputs_embeds, [len(tokens) for tokens in image.pooler_output])
        elif torch.is_grad_enabled() and self._trains_image_path():
            if inputs_embeds is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            inputs_embeds = inputs_embeds + self._no_image(features).to(inputs_embeds.device, inputs_embeds.dtype)
            input_ids = None
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def _check_placeholders(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, counts: list[int]) -> None:
        """Raise unless the placeholders fit image by image. transformers compares the batch's totals only, and
        images that swap tokens would pass."""
        placeholder = self.config.image_token_id
        if input_ids is not None:
            is_placeholder_BL = input_ids == placeholder
        else:
            embedding = self.get_input_embeddings()(torch.tensor(placeholder, device=inputs_embeds.device))
            is_placeholder_BL = (inputs_embeds == embedding).all(-1)
        is_placeholder_BL = is_placeholder_BL.cpu()  # one wait for the device instead of several
        # A run of placeholders holds one image, or several whole ones if nothing stands between them.
        ends_run_BL = is_placeholder_BL.clone()
        ends_run_BL[:, :-1] &= ~is_placeholder_BL[:, 1:]
        run_ends = is_placeholder_BL.flatten().cumsum(0)[ends_run_BL.flatten()].tolist()
        image_ends = torch.tensor(counts).cumsum(0).tolist()
        if (run_ends or [0])[-1] != image_ends[-1] or not set(run_ends) <= set(image_ends):
            runs = [end - start for start, end in zip([0, *run_ends], run_ends)]
            raise ValueError(
                f"images have {counts} tokens, but the text has runs of {runs} image placeholders: pass the "
                "processor's input_ids, pixel_values and patch_sides together, all from one call"
            )

    def _trains_image_path(self) -> bool:
        modules = (self.vision_tower, self.multi_modal_projector)
        return any(parameter.requires_grad for module in modules for parameter in module.parameters())

    def _no_image(self, features: dict) -> Tensor:
        """Zero, by way of a blank image: without it a text-only batch would leave trainable image layers without a
        gradient, and distributed training would wait for it forever (LLaVA does the same)."""
        side = self.config.vision_config.image_size
        blank = torch.zeros(1, 3, side, side, device=self.vision_tower.device)
        return 0 * self.get_image_features(blank, **features).pooler_output[0].sum()


class LlavaAptForConditionalGeneration(LlavaForConditionalGeneration):
    """``LlavaForConditionalGeneration`` over ``LlavaAptModel``; loads LLaVA-1.5 checkpoints in transformers' layout."""

    config: LlavaAptConfig

    def __init__(self, config: LlavaAptConfig):
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = LlavaAptModel(config)
        self.lm_head = torch.nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, from safetensors files only. ``thresholds``, ``scorer``, ``merge``, ``adapter_rank``
        and ``image_tokens`` override the configuration's.

        Raises:
            ValueError: the checkpoint is damaged, lacks tensors other than all of the embedding's new layers or all
                adapters, or is no LLaVA-1.5; or the device map offloads the vision tower; or an option looks like a
                misspelt one.
            OSError: there is no such checkpoint, or its weights are not in safetensors files.
        """
        refuse_misspelt(kwargs)
        folder = Path(pretrained_model_name_or_path or "")
        if pretrained_model_name_or_path and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            raise OSError(
                f"{pretrained_model_name_or_path} has its weights in .bin files, which may hold code; convert them: "
                f"transformers.LlavaForConditionalGeneration.from_pretrained({str(pretrained_model_name_or_path)!r})"
                ".save_pretrained(FOLDER)"
            )
        kwargs["use_safetensors"] = True
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(f"{pretrained_model_name_or_path} has a damaged safetensors file ({error})") from error
        missing, new_layers = set(info["missing_keys"]), [name for name, _ in model.named_parameters() if is_new(name)]
        kinds = [{name for name in new_layers if kind in name} for kind in ("adaptive_embed", "token_adapters")]
        if lost := sorted(missing.difference(*(kind for kind in kinds if kind <= missing))):
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(lost)} tensors, among them {lost[0]}; "
                "a complete LLaVA-1.5 checkpoint in transformers' layout is needed"
            )
        if any(parameter.is_meta for parameter in model.model.vision_tower.parameters()):
            raise ValueError("the vision tower cannot be offloaded to CPU or disk; give it a device in device_map")
        return (model, info) if output_loading_info else model

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        patch_sides: Tensor | None = None,
        **kwargs,
    ):
        """As ``LlavaForConditionalGeneration.forward``, plus ``patch_sides`` (``AptClipVisionModel.forward``).
        Arguments have names here because ``generate`` refuses those that the signature does not list."""
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy=vision_feature_select_strategy,
            labels=labels,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            patch_sides=patch_sides,
            **kwargs,
        )

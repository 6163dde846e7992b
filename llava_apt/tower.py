"""CLIP's vision tower on packed patches of several sizes (APT, arXiv 2510.18091, sections 3 and 4.3).

Legend: B images, H x W base cells, T tokens of the whole batch with one CLS token heading each image, D channels,
N heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import AttentionInterface
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from apt_backbones import AdaptivePatchEmbed, PatchLayout, varlen_attention
from apt_backbones.layout import Segments
from apt_backbones.selection import layout_of, undo_normalization
from apt_backbones.token_adapter import TokenAdapter

from .configuration import AptClipVisionConfig
from .patches import patch_sides as selected_sides

PACKED_ATTENTION = "apt_packed"


def packed_attention(
    module: nn.Module,
    q_1NTH: Tensor,
    k_1NTH: Tensor,
    v_1NTH: Tensor,
    attention_mask,
    *,
    segments: Segments,
    added_qkv: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface over ``varlen_attention``: every token sees the tokens of its own image.
    ``added_qkv`` (1, T, 3 * D) is added to queries, keys and values."""
    qkv = [x[0].transpose(0, 1) for x in (q_1NTH, k_1NTH, v_1NTH)]
    if added_qkv is not None:
        qkv = [x_TNH + added.view_as(x_TNH) for x_TNH, added in zip(qkv, added_qkv.chunk(3, -1))]
    return varlen_attention(*qkv, segments)[None], None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)


class AptClipEncoderLayer(CLIPEncoderLayer):
    """``CLIPEncoderLayer``; what changes: if it is given an adapter, that of its own index is applied."""

    def __init__(self, config: AptClipVisionConfig, index: int):
        super().__init__(config)
        self.index = index

    def forward(
        self, hidden_states: Tensor, attention_mask, adapters: nn.ModuleList, is_merged_T1: Tensor, **kwargs
    ) -> Tensor:
        if self.index >= len(adapters):
            return super().forward(hidden_states, attention_mask, **kwargs)
        adapter, x_1TD = adapters[self.index], self.layer_norm1(hidden_states)
        added_qkv = adapter.qkv(x_1TD, is_merged_T1)
        attended_1TD, _ = self.self_attn(x_1TD, attention_mask, added_qkv=added_qkv, **kwargs)
        hidden_states = hidden_states + attended_1TD
        x_1TD = self.layer_norm2(hidden_states)
        return hidden_states + self.mlp(x_1TD) + adapter.mlp(x_1TD, is_merged_T1)


@dataclass
class PackedVisionOutput(BaseModelOutputWithPooling):
    """Hidden states are packed (1, T, D); ``pooler_output`` is the CLS tokens' (B, D); ``layout`` says whose they are.

    ``LlavaAptModel.get_image_features`` puts the projected tokens of each image, a list of (n_i, D), in
    ``pooler_output``, as transformers' LLaVA does.
    """

    layout: PatchLayout | None = None


class AptClipVisionModel(CLIPVisionModel):
    """``CLIPVisionModel``; what changes: the patch embedding is adaptive, and all images of a batch are one packed
    sequence in raster order. The encoder layers are CLIP's, untouched, under their names, with adapters for merged
    patches' tokens if the configuration says so."""

    config: AptClipVisionConfig
    _no_split_modules = ["AptClipVisionModel"]  # the layout stays on one device

    def __init__(self, config: AptClipVisionConfig):
        if config.attention_dropout:
            raise ValueError("packed attention has no dropout; set vision_config.attention_dropout to 0")
        super().__init__(config)
        # A dense tower merges nothing, so it has no new layers: "resizing" has none.
        self.adaptive_embed = AdaptivePatchEmbed(config.hidden_size, config.merge if config.thresholds else "resizing")
        layers = [AptClipEncoderLayer(config, index) for index in range(config.num_hidden_layers)]
        self.encoder.layers = nn.ModuleList(layers)
        adapted = layers if config.thresholds and config.adapter_rank else ()
        projections = ((layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj) for layer in adapted)
        self.token_adapters = nn.ModuleList(TokenAdapter(of_layer, config.adapter_rank) for of_layer in projections)
        self.post_init()

    def get_correct_attn_implementation(self, *args, **kwargs) -> str:
        """Packed attention, whatever was asked of the language model; it chooses its own kernel."""
        return PACKED_ATTENTION

    def _check_and_adjust_attn_implementation(self, *args, **kwargs) -> str:
        return PACKED_ATTENTION

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers would fill new layers with its normal distribution. CLIP's own __init__ comes here, too.
        new_layers = dict(self.adaptive_embed.named_children()) if hasattr(self, "adaptive_embed") else {}
        low_rank = [part for adapter in getattr(self, "token_adapters", ()) for part in (adapter.qkv, adapter.mlp)]
        zeros = [part.up for part in low_rank]
        if "zero_mlp" in new_layers and self.adaptive_embed.merge == "apt":
            zeros.append(new_layers["zero_mlp"])
        if module not in (*new_layers.values(), *zeros, *(part.down for part in low_rank)):
            super()._init_weights(module)
        elif not isinstance(module, nn.Identity):
            if module in zeros:
                initialization.zeros_(module.weight)
            else:
                initialization.kaiming_uniform_(module.weight, a=5**0.5)  # torch's own
            if module.bias is not None:
                initialization.zeros_(module.bias)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, patch_sides: Tensor | None = None, **kwargs) -> PackedVisionOutput:
        """
        Args:
            pixel_values: normalized images (B, 3, image_size, image_size).
            patch_sides: (B, H, W) side in pixels of the patch over each base cell, as the processor hands it on.
                If it is None, the tower scores the pixels itself, in float32; from half-precision pixels the
                result can differ from the processor's.

        Raises:
            ValueError: wrong image size, or a layout of other images or with sizes that the tower does not know.
        """
        image_size = self.config.image_size
        if tuple(pixel_values.shape[1:]) != (3, image_size, image_size):
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; the vision tower takes (B, 3, {image_size}, "
                f"{image_size}): set the image processor's size and crop_size"
            )
        layout = self._layout(pixel_values, patch_sides)
        pixel_values = pixel_values.to(self.dtype)
        x_TD = self.adaptive_embed(pixel_values, layout, self.embeddings.patch_embedding, self._positions())
        class_embedding = self.embeddings.class_embedding + self.embeddings.position_embedding.weight[0]
        x_TD = torch.where(layout.is_prefix_T[:, None], class_embedding, x_TD.to(class_embedding.dtype))
        x_1TD = self.pre_layrnorm(x_TD[None])
        kwargs |= dict(segments=layout.images, adapters=self.token_adapters, is_merged_T1=layout.is_merged_T1)
        x_1TD = self.encoder(inputs_embeds=x_1TD, **kwargs).last_hidden_state
        class_BD = self.post_layernorm(layout.prefix(x_1TD[0])[:, 0])
        return PackedVisionOutput(last_hidden_state=x_1TD, pooler_output=class_BD, layout=layout)

    def _layout(self, pixel_values: Tensor, sides_BHW: Tensor | None) -> PatchLayout:
        config = self.config
        grid = (config.image_size // config.patch_size,) * 2
        if not config.thresholds and sides_BHW is None:
            return PatchLayout.dense(len(pixel_values), grid, config.patch_size, num_prefix=1, device=self.device)
        is_given = sides_BHW is not None
        if not is_given:
            mean, std = ([255 * x for x in values] for values in (config.image_mean, config.image_std))
            pixels = undo_normalization(pixel_values, mean, std)
            sides_BHW = selected_sides(pixels, config.thresholds, config.patch_size, config.scorer, config.merge)
        if tuple(sides_BHW.shape) != (len(pixel_values), *grid):
            raise ValueError(
                f"patch_sides have shape {tuple(sides_BHW.shape)}, but {len(pixel_values)} images of {grid} patches "
                f"were given: pass the processor's pixel_values and patch_sides together"
            )
        sides_BHW = sides_BHW.to(pixel_values.device).long()
        try:
            return layout_of(sides_BHW, config.thresholds, config.patch_size, config.merge, num_prefix=1)
        except ValueError as error:
            if not is_given:
                raise
            raise ValueError(
                f"{error}: give the processor and the model the same thresholds and merge mode (the model has "
                f"{config.thresholds}, {config.merge!r})"
            ) from error

    def _positions(self) -> Tensor:
        """Absolute positions of the base cells (1, D, H, W); float32, because CPUs resample nothing less."""
        positions_ND = self.embeddings.position_embedding.weight[1:].float()
        side = self.config.image_size // self.config.patch_size
        return positions_ND.unflatten(0, (side, side)).permute(2, 0, 1)[None]

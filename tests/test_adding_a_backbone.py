"""How to add a backbone, on a network that shares no code with timm: torchvision's VisionTransformer.

docs/adding_a_backbone.md quotes this class.
"""

from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from apt_backbones import AdaptiveTrunk, varlen_attention
from apt_backbones.resample import resample_positions
from tests.golden import relative_error


# [docs
class AdaptiveTorchvision(AdaptiveTrunk):
    """torchvision's ViT with adaptive patches."""

    def __init__(self, vit: torchvision.models.VisionTransformer, **options):
        super().__init__()
        self.vit, self.blocks = vit, vit.encoder.layers
        self.patch_size, self.embed_dim, self.num_prefix = vit.patch_size, vit.hidden_dim, 1
        self.position_grid = (vit.image_size // vit.patch_size,) * 2
        self.set_up(**options)

    def projection(self) -> nn.Conv2d:
        return self.vit.conv_proj

    def prefix_tokens(self) -> Tensor:
        return (self.vit.class_token + self.vit.encoder.pos_embedding[:, :1])[0]

    def positions(self, grid: tuple[int, int]) -> Tensor:
        positions_HWD = self.vit.encoder.pos_embedding[0, 1:].unflatten(0, self.position_grid)
        return resample_positions(positions_HWD, grid, antialias=True).permute(2, 0, 1)[None]

    def final_norm(self, x_TD: Tensor) -> Tensor:
        return self.vit.encoder.ln(x_TD)

    def check_block(self, block: nn.Module) -> None:
        if block.self_attention.dropout:
            raise ValueError("packed attention has no dropout; create the model with attention_dropout=0")

    def run_block(self, index, x_TD, call, segments, rotation=None) -> Tensor:
        block, attn = self.blocks[index], self.blocks[index].self_attention
        qkv_TD = linear(block.ln_1(x_TD), attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv_TD.unflatten(-1, (3, attn.num_heads, -1)).unbind(1)
        x_TD = x_TD + block.dropout(attn.out_proj(varlen_attention(q, k, v, segments, call.backend).flatten(1)))
        return x_TD + block.mlp(block.ln_2(x_TD))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes)."""
        *_, (_, x_TD, layout) = self.run(images)
        return self.vit.heads(self.final_norm(layout.prefix(x_TD)[:, 0]))


# docs]


@pytest.fixture
def vit():
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(
        64, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=48, num_classes=3
    )
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit.eval()


@torch.no_grad()
def test_it_is_the_original_network_until_patches_merge(vit):
    images = torch.randn(2, 3, 64, 64)
    expected = vit(images)
    assert relative_error(AdaptiveTorchvision(vit)(images), expected) <= 1e-5
    assert relative_error(AdaptiveTorchvision(vit, thresholds={16: 0.0})(images), expected) <= 1e-5


@torch.no_grad()
def test_it_merges_and_has_maps_windows_and_any_image_size(vit):
    images = pad(torch.randn(2, 3, 40, 48), (0, 32))
    model = AdaptiveTorchvision(vit, thresholds={16: 5.0}, window_size=4, global_blocks=(1,))
    (feature_map,) = model.feature_maps(images)
    assert feature_map.shape == (2, 32, 5, 10) and feature_map.isfinite().all()
    assert max(model.last_layout.num_patches) < 50
    assert relative_error(model(images[:1]), model(images)[:1]) <= 1e-5


def test_the_documentation_quotes_it():
    source = Path(__file__).read_text()
    example = source[source.index("# [docs\n") + len("# [docs\n") : source.index("\n# docs]")].strip()
    assert example in (Path(__file__).parents[1] / "docs/adding_a_backbone.md").read_text()
    assert len(example.splitlines()) < 60

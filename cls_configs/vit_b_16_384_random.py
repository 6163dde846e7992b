"""ViT-B/16 at 384 pixels, patches dropped at random: one epoch from timm's fine-tuned model."""

_base_ = "vit_b_16_384_dense.py"
model = dict(**_base_.adaptive, merge="random")

"""ViT-B/16 at 224 pixels, patches dropped at random: one epoch from timm's fine-tuned model."""

_base_ = "vit_b_16_224_dense.py"
model = dict(**_base_.adaptive, merge="random")

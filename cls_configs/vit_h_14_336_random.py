"""ViT-H/14 at 336 pixels, patches dropped at random: one epoch from timm's fine-tuned model."""

_base_ = "vit_h_14_336_dense.py"
model = dict(**_base_.adaptive_14, merge="random")

"""ViT-H/14 at 224 pixels, patches dropped at random: one epoch from timm's fine-tuned model."""

_base_ = "vit_h_14_224_dense.py"
model = dict(**_base_.adaptive_14, merge="random")

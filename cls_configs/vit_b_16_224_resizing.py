"""ViT-B/16 at 224 pixels, merged patches without new layers: one epoch from timm's fine-tuned model."""

_base_ = "vit_b_16_224_dense.py"
model = dict(**_base_.adaptive, merge="resizing")

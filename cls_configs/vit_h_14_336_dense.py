"""ViT-H/14 at 336 pixels, dense: timm's fine-tuned model; training is one more epoch, as the adaptive ones have it."""

_base_ = "_base_/short_finetune.py"
model = dict(type="TimmClassifier", model="vit_huge_patch14_clip_336.laion2b_ft_in12k_in1k", img_size=336)
dataset = dict(model=model["model"], img_size=336)
train_dataloader = dict(dataset=dataset)
val_dataloader = test_dataloader = dict(dataset=dataset)
load_from = "checkpoints/vit_huge_patch14_clip_336.laion2b_ft_in12k_in1k.safetensors"

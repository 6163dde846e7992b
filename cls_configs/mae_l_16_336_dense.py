"""MAE's ViT-L/16 at 336 pixels, dense: full fine-tuning from masked-image pretraining."""

_base_ = "_base_/full_finetune_50.py"
model = dict(
    type="TimmClassifier",
    model="vit_large_patch16_224.mae",
    img_size=336,
    drop_path_rate=0.2,
    model_options=dict(global_pool="avg"),
    with_cp=True,
)
dataset = dict(model=model["model"], img_size=336)
train_dataloader = dict(dataset=dataset)
val_dataloader = test_dataloader = dict(dataset=dataset)
load_from = "checkpoints/vit_large_patch16_224.mae.safetensors"

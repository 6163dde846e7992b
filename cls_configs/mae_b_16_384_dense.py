"""MAE's ViT-B/16 at 384 pixels, dense: full fine-tuning from masked-image pretraining."""

_base_ = "_base_/full_finetune.py"
model = dict(
    type="TimmClassifier",
    model="vit_base_patch16_224.mae",
    img_size=384,
    drop_path_rate=0.1,
    model_options=dict(global_pool="avg"),
)
dataset = dict(model=model["model"], img_size=384)
train_dataloader = dict(dataset=dataset)
val_dataloader = test_dataloader = dict(dataset=dataset)
load_from = "checkpoints/vit_base_patch16_224.mae.safetensors"

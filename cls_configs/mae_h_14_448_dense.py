"""MAE's ViT-H/14 at 448 pixels, dense: full fine-tuning from masked-image pretraining."""

_base_ = "_base_/full_finetune_50.py"
model = dict(
    type="TimmClassifier",
    model="vit_huge_patch14_224.mae",
    img_size=448,
    drop_path_rate=0.3,
    model_options=dict(global_pool="avg"),
    with_cp=True,
)
dataset = dict(model=model["model"], img_size=448)
train_dataloader = dict(dataset=dataset)
val_dataloader = test_dataloader = dict(dataset=dataset)
load_from = "checkpoints/vit_huge_patch14_224.mae.safetensors"

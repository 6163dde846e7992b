"""What detection and segmentation share: runner, hook, optimizer, short fine-tune; on a toy model without a toolbox."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.structures import BaseDataElement
from torch import nn
from torch.utils.data import DataLoader, Dataset

from apt_backbones import PatchLayout, read_checkpoint
from apt_backbones.mm import APTEva02, APTRunner
from apt_backbones.mm.hooks import count_tokens, token_shares
from apt_backbones.mm.optimizer import layer_of
from tests.scripts import ROOT
from tools.mm_config import advice_for, read_config

TRUNK = dict(img_size=64, patch_size=8, embed_dim=16, depth=2, num_heads=2, pretrain_img_size=32)
THRESHOLDS = {16: 3.0, 32: 3.0}


CONFIGS = sorted(path for task in ("det", "seg", "cls") for path in ROOT.glob(f"{task}_configs/*.py"))


@pytest.mark.parametrize("config", CONFIGS, ids=[f"{path.parent.name}/{path.stem}" for path in CONFIGS])
def test_whoever_lacks_a_configurations_data_is_told_where_it_comes_from(config):
    cfg = read_config(str(config), import_custom_modules=False)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        root = (cfg.get(loader) or {}).get("dataset", {}).get("data_root")
        assert root is None or advice_for(root) != advice_for("anywhere"), root


class Toy(BaseModel):
    """A backbone and one linear layer; batch norm stands for statistics that a host keeps."""

    def __init__(self, **trunk):
        super().__init__()
        self.backbone = APTEva02(**{**TRUNK, **trunk})
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 1)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        features = self.norm(self.backbone(torch.stack(list(inputs)))[0])
        value = self.head(features.mean((2, 3)))
        return {"loss": (value - 1).square().mean()} if mode == "loss" else list(value)


class Images(Dataset):
    """Images that are smooth on the left; the lowest quarter of each is padding."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index))
        image[:, :, :32] = index / 8
        image[:, 48:] = 0
        return {"inputs": image, "data_samples": BaseDataElement(metainfo=dict(img_shape=(48, 64)))}


class Accuracy(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0.5)

    def compute_metrics(self, results):
        return {"accuracy": results[0]}


def loader():
    return DataLoader(Images(), batch_size=2, collate_fn=lambda x: {k: [row[k] for row in x] for k in x[0]})


def runner(model, work_dir, max_iters=6, **options):
    return APTRunner(
        model,
        str(work_dir),
        train_dataloader=loader(),
        val_dataloader=loader(),
        test_dataloader=loader(),
        train_cfg=dict(by_epoch=False, max_iters=max_iters, val_interval=100),
        val_cfg=dict(),
        test_cfg=dict(),
        val_evaluator=Evaluator(Accuracy()),
        test_evaluator=Evaluator(Accuracy()),
        optim_wrapper=dict(
            constructor="LayerDecayOptimWrapperConstructor",
            paramwise_cfg=dict(decay_rate=0.5, decay_all=False),
            optimizer=dict(type="AdamW", lr=1e-2, weight_decay=0.1),
        ),
        custom_hooks=[dict(type="TokenCountHook")],
        default_hooks=dict(
            logger=dict(type="LoggerHook", interval=4),
            checkpoint=dict(type="CheckpointHook", interval=3, by_epoch=False),
        ),
        log_processor=dict(by_epoch=False),
        experiment_name=f"{Path(work_dir).name}_{id(model)}",
        default_scope="mmengine",
        log_level="WARNING",
        **options,
    )


def logged(work_dir):
    lines = [line for path in Path(work_dir).glob("*/vis_data/scalars.json") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("backbone.pos_embed", 0),
        ("backbone.patch_embed.proj.weight", 0),
        ("backbone.cls_token", 0),
        ("backbone.blocks.0.norm1.weight", 1),
        ("backbone.blocks.23.mlp.fc2.bias", 24),
        ("backbone.adaptive_embed.conv_down.weight", 25),
        ("neck.p2.0.weight", 25),
        ("roi_head.mask_head.blocks.0.weight", 25),
    ],
)
def test_layer_numbers_for_decay(name, layer):
    assert layer_of(name, "backbone", num_layers=24) == layer


@pytest.mark.parametrize("decay_all", [True, False])
def test_learning_rates_and_weight_decay(decay_all):
    model = Toy(thresholds=THRESHOLDS)
    model.head.bias.requires_grad_(False)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type="LayerDecayOptimWrapperConstructor",
            optim_wrapper_cfg=dict(optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.1)),
            paramwise_cfg=dict(decay_rate=0.5, decay_all=decay_all),
        )
    )
    optimizer = constructor(model).optimizer
    of = {name: group for group in optimizer.param_groups for name in group["param_names"]}

    assert set(of) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "head.bias" not in of
    assert of["head.weight"]["lr"] == of["backbone.adaptive_embed.zero_mlp.weight"]["lr"] == 1
    assert of["backbone.blocks.1.norm1.weight"]["lr"] == 0.5
    assert of["backbone.blocks.0.norm1.weight"]["lr"] == 0.25
    assert of["backbone.pos_embed"]["lr"] == 0.125
    assert of["head.weight"]["weight_decay"] == 0.1
    for vector in ("backbone.blocks.1.norm1.weight", "backbone.blocks.0.attn.proj.bias", "backbone.pos_embed"):
        assert of[vector]["weight_decay"] == (0.1 if decay_all else 0)
    assert optimizer.param_groups[0]["lr"] == 1, "mmengine logs the first group's learning rate"


def test_tokens_of_content_and_padding_are_counted_apart():
    # 4 x 4 cells of 8 px; the upper left quarter is one patch of 16 px. Image 1 ends within its third row and second
    # column.
    sides = torch.full((2, 4, 4), 8)
    sides[:, :2, :2] = 16
    layout = PatchLayout.build(sides, patch_size=8, sizes=(16,))
    counts = count_tokens(layout, [(32, 32), (17, 15)])
    assert counts.tolist() == [[13, 16, 0, 0], [3, 6, 10, 10]]
    assert token_shares(counts) == {
        "tokens": 13,
        "content_kept": 16 / 22,
        "content_kept_min": 3 / 6,
        "content_kept_max": 13 / 16,
        "padding_kept": 1,
        "padding_kept_min": 1,
        "padding_kept_max": 1,
    }


def test_a_sliding_window_is_all_content_and_cls_tokens_do_not_count():
    layout = PatchLayout.dense(1, (2, 2), patch_size=8, num_prefix=1)
    assert count_tokens(layout, [(100, 200)]).tolist() == [[4, 4, 0, 0]]


def test_tokens_are_logged_beside_the_loss_and_the_metrics(tmp_path):
    run = runner(Toy(thresholds=THRESHOLDS), tmp_path)
    run.train()
    first = logged(tmp_path)[0]
    assert first["iter"] == 4 and "loss" in first
    assert first["content_kept_min"] <= first["content_kept"] <= first["content_kept_max"] < 1
    assert first["padding_kept"] < 1

    metrics = runner(Toy(thresholds=None), tmp_path / "dense").test()
    assert metrics["accuracy"] == 0.5
    assert metrics["content_kept"] == metrics["padding_kept"] == 1
    assert metrics["tokens"] == 64
    assert metrics["images_per_batch"] == 2


def test_a_resumed_run_continues_with_iteration_optimizer_and_token_counts(tmp_path):
    torch.manual_seed(0)
    whole = runner(Toy(thresholds=THRESHOLDS), tmp_path / "whole")
    whole.train()

    torch.manual_seed(0)
    runner(Toy(thresholds=THRESHOLDS), tmp_path / "killed", max_iters=3).train()
    torch.manual_seed(1)
    resumed = runner(Toy(thresholds=THRESHOLDS), tmp_path / "killed", resume=True)
    resumed.train()

    assert resumed.iter == whole.iter == 6
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, msg=name)
    at_4 = [[line for line in logged(tmp_path / name) if line.get("iter") == 4] for name in ("whole", "killed")]
    assert at_4[0][0]["content_kept"] == at_4[1][0]["content_kept"], "counts from before the interruption are lost"


def test_load_from_is_strict_except_for_the_new_layers(tmp_path):
    dense = Toy()
    torch.save({"state_dict": dense.state_dict()}, tmp_path / "dense.pth")
    run = runner(Toy(thresholds=THRESHOLDS), tmp_path)
    run.load_checkpoint(str(tmp_path / "dense.pth"))
    assert run.model.head.weight.equal(dense.head.weight)

    weights = dense.state_dict()
    del weights["head.bias"]
    torch.save(weights, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"another model: 1 entries \(head.bias\) missing"):
        run.load_checkpoint(str(tmp_path / "cut.pth"))


def test_hooks_find_the_weights_whatever_they_are_wrapped_in(tmp_path):
    """mmengine's ``EMAHook``, for one, reads ``state_dict``."""
    weights = Toy().state_dict()
    torch.save({"model": weights, "epoch": 3}, tmp_path / "authors.pth")
    content = runner(Toy(), tmp_path).load_checkpoint(str(tmp_path / "authors.pth"))
    assert content["epoch"] == 3 and content["state_dict"].keys() == weights.keys()


def test_a_log_history_cannot_smuggle_in_other_attributes(tmp_path):
    from mmengine.logging import HistoryBuffer

    class Attribute:
        def __reduce__(self):
            return getattr, (HistoryBuffer, "__init__")

    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Attribute()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="attribute '__init__'"):
        read_checkpoint(tmp_path / "a.pth")


def pretrained(patch_size, grid):
    """A trunk under the original names of masked-image pretraining, with what only pretraining needs."""
    width = 16
    source = APTEva02(**{**TRUNK, "patch_size": patch_size, "pretrain_img_size": patch_size * grid})
    weights = {}
    for name, tensor in source.state_dict().items():
        name = name.replace("mlp.fc1_g", "mlp.w1").replace("mlp.fc1_x", "mlp.w2").replace("mlp.fc2", "mlp.w3")
        name = name.replace("mlp.norm", "mlp.ffn_ln").replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias")
        weights[name] = tensor
    weights["pos_embed"] = torch.cat([torch.ones(1, 1, width), weights["pos_embed"]], dim=1)
    weights |= {"cls_token": torch.ones(1, 1, width), "mask_token": torch.ones(1, 1, width)}
    weights |= {
        "norm.weight": torch.ones(width),
        "lm_head.weight": torch.ones(4, width),
        "rope.freqs_cos": torch.ones(1),
    }
    return source, weights


def test_training_can_start_from_a_pretrained_trunk(tmp_path):
    source, weights = pretrained(patch_size=8, grid=4)
    torch.save({"module": weights}, tmp_path / "pt.pth")
    trunk = APTEva02(**TRUNK, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "pt.pth")))
    trunk.init_weights()
    for name, tensor in source.state_dict().items():
        assert trunk.state_dict()[name].equal(tensor), name


def test_training_can_start_from_a_part_of_a_file_and_initialisers_together(tmp_path):
    source, weights = pretrained(patch_size=8, grid=4)
    content = {f"teacher.backbone.{name}": tensor for name, tensor in weights.items()} | {"teacher.head": torch.ones(1)}
    torch.save(content, tmp_path / "whole.pth")
    file = dict(type="Pretrained", checkpoint=str(tmp_path / "whole.pth"), prefix="teacher.backbone")
    trunk = APTEva02(**TRUNK, thresholds=THRESHOLDS, init_cfg=[file, dict(type="Constant", layer="Conv2d", val=0.25)])
    trunk.init_weights()
    assert (trunk.adaptive_embed.conv_down.weight == 0.25).all(), "which the file does not have"
    for name, tensor in source.state_dict().items():
        assert trunk.state_dict()[name].equal(tensor), name


def test_mmengines_initialisers_work_too():
    trunk = APTEva02(**TRUNK, init_cfg=dict(type="Constant", layer="Linear", val=0.25))
    trunk.init_weights()
    linears = [module for module in trunk.modules() if isinstance(module, torch.nn.Linear)]
    assert linears and all((linear.weight == 0.25).all() for linear in linears)


def test_patches_and_positions_of_a_pretrained_trunk_are_resampled(tmp_path):
    _, weights = pretrained(patch_size=4, grid=8)
    torch.save(weights, tmp_path / "pt.pth")
    trunk = APTEva02(
        **TRUNK, thresholds=THRESHOLDS, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "pt.pth"))
    )
    trunk.init_weights()
    small, large = weights["patch_embed.proj.weight"], trunk.patch_embed.proj.weight
    # A constant image gives the same token before and after: resampling keeps the kernel's response.
    torch.testing.assert_close(large.sum((2, 3)), small.sum((2, 3)), rtol=0.05, atol=0.05)
    assert trunk.pos_embed.shape == (1, 16, 16)


def test_a_pretrained_trunk_of_another_width_is_refused(tmp_path):
    _, weights = pretrained(patch_size=8, grid=4)
    weights["blocks.1.norm1.weight"] = torch.ones(24)
    torch.save(weights, tmp_path / "pt.pth")
    trunk = APTEva02(**TRUNK, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "pt.pth")))
    with pytest.raises(ValueError, match=r"blocks.1.norm1.weight \(24,\) instead of \(16,\)"):
        trunk.init_weights()

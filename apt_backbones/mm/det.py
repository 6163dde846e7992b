"""EVA-02's detector in mmdet: the parts of ViTDet (arXiv 2203.16527) and of detectron2's cascade that mmdet lacks."""

from mmcv.cnn import ConvModule
from mmdet.models import CascadeRCNN, CascadeRoIHead, FCNMaskHead, StandardRoIHead
from mmdet.structures.bbox import bbox2roi
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from .short_finetune import ShortFinetune

MODELS.register_module("LN2d", module=LayerNorm2d)  # over the channels of a map; mmdet's heads name it in norm_cfg


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """p2 .. p6 from the trunk's last map alone (ViTDet, section 3): strides p/4, p/2, p, 2p, 4p for a patch of p.

    Args:
        in_channels: D of the trunk.
        out_channels: of every level.
        norm_cfg: norm of the output convolutions.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, norm_cfg: dict | None = None):
        super().__init__()
        norm_cfg = norm_cfg or dict(type="LN2d", eps=1e-6)
        half, quarter = in_channels // 2, in_channels // 4

        def output(channels: int) -> list[nn.Module]:
            return [
                ConvModule(channels, out_channels, 1, norm_cfg=norm_cfg, act_cfg=None),
                ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=norm_cfg, act_cfg=None),
            ]

        self.p2 = nn.Sequential(
            nn.ConvTranspose2d(in_channels, half, 2, stride=2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
            *output(quarter),
        )
        self.p3 = nn.Sequential(nn.ConvTranspose2d(in_channels, half, 2, stride=2), *output(half))
        self.p4 = nn.Sequential(*output(in_channels))
        self.p5 = nn.Sequential(nn.MaxPool2d(2), *output(in_channels))

    def forward(self, maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Five maps (B, out_channels, ...) from the last of the trunk's maps (B, in_channels, H, W)."""
        x = maps[-1]
        height, width = x.shape[2:]
        halvable = F.pad(x, (0, int(width == 1), 0, int(height == 1)), mode="replicate")
        levels = [self.p2(x), self.p3(x), self.p4(x), self.p5(halvable)]
        # mmcv's RoIAlign reads memory as if maps were contiguous, and a norm over channels leaves channels last.
        levels = [level.contiguous() for level in levels]
        return (*levels, levels[-1][:, :, ::2, ::2].contiguous())


@MODELS.register_module()
class ViTDetCascadeRoIHead(CascadeRoIHead):
    """detectron2's cascade. What it changes in mmdet's:

    - a box's score is the mean of the three stages' probabilities, not the softmax of their mean logits;
    - one mask head, trained on the first stage's samples, instead of one per stage.
    """

    init_mask_head = StandardRoIHead.init_mask_head
    _mask_forward = StandardRoIHead._mask_forward
    predict_mask = StandardRoIHead.predict_mask

    def _bbox_forward(self, stage: int, x: tuple[Tensor, ...], rois: Tensor, as_probabilities: bool = False) -> dict:
        results = super()._bbox_forward(stage, x, rois)
        if as_probabilities:
            results["cls_score"] = results["cls_score"].softmax(-1)
        return results

    def _refine_roi(self, **kwargs) -> tuple:
        rois, probabilities, deltas = super()._refine_roi(**kwargs, as_probabilities=True)
        return rois, [p.log() for p in probabilities], deltas  # the box head takes the softmax, which undoes the log

    def mask_loss(self, stage: int, x: tuple[Tensor, ...], sampling_results: list, batch_gt_instances: list) -> dict:
        if stage > 0:
            return {"loss_mask": {}}
        rois = bbox2roi([samples.pos_priors for samples in sampling_results])
        mask_preds = self._mask_forward(x, rois)["mask_preds"]
        return self.mask_head.loss_and_target(mask_preds, sampling_results, batch_gt_instances, self.train_cfg[stage])


@MODELS.register_module()
class MasknessMaskHead(FCNMaskHead):
    """Mask head whose masks may be ranked by score times "maskness" (EVA-02, arXiv 2303.11331, detection appendix).

    Args:
        maskness: add ``mask_scores``, which mask AP then uses: a box's score times the mean of its mask's
            probabilities above 0.5. Box AP stays as it is.
    """

    def __init__(self, *args, maskness: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.maskness = maskness

    def predict_by_feat(self, mask_preds: tuple[Tensor, ...], results_list: list, *args, **kwargs) -> list:
        if self.maskness:
            for logits, results in zip(mask_preds, results_list):
                results.mask_scores = results.scores * _maskness(logits, results.labels)
        return super().predict_by_feat(mask_preds, results_list, *args, **kwargs)


def _maskness(logits_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    """Mean probability of each mask's foreground (N,); 0 for a mask without any."""
    channels_N = labels_N if logits_NCHW.shape[1] > 1 else 0  # the only one is that of every class
    probability_NP = logits_NCHW[range(len(labels_N)), channels_N].sigmoid().flatten(1)
    foreground_NP = probability_NP > 0.5
    return (probability_NP * foreground_NP).sum(1) / foreground_NP.sum(1).clamp(min=1)


@MODELS.register_module()
class ShortFinetuneCascadeRCNN(ShortFinetune, CascadeRCNN):
    """mmdet's detector of which only ConvDown and ZeroMLP train."""

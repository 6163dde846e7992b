"""What runs around a trunk: nothing, a detector, or a segmenter. Each host says what one timed step is, which methods
make up its stages, and checks that every case computes what it claims to."""

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .cases import Case, core, describe_trunk, trunk_parts
from .clock import Laps, Parts, count_gflops
from .images import Batch

# Relative error, in the norm, up to which two implementations count as equal.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


INFERENCE = ("reference", "fast")  # of FastUPerHead


class Trunk:
    """The trunk alone."""

    measures = {"trunk": None}

    def __init__(self, cases: list[Case], batches: list[Batch], device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.batches = [batch.to(device) for batch in batches]
        self.cases = cases
        for case in cases:
            case.model.requires_grad_(False).to(device, dtype)

    @torch.inference_mode()
    def step(self, case: Case, batch: Batch, lap: Laps) -> None:
        self.forward(case, batch)
        lap(next(iter(self.measures)))

    def forward(self, case: Case, batch: Batch) -> object:
        return case.model(case.images(batch))

    def parts(self, case: Case) -> Parts:
        return trunk_parts(case.model)

    @torch.inference_mode()
    def describe(self) -> None:
        """Fill in what is not timed; raises AssertionError if a case does not compute what it claims."""
        outputs = {}
        for case in self.cases:
            gflops = describe_trunk(case, self.batches) + self.other_gflops(case)
            case.gflops = dict.fromkeys(self.measures, gflops)
            outputs[case.name] = self.check(case, self.batches[0])
        for case in self.cases:
            assert case.is_adaptive or case.content_kept == 1, (
                f"{case.name} keeps {case.content_kept:.1%} of the content"
            )
            twin = self._twin(case)
            if twin in outputs and twin != case.name:
                check_equal(outputs[case.name], outputs[twin], f"{case.name} and {twin}", self.dtype)

    def _twin(self, case: Case) -> str:
        """Name of the case that must compute the same, if it is among them; the case's own if there can be none."""
        batch = self.batches[0]
        merges_nothing = case.content_kept == 1 and (
            case.name.startswith("packed") or batch.square.shape == batch.rectangle.shape
        )
        mode = "dense" if merges_nothing else case.name.removesuffix(f" ({case.head} head)")
        return f"{mode} (reference head)" if case.head else mode

    def check(self, case: Case, batch: Batch) -> Sequence[Tensor]:
        """What must be equal in different implementations of the same: dense and packed, reference and fast head."""
        images, model = case.images(batch), core(case.model)
        maps = case.model(images)
        grid = tuple(-(-side // model.patch_size) * model.map_scale for side in images.shape[2:])
        for feature_map in maps:
            assert feature_map.shape == (len(images), model.embed_dim, *grid), f"{case.name}: {feature_map.shape}"
            assert feature_map.isfinite().all(), f"{case.name} computes NaN"
        return maps

    def other_gflops(self, case: Case) -> float:
        """Of what is not in the blocks, per image."""
        return 0.0


class Segmenter(Trunk):
    """mmseg's encoder and decoder on one crop per image: logits of the crop's size.

    Args:
        heads: of ``INFERENCE``, with which every case is run; empty for the configuration's.
    """

    measures = {"whole model": None}

    def __init__(self, model: nn.Module, heads: Sequence[str], cases: list[Case], *args):
        if heads:
            cases = [
                Case(f"{case.name} ({head} head)", case.model, case.is_reference, case.rectangular, head)
                for case in cases
                for head in heads
            ]
        super().__init__(cases, *args)
        self.model = model.eval().requires_grad_(False).to(self.device, self.dtype)

    def _use(self, case: Case) -> None:
        self.model.backbone = case.model
        if case.head:
            self.model.decode_head.inference = case.head

    def forward(self, case: Case, batch: Batch) -> Tensor:
        images = case.images(batch)
        self._use(case)
        return self.model.encode_decode(images, [{"img_shape": images.shape[2:]}] * len(images))

    def parts(self, case: Case) -> Parts:
        neck = {"neck": [(self.model, "head_inputs")]} if self.model.with_neck else {}
        return {**super().parts(case), **neck, "head": [(self.model.decode_head, "forward")]}

    def check(self, case: Case, batch: Batch) -> Sequence[Tensor]:
        images, logits = case.images(batch), self.forward(case, batch)
        assert logits.shape == (len(images), self.model.out_channels, *images.shape[2:]), f"{case.name}: {logits.shape}"
        assert logits.isfinite().all(), f"{case.name} computes NaN"
        return [logits]

    def other_gflops(self, case: Case) -> float:
        batch = self.batches[0]
        maps = case.model(case.images(batch))
        self._use(case)
        return count_gflops(lambda: self.model.decode_head(self.model.head_inputs(maps))) / len(maps[0])


class Detector(Trunk):
    """mmdet's cascade from normalized images to boxes and masks at the images' size.

    Random weights would propose and detect another number of boxes in each mode, and so cost more in one than in
    another. Therefore the region proposal network runs, but the box and mask heads are given the same boxes in every
    mode, as many as the configuration allows; and the classifiers' biases give one class half of the probability, as
    a trained detector does on an object, so that every mode ends with the configured number of detections.
    """

    measures = {"whole model": None}

    def __init__(self, model: nn.Module, *args):
        super().__init__(*args)
        self.model = model.eval().requires_grad_(False).to(self.device)
        heads = model.roi_head
        for module in (model.neck, model.rpn_head, *heads.bbox_head, heads.mask_head):
            in_precision(module, self.device, self.dtype)
        for head in heads.bbox_head:
            head.fc_cls.bias.fill_(-20)[[0, -1]] = 0
        self.proposals = random_boxes(model.test_cfg.rpn.max_per_img).to(self.device)

    def forward(self, case: Case, batch: Batch) -> list:
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        images = case.images(batch)
        meta = dict(img_shape=batch.size, ori_shape=batch.size, scale_factor=(1.0, 1.0))
        samples = [DetDataSample(metainfo={**meta, "batch_input_shape": tuple(images.shape[2:])}) for _ in images]
        levels = self.pyramid(case, batch)
        self.model.rpn_head.predict(levels, samples, rescale=False)
        scale = torch.tensor(batch.size[::-1] * 2, device=self.device)
        proposals = [InstanceData(bboxes=self.proposals * scale) for _ in images]
        return self.model.roi_head.predict(levels, proposals, samples, rescale=True)

    def pyramid(self, case: Case, batch: Batch) -> tuple[Tensor, ...]:
        return self.model.neck(case.model(case.images(batch)))

    def parts(self, case: Case) -> Parts:
        model = self.model
        return {
            **super().parts(case),
            "neck": [(model.neck, "forward")],
            "proposal head": [(model.rpn_head, "predict")],
            "box and mask heads": [(model.roi_head, "predict")],
        }

    def check(self, case: Case, batch: Batch) -> Sequence[Tensor]:
        count = self.model.test_cfg.rcnn.max_per_img
        for detections in self.forward(case, batch):
            assert len(detections.bboxes) == count, f"{case.name}: {len(detections.bboxes)} detections, not {count}"
            assert detections.masks.shape == (count, *batch.size), f"{case.name}: {detections.masks.shape}"
        return self.pyramid(case, batch)

    def other_gflops(self, case: Case) -> float:
        batch = self.batches[0]
        return (
            count_gflops(lambda: self.forward(case, batch)) - count_gflops(lambda: case.model(case.images(batch)))
        ) / len(batch.square)


def random_boxes(count: int) -> Tensor:
    """Boxes (count, 4) inside the unit square: corners left, top, right, bottom; sides from 1/64 to 1/2."""
    generator = torch.Generator().manual_seed(0)
    sides = 2 ** -(1 + 5 * torch.rand(count, 2, generator=generator))
    corner = torch.rand(count, 2, generator=generator) * (1 - sides)
    return torch.cat([corner, corner + sides], dim=1)


def in_precision(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Make a module compute in a precision, from any float inputs to float32 outputs: what a detector does between its
    modules (anchors, boxes, RoIAlign) needs float32."""
    module.eval().requires_grad_(False).to(device, dtype)
    forward = module.forward

    def cast(x: object, to: torch.dtype) -> object:
        return x.to(to) if isinstance(x, Tensor) and x.is_floating_point() else x

    def call(*args, **kwargs):
        args, kwargs = tree_map(lambda x: cast(x, dtype), (args, kwargs))
        return tree_map(lambda x: cast(x, torch.float32), forward(*args, **kwargs))

    if dtype != torch.float32:
        module.forward = call
    return module


def check_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor], names: str, dtype: torch.dtype) -> None:
    """Raises AssertionError unless two implementations computed the same."""
    for one, other in zip(ours, theirs):
        error = float((one.float() - other.float()).norm() / other.float().norm())
        assert error <= TOLERANCES[dtype], f"{names} differ by {error:.1e}"


def build_host(cfg, heads: Sequence[str], *args) -> Trunk:
    """The whole model that a configuration describes, with random weights, around the trunks of cases.

    Args:
        heads: for ``Segmenter``.
        args: for ``Trunk``.

    Raises:
        ImportError: mmdet or mmseg is not installed.
        ValueError: heads are asked of a model whose head has no choice.
    """
    from mmengine.registry import MODELS, init_default_scope

    try:
        for module in cfg.custom_imports["imports"]:
            import_module(module)
    except ImportError as error:
        raise ImportError(f"a whole model needs mmcv with its operators, mmdet and mmseg ({error})") from error
    init_default_scope(cfg.default_scope)
    # The cases' replace the trunk: here it has one block, or is timm's without its weights.
    is_timm = "model" in cfg.model.backbone
    small = dict(checkpoint=None) if is_timm else dict(depth=1, out_indices=(0,), global_blocks=(), init_cfg=None)
    cfg.model.backbone.update(small)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    if heads and not hasattr(getattr(model, "decode_head", None), "inference"):
        raise ValueError("--heads chooses how a segmenter's FastUPerHead computes; this model has none")
    return Detector(model, *args) if hasattr(model, "roi_head") else Segmenter(model, heads, *args)

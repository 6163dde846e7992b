"""From the command line to what is measured."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from apt_backbones.calibrate import calibrate_thresholds, score_maps_of
from apt_backbones.images import to_tensor

from .cases import ADAPTIVE_MODES, DENSE_MODES, HOST_ONLY, Eva02Trunks, core, make_cases
from .hosts import Trunk, build_host
from .images import load_images, make_batch
from .measure import Host
from .scorers import Scorers
from .timm_trunks import TimmTrunks
from .training import TrainingStep

MODES = (*DENSE_MODES, *ADAPTIVE_MODES)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RAW = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)  # a normalization that changes nothing
SCORED_SIDE = 1536


def make_host(config: str | None, side: int | None, args: argparse.Namespace) -> tuple[Host, dict]:
    """What a configuration describes, and what to say about it.

    Args:
        config: a configuration file, a LLaVA shape or folder, or None for patch scorers alone.
        side: of the square in pixels; None for the configuration's.
        args: as ``tools/benchmark.py`` parses them.

    Raises:
        ValueError, OSError: it is not an adaptive configuration, or there are no such files.
        ImportError: a package that the model needs is not installed.
    """
    if config is None:
        side = side or SCORED_SIDE
        batches = [make_batch(image, RAW, 16, side, args.batch_size) for image in _images(args, side, 1.0)]
        return Scorers(batches, args.device), {
            "config": "scorers",
            "title": f"patches of {side} x {side} pixels",
            "img_size": side,
        }
    if not config.endswith(".py"):
        return _llava(config, args)
    return _mm(config, side, args)


def _mm(path: str, side: int | None, args: argparse.Namespace) -> tuple[Host, dict]:
    from tools.mm_config import is_classifier, read_config
    from tools.patch_settings import native_side, patch_size_of

    cfg = read_config(path, import_custom_modules=False)
    if is_classifier(cfg):
        if args.whole:
            raise ValueError(f"{path}: a classifier's head is one layer; leave out --whole")
        names = ("model", "img_size", "thresholds", "scorer", "merge")
        arguments = {name: cfg.model[name] for name in names if name in cfg.model} | {"norm": True}
    else:
        arguments = {key: value for key, value in cfg.model.backbone.items() if key not in HOST_ONLY}
    if not arguments.get("thresholds"):
        raise ValueError(f"{path} has no thresholds; name an adaptive configuration")
    depth, is_timm = arguments.get("depth", 12), "model" in arguments
    patch_size = patch_size_of(arguments) if is_timm else arguments.get("patch_size", 16)
    side = side or arguments.get("img_size") or native_side(arguments["model"])
    if is_timm:
        if args.blocks:
            raise ValueError("--blocks is for EVA-02's configurations; timm's networks run whole")
        side += -side % patch_size
    elif side % (window := patch_size * (arguments.get("window_size") or 1)):
        # Dense windows would be filled up, packed ones cut: not the same network.
        raise ValueError(f"a side of {side} pixels is not a multiple of the attention window's, {window}")
    if args.blocks:
        if args.blocks > depth:
            raise ValueError(f"{path} has {depth} blocks; --blocks takes at most as many")
        arguments.update(depth=args.blocks, out_indices=(-1,))
        arguments["global_blocks"] = [index for index in arguments["global_blocks"] if index < args.blocks]
    arguments["img_size"] = side

    takes_squares = "decode_head" in cfg.model or is_classifier(cfg)  # a segmenter's crops, a classifier's images
    images = _images(args, side, 1.0 if takes_squares else None)
    own = {int(size): value for size, value in arguments["thresholds"].items()}
    thresholds = _thresholds(args, images, own, patch_size, arguments.get("scorer", "entropy"))
    modes = args.modes or [mode for mode in MODES if not (takes_squares and mode.endswith("-rect"))]
    trunks = (TimmTrunks if is_timm else Eva02Trunks)(arguments, args.device)
    cases = make_cases(trunks, modes, thresholds, args.padding)
    if not cases:
        raise ValueError(f"{path} has windows or finer maps, which timm has not: compare with --modes packed,apt")
    if args.compile:
        for case in cases:
            part = case.model if hasattr(case.model, "compile_blocks") else core(case.model)
            part.compile_blocks()
    first = core(cases[0].model)
    normalization = torch.tensor([first.pixel_mean, first.pixel_std])[:, :, None, None]
    batches = [make_batch(image, normalization, first.patch_size, side, args.batch_size) for image in images]
    options = (cases, batches, args.device, DTYPES[args.dtype])
    if args.whole:
        host = build_host(cfg, args.heads, *options)
    else:
        host = TrainingStep(*options) if args.train_step else Trunk(*options)
    compiled = ", compiled" if args.compile else ""
    blocks = f" (blocks 1-{args.blocks} of {depth})" if args.blocks else ""
    facts = {
        "config": path,
        "title": f"{Path(path).stem}{blocks}: {side} px, batch {args.batch_size}, {args.dtype}{compiled}",
        "img_size": side,
        "thresholds": thresholds,
        "padding": args.padding,
        "compiled": args.compile,
    }
    return host, facts


def _llava(name: str, args: argparse.Namespace) -> tuple[Host, dict]:
    try:
        from llava_apt.patches import PAPER_THRESHOLD

        from . import llava
    except ImportError as error:
        raise ImportError(f"LLaVA needs transformers >= 5.20 ({error})") from error
    config = llava.load_config(name)
    side, patch_size = config.vision_config.image_size, config.vision_config.patch_size
    images = _images(args, side, 1.0)  # LLaVA cuts squares from images
    thresholds = _thresholds(args, images, {2 * patch_size: PAPER_THRESHOLD}, patch_size, "entropy")
    batches = [make_batch(image, llava.NORMALISATION, patch_size, side, args.batch_size) for image in images]
    modes = args.modes or [mode for mode in MODES if not mode.endswith("-rect")]
    host = llava.Llava(config, modes, thresholds, batches, args.device, DTYPES[args.dtype], args.compile)
    compiled = ", decoding compiled" if args.compile else ""
    facts = {
        "config": name,
        "title": f"{Path(name).name}: batch {args.batch_size}, {args.dtype}{compiled}",
        "img_size": side,
        "thresholds": thresholds,
        "compiled": args.compile,
    }
    return host, facts


def _images(args: argparse.Namespace, side: int, aspect: float | None) -> list[Image.Image]:
    return load_images(args.images, side, args.num_images, args.aspect or aspect)


def _thresholds(
    args: argparse.Namespace, images: list[Image.Image], own: dict[int, float], patch_size: int, scorer: str
) -> dict[str, dict[int, float]]:
    """Label -> thresholds: the configuration's, or those under which the images keep the asked shares."""
    if args.thresholds:
        return {"(config)": own}
    maps = [score_maps_of(to_tensor(image), tuple(sorted(own)), scorer) for image in images]
    return {f"{keep:g}": calibrate_thresholds(maps, patch_size, keep) for keep in args.keep}

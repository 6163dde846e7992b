"""From the command line to what is measured."""

import argparse
from pathlib import Path

import torch
from PIL import Image

from apt_backbones.calibrate import calibrate_thresholds, score_maps_of
from apt_backbones.images import to_tensor

from .cases import ADAPTIVE_MODES, DENSE_MODES, HOST_ONLY, core, make_cases
from .hosts import Trunk, build_host
from .images import load_images, make_batch
from .measure import Host
from .scorers import Scorers
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
    from tools.mm_config import read_config

    cfg = read_config(path, import_custom_modules=False)
    arguments = {key: value for key, value in cfg.model.backbone.items() if key not in HOST_ONLY}
    arguments["with_cp"] = False
    if not arguments.get("thresholds"):
        raise ValueError(f"{path} has no thresholds; name an adaptive configuration")
    side = arguments["img_size"] = side or arguments["img_size"]
    patch_size = arguments.get("patch_size", 16)
    window = patch_size * (arguments.get("window_size") or 1)
    if side % window:  # dense windows would be filled up, packed ones cut: not the same network
        raise ValueError(f"a side of {side} pixels is not a multiple of the attention window's, {window}")
    depth = arguments.get("depth", 12)
    if args.blocks:
        arguments.update(depth=args.blocks, out_indices=(-1,))
        arguments["global_blocks"] = [index for index in arguments["global_blocks"] if index < args.blocks]

    is_segmenter = "decode_head" in cfg.model
    images = _images(args, side, 1.0 if is_segmenter else None)  # a segmenter's crops are square
    own = {int(size): value for size, value in arguments["thresholds"].items()}
    thresholds = _thresholds(args, images, own, patch_size, arguments.get("scorer", "entropy"))
    modes = args.modes or [mode for mode in MODES if not (is_segmenter and mode.endswith("-rect"))]
    cases = make_cases(arguments, modes, thresholds, args.padding, args.device)
    if args.compile:
        for case in cases:
            case.model.compile_blocks()
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

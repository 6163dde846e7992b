#!/usr/bin/env python
"""Draw which patches an image gets, for images and videos; with a checkpoint also what the model predicts.

examples:
  python tools/visualize.py photo.jpg
  python tools/visualize.py photos/ --resize 1536 --thresholds 32=5.5 64=5 128=4 --out-dir pictures
  python tools/visualize.py photo.jpg --patch-size 14 --resize 336 --thresholds 28=5.75 --show both
  python tools/visualize.py clip.mp4 --resize 640 --format gif
  python tools/visualize.py photo.jpg --config det_configs/eva02_l_apt_1536.py
  python tools/visualize.py data/photoshapes/images/validation/000001.jpg \\
      --config det_configs/eva02_tiny_apt_photoshapes.py \\
      --checkpoint det_configs/checkpoints/eva02_tiny_apt_photoshapes.safetensors

The standard grid is drawn beside the chosen patches; captions hold the tokens and the saving. Padding of batches
is left out, and where a segmenter cuts crops, its patches follow the crops' corners instead of the image's. Runs
without a GPU.
"""

import argparse
import warnings
from dataclasses import replace
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import track

from tools.cli import check_at_least, names_of, parser_of, run
from apt_backbones import PatchLayout, score_patches, select_patches
from apt_backbones.images import IMAGE_SUFFIXES, find_images, read_rgb, to_tensor
from apt_backbones.scores import SCORERS, check_thresholds
from tools.drawing import compose, draw_grid, draw_heat, even, size_caption, zoom_for
from tools.patch_settings import PatchSettings, settings_of, with_longest_side
from tools.video import VIDEO_SUFFIXES, is_video, read_frames, write_video

IMAGE_PANEL, VIDEO_PANEL = 1000, 640  # pixels near which the longer side of a drawn picture lies, if it is small
VIDEO_WIDTH = 1920  # pixels that a frame of an output video has at most

console = Console(stderr=True)


def parse_thresholds(items: list[str], patch_size: int) -> dict[int, float]:
    """["32=5.5", "64=5"] -> {32: 5.5, 64: 5.0}."""
    try:
        thresholds = {int(size): float(threshold) for size, threshold in (item.split("=") for item in items)}
    except ValueError:
        raise ValueError(f"thresholds must be SIZE=THRESHOLD, e.g. 32=5.5 64=5; got {' '.join(items)}") from None
    return check_thresholds(thresholds, patch_size)


def panels_of(image: Image.Image, settings: PatchSettings, show: str, zoom: int) -> list:
    """Captions and pictures: the standard grid beside the chosen patches, heat maps of the scores, or both."""
    tensor, sizes = to_tensor(image), tuple(settings.thresholds)
    scores = score_patches(tensor, sizes, settings.scorer)
    sides = select_patches(scores, settings.thresholds, settings.patch_size, tensor.shape[2:])
    chosen = PatchLayout.build(sides, settings.patch_size, sizes)
    panels = []
    if show in ("grid", "both"):
        standard = PatchLayout.dense(1, chosen.grid, chosen.patch_size)
        saved = 1 - chosen.num_tokens / standard.num_tokens
        panels.append((f"standard: {standard.num_tokens} tokens", draw_grid(image, standard, zoom)))
        caption = size_caption(f"adaptive: {chosen.num_tokens} tokens, {saved:.0%} fewer", chosen)
        panels.append((caption, draw_grid(image, chosen, zoom)))
    if show in ("scores", "both"):
        for size in sizes:
            inside = scores[size][scores[size].isfinite()]
            span = f", {inside.min():.2f} to {inside.max():.2f}" if len(inside) else ""
            caption = f"{settings.scorer} at {size} px{span} (threshold {settings.thresholds[size]:g})"
            panels.append((caption, draw_heat(image, scores[size][0], size, zoom)))
    return panels


def settings_by(args: argparse.Namespace) -> PatchSettings:
    """The configuration's settings with the flags that were given in their place."""
    if args.config:
        settings = settings_of(args.config)
    else:
        settings = PatchSettings(args.patch_size or 16, {}, "entropy", with_longest_side(None))
    if args.patch_size:
        settings = replace(settings, patch_size=args.patch_size)
    if args.scorer:
        settings = replace(settings, scorer=args.scorer)
    if args.resize:
        settings = replace(settings, prepare=with_longest_side(args.resize))
    if args.thresholds:
        return replace(settings, thresholds=parse_thresholds(args.thresholds, settings.patch_size))
    if not args.config:
        return replace(settings, thresholds={2 * settings.patch_size: 5.5, 4 * settings.patch_size: 4.0})
    if not settings.thresholds:
        raise ValueError(f"{args.config} has no thresholds: its model is dense; name an adaptive one, or --thresholds")
    return replace(settings, thresholds=check_thresholds(settings.thresholds, settings.patch_size))


class Sheets:
    """Makes the sheet of a picture: its patches, and a model's predictions if there is one."""

    def __init__(self, args: argparse.Namespace):
        self.settings, self.show, self.score, self.model = settings_by(args), args.show, args.score, None
        if args.checkpoint:
            if not args.config or Path(args.config).is_dir():
                raise ValueError("--checkpoint needs the --config of a detector or segmenter")
            from tools.mm_model import MMModel

            self.model = MMModel(args.config, args.checkpoint)
            self.model.trunk.thresholds = dict(self.settings.thresholds)
            self.model.trunk.scorer = self.settings.scorer

    def __call__(self, image: Image.Image, panel_side: int) -> Image.Image:
        prepared = self.settings.prepare(image)
        panels = panels_of(prepared, self.settings, self.show, zoom_for(prepared, panel_side))
        if self.model is not None:
            whole = image if image.width > prepared.width else prepared
            with self.model.dense():
                panels.append(("dense predictions", self.model.draw_predictions(whole, self.score)))
            panels.append(("adaptive predictions", self.model.draw_predictions(whole, self.score)))
        return compose(panels)


def video_sheets(path: Path, sheets: Sheets) -> tuple[object, float]:
    """Frames of the output video, one by one, and its frames per second."""
    frames, fps, count = read_frames(path)

    def drawn():
        for frame in track(frames, description=path.name, total=count, console=console, transient=True):
            sheet = sheets(frame, VIDEO_PANEL)
            if sheet.width > VIDEO_WIDTH:
                sheet = sheet.resize((VIDEO_WIDTH, round(sheet.height * VIDEO_WIDTH / sheet.width)))
            yield even(sheet)

    return drawn(), fps


def main() -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("paths", nargs="+", metavar="IMAGE|DIR|VIDEO", help="files, or folders to search for images and videos")
    add("--config", help="config of any task, or folder of a LLaVA model, to take all settings from")
    add("--checkpoint", metavar="FILE", help="weights of that config: predictions are drawn, too, dense and adaptive")
    add("--patch-size", type=int, help="side of the base patch in pixels (default: the config's, or 16)")
    add(
        "--thresholds",
        nargs="+",
        metavar="SIZE=THRESHOLD",
        help="merge patches of SIZE pixels that score below THRESHOLD "
        "(default: the config's, or 5.5 at twice, 4 at 4 times the base)",
    )
    add(
        "--scorer",
        metavar="NAME|FILE",
        help=f"{', '.join(SCORERS)}, or a learned scorer's file (default: the config's, or entropy, in bits)",
    )
    add("--show", choices=("grid", "scores", "both"), default="grid", help="default: grid")
    add("--resize", type=int, metavar="PIXELS", help="longer side to resize to, instead of what the config says")
    add("--score", type=float, default=0.3, help="draw boxes from this score on (default: 0.3)")
    add("--format", choices=("mp4", "gif"), default="mp4", help="of videos (default: mp4)")
    add("--out-dir", type=Path, default=Path("."), help="folder for NAME_patches.png or .mp4 (default: here)")
    args = parser.parse_args()
    check_at_least(args, resize=1, patch_size=2)
    paths = find_images(args.paths, IMAGE_SUFFIXES | VIDEO_SUFFIXES)
    warnings.simplefilter("ignore")  # of the toolboxes, about what this tool leaves out
    sheets = Sheets(args)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    names = names_of(paths)
    for path in track(paths, description="drawing", console=console, transient=True, disable=len(paths) == 1):
        if is_video(path):
            target = args.out_dir / f"{names[path]}_patches.{args.format}"
            write_video(target, *video_sheets(path, sheets))
        else:
            target = args.out_dir / f"{names[path]}_patches.png"
            sheets(read_rgb(path), IMAGE_PANEL).save(target)
        print(target)


if __name__ == "__main__":
    run(main)

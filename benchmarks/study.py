"""A frozen network whose quality is measured at equal tokens: smaller images, merging, random dropping, ToMe.

What all data sets share. Legend: B images, C channels, H x W base cells.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn

from tools.cli import parser_of
from apt_backbones import adapt, read_checkpoint
from apt_backbones.backbones.timm_vit import load_timm
from apt_backbones.calibrate import calibrate_thresholds, score_maps_of
from apt_backbones.distill import Views, ViewSettings, save_tensors, train_scorer
from apt_backbones.files import write_atomically
from apt_backbones.images import representative
from apt_backbones.layout import PatchLayout
from apt_backbones.new_layers import load_new_layers, save_new_layers
from apt_backbones.scores import SCORERS
from apt_backbones.selection import normalize
from apt_backbones.trunk import AdaptiveTrunk
from tools.machine import processor
from tools.steps import digest, fingerprint

from . import tome

MODEL, PATCH, MERGED = "vit_small_patch14_dinov2", 14, 28
DETAIL_STEPS = 400  # of learned maps
TIMED_IMAGES = 8
RANK, STEPS, RATE = 16, 450, 1e-4  # of adapters and LoRA, and of their training
# Of the results' entries: what those share that differ in their seeds alone.
point_of = itemgetter("method", "scorer", "fill", "image", "budget")

console = Console(stderr=True)


class Setting(NamedTuple):
    """One point of a chart.

    Attributes:
        method: "dense", "apt", "random", "tome", or "lora", dense images read by a tuned network.
        image: height and width.
        scorer: of "apt".
        budget: tokens that it is calibrated to.
        seed: of the learned scorer's distilling.
        fill: of the maps of "dense" and "apt", see ``map_fill`` of ``AdaptiveTrunk.set_up``; or "dense", what the
            network says in the merged cells without merging: the ceiling of all ways to fill these.
        adapters: of "apt", whether merged tokens go through trained adapters (``TokenAdapter``).
    """

    method: str
    image: tuple[int, int]
    scorer: str | None = None
    budget: int | None = None
    seed: int = 0
    fill: str = "repeat"
    adapters: bool = False

    @property
    def name(self) -> str:
        scorer = self.scorer and Path(self.scorer).stem
        parts = [self.method, *self.image, scorer, self.budget, f"seed{self.seed}" if self.seed else None]
        parts += [None if self.fill == "repeat" else self.fill, "adapters" if self.adapters else None]
        return "_".join(str(part) for part in parts if part is not None)

    @property
    def plain(self) -> "Setting":
        """The same tokens without new layers, with the network's own maps."""
        return self._replace(fill="repeat", adapters=False)

    @property
    def about(self) -> dict:
        """What entries of the results say about it."""
        return {
            "method": self.method,
            "scorer": self.scorer and Path(self.scorer).stem,
            "scorer_seed": self.seed if self.scorer == "learned" else None,
            "fill": self.fill,
            "image": text(self.image),
            "budget": self.budget,
        }

    @property
    def cells(self) -> int:
        return self.image[0] * self.image[1] // PATCH**2


class Study:
    """The network, and steps that are kept: the same command resumes where it stopped.

    Args:
        weights: of the network; None downloads timm's.
        work_dir: for everything that is kept.
        dtype: in which features are computed.
        blocks: after which maps are taken; negative ones count from the last.
        map_scale: of maps that are not repeated, see ``AdaptiveTrunk.set_up``.
        data: what else all steps depend on, by name, as values that JSON can hold.

    Raises:
        ValueError: what is kept was made of something else.
    """

    distill_epochs = 24

    def __init__(
        self,
        weights: Path | None,
        work_dir: Path,
        dtype: torch.dtype,
        blocks: Sequence[int],
        map_scale: int = 1,
        **data: object,
    ):
        data |= {"weights": weights and fingerprint(weights), "dtype": str(dtype)}
        file = work_dir / "made_of.json"
        kept = json.loads(file.read_text()) if file.is_file() else data
        if differ := [name for name in data if data[name] != kept.get(name)]:
            raise ValueError(f"steps in {work_dir} were made with other {', '.join(differ)}; give another --work-dir")
        write_atomically(file, json.dumps(data))
        self.weights, self.work_dir, self.dtype, self.blocks = weights, work_dir, dtype, blocks
        self.map_scale = map_scale
        self.vit = self.build()
        self.blocks = tuple(block % len(self.vit.blocks) for block in blocks)

    def build(self) -> AdaptiveTrunk:
        """The frozen network, adaptive, with nothing merged yet."""
        layers = dict(map_fill="learned", map_scale=self.map_scale, out_indices=self.blocks)
        vit = adapt(pretrained(self.weights), {MERGED: 0.0}, merge="resizing", **layers)
        vit.thresholds, vit.map_fill = {}, "repeat"
        return vit

    def original(self) -> nn.Module:
        """timm's own network."""
        return pretrained(self.weights)

    def images(self, split: str, size: tuple[int, int]) -> Iterator[Tensor]:
        """The images of a split as the network sees them at a size: uint8 (1, 3, height, width)."""
        raise NotImplementedError

    def views(self, split: str) -> list[Views]:
        """Images of the train or val split, and what merging loses in them; a group per shape."""
        raise NotImplementedError

    @torch.inference_mode(False)  # whoever measures with it may be in it
    def scorer_file(self, seed: int = 0) -> Path:
        """The scorer, distilled from the train split; of its epochs the best on the val split."""
        file = self.work_dir / f"scorer_{seed}.safetensors"
        if not file.is_file():
            scorer, curve = train_scorer(
                self.views("train"),
                self.views("val"),
                self.vit.patch_embed.proj,
                self.vit.pixel_mean,
                self.vit.pixel_std,
                epochs=self.distill_epochs,
                seed=seed,
                state=self.work_dir / f"scorer_{seed}.pth",
                report=lambda epoch: console.print(epoch, highlight=False),
            )
            best = min(curve, key=lambda epoch: epoch.held_out)
            scorer.origin = {"model": MODEL, "epoch": best.epoch}
            scorer.save(file)
        return file

    def detail_file(self) -> Path:
        """The new layers of maps that are filled as "learned", trained on the train split."""
        raise NotImplementedError

    def adapters_file(self) -> Path:
        """The adapters of merged tokens, trained on the train split."""
        raise NotImplementedError

    @cached_property
    def with_lora(self) -> AdaptiveTrunk:
        """The network that learned to read smaller images (``trained_lora``)."""
        raise NotImplementedError

    @torch.inference_mode(False)  # whoever measures with it may be in it
    def trained_lora(
        self,
        sizes: Sequence[tuple[int, int]],
        say: Callable[[AdaptiveTrunk, Tensor], Tensor],
        loss: str,
        paths: Sequence[Path],
        views: ViewSettings,
        batch: int,
        prepare: Callable,
    ) -> AdaptiveTrunk:
        """The network with LoRA in every layer, merged, which learned without labels to say of smaller images what the
        network says of larger ones.

        Args:
            sizes: of smaller images, which take turns.
            say: a network and normalized images to what is to stay; it is resampled to the larger image's cells.
            loss: of ``distance_from``.
            paths, views, batch, prepare: of the larger images, see ``finetune_features``.
        """
        vit, file = self.build(), self.work_dir / "smaller.safetensors"
        if not file.is_file():
            from apt_backbones.mm.smaller_images import finetune_for_smaller_images

            def outputs(pixels: Tensor) -> Tensor:
                # What is cast would else stay as it was when the first image was seen without LoRA.
                with torch.autocast("cpu", self.dtype, self.dtype != torch.float32, cache_enabled=False):
                    return say(vit, self.normalized(pixels))

            settings = dict(rank=RANK, iterations=STEPS, batch=batch, rate=RATE, prepare=prepare)
            finetune_for_smaller_images(vit, outputs, sizes, paths, views, self.work_dir / "smaller", loss, **settings)
            save_tensors(file, vit.state_dict())
        vit.load_state_dict(load_file(file))
        return vit.eval().requires_grad_(False)

    @torch.inference_mode(False)  # whoever measures with them may be in it
    def trained_layers(
        self,
        name: str,
        settings: Sequence[Setting],
        say: Callable[[Tensor], Tensor],
        paths: Sequence[Path],
        views: ViewSettings,
        fill: str = "repeat",
        **options,
    ) -> Path:
        """Train new layers without labels: with merging the network says what it says without.

        Args:
            name: of the file.
            settings: whose thresholds take turns.
            say: normalized images to what is to stay, by the network.
            paths, views, options: see ``finetune_features``; by default of as many steps as LoRA, at its rate.
            fill: of the maps, meanwhile.
        """
        file = self.work_dir / f"{name}.safetensors"
        if not file.is_file():
            from apt_backbones.mm.feature_matching import finetune_features

            thresholds, chance = [{MERGED: self.threshold(setting)} for setting in settings], random.Random(0)

            def outputs(pixels: Tensor) -> Tensor:
                if self.vit.thresholds:  # not the dense ones
                    self.vit.thresholds = chance.choice(thresholds)
                with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                    return say(self.normalized(pixels))

            self.vit.thresholds, self.vit.scorer, self.vit.map_fill = thresholds[0], str(self.scorer_file()), fill
            options = dict(iterations=STEPS, rate=RATE) | options
            finetune_features(self.vit, outputs, paths, views, self.work_dir / name, **options)
            save_new_layers(self.vit, file)
            self.vit.thresholds, self.vit.map_fill = {}, "repeat"
        return file

    def trained_detail(
        self,
        settings: Sequence[Setting],
        probabilities: Callable[[Tensor], Tensor],
        paths: Sequence[Path],
        views: ViewSettings,
        **options,
    ) -> Path:
        """``trained_layers`` of maps, with which these lead to the same probabilities.

        Args:
            probabilities: of maps (B, C, H, W).
        """

        def say(images: Tensor) -> Tensor:
            return probabilities(torch.cat(self.vit.feature_maps(images, self.blocks, norm=True), 1).float())

        options |= dict(loss="probabilities", iterations=DETAIL_STEPS, rate=2e-3)
        return self.trained_layers("detail", settings, say, paths, views, "learned", **options)

    def kept(self, name: str, function: Callable[[], object]):
        """The result of a step, from an earlier run if there is one."""
        file = self.work_dir / "steps" / f"{name}.json"
        if not file.is_file():
            write_atomically(file, json.dumps(function()))
        return json.loads(file.read_text())

    def normalized(self, pixels: Tensor) -> Tensor:
        """uint8 (B, 3, height, width) -> what the network takes, float32."""
        return normalize(pixels, self.vit.pixel_mean, self.vit.pixel_std)

    @torch.inference_mode()
    def maps(self, pixels: Tensor) -> Tensor:
        """Features of uint8 images under the network's present thresholds (B, C, H, W), float16."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            return torch.cat(self.vit.feature_maps(self.normalized(pixels), self.blocks, norm=True), 1).half()

    def merges(self, setting: Setting) -> int:
        """How many tokens ToMe merges in every block."""
        return round((setting.cells - setting.budget) / (len(self.vit.blocks) / 2))

    @torch.inference_mode()
    def tome_maps(self, setting: Setting, pixels: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
        """Feature maps with ToMe, and the mean tokens of a layer."""
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            maps, tokens = tome.feature_maps(self.vit, self.normalized(pixels), self.merges(setting), self.blocks)
        return torch.cat(maps, 1), tokens

    def maps_of(self, setting: Setting, pixels: Tensor) -> tuple[Tensor, float]:
        """Feature maps of a setting that is set (``as_set``), and the batch's tokens."""
        if setting.method == "tome":
            maps, count = self.tome_maps(setting, pixels, self.dtype)
            return maps, count * len(maps)
        maps = self.maps(pixels)
        return maps, self.vit.last_layout.num_tokens - len(maps)  # without CLS

    @torch.inference_mode()
    def filled(self, setting: Setting, maps: Tensor, layout: PatchLayout, pixels: Tensor) -> Tensor:
        """Maps of ``setting.plain`` filled as the setting says; that one is set."""
        if setting.fill == "repeat":
            return maps
        if setting.fill == "dense":
            thresholds, self.vit.thresholds = self.vit.thresholds, {}
            maps = torch.where(layout.to_map(layout.side_T[:, None]) > PATCH, self.maps(pixels), maps)
            self.vit.thresholds = thresholds
            return maps
        parts = zip(self.blocks, maps.float().chunk(len(self.blocks), 1))
        with self.as_set(setting):
            return torch.cat([self.vit.fill_map(block, layout, part) for block, part in parts], 1)

    def scorer_of(self, setting: Setting) -> str:
        if setting.scorer == "learned":
            return str(self.scorer_file(setting.seed))
        return setting.scorer or "entropy"

    def threshold(self, setting: Setting) -> float:
        """That meets the budget on the val split."""

        def calibrate() -> float:
            scorer = self.scorer_of(setting)
            maps = [score_maps_of(image.float(), (MERGED,), scorer) for image in self.images("val", setting.image)]
            return calibrate_thresholds(maps, PATCH, setting.budget / setting.cells)[MERGED]

        return self.kept(f"threshold_{setting.plain.name}", calibrate)

    @contextmanager
    def as_set(self, setting: Setting) -> Iterator[None]:
        """The network with a setting's patches and maps."""
        original, self.vit = self.vit, self.with_lora if setting.method == "lora" else self.vit
        if setting.fill == "learned":
            load_new_layers(self.vit, self.detail_file())  # first: training them sets other patches
        if setting.adapters:
            load_new_layers(self.vit, self.adapters_file())
        names = ("thresholds", "scorer", "merge", "map_fill", "token_adapters")
        before = {name: getattr(self.vit, name) for name in names}
        if not setting.adapters:
            self.vit.token_adapters = nn.ModuleList()
        if setting.method in ("apt", "random"):
            self.vit.thresholds, self.vit.scorer = {MERGED: self.threshold(setting)}, self.scorer_of(setting)
            self.vit.merge = "random" if setting.method == "random" else "resizing"
        if setting.fill != "dense":
            self.vit.map_fill = setting.fill
        yield
        for name, value in before.items():
            setattr(self.vit, name, value)
        self.vit = original

    def times(self, settings: Sequence[Setting], name: str = "times") -> dict[str, float]:
        """Milliseconds of CPU time per image, scoring included: batch 1, float32, one thread; settings take turns,
        the median over three rounds is averaged over images that keep as many tokens as the test split does. LoRA,
        being merged, takes no time.

        Args:
            name: of the step.
        """
        measured = [setting for setting in settings if setting.method != "lora"]

        def measure() -> dict[str, float]:
            torch.set_num_threads(1)
            original, chosen, read = self.original(), self.timed_images(measured), {}
            for size in {setting.image for setting in measured}:
                read[size] = [pixels for number, pixels in enumerate(self.images("test", size)) if number in chosen]
            spent: dict[str, list[float]] = {setting.name: [] for setting in measured}
            for number in track(range(len(chosen)), "timing", console=console):
                of_image: dict[str, list[float]] = {setting.name: [] for setting in measured}
                for warming_up in [True] * (number == 0) + [False] * 3:
                    for setting in measured:
                        with self.as_set(setting):
                            taken = cpu_seconds(self.forward_of(setting, original), read[setting.image][number])
                        if not warming_up:
                            of_image[setting.name].append(1000 * taken)
                for name, values in of_image.items():
                    spent[name].append(statistics.median(values))
            return {name: statistics.mean(values) for name, values in spent.items()}

        found = self.kept(f"{name}_{digest([setting.name for setting in measured])}", measure)
        tuned = [setting for setting in settings if setting.method == "lora"]
        return found | {setting.name: found[setting._replace(method="dense").name] for setting in tuned}

    @torch.inference_mode()
    def timed_images(self, settings: Sequence[Setting]) -> list[int]:
        """Numbers of ``TIMED_IMAGES`` of the test split whose mean tokens are near those of all, in every setting."""
        tokens = {setting.plain: [] for setting in settings if setting.method != "tome"}
        for size in dict.fromkeys(setting.image for setting in tokens):
            of_size = [setting for setting in tokens if setting.image == size]
            for pixels in track(list(self.images("test", size)), f"tokens, {text(size)}", console=console):
                for setting in of_size:
                    with self.as_set(setting):
                        tokens[setting].append(self.vit.layout(self.normalized(pixels)).num_tokens)
        return representative(np.array([*tokens.values()]), TIMED_IMAGES)

    def forward_of(self, setting: Setting, original: nn.Module) -> Callable[[Tensor], object]:
        """What is timed: for dense images timm's own network, unless maps are filled."""
        if setting.method == "tome":
            return lambda pixels: self.tome_maps(setting, pixels, torch.float32)
        if setting.method == "dense" and setting.fill == "repeat":
            return lambda pixels: original.forward_intermediates(
                self.normalized(pixels), list(self.blocks), norm=True, intermediates_only=True
            )
        return lambda pixels: self.vit.feature_maps(self.normalized(pixels), self.blocks, norm=True)


def pretrained(weights: Path | None) -> nn.Module:
    """timm's network, frozen, with weights of a file or its own."""
    vit = timm.create_model(MODEL, pretrained=weights is None, num_classes=0, dynamic_img_size=True)
    if weights is not None:
        load_timm(vit, read_checkpoint(weights))
    return vit.eval().requires_grad_(False)


def text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def between(points: list[tuple[float, float]], tokens: float) -> float | None:
    """The value of a curve of straight lines; None beyond its ends."""
    for (low, before), (high, after) in pairwise(points):
        if low <= tokens <= high:
            return before + (after - before) * (tokens - low) / (high - low)
    return None


def train_head(x: Tensor, labels: Tensor, num_classes: int) -> nn.Linear:
    """Logistic regression on standardized features."""
    center, spread = x.mean(0), x.std(0).clamp(min=1e-6)
    head = nn.Linear(x.shape[1], num_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    x = (x - center) / spread
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(x), labels) + 5e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        head.weight.div_(spread)
        head.bias.sub_(head.weight @ center)
    return head.requires_grad_(False)


@torch.inference_mode()
def cpu_seconds(function: Callable[[Tensor], object], pixels: Tensor) -> float:
    started = time.thread_time()
    function(pixels)
    return time.thread_time() - started


def study_parser(text: str, folder: str) -> argparse.ArgumentParser:
    """With the flags of every study; ``folder`` is where its steps are kept."""
    parser = parser_of(text)
    parser.add_argument("--weights", type=Path, help="timm's weights of the network (default: downloaded)")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs", folder), help="for finished steps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the features")
    parser.add_argument("--also", nargs="+", default=[], help="files of other learned scorers, measured as well")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags of the command line; scorers that one could not tell apart in the results are refused."""
    args = parser.parse_args()
    names = [*SCORERS, "learned", *(Path(file).stem for file in args.also)]
    if len({*names}) < len(names):
        parser.error(f"--also: the files need names of their own, other than {', '.join([*SCORERS, 'learned'])}")
    return args


def about(module: str, args: argparse.Namespace) -> dict:
    """What the results of a study are headed by."""
    return {
        "hardware": f"{processor()}, 1 thread; CPU time, batch 1, float32; features for quality in {args.dtype}",
        "command": " ".join([f"python -m benchmarks.{module}", *sys.argv[1:]]),
        "weights": args.weights.name if args.weights else "timm's",
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }

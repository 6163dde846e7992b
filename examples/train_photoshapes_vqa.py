#!/usr/bin/env python
"""Train a small dense LLaVA from scratch on PhotoShapes' questions, and save it as a stock transformers checkpoint.

The vision tower is CLIP's, the language model Llama's, about two million parameters together. As in LLaVA, the tower
learns first and is then frozen while the projector and the language model learn to answer. In place of CLIP's
pretraining every image token is drawn towards the embeddings of the words for what it shows: shape, colour, the half
of the image in which its object lies, and "objects" where an object has its centre. So that a CPU core suffices, all
questions of an image share one pass over it (each sees the image and itself, no other question), attention in the
language model starts out looking for similar tokens (arXiv 2305.09828), and two heads of its first layer are told where
to look: from the word for a shape or a colour at the image tokens that show it.

An interrupted run, started again, does not repeat the alignment if that was finished.

examples:
  python examples/make_photoshapes.py data/photoshapes_big --train 8000 --val 400 --size 192 --min-diameter 0.2
  python examples/train_photoshapes_vqa.py data/photoshapes_big work_dirs/llava_dense
"""

import argparse
import json
import logging
import math
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from tools.cli import parser_of, run
from apt_backbones.files import write_atomically
from llava_apt.data import read_records
from llava_apt.prompt import IMAGE, SYSTEM
from tools.steps import fingerprint

PATCH, CELLS = 14, 12  # LLaVA's patch; the image's side is PATCH * CELLS pixels
WIDTH, LAYERS, HEADS = 128, 4, 4
MIN_KEPT = 0.55  # of the image tokens, in training
MIN_COVER = 0.3  # of a cell, for it to count as showing an object
IGNORED = -100

logger = logging.getLogger("train_photoshapes_vqa")


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """One token per word of the texts. LLaVA's fixed system text is dropped: it would only cost time."""
    special = ["<unk>", "<pad>", "<s>", "</s>", IMAGE]
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", behavior="isolated")]
    )
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(text)} - set(special)
    vocabulary = {word: i for i, word in enumerate([*special, "USER:", "ASSISTANT:", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(SYSTEM, "")
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE],
        padding_side="left",
    )


def build(texts: list[str]) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    tokenizer = build_tokenizer(texts)
    side = PATCH * CELLS
    sizes = dict(hidden_size=WIDTH, num_attention_heads=HEADS)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    layers = dict(intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS + 1)  # LLaVA takes the last layer but one
    vision = CLIPVisionConfig(**sizes, **layers, image_size=side, patch_size=PATCH)
    layers = dict(intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS, max_position_embeddings=2048)
    text = LlamaConfig(
        vocab_size=len(tokenizer), **sizes, **layers, **special, initializer_range=0.05, tie_word_embeddings=True
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=CELLS**2,
    )
    image_processor = LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return LlavaForConditionalGeneration(config), processor


class Scenes:
    """Per image: pixels, what each cell shows, and all its questions with answers; all images are held in memory.

    What a cell shows is (5, CELLS, CELLS): number of the shape and of the colour of the object that covers most of it
    (0: none), whether it is the cell at the centre of that object, and where this centre is, from -1 to 1 across and
    down the image.
    """

    def __init__(self, folder: Path, split: str, processor: LlavaProcessor):
        self.tokenizer = processor.tokenizer
        image_processor = processor.image_processor
        questions = defaultdict(list)
        for record in read_records(folder / f"vqa_{split}.json"):
            question, answer = (message["value"] for message in record["conversations"])
            questions[record["image"]].append((question.replace(IMAGE, "").strip(), answer))
        coco = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        self.colours = sorted({a["colour"] for a in coco["annotations"] if a["colour"]})
        self.shapes = [category["name"] for category in coco["categories"]]
        names = {image["id"]: f"images/{split}/{image['file_name']}" for image in coco["images"]}
        objects = defaultdict(list)
        for annotation in coco["annotations"]:
            objects[names[annotation["image_id"]]].append(annotation)

        self.questions = list(questions.values())
        self.pixels = torch.empty(len(questions), 3, PATCH * CELLS, PATCH * CELLS, dtype=torch.uint8)
        self.cells = torch.empty(len(questions), 5, CELLS, CELLS)
        for index, name in enumerate(track(questions, "reading images", console=Console(stderr=True))):
            with Image.open(folder / name) as image:
                plain = image_processor(image, return_tensors="pt", do_rescale=False, do_normalize=False)
            self.pixels[index] = plain["pixel_values"][0].round().clamp(0, 255)
            self.cells[index] = self._cells(objects[name])
        self.mean = 255 * torch.tensor(image_processor.image_mean)[:, None, None]
        self.std = 255 * torch.tensor(image_processor.image_std)[:, None, None]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int):
        return (self.pixels[index] - self.mean) / self.std, self.cells[index], self.questions[index]

    def _cells(self, objects: list[dict]) -> torch.Tensor:
        cells, most = torch.zeros(5, CELLS, CELLS), torch.full((CELLS, CELLS), MIN_COVER)
        owner = torch.full((CELLS, CELLS), -1)
        middle = (torch.arange(CELLS) + 0.5) * 2 / CELLS - 1
        for number, item in enumerate(objects):
            mask = torch.from_numpy(coco_mask.decode(item["segmentation"]).astype(np.float32))
            missing = max(mask.shape) - torch.tensor(mask.shape)
            top, left = (missing // 2).tolist()
            mask = F.pad(mask, (left, int(missing[1]) - left, top, int(missing[0]) - top))
            cover = F.adaptive_avg_pool2d(mask[None], CELLS)[0]
            here = cover > most
            most, owner[here] = torch.maximum(most, cover), number
            y, x = (index.float().mean() * 2 / len(mask) - 1 for index in mask.nonzero(as_tuple=True))
            colour = self.colours.index(item["colour"]) + 1 if item["colour"] else 0
            cells[:, here] = torch.tensor([item["category_id"], colour, 0, x, y])[:, None]
        for number in owner.unique().tolist():
            if number >= 0:
                rows, columns = (owner == number).nonzero(as_tuple=True)
                x, y = cells[3:, rows[0], columns[0]]
                nearest = ((middle[rows] - y) ** 2 + (middle[columns] - x) ** 2).argmin()
                cells[2, rows[nearest], columns[nearest]] = 1
        return cells

    def collate(self, items) -> dict[str, torch.Tensor]:
        """Token rows ``<s> USER: <image>... question ASSISTANT: answer </s> question ...``; every question stands at
        the position right behind the image, and sees the image and itself only.

        Of every batch's image tokens a random share is kept: language models that are trained for long have met texts
        of all lengths, and this one is to rely on neither their number nor their places in the row.
        """
        tokenizer = self.tokenizer
        kept = int(torch.randint(math.ceil(MIN_KEPT * CELLS**2), CELLS**2 + 1, ()))
        prefix = tokenizer("USER: " + IMAGE * kept)["input_ids"]
        rows = []
        for *_, questions in items:
            ids, labels, block, position = (
                list(prefix),
                [IGNORED] * len(prefix),
                [0] * len(prefix),
                [*range(len(prefix))],
            )
            for number, (question, answer) in enumerate(questions, start=1):
                asked = tokenizer(f"{question} ASSISTANT:", add_special_tokens=False)["input_ids"]
                told = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
                ids += asked + told
                labels += [IGNORED] * len(asked) + told
                block += [number] * len(asked + told)
                position += range(len(prefix), len(prefix) + len(asked + told))
            rows.append((ids, labels, block, position))
        length = max(len(ids) for ids, *_ in rows)
        fill = (tokenizer.pad_token_id, IGNORED, -1, 0)
        ids, labels, block, position = (
            torch.tensor([[*row[part], *[fill[part]] * (length - len(row[part]))] for row in rows]) for part in range(4)
        )
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        sees = causal & ((block[:, :, None] == block[:, None, :]) | (block[:, None, :] == 0))
        pixels, cells = (torch.stack([item[part] for item in items]) for part in range(2))
        return {
            "pixel_values": pixels,
            "cells": cells,
            "kept": torch.rand(len(items), CELLS**2).argsort(1)[:, :kept].sort(1).values,
            "input_ids": ids,
            "labels": labels,
            "position_ids": position,
            "attention_mask": torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None],
        }


def sines(width: int, cells: int) -> torch.Tensor:
    """Positions as sines and cosines across and down (cells * cells, width), so that near cells start out alike."""
    frequencies = torch.exp(torch.linspace(math.log(math.pi / cells), math.log(0.9 * math.pi), width // 4))
    rows, columns = torch.meshgrid(torch.arange(cells), torch.arange(cells), indexing="ij")
    angles = [index.flatten()[:, None] * frequencies for index in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def look_for_similar_tokens(model: LlavaForConditionalGeneration) -> None:
    """Start every attention layer of the language model with equal queries and keys, and outputs that copy."""
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        nn.init.orthogonal_(attention.q_proj.weight)
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
        nn.init.orthogonal_(attention.v_proj.weight, gain=0.5)
        attention.o_proj.weight.data.copy_(attention.v_proj.weight.T)


def turned(pixels: torch.Tensor, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch turned by a random multiple of 90 degrees, and mirrored half of the time."""
    cells = cells.clone()
    quarters = int(torch.randint(4, ()))
    pixels, cells = pixels.rot90(quarters, (2, 3)), cells.rot90(quarters, (2, 3))
    for _ in range(quarters):  # counter-clockwise: what was down is now right
        cells[:, 3], cells[:, 4] = cells[:, 4].clone(), -cells[:, 3]
    if torch.rand(()) < 0.5:
        pixels, cells = pixels.flip(3), cells.flip(3)
        cells[:, 3] = -cells[:, 3]
    return pixels, cells


def optimize(name: str, parameters: list[nn.Parameter], steps: int, learning_rate: float, loader, loss_of) -> None:
    """AdamW with warm-up and cosine for so many steps; ``loss_of`` maps a batch to its loss."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    started, losses = time.time(), []
    while len(losses) < steps:
        for batch in loader:
            loss = loss_of(batch)
            loss.sum().backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.detach())
            if len(losses) % 25 == 0:
                mean = torch.stack(losses[-25:]).mean(0).tolist()
                logger.info("%s: step %d  loss %s  %.0f s", name, len(losses), np.round(mean, 3), time.time() - started)
            if len(losses) == steps:
                break


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    records = read_records(args.data / "vqa_training.json")
    texts = [message["value"].replace(IMAGE, "") for record in records for message in record["conversations"]]
    model, processor = build(texts)
    look_for_similar_tokens(model)
    model.model.vision_tower.embeddings.position_embedding.weight.data[1:] = 0.5 * sines(WIDTH, CELLS)
    scenes = Scenes(args.data, "training", processor)
    logger.info("%.2f million parameters, %d images", sum(p.numel() for p in model.parameters()) / 1e6, len(scenes))
    if len(scenes) < args.batch_size:
        raise ValueError(f"{args.data} has {len(scenes)} images; give a --batch-size of at most as many")
    loader = DataLoader(scenes, args.batch_size, shuffle=True, drop_last=True, collate_fn=scenes.collate)
    llava = model.model.train()
    embedding = model.get_input_embeddings()
    # What cells can show, as words; every list has one more entry, learned, for "none of these".
    words = [scenes.shapes, scenes.colours, ["left", "right"], ["top", "bottom"], ["objects"]]
    names = [processor.tokenizer.convert_tokens_to_ids(group) for group in words]
    no_name = nn.Embedding(len(words), WIDTH)
    centre = nn.Linear(WIDTH, 2)

    def alignment(batch) -> torch.Tensor:
        """Cross-entropy of naming what tokens show, per group of words; and the error of where their object is."""
        pixels, cells = turned(batch["pixel_values"], batch["cells"])
        tokens = torch.cat(llava.get_image_features(pixels).pooler_output)
        shape, colour, is_centre, x, y = cells.flatten(2).transpose(0, 1).flatten(1)
        shown = shape > 0
        halves = [torch.where(shown, 1 + (axis > 0), 0) for axis in (x, y)]
        where = F.smooth_l1_loss(centre(tokens[shown]), torch.stack([x, y], dim=1)[shown])
        naming = [
            F.cross_entropy(tokens @ torch.cat([none[None], embedding.weight[ids]]).T, target.long())
            for none, ids, target in zip(no_name.weight, names, (shape, colour, *halves, is_centre))
        ]
        naming[0] = 3 * naming[0]  # shapes are what takes longest to learn
        return torch.stack([*naming, where])

    # Number of the shape and of the colour that a token of the text names, and whether it is a plural: those look at
    # centres, to count them.
    shape_of, colour_of = torch.zeros(2, len(processor.tokenizer), dtype=torch.long)
    plural = torch.zeros(len(processor.tokenizer), dtype=torch.bool)
    for lookup, group in ((shape_of, scenes.shapes), (colour_of, scenes.colours)):
        for number, word in enumerate(group, start=1):
            for form in (word, f"{word}s", f"{word}es"):
                if form in processor.tokenizer.vocab:
                    lookup[processor.tokenizer.vocab[form]] = number
                    plural[processor.tokenizer.vocab[form]] = form != word
    objects = processor.tokenizer.vocab["objects"]
    llava.language_model.set_attn_implementation("eager")  # the others return no attention

    def looking(attention_BHLL, batch) -> torch.Tensor:
        """Minus the log of the attention that words pay to the image tokens they name, over all that name some."""
        is_image = batch["input_ids"] == model.config.image_token_id
        first = int(is_image[0].nonzero()[0])
        kept = batch["kept"]
        paid_BLC = attention_BHLL[:, :2].mean(1)[:, :, first : first + kept.shape[1]]
        shape, colour, is_centre = batch["cells"].flatten(2)[:, :3].gather(2, kept[:, None].expand(-1, 3, -1)).unbind(1)
        ids = batch["input_ids"]
        match_BLC = (shape_of[ids][:, :, None] == shape[:, None]) & (shape > 0)[:, None]
        match_BLC |= (colour_of[ids][:, :, None] == colour[:, None]) & (colour > 0)[:, None]
        match_BLC &= ~plural[ids][:, :, None] | (is_centre > 0)[:, None]
        match_BLC |= (ids == objects)[:, :, None] & (is_centre > 0)[:, None]
        return -((paid_BLC * match_BLC).sum(-1)[match_BLC.any(-1)] + 1e-4).log().mean()

    def answers(batch) -> torch.Tensor:
        with torch.no_grad():
            image = llava.vision_tower(batch.pop("pixel_values"), output_hidden_states=True)
        hidden = image.hidden_states[model.config.vision_feature_layer][:, 1:]
        hidden = hidden.gather(1, batch["kept"][:, :, None].expand(-1, -1, WIDTH))
        image.pooler_output = list(llava.multi_modal_projector(hidden))
        text = {name: value for name, value in batch.items() if name not in ("cells", "kept")}
        outputs = model(**text, mm_encoder_outputs={"image": image}, output_attentions=True)
        return torch.stack([outputs.loss, 0.2 * looking(outputs.attentions[0], batch)])

    unfinished = args.destination.with_name(f".{args.destination.name}.unfinished")
    aligned = unfinished / f"aligned_{fingerprint(args.data)}.safetensors"  # of an interrupted run
    if aligned.exists():
        model.load_state_dict(load_file(aligned), strict=False)  # without the head, which is tied to the embeddings
        logger.info("alignment: taken from %s", aligned)
    else:
        seeing = [llava.vision_tower, llava.multi_modal_projector, embedding, no_name, centre]
        parameters = [parameter for module in seeing for parameter in module.parameters()]
        optimize("alignment", parameters, args.alignment_steps, 1e-3, loader, alignment)
        write_atomically(aligned, lambda path: save_model(model, str(path)))
    parameters = [*llava.multi_modal_projector.parameters(), *llava.language_model.parameters()]
    optimize("answers", parameters, args.steps, args.learning_rate, loader, answers)
    aligned.unlink()
    model.eval().save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    os.replace(unfinished, args.destination)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path, help="folder that examples/make_photoshapes.py made")
    parser.add_argument("destination", type=Path, help="folder for the checkpoint; must not exist")
    parser.add_argument("--alignment-steps", type=int, default=2500, help="of the tower (%(default)s)")
    parser.add_argument("--steps", type=int, default=900, help="of the language model (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="for answers; peak, cosine (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.destination.exists():
        raise FileExistsError(f"{args.destination} already exists; remove it or name another folder")
    train(args)


if __name__ == "__main__":
    run(main)

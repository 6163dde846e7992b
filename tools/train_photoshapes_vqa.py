#!/usr/bin/env python
"""Train a small dense LLaVA from scratch on PhotoShapes' questions, and save it as a stock transformers checkpoint.

The vision tower is CLIP's, the language model Llama's, one to two million parameters together. As in LLaVA, the tower
learns first and is then frozen while the projector and the language model learn to answer. In place of CLIP's
pretraining every image token is drawn towards the embeddings of the words for the shape and the colour that it shows.
So that a CPU core suffices, all questions of an image share one pass over it (each sees the image and itself, no other
question), attention starts out looking for similar tokens (arXiv 2305.09828), and two heads of the first layer are told
where to look: from the word for a shape or a colour at the image tokens that show it.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as coco_mask
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

from llava_apt.data import read_records
from llava_apt.prompt import IMAGE, SYSTEM

PATCH, CELLS = 14, 12  # LLaVA's patch; the image's side is PATCH * CELLS pixels
WIDTH, LAYERS, HEADS = 128, 3, 4
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
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS + 1,  # LLaVA takes the last layer but one
        num_attention_heads=HEADS,
        image_size=side,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.05,
        tie_word_embeddings=True,
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
    """Per image: pixels, what each cell shows, and all its questions with answers."""

    def __init__(self, folder: Path, split: str, processor: LlavaProcessor):
        self.folder, self.processor = folder, processor
        questions = defaultdict(list)
        for record in read_records(folder / f"vqa_{split}.json"):
            question, answer = (message["value"] for message in record["conversations"])
            questions[record["image"]].append((question.replace(IMAGE, "").strip(), answer))
        self.questions = list(questions.items())
        coco = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
        self.colours = sorted({a["colour"] for a in coco["annotations"] if a["colour"]})
        self.shapes = [category["name"] for category in coco["categories"]]
        names = {image["id"]: f"images/{split}/{image['file_name']}" for image in coco["images"]}
        self.objects = defaultdict(list)
        for annotation in coco["annotations"]:
            self.objects[names[annotation["image_id"]]].append(annotation)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int):
        name, questions = self.questions[index]
        with Image.open(self.folder / name) as image:
            pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels, *self._cells(name), questions

    def _cells(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(shape, colour) of the object that covers most of each cell; 0 for background or no named colour."""
        shapes, colours = torch.zeros(2, CELLS, CELLS, dtype=torch.long)
        most = torch.full((CELLS, CELLS), MIN_COVER)
        for item in self.objects[name]:
            mask = torch.from_numpy(coco_mask.decode(item["segmentation"]).astype(np.float32))
            missing = max(mask.shape) - torch.tensor(mask.shape)
            top, left = (missing // 2).tolist()
            mask = F.pad(mask, (left, int(missing[1]) - left, top, int(missing[0]) - top))
            cover = F.adaptive_avg_pool2d(mask[None], CELLS)[0]
            here = cover > most
            shapes[here] = item["category_id"]
            colours[here] = self.colours.index(item["colour"]) + 1 if item["colour"] else 0
            most = torch.maximum(most, cover)
        return shapes.flatten(), colours.flatten()

    def collate(self, items) -> dict[str, torch.Tensor]:
        """Token rows ``<s> USER: <image>... question ASSISTANT: answer </s> question ...``; every question stands at
        the position right behind the image, and sees the image and itself only."""
        tokenizer = self.processor.tokenizer
        prefix = tokenizer("USER: " + IMAGE * CELLS**2)["input_ids"]
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
        pixels, shapes, colours = (torch.stack([item[part] for item in items]) for part in range(3))
        return {
            "pixel_values": pixels,
            "shapes": shapes,
            "colours": colours,
            "input_ids": ids,
            "labels": labels,
            "position_ids": position,
            "attention_mask": torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None],
        }


def look_for_similar_tokens(model: LlavaForConditionalGeneration) -> None:
    """Start every attention layer of the language model with equal queries and keys, and outputs that copy."""
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        nn.init.orthogonal_(attention.q_proj.weight)
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
        nn.init.orthogonal_(attention.v_proj.weight, gain=0.5)
        attention.o_proj.weight.data.copy_(attention.v_proj.weight.T)


def optimise(name: str, parameters: list[nn.Parameter], steps: int, learning_rate: float, loader, loss_of) -> None:
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
    scenes = Scenes(args.data, "training", processor)
    logger.info("%.2f million parameters, %d images", sum(p.numel() for p in model.parameters()) / 1e6, len(scenes))
    loader = DataLoader(scenes, args.batch_size, shuffle=True, drop_last=True, collate_fn=scenes.collate)
    llava = model.model.train()
    embedding = model.get_input_embeddings()
    names = [processor.tokenizer.convert_tokens_to_ids(words) for words in (scenes.shapes, scenes.colours)]
    no_name = nn.Embedding(2, WIDTH)  # what stands for background, and for an object without a colour's name

    def alignment(batch) -> torch.Tensor:
        tokens = torch.cat(llava.get_image_features(batch["pixel_values"]).pooler_output)
        return sum(
            F.cross_entropy(tokens @ torch.cat([none[None], embedding.weight[ids]]).T, batch[what].flatten())
            for none, ids, what in zip(no_name.weight, names, ("shapes", "colours"))
        )

    # Row n: what to look for (shape n, or colour n, counted from 1) at the words of that number.
    lookups = [torch.zeros(len(processor.tokenizer), dtype=torch.long) for _ in names]
    for lookup, words in zip(lookups, (scenes.shapes, scenes.colours)):
        for number, word in enumerate(words, start=1):
            for form in (word, f"{word}s", f"{word}es"):
                if form in processor.tokenizer.vocab:
                    lookup[processor.tokenizer.vocab[form]] = number
    llava.language_model.set_attn_implementation("eager")  # the others return no attention

    def looking(attention_BHLL, batch) -> torch.Tensor:
        """Minus the log of the attention that words pay to the image tokens they name, over all that name some."""
        is_image = batch["input_ids"] == model.config.image_token_id
        first = int(is_image[0].nonzero()[0])
        paid_BLC = attention_BHLL[:, :2].mean(1)[:, :, first : first + CELLS**2]
        named = [
            (lookup[batch["input_ids"]][:, :, None] == shown[:, None, :]) & (shown[:, None, :] > 0)
            for lookup, shown in zip(lookups, (batch["shapes"], batch["colours"]))
        ]
        match_BLC = named[0] | named[1]
        return -((paid_BLC * match_BLC).sum(-1)[match_BLC.any(-1)] + 1e-4).log().mean()

    def answers(batch) -> torch.Tensor:
        with torch.no_grad():
            image = llava.vision_tower(batch.pop("pixel_values"), output_hidden_states=True)
        hidden = image.hidden_states[model.config.vision_feature_layer][:, 1:]
        image.pooler_output = list(llava.multi_modal_projector(hidden))
        text = {name: value for name, value in batch.items() if name not in ("shapes", "colours")}
        outputs = model(**text, mm_encoder_outputs={"image": image}, output_attentions=True)
        return torch.stack([outputs.loss, 0.2 * looking(outputs.attentions[0], batch)])

    seeing = [llava.vision_tower, llava.multi_modal_projector, embedding, no_name]
    parameters = [parameter for module in seeing for parameter in module.parameters()]
    optimise("alignment", parameters, args.alignment_steps, 1e-3, loader, alignment)
    parameters = [*llava.multi_modal_projector.parameters(), *llava.language_model.parameters()]
    optimise("answers", parameters, args.steps, args.learning_rate, loader, answers)
    unfinished = args.destination.with_name(f".{args.destination.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.eval().save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    os.replace(unfinished, args.destination)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that tools/make_photoshapes.py made")
    parser.add_argument("destination", type=Path, help="folder for the checkpoint; must not exist")
    parser.add_argument("--alignment-steps", type=int, default=200, help="of the tower (%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="of the language model (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="images a step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="for answers; peak, cosine (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.destination.exists():
        sys.exit(f"{parser.prog}: error: {args.destination} already exists; remove it or name another folder")
    try:
        train(args)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: error: {error}")


if __name__ == "__main__":
    main()

"""LLaVA's fine-tuning data: records to conversations, conversations to padded batches with masked labels.

A record is ``{id, image (a path, a list of paths, or absent), conversations: [{from: human | gpt, value}, ...]}``.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from transformers import BatchFeature

from .image_processing import MAX_PIXELS
from .processing import LlavaAptProcessor
from .prompt import IMAGE, prompt_pieces, with_images_first

logger = logging.getLogger(__name__)

IGNORED = -100  # label of tokens that the loss leaves out
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # PIL hands others, such as EPS, to other programs
SHOWN = 200  # characters of what a record says that are repeated in messages


@dataclass(frozen=True)
class Conversation:
    """One record: its id, image paths, and (question, answer) turns with ``<image>`` first in its question."""

    id: str
    images: tuple[Path, ...]
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class BadRecord:
    id: str
    reason: str


def read_records(path: str | Path) -> list[dict]:
    """LLaVA's JSON file. What it lists need not be usable records; ``parse_record`` finds out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a list of records; the message names the file.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error
    if not isinstance(records, list) or not any(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} must hold a list of records {{id, image, conversations}}")
    return records


def subset(records: Sequence[dict], fraction: float, seed: int = 0) -> list[dict]:
    """The same fraction of the records with and of those without images, in the file's order; always the same ones.

    Raises:
        ValueError: fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction is {fraction}; it must be above 0 and at most 1")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for has_image in (True, False):
        stratum = [index for index, record in enumerate(records) if _names_an_image(record) == has_image]
        order = torch.randperm(len(stratum), generator=generator).tolist()
        chosen += [stratum[place] for place in order[: round(fraction * len(stratum))]]
    return [records[index] for index in sorted(chosen)]


def _names_an_image(record: object) -> bool:
    return isinstance(record, dict) and bool(record.get("image"))


def parse_record(
    record: dict, image_folder: str | Path, allow_outside_images: bool = False
) -> Conversation | BadRecord:
    """Check a record and put it in LLaVA's form: leading answers are dropped, images come first in their question.

    Args:
        record: one item of the JSON file, whatever it holds.
        image_folder: folder that image paths are relative to, and that they must not leave, by links neither.
        allow_outside_images: let them leave it.
    """
    if not isinstance(record, dict):
        return BadRecord("without id", f"a record must be {{id, image, conversations}}, found {_shown(record)}")
    identity = _shown(record.get("id", record.get("image", "without id")))
    names = record.get("image")
    names = [names] if isinstance(names, str) and names else names or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return BadRecord(identity, f"image must be a path or a list of paths, found {_shown(record['image'])}")
    messages = record.get("conversations") or []
    try:
        speakers = [str(message["from"]) for message in messages]
        values = [message["value"].strip() for message in messages]
        "".join(values).encode()
    except (TypeError, KeyError, AttributeError):
        return BadRecord(identity, "conversations must be a list of {from, value}")
    except UnicodeEncodeError:
        return BadRecord(identity, "half a surrogate pair in the text")
    if speakers[:1] == ["gpt"]:
        speakers, values = speakers[1:], values[1:]
    if not speakers or speakers != ["human", "gpt"] * (len(speakers) // 2):
        return BadRecord(identity, f"roles must alternate human, gpt; found {_shown(', '.join(speakers)) or 'none'}")
    mentioned = sum(value.count(IMAGE) for value in values[::2])
    if any(IMAGE in value for value in values[1::2]):
        return BadRecord(identity, f"{IMAGE} in an answer")
    if mentioned != len(names):
        return BadRecord(identity, f"{mentioned} {IMAGE} for {len(names)} images")
    images = tuple(Path(image_folder) / name for name in names)
    for path in images:
        if reason := _why_unusable(path, image_folder, allow_outside_images):
            return BadRecord(identity, reason)
    return Conversation(identity, images, tuple(zip(map(with_images_first, values[::2]), values[1::2])))


def _why_unusable(image: Path, folder: str | Path, allow_outside: bool) -> str | None:
    try:
        if not allow_outside and not Path(os.path.realpath(image)).is_relative_to(os.path.realpath(folder)):
            return f"{_shown(image)} leads out of --image-folder; --allow-outside-images permits that"
        return None if image.is_file() else f"missing image {_shown(image)}"
    except (OSError, ValueError) as error:  # names that no file can have
        return f"impossible image name {_shown(image)}: {_shown(error)}"


def _shown(value: object) -> str:
    """A value of a record for messages: of limited length, and of characters that can be written anywhere."""
    text = str(value).encode("utf-8", "replace").decode()
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


class LlavaDataset(Dataset):
    """Conversations with their processed images, those that cannot be used left out and listed.

    An image that turns out to be unreadable later is reported, and its record replaced by the next. Images are
    processed here and not in batches, so that one which cannot be does no harm to others.

    Args:
        records: LLaVA's records.
        image_folder, allow_outside_images: as ``parse_record`` takes them.
        processor: processes images, and tells how long a conversation is.
        max_length: in tokens. Longer conversations are cut at the end, as LLaVA does, and listed in ``cut``; those
            whose images or whole answers would be cut are bad.
        max_bad: how many records may be bad or unreadable, in each process; None is any number.

    Attributes:
        lengths: tokens of each conversation, with the stock number of tokens per image.
        bad: BadRecords that were left out. cut: ids of the conversations that are cut.
        unreadable: bool tensor, which conversations' images could not be read so far; shared with worker processes.

    Raises:
        ValueError: not one usable record; later, more than ``max_bad`` that are not.
    """

    def __init__(
        self,
        records: Sequence[dict],
        image_folder: str | Path,
        processor: LlavaAptProcessor,
        max_length: int = 2048,
        max_bad: int | None = None,
        allow_outside_images: bool = False,
    ):
        self.processor, self.max_bad = processor, max_bad
        self.conversations: list[Conversation] = []
        self.lengths: list[int] = []
        self.bad: list[BadRecord] = []
        self.cut: list[str] = []
        crop = processor.image_processor.crop_size
        cells = (crop["height"] // processor.patch_size) * (crop["width"] // processor.patch_size)
        cells += processor.vision_feature_select_strategy == "full"  # the CLS token
        for record in records:
            conversation = parse_record(record, image_folder, allow_outside_images)
            if isinstance(conversation, Conversation):
                conversation = self._measure(conversation, processor.tokenizer, cells, max_length)
            if isinstance(conversation, BadRecord):
                self.bad.append(conversation)
            else:
                self.conversations.append(conversation)
        if not self.conversations:
            first = f"; the first: {self.bad[0].id}: {self.bad[0].reason}" if self.bad else ""
            raise ValueError(f"none of {len(records)} records can be used{first}")
        self.unreadable = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def _measure(self, conversation: Conversation, tokenizer, cells: int, max_length: int) -> Conversation | BadRecord:
        pieces = prompt_pieces(conversation.turns, tokenizer.eos_token)
        text = "".join(piece for piece, _ in pieces)
        tokens_with_cells = (cells - 1) * len(conversation.images)
        length = len(tokenizer(text)["input_ids"]) + tokens_with_cells
        if length > max_length:
            last_image = max((i for i, (piece, _) in enumerate(pieces) if IMAGE in piece), default=0)
            first_answer = next(i for i, (_, is_answer) in enumerate(pieces) if is_answer)
            needed = "".join(piece for piece, _ in pieces[: max(last_image, first_answer) + 1])
            if len(tokenizer(needed)["input_ids"]) + tokens_with_cells > max_length:
                return BadRecord(conversation.id, f"{length} tokens; cut to {max_length} it loses images or answers")
            self.cut.append(conversation.id)
        self.lengths.append(min(length, max_length))
        return conversation

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> tuple[Conversation, BatchFeature | None]:
        for place in (*range(index, len(self)), *range(index)):
            conversation = self.conversations[place]
            try:
                return conversation, self._features(conversation)
            except ValueError as error:
                self.unreadable[place] = True
                self.refuse_too_many_bad(BadRecord(conversation.id, f"unreadable image: {error}"))
                logger.warning("record %s: unreadable image, using the next record: %s", conversation.id, error)
        raise ValueError("no image of the data can be read")

    def _features(self, conversation: Conversation) -> BatchFeature | None:
        images = [_load(path) for path in conversation.images]
        try:
            return self.processor.image_processor(images, return_tensors="pt") if images else None
        except Exception as error:  # PIL has modes and torchvision shapes that nobody thought of
            raise ValueError(f"{_shown(', '.join(map(str, conversation.images)))}: {error}") from error

    def refuse_too_many_bad(self, last: BadRecord) -> None:
        """Raise ValueError if more than ``max_bad`` records were bad or unreadable so far."""
        bad = len(self.bad) + int(self.unreadable.sum())
        if self.max_bad is not None and bad > self.max_bad:
            raise ValueError(f"{bad} bad records, {self.max_bad} are allowed; {last.id}: {last.reason}")

    @property
    def has_image(self) -> list[bool]:
        return [bool(conversation.images) for conversation in self.conversations]


def _load(path: Path) -> Image.Image:
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            image.load()
            return image
    except Exception as error:  # PIL's decoders raise whatever a damaged file makes them
        raise ValueError(f"{_shown(path)}: {error}") from error


class LlavaCollator:
    """Batches of ``LlavaDataset`` items: input_ids, attention_mask, labels, pixel_values, patch_sides.

    Labels are the answers and the token that ends them; padding is on the right; sequences are cut at ``max_length``.
    """

    def __init__(self, processor: LlavaAptProcessor, max_length: int = 2048):
        self.processor, self.max_length = processor, max_length

    def __call__(self, items: Sequence[tuple[Conversation, BatchFeature | None]]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        of_items = [features for _, features in items if features is not None]
        features = {name: torch.cat([each[name] for each in of_items]) for name in (of_items[0] if of_items else ())}
        num_images = len(features["pixel_values"]) if features else 0
        placeholders = (self.processor.replace_image_token(features, index) for index in range(num_images))
        texts, answers = [], []
        for conversation, _ in items:
            text, spans = "", []
            for piece, is_answer in prompt_pieces(conversation.turns, tokenizer.eos_token):
                while not is_answer and IMAGE in piece:
                    before, piece = piece.split(IMAGE, 1)
                    text += before + next(placeholders)
                if is_answer:
                    spans.append((len(text), len(text) + len(piece)))
                text += piece
            texts.append(text)
            answers.append(spans)
        encoded = tokenizer(
            texts,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        offsets = encoded.pop("offset_mapping")
        labels = torch.full_like(encoded["input_ids"], IGNORED)
        for row, spans in enumerate(answers):
            for start, end in spans:
                inside = (offsets[row, :, 1] > start) & (offsets[row, :, 0] < end)
                labels[row, inside] = encoded["input_ids"][row, inside]
        return {**encoded, "labels": labels, **features}


class ModalityGroupedSampler(Sampler):
    """LLaVA's order: batches of samples with and without images apart, each of similar lengths, in random order.

    The same for the same seed and epoch, so that a resumed run can skip what it has seen.

    Args:
        lengths: tokens of each sample.
        has_image: whether each sample has images.
        megabatch: samples that are sorted by length together: batch size x processes x accumulation steps.
    """

    def __init__(self, lengths: Sequence[int], has_image: Sequence[bool], megabatch: int, seed: int = 0):
        self.lengths, self.has_image, self.megabatch, self.seed = lengths, has_image, megabatch, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        full, rest = [], []
        for with_image in (True, False):
            of_modality = [index for index, value in enumerate(self.has_image) if value == with_image]
            order = torch.randperm(len(of_modality), generator=generator).tolist()
            for start in range(0, len(order), self.megabatch):
                batch = [of_modality[place] for place in order[start : start + self.megabatch]]
                batch.sort(key=lambda index: -self.lengths[index])
                (full if len(batch) == self.megabatch else rest).append(batch)
        for place in torch.randperm(len(full), generator=generator).tolist():
            yield from full[place]
        for batch in rest:  # too few to fill a batch: at the end, so that no batch before is mixed
            yield from batch

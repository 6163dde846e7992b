"""lmms-eval's model ``llava_apt``: batched, for simple and chat tasks and multiple choice; errors are raised.

Found by lmms-eval through the entry point of setup.py; ``python -m lmms_eval --model llava_apt --model_args
pretrained=FOLDER_OR_NAME,...``. Prompts are LLaVA's own ("v1"), as in LLaVA's published tables.
"""

import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from PIL import Image
from tqdm import tqdm

from . import LlavaAptForConditionalGeneration, LlavaAptProcessor, load_new_layers, options_of
from .prompt import question_prompt

MANIFEST = ModelManifest(
    model_id="llava_apt",
    simple_class_path="llava_apt.lmms_eval_plugin.LlavaAptSimple",
    chat_class_path="llava_apt.lmms_eval_plugin.LlavaAptChat",
)


class LlavaAptSimple(lmms):
    """LLaVA with adaptive patches.

    Args:
        pretrained: stock LLaVA-1.5 or adapted checkpoint, folder or hub name.
        thresholds: such as ``28=5.75`` or ``28=5.75;56=5``; ``off`` for the dense model. As saved if not given.
        merge, scorer, image_tokens: as in ``LlavaAptConfig``. As saved if not given.
        new_layers: file or folder that ``save_new_layers`` wrote, for a stock checkpoint.
        pad: LLaVA's square padding instead of the checkpoint's crop. As saved if not given.
        batch_size, device, dtype, device_map, attn_implementation: as usual.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        thresholds: str | None = None,
        merge: str | None = None,
        scorer: str | None = None,
        image_tokens: str | None = None,
        new_layers: str | None = None,
        pad: bool | None = None,
        batch_size: int | str = 1,
        device: str = "cuda",
        dtype: str = "auto",
        device_map: str | None = None,
        attn_implementation: str | None = None,
    ):
        super().__init__()
        options = dict(thresholds=parse_thresholds(thresholds), merge=merge, scorer=scorer, image_tokens=image_tokens)
        options = {name: value for name, value in options.items() if value is not None}
        if new_layers:
            options = {**options_of(new_layers), **options}
        crop = {} if pad is None else {"do_pad": bool(pad)}
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.local_process_index, self.accelerator.num_processes
        self._device = torch.device(f"cuda:{self._rank}" if self._world_size > 1 and device == "cuda" else device)
        self.batch_size = int(batch_size)
        self.model = LlavaAptForConditionalGeneration.from_pretrained(
            pretrained, dtype=dtype, device_map=device_map, attn_implementation=attn_implementation, **options
        ).eval()
        if new_layers:
            load_new_layers(self.model, new_layers)
        if device_map is None:
            self.model.to(self._device)
        self.processor = LlavaAptProcessor.from_pretrained(pretrained, **options, **crop)
        self.processor.tokenizer.padding_side = "left"
        self._new_tokens, self._image_tokens, self._images = 0, 0, 0  # since the last call

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers, in the requests' order. Batches hold requests with the same generation settings."""
        groups = defaultdict(list)
        for index, request in enumerate(requests):
            text, images, settings = self._question(request)
            groups[repr(sorted(settings.items()))].append((index, text, images, settings))
        results: list[GenerationResult | None] = [None] * len(requests)
        self._start(len(requests), "answers")
        for group in groups.values():
            for batch in self._batches(group, size=lambda item: len(item[1])):
                indices, texts, images, settings = zip(*batch)
                for index, (text, length) in zip(indices, self.answer(texts, images, dict(settings[0]))):
                    results[index] = GenerationResult(text, TokenCounts(output_tokens=length))
        self._report()
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(log-likelihood, whether it is the greedy answer) of each request's continuation, wrapped as lmms-eval
        0.7 unwraps it."""
        items = []
        for index, request in enumerate(requests):
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            continuation = continuation if isinstance(continuation, str) else continuation(doc)
            images = _images(doc_to_visual(doc))
            items.append((index, question_prompt(context, len(images)), continuation, images))
        results: list[GenerationResult | None] = [None] * len(requests)
        self._start(len(requests), "choices")
        for batch in self._batches(items, size=lambda item: len(item[1]) + len(item[2])):
            indices, prompts, continuations, images = zip(*batch)
            for index, score in zip(indices, self._score(prompts, continuations, images)):
                results[index] = GenerationResult(text=score, token_counts=None)
        self._report()
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("llava_apt answers single-round tasks only")

    def _question(self, request: Instance) -> tuple[str, list[Image.Image], dict]:
        context, settings, doc_to_visual, doc_id, task, split = request.args
        images = _images(doc_to_visual(self.task_dict[task][split][doc_id]))
        return question_prompt(context, len(images)), images, settings

    def _batches(self, items: list[tuple], size) -> Iterator[list[tuple]]:
        """Longest first, so that what does not fit into memory is known at once."""
        items = sorted(items, key=lambda item: (-size(item), item[0]))
        for start in range(0, len(items), self.batch_size):
            batch = items[start : start + self.batch_size]
            yield batch
            self._progress.update(len(batch))

    def _inputs(self, texts, images):
        pictures = [picture for row in images for picture in row]
        inputs = self.processor(text=list(texts), images=pictures or None, padding=True, return_tensors="pt")
        self._images += len(pictures)
        self._image_tokens += int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        return inputs.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def answer(self, texts, images, settings: dict) -> list[tuple[str, int]]:
        """Answer and its number of tokens for each prompt and list of images of one batch."""
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        # What tasks set for other models: how to crop, a seed, stop sequences of their own.
        known = vars(self.model.generation_config)
        settings = {name: value for name, value in settings.items() if name in known}
        settings = {"max_new_tokens": 1024, "num_beams": 1, "temperature": 0, "top_p": None, **settings}
        settings["do_sample"] = (settings["temperature"] or 0) > 0
        if not settings["do_sample"]:
            settings["temperature"] = settings["top_p"] = None
        inputs = self._inputs(texts, images)
        outputs = self.model.generate(**inputs, **settings, pad_token_id=self.tokenizer.pad_token_id)
        outputs = outputs[:, inputs["input_ids"].shape[1] :]
        answers = []
        for tokens in outputs:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            for end in filter(None, until):
                text = text.split(end)[0]
            answers.append((text.strip(), int((tokens != self.tokenizer.pad_token_id).sum())))
        self._new_tokens += sum(length for _, length in answers)
        return answers

    @torch.inference_mode()
    def _score(self, prompts, continuations, images) -> list[tuple[float, bool]]:
        inputs = self._inputs([f"{prompt} {end}" for prompt, end in zip(prompts, continuations)], images)
        logits = self.model(**inputs).logits.float()
        scores = []
        for row, (prompt, end) in enumerate(zip(prompts, continuations)):
            length = len(self.tokenizer(f"{prompt} {end}")["input_ids"]) - len(self.tokenizer(prompt)["input_ids"])
            targets = inputs["input_ids"][row, -length:]
            log_probabilities = logits[row, -length - 1 : -1].log_softmax(-1)
            score = log_probabilities.gather(1, targets[:, None]).sum()
            scores.append((float(score), bool((log_probabilities.argmax(-1) == targets).all())))
        return scores

    def _start(self, samples: int, what: str) -> None:
        self._samples = samples
        self._new_tokens, self._image_tokens, self._images = 0, 0, 0
        self._progress = tqdm(total=samples, desc=f"llava_apt {what}", disable=self._rank != 0)
        self._started = time.perf_counter()

    def _report(self) -> None:
        seconds = time.perf_counter() - self._started
        self._progress.close()
        measured = {
            "tokens_per_image": self._image_tokens / max(self._images, 1),
            "seconds_per_sample": seconds / max(self._samples, 1),
        }
        logger.info(" ".join(f"{name} {value:.4g}" for name, value in measured.items()))
        log_metrics(
            total_gen_tokens=self._new_tokens,
            total_elapsed_time=seconds,
            avg_speed=self._new_tokens / seconds,
            additional_metrics={"rank": self._rank, **measured},
        )


class LlavaAptChat(LlavaAptSimple):
    """The same for tasks that give messages instead of a text and images."""

    is_simple = False

    def _question(self, request: Instance) -> tuple[str, list[Image.Image], dict]:
        _, doc_to_messages, settings, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        contents = [content for message in messages if message["role"] == "user" for content in message["content"]]
        images = _images([content["url"] for content in contents if content["type"] == "image"])
        # Images come first in LLaVA's prompts anyway, and some tasks' texts hold their placeholders themselves.
        text = "".join(content["text"] for content in contents if content["type"] == "text")
        return question_prompt(text, len(images)), images, settings


def parse_thresholds(text: str | None) -> dict[int, float] | None:
    """``28=5.75;56=5`` or ``off``; lmms-eval's own argument lists are separated by commas."""
    if text is None:
        return None
    if text == "off":
        return {}
    try:
        return {int(size): float(value) for size, value in (part.split("=") for part in text.split(";"))}
    except ValueError as error:
        raise ValueError(f"thresholds must look like 28=5.75;56=5 or be off, got {text!r}") from error


def _images(visuals: list | None) -> list[Image.Image]:
    visuals = visuals or []
    if not all(isinstance(visual, Image.Image) for visual in visuals):
        raise TypeError(f"llava_apt takes images only, got {[type(visual).__name__ for visual in visuals]}")
    return list(visuals)

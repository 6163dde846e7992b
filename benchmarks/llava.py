"""LLaVA of any shape with random weights: vision tower, first token, decoding. Needs transformers only."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlavaConfig, StaticCache
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import llava_apt.tower
from llava_apt import LlavaAptConfig, LlavaAptForConditionalGeneration

from .cases import Case
from .clock import Laps, Parts
from .hosts import check_equal
from .images import Batch

TEXT_BEFORE, TEXT_AFTER = 35, 25  # tokens of LLaVA-1.5's system prompt, and of a question
NEW_TOKENS = 8
DECODE, ANSWER = f"decoding {NEW_TOKENS - 1} more tokens", f"answer of {NEW_TOKENS} tokens"


def _sizes(width: int, hidden: int, layers: int, heads: int) -> dict:
    return dict(hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads)


_LLAMA = dict(model_type="llama", vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
_CLIP = dict(model_type="clip_vision_model", image_size=336, patch_size=14)
SHAPES = {
    "llava-1.5-7b": dict(text_config=_LLAMA),
    "llava-1.5-13b": dict(text_config=_LLAMA | _sizes(5120, 13824, 40, 40)),
    # For CPUs: a tower of ViT-S's width and a language model of 110 million parameters.
    "llava-small": dict(vision_config=_CLIP | _sizes(384, 1536, 12, 6), text_config=_LLAMA | _sizes(1024, 2816, 8, 16)),
    # For tests.
    "llava-tiny": dict(
        vision_config=_CLIP | _sizes(32, 64, 3, 2) | dict(image_size=112), text_config=_LLAMA | _sizes(32, 64, 2, 2)
    ),
}
NORMALISATION = 255 * torch.tensor([OPENAI_CLIP_MEAN, OPENAI_CLIP_STD]).view(2, 3, 1, 1)
TOWER_STAGES = ("score", "layout", "embed", "trunk", "projector")


def load_config(name: str) -> LlavaConfig:
    """A name of ``SHAPES``, or a folder with a LLaVA-1.5's config.json; its weights are not read.

    Raises:
        ValueError: there is neither.
    """
    if name in SHAPES:
        return LlavaConfig(**SHAPES[name], image_token_id=32000)
    if not Path(name, "config.json").is_file():
        raise ValueError(f"no configuration {name}; name a .py file, a LLaVA's folder, or {', '.join(SHAPES)}")
    return LlavaConfig.from_pretrained(name, local_files_only=True)


class Llava:
    """Dense: transformers' own LLaVA, with scaled_dot_product_attention. Packed and adaptive: ``llava_apt``, on the
    same language model and with the same weights in the tower.

    Patches are scored by the tower, on the device. The prompt is random text around the image. The language model's
    cache has a fixed size, so that decoding can be compiled; it is the same for all modes.
    """

    measures = {
        "vision tower": TOWER_STAGES,
        "first token": (*TOWER_STAGES, "LLM prefill"),
        DECODE: ("LLM decode",),
        ANSWER: None,
    }

    def __init__(
        self,
        config: LlavaConfig,
        modes: Sequence[str],
        thresholds: dict[str, dict[int, float]],
        batches: list[Batch],
        device: torch.device,
        dtype: torch.dtype,
        compile_decoding: bool,
    ):
        self.device, self.dtype, self.config = device, dtype, config
        self.batches = [batch.to(device) for batch in batches]
        torch.manual_seed(0)
        with device:
            self.stock = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval().requires_grad_(False)
        self.cases = []
        for mode in modes:
            if mode == "dense":
                self.cases.append(Case(mode, self.stock, is_reference=True))
            elif mode == "packed":
                self.cases.append(Case(mode, self._apt({}, "apt")))
            else:
                self.cases += [Case(f"{mode} {label}", self._apt(limits, mode)) for label, limits in thresholds.items()]
        # Compiled for a GPU it is one CUDA graph per token.
        self.decode = (
            torch.compile(self._decode, mode="reduce-overhead", dynamic=False) if compile_decoding else self._decode
        )
        self.cells = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        vocabulary, placeholder = config.text_config.vocab_size, config.image_token_id
        text = torch.randint(vocabulary, (TEXT_BEFORE + TEXT_AFTER,), device=device)
        self.text = torch.where(text == placeholder, (placeholder + 1) % vocabulary, text)
        self._caches: dict[str, StaticCache] = {}  # one per case, as long as its longest answer needs
        self._most_tokens: dict[str, int] = {}

    def _apt(self, thresholds: dict[int, float], merge: str) -> LlavaAptForConditionalGeneration:
        options = self.config.to_dict()
        options["vision_config"].update(thresholds=thresholds, merge=merge)
        config = LlavaAptConfig(**{key: value for key, value in options.items() if key != "model_type"})
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        with self.device:
            tower = llava_apt.AptClipVisionModel._from_config(config.vision_config, dtype=self.dtype)
        missing, unknown = tower.load_state_dict(self.stock.model.vision_tower.state_dict(), strict=False)
        assert not unknown and all("adaptive_embed" in name for name in missing), (missing, unknown)
        model.model.vision_tower = tower
        model.model.multi_modal_projector = self.stock.model.multi_modal_projector
        model.model.language_model, model.lm_head = self.stock.model.language_model, self.stock.lm_head
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def step(self, case: Case, batch: Batch, lap: Laps) -> None:
        cache = self._empty_cache(case)
        lap.restart()
        features = self.see(case, batch)
        lap("vision tower")
        token = self.prefill(case, batch, features, cache)
        lap("first token")
        for _ in range(NEW_TOKENS - 1):
            torch.compiler.cudagraph_mark_step_begin()  # a compiled step's result is overwritten by the next
            token = self.decode(token, cache).clone()
        lap(DECODE)
        lap.seconds[DECODE] -= lap.seconds["first token"]
        lap(ANSWER)

    def see(self, case: Case, batch: Batch):
        config = self.config
        return case.model.model.get_image_features(
            pixel_values=batch.square,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            return_dict=True,
        )

    def prefill(self, case: Case, batch: Batch, features, cache: StaticCache) -> Tensor:
        """The first token of each answer (B, 1)."""
        return self._first_logits(case, batch, features, cache).argmax(-1)

    def _first_logits(self, case: Case, batch: Batch, features, cache: StaticCache) -> Tensor:
        return case.model(
            input_ids=self.prompt(features),
            mm_encoder_outputs={"image": features},
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits

    def _decode(self, token: Tensor, cache: StaticCache) -> Tensor:
        hidden = self.stock.model.language_model(input_ids=token, past_key_values=cache, use_cache=True)
        return self.stock.lm_head(hidden.last_hidden_state).argmax(-1)

    def prompt(self, features) -> Tensor:
        """Token ids (B, L), with a placeholder for every image token."""
        count = len(features.pooler_output[0])
        image = self.text.new_full((count,), self.config.image_token_id)
        ids = torch.cat([self.text[:TEXT_BEFORE], image, self.text[TEXT_BEFORE:]])
        return ids.expand(len(features.pooler_output), -1)

    def _empty_cache(self, case: Case) -> StaticCache:
        if case.name not in self._caches:
            length = TEXT_BEFORE + TEXT_AFTER + self._most_tokens[case.name] + NEW_TOKENS
            self._caches[case.name] = StaticCache(config=self.config.text_config, max_cache_len=length)
        self._caches[case.name].reset()
        return self._caches[case.name]

    def parts(self, case: Case) -> Parts:
        model = case.model.model
        parts = {
            "trunk": [(model.vision_tower.encoder, "forward")],
            "projector": [(model.multi_modal_projector, "forward")],
            "LLM prefill": [(self, "prefill")],
            "LLM decode": [(self, "decode")],
        }
        if case.model is self.stock:
            return {"embed": [(model.vision_tower.embeddings, "forward")], **parts}
        return {
            "score": [(llava_apt.tower, "selected_sides")],
            "layout": [(model.vision_tower, "_layout")],
            "embed": [(model.vision_tower.adaptive_embed, "forward")],
            **parts,
        }

    @torch.no_grad()
    def describe(self) -> None:
        """Fill in what is not timed; raises AssertionError if a case does not compute what it claims."""
        logits = {}
        for case in self.cases:
            counts = [len(self.see(case, batch).pooler_output[0]) for batch in self.batches]
            self._most_tokens[case.name] = max(counts)
            case.tokens = sum(counts) / len(counts)
            case.content_kept, case.padding_kept = case.tokens / self.cells, None
            case.gflops = self._gflops(case.tokens)
            case.work = {
                **dict.fromkeys(TOWER_STAGES, case.tokens),
                "LLM prefill": case.tokens + TEXT_BEFORE + TEXT_AFTER,
            }
            logits[case.name] = self.check(case, self.batches[0])
        for case in self.cases:
            if case.content_kept == 1 and "dense" in logits:
                check_equal([logits[case.name]], [logits["dense"]], f"{case.name} and dense", self.dtype)

    def check(self, case: Case, batch: Batch) -> Tensor:
        """Logits of the first token."""
        if not case.is_adaptive:
            assert case.tokens == self.cells, f"{case.name}: {case.tokens} image tokens, not {self.cells}"
        cache = self._empty_cache(case)
        features = self.see(case, batch)
        logits = self._first_logits(case, batch, features, cache)
        assert logits.shape == (len(batch.square), 1, self.config.text_config.vocab_size), (
            f"{case.name}: {logits.shape}"
        )
        assert logits.isfinite().all(), f"{case.name} computes NaN"
        token = self._decode(logits.argmax(-1), cache)
        assert token.shape == (len(batch.square), 1)
        assert int(cache.get_seq_length()) == self.prompt(features).shape[1] + 1
        return logits

    def _gflops(self, tokens: float) -> dict[str, float]:
        """Of the layers' matrix products and attention per image, two per multiply-add, in units of 1e9."""
        vision, text = self.config.vision_config, self.config.text_config

        def layers(config, weights: int, length: float, seen: float) -> float:
            width = config.hidden_size
            return 2 * config.num_hidden_layers * length * (weights + 2 * width * seen) / 1e9

        tower_weights = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        text_weights = sum(p.numel() for p in self.stock.model.language_model.layers[0].parameters() if p.ndim == 2)
        length = tokens + TEXT_BEFORE + TEXT_AFTER
        head = 2 * text.hidden_size * text.vocab_size / 1e9
        tower = layers(vision, tower_weights, tokens + 1, tokens + 1)
        first = tower + layers(text, text_weights, length, length / 2) + head
        more = NEW_TOKENS - 1
        decode = layers(text, text_weights, more, length + NEW_TOKENS / 2) + more * head
        return dict(zip(self.measures, (tower, first, decode, first + decode)))

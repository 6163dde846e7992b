"""A LLaVA small enough for tests, random but complete: stock checkpoint in the hub's layout, tokenizer, images."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

SIDE, PATCH = 112, 14
CELLS = (SIDE // PATCH) ** 2
QUESTION = ["USER:", "ASSISTANT:", "what", "is", "this", "?"]
WORDS = [*QUESTION, "a", "cat", "dog", "left", "right", "yes", "no", "one", "two"]
IMAGE = 4  # the tokenizer's id of <image>
TOWER = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=SIDE, patch_size=PATCH
)
PROMPT = "USER: <image> what is this ? ASSISTANT:"


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<unk>", "<pad>", "<s>", "</s>", "<image>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = dict(zip(("unk_token", "pad_token", "bos_token", "eos_token"), special))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side="left", additional_special_tokens=["<image>"], **named
    )


def stock_config() -> LlavaConfig:
    tokens, sizes = tokenizer(), dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
    special = {f"{name}_token_id": getattr(tokens, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    vision = CLIPVisionConfig(**sizes, num_hidden_layers=3, image_size=SIDE, patch_size=PATCH)
    text = LlamaConfig(vocab_size=len(tokens), **sizes, num_hidden_layers=2, max_position_embeddings=1024, **special)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=CELLS)


def stock_model() -> LlavaForConditionalGeneration:
    """Random weights, large enough that attention and positions matter."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(stock_config()).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def stock_processor() -> LlavaProcessor:
    image_processor = LlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def save_hub_checkpoint(folder: Path) -> Path:
    """A stock model in the files and under the names of llava-hf/llava-1.5-7b-hf; returns the folder."""
    model, processor = stock_model(), stock_processor()
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file({_hub_name(name): tensor for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    processor.save_pretrained(folder)
    options = json.loads((folder / "processor_config.json").read_text())
    image_options = options.pop("image_processor") | {"image_processor_type": "CLIPImageProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(options))
    (folder / "preprocessor_config.json").write_text(json.dumps(image_options))
    return folder


def _hub_name(name: str) -> str:
    name = name.removeprefix("model.")
    for ours, hub in (
        ("language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("vision_tower.", "vision_tower.vision_model."),
    ):
        if name.startswith(ours):
            return hub + name.removeprefix(ours)
    return name


def load_adapted(checkpoint: Path, trained: bool = False, **options):
    """Model and processor of a stock checkpoint; ``trained`` as if the new layers had been, so that ConvDown counts."""
    from llava_apt import LlavaAptForConditionalGeneration, LlavaAptProcessor

    model = LlavaAptForConditionalGeneration.from_pretrained(checkpoint, **options).eval()
    if trained:
        torch.manual_seed(1)
        for name, parameter in model.model.vision_tower.adaptive_embed.named_parameters():
            if name.endswith("weight"):
                torch.nn.init.normal_(parameter, std=0.1)
    options.pop("attn_implementation", None)
    return model, LlavaAptProcessor.from_pretrained(checkpoint, **options)


def photo(seed: int = 0, size: tuple[int, int] = (160, 120), flat: float = 0.5) -> Image.Image:
    """Noise, whose left part (a fraction ``flat`` of the width) is one colour: that part merges."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    pixels[:, : round(flat * size[0])] = torch.tensor([90, 120, 200])
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def save_task(folder: Path) -> Path:
    """A stock checkpoint in ``model`` and data: 20 records with images, 8 without, 2 bad ones; returns the folder."""
    (folder / "model").mkdir()
    save_hub_checkpoint(folder / "model")
    records = []
    for index in range(28):
        image = {"image": f"{index}.png"} if index < 20 else {}
        if image:
            photo(index, size=(120, 90)).save(folder / image["image"])
        question = "<image>\nwhat is this ?" if image else "what is a cat ?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": ("a cat", "a dog")[index % 2]}]
        records.append({"id": f"r{index}", **image, "conversations": turns})
    records.insert(3, {**records[0], "id": "lost", "image": "lost.png"})
    records.insert(9, {**records[0], "id": "mute", "conversations": []})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def finetune_options(task: Path, output: Path, *more) -> list[str]:
    """The short fine-tune of ``save_task``'s model: 7 steps of 4 samples. Later options win."""
    data = ["--data", task / "data.json", "--image-folder", task, "--model", task / "model", "--output-dir", output]
    sizes = ["--fraction", 1, "--total-batch-size", 4, "--device-batch-size", 2, "--learning-rate", 1e-2]
    on_cpu = ["--use_cpu", "--dataloader_num_workers", 0, "--disable_tqdm", "true"]
    return [str(part) for part in (*data, *sizes, "--threshold", "28=2", *on_cpu, *more)]


def run_finetune(task: Path, output: Path, *more) -> None:
    """That short fine-tune, in this process."""
    from llava_apt.finetune import finetune, parser

    finetune(*parser().parse_known_args(finetune_options(task, output, *more)))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())

"""What tests/check_docs.py runs in place of what the documents say: small files for large ones, one processor for GPUs.

Everything that a document names and that is not listed here runs as it is written.
"""

import json
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]

# In the documents -> what runs instead; applied in this order to every command and every Python block.
SUBSTITUTIONS = (
    # Setting up, testing and the demo are commands of continuous integration, of tests, and of a person's: here only
    # that they exist.
    ("make ", "make --dry-run "),
    (".venv/bin/python -m pytest -m gpu", "python -m pytest -m gpu --collect-only tests/test_eva02.py"),
    (".venv/bin/pre-commit install", "python -m pre_commit validate-config"),
    # A machine without a package index: wheels cannot be carried to where they come from.
    ("benchmarks/carry_wheels.sh wheels", "bash -n benchmarks/carry_wheels.sh"),
    ("python3 -m pip install --no-index --no-deps --target site wheels/*.whl", "python3 -m pip --version"),
    ("python3 -m pytest -m gpu", "python -m pytest -m gpu --collect-only tests/test_eva02.py"),
    ("TARGET=site benchmarks/build_mmcv_cuda.sh wheels/onedl_mmcv-*.tar.gz", "bash -n benchmarks/build_mmcv_cuda.sh"),
    ("run_all.py --images wheels/photos", "run_all.py --list"),
    # Hardware.
    ("torchrun --nproc_per_node 8", "torchrun --nproc_per_node 1"),
    ("torchrun --nproc-per-node 8", "torchrun --nproc-per-node 1"),
    ("accelerate launch --num_processes 8", "accelerate launch --cpu --num_processes 1"),
    ("--launcher pytorch --amp", "--launcher pytorch"),
    ("--device cuda --dtype bf16", "--device cpu --num-images 1 --rounds 1"),
    # The first command of README.md stands before the training whose checkpoint it names.
    (
        "equal_tokens.py seg_configs/eva02_l_apt_512.py work_dirs/seg/eva02_l_apt_512/iter_4000.pth",
        "equal_tokens.py seg_configs/eva02_l_apt_512.py checkpoints/eva02_l_seg_512.pth --keep 0.5",
    ),
    # Fewer tests of the same kind.
    (
        "equal_tokens.py det_configs/eva02_l_apt_1536.py",
        "equal_tokens.py --keep 0.5 -- det_configs/eva02_l_apt_1536.py",
    ),
    ("_scorer_photoshapes.safetensors laplacian random", "_scorer_photoshapes.safetensors --keep 0.5"),
    ("--scorer scorer.safetensors laplacian random", "--scorer scorer.safetensors --keep 0.5"),
    ("_scorer.safetensors entropy random", "_scorer.safetensors --keep 0.5"),
    # Iterations, of which the small configurations (see fill) have one.
    ("iter_3000.pth", "iter_1.pth"),
    ("iter_4000.pth", "iter_1.pth"),
    ("iter_400.pth", "iter_1.pth"),
    ("iter_160.pth", "iter_1.pth"),
    ("iter_320.pth", "iter_1.pth"),
    ("iter_640.pth", "iter_1.pth"),
    ("iter_960.pth", "iter_1.pth"),
    # Original checkpoints are networks of their own small size here; what follows starts from shipped weights.
    ("eva02-det eva02_L_coco_sys.pth checkpoints/", "eva02-det eva02_L_coco_sys.pth converted/"),
    (
        "eva02-seg eva02_L_ade_seg_upernet_sz512.pth checkpoints/",
        "eva02-seg eva02_L_ade_seg_upernet_sz512.pth converted/",
    ),
    # PhotoShapes is made once, small, before everything else.
    (
        "make_photoshapes.py data/photoshapes_big --train 8000 --val 400 --size 192 --min-diameter 0.2",
        "make_photoshapes.py made_big",
    ),
    ("make_photoshapes.py data/photoshapes", "make_photoshapes.py made"),
    ("make_photoshapes.py made_big", "make_photoshapes.py data/photoshapes_big --train 24 --val 6 --size 128"),
    ("make_photoshapes.py made", "make_photoshapes.py made --train 2 --val 1 --size 96 --workers 1"),
    ("photoshapes_results.py det", "photoshapes_results.py det --out made_results"),
    ("photoshapes_results.py seg", "photoshapes_results.py seg --out made_results"),
    ("--error-sample 100", "--error-sample 2"),
    ("--iterations 1000", "--iterations 2"),
    ("finetune_smaller.py", "finetune_smaller.py --iterations 2 --batch 1"),
    # The small segmenter has patches of 4 pixels.
    (
        "eva02_l_seg_512.pth --cfg-options model.backbone.thresholds.32=",
        "eva02_l_seg_512.pth --cfg-options model.backbone.thresholds.8=",
    ),
    # LLaVA: a random model of 2 layers, and PhotoShapes' questions instead of benchmarks to be downloaded.
    ("llava-hf/llava-1.5-7b-hf", "llava-tiny"),
    ("llava-1.5-7b-hf/", "llava-tiny/"),
    ("benchmark.py llava-1.5-7b", "benchmark.py llava-tiny"),
    (
        "llava_v1_5_mix665k.json --image-folder images",
        "data/photoshapes/vqa_training.json --image-folder data/photoshapes",
    ),
    (
        "--output-dir llava-1.5-7b-apt",
        "--output-dir llava-1.5-7b-apt --overwrite --use_cpu --total-batch-size 2 --device-batch-size 2 --max_steps 1",
    ),
    ("pretrained=llava-1.5-13b-apt", "pretrained=llava-1.5-7b-apt"),
    ("--tasks vqav2_val,gqa,scienceqa_img,textvqa_val,pope,mme,mmbench_en_dev,mmvet", "--tasks gqa"),
    ("--tasks gqa", "--tasks photoshapes_vqa --include_path llava_apt/eval_tasks --limit 2"),
    ("--model_args pretrained=", "--model_args device=cpu,pretrained="),
    (
        "train_photoshapes_vqa.py data/photoshapes_big work_dirs/llava_dense",
        "train_photoshapes_vqa.py data/photoshapes_big work_dirs/llava_dense --alignment-steps 1 --steps 1",
    ),
    ("--limit 2000 --batch-size 32 --rounds 5", "--limit 60 --batch-size 10 --rounds 1 --speed-samples 2"),
)

# Lines at the end of a configuration, in the copy that runs.
_SMALL = """
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = dict(num_workers=0, persistent_workers=False)
"""
_ONE_STEP = "train_cfg = dict(max_iters=1, val_interval=1)\n"
_TINY = '_base_ = "eva02_tiny_{}_photoshapes.py"\nload_from = "{}"\n'

# PhotoShapes needs no multi-scale test, the _ms configurations' bases do.
_MULTI_SCALE = """
tta_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(side, side), keep_ratio=True) for side in (64, 128)],
            [dict(type="LoadAnnotations")],
            [dict(type="PackSegInputs")],
        ],
    ),
]
"""

# What Python blocks of a document take for granted.
PRELUDES = {
    "llava_apt/README.md": 'from PIL import Image\n\nimage = Image.open("photo.jpg")\n',
    "docs/reliability.md": """
import timm, torch
from apt_backbones import adapt

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = adapt(timm.create_model("vit_tiny_patch16_224", depth=2), {32: 5.5})
""",
}


def fill(folder: Path) -> None:
    """Make a checkout to run commands in: this one's code, with small configurations, data and checkpoints."""
    import numpy as np
    import skimage
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file

    from examples.make_photoshapes import make_photoshapes
    from tests.bccd import save_bccd
    from tests.golden import load_golden
    from tests.llava_tiny import save_hub_checkpoint
    from tests.nuclei import save_nuclei
    from tests.persons import save_coco
    from tests.receipts import save_receipts
    from tools.video import write_video

    for name in ("tools", "benchmarks", "examples", "apt_backbones", "llava_apt", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "setup.py", ".pre-commit-config.yaml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for task, scales in (
        ("det", ("eva02_l_{}_1536", "dinov3_b_{}_1024")),
        ("seg", ("eva02_l_{}_512", "dinov3_b_linear_{}_512")),
    ):
        configs = folder / f"{task}_configs"
        shutil.copytree(ROOT / configs.name, configs)
        weights = f"{task}_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors"
        for method in ("dense", "random", "resizing", "apt", *(["heads"] if task == "det" else [])):
            with open(configs / f"eva02_tiny_{method}_photoshapes.py", "a") as config:
                config.write(_SMALL + _ONE_STEP)
            for scale in scales:
                (configs / f"{scale.format(method)}.py").write_text(_TINY.format(method, weights) + _ONE_STEP)
    with open(folder / "seg_configs/_base_/photoshapes.py", "a") as config:
        config.write(_MULTI_SCALE)
    for task, name in (
        ("seg", "linear_dense_camvid"),
        ("seg", "linear_dense_nuclei"),
        ("seg", "linear_dense_receipts"),
        ("seg", "upernet_dense_nuclei"),
        ("seg", "upernet_dense_receipts"),
        ("det", "dense_bccd"),
        ("det", "dense_nuclei"),
        ("det", "dense_persons"),
    ):
        with open(folder / f"{task}_configs/dinov2_s_{name}.py", "a") as config:
            config.write(_SMALL + _ONE_STEP)
    for name in ("nuclei", "persons"):
        with open(folder / f"det_configs/dinov2_s_heads_{name}.py", "a") as config:
            config.write(_ONE_STEP + f'load_from = "work_dirs/det/dinov2_s_dense_{name}/iter_1.pth"\n')
    (folder / "checkpoints").mkdir()
    for task, name in (("det", "eva02_l_det_1536.safetensors"), ("seg", "eva02_l_seg_512.pth")):
        weights = folder / f"{task}_configs/checkpoints/eva02_tiny_dense_photoshapes.safetensors"
        if name.endswith(".pth"):
            torch.save({"state_dict": load_file(weights)}, folder / "checkpoints" / name)
        else:
            shutil.copy(weights, folder / "checkpoints" / name)
    torch.save({"model": load_golden("eva02_cascade_tiny").weights}, folder / "eva02_L_coco_sys.pth")
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    for name in ("dinov2_s14", "checkpoints/vit_small_patch14_dinov2.lvd142m"):
        save_file(vit.state_dict(), folder / f"{name}.safetensors")
    seg = {"state_dict": load_golden("eva02_seg_tiny").weights}
    torch.save(seg, folder / "eva02_L_ade_seg_upernet_sz512.pth")

    make_photoshapes(folder / "data/photoshapes", train=6, val=3, size=160, seed=0, workers=1)
    shapes = folder / "data/photoshapes"
    for split, name in (("training", "train2017"), ("validation", "val2017")):
        (folder / "coco").mkdir(exist_ok=True)
        (folder / "coco" / name).symlink_to(shapes / "images" / split)
    save_coco(folder / "data/coco", range(10), (128, 96))
    for split, photos in (("train", "training"), ("val", "validation"), ("test", "validation")):
        images, masks = (folder / "data/camvid" / f"{split}{suffix}" for suffix in ("", "annot"))
        images.mkdir(parents=True)
        masks.mkdir()
        for path in sorted((shapes / "images" / photos).iterdir()):
            Image.open(path).save(images / f"{path.stem}.png")
            (masks / f"{path.stem}.png").write_bytes(
                (shapes / "annotations" / photos / f"{path.stem}.png").read_bytes()
            )
    truth = json.loads((shapes / "annotations/instances_training.json").read_text())
    cells = {}
    for image in truth["images"]:
        found = [entry for entry in truth["annotations"] if entry["image_id"] == image["id"]]
        corners = [(x, y, x + width, y + height) for x, y, width, height in (entry["bbox"] for entry in found)]
        classes = [("RBC", "WBC", "Platelets")[entry["category_id"] % 3] for entry in found]
        picture = Image.open(shapes / "images/training" / image["file_name"])
        cells[str(image["id"])] = picture, list(zip(classes, corners))
    save_bccd(folder / "data/bccd", cells)
    save_nuclei(folder / "kaggle-dsbowl-2018-dataset-fixes/stage1_train", 10, 96, 128)
    save_receipts(folder / "ICDAR-2019-SROIE/data", 10, 96, 240)
    (folder / "data/ade").mkdir()
    (folder / "data/ade/ADEChallengeData2016").symlink_to(shapes)
    photos = Path(skimage.__file__).parent / "data"
    Image.open(photos / "astronaut.png").resize((160, 160)).save(folder / "photo.jpg")
    Image.open(photos / "rocket.jpg").save(folder / "rocket.jpg")
    write_video(folder / "clip.mp4", (Image.new("RGB", (64, 48), (80 * i, 90, 9)) for i in range(2)), fps=5)
    (folder / "llava-tiny").mkdir()
    save_hub_checkpoint(folder / "llava-tiny")
    records = json.loads((shapes / "vqa_training.json").read_text())
    (shapes / "vqa_training.json").write_text(json.dumps(records[:40]))
    np.random.seed(0)

"""Packaging of the Adaptive Patch Transformer adapters: ``pip install -e ".[det,seg,llava]"``."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "det": ["onedl-mmengine>=0.10.12", "onedl-mmcv>=2.3.6", "onedl-mmdetection>=3.5.1"],
    "seg": ["onedl-mmengine>=0.10.12", "onedl-mmcv>=2.3.6", "onedl-mmsegmentation>=1.4.2", "pycocotools"],
    "cls": ["onedl-mmengine>=0.10.12", "opencv-python", "pycocotools", "torchvision"],
    "llava": ["transformers>=5.20", "accelerate>=1.15", "pillow"],
    "eval": ["lmms-eval>=0.7.3", "filelock<4"],
    "tools": ["imageio[pyav]", "peft", "pycocotools", "scikit-image", "pooch"],
    "flash": ["flash-attn>=2.6"],
    "dev": ["pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "pre-commit"],
}
# flash-attn compiles CUDA code, so "all" leaves it to those who ask for it by name.
EXTRAS["all"] = sorted({requirement for name, group in EXTRAS.items() if name != "flash" for requirement in group})

setup(
    name="apt-adapters",
    version="0.1.0",
    description="Adaptive Patch Transformers for detection, segmentation and vision-language models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["apt_backbones*", "llava_apt*"]),
    package_data={"llava_apt": ["eval_tasks/*"]},
    install_requires=["torch>=2.10", "timm>=1.0.31", "numpy", "safetensors", "matplotlib", "rich"],
    extras_require=EXTRAS,
    entry_points={"lmms_eval.models": ["llava_apt = llava_apt.lmms_eval_plugin:MANIFEST"]},
)

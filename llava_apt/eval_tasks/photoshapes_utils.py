"""Functions of the lmms-eval task photoshapes_vqa."""

import os
from pathlib import Path

from PIL import Image

FOLDER = "data/photoshapes"  # unless the environment variable PHOTOSHAPES names another


def doc_to_visual(doc):
    with Image.open(Path(os.environ.get("PHOTOSHAPES", FOLDER)) / doc["image"]) as image:
        return [image.convert("RGB")]


def doc_to_text(doc):
    return doc["conversations"][0]["value"]


def doc_to_target(doc):
    return doc["conversations"][1]["value"]


def process_results(doc, results):
    """Exact answers, in all and per type of question."""
    correct = float(results[0].strip().lower() == doc_to_target(doc).lower())
    return {"accuracy": correct, f"accuracy {doc['question_type']}": correct}

"""Reading and writing videos frame by frame, through imageio and PyAV."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from apt_backbones.files import write_atomically

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"})


def is_video(path: Path) -> bool:
    """Whether a file is a video or an animated GIF, by its name and, of a GIF, its frames."""
    if path.suffix.lower() != ".gif":
        return path.suffix.lower() in VIDEO_SUFFIXES
    try:
        with Image.open(path) as image:
            return getattr(image, "n_frames", 1) > 1
    except OSError:
        return False  # whoever reads it as an image says what is wrong


def read_frames(path: Path) -> tuple[Iterator[Image.Image], float, int | None]:
    """Frames of a video as RGB images, its frames per second, and how many frames it should have.

    Raises:
        ValueError: the file is not a video that PyAV can decode, when it is opened or while frames are read.
    """
    try:
        with _open(path, "r") as file:
            metadata = file.metadata()
            next(file.iter(format="rgb24"))  # a file with a header but without pictures is found out here
    except (OSError, StopIteration, ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a readable video ({_reason(error)})") from error
    fps = float(metadata.get("fps") or 25)
    duration = float(metadata.get("duration") or 0)

    def frames() -> Iterator[Image.Image]:
        try:
            with _open(path, "r") as file:
                for frame in file.iter(format="rgb24"):
                    yield Image.fromarray(frame)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({_reason(error)})") from error

    return frames(), fps, round(fps * duration) or None


def write_video(path: Path, frames: Iterable[Image.Image], fps: float) -> None:
    """Write frames of equal, even size as H.264 (.mp4) or as a looping .gif; the file appears when it is complete."""
    write = _write_gif if path.suffix == ".gif" else _write_mp4
    write_atomically(path, lambda unfinished: write(unfinished, frames, fps))


def _open(path: Path, mode: str):
    try:
        import imageio.v3 as iio  # only for videos, so that pictures do without it
    except ImportError:
        raise ImportError('videos need imageio and PyAV: pip install "imageio[pyav]"') from None
    return iio.imopen(path, mode, plugin="pyav")


def _write_mp4(path: Path, frames: Iterable[Image.Image], fps: float) -> None:
    with _open(path, "w") as file:
        file.init_video_stream("libx264", fps=round(fps, 3))
        for frame in frames:
            file.write_frame(np.asarray(frame))


def _write_gif(path: Path, frames: Iterable[Image.Image], fps: float) -> None:
    frames = iter(frames)
    duration = max(20, round(1000 / fps))  # milliseconds; browsers slow down anything faster
    next(frames).save(path, save_all=True, append_images=frames, duration=duration, loop=0)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

"""mmengine's checkpoint loader, made safe: every way by which it reaches a file goes through ``read_file``.

That includes ``init_cfg=dict(type="Pretrained")`` of any module, teachers, averaged weights, and the toolboxes' own
scripts with configurations that import ``apt_backbones.mm``. mmengine itself executes what a checkpoint pickles.
"""

from mmengine.runner import CheckpointLoader

from ..checkpoint import read_file, weights_of


def load_safely(filename: str, map_location: object = None) -> dict:
    """What a checkpoint holds, on the CPU: its weights in ``state_dict``, and ``meta``, which may be empty.

    Raises:
        FileNotFoundError, ValueError: as ``read_checkpoint``; or it is an address instead of a file.
    """
    if "://" in filename:
        raise ValueError(f"{filename} is not a file; nothing is downloaded here: fetch it, and name the file")
    content = read_file(filename)
    if isinstance(content, dict) and "state_dict" in content:
        return {"meta": {}, **content}
    others = content if isinstance(content, dict) and "model" in content else {}
    return {"meta": {}, **others, "state_dict": weights_of(content, filename)}


CheckpointLoader.register_scheme(prefixes=list(CheckpointLoader._schemes), loader=load_safely, force=True)

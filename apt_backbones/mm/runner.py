"""mmengine's runner, with checkpoints that are read without executing them and that must fit the model."""

import torch
from mmengine.model import BaseTTAModel, MMDistributedDataParallel, is_model_wrapper, revert_sync_batchnorm
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import distributed, nn

from ..checkpoint import load_converted, read_file, weights_of


@RUNNERS.register_module()
class APTRunner(Runner):
    """What changes: checkpoints are read safely and loaded strictly, and several processes can train on CPUs.

    mmengine executes what a checkpoint pickles and only warns of weights that are missing or of another shape. Here
    such a file is refused, and only ConvDown and ZeroMLP may be missing. .safetensors files are read, too. Configs
    choose this class with ``runner_type = "APTRunner"``.
    """

    def load_checkpoint(self, filename: str, map_location: str = "cpu", **kwargs) -> dict:
        """Load weights into the model; arguments beyond the file are accepted for mmengine's sake and not needed.

        Returns:
            The checkpoint's content, from which mmengine resumes.

        Raises:
            FileNotFoundError, ValueError: as ``read_checkpoint`` and ``load_converted``.
        """
        content = read_file(filename)
        self.call_hook("after_load_checkpoint", checkpoint=content)
        model = self.model.module if is_model_wrapper(self.model) else self.model
        model = model.module if isinstance(model, BaseTTAModel) else model
        load_converted(model, weights_of(content, filename))
        self._has_loaded = True
        self.logger.info(f"Load checkpoint from {filename}")
        return content

    def setup_env(self, env_cfg: dict) -> None:
        if self.distributed and not torch.cuda.is_available() and not distributed.is_initialized():
            distributed.init_process_group("gloo")  # mmengine would ask for a GPU
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        if self.distributed and not torch.cuda.is_available():  # mmengine would name GPUs
            return MMDistributedDataParallel(revert_sync_batchnorm(model), broadcast_buffers=False)
        return super().wrap_model(model_wrapper_cfg, model)

"""Which executor runs a configuration."""

from __future__ import annotations

from importlib.util import find_spec

from engine.config import EngineConfig
from engine.protocols import Executor


def make_executor(config: EngineConfig) -> Executor:
    """Loads the model. Raises ValueError or OSError, fit for the command line, when it cannot be loaded."""
    if config.tensor_parallel_size == 1:
        from engine.executors.local import LocalExecutor

        return LocalExecutor(config)
    if config.distributed_executor_backend == "ray":
        if find_spec("ray") is None:
            raise ValueError("distributed_executor_backend: ray is not installed: pip install 'outrider[ray]'")
        from engine.executors.ray import RayExecutor

        return RayExecutor(config)
    from engine.executors.multiproc import MultiprocExecutor

    return MultiprocExecutor(config)

"""Which executor runs a configuration."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.protocols import Executor


def make_executor(config: EngineConfig) -> Executor:
    """Loads the model. Raises ValueError or OSError, fit for the command line, when it cannot be loaded."""
    if config.tensor_parallel_size == 1:
        from engine.executors.local import LocalExecutor

        return LocalExecutor(config)
    from engine.executors.multiproc import MultiprocExecutor

    return MultiprocExecutor(config)

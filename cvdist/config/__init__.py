"""Every setting of cvdist: frozen dataclasses, resolved once into steps; arguments.py parses them.

Configurations speak of epochs and the global batch; code speaks of steps and the per-rank batch. `resolve` converts once.
"""

from cvdist.config.adopt import AdoptConfig
from cvdist.config.common import (
    CONFIG_NAME,
    MAX_SEED,
    MIB,
    canonical_split,
    different_names,
    dump,
    from_dict,
    require_range,
)
from cvdist.config.prepare import PrepareConfig
from cvdist.config.train import (
    AugmentConfig,
    CheckpointConfig,
    EvaluateConfig,
    LoaderConfig,
    OptimConfig,
    Resolved,
    TrainConfig,
    require_split,
    resolve,
)

__all__ = [
    "CONFIG_NAME",
    "MAX_SEED",
    "MIB",
    "AdoptConfig",
    "AugmentConfig",
    "CheckpointConfig",
    "EvaluateConfig",
    "LoaderConfig",
    "OptimConfig",
    "PrepareConfig",
    "Resolved",
    "TrainConfig",
    "canonical_split",
    "different_names",
    "dump",
    "from_dict",
    "require_range",
    "require_split",
    "resolve",
]

"""What can be configured: the dataclasses that own every key's name, type, default and check.

The YAML files under `conf/` only choose among these values; `lckv.cli` composes them with Hydra and hands the result
to an entry point as a root dataclass, see `lckv.hydra_store`. No torch here, so that mistakes are reported at once.
"""

from lckv.config.conversion import ConvertConfig, SearchConfig
from lckv.config.evaluate import EvaluateConfig
from lckv.config.evaluation import (
    EvaluationConfig,
    HarnessConfig,
    NeedleConfig,
    PerplexityConfig,
    RecallConfig,
    SpeedConfig,
)
from lckv.config.generation import CACHE_NAMES, DEFAULT_MAX_NEW_TOKENS, BenchmarkConfig, CacheConfig, GenerateConfig
from lckv.config.literals import literal
from lckv.config.reporting import ReportConfig
from lckv.config.training import (
    OPTIMIZER_NAMES,
    SOURCE_NAMES,
    DataConfig,
    InitConfig,
    LoggerConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    SharingConfig,
    TeacherConfig,
    TokenizerConfig,
    TrainConfig,
    TrainerConfig,
)

__all__ = [
    "BenchmarkConfig",
    "CACHE_NAMES",
    "CacheConfig",
    "ConvertConfig",
    "SOURCE_NAMES",
    "DEFAULT_MAX_NEW_TOKENS",
    "DataConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "GenerateConfig",
    "HarnessConfig",
    "InitConfig",
    "LoggerConfig",
    "ModelConfig",
    "NeedleConfig",
    "OPTIMIZER_NAMES",
    "OptimConfig",
    "PerplexityConfig",
    "PlanConfig",
    "RecallConfig",
    "ReportConfig",
    "SearchConfig",
    "SharingConfig",
    "SpeedConfig",
    "TeacherConfig",
    "TokenizerConfig",
    "TrainConfig",
    "TrainerConfig",
    "literal",
]

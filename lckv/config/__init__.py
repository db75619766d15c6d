"""What can be configured: the dataclasses that own every key's name, type, default and check.

The YAML files under `conf/` only choose among these values; `lckv.commands.cli` composes them with Hydra and hands the
result to an entry point as a root dataclass, see `lckv.commands.hydra_store`. No torch here, so that mistakes are
reported at once.
"""

from lckv.config.cache import CacheConfig
from lckv.config.conversion import ConvertConfig, SearchConfig
from lckv.config.data import DataConfig, TokenizerConfig
from lckv.config.evaluation import (
    EvaluateConfig,
    EvaluationConfig,
    HarnessConfig,
    NeedleConfig,
    PerplexityConfig,
    RecallConfig,
    SpeedConfig,
)
from lckv.config.exporting import ExportConfig
from lckv.config.generation import DEFAULT_MAX_NEW_TOKENS, BenchmarkConfig, ChatConfig, GenerateConfig
from lckv.config.hints import GroupConfig, HintsConfig
from lckv.config.keys import Group, key, literal
from lckv.config.model import LatentConfig, ModelConfig, SharingConfig
from lckv.config.pretrained import CalibrationConfig, InitConfig, TeacherConfig
from lckv.config.reporting import ReportConfig
from lckv.config.sft import ConversationsConfig, LoraConfig, SFTConfig
from lckv.config.training import LoggerConfig, OptimConfig, PlanConfig, RunConfig, TrainConfig, TrainerConfig
from lckv.config.unused import validate

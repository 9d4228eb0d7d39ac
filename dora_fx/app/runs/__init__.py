"""The surroundings of training: run folder, processes, output, logs, and signals to stop."""

from dora_fx.app.runs.metric_logs import check_logs, training_log
from dora_fx.app.runs.options_file import parse_plain_yaml, read_options_file
from dora_fx.app.runs.progress import Display, TrainingDisplay
from dora_fx.app.runs.run_folder import RunFolder, checkpoint_in, run_of
from dora_fx.app.runs.run_ranks import Ranks
from dora_fx.app.runs.shared_folder import check_shared
from dora_fx.app.runs.step_metrics import StepMetrics
from dora_fx.app.runs.stop_signals import StopSignals

__all__ = [
    "Display",
    "Ranks",
    "RunFolder",
    "StepMetrics",
    "StopSignals",
    "TrainingDisplay",
    "check_logs",
    "check_shared",
    "checkpoint_in",
    "parse_plain_yaml",
    "read_options_file",
    "run_of",
    "training_log",
]

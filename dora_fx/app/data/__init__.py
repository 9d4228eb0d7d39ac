"""Training data: records of files, what each says by its format, its tokens with those that are learned, sequences."""

from dora_fx.app.data.base_tokenizer import BaseTokenizer, is_utf8
from dora_fx.app.data.data_source import locate_data
from dora_fx.app.data.encoding import TokenSample
from dora_fx.app.data.formats import Conversation, Text
from dora_fx.app.data.sequences import (
    Sequences,
    TrainingSequences,
    cut_text,
    held_out_indices,
    sequences_of_samples,
    training_batch,
)
from dora_fx.app.data.training_data import TrainingData, demo_data, read_data

__all__ = [
    "BaseTokenizer",
    "Conversation",
    "Sequences",
    "Text",
    "TokenSample",
    "TrainingData",
    "TrainingSequences",
    "cut_text",
    "demo_data",
    "held_out_indices",
    "is_utf8",
    "locate_data",
    "read_data",
    "sequences_of_samples",
    "training_batch",
]

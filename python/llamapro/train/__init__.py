"""The lean loop, and what it keeps on disk."""

from llamapro.train.config import TrainConfig
from llamapro.train.loop import train
from llamapro.train.stopping import Interrupted

__all__ = ["Interrupted", "TrainConfig", "train"]

"""The strategies that `--strategy` names. Training task after task without any is `--replay 0`."""

from __future__ import annotations

from kdc_edge.train.strategies.replay import CaptionReplay, GenerativeReplay, LatentReplay
from kdc_edge.train.strategies.strategy import Strategy
from kdc_edge.train.strategies.weights import ElasticWeights, WithoutForgetting

STRATEGIES: dict[str, type[Strategy]] = {
    "replay": LatentReplay,
    "captions": CaptionReplay,
    "generative": GenerativeReplay,
    "ewc": ElasticWeights,
    "lwf": WithoutForgetting,
}

# SPDX-License-Identifier: Apache-2.0
"""ReFreeKV as a kvpress press. Layers keep different numbers of tokens, so while decoding with it a
step is one token, with its position given, as for other presses that cut each layer by itself."""
from dataclasses import dataclass

import torch
from kvpress import BasePress
from refreekv_torch import select


@dataclass
class ReFreeKVPress(BasePress):
    threshold: float = 0.01
    window: int = 1
    average: str = "mean"
    full_layers: int = 2

    def decide(self, module, hidden_states, keys, kwargs):
        return select(
            module,
            hidden_states,
            kwargs["position_embeddings"],
            keys,
            window=self.window,
            threshold=self.threshold,
            average=self.average,
            full_layers=self.full_layers,
        )

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        sinks, cut, _ = self.decide(module, hidden_states, keys, kwargs)
        return tuple(
            torch.cat([rows[:, :, :sinks], rows[:, :, cut:]], dim=2) for rows in (keys, values)
        )

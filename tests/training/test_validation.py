from types import SimpleNamespace

import pytest
import torch
from torch import nn

from scripts.training.validation import TimestepLoss


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_losses_are_averaged_as_a_whole_and_by_quarter(weights):
    ema, raw = nn.Identity(), nn.Identity()
    handler = TimestepLoss(nn.L1Loss(), ema)
    engine = SimpleNamespace(state=SimpleNamespace(metrics={}), network={"ema": ema, "raw": raw}[weights])
    handler.start(engine)
    # draws 0..7: prediction is wrong by 1, 2, 3, 4, 5, 6, 7, 8; quarters get (1, 5), (2, 6), (3, 7), (4, 8)
    for first in (0, 4):
        draws = torch.arange(first, first + 4)
        label = torch.zeros(4, 1, 2, 2, 2)
        pred = label + (draws + 1).view(4, 1, 1, 1, 1)
        engine.state.batch, engine.state.output = {"draw": draws}, {"pred": pred, "label": label}
        handler(engine)
    handler.finish(engine)
    expected = {"": 4.5, "_quarter_1": 3, "_quarter_2": 4, "_quarter_3": 5, "_quarter_4": 6}
    assert engine.state.metrics == pytest.approx(
        {f"validation_{weights}/loss{part}": v for part, v in expected.items()}
    )

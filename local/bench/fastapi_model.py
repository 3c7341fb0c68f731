"""`local.bench.fastapi_model:build`: the champion behind FastAPI, which the benchmark compares with a decision.

It only scores: no features, guards, audit or fallback. Its model is called as fast as the TorchServe handler calls it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel

from local.bench.runtimes import metadata_and_weights
from torchserve.handler import calibrated, xgboost_margin

ARCHIVE: Final = "LOCAL_FASTAPI_ARCHIVE"
"""Variable with the path of the champion's `.mar`."""
PATH: Final = "/scores"


class Rows(BaseModel):
    """Feature vectors."""

    rows: list[list[float]]


class Scores(BaseModel):
    """One score a row."""

    scores: list[float]


def build() -> FastAPI:
    """The application around the model of the environment."""
    metadata, weights = metadata_and_weights(Path(os.environ[ARCHIVE]))
    margin = xgboost_margin(weights)
    slope, intercept = (float(metadata["calibration"][name]) for name in ("slope", "intercept"))
    built = FastAPI()

    @built.post(PATH)
    async def scores(request: Rows) -> Scores:
        margins = margin(np.array(request.rows, dtype=np.float32))
        return Scores(scores=calibrated(margins, slope, intercept).tolist())

    return built

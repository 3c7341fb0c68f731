"""Challengers and canaries in SQL: the scores of both models for the same rows, and the canary's changes of state.

`score_pairs` joins with `decisions`, `outcomes` and `labels` by `decision_id`: it shows what a challenger would have
decided, and how that would have turned out. Its rows are removed with the days of their decisions. `canary_events` is
never removed.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from server.audit.store.schema import METADATA

_INSTANT: Final = sa.DateTime(timezone=True)

SCORE_PAIRS: Final = sa.Table(
    "score_pairs",
    METADATA,
    sa.Column("decision_id", sa.String, primary_key=True),
    sa.Column("challenger_version", sa.String, primary_key=True),
    sa.Column("champion_version", sa.String, nullable=False),
    sa.Column("champion_score", sa.Double, nullable=False),
    sa.Column("challenger_score", sa.Double, nullable=False),
    sa.Column("champion_trades", sa.Boolean, nullable=False, comment="score at or above its threshold"),
    sa.Column("challenger_trades", sa.Boolean, nullable=False),
    sa.Column("challenger_decided", sa.Boolean, nullable=False, comment="as a canary; the champion is the shadow"),
    sa.Column("challenger_us", sa.BigInteger, nullable=False, comment="its batch; its attempt when it decided"),
    sa.Column("recorded_at", _INSTANT, nullable=False),
)

CANARY_EVENTS: Final = sa.Table(
    "canary_events",
    METADATA,
    sa.Column("event_id", sa.String, primary_key=True),
    sa.Column("canary_id", sa.String, nullable=False),
    sa.Column("at", _INSTANT, nullable=False),
    sa.Column("event", sa.String, nullable=False, comment="`started`, `advanced`, `rolled_back`, ..."),
    sa.Column("model_version", sa.String, nullable=False),
    sa.Column("champion_version", sa.String, nullable=False),
    sa.Column("previous_weight", sa.Double, nullable=False),
    sa.Column("weight", sa.Double, nullable=False),
    sa.Column("verdict", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("orders", sa.BigInteger, nullable=False, comment="decisions of that process that the canary answered"),
    sa.Column("author", sa.String, nullable=False),
    sa.Column("instance_id", sa.String, nullable=False),
    sa.Column("entry", sa.LargeBinary, nullable=False, comment="pretrade.audit.v1.CanaryEvent, with every check"),
)

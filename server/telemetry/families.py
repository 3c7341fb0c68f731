"""Every metric of the decision server; `docs/metrics.md` is made from this."""

from __future__ import annotations

from typing import Final

from feature_cache.worker.metric_families import Counter, Gauge, Histogram, declared
from server.timing.histogram import ROW_EDGES

EVENT_LOOP_TASKS: Final = Gauge("pretrade_event_loop_tasks", "Tasks of the event loop: a leak grows.")
DECISIONS: Final = Counter("pretrade_decisions", "Decisions sent.", ("source", "action"))
DECISION_REASONS: Final = Counter("pretrade_decision_reasons", "Reasons of decisions.", ("reason",))
DEGRADATIONS: Final = Counter("pretrade_degradations", "Degradations of decisions.", ("degradation",))
DECISION_SECONDS: Final = Histogram("pretrade_decision_seconds", "Arrival to hand-over of the reply.")
STAGE_SECONDS: Final = Histogram("pretrade_stage_seconds", "Time used by a stage.", ("stage",))
STAGE_ALLOWED_SECONDS: Final = Histogram("pretrade_stage_allowed_seconds", "Time allowed to a stage.", ("stage",))
STAGE_SKIPS: Final = Counter("pretrade_stage_skips", "Stages passed over.", ("stage", "reason"))
STAGE_BROKEN: Final = Counter("pretrade_stage_broken", "Stages that broke off with a bug.", ("stage",))
LATE: Final = Counter("pretrade_late", "Calls that ended DEADLINE_EXCEEDED.")
CANCELLED: Final = Counter("pretrade_cancelled", "Calls whose caller had gone.")
ERRORS: Final = Counter("pretrade_errors", "Calls that got no decision.", ("reason",))
EXPLANATIONS: Final = Counter("pretrade_explanations", "Explanations asked for beside replies.", ("status",))
IN_FLIGHT: Final = Gauge("pretrade_in_flight", "Decisions under way.")
ADMISSION_LIMIT: Final = Gauge("pretrade_admission_limit", "Decisions that may be under way.")
SHED: Final = Counter("pretrade_shed", "Calls refused by admission; with Envoy also before they are taken up.")
IDEMPOTENT_REPEATS: Final = Counter("pretrade_idempotent_repeats", "Calls answered again.")
IDEMPOTENT_WITHDRAWN: Final = Counter(
    "pretrade_idempotent_withdrawn", "Calls answered again with something safer: a guard objected since."
)
IDEMPOTENT_REFUSED: Final = Counter(
    "pretrade_idempotent_refused", "Calls shed because no further key could be remembered."
)
IDEMPOTENT_LOST: Final = Counter(
    "pretrade_idempotent_lost", "Decisions made so late that another process may have decided in their place."
)
REPLICA_BATCHES: Final = Counter("pretrade_replica_batches", "Batches and probes by outcome.", ("replica", "outcome"))
REPLICA_ROWS: Final = Counter("pretrade_replica_rows", "Rows scored.", ("replica",))
REPLICA_SPLITS: Final = Counter(
    "pretrade_replica_splits", "Batches that failed as a whole and were sent in parts.", ("replica",)
)
REPLICA_DISPLACED_ROWS: Final = Counter(
    "pretrade_replica_displaced_rows", "Canary rows given up for live ones.", ("replica",)
)
REPLICA_IN_FLIGHT: Final = Gauge(
    "pretrade_replica_in_flight", "Batches in flight, abandoned ones included.", ("replica",)
)
REPLICA_SLOTS: Final = Gauge("pretrade_replica_slots", "Batches that may be in flight at once now.", ("replica",))
REPLICA_ROW_LIMIT: Final = Gauge("pretrade_replica_row_limit", "Rows that a batch may have now.", ("replica",))
REPLICA_ABANDONED: Final = Gauge(
    "pretrade_replica_abandoned", "Batches given up whose answer may still come.", ("replica",)
)
REPLICA_QUEUED_ROWS: Final = Gauge("pretrade_replica_queued_rows", "Rows waiting for a batch.", ("replica",))
BREAKER_STATE: Final = Gauge("pretrade_breaker_state", "0 closed, 1 half-open, 2 open.", ("replica",))
BREAKER_TRANSITIONS: Final = Counter(
    "pretrade_breaker_transitions", "Breaker transitions by state entered.", ("replica", "state")
)
REPLICA_HEALTHY: Final = Gauge("pretrade_replica_healthy", "1 while probes succeed.", ("replica",))
REPLICA_P95_SECONDS: Final = Gauge("pretrade_replica_p95_seconds", "Recent p95 of a batch.", ("replica",))
REPLICA_QUEUE_WAIT_SECONDS: Final = Histogram(
    "pretrade_replica_queue_wait_seconds", "Time of an order's row until its batch left.", ("replica",)
)
REPLICA_BATCH_ROWS: Final = Histogram("pretrade_replica_batch_rows", "Rows of a batch.", ("replica",), ROW_EDGES)
REPLICA_BATCH_SECONDS: Final = Histogram(
    "pretrade_replica_batch_seconds", "Time of a batch, until its answer or until it was given up.", ("replica",)
)
ATTEMPTS: Final = Counter("pretrade_attempts", "Model attempts of orders by outcome.", ("replica", "outcome"))
SECOND_ATTEMPTS: Final = Counter(
    "pretrade_second_attempts", "Second model attempts: retries and hedges.", ("kind", "fate")
)
SHADOW_ROWS: Final = Counter("pretrade_shadow_rows", "Rows for the challenger by fate.", ("fate",))
SHADOW_PAIRS: Final = Counter("pretrade_shadow_pairs", "Rows that two models scored, for the audit.", ("fate",))
CANARY_WEIGHT: Final = Gauge("pretrade_canary_weight", "Share of the order flows that a canary gets here.")
CANARY_ORDERS: Final = Counter("pretrade_canary_orders", "Orders of a canary's flows by fate.", ("fate",))
CANARY_TURNS: Final = Counter("pretrade_canary_turns", "Turns of canaries that this process brought about.", ("turn",))
CANARY_VERDICT: Final = Gauge(
    "pretrade_canary_verdict", "1 for what this process's evidence says of a running canary.", ("verdict",)
)
CANARY_EXCESS: Final = Gauge(
    "pretrade_canary_excess", "Mean of a check at this step, the canary's less the champion's.", ("check",)
)
CANARY_SAMPLES: Final = Gauge("pretrade_canary_samples", "Observations of a check at this step.", ("check",))
SLO_CALLS: Final = Counter(
    "pretrade_slo_calls", "Calls at which a model had a fair chance: whether one answered in time.", ("fate",)
)
SLO_BURN_RATE: Final = Gauge(
    "pretrade_slo_burn_rate", "How many times as fast as it may the error budget burns in this process.", ("window",)
)
CONTROL_VERSION: Final = Gauge("pretrade_control_version", "Version of the control state in force.")
TRADING_STATE: Final = Gauge("pretrade_trading_state", "1 for the state in force, 0 for the others.", ("state",))
FLAG: Final = Gauge("pretrade_flag", "1 while the flag is on.", ("flag",))
CONTROL_RELOADS: Final = Counter(
    "pretrade_control_reloads", "Changes of the control state by other processes and servers."
)
CONTROL_STALE: Final = Gauge("pretrade_control_stale", "1 while other servers' changes may be unknown: no Redis.")
CONTROL_PENDING: Final = Gauge("pretrade_control_pending", "Changes in force on this server alone: no Redis.")
CONTROL_UNRECORDED: Final = Gauge(
    "pretrade_control_unrecorded", "Changes that were made and are not known to be in the audit yet."
)
CONTROL_DOUBTS: Final = Counter(
    "pretrade_control_doubts", "Changes of which nobody knew in time whether they were made: Redis did not answer."
)
CONFIG_RELOAD_FAILURES: Final = Counter(
    "pretrade_config_reload_failures", "Reloads of the configuration that were refused; the last one stays in force."
)
CONTROL_OUTAGES: Final = Counter("pretrade_control_outages", "Times the control state was not shared any more.")
CONTROL_WRITE_FAILURES: Final = Counter(
    "pretrade_control_write_failures", "Changes that could not be written; tried again every second."
)
LOOP_LAG_SECONDS: Final = Histogram("pretrade_loop_lag_seconds", "Delay of a timer of the event loop, every 20 ms.")
LOOP_STALLS: Final = Counter("pretrade_loop_stalls", "Delays of more than 20 ms.")
PROCESS_RESTARTS: Final = Counter("pretrade_process_restarts", "Times a process in this place ended by itself.")
JOURNAL_WRITABLE: Final = Gauge("pretrade_journal_writable", "1 while rows are made durable.")
JOURNAL_ROWS: Final = Counter("pretrade_journal_rows", "Rows made durable.")
JOURNAL_REFUSED: Final = Counter("pretrade_journal_refused", "Rows not made durable.")
JOURNAL_OUTAGES: Final = Counter("pretrade_journal_outages", "Times the journal became unwritable.")
JOURNAL_BYTES: Final = Gauge("pretrade_journal_bytes", "What the rows of the journal fill on disk.")
JOURNAL_LIMIT_BYTES: Final = Gauge(
    "pretrade_journal_limit_bytes", "What they may fill: what the settings allow and the volume has left."
)
JOURNAL_FULL: Final = Gauge("pretrade_journal_full", "1 while the rows fill all that they may.")
JOURNAL_DEPTH: Final = Gauge("pretrade_journal_depth", "Rows waiting for the writer.")
JOURNAL_COMMIT_SECONDS: Final = Histogram("pretrade_journal_commit_seconds", "Time of a group commit, fsync included.")
JOURNAL_COMMIT_ROWS: Final = Histogram("pretrade_journal_commit_rows", "Rows of a group commit.", (), ROW_EDGES)
REPLIES_UNCONFIRMED: Final = Counter(
    "pretrade_replies_unconfirmed", "Decisions that were not what their callers heard; each is noted.", ("fate",)
)
REPLIES_OWED: Final = Gauge(
    "pretrade_replies_owed", "Decisions on disk of which nobody knows yet whether they were heard."
)
REPLY_NOTES_WAITING: Final = Gauge("pretrade_reply_notes_waiting", "Notes about replies that are not durable yet.")
REPLY_NOTES_LOST: Final = Counter("pretrade_reply_notes_lost", "Notes about replies given up because too many waited.")
SHIPPER_UNSHIPPED: Final = Gauge("pretrade_shipper_unshipped", "Durable rows not yet in SQL.")
SHIPPER_OUTAGES: Final = Counter("pretrade_shipper_outages", "Times shipping began to fail.")
SHIPPER_RESTARTS: Final = Counter("pretrade_shipper_restarts", "Times the shipping process was replaced.")
TOPIC_UNPUBLISHED: Final = Gauge("pretrade_topic_unpublished", "Durable rows not yet on the topic.")
TOPIC_OUTAGES: Final = Counter("pretrade_topic_outages", "Times publishing began to fail.")
TOPIC_RESTARTS: Final = Counter("pretrade_topic_restarts", "Times the publishing process was replaced.")
TOPIC_SKIPPED: Final = Counter(
    "pretrade_topic_skipped", "Rows that left the journal unpublished, because it was half full."
)
FEATURE_AGE_SECONDS: Final = Gauge(
    "pretrade_feature_age_seconds", "Age of the features from exchange event time.", ("instrument",)
)
FEATURES_PRESENT: Final = Gauge(
    "pretrade_features_present", "1 while there are features within their TTL.", ("instrument",)
)
FEATURES_BOOK_KNOWN: Final = Gauge(
    "pretrade_features_book_known", "1 while there are features, and of a book that is known.", ("instrument",)
)
FEATURES_TAKEN: Final = Counter("pretrade_features_taken", "Vectors taken over from Redis.")
FEATURES_REJECTED: Final = Counter("pretrade_features_rejected", "Values in Redis that were no vector of ours.")
FEATURES_EXPIRED: Final = Counter("pretrade_features_expired", "Vectors dropped because of their age.")
FEATURES_AHEAD: Final = Counter(
    "pretrade_features_ahead",
    "Vectors refused because they were published after this host's clock: the clocks disagree.",
)
FEATURE_CACHE_DISCONNECTS: Final = Counter("pretrade_feature_cache_disconnects", "Times Redis was lost or not reached.")
FEATURE_CACHE_CONNECTED: Final = Gauge("pretrade_feature_cache_connected", "1 while Redis answers.")
ACCESS_REFUSED: Final = Counter(
    "pretrade_access_refused", "Calls refused for want of credentials, roles or patience.", ("plane", "reason")
)
TOKENS_VERIFIED: Final = Counter("pretrade_tokens_verified", "Signatures of tokens verified; known tokens cost none.")
CREDENTIALS_VERSION: Final = Gauge(
    "pretrade_credentials_version", "Grows with every replacement that came into force.", ("file",)
)
CREDENTIALS_FAILURES: Final = Counter(
    "pretrade_credentials_failures", "Replacements that were no good; the last ones stay in force.", ("file",)
)
CERTIFICATE_EXPIRY_SECONDS: Final = Gauge(
    "pretrade_certificate_expiry_seconds", "When the server's certificate expires, Unix time."
)
REPORTS_CHOSEN: Final = Counter(
    "pretrade_reports_chosen", "Decisions chosen to be told of, lost ones included.", ("outlet", "cause")
)
REPORTS_LOST: Final = Counter(
    "pretrade_reports_lost", "Of these, those beyond the outlet's rate or queue.", ("outlet",)
)
SPANS_EXPORTED: Final = Counter("pretrade_spans_exported", "Spans that the collector took.")
SPANS_NOT_EXPORTED: Final = Counter("pretrade_spans_not_exported", "Spans that the collector did not take in time.")
DRIFT_PSI: Final = Gauge(
    "pretrade_drift_psi", "Population stability of recent inputs, and of the score, against the model's.", ("feature",)
)
DRIFT_LIMIT: Final = Gauge(
    "pretrade_drift_psi_limit", "What as many values without drift exceed once in a hundred comparisons.", ("feature",)
)
DRIFT_UNDEFINED: Final = Gauge("pretrade_drift_undefined_ratio", "Share of undefined values.", ("feature",))
DRIFT_ROWS: Final = Gauge("pretrade_drift_rows", "Different inputs in the newest comparison; 0 without one.")
READER_QUESTIONS: Final = Counter(
    "pretrade_reader_questions", "Questions to a process that reads the audit.", ("reader",)
)
READER_ENDED: Final = Counter("pretrade_reader_ended", "Times a process that reads the audit ended.", ("reader",))
READER_WAITING: Final = Gauge("pretrade_reader_waiting", "Questions that have no answer yet.", ("reader",))

METRICS: Final = declared(globals())

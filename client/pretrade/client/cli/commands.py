"""Every command of `pretrade`: where it stands in the help, its line there, and the module of ours that holds it.

The help is printed from this table, so that it loads no command. The table also names the commands of
`pretrade-server`, so that the help is the same however they are installed, and so that one that is missing can say
where to get it.
"""

from __future__ import annotations

from typing import Final

from pretrade.client.cli.lazy import Command

_OURS: Final = "pretrade.client.cli"


def _panel(name: str, *commands: tuple[str, str] | tuple[str, str, str]) -> dict[str, Command]:
    return {command: Command(name, *rest) for command, *rest in commands}


COMMANDS: Final = {
    **_panel(
        "Run it on this machine",
        (
            "up",
            "Run the whole stack on this machine until Ctrl-C: databases, broker, models, feature worker, decision "
            "server.",
        ),
        ("demo", "Run the whole stack on this machine, send orders, kill a replica halfway, and print a summary."),
        (
            "kill",
            "Kill a part of the stack that runs on this machine, as a fault would; `pretrade up` starts it again.",
        ),
        (
            "trial-credentials",
            "Make certificates and tokens for TRIALS on this machine, valid for a day. Never use them in production.",
        ),
    ),
    **_panel(
        "Ask and steer a server",
        ("decide", "Decide one order: trade, no trade, or abstain.", f"{_OURS}.decide"),
        (
            "status",
            "Show the worst thing now, and replicas, features, flags, the audit journal and the canary.",
            f"{_OURS}.status",
        ),
        (
            "console",
            "Serve the console: pages for on-call and compliance, in a browser, until Ctrl-C.",
            "pretrade.console.cli",
        ),
        (
            "state",
            "Show the trading state, or set it: active, reducing or halted. Asks before it becomes less strict.",
            f"{_OURS}.steering",
        ),
        (
            "breaker",
            "Show the breakers, or force one open or closed, or make it automatic again. Asks if that is risky.",
            f"{_OURS}.steering",
        ),
        ("flag", "List the flags, or set one.", f"{_OURS}.steering"),
        (
            "chain",
            "Show which stages of the fallback chain may answer, or set them and their order. Asks first.",
            f"{_OURS}.steering",
        ),
        ("changes", "Show who changed what, when and why, the newest first.", f"{_OURS}.steering"),
        ("replica", "List replicas, drain one, or resume it.", f"{_OURS}.steering"),
        ("config", "Reload the servers' configuration.", f"{_OURS}.steering"),
        (
            "alerts",
            "List the alerts that fire, silence some, end a silence, or define your own.",
            f"{_OURS}.alerts",
        ),
        ("audit", "Look decisions up, recompute and export them, and verify that none was changed."),
    ),
    **_panel(
        "Market data",
        (
            "features",
            "Watch one instrument's features as they change; list, show and check feature sets.",
        ),
        (
            "bars",
            "Show an instrument's last bars: prices, volume, trades, and what a bar lacks. `--tail` goes on with each "
            "new one.",
        ),
        (
            "ingest",
            "Publish an exchange's live market data to Kafka until interrupted. Reconnects, and recovers from gaps.",
        ),
        ("replay", "Publish recorded market data to Kafka with its original timing."),
        ("simulate", "Publish a seeded, simulated market to Kafka."),
        ("market-facts", "Hold the simulated market against a recorded one: fifteen statistics, each met or missed."),
    ),
    **_panel(
        "Models",
        (
            "train",
            "Train models, compare them with the baselines in a walk-forward evaluation, and publish them with "
            "their cards.",
        ),
        ("card", "Render a model's card, with its pictures, as one HTML file."),
        (
            "canary-demo",
            "Run the whole stack and three canaries: a good one is promoted, a late and an inverted one are "
            "rolled back.",
        ),
        ("models", "List, load, add, combine, export and remove models.", f"{_OURS}.models"),
        (
            "canary",
            "Give a new model version a small share of the orders, and more as its evidence allows.",
            f"{_OURS}.canary",
        ),
        ("dataset", "Build or show a dataset: training samples as Parquet."),
    ),
    **_panel(
        "Measure",
        (
            "soak",
            "Run the whole stack under load for half an hour, and check that memory, descriptors, tasks and "
            "latency stay flat.",
        ),
        ("bench", "Measure decisions a second and latency on both edges, next to bare echoes, TorchServe and FastAPI."),
        (
            "bench-compare",
            "Show what changed between two runs of `pretrade bench`, and what the machine did meanwhile.",
        ),
        (
            "bench-costs",
            "Measure what each optional part of a decision costs, and where its CPU goes, by process and thread.",
        ),
        (
            "bench-flips",
            "Measure how fast a change reaches every process of two servers with two processes each, while they "
            "decide.",
        ),
        (
            "bench-features",
            "Measure the feature worker: its steps next to pandas, events a second from Kafka to Redis, and freshness.",
        ),
        (
            "bench-lookups",
            "Measure how long the audit takes to find one decision, or a page of them by each filter, among many "
            "millions.",
        ),
        (
            "bench-serving",
            "Measure model serving: runtimes in process, TorchServe calls by rows, and what each of its settings does.",
        ),
    ),
}
"""By name, in the order of the help."""

"""The library for callers of a server, and the `pretrade` command (`pretrade.client.cli`).

It needs only gRPC, protobuf, Typer and Rich, and nothing that runs a server. The messages and stubs are in the same
namespace: `pretrade.decision.v1`, `pretrade.admin.v1` and `pretrade.audit.v1`.
"""

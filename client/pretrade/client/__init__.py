"""The library of those who call a server, and the `pretrade` command (`pretrade.client.cli`).

It needs nothing but gRPC, protobuf, Typer and Rich, and nothing that runs a server. The messages and stubs are beside
it in the same namespace: `pretrade.decision.v1`, `pretrade.admin.v1` and `pretrade.audit.v1`.
"""

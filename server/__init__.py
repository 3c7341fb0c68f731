"""The decision server: edges, data plane, model replicas, audit and control."""

import os

# Before gRPC is first imported: its fork handlers are for processes that go on after a fork. Ours start programs, and
# the handlers would only complain, in the middle of the log, that another thread is in a call (the export of spans).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

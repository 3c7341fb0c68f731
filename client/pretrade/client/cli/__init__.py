"""The operator's command line: a client of the public gRPC API like any other.

`main` is the command. Each file holds the commands of one group; `views` draws what they show.
"""

import os

# Before gRPC is first imported: its fork handlers are for processes that go on after a fork. `pretrade up` starts
# programs, and the handlers would only complain, in the middle of the log, that another thread is in a call.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

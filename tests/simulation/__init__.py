"""A seeded simulation of whole servers: one process, virtual time, one seed, one history.

Start here. `make simulate` runs seeds until one fails; a failing seed prints its violations and how to replay it, goes
be kept as its shortest failing plan in `kept/`; kept plans run first in every later run. A seed always gives the same
history, to the last byte.

What is real: everything that a server consists of, started by the composition root's own
`server.composition.app.start`: control state, journal with SQLite's own file, idempotency keys, data plane, chain,
batchers, breakers, shipping, both edges'
servicers, redis-py, SQLAlchemy. What is simulated is what lies below and around it::

    world.py     the clock and the queue of events; what blocks is a fiber, and only one thing runs at a time
    loop.py      a process's event loop        threads.py   its threads         machine.py  hosts, processes, SIGKILL
    disk.py      what was synced and what not  vfs.py       the same disk for SQLite
    network.py   connections of bytes          redis.py     a master and its replica; Lua scripts run as they are
    calls.py     gRPC calls, as grpc.aio and as Envoy serve them                children.py the shipping process
    database.py  the audit database            replica.py   model servers       market.py   the feature worker

Nothing in the servers is patched. They get their clocks, chance, threads, files and gRPC from `server.machine.Machine`,
and timers, sockets and child processes from their event loop; both are the simulation's.

A run (`run.py`) draws a plan from its seed (`plan.py`): servers, calls, changes by operators, and faults, each at its
instant. `desk.py` calls and operates, and keeps the history (`history.py`). Then everything is healed, has to come to
rest, and `checks.py` (calls, rows, keys, breakers) and `register.py` (the trading state) go through the history and
what the audit says in the end. They look at nothing inside the servers.

To find out why a seed fails: `make simulate SEED=123 TRACE=1` prints its steps, its shortest failing plan, every event
and every log line.

What it does not see: bugs within one turn of an event loop, since only one thing runs at a time; the C core of gRPC,
Envoy and Redis themselves; PostgreSQL (the database is SQLite); how long our own code takes. The fault tests in
`tests/faults/` have those.
"""

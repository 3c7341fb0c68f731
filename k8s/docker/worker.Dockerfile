# The feature worker. Build from the root of the repository:
#   docker build --file k8s/docker/worker.Dockerfile --tag pretrade-worker:dev .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE} AS build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY . .
# Every package by its hashes, in the versions that requirements/ lock.
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement requirements/worker.txt \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement requirements/build.txt \
    && /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist ./client . \
    && pip install --no-cache-dir --no-deps /dist/*.whl && pip check

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PRETRADE_WORKER_METRICS_PORT=7004
WORKDIR /tmp
USER 10001:10001
EXPOSE 7004
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7004/healthz', timeout=2)"]
ENTRYPOINT ["python", "-m", "feature_cache"]

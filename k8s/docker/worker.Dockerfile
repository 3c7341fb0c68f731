# The feature worker. Build from the root of the repository:
#   docker build --file k8s/docker/worker.Dockerfile --tag pretrade-worker:dev .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE} AS build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY . .
# The wheel pins what it requires.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[worker]'

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PRETRADE_WORKER_METRICS_PORT=7004
WORKDIR /tmp
USER 10001:10001
EXPOSE 7004
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:7004/healthz', timeout=2)"]
ENTRYPOINT ["python", "-m", "feature_cache"]

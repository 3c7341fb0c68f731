# The decision server. Build from the root of the repository:
#   docker build --file k8s/docker/server.Dockerfile --tag pretrade-server:dev .
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE} AS build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY . .
# The wheel pins what it requires. What a worker needs is all that the `pretrade` command takes, which on-call runs in here,
# and the topic of decisions.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir '.[worker]'

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

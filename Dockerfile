# The server with its embedded model, for CPU or CUDA: what TORCH installs decides.
#
#   docker build -t underpaint .
#   docker build -t underpaint --build-arg TORCH_INDEX=URL .     URL of an index that has the CPU wheels of torch
#
FROM python:3.11-slim-bookworm AS build

ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src

# The largest layers, and those that change least. The environment has no pip of its own: nothing installs at run time.
# Every package is of the version and the hash that requirements/run.txt says, but for torch and what its CUDA build needs.
COPY requirements/build.txt requirements/run.txt requirements/
RUN python3 -m venv --without-pip /opt/underpaint \
    && python3 -m pip --python /opt/underpaint/bin/python install --no-deps --require-hashes -r requirements/run.txt \
    && python3 -m pip install --no-deps --require-hashes -r requirements/build.txt
RUN python3 -m pip --python /opt/underpaint/bin/python install \
        ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "${TORCH}"

COPY client client
COPY service service
COPY models/underpaint-mini models/underpaint-mini
RUN python3 -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels ./client ./models/underpaint-mini ./service \
    && python3 -m pip --python /opt/underpaint/bin/python install --no-deps --no-index /wheels/*.whl

# The embedded model for OpenVINO, so that the first start need not export it.
RUN UNDERPAINT_CACHE_DIR=/opt/underpaint/cache /opt/underpaint/bin/underpaint-server export


FROM python:3.11-slim-bookworm

RUN groupadd --gid 10001 underpaint \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin underpaint \
    && install -d -o 10001 -g 10001 /var/lib/underpaint

COPY --from=build /opt/underpaint /opt/underpaint

# Loopback, the default, would be of no use inside a container.
ENV PATH=/opt/underpaint/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    UNDERPAINT_LISTEN=0.0.0.0:50051 \
    UNDERPAINT_METRICS_LISTEN=0.0.0.0:9464 \
    UNDERPAINT_CACHE_DIR=/opt/underpaint/cache

USER 10001:10001
WORKDIR /var/lib/underpaint
EXPOSE 50051 9464
ENTRYPOINT ["underpaint-server"]

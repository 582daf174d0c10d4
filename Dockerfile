# The environment of cluster.yaml as an image, for clusters that run containers: the same pins, the same settings.
# docker build -t motip .          PyTorch brings its own CUDA libraries: the host needs the NVIDIA driver and runtime.
FROM python:3.11.13-slim-bookworm AS build

# The package as a wheel; the build tools stay in this stage.
WORKDIR /build
COPY requirements-build.lock ./
RUN python -m pip install --no-cache-dir --require-hashes --requirement requirements-build.lock
COPY pyproject.toml README.md LICENSE ./
COPY motip ./motip
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir dist .

FROM python:3.11.13-slim-bookworm

# OpenCV needs the first two; wget answers the probes of container clusters.
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends libgl1 libglib2.0-0 wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/motip
COPY requirements.lock ./
RUN python -m pip install --no-cache-dir --require-hashes --requirement requirements.lock

COPY --from=build /build/dist ./dist
RUN python -m pip install --no-cache-dir --no-deps --no-index dist/*.whl
COPY configs ./configs
COPY ray_jobs ./ray_jobs

# The token is mounted or given at run time (RAY_AUTH_TOKEN_PATH); the image contains none.
ENV RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

RUN useradd --create-home --uid 1000 motip
USER motip
CMD ["motip", "--help"]

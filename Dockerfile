# Images of rlkv_vllm. How to use them, sizes, what was run: deploy/README.md
#   docker build -t rlkv-vllm:cpu .                           serve on a CPU (target cpu, the last one)
#   docker build --target train -t rlkv-vllm:train .          make head profiles on a CPU
#   docker build --target gpu -t rlkv-vllm:gpu .              serve on a GPU
#   docker build --target gpu-train -t rlkv-vllm:gpu-train .  make head profiles on a GPU
#
# Behind a proxy or with an own package index: --secret id=pip_conf,src=pip.conf --build-arg TORCH_INDEX=

ARG DEBIAN_IMAGE=debian:12.12-slim
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0
# For the labels of both runtime stages.
ARG VERSION=0.1.0
ARG REVISION=unknown

FROM ${DEBIAN_IMAGE} AS python
# Debian keeps only the newest build of a package in its archive: a pin would break with the next security fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libnuma1 python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*

FROM python AS pip
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1

FROM pip AS wheel
RUN python3 -m venv /opt/build
COPY deploy/requirements-build.txt /src/deploy/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    /opt/build/bin/pip install --no-cache-dir --no-deps -r /src/deploy/requirements-build.txt
COPY pyproject.toml README.md LICENSE /src/
COPY head_profiles /src/head_profiles
COPY rlkv_vllm /src/rlkv_vllm
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist /src

FROM pip AS packages
ENV PATH=/opt/venv/bin:${PATH}
RUN python3 -m venv /opt/venv
COPY deploy/requirements-cpu.txt /src/deploy/
# torch's CPU build is not on PyPI.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# No dependencies but those of the list: it leaves out what serving text on a CPU does without.
# torch's own tests are 120 MB of programs.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    PIP_EXTRA_INDEX_URL="${TORCH_INDEX}" \
    pip install --no-cache-dir --no-deps -r /src/deploy/requirements-cpu.txt \
    && find /opt/venv/lib -path '*/torch/test/*' -delete \
       -o -path '*/torch/bin/*' -type f ! -name torch_shm_manager -delete

FROM packages AS cpu-packages
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir --no-deps --no-index /dist/*.whl \
    && pip uninstall --yes pip

FROM packages AS train-packages
COPY deploy/requirements-train.txt /src/deploy/
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --no-cache-dir --no-deps -r /src/deploy/requirements-train.txt
COPY --from=wheel /dist /dist
RUN pip install --no-cache-dir --no-deps --no-index /dist/*.whl \
    && pip uninstall --yes pip

# The same user and home as in vLLM's own images, so that volumes fit both.
FROM python AS runtime
RUN useradd --uid 2000 --gid 0 --create-home --home-dir /home/vllm vllm \
    && install -d -o vllm -g 0 -m 0775 /home/vllm/.cache /home/vllm/.config
ENV PATH=/opt/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_PLUGINS=rlkv
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="rlkv_vllm" \
      org.opencontainers.image.description="vLLM with a KV cache that is split per head" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /home/vllm
USER 2000:0
ENTRYPOINT ["rlkv"]

FROM runtime AS train
COPY --from=train-packages /opt/venv /opt/venv
HEALTHCHECK NONE
CMD ["train", "--help"]

# Not run by this project yet: no engine and no GPU where it was written.
# hadolint ignore=DL3006
FROM ${VLLM_IMAGE} AS gpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
USER 0
COPY --from=wheel /dist /dist
COPY deploy/requirements-cpu.txt deploy/requirements-train.txt /dist/
# What the image has stays as it is; what is added has the versions of our lists.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python3 -m pip list --format=freeze > /dist/image.txt \
    && cat /dist/image.txt /dist/requirements-*.txt \
       | awk -F== '/==/ {name = tolower($1); gsub(/[_.]/, "-", name); if (!seen[name]++) print}' \
       > /dist/constraints.txt \
    && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir \
       --constraint /dist/constraints.txt /dist/*.whl \
    && (id vllm || useradd --uid 2000 --gid 0 --create-home --home-dir /home/vllm vllm) \
    && install -d -o vllm -g 0 -m 0775 /home/vllm/.cache /home/vllm/.config
ENV PYTHONUNBUFFERED=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    HOME=/home/vllm \
    VLLM_NO_USAGE_STATS=1 \
    VLLM_PLUGINS=rlkv
ARG VERSION
ARG REVISION
LABEL org.opencontainers.image.title="rlkv_vllm" \
      org.opencontainers.image.description="vLLM with a KV cache that is split per head" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /home/vllm
USER 2000:0
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --start-period=15m \
    CMD ["python3", "-m", "rlkv_vllm.serving.healthcheck"]
ENTRYPOINT ["rlkv"]
CMD ["serve"]

FROM gpu AS gpu-train
USER 0
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir \
    --constraint /dist/constraints.txt "$(echo /dist/*.whl)[train]"
USER 2000:0
HEALTHCHECK NONE
CMD ["train", "--help"]

FROM runtime AS cpu
COPY --from=cpu-packages /opt/venv /opt/venv
EXPOSE 8000
# Fails when the server does not answer and when its cache is not split.
HEALTHCHECK --interval=10s --timeout=10s --start-period=5m \
    CMD ["python3", "-m", "rlkv_vllm.serving.healthcheck"]
CMD ["serve"]

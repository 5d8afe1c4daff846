# Two images of the same server:
#   --target cpu    demo included, on Debian's Python 3.11
#   --target cuda   on vLLM's own image, for NVIDIA GPUs
#
# Nothing here names a package index. A builder behind a mirror hands over, as build-time secrets
# that no layer keeps, any of: pip.conf, apt.conf, ca.crt (a bundle for pip). See deploy/README.md.

FROM debian:bookworm-slim AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN --mount=type=secret,id=apt.conf,target=/etc/apt/apt.conf.d/90build \
    apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src

FROM build AS wheel
COPY . .
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.crt,target=/etc/ssl/certs/ca-certificates.crt \
    python3 -m venv /venv \
    && /venv/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# The environment of `make install`: torch's CPU build first, the pinned versions, and without the
# packages that do not go with it. The sources come later: a change in them reinstalls nothing else.
# Triton, a quarter of it all, has no back end for a CPU.
FROM build AS environment
COPY Makefile constraints.txt pyproject.toml README.md LICENSE ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.crt,target=/etc/ssl/certs/ca-certificates.crt \
    PIP_NO_CACHE_DIR=1 make install VENV=/opt/vllm-sae
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/vllm-sae/bin/pip uninstall --yes vllm-sae \
    && /opt/vllm-sae/bin/pip install --no-cache-dir --no-index --no-deps /wheels/*.whl \
    && /opt/vllm-sae/bin/pip uninstall --yes triton pip

FROM debian:bookworm-slim AS cpu
# hadolint ignore=DL3008
RUN --mount=type=secret,id=apt.conf,target=/etc/apt/apt.conf.d/90build \
    apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libnuma1 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /var/cache/vllm-sae \
        --shell /usr/sbin/nologin vllm-sae \
    && install --directory --owner vllm-sae --group vllm-sae /var/cache/vllm-sae
COPY --from=environment /opt/vllm-sae /opt/vllm-sae
# Whatever is written goes below /var/cache/vllm-sae and /tmp; the rest may be read-only.
ENV PATH=/opt/vllm-sae/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/var/cache/vllm-sae \
    XDG_CACHE_HOME=/var/cache/vllm-sae \
    XDG_CONFIG_HOME=/var/cache/vllm-sae \
    HF_HOME=/var/cache/vllm-sae/huggingface \
    VLLM_NO_USAGE_STATS=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /var/cache/vllm-sae
VOLUME ["/var/cache/vllm-sae"]
USER 10001:10001
EXPOSE 8000
# A first start converts the demo model, and any start loads one: minutes on a small machine.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["vllm-sae"]
# There is no compiler here, so nothing is compiled: --enforce-eager also behind `serve`.
CMD ["demo", "--enforce-eager"]

FROM vllm/vllm-openai:v0.32.0 AS cuda
# The base may run as somebody else. Its vLLM and torch stay as they are: with no index to ask, pip
# fails where one of our dependencies is missing or too old.
USER 0
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --no-index /wheels/*.whl \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /var/cache/vllm-sae \
        --shell /usr/sbin/nologin vllm-sae \
    && install --directory --owner vllm-sae --group vllm-sae /var/cache/vllm-sae
ENV HOME=/var/cache/vllm-sae \
    XDG_CACHE_HOME=/var/cache/vllm-sae \
    XDG_CONFIG_HOME=/var/cache/vllm-sae \
    HF_HOME=/var/cache/vllm-sae/huggingface \
    VLLM_NO_USAGE_STATS=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /var/cache/vllm-sae
VOLUME ["/var/cache/vllm-sae"]
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["vllm-sae"]
CMD ["--help"]

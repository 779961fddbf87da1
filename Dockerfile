# docker build -t mllm-fast .                                          CPU
# docker build -t mllm-fast:cuda --build-arg TORCH=cu130 .             NVIDIA GPUs
# docker build -t mllm-fast:ray --build-arg TORCH=cu130 --build-arg EXTRAS=ray,structured .    for deploy/kuberay
# docker run -p 8000:8000 -v mllm-fast:/data -e MLLM_FAST_API_KEYS=... mllm-fast
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
# which build of torch: cpu, or a CUDA release of https://pytorch.org/get-started/locally/
ARG TORCH=cpu
RUN pip install "torch>=2.11" --index-url "https://download.pytorch.org/whl/${TORCH}"
ARG EXTRAS=ui,structured
COPY . /source
RUN pip install "/source[${EXTRAS}]"

FROM python:${PYTHON}-slim-bookworm
ARG TORCH=cpu
ARG EXTRAS=ui,structured
# on a GPU Triton compiles its launchers with a C compiler; KubeRay's probes call wget
# hadolint ignore=DL3008
RUN apt-get update \
    && if [ "${TORCH}" != cpu ]; then apt-get install -y --no-install-recommends gcc libc6-dev; fi \
    && case ",${EXTRAS}," in *,ray,*) apt-get install -y --no-install-recommends wget ;; esac \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/venv /opt/venv
RUN useradd --uid 10001 --user-group --home-dir /data --create-home mllm-fast
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/data \
    HF_HOME=/data/huggingface \
    TRITON_CACHE_DIR=/data/triton \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
ENTRYPOINT ["mllm-fast"]
CMD ["serve", "--host", "0.0.0.0", "--store", "/data/contexts"]

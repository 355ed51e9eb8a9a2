# An image that serves a model on port 8000. CPU by default; NVIDIA GPUs: --build-arg TORCH=cu130
#   docker build -t cadenza .
#   docker run -p 8000:8000 -v cadenza-cache:/cache cadenza  # or: … cadenza serve OTHER/MODEL --host 0.0.0.0
ARG TORCH=cpu

FROM python:3.12-slim AS build
ARG TORCH
RUN python -m venv /opt/cadenza
ENV PATH=/opt/cadenza/bin:$PATH
RUN pip install --no-cache-dir "torch>=2.11,<=2.13.0" --index-url "https://download.pytorch.org/whl/${TORCH}"
COPY . /src
RUN pip install --no-cache-dir /src

FROM python:3.12-slim
# Triton compiles its launcher with the system's C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 cadenza && mkdir /cache && chown cadenza /cache
COPY --from=build /opt/cadenza /opt/cadenza
ENV PATH=/opt/cadenza/bin:$PATH CADENZA_CACHE=/cache/cadenza HF_HOME=/cache/huggingface
USER cadenza
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["cadenza"]
CMD ["serve", "smollm2", "--host", "0.0.0.0", "--port", "8000"]

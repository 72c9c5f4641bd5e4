# syntax=docker/dockerfile:1
# The command line of onestill in an image; what changes least comes first, so that a change of the code builds one layer.
#
#     docker build -t onestill .                                   # CPU
#     docker build -t onestill:cuda --build-arg DEVICE=cuda .      # NVIDIA; run it with --gpus all
#     docker run --rm -v "$PWD:/data" --user "$(id -u):$(id -g)" onestill demo digits --output_dir demo
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# cpu or cuda: which build of torch is installed.
ARG DEVICE=cpu

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

WORKDIR /onestill

COPY constraints.txt ./
# Alone: gigabytes that change with constraints.txt only. On Linux the package index has the build for CUDA.
RUN case "$DEVICE" in \
        cpu) pip install --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch ;; \
        cuda) pip install --constraint constraints.txt torch ;; \
        *) echo "DEVICE=$DEVICE: must be cpu or cuda" >&2; exit 2 ;; \
    esac

# The dependencies before the code: a package that is empty but for its version has the same.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir -p src/onestill \
    && echo '__version__ = "0"' > src/onestill/__init__.py \
    && pip install --constraint constraints.txt ".[all]" \
    && pip uninstall --yes onestill \
    && rm -r src

COPY src ./src
RUN pip install --constraint constraints.txt --no-deps . && rm -r src

# Nobody in particular: --user "$(id -u):$(id -g)" makes what is written yours. Both folders take every user's files.
RUN useradd --create-home --uid 1000 onestill && mkdir --mode 1777 /data /cache
ENV HF_HOME=/cache/huggingface \
    MPLCONFIGDIR=/cache/matplotlib \
    XDG_CACHE_HOME=/cache
USER onestill
WORKDIR /data

ENTRYPOINT ["onestill"]
CMD ["--help"]

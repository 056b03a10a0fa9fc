# syntax=docker/dockerfile:1
# An image with dhcl, its kernels compiled. On a CPU:
#   docker build -t dhcl .
# On NVIDIA GPUs (the kernels are compiled for TORCH_CUDA_ARCH_LIST; no GPU is needed to build):
#   docker build -t dhcl:cuda --build-arg TORCH=cu130 \
#     --build-arg BUILD_BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04 .
# In use, with the images and runs of this folder:
#   docker run --rm -v "$PWD:/data" dhcl train --data folder --root crops --out runs/crops
ARG BUILD_BASE=ubuntu:24.04

FROM ${BUILD_BASE} AS build
ARG TORCH=cpu
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0 10.0+PTX"
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/dhcl
ENV PATH=/opt/dhcl/bin:$PATH
RUN pip install "setuptools>=77" wheel numpy ninja filelock
RUN pip install torch torchvision --index-url "https://download.pytorch.org/whl/${TORCH}"
COPY . /src
WORKDIR /src
# Without isolation, so that the kernels are compiled against the torch that is there.
RUN DHCL_BUILD=aot pip install --no-build-isolation ".[train,export,index]"
WORKDIR /
RUN DHCL_BUILD=aot python -m dhcl_ops | tee /dev/stderr | grep --quiet prebuilt

# What runs needs no compiler: torch's wheels bring the libraries of CUDA.
FROM ubuntu:24.04
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1001 dhcl
COPY --from=build /opt/dhcl /opt/dhcl
ENV PATH=/opt/dhcl/bin:$PATH DHCL_BUILD=aot
USER dhcl
WORKDIR /data
ENTRYPOINT ["dhcl"]
CMD ["--help"]

# The README's two commands in a container. A GPU needs NVIDIA's container toolkit on the host.
#   docker build -t lora_core .                        # PyTorch with CUDA; --build-arg TORCH=cpu
#   docker run --rm -v "$PWD/runs:/lora_core/runs" lora_core            # make demo
#   docker run --rm lora_core make test
#   docker run --rm --gpus all -v "$PWD:/work" lora_core \
#       .venv/bin/python train.py --preset character --model MODEL \
#       --data.images /work/photos --data.caption "a photo of TOK" --out /work/runs/mine
FROM python:3.12-slim

# A C compiler: optimizer steps on the CPU, and Triton's launchers on a GPU, are compiled once.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /lora_core
ARG TORCH=
COPY . .
RUN make ready TORCH=${TORCH}
CMD ["make", "demo"]

# maedistill in a container, for CPUs and for CUDA. docs/docker.md says how to run it.
#
#   docker build -t maedistill .                                                            torch of PyPI: CUDA, and CPUs too
#   docker build -t maedistill --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .   without CUDA, 4 GB smaller
FROM debian:trixie-slim

# gcc and the headers are what torch.compile needs on a GPU
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/maedistill
ENV PATH=/opt/maedistill/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# torch and torchvision come from one index: those of two indexes do not fit each other
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --index-url "$TORCH_INDEX" 'torch>=2.11' 'torchvision>=0.26'

COPY pyproject.toml setup.py README.md LICENSE /src/
COPY configs /src/configs
COPY maedistill /src/maedistill
RUN pip install '/src[demo,fast,remote]' && rm -r /src

# mount data and runs on /work; start with --user "$(id -u):$(id -g)" to own what is written there
# and to have a home for caches, whatever the id
RUN useradd --create-home --uid 1000 maedistill && chmod 1777 /home/maedistill && install --directory --owner maedistill /work
USER maedistill
ENV HOME=/home/maedistill
WORKDIR /work
ENTRYPOINT ["maedistill"]
CMD ["--help"]

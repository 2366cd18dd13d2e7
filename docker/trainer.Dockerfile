# The trainer and what it needs on a GPU: torch with its CUDA libraries, from the package index. No control plane.
#
#     docker build -f docker/trainer.Dockerfile -t caddie-trainer .                   the trainer
#     docker build -f docker/trainer.Dockerfile -t caddie-node --target node .        a Slurm node that runs it
#
# The driver is the host's. Everything else of CUDA comes with torch, so that the base is a plain Debian.
ARG BASE=debian:bookworm-20260824-slim@sha256:88200866dfff7ea7f5cbcb6ec7c8a701889efe6fe859fe64d6990e4b07ea4171

# hadolint ignore=DL3006
FROM ${BASE} AS environment
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# gcc and Python's headers: Triton and torch.compile build their launchers with them, on first use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt /opt/caddie/source/
COPY docker/requirements.py /opt/caddie/source/docker/
RUN python3 -m venv /opt/caddie/venv \
    && python3 /opt/caddie/source/docker/requirements.py trainer > /opt/caddie/trainer.txt \
    && /opt/caddie/venv/bin/pip install --no-cache-dir -c /opt/caddie/source/constraints.txt -r /opt/caddie/trainer.txt
ENV PATH=/opt/caddie/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG CADDIE_UID=10001
RUN groupadd --gid "${CADDIE_UID}" caddie \
    && useradd --uid "${CADDIE_UID}" --gid caddie --create-home --shell /bin/bash caddie \
    && install --directory --owner=caddie --group=caddie /srv/caddie
ENV CADDIE_HOME=/srv/caddie

# A node of the cluster: the trainer, Slurm's daemons, and of the orchestrator what runs there: the worker, `data`, `verify`,
# `audit`. No search, no MLflow.
FROM environment AS node
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends munge slurm-client slurmctld slurmd \
    && rm -rf /var/lib/apt/lists/* /etc/munge/munge.key \
    && install --directory --owner=munge --group=munge /run/munge
RUN grep -E '^(huggingface_hub|submitit)==' /opt/caddie/source/constraints.txt > /opt/caddie/worker.txt \
    && /opt/caddie/venv/bin/pip install --no-cache-dir -c /opt/caddie/source/constraints.txt -r /opt/caddie/worker.txt
COPY README.md LICENSE /opt/caddie/source/
COPY orchestrator /opt/caddie/source/orchestrator
COPY shims /opt/caddie/source/shims
COPY studies /opt/caddie/source/studies
COPY trainer /opt/caddie/source/trainer
RUN /opt/caddie/venv/bin/pip install --no-cache-dir --no-deps /opt/caddie/source
COPY docker/slurm.conf docker/cgroup.conf /usr/local/share/caddie/
COPY --chmod=755 docker/start-munge docker/start-slurm /usr/local/bin/
# slurmd starts each job as the user who asked for it, and needs root to do so.
# hadolint ignore=DL3002
USER 0:0
HEALTHCHECK --interval=10s --timeout=10s --start-period=30s --retries=6 \
    CMD ["/bin/sh", "-c", "sinfo --noheader --format=%t | grep -Eqx 'idle|mix|alloc|comp'"]
CMD ["start-slurm"]

# What a build without --target makes, and what a container runtime of a cluster starts in the place of an interpreter.
FROM environment AS trainer
COPY trainer /opt/caddie/lib/trainer
ENV PYTHONPATH=/opt/caddie/lib
USER ${CADDIE_UID}:${CADDIE_UID}
WORKDIR /srv/caddie
CMD ["python", "-m", "trainer", "--help"]

# The control plane: search, controller, reports, MLflow's client and server. No torch, no GPU, not root.
#
#     docker build -f docker/orchestrator.Dockerfile -t caddie-orchestrator .
#
# Runs are jobs of a cluster: its commands are here; its /etc/slurm and /run/munge are mounted.
ARG BASE=debian:bookworm-20260824-slim@sha256:88200866dfff7ea7f5cbcb6ec7c8a701889efe6fe859fe64d6990e4b07ea4171

# hadolint ignore=DL3006
FROM ${BASE} AS orchestrator
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 python3-venv slurm-client \
    && rm -rf /var/lib/apt/lists/* /etc/munge/munge.key
COPY pyproject.toml constraints.txt /opt/caddie/source/
COPY docker/requirements.py /opt/caddie/source/docker/
RUN python3 -m venv /opt/caddie/venv \
    && python3 /opt/caddie/source/docker/requirements.py orchestrator postgresql s3 > /opt/caddie/orchestrator.txt \
    && /opt/caddie/venv/bin/pip install --no-cache-dir -c /opt/caddie/source/constraints.txt -r /opt/caddie/orchestrator.txt
COPY README.md LICENSE /opt/caddie/source/
COPY orchestrator /opt/caddie/source/orchestrator
COPY shims /opt/caddie/source/shims
COPY studies /opt/caddie/source/studies
COPY trainer /opt/caddie/source/trainer
RUN /opt/caddie/venv/bin/pip install --no-cache-dir --no-deps /opt/caddie/source
COPY --chmod=755 docker/start-mlflow /usr/local/bin/
ARG CADDIE_UID=10001
RUN groupadd --gid "${CADDIE_UID}" caddie \
    && useradd --uid "${CADDIE_UID}" --gid caddie --create-home --shell /bin/bash caddie \
    && install --directory --owner=caddie --group=caddie /srv/caddie
ENV PATH=/opt/caddie/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    CADDIE_HOME=/srv/caddie
USER ${CADDIE_UID}:${CADDIE_UID}
WORKDIR /srv/caddie
# Whether the home is there and every study's ledger can be read.
HEALTHCHECK --interval=60s --timeout=30s --start-period=30s --retries=3 \
    CMD ["caddie", "study", "list", "--json"]
ENTRYPOINT ["caddie"]
CMD ["--help"]

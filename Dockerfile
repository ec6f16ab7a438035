# dmat with all extras, for the scheduler and the workers of docker-compose.yml.
FROM python:3.12.13-slim-bookworm AS build
# The address of an index with other builds of torch, such as those for the CPU alone, which are gigabytes smaller. Empty:
# the builds with CUDA that constraints.txt names, which compute on a CPU too.
ARG TORCH_INDEX=
RUN python -m venv /opt/dmat
ENV PATH=/opt/dmat/bin:$PATH
WORKDIR /build
COPY constraints.txt ./
# By themselves: a layer of gigabytes that a change of dmat does not touch.
RUN pip install --no-cache-dir --constraint constraints.txt \
    ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch torchvision
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY cli cli
COPY dmat dmat
RUN pip install --no-cache-dir --constraint constraints.txt ".[all]"

FROM python:3.12.13-slim-bookworm
# dmat asks git for the commit of a project, which belongs to a user of the host.
RUN apt-get update && apt-get install --yes --no-install-recommends git && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory '*' \
    && useradd --create-home dmat
COPY --from=build /opt/dmat /opt/dmat
ENV PATH=/opt/dmat/bin:$PATH
USER dmat
WORKDIR /home/dmat

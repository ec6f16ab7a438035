# dmat with all extras, for the scheduler and the workers of docker-compose.yml.
FROM python:3.12.13-slim-bookworm AS build
# Which builds of torch to install: cpu, or cu130 for the version of CUDA that constraints.txt names.
ARG TORCH=cpu
RUN python -m venv /opt/dmat
ENV PATH=/opt/dmat/bin:$PATH
WORKDIR /build
COPY constraints.txt ./
# By themselves: a layer of gigabytes that a change of dmat does not touch.
RUN pip install --no-cache-dir --constraint constraints.txt \
    --extra-index-url "https://download.pytorch.org/whl/${TORCH}" torch torchvision
COPY pyproject.toml README.md LICENSE ./
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

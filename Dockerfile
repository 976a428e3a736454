# docker build -t adapterkit . && docker run --rm -v "$PWD:/data" adapterkit inspect my-adapter
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY adapterkit adapterkit
COPY cli cli
RUN pip wheel --no-cache-dir --wheel-dir /wheels -c constraints.txt .

FROM python:3.11-slim
RUN --mount=from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index --find-links /wheels adapterkit
WORKDIR /data
USER 1000
ENTRYPOINT ["adapterkit"]
CMD ["--help"]

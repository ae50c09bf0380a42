# Stage one: `llm-neo dump`, plan, verify and inspect, without DeepSpeed. In a fresh clone:
#
#   docker build --file examples/docker/teacher.Dockerfile --tag registry.example.org/llm-neo-teacher:0.1.0 .
#
# This file has not been built: a test compares what it installs and runs with the project. For teacher.backend: vllm
# install '/src[vllm]' without the constraints. PyPI's torch brings its CUDA libraries; the driver is the host's.
#
# Not -slim: what teacher.compile makes needs a C++ compiler.
FROM python:3.11
COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints.txt /src
RUN useradd --create-home --uid 1000 llm-neo
USER 1000
WORKDIR /home/llm-neo
ENTRYPOINT ["llm-neo"]
CMD ["--help"]

# Stage two: `llm-neo train`, evaluate, merge and chat. In a fresh clone:
#
#   docker build --file examples/docker/student.Dockerfile --tag registry.example.org/llm-neo-student:0.1.0 .
#
# This file has not been built: a test compares what it installs and runs with the project. Trackers and 4 bits are
# more extras: '/src[train,wandb,qlora]'. PyPI's torch brings its CUDA libraries; the driver is the host's.
#
# Not -slim: DeepSpeed and train.compile may need a C++ compiler.
FROM python:3.11
COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints.txt '/src[train]'
RUN useradd --create-home --uid 1000 llm-neo
USER 1000
WORKDIR /home/llm-neo
ENTRYPOINT ["llm-neo"]
CMD ["--help"]

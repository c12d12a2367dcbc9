# README's commands in a container. Its folder is /dinocell; mount data beside it:
#   docker build -t dinocell .                              CPU
#   docker build -t dinocell --build-arg TORCH=cu126 .      CUDA 12.6; then docker run --gpus all ...
#   docker run --rm dinocell                                the demo images
#   docker run --rm -v "$PWD:/data" dinocell python infer.py /data/img.tif out=/data/results
#   docker run --rm -v "$PWD:/data" dinocell python train_seg.py configs/seg_laptop.yaml output_base_dir=/data
FROM python:3.11-slim
ARG TORCH=cpu
WORKDIR /dinocell
COPY requirements.txt .
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/${TORCH} \
    && pip install --no-cache-dir -r requirements.txt
COPY . .
ENV PYTHONUNBUFFERED=1
CMD ["python", "infer.py"]

"""Installs maedistill: `pip install -e .[demo,fast,test]`, or `make env`, which does that in a fresh `.venv`."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="maedistill",
    version="0.1.0",
    description="Small Vision Transformers distilled from large masked autoencoders: MAE, DMAE and AMD",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["maedistill", "maedistill.*"]),
    install_requires=[
        # The seven the project stands on. pydantic, PyYAML, numpy, safetensors, pillow, tqdm and fsspec come with them.
        "torch>=2.11",
        "torchvision>=0.26",
        "timm>=1.0.31,<2",
        "einops>=0.8",
        "webdataset>=1.0.2,<2",
        "deepspeed>=0.19.8,<0.20",  # training/engine.py relies on one internal hook of 0.19
        "pytest>=8",
    ],
    extras_require={
        "fast": ["simplejpeg>=1.7"],  # decodes JPEGs a little faster than torchvision, and in parts
        "demo": ["scikit-learn", "matplotlib", "tensorboard"],
        "remote": ["s3fs", "gcsfs"],  # http and hf need nothing more
        "export": ["onnx", "onnxscript", "onnxruntime"],
        "test": ["ruff", "mypy", "pytest-xdist", "hypothesis", "s3fs", "moto[s3,server]"],
    },
)

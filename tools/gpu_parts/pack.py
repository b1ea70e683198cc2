"""Packages for a machine without network: those that an image with torch usually lacks, in a folder for PYTHONPATH."""

import importlib.metadata
import importlib.util
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from maedistill.errors import ConfigError

# Pure Python packages run on any Python version. These are import names; distribution names have `-` instead of `_`.
PURE = ("deepspeed", "timm", "webdataset", "braceexpand", "hjson", "annotated_types", "typing_inspection", "pydantic")
COMPILED = ("pydantic_core", "simplejpeg")
_PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "csrc")  # sources of kernels that are never built


def pack(folder: Path, *, python: str) -> str:
    """Fill `folder`; return instructions for its use. python: Python version of the target machine, such as 3.12."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PURE:
        _copy(name, folder)
    _download([f"{name}=={importlib.metadata.version(name)}" for name in COMPILED], folder, python=python)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    return (
        f"{folder}: {size:.0f} MB, for Python {python} on x86-64 Linux. Put it into the checkout that goes there; in "
        f"that checkout run\n  PYTHONPATH=$PWD:$PWD/{shlex.quote(folder.name)} python3 tools/gpu_check.py\n"
        "The machine must already have torch, torchvision, triton and what usually comes with them: numpy, pillow, "
        "PyYAML, einops, safetensors, huggingface_hub, fsspec, tqdm, psutil, msgpack, packaging, pytest, "
        "hypothesis, filelock. The check names what is missing."
    )


def _copy(name: str, folder: Path) -> None:
    """Copy an installed package and its metadata. Raise ConfigError if it is not installed."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ConfigError(f"{name} is not installed here", "run --pack where maedistill is installed: make env")
    origin = Path(found.origin)
    if origin.name == "__init__.py":
        shutil.copytree(origin.parent, folder / name, ignore=_LEFT_OUT, dirs_exist_ok=True)
    else:
        shutil.copy(origin, folder)
    top = origin.parent.parent if origin.name == "__init__.py" else origin.parent
    for about in top.glob(f"{name}-*.dist-info"):
        shutil.copytree(about, folder / about.name, ignore=_LEFT_OUT, dirs_exist_ok=True)


def _download(requirements: list[str], folder: Path, *, python: str) -> None:
    """Download wheels for the given Python version and unpack them. Raise ConfigError if pip fails."""
    with tempfile.TemporaryDirectory(prefix="maedistill-wheels-") as wheels:
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
        options += [f"--platform={platform}" for platform in _PLATFORMS]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", wheels, *requirements]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            last = next(iter(ended.stderr.strip().splitlines()[-1:]), "pip said nothing")
            raise ConfigError(f"pip download {' '.join(requirements)}: {last}", "check --python and the network")
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)

import tempfile
from pathlib import Path

from setuptools import find_packages, setup

# pip builds in the source tree: these two would stay there, an old build/ with files that are gone from src/.
scratch = tempfile.TemporaryDirectory()

setup(
    name="t2i-training",
    version="0.1.0",
    description="Training scripts that fine-tune text-to-image diffusion models",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"t2i_training.sources.clip_vocabulary": ["merges.txt.gz", "LICENSE"]},
    python_requires=">=3.11",
    install_requires=[
        line
        for line in (Path(__file__).parent / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ],
    options={"build": {"build_base": scratch.name}, "egg_info": {"egg_base": scratch.name}},
)

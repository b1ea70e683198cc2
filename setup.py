"""Names the packages; pyproject.toml has everything else. configs/ goes into the wheel as maedistill.configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["maedistill", "maedistill.*"]), "maedistill.configs"],
    package_dir={"maedistill.configs": "configs"},
    package_data={"maedistill": ["py.typed", "report/page.css", "report/page.js"], "maedistill.configs": ["*/*.yaml"]},
)

"""A wheel carries `conf/` as `nemo_tsdkd/conf`. Everything else stands in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConf(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a checkout has its own conf/
            self.copy_tree("conf", str(Path(self.build_lib, "nemo_tsdkd", "conf")))


setup(cmdclass={"build_py": BuildWithConf})

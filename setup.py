import sys
from pathlib import Path

from setuptools import setup

# A build front end does not put the folder of setup.py on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_support.native import BuildNative, CleanBuildPy, extension

setup(ext_modules=[extension()], cmdclass={"build_ext": BuildNative, "build_py": CleanBuildPy})

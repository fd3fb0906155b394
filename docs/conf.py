"""The documentation site: `make docs`. Warnings are errors, and the notebooks of examples/ are executed."""

import os
import pathlib
import shutil
import sys

HERE = pathlib.Path(__file__).resolve().parent

project = "llava_jax"
copyright = "The llava_jax authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
highlight_language = "none"
html_theme = "furo"
html_title = "llava_jax"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Sphinx reads only what lies below docs/. The pages link to where the notebooks are in the repository.
shutil.copytree(HERE.parent / "examples", HERE / "examples", dirs_exist_ok=True)


def setup(app):
    app.connect("source-read", link_to_the_copy)


def link_to_the_copy(app, name, source):
    source[0] = source[0].replace("../examples/", "examples/")


nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True
# What the notebooks run on, and the llava-jax that they call.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"

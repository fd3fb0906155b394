"""The documentation site: `make docs`. Warnings are errors, and the notebooks of examples/ are executed."""

import os

project = "llava_jax"
copyright = "The llava_jax authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "llava_jax"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_execution_timeout = 300
nb_merge_streams = True
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what the notebooks run on

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {"Picture": "Picture", "Image": "Image"}

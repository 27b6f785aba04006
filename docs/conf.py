"""Configuration of the documentation (Sphinx)."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import warnings
from importlib.metadata import metadata
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "extensions"))

# -- Project ---------------------------------------------------------------------------------------------------------

info = metadata("scperturbdiff")
project = info["Name"]
author = "scperturbdiff developers"
copyright = f"2026, {author}"
version = release = info["Version"]

# -- General ---------------------------------------------------------------------------------------------------------

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    *sorted(path.stem for path in (HERE / "extensions").glob("*.py")),
]
root_doc = "index"
needs_sphinx = "8.1"
nitpicky = True
exclude_patterns = ["_build", "extensions", "scverse", "Thumbs.db", ".DS_Store", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
# docstrings write code in single backticks
default_role = "literal"

# -- API reference ---------------------------------------------------------------------------------------------------

autosummary_generate = True
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_include_init_with_doc = False
napoleon_use_rtype = True
napoleon_use_param = True
typehints_defaults = "comma"
typehints_use_rtype = True
always_use_bars_union = True
# not ours to mend
warnings.filterwarnings("ignore", message="'sphinx_autodoc_typehints")

# -- Pages and notebooks ---------------------------------------------------------------------------------------------

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "html_admonition", "html_image"]
myst_heading_anchors = 3
# notebooks are stored with their outputs; tests run them
nb_execution_mode = "off"
nb_merge_streams = True

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def copy_tutorials() -> None:
    """Put the notebooks of `tutorials/` where Sphinx finds them."""
    target = HERE / "tutorials"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
        shutil.copy(notebook, target)


copy_tutorials()

# -- Links into other projects ---------------------------------------------------------------------------------------

PROJECTS = {
    "anndata": "https://anndata.readthedocs.io/en/stable/",
    "lightning": "https://lightning.ai/docs/pytorch/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
    "mudata": "https://mudata.readthedocs.io/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "python": "https://docs.python.org/3/",
    "scanpy": "https://scanpy.readthedocs.io/en/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "scvi": "https://docs.scvi-tools.org/en/stable/",
    "sklearn": "https://scikit-learn.org/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}


def reachable(projects: dict[str, str], timeout: float = 5.0) -> dict[str, str]:
    """Those of `projects` whose inventory of names can be fetched; none with `DOCS_OFFLINE=1`."""
    if os.environ.get("DOCS_OFFLINE") == "1":
        print("intersphinx: DOCS_OFFLINE=1, no links into other projects")
        return {}
    found = {}
    for name, url in projects.items():
        try:
            with urlopen(f"{url}objects.inv", timeout=timeout):
                found[name] = url
        except (URLError, TimeoutError, ConnectionError, socket.gaierror) as error:
            print(f"intersphinx: no links into {name}, {url} cannot be reached ({error})")
    return found


intersphinx_mapping = {name: (url, None) for name, url in reachable(PROJECTS).items()}
intersphinx_timeout = 10

# Names of other projects become links where an inventory has them and stay plain text otherwise, so that the build is
# as strict without a network as with one: every name of this package must resolve.
foreign = ["abc", "collections", "dataclasses", "numbers", "os", "pathlib", "pd", "typing", *PROJECTS]
builtin = ["bool", "bytes", "dict", "float", "int", "list", "object", "set", "str", "tuple", "type", "Ellipsis", "None"]
nitpick_ignore_regex = [
    (r"py:.*", rf"({'|'.join(foreign)})(\..+)?"),
    (r"py:.*", rf"({'|'.join(builtin)})"),
    (r"py:exc", r"\w+(Error|Warning)"),
]
# inherited from scvi-tools; a link where its inventory can be fetched
# and a value that a public function returns, described there
nitpick_ignore = [("py:meth", "load"), ("py:class", "PopulationSummary")]
# where a name is defined -> where it is documented
documented_as = {
    "pd.DataFrame": "pandas.DataFrame",
    "load": "scvi.model.base.BaseModelClass.load",
    "anndata._core.anndata.AnnData": "anndata.AnnData",
    "mudata._core.mudata.MuData": "mudata.MuData",
    "pandas.core.frame.DataFrame": "pandas.DataFrame",
    "pandas.core.series.Series": "pandas.Series",
    "scipy.sparse._csr.csr_matrix": "scipy.sparse.csr_matrix",
    "scvi.model.base._base_model.BaseModelClass": "scvi.model.base.BaseModelClass",
    "torch.nn.modules.module.Module": "torch.nn.Module",
}

# -- HTML ------------------------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = project
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False, "use_download_button": False}

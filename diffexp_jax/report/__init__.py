"""What people look at: image grids, curves, and pages of one file each that hold all of it.

`refresh` and `save` write a run's curves.png and report.html from what is in its folder, `save_beside` a page of two
runs. Any other page (a sweep's: diffexp_jax/sweeps/page.py) is `save_page` of sections, see `page.py`.
"""

from diffexp_jax.report.animation import save_animation
from diffexp_jax.report.beside import pictures_of_two, save_beside
from diffexp_jax.report.curves import save_curves
from diffexp_jax.report.grids import COMPARISONS, GRID, save_grid
from diffexp_jax.report.page import Folded, Legend, Picture, Row, Section, Stack, Table, drawing, plain, save_page
from diffexp_jax.report.results import Result, as_text, before_and_after, evaluation_of
from diffexp_jax.report.run import REPORT, finish, refresh, save, save_images

__all__ = ["COMPARISONS", "GRID", "REPORT", "Result", "as_text", "before_and_after", "save_curves", "save_grid"]
__all__ += ["Folded", "Legend", "Picture", "Row", "Section", "Stack", "Table", "drawing", "plain", "save_page"]
__all__ += [
    "evaluation_of",
    "finish",
    "pictures_of_two",
    "refresh",
    "save",
    "save_animation",
    "save_beside",
    "save_images",
]

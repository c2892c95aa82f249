"""The figures of both papers, by name. A figure is loaded when it is asked for.

`package.module:Name` and `path/to/file.py:Name` name figures from outside the tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine import extension
from engine.errors import ConfigError

if TYPE_CHECKING:
    from experiments.figures.base import Figure

FIGURES = {
    f"{paper}/{name}": f"experiments.figures.{paper}.{name}:{cls}"
    for paper, names in {
        "layerkv": {
            "fig1": "Fig1",
            "fig2": "Fig2",
            "fig4": "Fig4",
            "fig5": "Fig5",
            "fig6": "Fig6",
            "fig6_count": "Fig6Count",
            "fig7": "Fig7",
            "fig7_link": "Fig7Link",
            "fig8": "Fig8",
            "fig9": "Fig9",
            "eq34": "Eq34",
            "tab1": "Tab1",
            "forecast": "Forecast",
        },
        "vtensor": {"fig2": "Fig2", "fig3": "Fig3", "fig7": "Fig7", "fig8": "Fig8", "fig11a": "Fig11a"},
    }.items()
    for name, cls in names.items()
}


def find(name: str) -> Figure:
    """The figure of that name.

    Raises:
      ConfigError: there is none (lists the known ones), or what the name leads to is no figure.
    """
    from experiments.figures.base import Figure

    spec = FIGURES.get(name, name)
    if not extension.is_external(spec):
        raise ConfigError(f"figure {name!r} is unknown; known: {', '.join(FIGURES)}, or {extension.FORMS}")
    found = extension.load(spec, "figure")
    if not (isinstance(found, type) and issubclass(found, Figure)):
        raise ConfigError(f"figure {name!r}: {spec} is not a subclass of experiments.figures.base.Figure")
    return found()

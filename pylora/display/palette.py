"""The colours of every picture: told apart by colour-blind people too, and on paper.

The hues are those of Okabe and Ito (2008). A picture never speaks by colour alone: lines differ in
their marks or dashes as well, and bars carry their names. Nothing is drawn here.
"""

from __future__ import annotations

BLUE = "#0072B2"
SKY = "#56B4E9"
GREEN = "#009E73"
ORANGE = "#E69F00"
VERMILION = "#D55E00"
PURPLE = "#CC79A7"
YELLOW = "#F0E442"
BLACK = "#000000"

INK = "#333333"  # lines and words of a picture itself
PAPER = "#F2F2F2"  # behind what is not part of the plot
GREYS = ("#BDBDBD", "#6B6B6B", "#404040")  # what a result is compared with, light to dark

# In the order in which series take them. Yellow is last: a thin line of it is hard to see.
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)
MARKS = "osD^vPX*"  # one beside each of SERIES

PRECISIONS = {
    "fp32": BLUE,
    "fp32x3": SKY,
    "bf16": GREEN,
    "fp16": YELLOW,
    "int8": PURPLE,
    "int4": ORANGE,
}


def series(index: int) -> tuple[str, str]:
    """(colour, mark) of the series with this number; after the last they begin again."""
    return SERIES[index % len(SERIES)], MARKS[index % len(MARKS)]

"""The figures by which runs of a task are compared."""

from typing import NamedTuple


class Figure(NamedTuple):
    """A figure of a result: its key there, and how a table shows it. The first of a task is its main score."""

    name: str
    words: str
    is_share: bool = False  # in [0, 1], shown in percent
    has_spread: bool = False  # shown with its deviation over seeds
    digits: int = 3  # behind the point; of a share in percent there is one

    def show(self, mean: float | None, deviation: float | None) -> str:
        """A cell of a table; nothing for a figure that was not measured."""
        if mean is None:
            return ""
        scale, unit = (100, " %") if self.is_share else (1, "")
        digits = 1 if self.is_share else self.digits
        spread = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
        return f"{scale * mean:.{digits}f}{spread}{unit}"

    def show_difference(self, difference: float, low: float, high: float) -> str:
        """A cell about a difference of means and its interval, of shares in points; and whether there is one."""
        scale, unit = (100, " points") if self.is_share else (1, "")
        digits = 1 if self.is_share else self.digits
        shown = (f"{scale * value:+.{digits}f}" for value in (difference, low, high))
        is_apart = low > 0 or high < 0
        return "{} [{}, {}]{}, {}told apart".format(*shown, unit, "" if is_apart else "not ")

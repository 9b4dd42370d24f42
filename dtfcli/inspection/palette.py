"""Colors of depth, the same in page, picture and terminal.

Lightness goes one way only, so that the ramps read without color vision and in print: on a light ground deeper is
darker, on a dark ground deeper is brighter.
"""

LEVELS = 17
"""Steps of a ramp: sixteen routed layers and none."""

SEQUENTIAL = (
    ("#f3f1ec", "#fdecc8", "#fdc46c", "#ef8a1d", "#c4530a", "#7a2a07"),
    ("#23262d", "#3b2c22", "#6b3d16", "#a95d10", "#e58e1a", "#ffd27a"),
)
"""Stops from no depth to full depth, on a light and on a dark ground."""


def shades(stops: tuple[str, ...]) -> list[str]:
    """`LEVELS` colors along a ramp, "#rrggbb"."""
    return [blend(stops, level / (LEVELS - 1)) for level in range(LEVELS)]


def blend(stops: tuple[str, ...], place: float) -> str:
    """The color at a place in [0, 1] of a ramp."""
    position = min(1.0, max(0.0, place)) * (len(stops) - 1)
    low = min(int(position), len(stops) - 2)
    pairs = zip(channels(stops[low]), channels(stops[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (position - low)):02x}" for a, b in pairs)


def channels(color: str) -> tuple[int, int, int]:
    """Red, green and blue of "#rrggbb", 0 to 255."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it, 0 to 1."""
    parts = [c / 255 for c in channels(color)]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def readable_on(background: str) -> str:
    """The text color, near black or white, with the higher contrast."""
    return "#ffffff" if luminance(background) < 0.195 else "#17140f"
